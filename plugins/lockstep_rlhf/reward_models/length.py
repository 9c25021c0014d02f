"""The length of responses, or their distance from a target length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lockstep.config.schema import setting
from lockstep.interfaces import Resources, Responses, RewardModel


class Length(RewardModel):
    """The response's length n; with a ``target``, -|n - target| / target. Tokens are the policy's, including the one that ended
    the response; in an episode, those of all its turns, and none of the environment's. Words and characters are of the last turn.
    Give it a small weight in a `sum`, a negative one to keep responses short."""

    @dataclass(frozen=True)
    class Config:
        unit: Literal["tokens", "words", "characters"] = setting("tokens", "Unit of length. Words are separated by white space.")
        target: int | None = setting(None, "The best length; null: the length itself is the score.", least=1)

    def __init__(self, config: Config, resources: Resources):
        self.config = config

    def score(self, responses: Responses) -> np.ndarray:
        lengths, target = self._lengths(responses), self.config.target
        return lengths if target is None else -np.abs(lengths - np.float32(target)) / np.float32(target)

    def _lengths(self, responses: Responses) -> np.ndarray:
        """float32 [B]"""
        if self.config.unit == "tokens":
            return responses.sequences.mask.sum(axis=1).astype(np.float32)
        split = str.split if self.config.unit == "words" else str
        return np.array([len(split(text)) for text in responses.texts], np.float32)
