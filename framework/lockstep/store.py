"""Where results live: stage folders, named by the hash of all that decides their content, and run folders that point
to them.

    runs/
      <run>/                     run.json, config.yaml
      stages/<stage>-<backend>-<hash>/
        stage.json               what the hash is made of
        metrics.jsonl            one line per step
        samples.jsonl            text a person would read
        checkpoints/<step>/      learner, algorithm state, checksums; the last two are kept
        output/                  the result: a Hugging Face folder with its tokenizer, or an evaluation
        done.json                written last: the stage is complete

Two runs with the same stage share it: whoever comes first trains it, under a lock that the operating system gives back
when its owner dies, however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep import checkpoints
from lockstep.errors import CheckpointError

log = logging.getLogger("lockstep")
KEPT = 2


def identity(content: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of ``content``: equal for equal content, whatever the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


PRESENTATION = ("cli.py", "compare", "console.py", "summary.py", "tracking.py")
"""Of the core: what shows results and does not make them."""


def code_digest(modules: Iterable[str]) -> str:
    """SHA-256 of the source of the top-level packages of these modules, the core's among them: a stage is made anew after
    the code that makes it has changed."""
    digest = hashlib.sha256()
    for package in sorted({"lockstep"} | {module.partition(".")[0] for module in modules}):
        spec = None if package in sys.stdlib_module_names else importlib.util.find_spec(package)
        if spec is None:
            continue
        roots = [Path(root) for root in spec.submodule_search_locations or []] or [Path(spec.origin)]
        for root in roots:
            files = [root] if root.is_file() else sorted(root.rglob("*.py"))
            for file in files:
                inside = file.relative_to(root).parts if file != root else ()
                if package != "lockstep" or inside[0] not in PRESENTATION:
                    digest.update(f"{package}/{'/'.join(inside)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


@functools.cache
def folder_digest(path: str) -> str:
    """SHA-256 of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(path).rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path)}\0{_checksum(file)}".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class StageFolder:
    path: Path

    @classmethod
    def of(cls, root: Path, stage: str, backend: str, content: Mapping[str, Any]) -> StageFolder:
        return cls(root / "stages" / f"{stage}-{backend}-{identity(content)[:12]}")

    @property
    def output(self) -> Path:
        return self.path / "output"

    @property
    def done(self) -> bool:
        return (self.path / "done.json").exists()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Mark the stage complete; its trainer state is no longer needed."""
        checkpoints.write_json(self.path / "done.json", result)
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def result(self) -> dict[str, Any]:
        return checkpoints.read_json(self.path / "done.json")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder; wait where another process does."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                log.info("waiting for process %s, which works on %s", file.read().strip() or "?", self.path.name)
                fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    # ------------------------------------------------------------------------------------------------- checkpoints

    def save(self, step: int, write: Callable[[Path], None], state: Mapping[str, Any]) -> None:
        """A checkpoint before step ``step``: ``write`` puts files into a folder, ``state`` is JSON. It appears under its
        name only when it is complete; then the oldest beyond two goes."""
        final = self.path / "checkpoints" / f"{step:08d}"
        temporary = final.with_name(f".{final.name}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            sums = {file.name: _checksum(file) for file in sorted(temporary.iterdir())}
            checkpoints.write_json(temporary / "state.json", {"step": step, "state": state, "sums": sums})
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
        except OSError as error:
            raise CheckpointError(f"Could not save {final}: {error}. The checkpoint before it is kept.") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in self._checkpoints()[:-KEPT]:
            shutil.rmtree(old)

    def restore(self, read: Callable[[Path], None]) -> tuple[int, dict[str, Any]] | None:
        """The step and state of the newest complete checkpoint, after ``read`` took its files in; None without one. A
        damaged one is named and the one before it used."""
        for folder in reversed(self._checkpoints()):
            try:
                record = checkpoints.read_json(folder / "state.json")
                if damaged := [name for name, sum_ in record["sums"].items() if _checksum(folder / name) != sum_]:
                    raise CheckpointError(f"{', '.join(damaged)} changed since it was written")
            except (CheckpointError, OSError, KeyError) as error:
                log.warning("checkpoint %s is damaged (%s): trying the one before it", folder, error)
                continue
            read(folder)
            return record["step"], record["state"]
        return None

    def _checkpoints(self) -> list[Path]:
        folder = self.path / "checkpoints"
        return sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.exists() else []


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Records:
    """``metrics.jsonl`` and ``samples.jsonl`` of a stage. What was written after the checkpoint that a stage resumes
    from is cut off, so that each step stands there once."""

    def __init__(self, folder: Path, positions: Mapping[str, int] | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.files = {name: open(folder / f"{name}.jsonl", "ab") for name in ("metrics", "samples")}  # noqa: SIM115
        for name, file in self.files.items():
            size = file.seek(0, os.SEEK_END)
            file.truncate(min(size, (positions or {}).get(name, 0)))
            file.seek(0, os.SEEK_END)
        self.started = time.perf_counter()

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        seconds = round(time.perf_counter() - self.started, 3)
        self._write("metrics", {"step": step, "seconds": seconds, **{k: finite(v) for k, v in metrics.items()}})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._write("samples", {"step": step, **row})

    def positions(self) -> dict[str, int]:
        """Where the files end, for a checkpoint: what is before is on the disk."""
        for file in self.files.values():
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self.files.items()}

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        self.files[name].write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        self.files[name].flush()


def finite(value: float | None) -> float | None:
    """JSON knows no NaN or infinity: null."""
    return float(value) if value is not None and math.isfinite(value) else None


class RunFolder:
    """``run.json``: what a run was and is, kept up to date while it goes on."""

    def __init__(self, root: Path, name: str, record: Mapping[str, Any]):
        self.root, self.path = root, root / name
        self.record: dict[str, Any] = {"name": name, "status": "running", "stages": {}, **record}
        self.write()

    def stage(self, stage: str, folder: StageFolder, **facts: Any) -> None:
        known = self.record["stages"].setdefault(stage, {"folder": str(folder.path.relative_to(self.root))})
        known.update(facts)
        self.write()

    def write(self, **facts: Any) -> None:
        self.record |= facts
        checkpoints.write_json(self.path / "run.json", self.record)
