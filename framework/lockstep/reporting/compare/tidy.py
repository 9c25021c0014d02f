"""All values of a comparison as one table, one value per row: ``metrics.csv`` and ``metrics.parquet``.

Evaluations have no step. Their metric is 'split/policy/metric'; low and high are the ends of their interval over prompts. For a
public benchmark, the stage is the one that trained the policy, and the metric is 'tasks/arc_easy acc'.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.reporting.compare.groups import RunComparison
from lockstep.reporting.compare.records import Estimate, Run

if TYPE_CHECKING:
    import pyarrow

# name -> its type in Parquet
COLUMNS = {
    "group": "string", "task": "string", "run": "string", "backend": "string", "seed": "int64", "stage": "string",
    "step": "int64", "metric": "string", "value": "float64", "low": "float64", "high": "float64",
}  # fmt: skip


def write(c: RunComparison, output: Path) -> list[Path]:
    import pyarrow.csv
    import pyarrow.parquet

    found, text, parquet = table(c), output / "metrics.csv", output / "metrics.parquet"
    pyarrow.csv.write_csv(found, text)
    pyarrow.parquet.write_table(found, parquet)
    return [text, parquet]


def table(c: RunComparison) -> pyarrow.Table:
    """All values, with `COLUMNS`."""
    import pyarrow  # a dependency of datasets; takes half a second

    found = list(series(c))
    columns = dict(zip(COLUMNS, zip(*found, strict=True), strict=True)) if found else dict.fromkeys(COLUMNS, ())
    lengths = [len(values) for values in columns["value"]]
    arrays = []
    for name, kind in COLUMNS.items():
        if name in PER_ROW:
            parts = [pyarrow.array(each, kind) for each in columns[name]]
            arrays.append(pyarrow.chunked_array(parts, kind))
        else:
            places = np.repeat(np.arange(len(lengths)), lengths)
            arrays.append(pyarrow.array(list(columns[name]), kind).take(pyarrow.array(places)))
    return pyarrow.table(arrays, names=list(COLUMNS)).combine_chunks()


PER_ROW = ("step", "value", "low", "high")


def series(c: RunComparison) -> Iterator[list[Any]]:
    """Blocks of rows that differ only in `PER_ROW`: all values of these columns, and the common value of the others."""
    for g in c.groups:
        for task, run in zip(g.tasks, g.runs, strict=True):
            who = [g.label, task, run.name, run.backend.get("name"), run.seed]
            for stage in run.stages.values():
                for metric, found in stage.metrics.items():
                    nothing = [None] * len(found.steps)
                    yield [*who, stage.name, found.steps, metric, found.values, nothing, nothing]
            for stage_name, metric, e in _evaluated(run):
                low, high = (e.low, e.high) if e.low < e.high else (None, None)
                yield [*who, stage_name, [None], metric, [e.mean], [low], [high]]


def _evaluated(run: Run) -> Iterator[tuple[str, str, Estimate]]:
    """Yield (stage, metric, estimate)."""
    for split, policies in run.evaluation.splits.items():
        for policy, estimates in policies.items():
            for metric, estimate in estimates.items():
                yield "evaluate", f"{split}/{policy}/{metric}", estimate
    for metric, estimate in run.evaluation.reward_model.items():
        yield "evaluate", f"reward_model/{metric}", estimate
    for policy, found in run.tasks.items():
        for name, estimate in found.items():
            yield policy, f"tasks/{name}", estimate
