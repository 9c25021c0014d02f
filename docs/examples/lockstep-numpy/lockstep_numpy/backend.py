"""Numpy on the host: no options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

from lockstep.config.schema import setting
from lockstep.interfaces import Backend, Learner, Model
from lockstep.learning.optimisation import OptimizerConfig
from lockstep_numpy.learner import NumpyLearner


class NumpyBackend(Backend):
    @dataclass(frozen=True)
    class Config:
        precision: Literal["float32"] = setting("float32", "Of everything.")

    name = "numpy"

    def __init__(self, config: Config):
        self.config = config

    def learner(self, models: Mapping[str, Model], optimizers: Mapping[str, OptimizerConfig]) -> Learner:
        return NumpyLearner(models, optimizers)

    def describe(self) -> dict[str, str]:
        versions = {library: version(library) for library in ("numpy", "autograd")}
        return {**versions, "device": "cpu", "precision": self.config.precision}

    def peak_memory_bytes(self) -> int | None:
        return None
