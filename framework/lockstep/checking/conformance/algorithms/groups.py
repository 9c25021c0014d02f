"""Several responses to each prompt, compared with each other."""

from __future__ import annotations

import collections
import itertools
from typing import Any

import numpy as np

from lockstep.checking.conformance.algorithms.traces import by_prompt, in_batch
from lockstep.checking.conformance.kit import check, require, same
from lockstep.checking.conformance.subjects import AlgorithmSubject, Trace, missing_sometimes
from lockstep.checking.conformance.world import Data
from lockstep.checking.tap import GenerateCall, ScoreCall
from lockstep.interfaces import Responses


def by_prompt_partly(responses: Responses) -> np.ndarray:
    """`by_prompt`, but NaN for about a third of the responses."""
    rows = responses.sequences
    return np.where(missing_sometimes(rows.tokens), np.nan, by_prompt(responses)).astype(np.float32)


def by_prompt_if_finished(responses: Responses) -> np.ndarray:
    """`by_prompt`, but 100 for responses without EOS."""
    rows = responses.sequences
    finished = ((rows.responses == responses.tokenizer.eos_id) & rows.mask).any(axis=1)
    return np.where(finished, by_prompt(responses), 100).astype(np.float32)


def need_groups(subject: AlgorithmSubject) -> None:
    """
    Raises:
      Inapplicable: the algorithm does not compare the responses to a prompt.
    """
    subject.need_trait(subject.traits.compares, "it does not compare the responses to a prompt")


def advantages_of(trace: Trace) -> dict[bytes, float]:
    """{a row's tokens: the mean advantage of its counted tokens} for the first step's rows that have counted tokens.

    Raises:
      Inapplicable: the algorithm's losses read no advantages.
    """
    found = {}
    for term in in_batch(trace, "advantages"):
        counted = term.sequences.mask & term.batch.get("mask", term.sequences.mask)
        for tokens, mask, row in zip(term.sequences.tokens, counted, term.batch["advantages"], strict=True):
            if mask.any():
                found[tokens.tobytes()] = float(row[mask].mean(dtype=np.float64))
    return found


SCORES_ALONE = {"kl_coef": 0.0, "unfinished_score": None, "overlong_buffer": None}


@check("algorithm", usually="all samples of a prompt share a seed, or a group's rows are not neighbours")
def a_prompt_has_several_samples(subject: AlgorithmSubject) -> None:
    """Each prompt is sampled as often as `traits` says, in neighbouring rows, each with seeds of its own."""
    subject.need_trait((k := subject.traits.samples) > 1, "it takes one sample per prompt, or none")
    generation = subject.run(1).generation(0)
    rows = len(generation.seeds)
    groups = generation.prompt_tokens.reshape(-1, k, generation.prompt_tokens.shape[1])
    same(f"the prompts of each {k} neighbouring rows", groups, np.repeat(groups[:, :1], k, axis=1))
    prompts = len(np.unique(groups[:, 0], axis=0))
    require(prompts == min(len(groups), Data.rows), f"{rows} rows are of {prompts} prompts, not of {len(groups)}")
    distinct = len(np.unique(generation.seeds, axis=0))
    require(distinct == rows, f"{rows} samples have only {distinct} different rows of seeds")


@check("algorithm", usually="division by a deviation of almost 0, or a baseline of the batch instead of the prompt")
def equal_rewards_say_nothing(subject: AlgorithmSubject) -> None:
    """If all responses to a prompt have the same score, their advantages are exactly 0, whatever other prompts score."""
    need_groups(subject)
    trace = subject.first_terms(reward=by_prompt, **subject.free(samples=7), **SCORES_ALONE)
    largest = max(map(abs, advantages_of(trace).values()))
    require(largest == 0, f"the largest advantage is {largest:.3g}")


@check("algorithm", usually="a missing score became 0, or a response that does not count is still in its prompt's mean")
def responses_that_do_not_count_shift_nothing(subject: AlgorithmSubject) -> None:
    """A response that has no score or is masked does not count in its group: the other responses' advantages stay exactly 0 if
    their scores are equal."""
    need_groups(subject)
    changes = {**SCORES_ALONE, "extra_rounds": 0}
    cases = {"without a score": subject.first_terms(reward=by_prompt_partly, **changes)}
    if hasattr(subject.config, "mask_unfinished"):
        cases["unfinished, masked and scored 100"] = subject.first_terms(
            reward=by_prompt_if_finished, mask_unfinished=True, **changes
        )
    for what, trace in cases.items():
        advantages = advantages_of(trace)
        largest = max(map(abs, advantages.values()), default=0.0)
        require(largest == 0, f"beside responses {what}, the largest of {len(advantages)} advantages is {largest:.3g}")


@check("algorithm", usually="responses are compared across prompts, or the sign is wrong")
def the_better_response_has_the_higher_advantage(subject: AlgorithmSubject) -> None:
    """Within each prompt, advantages rise with scores; the best is not negative and the worst is not positive."""
    need_groups(subject)
    trace = subject.first_terms(**SCORES_ALONE)
    advantages, prompts = advantages_of(trace), collections.defaultdict(dict)
    for scoring in trace.of(ScoreCall, 0):
        rows = scoring.responses.sequences
        for tokens, score in zip(rows.tokens, scoring.scores, strict=True):
            if (row := tokens.tobytes()) in advantages:
                prompts[tokens[: rows.prompt_length].tobytes()][row] = float(score)
    require(prompts, f"none of {len(advantages)} rows that were trained on had been scored")
    for number, scores in enumerate(prompts.values()):
        ordered = sorted((score, advantages[row]) for row, score in scores.items())
        rising = all(b[1] >= a[1] for a, b in itertools.pairwise(ordered))
        right = rising and ordered[0][1] <= 1e-6 and ordered[-1][1] >= -1e-6
        require(right, f"prompt {number}: (score, advantage) are {[(round(a, 4), round(b, 4)) for a, b in ordered]}")


@check("algorithm", usually="the group is judged by its shaped scores, or the extra rounds draw the same prompts again")
def prompts_that_say_nothing_are_replaced(subject: AlgorithmSubject) -> None:
    """With extra_rounds, a group whose scores are all equal is replaced by another prompt's, even if a penalty makes its rewards
    differ (DAPO, section 3.2)."""
    changes: dict[str, Any] = {"extra_rounds": 4, "unfinished_score": -1.0, "lengths": {"response": 6}, "overlong_buffer": 3}
    changes = subject.free(**changes)
    traits = subject.cls.traits(subject.configured(**changes)[1])
    subject.need_trait(traits.rounds > 1 and traits.samples > 1, "it never replaces a prompt")
    calls = subject.first_terms(reward=by_prompt, **changes).of(GenerateCall, 0)
    most = traits.rounds
    require(len(calls) == most, f"{len(calls)} batches are sampled where all groups are equal, not {most}")
    first, second = ({row.tobytes() for row in np.ascontiguousarray(call.prompt_tokens)} for call in calls[:2])
    require(first != second, f"the second round samples for the same {len(first)} prompts")
