"""Wrappers for components that may answer differently when asked twice, such as functions, servers, judges and people. Process 0
asks and shares the answer. An error there is raised on all processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lockstep.interfaces import Label, Labeler, Responses, RewardModel, ScalarModel
from lockstep.processes import Processes
from lockstep.types import Candidates


class SharedRewardModel(RewardModel):
    def __init__(self, asked: RewardModel, processes: Processes):
        self.asked, self.processes = asked, processes
        self.needs_environment = asked.needs_environment
        self.found: dict[str, np.ndarray] = {}

    def score(self, responses: Responses) -> np.ndarray:
        scores, self.found = self.processes.share(lambda: (self.asked.score(responses), dict(self.asked.details())))
        return scores

    def details(self) -> dict[str, np.ndarray]:
        return self.found

    def value_network(self) -> ScalarModel | None:
        return self.asked.value_network()


class SharedLabeler(Labeler):
    def __init__(self, asked: Labeler, processes: Processes):
        self.asked, self.processes = asked, processes

    def label(self, candidates: Sequence[Candidates], seed: int, folder: Path) -> Sequence[Label]:
        asked = lambda: [dataclasses.astuple(label) for label in self.asked.label(candidates, seed, folder)]  # noqa: E731
        return [Label(*each) for each in self.processes.share(asked)]
