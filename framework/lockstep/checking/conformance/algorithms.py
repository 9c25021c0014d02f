"""What an algorithm does, seen from what crosses the waist: which tokens count, where rewards land, how many steps it takes,
which seeds it uses, and that a restart changes nothing.

A check that needs a configuration key (``minibatches``, ``kl_target``), a batch array (``returns``) or a metric
(``objective/kl``) applies to every algorithm that has it under that name. `docs/metrics.md` lists the names.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.checking.conformance.kit import Inapplicable, check, near, near_arrays, require, same, same_arrays
from lockstep.checking.conformance.subjects import AlgorithmSubject, Trace, constant, derivative, loss_of, uneven
from lockstep.checking.conformance.world import Data
from lockstep.checking.tap import GenerateCall, ScoreCall
from lockstep.errors import RewardError
from lockstep.interfaces import Metrics, Responses, Term
from lockstep.learning import randomness
from lockstep.text import encoding

NO_WHITENING = {"whiten_advantages": False, "whiten_rewards": False}


def timeless(metrics: Metrics) -> Metrics:
    """Drop timings, which differ between two equal runs."""
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def the_metric(metrics: Metrics, name: str) -> float:
    """
    Raises:
      Inapplicable: it is not logged.
    """
    if name not in metrics:
        raise Inapplicable(f"it does not log {name}")
    return metrics[name]


def in_batch(trace: Trace, name: str, step: int = 0) -> list[Term]:
    """The terms whose loss reads the array ``name``.

    Raises:
      Inapplicable: there are none.
    """
    if not (terms := [term for term in trace.terms(step) if name in term.batch]):
        raise Inapplicable(f"its losses read no array called {name}")
    return terms


# --------------------------------------------------------------------------------------------------- steps and batches


@check("algorithm", usually="an extra step at the end of a pass, or `minibatches` has no effect")
def optimizer_steps_are_counted(subject: AlgorithmSubject) -> None:
    """Each step makes epochs x minibatches updates if it has both, else a constant number; the number of steps is what the
    configuration says (invariant 7)."""
    config = subject.config
    both = hasattr(config, "epochs") and hasattr(config, "minibatches")
    for minibatches in (2, 3) if both else (1,):
        trace = subject.run(4 if minibatches == 2 or not both else 1, minibatches=minibatches)
        counts = [len(trace.updates(step)) for step in range(len(trace.steps))]
        expected = config.epochs * minibatches if both else counts[0]
        require(expected and counts == [expected] * len(counts), f"{counts} updates in the first steps, not {expected} in each")
    total = trace.algorithm.total_steps
    if hasattr(config, "iterations"):
        require(total == config.iterations, f"total_steps is {total} where iterations is {config.iterations}")
    elif hasattr(config, "epochs") and hasattr(config, "batch_size"):
        expected = math.ceil(config.epochs * Data.rows / config.batch_size)
        says = f"{config.epochs:g} epochs of {Data.rows} examples in batches of {config.batch_size}"
        require(total == expected, f"total_steps is {total} where {says} are {expected}")


@check("algorithm", usually="the mean of the micro-batches' means, which is a different loss once lengths differ")
def micro_batches_do_not_matter(subject: AlgorithmSubject) -> None:
    """Gradients, loss and metrics of an update do not depend on cutting it into micro-batches (invariant 6)."""
    subject.need("micro_batch_size")
    whole = subject.run(1).updates()[0]
    cut = subject.run(1, micro_batch_size=2).updates()[0]
    require(len(cut.terms) > len(whole.terms), f"micro_batch_size=2 makes {len(cut.terms)} terms, no more than null")
    tolerance = subject.world.tolerance(2e-5, 5e-2)
    near_arrays("with micro_batch_size=2, the gradient of", cut.gradients, whole.gradients, tolerance)
    for name in whole.metrics.keys() - jumping(subject, whole.terms):
        scale = max(1.0, abs(whole.metrics[name]))
        near(f"with micro_batch_size=2, {name}", cut.metrics[name], whole.metrics[name], tolerance * scale)


def jumping(subject: AlgorithmSubject, terms: Sequence[Term]) -> set[str]:
    """The metrics that rounding alone decides, such as the accuracy of a policy that equals its reference: they jump when the
    models' outputs move by 1e-6."""
    noise, found = randomness.generator(0, "noise"), []
    for size in (0.0, 1e-6):
        sums: dict[str, float] = {}
        for term in terms:
            outputs = {n: a + size * noise.normal(size=a.shape) for n, a in subject.outputs(term).items()}
            for name, value in term.loss(np, outputs, term.batch)[1].items():
                sums[name] = sums.get(name, 0.0) + float(value)
        found.append(sums)
    return {name for name, value in found[0].items() if abs(value - found[1][name]) > 1e-3 * max(1.0, abs(value))}


@check("algorithm", usually="a private random number generator, or a shared one that other code has used")
def the_same_seed_is_the_same_run(subject: AlgorithmSubject) -> None:
    """Two runs of one seed are bitwise equal; another seed gives another run (invariant 25)."""
    first, second = subject.run(3), subject.run(3, again=True)
    for step, (one, other) in enumerate(zip(first.metrics, second.metrics, strict=True)):
        require(timeless(one).keys() == timeless(other).keys(), f"step {step} logs different metrics in a second run")
        for name, value in timeless(one).items():
            same(f"{name} of step {step} in a second run", other[name], value)
    second = subject.run(3)
    same_arrays("after a second run, the parameter", second.parameters(), first.parameters())
    third = subject.run(1, seed=1)
    equal = all(
        np.array_equal(a.sequences.tokens, b.sequences.tokens) for a, b in zip(first.terms(0), third.terms(0), strict=False)
    )
    require(not equal, f"with seeds 0 and 1 it trains on the same {len(first.terms(0))} blocks of tokens in step 0")


@check("algorithm", usually="state missing from both the learner's checkpoint and `state`, or a generator that restarts")
def restarts_change_nothing(subject: AlgorithmSubject) -> None:
    """Two steps, a restart from the checkpoint and two more steps equal four steps, bitwise: weights, metrics, samples
    (invariant 29)."""
    changes: dict[str, Any] = {"kl_target": 0.01, "kl_horizon": 50.0}
    if hasattr(subject.config, "optimizer"):
        changes["optimizer"] = {"ema_decay": 0.9}
    whole = subject.run(4, **changes)
    begun = subject.run(2, again=True, **changes)
    algorithm, tap = subject.build(**changes)
    with tempfile.TemporaryDirectory() as folder:
        begun.algorithm.learner.save(Path(folder))
        algorithm.learner.restore(Path(folder))
    algorithm.load_state(json.loads(json.dumps(begun.algorithm.state())))
    rest = Trace(algorithm, tap, {}, [], [])
    subject.go_on(rest, 2, 4)
    for step, (one, other) in enumerate(zip(whole.metrics[2:], rest.metrics, strict=True), 2):
        for name, value in timeless(one).items():
            same(f"{name} of step {step} after a restart", other.get(name), value)
    same_arrays("after a restart, the parameter", rest.parameters(), whole.parameters())
    result, expected = (trace.algorithm.result().parameters() for trace in (rest, whole))
    same_arrays("after a restart, the result's parameter", result, expected)


@check("algorithm", usually="the trained policy is its own reference, or the value network shares weights with the reward model")
def reference_models_are_untouched(subject: AlgorithmSubject) -> None:
    """A model outside the learner keeps its weights, bit for bit (invariant 21)."""
    trace = subject.run(3)
    trained = list(trace.trained().values())
    for position, before in trace.models.items():
        model = trace.tap.models[position]
        if not any(model is each for each in trained):
            same_arrays("of a model that is not trained, the parameter", model.parameters(), before)


@check("algorithm", usually="the learner got copies, or a learning rate of 0: the run trains nothing and reports success")
def training_moves_the_result(subject: AlgorithmSubject) -> None:
    """After three steps `result` differs from the start; with ema_decay it is the moving average (InstructGPT: 0.992)."""
    fresh, _ = subject.build()
    start = fresh.result().parameters()
    result = subject.run(3).algorithm.result().parameters()
    moved = max(float(np.abs(result[name] - start[name]).max()) for name in result if name in start)
    require(moved > 0, f"none of {len(result)} parameters changed in 3 steps: the largest change is 0")
    if not hasattr(subject.config, "optimizer"):
        return
    algorithm, _ = subject.build(optimizer={"ema_decay": 0.9})
    for step in range(3):
        algorithm.step(step)
    algorithm.finish()
    result = algorithm.result().parameters()
    for name, model in algorithm.learner.models.items():
        last = model.parameters()
        matrices = [key for key in result if key in last and last[key].ndim > 1]
        equal = all(np.array_equal(result[key], last[key]) for key in matrices)
        require(not equal, f"with ema_decay=0.9 all {len(matrices)} matrices of the result equal the final ones of the {name}")


@check("algorithm", usually="one generator key for every update, or one order for all passes")
def orders_are_fresh(subject: AlgorithmSubject) -> None:
    """Every update has fresh seeds and a fresh order; a pass reads each example once (invariant 25, section 5)."""
    trace = subject.run(4)
    if sampled := [generation.seeds for generation in trace.of(GenerateCall)]:
        seeds = np.concatenate([s.ravel() for s in sampled])
        repeated = len(seeds) - len(np.unique(seeds))
        require(repeated <= 2, f"{repeated} of {len(seeds)} sampling seeds were used before")
        orders = [order for step in range(len(trace.steps)) for order in minibatch_orders(trace, step)]
        if len(trace.terms(0)) == len(minibatch_orders(trace, 0)):
            return  # one term per pass, of all rows: their order does not affect the result
        require(
            len(orders) < 2 or len(set(orders)) > 1,
            f"all {len(orders)} passes over the batches go through their rows in the order {list(orders[0]) if orders else ''}",
        )
        return
    rows = [[tuple(row) for term in trace.terms(step) for row in real_rows(term)] for step in range(4)]
    first, second = rows[0] + rows[1], rows[2] + rows[3]  # passes of twelve examples, in batches of six
    require(first != second, f"both passes read their {len(first)} rows in the same order")
    if subject.cls.produces == "policy":
        require(sorted(first) == sorted(second), f"two passes of {len(first)} rows do not read the same examples")


def real_rows(term: Term) -> np.ndarray:
    return term.sequences.tokens[term.sequences.mask.any(axis=1)]


def minibatch_orders(trace: Trace, step: int) -> list[tuple[int, ...]]:
    """For each pass over a rollout, the order of its rows in the updates."""
    rollout = trace.generation(step)
    tokens = np.concatenate([rollout.prompt_tokens, rollout.generated.tokens], axis=1)
    place = {row.tobytes(): number for number, row in enumerate(tokens)}
    seen = [
        place[row.tobytes()] for term in trace.terms(step) for row in np.ascontiguousarray(term.sequences.tokens)
        if term.sequences.tokens.shape[1] == tokens.shape[1] and row.tobytes() in place
    ]  # fmt: skip
    return [tuple(seen[i : i + len(tokens)]) for i in range(0, len(seen) - len(tokens) + 1, len(tokens))]


# ----------------------------------------------------------------------------------------------------------------- masks


@check("algorithm", usually="the mask comes from the padding, or it is off by one at the stop token")
def nothing_after_the_stop_token_counts(subject: AlgorithmSubject) -> None:
    """Neither tokens after EOS nor padding count in the loss (invariant 10)."""
    eos = subject.world.tokenizer.eos_id
    for term in subject.run(2).terms():
        rows = term.sequences
        require(
            not (rows.mask & ~rows.response_mask).any(), f"{int((rows.mask & ~rows.response_mask).sum())} padded columns count"
        )
        stopped = np.cumsum(rows.responses == eos, axis=1) - (rows.responses == eos) > 0
        late = int((rows.mask & stopped).sum())
        require(not late, f"{late} of {int(rows.mask.sum())} tokens that count come after the stop token")
        if "logprobs" in term.loss.outputs and rows.mask.size <= 200:
            outside = float(np.abs(derivative(term, subject.outputs(term), "logprobs")[~rows.mask]).max(initial=0))
            require(outside == 0, f"the loss has derivative {outside:.3g} in the log-probability of a token that does not count")


@check("algorithm", usually="pad and EOS are the same token, or the mask ends one token too early")
def the_stop_token_is_learned(subject: AlgorithmSubject) -> None:
    """EOS itself is in the loss: a policy learns to stop (invariant 10)."""
    eos, seen = subject.world.tokenizer.eos_id, 0
    trace = subject.run(2)
    for term in (term for term in trace.terms() if "logprobs" in term.loss.outputs):
        rows = term.sequences
        stops = (rows.responses == eos) & rows.response_mask & rows.mask.any(axis=1)[:, None]  # other rows are padding
        if not stops.any():
            continue
        require(rows.mask[stops].all(), f"{int((stops & ~rows.mask).sum())} of {int(stops.sum())} stop tokens do not count")
        slopes = derivative(term, subject.outputs(term), "logprobs")
        here = slopes[stops & (slopes != 0).any(axis=1)[:, None]]  # a response with advantage 0 teaches nothing
        seen += len(here)
        require(
            not len(here) or np.any(here != 0),
            f"the loss has derivative 0 in the log-probabilities of all {len(here)} stop tokens",
        )
    if not seen:
        raise Inapplicable("none of its losses reads the log-probability of a stop token")


@check("algorithm", usually="masking by multiplication instead of selection: 0 x NaN is NaN")
def masked_outputs_are_inert(subject: AlgorithmSubject) -> None:
    """Model outputs for masked tokens and padded rows change no bit of loss or metrics (invariant 9)."""
    for term in subject.run(1).updates()[0].terms:
        outputs, mask = subject.outputs(term), term.sequences.mask
        for garbage in (np.nan, 1e30):
            dirty = {n: np.where(mask if a.ndim == 2 else mask.any(axis=1), a, garbage) for n, a in outputs.items()}
            clean, other = (term.loss(np, values, term.batch) for values in (outputs, dirty))
            same(f"with {garbage:g} under the mask, the loss", float(other[0]), float(clean[0]))
            for name in clean[1]:
                same(f"with {garbage:g} under the mask, {name}", float(other[1][name]), float(clean[1][name]))


@check("algorithm", usually="each row is averaged first, so a token of a short response weighs more")
def every_token_weighs_the_same(subject: AlgorithmSubject) -> None:
    """In a next-token loss each counted token has weight 1 / n, where n counts the whole update (invariant 27)."""
    for micro_batch_size in (None, 2):
        for update in subject.run(1, micro_batch_size=micro_batch_size).updates():
            terms = [term for term in update.terms if term.loss.outputs == ("logprobs",) and set(term.batch) == {"weights"}]
            if len(terms) < len(update.terms):
                raise Inapplicable("its loss is not a plain next-token loss")
            slopes = np.concatenate([derivative(t, subject.outputs(t), "logprobs")[t.sequences.mask] for t in terms])
            near("the weight of each token", -slopes * len(slopes), np.ones(len(slopes)), 1e-4)


@check("algorithm", usually="the prompt is trained on too, or a demonstration lacks its EOS")
def only_the_response_counts(subject: AlgorithmSubject) -> None:
    """Of a demonstration, exactly the response and its EOS count, and nothing of the prompt (invariant 27)."""
    subject.need("prompt_loss")
    tokenizer = subject.world.tokenizer
    demonstrations = {tuple(tokenizer.encode(d.response) + [tokenizer.eos_id]) for d in Data().demonstrations("train")}
    for term in subject.run(1).terms():
        rows = term.sequences
        counted = derivative(term, subject.outputs(term), "logprobs") != 0
        for tokens, counts in zip(rows.responses, counted, strict=True):
            words = tuple(int(token) for token in tokens[counts])
            require(words in demonstrations, f"the tokens {list(words)} count, but no demonstration has that response with EOS")


# --------------------------------------------------------------------------------------------------------- reinforcement


@check("algorithm", usually="log-probabilities not at the sampler's temperature, or dropout in one of two forward passes")
def the_first_update_is_on_policy(subject: AlgorithmSubject) -> None:
    """Before the first step, at temperature 0.7, the ratio is 1: approx_kl and clip_fraction are 0 (invariant 1)."""
    first = subject.run(1).updates()[0].metrics
    names = [name for name in ("policy/approx_kl", "policy/clip_fraction") if name in first]
    if not names:
        raise Inapplicable("it logs neither policy/approx_kl nor policy/clip_fraction")
    for name in names:
        near(f"{name} of the first update", first[name], 0.0, subject.world.tolerance(1e-6, 1e-2))


@check("algorithm", usually="the reference is not the initial policy, or is evaluated at another temperature")
def kl_is_zero_before_the_first_step(subject: AlgorithmSubject) -> None:
    """objective/kl of step 0 is 0: the policy equals its reference, at every temperature (invariant 1)."""
    for temperature in (0.7, 1.0):
        kl = the_metric(subject.run(1, temperature=temperature).metrics[0], "objective/kl")
        near(f"objective/kl of step 0 at temperature {temperature:g}", kl, 0.0, subject.world.tolerance(1e-5, 5e-2))


@check("algorithm", usually="the reference is the trained policy itself, or is reset during training")
def kl_is_of_the_policy_from_its_start(subject: AlgorithmSubject) -> None:
    """objective/kl is the mean over responses of the *sum* over counted tokens of log pi - log pi_ref, at the temperature of
    the sampler (Ziegler et al. 2019); the reference is the initial policy."""
    trace = subject.run(2)
    logged = the_metric(trace.metrics[1], "objective/kl")
    own = trace.own_evaluation(1)
    start = subject.world.policy().evaluate(own.sequences, ["logprobs"], temperature=0.7)["logprobs"]
    sums = np.where(own.sequences.mask, own.outputs["logprobs"].astype(np.float64) - start, 0).sum(axis=1)
    near("objective/kl of step 1", logged, sums.mean(), subject.world.tolerance(1e-4, 5e-2))


@check("algorithm", usually="means over all columns, padding included")
def means_leave_padding_out(subject: AlgorithmSubject) -> None:
    """Logged entropy, length and score are means over the counted tokens and responses (section 5)."""
    trace = subject.run(2)
    own = trace.own_evaluation(1)
    mask, metrics = own.sequences.mask, trace.metrics[1]
    scores = [scoring.scores for scoring in trace.of(ScoreCall, 1)]
    expected = {"objective/length": mask.sum(axis=1).mean()}
    if "entropy" in own.outputs:
        expected["objective/entropy"] = own.outputs["entropy"][mask].mean()
    if scores:
        expected["objective/score"] = np.concatenate(scores).mean()
    for name, value in expected.items():
        if name in metrics:
            near(name, metrics[name], value, 1e-4 * max(1.0, abs(value)))


@check("algorithm", usually="the score is on a pad token, the first token or several tokens, or in an integer array")
def the_reward_lands_once(subject: AlgorithmSubject) -> None:
    """With gamma = lambda = 1, values of 0 and no KL, the return at every counted token is the score, 0.73, which is on the last
    token (invariant 11)."""
    subject.need_reward_model()
    subject.need("gamma", "lam")
    changes = {"gamma": 1.0, "lam": 1.0, "unfinished_score": None, **NO_WHITENING}
    trace = subject.run(1, reward=constant, **changes)
    tolerance = subject.world.tolerance(1e-4, 2e-2)
    for term in in_batch(trace, "returns"):
        mask = term.sequences.mask
        near("returns", np.where(mask, term.batch["returns"], 0.73), np.full(mask.shape, 0.73), tolerance)
    discounted = subject.run(1, reward=constant, **{**changes, "gamma": 0.5})
    for term in in_batch(discounted, "returns"):
        mask = term.sequences.mask
        distance = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] - 1
        near("returns at gamma 0.5", np.where(mask, term.batch["returns"], 0), np.where(mask, 0.73 * 0.5**distance, 0), tolerance)


@check("algorithm", usually="the penalty is missing, has the wrong sign, or is a mean instead of a sum")
def the_penalty_is_in_the_reward(subject: AlgorithmSubject) -> None:
    """objective/reward = objective/score - kl_coef x objective/kl once the policy has moved (invariant 11)."""
    subject.need_reward_model()
    metrics = subject.run(3, unfinished_score=None, **NO_WHITENING).metrics[2]
    score, kl, coef = (the_metric(metrics, name) for name in ("objective/score", "objective/kl", "kl_coef"))
    require(kl != 0, "objective/kl is still 0 after two steps")
    near("objective/reward", the_metric(metrics, "objective/reward"), score - coef * kl, 1e-4 * max(1.0, abs(score)))


@check("algorithm", usually="eos_token_id is used instead of the configured stop token, or the score is lowered, not replaced")
def unfinished_responses_are_marked_down(subject: AlgorithmSubject) -> None:
    """unfinished_score replaces the score of a response that does not end with the configured stop token; others keep theirs
    (invariant 12)."""
    subject.need_reward_model()
    subject.need("unfinished_score", "gamma", "lam")
    trace = subject.run(1, reward=constant, gamma=1.0, lam=1.0, unfinished_score=-1.0, **NO_WHITENING)
    stop, seen = subject.world.tokenizer.eos_id, set()
    for term in in_batch(trace, "returns"):
        mask = term.sequences.mask
        finished = ((term.sequences.responses == stop) & mask).any(axis=1)
        expected = np.where(finished, 0.73, -1.0)[:, None] * np.ones(mask.shape)
        returns = np.where(mask, term.batch["returns"], expected)
        near("returns (0.73 where finished, -1 where cut off)", returns, expected, subject.world.tolerance(1e-4, 2e-2))
        seen |= set(finished.tolist())
    require(seen == {True, False}, f"the rollout does not have both kinds of responses, only finished = {seen}")


@check("algorithm", usually="whitening per minibatch, with padding, or of rewards instead of advantages")
def advantages_are_whitened_over_the_batch(subject: AlgorithmSubject) -> None:
    """With whiten_advantages, the advantages of all counted tokens of the batch have mean 0 and variance 1; those of a minibatch
    need not (invariant 17)."""
    subject.need("whiten_advantages", "minibatches")
    trace = subject.run(1, whiten_advantages=True)
    terms = in_batch(trace, "advantages")
    one_epoch = terms[: len(terms) // subject.config.epochs]
    values = np.concatenate([term.batch["advantages"][term.sequences.mask] for term in one_epoch]).astype(np.float64)
    near("the mean of the batch's advantages", values.mean(), 0.0, 1e-5)
    near("their variance", values.var(), 1.0, 1e-3)
    means = [float(term.batch["advantages"][term.sequences.mask].mean()) for term in one_epoch]
    require(max(map(abs, means)) > 1e-3, f"each minibatch was whitened separately: their means are {means}")


@check("algorithm", usually="advantages are not whitened, or weights do not sum to 1")
def the_first_policy_loss_is_zero(subject: AlgorithmSubject) -> None:
    """With whitened advantages, one minibatch and ratio 1, the first policy loss is 0 (invariant 2)."""
    subject.need("whiten_advantages", "minibatches")
    trace = subject.run(1, whiten_advantages=True, minibatches=1)
    near("policy/loss", the_metric(trace.updates()[0].metrics, "policy/loss"), 0.0, subject.world.tolerance(1e-6, 1e-2))


@check("algorithm", usually="max and min are swapped, or advantages have the wrong sign")
def clipping_binds(subject: AlgorithmSubject) -> None:
    """A ratio above 1 + clip_range with a positive advantage, or below 1 - clip_range with a negative one, has gradient 0; the
    other two do not (invariant 20)."""
    if getattr(subject.config, "clip", "ratio") != "ratio":
        raise Inapplicable(f"its ratio is not clipped: clip={subject.config.clip}")
    if not hasattr(subject.config, "clip_range"):
        subject.need("clip_low", "clip_high")
    trace = subject.run(1)
    term = next((t for t in in_batch(trace, "advantages") if "old_logprobs" in t.batch), None)
    if term is None:
        raise Inapplicable("its losses read no array called old_logprobs")
    outputs, mask = subject.outputs(term), term.sequences.mask
    for ratio, advantage, bound in ((2.0, 1.0, True), (0.5, -1.0, True), (0.5, 1.0, False), (2.0, -1.0, False)):
        batch = dict(term.batch)
        batch["old_logprobs"] = np.where(mask, outputs["logprobs"] - np.log(ratio), 0)
        batch["advantages"] = np.where(mask, advantage, 0.0)
        slopes = derivative(replace(term, batch=batch), outputs, "logprobs")[mask]
        largest, downhill = np.abs(slopes).max(), (np.sign(slopes) == -np.sign(advantage)).all()
        where = f"at ratio {ratio:g} and advantage {advantage:+g} the derivative in log-probabilities is"
        require((largest == 0) == bound, f"{where} {largest:.3g}")
        require(bound or downhill, f"{where} {slopes[0]:+.3g}: it raises the loss where it should lower it")


@check("algorithm", usually="min instead of max, or values are clipped around the returns instead of the old values")
def value_clipping_only_raises_the_loss(subject: AlgorithmSubject) -> None:
    """A value that moved beyond old_values +- value_clip_range towards the return has gradient 0; one that moved away from the
    return keeps its gradient, so clipping never lowers the loss (invariant 19)."""
    subject.need("value_clip_range")
    reach = subject.config.value_clip_range
    term = in_batch(subject.run(1), "old_values")[0]
    outputs, mask = subject.outputs(term), term.sequences.mask
    for target, bound in ((3.0, True), (-3.0, False)):
        batch = dict(term.batch)
        batch["old_values"] = np.where(mask, outputs["values"] - 2 * reach, 0)
        batch["returns"] = np.where(mask, batch["old_values"] + target * reach, 0)
        largest = np.abs(derivative(replace(term, batch=batch), outputs, "values")[mask]).max()
        where = f"two clip ranges above the old value, and with the return {target:+g} from it, the derivative in values is"
        require((largest == 0) == bound, f"{where} {largest:.3g}")


@check("algorithm", usually="lambda has no effect, an index is off by one, or padding's value follows the last token")
def advantages_are_sums_of_errors(subject: AlgorithmSubject) -> None:
    """A_t = sum of (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, with V = 0 after the last token, and the
    return is A_t + V_t (Schulman et al. 2016, eq. 16; invariant 8). Without KL the score is the only reward."""
    subject.need_reward_model()
    subject.need("gamma", "lam", "kl_coef")
    gamma, lam = 0.9, 0.5
    trace = subject.run(3, reward=constant, gamma=gamma, lam=lam, kl_coef=0.0, unfinished_score=None, **NO_WHITENING)
    largest = 0.0
    for term in in_batch(trace, "old_values", 2):
        mask = term.sequences.mask
        advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
        for row, count in enumerate(mask.sum(axis=1)):
            values = np.append(term.batch["old_values"][row, :count].astype(np.float64), 0.0)
            errors = np.where(np.arange(count) == count - 1, 0.73, 0.0) + gamma * values[1:] - values[:-1]
            for t in range(count):
                advantages[row, t] = sum((gamma * lam) ** k * error for k, error in enumerate(errors[t:]))
            returns[row, :count] = advantages[row, :count] + values[:-1]
            largest = max(largest, np.abs(values).max())
        tolerance = subject.world.tolerance(1e-5, 1e-4)
        near("advantages", np.where(mask, term.batch["advantages"], 0), advantages, tolerance)
        near("returns", np.where(mask, term.batch["returns"], 0), returns, tolerance)
    require(largest > 0, "all values are still 0 after two steps")


@check("algorithm", usually="the controller gets KL per token, or lacks its clip at 0.2")
def the_kl_controller_follows_its_rule(subject: AlgorithmSubject) -> None:
    """kl_coef *= 1 + clip(KL / target - 1, -0.2, 0.2) x episodes / horizon with the KL per response, after each step
    (Ziegler et al. 2019, 2.2; invariant 18)."""
    subject.need("kl_target", "kl_horizon", "batch_size")
    kl = the_metric(subject.run(2).metrics[1], "objective/kl")
    for target in (abs(kl) / 1.1, 1e3, 1e-6):
        metrics = subject.run(3, kl_target=target, kl_horizon=50.0).metrics
        for step in (0, 1):
            error = min(max(metrics[step]["objective/kl"] / target - 1, -0.2), 0.2)
            expected = metrics[step]["kl_coef"] * (1 + error * subject.config.batch_size / 50.0)
            near(f"with kl_target={target:.3g}, kl_coef of step {step + 1}", metrics[step + 1]["kl_coef"], expected, 1e-9)


@check("algorithm", usually="ptx_coef multiplies the wrong term, or raw texts replace some episodes")
def the_pretraining_mix_is_added(subject: AlgorithmSubject) -> None:
    """ptx_coef adds ptx_coef x the next-token loss on raw text to each update and leaves the other terms alone (invariant
    24)."""
    subject.need("ptx_coef", "ptx_ratio")
    plain = subject.run(1).updates()[0]
    mixed = subject.run(1, ptx_coef=3.0, ptx_ratio=1.0).updates()[0]
    extra = mixed.terms[len(plain.terms) :]
    require(extra, f"an update with ptx_coef=3 has {len(mixed.terms)} terms, no more than without")
    for one, other in zip(plain.terms, mixed.terms, strict=False):
        same("the tokens of a term beside the mix", other.sequences.tokens, one.sequences.tokens)
        for name in one.batch:
            same(f"{name} of a term beside the mix", other.batch[name], one.batch[name])
    value = sum(loss_of(term, {"logprobs": np.full(term.sequences.mask.shape, -2.0)}) for term in extra)
    near("the mix's loss with every log-probability at -2 and ptx_coef=3", value, 6.0, 1e-4)


@check("algorithm", usually="the log ratio is differentiated, has the wrong sign, or the teacher reads at another temperature")
def the_teacher_grades_each_token(subject: AlgorithmSubject) -> None:
    """The derivative of the first loss in the log-probability of a sampled token is proportional to log pi - log teacher, at the
    temperature of the sampler (invariant 29)."""
    subject.need("teacher")
    terms = [term for term in subject.run(1).updates()[0].terms if term.loss.outputs == ("logprobs",)]
    if not terms:
        raise Inapplicable("its loss does not read the log-probabilities of sampled tokens alone")
    for term in terms:
        mask, unit = term.sequences.mask, lambda x: x / np.linalg.norm(x)
        student, teacher = (
            subject.world.policy(n).evaluate(term.sequences, ["logprobs"], temperature=0.7)["logprobs"].astype(np.float64)
            for n in (0, 1)
        )
        slopes = derivative(term, {"logprobs": student}, "logprobs")[mask]
        expected = unit((student - teacher)[mask])
        near("the direction of the derivative", unit(slopes), expected, subject.world.tolerance(1e-3, 5e-2))


# ---------------------------------------------------------------------------------------------------------------- groups


def by_prompt(responses: Responses) -> np.ndarray:
    """The same score for all responses to a prompt, and another for another prompt."""
    rows = responses.sequences
    tokens = np.where(rows.prompt_mask, rows.tokens[:, : rows.prompt_length], 0)
    return np.sin(0.3 + tokens.sum(axis=1)).astype(np.float32)


def need_groups(subject: AlgorithmSubject) -> None:
    """
    Raises:
      Inapplicable: it does not compare the responses to a prompt.
    """
    subject.need("samples", "baseline")
    if subject.config.samples < 2 or subject.config.baseline == "none":
        raise Inapplicable("it does not compare the responses to a prompt")


@check("algorithm", usually="all samples of a prompt share a seed, or a group's rows are not neighbours")
def a_prompt_has_several_samples(subject: AlgorithmSubject) -> None:
    """Each prompt is sampled ``samples`` times, in neighbouring rows, each with seeds of its own."""
    subject.need("samples")
    if (k := subject.config.samples) < 2:
        raise Inapplicable("it takes one sample per prompt")
    generation = subject.run(1).generation(0)
    rows = len(generation.seeds)
    require(rows == k * subject.config.batch_size, f"{rows} rows are sampled, not {subject.config.batch_size} prompts x {k}")
    groups = generation.prompt_tokens.reshape(-1, k, generation.prompt_tokens.shape[1])
    same(f"the prompts of each {k} neighbouring rows", groups, np.repeat(groups[:, :1], k, axis=1))
    distinct = len(np.unique(generation.seeds, axis=0))
    require(distinct == rows, f"{rows} samples have only {distinct} different rows of seeds")


@check("algorithm", usually="division by a deviation of almost 0, or a baseline of the batch instead of the prompt")
def equal_rewards_say_nothing(subject: AlgorithmSubject) -> None:
    """If all responses to a prompt have the same score, their advantages are exactly 0, whatever other prompts score."""
    need_groups(subject)
    trace = subject.run(1, reward=by_prompt, samples=7, kl_coef=0.0, unfinished_score=None, overlong_buffer=None)
    for term in in_batch(trace, "advantages"):
        largest = float(np.abs(term.batch["advantages"][term.sequences.mask]).max())
        require(largest == 0, f"the largest advantage is {largest:.3g}")


@check("algorithm", usually="responses are compared across prompts, or the sign is wrong")
def the_better_response_has_the_higher_advantage(subject: AlgorithmSubject) -> None:
    """Within each prompt, advantages are in the order of scores, and they sum to 0."""
    need_groups(subject)
    trace = subject.run(1, kl_coef=0.0, unfinished_score=None, overlong_buffer=None, minibatches=1)
    scores = np.concatenate([scoring.scores for scoring in trace.of(ScoreCall, 0)])
    k, rows = subject.config.samples, np.concatenate([term.batch["advantages"] for term in in_batch(trace, "advantages")])
    rows = rows[: len(scores)]  # a second pass repeats them
    advantages = np.where(rows.max(axis=1) > 0, rows.max(axis=1), rows.min(axis=1)).reshape(-1, k)  # padding is 0
    for number, (score, advantage) in enumerate(zip(scores.reshape(-1, k), advantages, strict=False)):
        order = np.argsort(score, kind="stable")
        require((np.diff(advantage[order]) >= 0).all(), f"prompt {number}: scores {score}, advantages {advantage}")
        near(f"prompt {number}: the sum of the advantages", float(advantage.sum()), 0.0, 1e-4 * max(1.0, np.abs(advantage).max()))


@check("algorithm", usually="the group is judged by its shaped scores, or the extra rounds draw the same prompts again")
def prompts_that_say_nothing_are_replaced(subject: AlgorithmSubject) -> None:
    """With extra_rounds, a group whose scores are all equal gives way to another prompt's, even if a penalty makes its rewards
    differ (DAPO, section 3.2)."""
    subject.need("extra_rounds", "samples")
    if subject.config.samples < 2:
        raise Inapplicable("it takes one sample per prompt")
    changes: dict[str, Any] = {"extra_rounds": 4, "unfinished_score": -1.0, "lengths": {"response": 6}, "overlong_buffer": 3}
    trace = subject.run(1, reward=by_prompt, **changes)
    calls = trace.of(GenerateCall, 0)
    first, second = ({row.tobytes() for row in np.ascontiguousarray(call.prompt_tokens)} for call in (calls[0], calls[-1]))
    require(len(calls) == 5, f"{len(calls)} batches are sampled where all groups are equal and extra_rounds=4, not 5")
    require(first != second, f"the last extra round samples for the same {len(first)} prompts")


# ----------------------------------------------------------------------------------------------------------- preferences


def preferring(subject: AlgorithmSubject) -> tuple[Trace, Term]:
    """
    Raises:
      Inapplicable: it is not an algorithm that compares log-probabilities.
    """
    trace = subject.run(1)
    terms = [term for term in trace.terms(0) if "pairs" in term.batch]
    if not terms:
        raise Inapplicable("its losses read no array called pairs")
    return trace, terms[0]


@check(
    "algorithm",
    usually="the prompt's tokens count, or rows and references are in different orders",
)
def references_are_the_first_policys(subject: AlgorithmSubject) -> None:
    """``ref`` is the log-probability of each completion under the initial policy, summed over its tokens."""
    _, term = preferring(subject)
    if not getattr(subject.config, "needs_reference", True):
        raise Inapplicable("it has no reference")
    rows = term.sequences
    policy = subject.world.policy()
    found = policy.evaluate(rows, ["logprobs"], temperature=term.temperature)["logprobs"].astype(np.float64)
    expected = np.where(rows.mask, found, 0).sum(axis=1)
    counted = rows.mask.any(axis=1)
    near("ref", term.batch["ref"][counted], expected[counted], subject.world.tolerance(1e-4, 0.2))


@check("algorithm", usually="chosen and rejected are swapped, or ties count as pairs")
def the_preferred_completion_is_raised(subject: AlgorithmSubject) -> None:
    """The loss falls with the log-probability of the best completion of a prompt and rises with that of the worst."""
    _, term = preferring(subject)
    slopes = derivative(term, subject.outputs(term), "logprobs")
    slopes = np.where(term.sequences.mask, slopes, 0).sum(axis=1)
    for name, sign in (("best", -1), ("worst", 1)):
        rows = term.batch[name] > 0
        wrong = int((np.sign(slopes[rows]) != sign).sum())
        require(not wrong, f"the derivative in the log-probability of the {name} of {int(rows.sum())} prompts is {slopes[rows]}")


def pairs_of_samples(subject: AlgorithmSubject, reward: Any) -> list[tuple[float, float]]:
    """The scores of every two responses (preferred, other) that an update compares.

    Raises:
      Inapplicable: it is not an algorithm that compares what it samples.
    """
    subject.need_reward_model()
    preferring(subject)
    trace = subject.run(1, reward=reward, kl_coef=0.0, unfinished_score=None)
    place: dict[bytes, float] = {}
    for scoring in trace.of(ScoreCall, 0):
        rows = np.ascontiguousarray(scoring.responses.sequences.tokens)
        place |= {row.tobytes(): score for row, score in zip(rows, scoring.scores, strict=True)}
    found = []
    for term in trace.terms(0):
        scores = [place[row.tobytes()] for row in np.ascontiguousarray(term.sequences.tokens)]
        grid = np.reshape(scores, term.batch["pairs"].shape[:2])
        found += [(float(grid[n, i]), float(grid[n, j])) for n, i, j in np.argwhere(term.batch["pairs"] > 0)]
    return found


@check("algorithm", usually="rewards are taken for costs, or rows are compared in another order than they are scored")
def the_better_response_is_preferred(subject: AlgorithmSubject) -> None:
    """Of two sampled responses that an update compares, the preferred one has the higher score."""
    found = pairs_of_samples(subject, uneven)
    wrong = [pair for pair in found if not pair[0] > pair[1]]
    require(found and not wrong, f"{len(wrong)} of {len(found)} pairs prefer the lower score: {wrong[:3]}")


@check("algorithm", usually="the first response counts as the best of equals")
def equal_scores_make_no_pairs(subject: AlgorithmSubject) -> None:
    """Responses of equal score are not compared."""
    found = pairs_of_samples(subject, by_prompt)
    require(not found, f"{len(found)} pairs of equal scores are compared")


# --------------------------------------------------------------------------------------------------------- reward models


@check("algorithm", usually="log(sigmoid(x)) in two operations, or weights that do not give the mean over pairs")
def equal_scores_cost_log_two(subject: AlgorithmSubject) -> None:
    """If all scores are equal, the ranking loss is ln 2 per pair. A shift does not change it, and it is finite at differences of
    1e4 (invariants 13, 14, 15)."""
    terms = [term for term in subject.run(1).terms() if term.loss.outputs == ("scores",)]
    if not terms:
        raise Inapplicable("none of its losses reads scores alone")
    for term in terms:
        rows = term.sequences.rows
        scores = np.linspace(-1, 1, rows)
        far = 1e4 * scores
        require(np.isfinite(loss_of(term, {"scores": far})), "the loss is not finite at differences of 1e4")
        near("the loss after a shift of 5", loss_of(term, {"scores": scores + 5}), loss_of(term, {"scores": scores}), 1e-6)
        pairs = sum(float(array.sum()) for array in term.batch.values() if array.ndim == 2)
        near("the loss of equal scores", loss_of(term, {"scores": np.zeros(rows)}), pairs * math.log(2), 1e-6)


@check("algorithm", usually="better and worse completions are swapped, or ties count as preferences")
def the_better_completion_is_raised(subject: AlgorithmSubject) -> None:
    """The gradient of the ranking loss raises the best completion of each comparison and lowers the worst; tied completions do
    not move against each other (invariant 14)."""
    if subject.cls.produces != "reward_model":
        raise Inapplicable("it trains no reward model")
    trace = subject.run(1)
    tokenizer = subject.world.tokenizer
    place = {}
    for comparison in Data().comparisons("train"):
        for completion, rank in zip(comparison.completions, comparison.ranks, strict=True):
            ids = tuple(tokenizer.encode(completion) + [tokenizer.eos_id])
            place[ids] = (rank == min(comparison.ranks), rank == max(comparison.ranks))
    for term in trace.terms():
        slopes = derivative(term, {"scores": np.zeros(term.sequences.rows)}, "scores")
        for tokens, mask, slope in zip(term.sequences.responses, term.sequences.mask, slopes, strict=True):
            first, last = place.get(tuple(int(t) for t in tokens[mask]), (False, False))
            require(not first or slope < 0, f"the loss has derivative {slope:+.3g} in the score of a best completion")
            require(not last or slope > 0, f"the loss has derivative {slope:+.3g} in the score of a worst completion")


@check("algorithm", usually="normalised before the end of training, on other samples, or with the gain applied twice to the bias")
def scores_are_normalised(subject: AlgorithmSubject) -> None:
    """After `finish`, demonstrations score 0 on average, with 'gain_and_bias' at standard deviation 1, and responses keep their
    order (invariant 16)."""
    subject.need("normalise")
    config = subject.config
    examples = encoding.encode_demonstrations(subject.world.tokenizer, Data().demonstrations("train"), config.lengths)
    rows = encoding.block(examples, subject.world.tokenizer, config.lengths)
    found = {}
    for how in ("none", "bias", "gain_and_bias"):
        algorithm, _ = subject.build(normalise=how)
        algorithm.step(0)
        algorithm.finish()
        found[how] = algorithm.result().evaluate(rows, ["scores"])["scores"].astype(np.float64)
    tolerance = subject.world.tolerance(1e-4, 2e-2)
    near("the mean score of demonstrations", [found["bias"].mean(), found["gain_and_bias"].mean()], [0, 0], tolerance)
    near("their standard deviation with gain_and_bias", found["gain_and_bias"].std(), 1.0, tolerance)
    near("differences of scores", np.diff(found["bias"]), np.diff(found["none"]), tolerance)


# --------------------------------------------------------------------------------------------------------------- failures


def failing(responses: Any) -> np.ndarray:
    raise RewardError("the endpoint is down")


def partly(responses: Any) -> np.ndarray:
    scores = uneven(responses)
    scores[::3] = np.nan
    return scores


def never(responses: Any) -> np.ndarray:
    return np.full(len(responses.texts), np.nan, np.float32)


@check("algorithm", usually="an `except` around the reward model that continues with zeros")
def failed_rewards_are_heard(subject: AlgorithmSubject) -> None:
    """A failing reward model stops the step with its reason; so does one that scores nothing (section 5)."""
    subject.need_reward_model()
    for reward in (failing, never):
        algorithm, _ = subject.build(reward=reward)
        try:
            metrics = algorithm.step(0)
        except Exception:
            continue
        raise_with = {name: value for name, value in metrics.items() if name.startswith("objective/")}
        require(False, f"training continued with a reward model that gives no score ({reward.__name__}): {raise_with}")


@check("algorithm", usually="NaN is replaced by 0, or spreads over the whole batch through a mean")
def episodes_without_a_score_are_left_out(subject: AlgorithmSubject) -> None:
    """An episode whose score is NaN has no weight, and the others' losses and metrics stay finite."""
    subject.need_reward_model()
    trace = subject.run(1, reward=partly)
    missing = {row.tobytes() for scoring in trace.of(ScoreCall, 0)
               for row, score in zip(np.ascontiguousarray(scoring.responses.sequences.tokens), scoring.scores, strict=True)
               if np.isnan(score)}  # fmt: skip
    for term in (term for term in trace.terms() if "logprobs" in term.loss.outputs):
        for number, row in enumerate(np.ascontiguousarray(term.sequences.tokens)):
            counted = int(term.sequences.mask[number].sum())
            require(row.tobytes() not in missing or not counted, f"{counted} tokens of an episode without a score count")
    for name, value in timeless(trace.metrics[0]).items():
        require(np.isfinite(value), f"{name} is {value} after a step where every third episode had no score")


@check("algorithm", usually="numpy arrays in the state, or an array as a metric")
def it_reports_in_plain_numbers(subject: AlgorithmSubject) -> None:
    """Metrics are floats, `state` and `samples` are JSON, `arithmetic` is one line."""
    trace = subject.run(3)
    for step, metrics in enumerate(trace.metrics):
        for name, value in metrics.items():
            require(isinstance(value, float | int), f"{name} of step {step} is a {type(value).__name__}: {value!r}")
    json.dumps([trace.algorithm.state(), trace.algorithm.samples()])
    line = subject.cls.arithmetic(subject.config, Data())
    require(line and "\n" not in line, f"arithmetic says {line!r}")
