"""One finite score per response, whatever the batch; failures are never hidden."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np

from lockstep.checking.conformance.kit import Inapplicable, check, near, require, same
from lockstep.checking.conformance.subjects import RewardModelSubject
from lockstep.types import Prompt


@check("reward_model", usually="scores per token or per pair, an object array, or a division by zero")
def one_finite_score_per_response(subject: RewardModelSubject) -> None:
    """`score` returns finite float32 [B]: one number per response, even for a lone stop token."""
    responses = subject.responses()
    scores = subject.build().score(responses)
    require(isinstance(scores, np.ndarray), f"the scores are a {type(scores).__name__}, not a numpy array")
    require(scores.dtype == np.float32, f"the scores are {scores.dtype}, not float32")
    require(scores.shape == (8,), f"the scores of 8 responses have shape {scores.shape}")
    require(np.isfinite(scores).all(), f"the scores are {scores.tolist()}")


@check("reward_model", usually="scores were stored in an array with the token ids' dtype: 0.73 becomes 0")
def fractions_survive(subject: RewardModelSubject) -> None:
    """A score of 0.73 stays 0.73 (invariant 11)."""
    if not {"function", "source"} & set(vars(subject.config)):
        raise Inapplicable("its scores come from neither the kit's function nor the kit's model, so they may be whole numbers")
    scores = subject.build().score(subject.responses())
    require(np.any(scores != np.round(scores)), f"all scores are whole numbers: {scores.tolist()}")
    if "function" in vars(subject.config):
        from lockstep.checking.conformance.world import word_scores

        near("scores", scores, word_scores([], subject.responses().texts), 1e-5)


@check("reward_model", usually="batch statistics, such as normalising by the mean, or padding is read")
def scores_do_not_depend_on_the_batch(subject: RewardModelSubject) -> None:
    """A response has the same score alone, next to others and in another order (invariant 5)."""
    model = subject.build()
    scores = model.score(subject.responses())
    order = np.array([3, 0, 7, 1, 6, 2, 5, 4])
    tolerance = subject.world.tolerance(1e-5, 5e-2)
    near("scores in another order", model.score(subject.responses(order)), scores[order], tolerance)
    near("scores one by one", np.concatenate([model.score(subject.responses([i])) for i in (1, 4)]), scores[[1, 4]], tolerance)


@check("reward_model", usually="the score is read at the last column instead of the last real token")
def padding_is_inert(subject: RewardModelSubject) -> None:
    """Columns of padding on either side change no score (invariant 4)."""
    model = subject.build()
    wide = model.score(subject.responses(prompt_columns=10, response_columns=9))
    near("scores under more padding", wide, model.score(subject.responses()), subject.world.tolerance(1e-5, 5e-2))


@check("reward_model", usually="dropout left on, or a judge sampled at a temperature above 0")
def the_same_response_has_the_same_score(subject: RewardModelSubject) -> None:
    """Scoring twice gives bitwise the same numbers (invariant 22)."""
    model = subject.build()
    same("scores", model.score(subject.responses()), model.score(subject.responses()))


class _Unreadable:
    """Raises at every access, like a failing endpoint or a broken row."""

    def _fail(self, *_: object, **__: object) -> None:
        raise ConnectionError("this cannot be read")

    __len__ = __iter__ = __getitem__ = __array__ = __getattr__ = _fail


@check("reward_model", usually="a broad `except` that returns 0: the policy then learns to cause failures")
def failures_are_heard(subject: RewardModelSubject) -> None:
    """A failed score is an exception or NaN, never a number."""
    responses = subject.responses()
    broken = replace(responses, prompts=_Unreadable(), texts=_Unreadable(), sequences=_Unreadable())
    model = subject.build()
    try:
        scores = np.asarray(model.score(broken), np.float64)
    except Exception:
        return
    require(np.isnan(scores).all(), f"responses that cannot be read were scored {scores.tolist()}")


@check("reward_model", usually="a column is read with a default, as in truth.get('answer', ''): rows without one score 0")
def missing_columns_are_heard(subject: RewardModelSubject) -> None:
    """Without the data's columns, scores are unchanged or NaN, or `score` raises."""
    model, responses = subject.build(), subject.responses()
    scores = model.score(responses)
    bare = replace(responses, prompts=[Prompt(prompt.messages) for prompt in responses.prompts])
    try:
        found = np.asarray(model.score(bare), np.float64)
    except Exception:
        return
    if np.array_equal(found, scores):
        raise Inapplicable("its scores do not depend on columns of the data")
    require(np.isnan(found).all(), f"without the columns of the data the scores are {found.tolist()}")


@check("reward_model", usually="a detail per batch or per token, or of an earlier batch")
def details_are_numbers_per_response(subject: RewardModelSubject) -> None:
    """`details` returns float32 [B] for the last batch, under names that do not change."""
    model = subject.build()
    names = []
    for count in (8, 3):
        model.score(subject.responses(slice(count)))
        found = model.details()
        names.append(sorted(found))
        for name, values in found.items():
            require(isinstance(values, np.ndarray) and values.dtype == np.float32, f"the detail {name} of {count} is not float32")
            require(values.shape == (count,), f"the detail {name} of {count} responses has shape {values.shape}")
    if not names[0] and not names[1]:
        raise Inapplicable("it has no details")
    require(names[0] == names[1], f"8 responses have the details {names[0]}, 3 have {names[1]}")


@check("reward_model", usually="masks or tokens are edited in place")
def inputs_are_left_alone(subject: RewardModelSubject) -> None:
    """Scoring does not change tokens, masks, texts or the truth of prompts."""
    responses = subject.responses()
    before = copy.deepcopy((list(responses.texts), vars(responses.sequences), [dict(p.truth) for p in responses.prompts]))
    subject.build().score(responses)
    require(list(responses.texts) == before[0], "the texts were changed")
    changed = sum(dict(p.truth) != known for p, known in zip(responses.prompts, before[2], strict=True))
    require(not changed, f"what is known about {changed} prompts was changed")
    for name, array in before[1].items():
        same(name, getattr(responses.sequences, name), array)


@check("reward_model", usually="the network is returned without a copy, so PPO trains the reward model")
def the_value_network_is_a_copy(subject: RewardModelSubject) -> None:
    """Changing the value network changes no score, and each call returns a new one (invariant 21)."""
    model = subject.build()
    network = model.value_network()
    if network is None:
        raise Inapplicable("it has no network to start a value network from")
    scores = model.score(subject.responses())
    values = network.evaluate(subject.responses().sequences, ["values"])["values"]
    require(values.shape == (8, 6), f"its values have shape {values.shape} where [8, 6] was expected")
    network.rescale(3.0, 1.0)
    same("scores after the value network was changed", model.score(subject.responses()), scores)
    again = model.value_network().evaluate(subject.responses().sequences, ["values"])["values"]
    same("values of the next value network", again, values)


@check("reward_model", usually="`inputs` is missing: stages trained on older versions of its inputs would be reused")
def what_it_reads_is_declared(subject: RewardModelSubject) -> None:
    """`inputs` declares every output that it opens and every reward model that it uses."""
    declared = subject.cls.inputs(subject.config)
    subject.build()
    if not subject.opened and not subject.members:
        raise Inapplicable("it opens no output and uses no other reward model")
    undeclared = sorted(set(subject.opened) - declared.outputs.keys())
    undeclared += [str(group["name"]) for group in subject.members if group not in declared.members]
    count = len(undeclared)
    require(not undeclared, f"{count} of {len(subject.opened) + len(subject.members)} are not declared: {', '.join(undeclared)}")
