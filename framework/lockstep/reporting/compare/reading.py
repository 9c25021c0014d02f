"""Run folders, and runs at W&B, read into records.

A folder may be half-written, because the run is still going or has died: whatever can be read is read, and
`Reading.problems` names the rest. Only a path without a single run is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lockstep.errors import DataError, did_you_mean
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


def read(paths: Sequence[Path | str]) -> Reading:
    """All runs under ``paths``: run folders, folders of run folders, sweep folders, ``wandb:`` filters.

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
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reading.problems.append(f"{folder.name} cannot be read and is left out: {_short(error)}")
    if not reading.runs:
        raise DataError("None of the runs can be read. " + " ".join(reading.problems))
    return reading


def run_folders(path: Path, problems: list[str]) -> list[Path]:
    """The run folders that ``path`` stands for. ``problems`` names jobs of a sweep that have none.

    Raises:
      DataError: there are none.
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
            _sweep(sweep.parent, problems)
    if not found:
        raise DataError(f"No runs in '{path}': neither it nor a folder in it has a run.json. {_ADVICE}")
    return found


def _sweep(path: Path, problems: list[str]) -> list[Path]:
    """The run folders of ``FOLDER/sweeps/NAME``; its record names them relative to FOLDER."""
    found = []
    for job in json.loads((path / "sweep.json").read_text(encoding="utf-8"))["jobs"]:
        folder = path.resolve().parents[1] / (job.get("run") or "?")
        if (folder / "run.json").exists():
            found.append(folder)
        else:
            said = f": {job['error'].splitlines()[-1]}" if job.get("error") else ""
            problems.append(f"The job {' '.join(job['overrides'])} ({job['status']}) left no run{said}")
    return found


_ADVICE = "Give the folder of a run or of a sweep: lockstep compare runs/NAME. To make one: lockstep run experiment=demo"


# ------------------------------------------------------------------------------------------------------ one run folder


def _read_run(folder: Path, problems: list[str]) -> Run:
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if record["status"] != "done":
        stuck = [name for name, stage in record["stages"].items() if stage.get("status") != "done"]
        where = f" in {', '.join(stuck)}" if stuck else ""
        problems.append(f"{record['name']} is not finished ({record['status']}{where}): compared as far as it got.")
    folders = {name: folder.parent / stage["folder"] for name, stage in record["stages"].items()}
    return Run(
        name=record["name"],
        folder=folder,
        experiment=record["experiment"],
        seed=record["seed"],
        backend=record["backend"],
        status=record["status"],
        seconds=record.get("seconds"),
        command=record.get("command", ""),
        stages={name: _read_stage(name, stage, folders[name]) for name, stage in record["stages"].items()},
        config=dict(flatten(_read_config(folder / "config.yaml"))),
        evaluation=_read_evaluations(folders.values()),
        samples=[row for f in folders.values() for row in read_jsonl(f / "output" / "samples.jsonl")],
    )


def _read_config(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return {}
    except yaml.YAMLError as error:
        raise ValueError(f"config.yaml: {_short(error)}") from error


def _read_stage(name: str, record: Mapping[str, Any], folder: Path) -> StageRecord:
    return StageRecord(
        name=name,
        kind=record.get("kind", "train"),
        algorithm=record.get("algorithm"),
        produces=record.get("produces", ""),
        status=record.get("status", "running"),
        seconds=record.get("seconds"),
        metrics=series(read_jsonl(folder / "metrics.jsonl")),
        identity=folder.name,
        health=record.get("health") or (),
        memory=_read_done(folder).get("memory"),
    )


def _read_done(folder: Path) -> dict[str, Any]:
    """The record of a complete stage; empty for others."""
    file = folder / "done.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _read_evaluations(folders: Any) -> EvaluationRecord:
    """All evaluations of a run as one; if a later round evaluates again, it wins."""
    baseline: str | None = None
    splits: dict[str, dict[str, Estimates]] = {}
    reward_model: dict[str, Estimate] = {}
    for file in (folder / "output" / "evaluation.json" for folder in folders):
        if file.exists():
            content = json.loads(file.read_text(encoding="utf-8"))
            baseline = content.get("baseline") or baseline
            reward_model |= _estimates(content.get("reward_model") or {})
            for split, policies in content.get("splits", {}).items():
                splits.setdefault(split, {}).update({name: _estimates(found) for name, found in policies.items()})
    return EvaluationRecord(baseline, splits, reward_model)


def _estimates(record: Mapping[str, Any]) -> dict[str, Estimate]:
    """Leaves out measures without a finite mean."""
    found = {metric: measure for metric, measure in record.items() if measure and measure.get("mean") is not None}
    return {metric: _estimate(measure) for metric, measure in found.items() if math.isfinite(measure["mean"])}


def _estimate(found: Mapping[str, Any]) -> Estimate:
    """Some measures, such as calibration error, have no interval: both ends are then the mean."""
    mean = float(found["mean"])
    return Estimate(mean, float(found.get("low", mean)), float(found.get("high", mean)), int(found.get("n") or 0))


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; none if there is no such file. Skips a line that a crash cut off."""
    rows = []
    for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else ():  # U+2028 does not end a line here
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _short(error: Exception) -> str:
    message = " ".join(str(error).split())
    return f"missing {message}" if isinstance(error, KeyError) else message or type(error).__name__
