"""The training loop of one stage: step, log, checkpoint. Ctrl-C stops it cleanly, and the same command resumes it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.errors import Diverged, Stopped
from lockstep.interfaces import Algorithm, Learner, Tracker
from lockstep.learning.served import Served
from lockstep.processes import Processes
from lockstep.reporting.console import Console
from lockstep.reporting.health import NOT_FINITE, Health, are_not_finite, diverged
from lockstep.runs.interrupts import GracefulStop
from lockstep.runs.store import Records, StageFolder
from lockstep.storage.files import finite
from lockstep.storage.records import METRICS
from lockstep.storage.weights import not_finite

log = logging.getLogger("lockstep")


@dataclass
class Loop:
    """Trains one stage. Step n depends only on the contents of the checkpoint and on (seed, n).

    machine: what bit-equality depends on besides configuration and code.
    metrics: those of the latest step.
    saved: the step of the latest checkpoint.
    """

    name: str
    algorithm: Algorithm
    folder: StageFolder
    records: Records
    tracker: Tracker
    console: Console
    processes: Processes
    machine: Mapping[str, str]
    samples_every: int
    checkpoint_every: int
    engine: Served | None = None
    health: Health = field(default_factory=Health, init=False)
    metrics: dict[str, float] = field(default_factory=dict, init=False)
    saved: int = field(default=0, init=False)

    def run(self, first: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Train from step ``first`` on, where ``metrics`` are those of the step before. Returns the last step's, and what the
        algorithm measures at the end.

        Raises:
          Diverged: a loss, a gradient or a parameter is not finite. Earlier checkpoints stay; no further one is saved.
          Stopped: on Ctrl-C or a termination signal, with progress saved.
        """
        total, self.saved, self.metrics = self.algorithm.total_steps, first, dict(metrics)
        self.health.replay(self.records.rows("metrics", METRICS))
        with GracefulStop() as stop, self.console.progress(self.name, first, total) as progress:
            for step in range(first, total):
                self.metrics = self.algorithm.step(step)
                self.record(step)
                self.stop_if_not_finite(diverged(self.metrics), step + 1)
                progress(step + 1, self.metrics)
                last = step + 1 == total
                if last or (step + 1) % self.samples_every == 0:
                    self.show_samples(step)
                asked = self.processes.any(stop.asked)
                if asked or last or (step + 1) % self.checkpoint_every == 0:
                    self.stop_if_not_finite(spoilt(self.algorithm.learner), step + 1)
                    if asked or not last:
                        self.save(step + 1)
                if asked:
                    self.records.close()
                    raise Stopped(f"Stopped in {self.name} after step {step + 1} of {total}. Rerun the same command to resume.")
        if finish := self.algorithm.finish():
            self.records.metrics(total, finish)
            self.tracker.log(finish, total)
        self.records.close()
        return self.metrics | finish

    def record(self, step: int) -> None:
        """Record the step's metrics, and warn of what they say about the run's health."""
        self.records.metrics(step, self.metrics)
        self.tracker.log(self.metrics, step)
        for finding in self.health.watch(step, self.metrics):
            log.warning("%s, step %d: %s. %s", self.name, step, finding.name, finding.message)
            self.records.finding(step, {"name": finding.name, "message": finding.message})
            self.tracker.alert(finding.name, finding.message, step)

    def show_samples(self, step: int) -> None:
        if rows := self.algorithm.samples():
            self.records.samples(step, rows)
            self.tracker.table("samples", rows, step)

    def save(self, step: int) -> None:
        state = {
            "algorithm": self.algorithm.state(),
            "positions": self.records.positions(),
            "seconds": self.records.seconds,
            "metrics": {name: finite(value) for name, value in self.metrics.items()},
            "machine": self.machine,
        }

        def write(checkpoint: Path) -> None:
            self.algorithm.learner.save(checkpoint)
            if self.engine is not None:
                self.engine.save(checkpoint)

        self.folder.save(step, write, state, self.processes)
        self.saved = step

    def stop_if_not_finite(self, wrong: Sequence[str], step: int) -> None:
        """
        Raises:
          Diverged: something is ``wrong``: not finite after so many steps.
        """
        if not wrong:
            return
        self.records.close()
        checkpoints = f"{self.folder.path}/checkpoints"
        kept = f"The checkpoint after step {self.saved} is kept in {checkpoints}" if self.saved else "There is no checkpoint yet"
        raise Diverged(
            f"{self.name} stopped after step {step} of {self.algorithm.total_steps}: {are_not_finite(wrong)} "
            f"{NOT_FINITE.meaning} {kept}; the stage is not done. Try: {NOT_FINITE.advice} The same command ends the same way."
        )


def spoilt(learner: Learner) -> list[str]:
    """The names of the parameters that hold NaN or infinity."""
    return [f"{name}.{each}" for name, model in learner.models.items() for each in not_finite(model.arrays())]
