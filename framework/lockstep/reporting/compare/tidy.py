"""All values of a comparison as one table, one value per row: ``metrics.csv`` and ``metrics.parquet``.

Evaluations have no step; their metric is 'split/policy/metric', and low and high are the ends of their interval over prompts.
The stage of a public benchmark is the policy's; its metric is 'tasks/arc_easy acc'.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from lockstep.reporting.compare.groups import RunComparison
from lockstep.reporting.compare.records import Estimate, Run

# name -> its type in Parquet
COLUMNS = {
    "group": "string", "task": "string", "run": "string", "backend": "string", "seed": "int64", "stage": "string",
    "step": "int64", "metric": "string", "value": "float64", "low": "float64", "high": "float64",
}  # fmt: skip


def write(c: RunComparison, output: Path) -> list[Path]:
    import pyarrow  # comes with datasets; half a second
    import pyarrow.parquet

    found = list(rows(c))
    table, text = output / "metrics.parquet", output / "metrics.csv"
    with open(text, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        writer.writerows(found)
    columns = zip(*found, strict=True) if found else [[] for _ in COLUMNS]
    arrays = [pyarrow.array(list(column), kind) for column, kind in zip(columns, COLUMNS.values(), strict=True)]
    pyarrow.parquet.write_table(pyarrow.table(arrays, names=list(COLUMNS)), table)
    return [text, table]


def rows(c: RunComparison) -> Iterator[list[object]]:
    for g in c.groups:
        for task, run in zip(g.tasks, g.runs, strict=True):
            who = [g.label, task, run.name, run.backend.get("name"), run.seed]
            for stage in run.stages.values():
                for metric, series in stage.metrics.items():
                    for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
                        yield [*who, stage.name, step, metric, value, None, None]
            for metric, e in _evaluated(run):
                low, high = (e.low, e.high) if e.low < e.high else (None, None)
                yield [*who, "evaluate", None, metric, e.mean, low, high]
            for policy, found in run.tasks.items():
                for name, e in found.items():
                    yield [*who, policy, None, f"tasks/{name}", e.mean, *((e.low, e.high) if e.low < e.high else (None, None))]


def _evaluated(run: Run) -> Iterator[tuple[str, Estimate]]:
    for split, policies in run.evaluation.splits.items():
        for policy, estimates in policies.items():
            for metric, estimate in estimates.items():
                yield f"{split}/{policy}/{metric}", estimate
    for metric, estimate in run.evaluation.reward_model.items():
        yield f"reward_model/{metric}", estimate
