"""Stored stages: which runs use them, why one is not reused, and which ones no run needs.

A stage is used by every run whose folder names it. To get rid of a run, remove its folder, then prune. Nothing here changes
a stage that a process is working on.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.errors import ConfigError
from lockstep.runs import store
from lockstep.runs.experiment import ConfigGroup, Experiment
from lockstep.runs.identity import what_changed
from lockstep.runs.store import StageFolder
from lockstep.storage.files import read_json

UNITS = {"h": 3600, "d": 86400, "w": 7 * 86400}


# ------------------------------------------------------------------------------------------------------- list


@dataclass(frozen=True)
class Entry:
    """A stored stage. ``size`` in bytes, ``age`` in seconds since it last changed, ``runs`` that use it."""

    path: Path
    state: str
    size: int
    age: float
    runs: Sequence[str]


def entries(root: Path) -> list[Entry]:
    """The stages under ``root``, sorted by name."""
    users = _users(root)
    folders = sorted(path for path in (root / "stages").glob("[!.]*") if path.is_dir())
    return [entry(folder, users.get(folder.name, ())) for folder in folders]


def entry(folder: Path, runs: Sequence[str]) -> Entry:
    files = [file.stat() for file in folder.rglob("*") if file.is_file() and file.name != "lock"]
    changed = max((file.st_mtime for file in files), default=folder.stat().st_mtime)
    return Entry(folder, _state(folder), sum(file.st_size for file in files), time.time() - changed, runs)


def _state(folder: Path) -> str:
    with store.hold_if_free(folder) as owner:
        if owner is not None:
            return f"process {owner} is working on it"
    if StageFolder(folder).done:
        return "done"
    if (folder / "done.json").exists():
        return "damaged: files of its output are missing or changed"
    steps = [int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdigit()]
    return f"unfinished, at step {max(steps)}" if steps else "unfinished, without a checkpoint"


def _users(root: Path) -> dict[str, list[str]]:
    """{stage folder: runs that made it, reused it, or are going to}."""
    users: dict[str, list[str]] = {}
    for file in sorted(root.glob("*/run.json")):
        record = read_json(file)
        names = {Path(stage["folder"]).name for stage in record["stages"].values()}
        planned = file.parent / "stages.json"
        for stage, content in (read_json(planned) if planned.exists() else {}).items():
            names.add(StageFolder.of(root, stage, record["backend"]["name"], content).path.name)
        for name in names:
            users.setdefault(name, []).append(record["name"])
    return users


# ------------------------------------------------------------------------------------------------------- why not


def why(experiment: Experiment) -> dict[str, str]:
    """{stage: 'stored ...' or 'differs in data.seed: 0 -> 1 from ...'}."""
    identities = experiment.identities
    return {name: _why(experiment.root, folder, name, identities[name]) for name, folder in experiment.folders.items()}


def _why(root: Path, folder: StageFolder, stage: str, content: ConfigGroup) -> str:
    if (folder.path / "stage.json").exists():
        state = _state(folder.path)
        return f"{'stored' if state == 'done' else state}: {folder.path}"
    stored = [path.parent for path in sorted(root.glob(f"stages/{stage}-*/stage.json"))]
    changes = {path: what_changed(read_json(path / "stage.json"), content) for path in stored}
    if not changes:
        return f"no stage of this name is stored in {root / 'stages'}"
    nearest = min(changes, key=lambda path: len(changes[path]))
    return f"differs in {'; '.join(changes[nearest])} (from the nearest stored one, {nearest.name})"


# ------------------------------------------------------------------------------------------------------- removal


def unused(root: Path, older_than: str | None = None) -> list[Entry]:
    """Stages that no run uses and no process is working on, unchanged for this long ('30d', '12h', '4w').

    Raises:
      ConfigError: ``older_than`` is not a time.
    """
    least = seconds(older_than) if older_than else 0.0
    return [e for e in entries(root) if not e.runs and not e.state.startswith("process") and e.age >= least]


def seconds(text: str) -> float:
    if not (found := re.fullmatch(r"(\d+)([hdw])", text)):
        raise ConfigError(f"--older-than {text!r} is not a time. Write a number and h, d or w: 12h, 30d, 4w.")
    return int(found[1]) * UNITS[found[2]]


def remove(stage: Entry) -> bool:
    """Remove a stage, unless a process started working on it, or a run started using it, since it was listed."""
    root = stage.path.parents[1]
    with store.hold_if_free(stage.path) as owner:
        if owner is not None or stage.path.name in _users(root):
            return False
        gone = stage.path.with_name(f".{stage.path.name}.part")
        stage.path.rename(gone)  # atomic, so that no process finds half of it
        shutil.rmtree(gone)
    return True
