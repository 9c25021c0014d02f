"""Run an experiment; read runs as data frames."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.config.compose import compose
from lockstep.errors import CheckpointError
from lockstep.reporting.compare.groups import group
from lockstep.reporting.compare.reading import read
from lockstep.reporting.compare.records import Estimate
from lockstep.reporting.compare.records import Run as Record
from lockstep.reporting.compare.tidy import table
from lockstep.reporting.console import Console
from lockstep.storage.records import RUN, outputs, read_configuration, read_record

if TYPE_CHECKING:
    import pandas

    from lockstep.api.policies import ChatPolicy
    from lockstep.interfaces import Backend


class Run:
    """The folder of a run: what it measured, and the policies that it made. It may still be running.

    Attributes:
      folder: where it is.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "run.json").exists():
            raise CheckpointError(f"{folder} is not the folder of a run: it has no run.json.")

    def __repr__(self) -> str:
        return f"Run('{self.folder}')"

    @property
    def config(self) -> dict[str, Any]:
        """The run's whole configuration."""
        return read_configuration(self.folder)

    @property
    def status(self) -> str:
        """'running', 'waiting' (for people), 'done', 'stopped' or 'failed'."""
        return str(read_record(self.folder / "run.json", RUN)["status"])

    @property
    def _record(self) -> Record:
        return read([self.folder]).runs[0]

    @property
    def metrics(self) -> pandas.DataFrame:
        """A row per stage and step, a column per metric (docs/metrics.md): ``run.metrics.loc["ppo", "objective/score"]``."""
        import pandas

        found: dict[tuple[str, int], dict[str, float]] = {}
        for stage in self._record.stages.values():
            for metric, series in stage.metrics.items():
                for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
                    found.setdefault((stage.name, step), {})[metric] = value
        index = pandas.MultiIndex.from_tuples(list(found), names=["stage", "step"])
        return pandas.DataFrame(list(found.values()), index=index)

    @property
    def evaluation(self) -> pandas.DataFrame:
        """A row per split, policy and measure: the mean, its 95% interval over prompts, and the number of items it is taken over.
        The measures of the reward model itself have the split 'reward_model' and the policy ''."""
        import pandas

        evaluation = self._record.evaluation
        tables: dict[tuple[str, str], Mapping[str, Estimate]] = {
            (split, policy): estimates for split, policies in evaluation.splits.items() for policy, estimates in policies.items()
        } | {("reward_model", ""): evaluation.reward_model}
        found = {(*key, metric): vars(estimate) for key, table in tables.items() for metric, estimate in table.items()}
        index = pandas.MultiIndex.from_tuples(list(found), names=["split", "policy", "metric"])
        return pandas.DataFrame(list(found.values()), index=index, columns=["mean", "low", "high", "n"])

    def policy(self, stage: str | None = None, backend: str | Mapping[str, Any] | Backend | None = None) -> ChatPolicy:
        """The policy that a stage made, or the last one, on the run's backend or another."""
        from lockstep.api.policies import load

        return load(self.folder, backend, stage=stage)

    def outputs(self, kind: str) -> dict[str, Path]:
        """{stage: folder} of the run's results of one kind, 'policy' or 'reward_model', in the order of its stages."""
        return outputs(self.folder, kind)


def run(*overrides: str) -> Run:
    """Run an experiment, as ``lockstep run`` does with the same overrides: finished stages are reused, and an unfinished one is
    resumed.

    Raises:
        Stopped: on Ctrl-C; progress is saved, and the same call resumes.
        LockstepError: the configuration or the data is wrong.
    """
    from lockstep.runs.experiment import Experiment, finished
    from lockstep.runs.runner import Runner

    config = compose(overrides)
    folder = finished(config) or Runner(Experiment(config), Console(), shlex.join(["lockstep", "run", *overrides])).run()
    return Run(folder)


def results(*paths: str | Path) -> pandas.DataFrame:
    """All values of the runs under these folders, one per row, as ``lockstep compare`` writes them to metrics.parquet.

    Columns: group, task, run, backend, seed, stage, step, metric, value, low, high. Evaluations have no step; their metric is
    'split/policy/measure'. Paths are those that ``lockstep compare`` takes; without any, the folder 'runs' is read.

    Raises:
      DataError: a path holds no run.
    """
    reading = read(paths or ["runs"])
    for problem in reading.problems:
        Console().say(problem)
    found: pandas.DataFrame = table(group(reading, None)).to_pandas()
    return found
