"""Reads run folders, and runs at W&B, into records.

A folder may be half-written, because the run is still going or has died. Whatever can be read is read, and `Reading.problems`
names the rest. It is an error only if a path has no run, or no run at all can be read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.errors import CheckpointError, DataError, did_you_mean, listing
from lockstep.reporting.compare import wandb_runs
from lockstep.reporting.compare.records import (
    Estimate,
    Estimates,
    EvaluationRecord,
    Reading,
    Run,
    StageRecord,
    flatten,
    series,
)
from lockstep.storage.records import (
    DONE,
    EVALUATION,
    METRICS,
    RUN,
    SWEEP,
    TASKS,
    Record,
    read_configuration,
    read_record,
    read_rows,
    stage_folders,
)


def read(paths: Sequence[Path | str]) -> Reading:
    """Read all runs under ``paths``: run folders, folders of run folders, sweep folders, ``wandb:`` filters.

    Raises:
      DataError: a path has no run, or no run can be read.
    """
    reading = Reading()
    folders: dict[Path, None] = {}
    for path in map(str, paths):
        if path.startswith("wandb:"):
            wandb_runs.read(path, reading)
        else:
            folders |= dict.fromkeys(folder.resolve() for folder in run_folders(Path(path), reading.problems))
    for folder in folders:
        try:
            reading.runs.append(_read_run(folder, reading.problems))
        except (OSError, CheckpointError) as error:
            reading.problems.append(f"{folder.name} is left out: {error}")
    if not reading.runs:
        raise DataError("None of the runs can be read. " + " ".join(reading.problems))
    return reading


def run_folders(path: Path, problems: list[str]) -> list[Path]:
    """The run folders that ``path`` stands for. ``problems`` names jobs of a sweep that left none.

    Raises:
      DataError: ``path`` has no run folders.
    """
    if not path.is_dir():
        siblings = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise DataError(f"No folder '{path}'.{did_you_mean(str(path), siblings)} {_ADVICE}")
    if (path / "run.json").exists():
        return [path]
    if (path / "sweep.json").exists():
        found = _sweep(path, problems)
    else:
        found = sorted(file.parent for file in path.glob("*/run.json"))
        for sweep in sorted(path.glob("sweeps/*/sweep.json")):
            try:
                _sweep(sweep.parent, problems)
            except CheckpointError as error:
                problems.append(str(error))
    if not found:
        deeper = listing(sorted({str(file.parents[1]) for file in path.glob("*/*/run.json")}))
        there = f" There are runs in {deeper}." if deeper else ""
        raise DataError(f"No runs in '{path}': neither it nor a folder in it has a run.json.{there} {_ADVICE}")
    return found


def _sweep(path: Path, problems: list[str]) -> list[Path]:
    """The run folders of ``FOLDER/sweeps/NAME``; its record names them relative to FOLDER."""
    found = []
    for job in read_record(path / "sweep.json", SWEEP)["jobs"]:
        folder = path.resolve().parents[1] / (job.get("run") or "?")
        if (folder / "run.json").exists():
            found.append(folder)
        else:
            said = f": {job['error'].splitlines()[-1]}" if (job.get("error") or "").strip() else ""
            problems.append(f"The job {' '.join(job['overrides'])} ({job['status']}) left no run{said}")
    return found


_ADVICE = "Give the folder of a run or of a sweep: lockstep compare runs/NAME. To make one: lockstep run experiment=demo"


# ------------------------------------------------------------------------------------------------------ one run folder


def _read_run(folder: Path, problems: list[str]) -> Run:
    record = read_record(folder / "run.json", RUN)
    if record["status"] != "done":
        stuck = [name for name, stage in record["stages"].items() if stage.get("status") != "done"]
        where = f" in {', '.join(stuck)}" if stuck else ""
        problems.append(f"{record['name']} is not finished ({record['status']}{where}): compared as far as it got.")
    folders = stage_folders(folder, record)
    if gone := [name for name, stage in folders.items() if not stage.is_dir()]:
        problems.append(f"{record['name']}: its {', '.join(gone)} cannot be read: there is no {folders[gone[0]]}.")
    return Run(
        name=record["name"],
        folder=folder,
        experiment=record["experiment"],
        seed=record["seed"],
        backend=record["backend"],
        status=record["status"],
        seconds=record.get("seconds"),
        command=record.get("command", ""),
        stages={name: _read_stage(name, stage, folders[name], problems) for name, stage in record["stages"].items()},
        config=dict(flatten(read_configuration(folder))) if (folder / "config.yaml").exists() else {},
        evaluation=_read_evaluations(folders, problems),
        samples=[row for f in folders.values() for row in read_rows(f / "output" / "samples.jsonl", SHOWN, problems.append)],
        tasks={name: found for name, f in folders.items() if (found := _read_tasks(f / "tasks.json", problems))},
    )


SHOWN = {"policy": str, "split?": (str, None), "prompt": str, "response": str}
"""The fields of a sample that the page shows."""


def _read_stage(name: str, record: Mapping[str, Any], folder: Path, problems: list[str]) -> StageRecord:
    done, kind = _read_done(folder, problems), record.get("kind", "train")
    rows = list(read_rows(folder / "metrics.jsonl", METRICS, problems.append))
    return StageRecord(
        name=name,
        kind=kind,
        algorithm=record.get("algorithm"),
        produces=record.get("produces", ""),
        status=record.get("status", "running"),
        seconds=record.get("seconds"),
        metrics=series([{"step": 0, **done.get("metrics", {})}] if kind in ("collect", "attack") else rows),
        identity=folder.name,
        health=record.get("health") or (),
        memory=done.get("memory"),
    )


def _read_done(folder: Path, problems: list[str]) -> dict[str, Any]:
    """The record of a complete stage; empty for others."""
    return _read_if_there(folder / "done.json", DONE, problems)


def _read_if_there(file: Path, record: Record, problems: list[str]) -> dict[str, Any]:
    """The record; empty if the file does not exist or cannot be read, which ``problems`` then says."""
    try:
        return read_record(file, record) if file.exists() else {}
    except CheckpointError as error:
        problems.append(str(error))
        return {}


def _read_evaluations(folders: Mapping[str, Path], problems: list[str]) -> EvaluationRecord:
    """All evaluations of a run as one. If a later round evaluates again, it wins. If a stage of another name evaluates a split
    again, as in another environment, the split is called SPLIT@STAGE."""
    baseline: str | None = None
    splits: dict[str, dict[str, Estimates]] = {}
    reward_model: dict[str, Estimate] = {}
    first: dict[str, str] = {}
    for stage, folder in folders.items():
        content = _read_if_there(folder / "output" / "evaluation.json", EVALUATION, problems)
        baseline = content.get("baseline") or baseline
        reward_model |= _estimates(content.get("reward_model") or {})
        name = re.sub(r"_\d+$", "", stage)
        for split, policies in content.get("splits", {}).items():
            shown = split if first.setdefault(split, name) == name else f"{split}@{name}"
            splits.setdefault(shown, {}).update({policy: _estimates(found) for policy, found in policies.items()})
    return EvaluationRecord(baseline, splits, reward_model)


def _read_tasks(file: Path, problems: list[str]) -> dict[str, Estimate]:
    """{'arc_easy acc (5-shot)': its value}. The interval is ±1.96 of the harness's own standard errors."""
    found = {}
    for row in _read_if_there(file, TASKS, problems).get("results", ()):
        if row["value"] is not None and math.isfinite(row["value"]):
            half = 1.96 * (row["stderr"] or 0.0)
            found[_title(row)] = Estimate(row["value"], row["value"] - half, row["value"] + half, row["n"] or 0)
    return found


def _title(row: Mapping[str, Any]) -> str:
    how = {f"{row['shots']}-shot": row["shots"], f"first {row['limit']}": row["limit"], "chat": row["chat"]}
    said = ", ".join(part for part, holds in how.items() if holds)
    return f"{row['task']} {row['metric']}" + (f" ({said})" if said else "")


def _estimates(record: Mapping[str, Any]) -> dict[str, Estimate]:
    """The estimates of a record, without measures that have no finite mean."""
    found = {metric: measure for metric, measure in record.items() if measure and measure.get("mean") is not None}
    return {metric: _estimate(measure) for metric, measure in found.items() if math.isfinite(measure["mean"])}


def _estimate(found: Mapping[str, Any]) -> Estimate:
    """An estimate. Some measures, such as calibration error, have no interval: both ends are then the mean."""
    mean = float(found["mean"])
    return Estimate(mean, float(found.get("low", mean)), float(found.get("high", mean)), int(found.get("n") or 0))
