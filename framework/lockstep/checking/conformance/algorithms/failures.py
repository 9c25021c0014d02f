"""Rewards that fail, and what the algorithm reports."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from lockstep.checking.conformance.algorithms.traces import timeless
from lockstep.checking.conformance.kit import check, require
from lockstep.checking.conformance.subjects import AlgorithmSubject, missing_sometimes, uneven
from lockstep.checking.conformance.world import Data
from lockstep.checking.tap import ScoreCall
from lockstep.errors import RewardError
from lockstep.interfaces import Responses


def failing(responses: Any) -> np.ndarray:
    raise RewardError("the endpoint is down")


def partly(responses: Any) -> np.ndarray:
    return np.where(missing_sometimes(responses.sequences.tokens), np.nan, uneven(responses)).astype(np.float32)


def none_of_a_prompt(responses: Responses) -> np.ndarray:
    """NaN for every response to the first row's prompt."""
    rows = responses.sequences
    prompts = rows.tokens[:, : rows.prompt_length]
    return np.where((prompts == prompts[0]).all(axis=1), np.nan, uneven(responses)).astype(np.float32)


def never(responses: Any) -> np.ndarray:
    return np.full(len(responses.texts), np.nan, np.float32)


@check("algorithm", usually="an `except` around the reward model that continues with zeros")
def failed_rewards_are_heard(subject: AlgorithmSubject) -> None:
    """A reward model that fails, or that gives no score, stops the step with an error (section 5)."""
    subject.need_reward_model()
    for reward in (failing, never):
        algorithm, _ = subject.build(reward=reward, learns=False)
        try:
            metrics = algorithm.step(0)
        except Exception:
            continue
        raise_with = {name: value for name, value in metrics.items() if name.startswith("objective/")}
        require(False, f"training continued with a reward model that gives no score ({reward.__name__}): {raise_with}")


@check("algorithm", usually="NaN is replaced by 0, or spreads over the whole batch through a mean")
def episodes_without_a_score_are_left_out(subject: AlgorithmSubject) -> None:
    """An episode whose score is NaN does not count in the loss, and metrics stay finite."""
    subject.need_reward_model()
    for reward in (partly, none_of_a_prompt):
        trace = subject.run(1, reward=reward)
        missing = {row.tobytes() for scoring in trace.of(ScoreCall, 0)
                   for row, score in zip(scoring.responses.sequences.tokens, scoring.scores, strict=True)
                   if np.isnan(score)}  # fmt: skip
        for term in (term for term in trace.terms() if "logprobs" in term.loss.outputs):
            for number, row in enumerate(term.sequences.tokens):
                counted = int(term.sequences.mask[number].sum())
                require(row.tobytes() not in missing or not counted, f"{counted} tokens of an episode without a score count")
        for name, value in timeless(trace.metrics[0]).items():
            require(np.isfinite(value), f"{name} is {value} after a step where episodes had no score ({reward.__name__})")


@check("algorithm", usually="numpy arrays in the state, or an array as a metric")
def it_reports_in_plain_numbers(subject: AlgorithmSubject) -> None:
    """Metrics are plain numbers, `state` and `samples` are JSON, and `arithmetic` is one line."""
    trace = subject.run(4)
    for step, metrics in enumerate(trace.metrics):
        for name, value in metrics.items():
            require(isinstance(value, float | int), f"{name} of step {step} is a {type(value).__name__}: {value!r}")
    json.dumps([trace.algorithm.state(), trace.algorithm.samples()])
    line = subject.cls.arithmetic(subject.config, Data())
    require(line and "\n" not in line, f"arithmetic says {line!r}")
