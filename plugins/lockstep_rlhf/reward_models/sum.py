"""Several reward models as one weighted sum."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lockstep.config.schema import REQUIRED, setting
from lockstep.errors import ConfigError, did_you_mean, listing
from lockstep.interfaces import Inputs, Resources, Responses, RewardModel, ScalarModel


class Sum(RewardModel):
    """Σ weight · score over the named parts. A response has no score if any part could not score it.

    `details` has each part's unweighted score under its name, and the part's own details under ``<part>/<name>``. A value network
    starts from the first part that has a network.
    """

    @dataclass(frozen=True)
    class Config:
        parts: Mapping[str, Mapping[str, Any]] = setting(
            REQUIRED, "Configurations of reward models, each with its name, under names of yours."
        )
        weights: Mapping[str, float] = setting(REQUIRED, "Weight of each part's score.", least=-math.inf)

        def __post_init__(self) -> None:
            if not self.parts:
                raise ConfigError("reward_model.parts is empty: a sum needs a part. Write parts: {correct: {name: answer}}.")
            if wrong := [name for name in self.parts if not re.fullmatch(r"[\w-]+", name)]:
                raise ConfigError(f"reward_model.parts has {listing(wrong)}: use letters, digits, _ and - in the names of parts.")
            if missing := self.parts.keys() - self.weights.keys():
                raise ConfigError(f"reward_model.weights lacks {listing(missing)}: every part needs a weight.")
            if extra := sorted(self.weights.keys() - self.parts.keys()):
                raise ConfigError(
                    f"reward_model.weights has {listing(extra)}, which is no part.{did_you_mean(extra[0], self.parts)} Parts: "
                    f"{listing(self.parts)}."
                )

    @classmethod
    def inputs(cls, config: Config) -> Inputs:
        return Inputs(members=tuple(config.parts.values()))

    def __init__(self, config: Config, resources: Resources):
        self.weights = config.weights
        self.parts = {name: resources.reward_model(group) for name, group in config.parts.items()}
        self.needs_environment = any(part.needs_environment for part in self.parts.values())
        self._details: dict[str, np.ndarray] = {}

    def score(self, responses: Responses) -> np.ndarray:
        scores = {name: part.score(responses) for name, part in self.parts.items()}
        inner = {f"{name}/{key}": found for name, part in self.parts.items() for key, found in part.details().items()}
        self._details = scores | inner
        total = sum(self.weights[name] * found.astype(np.float64) for name, found in scores.items())
        return np.asarray(total, np.float32)

    def details(self) -> dict[str, np.ndarray]:
        return self._details

    def value_network(self) -> ScalarModel | None:
        return next((found for part in self.parts.values() if (found := part.value_network()) is not None), None)
