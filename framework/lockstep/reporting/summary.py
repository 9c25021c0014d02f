"""The tables at the end of a run."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group
from rich.table import Table

from lockstep.reporting.console import numbers
from lockstep.storage.files import finite
from lockstep.storage.records import DONE, RUN, read_record, stage_folders


def summary(run: Path) -> Group:
    """Stages with their seconds and last numbers, then each evaluated policy with its 95% intervals."""
    folders = stage_folders(run, read_record(run / "run.json", RUN))
    results = {name: read_record(folder / "done.json", DONE) for name, folder in folders.items()}
    stages = Table(title="stages", title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "steps", "seconds", "at its end", "warnings"):
        stages.add_column(column)
    for name, result in results.items():
        warnings = ", ".join(dict.fromkeys(finding["name"] for finding in result.get("health", ())))
        stages.add_row(name, str(result["steps"]), f"{result['seconds']:.0f}", numbers(result["metrics"]), warnings)
    tables = [stages]
    for result in results.values():
        if "evaluation" in result:
            tables += evaluation_tables(result["evaluation"])
    return Group(*(item for table in tables for item in ("", table)))


def evaluation_tables(evaluation: dict) -> list[Table]:
    tables = []
    for split, policies in evaluation["splits"].items():
        shown = list(dict.fromkeys(name for measures in policies.values() for name in measures if is_shown(name)))
        table = Table(title=f"{split} prompts (± 95%)", title_justify="left", box=None, pad_edge=False)
        for column in ("policy", *shown):
            table.add_column(column, overflow="fold")
        for policy, measures in policies.items():
            table.add_row(policy, *(cell(measures.get(name)) for name in shown))
        tables.append(table)
    if reward := evaluation.get("reward_model"):
        table = Table(title="reward model (± 95%)", title_justify="left", show_header=False, box=None, pad_edge=False)
        for name, measure in reward.items():
            table.add_row(name, cell(measure))
        tables.append(table)
    return tables


def is_shown(measure: str) -> bool:
    """False for details, which `lockstep compare` shows."""
    return "/" not in measure and measure != "finished"


def cell(measure: dict | None) -> str:
    if measure is None or finite(measure["mean"]) is None:
        return ""
    half = f" ± {(measure['high'] - measure['low']) / 2:.2f}" if "low" in measure else ""
    return f"{measure['mean']:.2f}{half}"
