"""The JAX backend: a device, and learners for the models on it."""

from __future__ import annotations

from collections.abc import Mapping

from lockstep.interfaces import Learner, Model
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.planning.calls import Planner
from lockstep_jax.device import JaxDevice, devices_of


class JaxBackend(JaxDevice):
    def learner(self, models: Mapping[str, Model], optimizers: Mapping[str, OptimizerConfig]) -> Learner:
        from lockstep_jax.learner import JaxLearner  # importing it tests XLA options, which needs an initialised device

        return JaxLearner(self, models, optimizers)

    @classmethod
    def planner(cls, config: JaxDevice.Config, topology: str | None) -> Planner:
        if topology is None:
            devices_of(config)  # initialises them before the programs are imported, which test XLA options
        from lockstep_jax.plan import JaxPlanner

        return JaxPlanner(config, topology)
