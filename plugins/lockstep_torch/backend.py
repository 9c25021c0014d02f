"""The PyTorch backend: a device, and learners for the models on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lockstep.config.mesh import MeshConfig
from lockstep.errors import ConfigError
from lockstep.interfaces import Learner, Model
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.planning.calls import Planner
from lockstep_torch.device import TorchDevice
from lockstep_torch.learner import TorchLearner


class TorchBackend(TorchDevice):
    def learner(self, models: Mapping[str, Model], optimizers: Mapping[str, OptimizerConfig]) -> Learner:
        return TorchLearner(self, models, optimizers)

    @classmethod
    def planner(cls, config: TorchDevice.Config, topology: str | None) -> Planner:
        if topology is not None:
            raise ConfigError(
                f"--topology {topology}: only backend=jax compiles for devices that are not here. For backend=torch, name what "
                "each device is, as in --machine h100."
            )
        from lockstep_torch.plan import TorchPlanner

        return TorchPlanner(cls(dataclasses.replace(config, mesh=MeshConfig())), config.mesh)
