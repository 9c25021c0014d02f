"""1 for responses that a regular expression matches."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex

from lockstep.config.schema import REQUIRED, setting
from lockstep.errors import ConfigError, short
from lockstep.interfaces import Resources, Responses, RewardModel

log = logging.getLogger("lockstep")


class Pattern(RewardModel):
    """1.0 if the regular expression is found in the response, else 0.0. Write \\A and \\Z around an expression that the whole
    response must match.

    Some expressions take exponential time on some responses. If the search takes longer than ``timeout_seconds``, the response
    has no score (NaN), is counted in a warning, and is marked in `details` as ``out_of_time``.
    """

    @dataclass(frozen=True)
    class Config:
        pattern: str = setting(REQUIRED, "A regular expression as the package regex reads it; (?s) lets . match line breaks.")
        timeout_seconds: float = setting(1.0, "Limit for one response.", above=0)

        def __post_init__(self) -> None:
            compiled(self.pattern, "pattern")

    def __init__(self, config: Config, resources: Resources):
        self.pattern, self.seconds = compiled(config.pattern, "pattern"), config.timeout_seconds
        self._details: dict[str, np.ndarray] = {}

    def score(self, responses: Responses) -> np.ndarray:
        scores = np.array([self._found(text) for text in responses.texts], np.float32)
        slow = np.isnan(scores)
        if slow.any():
            log.warning("reward_model.pattern: out of time on %d responses, which were not scored", slow.sum())
        self._details = {"out_of_time": slow.astype(np.float32)}
        return scores

    def _found(self, text: str) -> float:
        try:
            return float(self.pattern.search(text, timeout=self.seconds) is not None)
        except TimeoutError:
            return float("nan")

    def details(self) -> dict[str, np.ndarray]:
        return self._details


def compiled(pattern: str, key: str) -> Any:
    """
    Raises:
      ConfigError: ``pattern`` is not a regular expression.
    """
    try:
        return regex.compile(pattern)
    except (regex.error, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"reward_model.{key}='{short(pattern)}' is no regular expression: {short(str(error))}.") from error
