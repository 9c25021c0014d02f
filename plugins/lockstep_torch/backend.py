"""PyTorch as a backend: a device, and learners of the models on it."""

from __future__ import annotations

from collections.abc import Mapping

from lockstep.interfaces import Learner, Model
from lockstep.learning.optimisation import OptimizerConfig
from lockstep_torch.device import TorchDevice
from lockstep_torch.learner import TorchLearner


class TorchBackend(TorchDevice):
    def learner(self, models: Mapping[str, Model], optimizers: Mapping[str, OptimizerConfig]) -> Learner:
        return TorchLearner(self, models, optimizers)
