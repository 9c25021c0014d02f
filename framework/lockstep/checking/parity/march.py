"""The two runs: the same experiment composed for each backend, and every training stage run step by step on both."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.checking.parity.differences import Step, compare_crossings, compare_parameters
from lockstep.checking.tap import Crossing, Tap
from lockstep.config import compose
from lockstep.errors import ConfigError
from lockstep.interfaces import Algorithm, Context
from lockstep.registry import registry
from lockstep.reporting.console import Console
from lockstep.runs.assembly import Assembly
from lockstep.runs.experiment import Experiment
from lockstep.runs.interrupts import GracefulStop
from lockstep.runs.stages import Stage


@dataclass
class StageSteps:
    """``total``: the number of steps in the whole stage. ``end``: the crossings of `Algorithm.finish`, if it called a model."""

    name: str
    total: int
    steps: list[Step] = field(default_factory=list)
    end: Step | None = None


class Side(Assembly):
    """One backend's run. Its algorithms' inputs go through a tap."""

    tap: Tap

    def algorithm(self, stage: Stage) -> Algorithm:
        self.tap = Tap(gradients=True)
        reward_model = self.reward_model(stage)
        context = Context(
            seed=stage.seed,
            backend=self.tap.backend(self.backend),
            tokenizer=self.tokenizer,
            data=self.data_of(stage),
            policy=self.tap.model(self.policy(stage.policy)),
            reward_model=None if reward_model is None else self.tap.reward_model(reward_model),
            environment=self.environment(stage),
            resources=self.resources(stage),
        )
        return stage.component(stage.config, context)

    def crossings(self) -> list[Crossing]:
        """The crossings since the last call."""
        found, self.tap.crossings = self.tap.crossings, []
        return found


class March:
    """``stages`` fills up during the run, so that measurements survive however it ends.

    Args:
      same_start: before each step the second backend takes the first one's parameters, optimizer and algorithm state; before
        each stage, the first one's outputs.
      steps: limit on the steps of each stage.
    """

    def __init__(self, overrides: Sequence[str], *, same_start: bool = False, steps: int | None = None):
        if steps is not None and steps < 1:
            raise ConfigError(f"--steps {steps} compares nothing. Give at least 1, or leave it out to run all steps.")
        self.names, compositions = split(overrides)
        self.sides = [Side(Experiment(compose.compose(composition)), {}) for composition in compositions]
        for name, side in zip(self.names, self.sides, strict=True):
            cls, config = side.experiment.backend
            if (count := cls.workers(config)) > 1:
                raise ConfigError(
                    f"lockstep parity runs both backends in one process, and the mesh of {name} needs {count}. Leave out "
                    f"{name}.mesh; lockstep check {name} compares it with one device."
                )
        self.same_start, self.most = same_start, steps
        self.training = [s for s in self.sides[0].experiment.stages.values() if s.kind == "train"]
        for stage in self.training:
            if collected := self.sides[0].experiment.collected(stage):
                raise ConfigError(
                    f"lockstep parity trains and collects nothing, and {stage.name} trains on what {collected[0]} collects. "
                    "Compare an experiment without rounds, such as experiment=instructgpt."
                )
        self.stages: list[StageSteps] = []
        self.stopped = ""

    def run(self, console: Console) -> None:
        """Run all training stages. Ctrl-C stops after the step in progress, a second Ctrl-C at once; either way ``stopped`` says
        where."""
        with tempfile.TemporaryDirectory(prefix="lockstep-parity-") as folder, GracefulStop() as stop:
            try:
                for stage in self.training:
                    self._stage(stage, Path(folder), console, stop)
                    if stop.asked:
                        break
            except KeyboardInterrupt:
                stop.asked = True
        if stop.asked and self.stages:
            self.stopped = f"stopped in {self.stages[-1].name} after {len(self.stages[-1].steps)} of its steps"

    def _stage(self, stage: Stage, folder: Path, console: Console, stop: GracefulStop) -> None:
        stages = [side.experiment.stages[stage.name] for side in self.sides]
        first, second = (side.algorithm(own) for side, own in zip(self.sides, stages, strict=True))
        found = StageSteps(stage.name, first.total_steps)
        self.stages.append(found)
        count = min(n for n in (first.total_steps, second.total_steps, self.most) if n is not None)
        with console.progress(stage.name, 0, count) as progress:
            for number in range(count):
                if self.same_start:
                    first.learner.save(folder / "state")
                    second.learner.restore(folder / "state")
                    second.load_state(first.state())
                step = self._crossed(stage.name, number, lambda algorithm, n=number: algorithm.step(n), first, second)
                compare_parameters(step, first.learner, second.learner)
                if first.total_steps != second.total_steps:
                    step.notes.append(f"the stage has {first.total_steps} and {second.total_steps} steps")
                found.steps.append(step)
                progress(number + 1, {}, in_short(step))
                if stop.asked:
                    return
        end = self._crossed(stage.name, count, lambda algorithm: algorithm.finish(), first, second)
        found.end = end if end.measures or end.notes else None
        self._save(stages, (first, second), folder)

    def _crossed(self, stage: str, number: int, call: Any, first: Algorithm, second: Algorithm) -> Step:
        """Run ``call`` on both algorithms and compare their crossings."""
        step, crossings = Step(stage, number), []
        for side, algorithm in zip(self.sides, (first, second), strict=True):
            call(algorithm)
            crossings.append(side.crossings())
        compare_crossings(step, self.names, *crossings)
        return step

    def _save(self, stages: Sequence[Stage], algorithms: Sequence[Algorithm], folder: Path) -> None:
        """Save the stage's outputs, if a later stage reads them."""
        name = stages[0].name
        if not any(name == source for stage in self.training for source, _ in stage.inputs):
            return
        for side, own, algorithm, backend in zip(self.sides, stages, algorithms, self.names, strict=True):
            if self.same_start and side is not self.sides[0]:
                side.outputs[name] = self.sides[0].outputs[name]
            else:
                output = folder / backend / name
                output.mkdir(parents=True)
                side.save(own, algorithm, output)
                side.outputs[name] = output


def split(overrides: Sequence[str]) -> tuple[tuple[str, str], list[list[str]]]:
    """The two backends' names, and the overrides of each. ``torch.threads=1`` is ``backend.threads=1`` for torch alone.

    Raises:
      ConfigError: the overrides do not name two backends.
    """
    default = usual_backends()
    value = [o.partition("=")[2] for o in [f"backend={default}", *overrides] if o.startswith("backend=")][-1]
    names = [name.strip() for name in value.split(",")]
    if len(names) != 2 or names[0] == names[1] or not all(names):
        count = {1: "one", 2: "twice the same"}.get(len(names), str(len(names)))
        raise ConfigError(
            f"lockstep parity compares two backends, but backend={value} names {count}. "
            f"Type backend=FIRST,SECOND: the first is the reference, and backend={default} is the default."
        )
    compositions = []
    for name in names:
        own = []
        for override in overrides:
            found = re.match(r"([+~]*)(\w+)\.", override)
            owner = found[2] if found and found[2] in names else name
            if owner == name and not override.startswith("backend="):
                own.append(re.sub(rf"^([+~]*){re.escape(name)}\.", r"\1backend.", override))
        compositions.append([f"backend={name}", *own])
    return (names[0], names[1]), compositions


def usual_backends() -> str:
    """'first,second': two installed backends, the configuration's default first."""
    usual = compose.default("backend")
    installed = [c.name for c in registry() if c.kind == "backend" and not c.missing()]
    return ",".join(sorted(installed, key=lambda name: (name != usual, name))[:2])


def in_short(step: Step) -> str:
    same = f"{step.tokens_same:,} of {step.tokens:,} tokens the same, " if step.tokens else ""
    loss = f"loss {step.measures['loss']:.1e}, " if "loss" in step.measures else ""
    return f"{same}{loss}parameters {step.measures['parameters']:.1e} apart"
