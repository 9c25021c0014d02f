"""Where results live: stage folders, named by the hash of everything that decides their content, and run folders that point
to them.

    runs/
      <run>/                     run.json, config.yaml, stages.json
      stages/<stage>-<backend>-<hash>/
        stage.json               what the hash is made of
        metrics.jsonl            one line per step
        samples.jsonl            readable text
        health.jsonl             warnings; empty if there were none
        checkpoints/<step>/      learner, state.json, and sums.json with the checksums of all files; the last two are kept
        output/                  the result: a Hugging Face folder with its tokenizer, or an evaluation
        done.json                written last: the stage is complete; lists the files of its output with their checksums

Two runs with the same stage share it: the first to come trains it, under a lock that the operating system releases when its
owner dies, however it dies. Likewise, a process that starts a run already in progress waits for it.

Whenever a process dies, each of these files and folders is either complete or absent: it is written as ``.<name>.part``,
flushed to disk, then renamed. Only the three .jsonl files grow in place; a checkpoint records how long they were.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from lockstep.config.schema import differences
from lockstep.config.secrets import without_secrets
from lockstep.errors import CheckpointError
from lockstep.processes import ALONE, Processes
from lockstep.runs.identity import decisive_backend, digest, without_copies, without_server
from lockstep.storage.files import (
    checksum,
    finite,
    move_folder,
    read_json,
    remove_leftovers,
    sync,
    write_json,
    write_text,
)
from lockstep.storage.locks import hold
from lockstep.storage.names import in_a_name
from lockstep.storage.records import CHECKPOINT, DONE, RUN, Shape, read_configuration, read_record, read_rows

log = logging.getLogger("lockstep")
KEPT = 2


@dataclass(frozen=True)
class StageFolder:
    path: Path

    @classmethod
    def of(cls, root: Path, stage: str, backend: str, content: Mapping[str, Any]) -> StageFolder:
        return cls(root / "stages" / f"{stage}-{in_a_name(backend)}-{digest(content)[:12]}")

    @property
    def output(self) -> Path:
        return self.path / "output"

    @property
    def done(self) -> bool:
        """True if the stage is complete and every file of its output still has its size."""
        try:
            result = self.result()
        except CheckpointError:
            return False
        sizes = {name: file.stat().st_size for name, file in self._output_files().items()}
        return bool(sizes) and all(sizes.get(name) == each["bytes"] for name, each in result["output"].items())

    @property
    def intact(self) -> bool:
        """True if the stage is `done` and every file of its output still has its checksum. This reads all the files, so use it
        for an output that is about to be read anyway."""
        if not self.done:
            return False
        files = self._output_files()
        return all(checksum(files[name]) == each["sha256"] for name, each in self.result()["output"].items())

    @contextlib.contextmanager
    def write_output(self, processes: Processes = ALONE) -> Iterator[Path]:
        """Yield a folder for the result, to which all processes may write. It becomes ``output`` once all its contents are on
        disk."""
        temporary = self.path / ".output.part"
        try:
            processes.share(lambda: _emptied(temporary))
            trouble: Exception | None = None
            try:
                yield temporary
            except Exception as error:
                trouble = error
            processes.settle(trouble)
            processes.share(lambda: move_folder(temporary, self.output))
        finally:
            if processes.leads:
                shutil.rmtree(temporary, ignore_errors=True)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Mark the stage complete; its trainer state is no longer needed."""
        files = {name: {"bytes": f.stat().st_size, "sha256": checksum(f)} for name, f in self._output_files().items()}
        write_json(self.path / "done.json", {**result, "output": files})
        self.remove_checkpoints()

    def result(self) -> dict[str, Any]:
        return read_record(self.path / "done.json", DONE)

    def _output_files(self) -> dict[str, Path]:
        files = sorted(path for path in self.output.rglob("*") if path.is_file())
        return {str(file.relative_to(self.output)): file for file in files}

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder, waiting while another run holds it."""
        with hold(self.path):
            remove_leftovers(self.path)
            remove_leftovers(self.path / "checkpoints")
            yield

    # ------------------------------------------------------------------------------------------------- checkpoints

    def save(self, step: int, write: Callable[[Path], None], state: Mapping[str, Any], processes: Processes = ALONE) -> None:
        """Save a checkpoint that resumes at ``step``. On each process, ``write`` puts files into a folder; ``state`` is JSON. The
        checkpoint gets its name only once it is complete; then all but the newest two are removed."""
        final = self.path / "checkpoints" / f"{step:08d}"
        temporary = final.with_name(f".{final.name}.part")

        def begin() -> None:
            _emptied(temporary)
            sync(self.path)  # so that the names of metrics.jsonl and of the folder of checkpoints are on disk

        def written() -> list[str]:
            write_json(temporary / "state.json", {"step": step, "state": state})
            return sorted(file.name for file in temporary.iterdir())

        def finish(sums: Mapping[str, str]) -> None:
            write_json(temporary / "sums.json", sums)
            move_folder(temporary, final)
            for old in self._checkpoints()[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)

        try:
            processes.share(begin)
            processes.together(lambda: write(temporary))
            own = processes.share(written)[processes.rank :: processes.count]
            sums = processes.each(lambda: {name: checksum(temporary / name) for name in own})
            processes.share(lambda: finish(dict(sorted(item for each in sums for item in each.items()))))
        except OSError as error:
            raise CheckpointError(f"Could not save {final}: {error}. The previous checkpoint is kept.") from error
        finally:
            if processes.leads:
                shutil.rmtree(temporary, ignore_errors=True)

    def restore(self, read: Callable[[Path], None], processes: Processes = ALONE) -> tuple[int, dict[str, Any]] | None:
        """Restore the newest intact checkpoint: ``read`` loads its files, on each process. Return its step and state, or None if
        there is none."""
        found = processes.share(self._newest)
        if found is None:
            return None
        name, step, state = found
        processes.together(lambda: read(self.path / "checkpoints" / name))
        return step, state

    def _newest(self) -> tuple[str, int, dict[str, Any]] | None:
        """The name, step and state of the newest intact checkpoint. A damaged checkpoint is logged and set aside as
        ``<step>.damaged``, and the one before it is tried."""
        found = self._checkpoints()
        for folder in reversed(found):
            try:
                _verify(folder)
            except (CheckpointError, OSError) as error:
                following = "trying the previous one" if folder != found[0] else "there is no earlier one"
                log.warning("checkpoint %s is damaged (%s): %s", folder, error, following)
                aside = folder.with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                continue
            record = read_record(folder / "state.json", CHECKPOINT)
            return folder.name, record["step"], record["state"]
        if found:
            log.warning("%s starts over: none of its checkpoints is intact", self.path.name)
        return None

    def remove_checkpoints(self) -> None:
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def _checkpoints(self) -> list[Path]:
        folder = self.path / "checkpoints"
        return sorted(p for p in folder.iterdir() if p.name.isdecimal()) if folder.exists() else []


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


@contextlib.contextmanager
def held(lock: Callable[[], contextlib.AbstractContextManager[None]], processes: Processes) -> Iterator[None]:
    """Inside, process 0 holds the lock for all processes."""
    with contextlib.ExitStack() as stack:
        processes.share(lambda: stack.enter_context(lock()))
        yield


def check_output(folder: Path) -> None:
    """Check that a stage's output is unchanged; any other folder passes.

    Raises:
      CheckpointError: the folder is the output of a complete stage, and its files have changed since.
    """
    stage = StageFolder(folder.parent)
    if folder == stage.output and (stage.path / "done.json").exists() and not stage.intact:
        raise CheckpointError(
            f"Files of {folder} are missing or changed since its stage wrote them. Run the stage's command again: it starts over "
            f"once {stage.path / 'done.json'} is removed."
        )


def _verify(folder: Path) -> None:
    """Raises CheckpointError or OSError if the checkpoint is not as it was written."""
    sums = read_json(folder / "sums.json")
    if not isinstance(sums, dict) or "state.json" not in sums:
        raise CheckpointError("sums.json changed since it was written")
    if changed := [name for name, expected in sums.items() if checksum(folder / name) != expected]:
        raise CheckpointError(f"{', '.join(changed)} changed since it was written")
    read_record(folder / "state.json", CHECKPOINT)


def _whole_lines(file: Path, end: int) -> int:
    """The number of bytes that the whole lines among a file's first ``end`` bytes take."""
    with open(file, "rb") as content:
        content.seek(max(end - 1, 0))
        if end == 0 or content.read(1) == b"\n":
            return end
        content.seek(0)
        return content.read(end).rfind(b"\n") + 1


class Records:
    """``metrics.jsonl``, ``samples.jsonl`` and ``health.jsonl`` of a stage. On resume, lines written after the checkpoint are cut
    off, so that each step appears once. ``seconds`` is the time spent before the checkpoint."""

    def __init__(self, folder: Path, positions: Mapping[str, int] | None = None, seconds: float = 0.0):
        folder.mkdir(parents=True, exist_ok=True)
        self.files = {name: open(folder / f"{name}.jsonl", "ab") for name in ("metrics", "samples", "health")}  # noqa: SIM115
        for name, file in self.files.items():
            size, end = file.seek(0, os.SEEK_END), (positions or {}).get(name, 0)
            if (whole := _whole_lines(folder / f"{name}.jsonl", end)) < end:
                log.warning("%s lost its last lines: %d of %d bytes remain", file.name, min(size, whole), end)
            file.truncate(whole)
            file.seek(0, os.SEEK_END)
        self.started = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        return round(time.perf_counter() - self.started, 3)

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write("metrics", {"step": step, "seconds": self.seconds, **{k: finite(v) for k, v in metrics.items()}})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self._write("samples", {"step": step, **row})

    def finding(self, step: int, row: Mapping[str, Any]) -> None:
        self._write("health", {"step": step, **row})

    def rows(self, name: str, shape: Shape) -> Iterator[dict[str, Any]]:
        """The rows of the file of this name."""
        return read_rows(Path(self.files[name].name), shape)

    def positions(self) -> dict[str, int]:
        """The ends of the files, for a checkpoint. Everything up to there is on disk."""
        for file in self.files.values():
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self.files.items()}

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        self.files[name].write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        self.files[name].flush()


class NoRecords(Records):
    """Stands in for `Records` on a process that leaves them to another."""

    def __init__(self) -> None:
        self.files, self.started = {}, time.perf_counter()

    def rows(self, name: str, shape: Shape) -> Iterator[dict[str, Any]]:
        return iter(())

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        pass


INDECISIVE = ("folder", "name", "objective", "tracker", "checkpoint_every", "samples_every", "choices")
"""Keys that decide where results go, how often they are written and what a run is called, but not the results."""


def decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides results."""
    found = {key: value for key, value in config.items() if key not in INDECISIVE}
    if (engine := found.pop("engine", None)) is not None:
        found["engine"] = without_server(engine)
    return found | {"backend": decisive_backend(found["backend"])} if "backend" in found else found


class RunFolder:
    """``run.json``: the run's status and facts, updated while it runs. ``config.yaml``: its configuration, without secrets.
    ``stages.json``: what the hashes of its stages are made of."""

    def __init__(self, root: Path, name: str):
        self.root, self.path, self.name = root, root / name, name
        self.writes = True
        """False in a process that leaves the record to another."""
        self.record: dict[str, Any] = {"name": name, "status": "running", "stages": {}}

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run, waiting while another process is running it."""
        with hold(self.path):
            remove_leftovers(self.path)
            if (self.path / "run.json").exists():
                read_record(self.path / "run.json", RUN)  # raises for another program's file, which must not be overwritten
            yield

    def write_config(self, config: Mapping[str, Any]) -> None:
        write_text(self.config_file, OmegaConf.to_yaml(OmegaConf.create(without_secrets(config))))

    def config_changes(self, config: Mapping[str, Any]) -> list[str]:
        """'sft.epochs: 1 -> 2' for each key that decides results and is stored here with another value; empty if no
        configuration is stored. Two secrets in the same place count as equal."""
        if not self.config_file.exists():
            return []
        before = read_configuration(self.path)
        now = yaml.safe_load(OmegaConf.to_yaml(OmegaConf.create(without_secrets(config))))
        return without_copies(differences(decisive(before), decisive(now)))

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    def unfinished(self) -> list[str]:
        """The stages that the run in this folder has started but not finished."""
        file = self.path / "run.json"
        stages = read_record(file, RUN)["stages"] if file.exists() else {}
        return [name for name, stage in stages.items() if stage["status"] != "done"]

    def stage(self, stage: str, folder: StageFolder, **facts: Any) -> None:
        known = self.record["stages"].setdefault(stage, {"folder": str(folder.path.relative_to(self.root))})
        known.update(facts)
        self.write()

    def write(self, **facts: Any) -> None:
        self.record |= facts
        if self.writes:
            write_json(self.path / "run.json", self.record)
