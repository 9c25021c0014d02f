"""Losses of pairs and rankings, on given completions and on the policy's own samples."""

from __future__ import annotations

import collections
import contextlib
import itertools
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np

from lockstep.checking.conformance.algorithms.traces import by_prompt, examples_of, in_batch
from lockstep.checking.conformance.kit import Inapplicable, check, near, require
from lockstep.checking.conformance.subjects import AlgorithmSubject, derivative, loss_of, uneven
from lockstep.checking.tap import EvaluateCall, ScoreCall
from lockstep.errors import listing
from lockstep.interfaces import Term
from lockstep.learning import randomness


def need_comparisons(subject: AlgorithmSubject, produces: str) -> None:
    """
    Raises:
      Inapplicable: the algorithm does not train what ``produces`` names from comparisons.
    """
    subject.need_trait(subject.traits.data == "comparisons", "it does not learn from comparisons")
    subject.need_trait(subject.cls.produces == produces, f"it trains no {produces.replace('_', ' ')}")


def places(subject: AlgorithmSubject) -> dict[tuple[int, ...], tuple[bool, bool]]:
    """{token ids of a completion, with EOS: (whether it is a best, whether it is a worst completion of its comparison)}, without
    completions that occur more than once."""
    tokenizer, found, times = subject.world.tokenizer, {}, collections.Counter()
    for comparison in subject.data.comparisons("train"):
        for completion, rank in zip(comparison.completions, comparison.ranks, strict=True):
            ids = tuple(tokenizer.encode(completion) + [tokenizer.eos_id])
            found[ids] = (rank == min(comparison.ranks), rank == max(comparison.ranks))
            times[ids] += 1
    return {ids: place for ids, place in found.items() if times[ids] == 1}


def slopes_of_completions(subject: AlgorithmSubject, terms: Sequence[Term], output: str) -> dict[tuple[int, ...], float]:
    """{token ids of a completion: the derivative of an update's loss in its log-probability or score, summed over its rows}."""
    found: dict[tuple[int, ...], float] = collections.defaultdict(float)
    for term in terms:
        rows = term.sequences
        outputs = {"scores": np.zeros(rows.rows)} if output == "scores" else subject.outputs(term)
        slopes = derivative(term, outputs, output)
        if output != "scores":
            slopes = np.where(rows.mask, slopes, 0).sum(axis=1)
        for tokens, mask, slope in zip(rows.responses, rows.mask, slopes, strict=True):
            if mask.any():
                found[tuple(tokens[mask].tolist())] += float(slope)
    return found


def require_right_order(subject: AlgorithmSubject, terms: Sequence[Term], output: str) -> None:
    """
    Raises:
      Violation: the loss does not fall with a best completion's output, or does not rise with a worst completion's.
    """
    known, seen = places(subject), 0
    for ids, slope in slopes_of_completions(subject, terms, output).items():
        first, last = known.get(ids, (False, False))
        seen += first or last
        require(not first or slope < 0, f"the loss has derivative {slope:+.3g} in the {output} of a best completion")
        require(not last or slope > 0, f"the loss has derivative {slope:+.3g} in the {output} of a worst completion")
    require(seen, "none of the completions is a best or a worst one: 0 of the update's rows are")


@check(
    "algorithm",
    usually="the prompt's tokens count, or rows and references are in different orders",
)
def references_are_the_first_policys(subject: AlgorithmSubject) -> None:
    """``ref`` is the log-probability of each completion under the initial policy, summed over its tokens."""
    subject.need_trait(subject.traits.kl != "none", "it has no reference")
    for term in in_batch(subject.run(1), "ref"):
        rows = term.sequences
        policy = subject.world.policy()
        found = policy.evaluate(rows, ["logprobs"], temperature=term.temperature)["logprobs"].astype(np.float64)
        expected = np.where(rows.mask, found, 0).sum(axis=1)
        counted = rows.mask.any(axis=1)
        near("ref", term.batch["ref"][counted], expected[counted], subject.world.tolerance(1e-4, 0.2))


@check("algorithm", usually="chosen and rejected are swapped, or ties count as pairs")
def the_preferred_completion_is_raised(subject: AlgorithmSubject) -> None:
    """The loss falls with the log-probability of the best completion of a prompt and rises with that of the worst."""
    need_comparisons(subject, "policy")
    require_right_order(subject, subject.run(1).updates()[0].terms, "logprobs")


@check("algorithm", usually="one of the names falls back to another's loss")
def every_loss_is_another(subject: AlgorithmSubject) -> None:
    """Each value of the key ``loss`` gives a different loss at the same outputs."""
    subject.need("loss")
    names = typing.get_args(typing.get_type_hints(type(subject.config)).get("loss"))
    first, found = subject.run(1).updates()[0].terms[0], {}
    outputs = subject.outputs(first)
    moved = randomness.generator(0, "moved").normal(size=first.sequences.mask.shape)
    outputs["logprobs"] = outputs["logprobs"] + 0.3 * moved
    for name in names:
        for others in ({"label_smoothing": 0.1}, {}):  # robust differs from dpo only with it; others refuse it
            with contextlib.suppress(Inapplicable):
                term = subject.first_terms(loss=name, **others).updates()[0].terms[0]
                if set(term.loss.outputs) <= outputs.keys():  # otherwise it differs, as it reads other outputs
                    found[name] = loss_of(term, outputs)
                break
    if len(found) < 2:
        raise Inapplicable(f"only {listing(found)} can be chosen here")
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        require(abs(a - b) > 1e-6 * max(1.0, abs(a)), f"loss={one} and loss={other} both give {a:.7g}")


@check("algorithm", usually="pairs are rolled over the batch for one model, and over the micro-batch for the other")
def the_reference_reads_what_the_policy_reads(subject: AlgorithmSubject) -> None:
    """In each step, the policy evaluates every row that the reference evaluates: otherwise their difference is not a KL."""
    trace, seen = subject.run(2), 0
    for step in range(2):
        own: list[dict[bytes, int]] = [collections.Counter(), collections.Counter()]
        for call in trace.of(EvaluateCall, step):
            if "logprobs" in call.outputs and getattr(call.model, "supplies", ()) and "entropy" in call.model.supplies:
                trained = any(call.model is model for model in trace.trained().values())
                own[trained].update(row.tobytes() for row in call.sequences.tokens[call.sequences.response_mask.any(axis=1)])
        missing = own[0].keys() - own[1].keys()
        seen += len(own[0])
        require(not missing, f"{len(missing)} of {len(own[0])} rows that the reference reads in step {step} are not the policy's")
    if not seen:
        raise Inapplicable("no reference is evaluated during a step")


@check("algorithm", usually="the order is reversed, which leaves the middle of an odd batch in place, or another batch is read")
def mismatched_pairs_are_of_the_batch(subject: AlgorithmSubject) -> None:
    """KTO's ``z`` is estimated from the batch's own prompts and completions, with no completion after its own prompt."""
    in_batch(subject.run(1), "z")
    trace = subject.run(2, batch_size=5)
    place = [model for model in trace.trained().values()]
    rows = [row for term in trace.terms(1) for row in examples_of(term)]
    matched, completions = set(rows), {response for _, response in rows}
    pairs = []
    for call in trace.of(EvaluateCall, 1):
        if any(call.model is model for model in place):
            pairs += examples_of(Term(trace.terms(1)[0].loss, call.sequences, {}))
    require(pairs, "it evaluates 0 mismatched pairs")
    own = sum(pair in matched for pair in pairs)
    require(not own, f"{own} of {len(pairs)} mismatched pairs are completions of their own prompts")
    others = {response for _, response in pairs} ^ completions
    require(not others, f"{len(others)} completions are in one of the batch and its mismatched pairs, and not in the other")


def pairs_of_samples(subject: AlgorithmSubject, reward: Any) -> list[tuple[float, float]]:
    """(score of the preferred response, score of the other) for each pair of responses that the first step's updates compare.

    Raises:
      Inapplicable: the algorithm does not compare responses that it samples.
    """
    subject.need_reward_model()
    in_batch(subject.run(1), "pairs")
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
    """Responses with equal scores are not compared."""
    found = pairs_of_samples(subject, by_prompt)
    require(not found, f"{len(found)} pairs of equal scores are compared")
