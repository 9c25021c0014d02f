"""Runs as sources of tasks, where a stage waits for labels, and of policies to talk to."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.data.labels import CANDIDATES, LABELS
from lockstep.errors import CheckpointError, DataError
from lockstep.storage.records import NUMBER, RUN, mismatch, outputs, read_record, stage_folders
from lockstep.text.sequences import chunks
from lockstep_studio.settings import StudioConfig
from lockstep_studio.store import tasks
from lockstep_studio.store.database import Database

log = logging.getLogger("lockstep")

TOGETHER = 50
"""The most tasks added in one transaction."""
MOST_BYTES = 500_000_000
"""The largest file of tasks."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_ROW = {
    "id": str, "messages": [{"role": str, "content": str}], "completions": [str], "policies?": ([str], None),
    "seed?": (int, None), "scores?": ([NUMBER], None), "ranks?": ([int], None),
}  # fmt: skip


def add_waiting(database: Database, runs: Sequence[Path], settings: StudioConfig, now: float) -> int:
    """Add the tasks of every stage that waits for labels and is not known yet. Close the tasks of stages that got labels from
    elsewhere. Returns how many tasks are new."""
    known = {row["path"] for row in database.reader.execute("SELECT path FROM sources WHERE complete")}
    for row in database.reader.execute("SELECT id, path FROM sources WHERE round IS NULL AND kind = 'candidates'").fetchall():
        if Path(row["path"]).with_name(LABELS).exists():
            database.now(tasks.close_source, row["id"], now)
    files = [str(file.resolve()) for run in runs for file in waiting_in(run)]
    return sum(add_file(database, Path(file), "candidates", settings, now) for file in files if file not in known)


def waiting_in(run: Path) -> Iterator[Path]:
    """The candidate files of a run's stages that have no labels yet."""
    for folder in stages_of(run).values():
        if (folder / CANDIDATES).is_file() and not (folder / LABELS).exists():
            yield folder / CANDIDATES


def stages_of(run: Path) -> dict[str, Path]:
    """{stage: folder} of a run; empty for a checkpoint."""
    return stage_folders(run, read_record(run / "run.json", RUN)) if (run / "run.json").is_file() else {}


def add_file(database: Database, file: Path, kind: str, settings: StudioConfig, now: float) -> int:
    """Add a file's tasks in parts, so that votes need not wait for all of them. Returns how many are new. Gold items take the
    place of all earlier ones.

    Raises:
      DataError: the file cannot be read or is too large, or a row is not a task. Then no task is added.
    """
    content = _bytes(file)
    rows = list(_rows(file, content, kind))
    sha256 = hashlib.sha256(content).hexdigest()
    begun = database.now(tasks.begin_source, str(file.resolve()), kind, sha256, len(rows), now)
    if begun is None:
        return 0
    source, there = begun
    weights = tasks.disagreement([row.get("scores") for row in rows])
    new = [(row, weight) for row, weight in zip(rows, weights, strict=True) if row["id"] not in there]
    for part in chunks(len(new), TOGETHER):
        database.now(tasks.add_tasks, source, kind, new[part], settings, now)
    database.now(tasks.end_source, source)
    return len(new)


def _bytes(file: Path) -> bytes:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise DataError(f"{file} is larger than {MOST_BYTES / 1e6:.0f} MB. Split it.")
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}.") from error


def _rows(file: Path, content: bytes, kind: str) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(text := line.decode())
            if _SURROGATE.search(text):  # encoding fails if it is only half of a pair
                json.dumps(row, ensure_ascii=False).encode()
            problem = mismatch(row, _ROW) or _odd(row, kind)
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if not problem and row["id"] in seen:
            problem = f"the id {row['id']!r} is there twice"
        if problem:
            raise DataError(f"{file}, line {number}: {problem}. A row of it has {', '.join(_ROW)}.")
        seen.add(row["id"])
        yield row


def _odd(row: Mapping[str, Any], kind: str) -> str | None:
    count = len(row["completions"])
    if count < 2 or not row["messages"]:
        return "a task needs a message and at least two completions"
    if wrong := next((k for k in ("policies", "scores", "ranks") if row.get(k) is not None and len(row[k]) != count), None):
        return f"{count} completions, but {len(row[wrong])} {wrong}"
    return "a gold item needs the right ranks" if kind == "gold" and row.get("ranks") is None else None


def policies_in(runs: Sequence[Path]) -> dict[str, tuple[Path, str | None]]:
    """{identity: (source, stage)} of the policies of runs, each run's last policy first. A checkpoint's stage is None."""
    found: dict[str, tuple[Path, str | None]] = {}
    for run in runs:
        if not (run / "run.json").is_file():
            found[run.name] = (run, None)
            continue
        try:
            made = outputs(run, "policy")
        except CheckpointError as error:
            log.warning("%s: %s", run, error)
            continue
        found |= {folder.parent.name: (run, stage) for stage, folder in reversed(made.items())}
    return found
