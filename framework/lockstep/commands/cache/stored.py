"""Stored stages: which runs use them, why one is not reused, and which ones no run needs.

A stage is used by every run whose folder names it, at any depth under the same root. To get rid of a run, remove its folder,
then prune. Nothing here changes a stage that a process is working on, or any stage while some run cannot be read.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.config.root import ConfigGroup
from lockstep.errors import CheckpointError, ConfigError
from lockstep.runs.experiment import Experiment
from lockstep.runs.identity import what_changed
from lockstep.runs.store import StageFolder
from lockstep.storage import locks
from lockstep.storage.records import RUN, STAGE, STAGES, read_record

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


@dataclass
class Users:
    """``of``: {stage folder: the runs that made it, reused it, or are going to}. ``unread``: a sentence for each run that cannot
    be read, and so may use any stage."""

    of: dict[str, list[str]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


NAME = re.compile(r".+-[0-9a-f]{12}")
"""The pattern of a stage folder's name."""


def entries(root: Path, users: Users) -> list[Entry]:
    """The stages under ``root``, sorted by name. Other folders there are not stages, and are left out."""
    folders = sorted(path for path in (root / "stages").glob("[!.]*") if path.is_dir() and NAME.fullmatch(path.name))
    return [entry(folder, users.of.get(folder.name, ())) for folder in folders]


def entry(folder: Path, runs: Sequence[str]) -> Entry:
    files = list(_sizes_and_times(folder))
    changed = max((time for _, time in files), default=folder.stat().st_mtime)
    return Entry(folder, _state(folder), sum(size for size, _ in files), time.time() - changed, runs)


def _sizes_and_times(folder: Path) -> Iterator[tuple[int, float]]:
    for file in folder.rglob("*"):
        try:
            status = file.stat()
        except OSError:  # removed or renamed by a process that works on the stage, or a dangling link
            continue
        if file.name != "lock" and not stat.S_ISDIR(status.st_mode):
            yield status.st_size, status.st_mtime


def _state(folder: Path) -> str:
    with locks.hold_if_free(folder) as owner:
        if owner is not None:
            return f"process {owner} is working on it"
    if StageFolder(folder).done:
        return "done"
    if (folder / "done.json").exists():
        return "damaged: files of its output are missing or changed"
    steps = [int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdecimal()]
    return f"unfinished, at step {max(steps)}" if steps else "unfinished, without a checkpoint"


def users(root: Path) -> Users:
    found = Users()
    for run in _run_folders(root, found.unread):
        try:
            names = _used_by(run, root)
        except CheckpointError as error:
            found.unread.append(str(error))
            continue
        for name in names:
            found.of.setdefault(name, []).append(str(run.relative_to(root)))
    return found


def _used_by(run: Path, root: Path) -> set[str]:
    """The names of the stage folders that a run has used, plans to use, or reads by their path."""
    made, planned, names = run / "run.json", run / "stages.json", set()
    if made.exists():
        names |= {Path(stage["folder"]).name for stage in read_record(made, RUN)["stages"].values()}
    for stage, content in (read_record(planned, STAGES) if planned.exists() else {}).items():
        names.add(StageFolder.of(root, stage, content["backend"]["name"], content).path.name)
        names |= {part for path in content["folders"] for part in Path(path).parts if NAME.fullmatch(part)}
    return names


def _run_folders(root: Path, unread: list[str]) -> Iterator[Path]:
    """The folders of runs under ``root``, at any depth, following links. Places that cannot be read are added to ``unread``."""
    tell, seen = lambda error: unread.append(f"{error.filename} cannot be read: {error.strerror}."), set()
    for place, folders, files in os.walk(root, onerror=tell, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        if {"run.json", "stages.json"} & set(files):
            yield Path(place)
        if Path(place) == root:
            unread += [f"{path} is a link to nothing." for path in map(root.joinpath, files) if not path.exists()]


# ------------------------------------------------------------------------------------------------------- why not


def why(experiment: Experiment) -> dict[str, str]:
    """{stage: 'stored ...' or 'differs in data.seed: 0 -> 1 from ...'}."""
    identities = experiment.identities
    return {name: _why(experiment.root, folder, name, identities[name]) for name, folder in experiment.folders.items()}


def _why(root: Path, folder: StageFolder, stage: str, content: ConfigGroup) -> str:
    if (folder.path / "stage.json").exists():
        state = _state(folder.path)
        return f"{'stored' if state == 'done' else state}: {folder.path}"
    changes, unread = {}, []
    for file in sorted(root.glob("stages/*/stage.json")):
        if file.parent.name.startswith(f"{stage}-"):
            try:
                changes[file.parent] = what_changed(read_record(file, STAGE), content)
            except CheckpointError as error:
                unread.append(str(error))
    if not changes:
        return " ".join([f"no stage of this name is stored in {root / 'stages'}", *unread])
    nearest = min(changes, key=lambda path: (len(changes[path]), -path.stat().st_mtime))  # the newest of equals
    return f"differs in {'; '.join(changes[nearest])} (from the nearest stored one, {nearest.name})"


# ------------------------------------------------------------------------------------------------------- removal


def unused(root: Path, older_than: str | None = None) -> list[Entry]:
    """Stages that no run uses and no process is working on, unchanged for this long ('30d', '12h', '4w').

    Raises:
      ConfigError: ``older_than`` is not a time.
      CheckpointError: a run cannot be read.
    """
    least = seconds(older_than) if older_than else 0.0
    found = entries(root, _known_users(root))
    return [e for e in found if not e.runs and not e.state.startswith("process") and e.age >= least]


def _known_users(root: Path) -> Users:
    if (found := users(root)).unread:
        raise CheckpointError(
            "Nothing is pruned, because what these use is not known:\n" + "\n".join(f"  {line}" for line in found.unread)
        )
    return found


def seconds(text: str) -> float:
    if not (found := re.fullmatch(r"(\d+)([hdw])", text)):
        raise ConfigError(f"--older-than {text!r} is not a time. Write a number and h, d or w: 12h, 30d, 4w.")
    return int(found[1]) * UNITS[found[2]]


def remove(stage: Entry) -> bool:
    """Remove a stage, unless a process started working on it, or a run started using it, since it was listed."""
    root = stage.path.parents[1]
    with locks.hold_if_free(stage.path) as owner:
        if owner is not None or stage.path.name in _known_users(root).of:
            return False
        gone = stage.path.with_name(f".{stage.path.name}.part")
        stage.path.rename(gone)  # atomic, so that no process finds half of it
        shutil.rmtree(gone)
    return True
