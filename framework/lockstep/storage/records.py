"""The records that runs and stages leave, with one check of each that all readers share.

    runs/<run>/run.json, stages.json      runs/sweeps/<sweep>/sweep.json
    runs/stages/<stage>/stage.json, done.json, metrics.jsonl, samples.jsonl, health.jsonl, checkpoints/<step>/state.json,
                        output/output.json, output/evaluation.json, tasks.json

A record that is empty, cut off or somebody else's raises `CheckpointError`, which names the file, says what is wrong with it and
what may be removed. In a JSON-lines file, lines that are not rows are skipped, with one warning.
"""

from __future__ import annotations

import json
import logging
import re
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lockstep.errors import CheckpointError
from lockstep.storage.files import load_json

log = logging.getLogger("lockstep")

Shape = Any
"""A type; `NUMBER`; `object` for anything; None for null; a pattern for text; [shape] for a list; a tuple for one of several; a
dictionary for an object, where a key that ends in '?' may be absent and `EACH` stands for all other keys."""
EACH = ...
NUMBER = float
"""Any number that a float can hold, finite or not, but no boolean."""


@dataclass(frozen=True)
class Record:
    """A kind of record: what it is, its shape, and what to do about a file that does not have it."""

    what: str
    shape: Shape
    advice: str


_AGAIN = "Remove it and rerun the command of the run: it is written again, and finished stages are reused."
_MEASURE = ({"mean": (NUMBER, None), "low?": NUMBER, "high?": NUMBER, "n?": (NUMBER, None)}, None)
_EVALUATION = {
    "baseline?": (str, None),
    "splits": {EACH: {EACH: {EACH: _MEASURE}}},
    "reward_model?": ({EACH: _MEASURE}, None),
}
_FINDING = {"step?": int, "name": str, "message": str}

RUN = Record(
    "the record of a run",
    {
        "name": str, "experiment": str, "seed": int, "status": str, "backend": {"name": str},
        "seconds?": (NUMBER, None), "command?": str,
        "stages": {EACH: {
            "folder": re.compile(r"stages/(?!\.)[^/]+"), "status": str, "kind?": str, "algorithm?": (str, None),
            "produces?": str, "seconds?": (NUMBER, None), "health?": [_FINDING],
        }},
    },
    _AGAIN,
)  # fmt: skip
STAGES = Record(
    "what the stages of a run are made of",
    {EACH: {"backend": {"name": str}, "code": {EACH: str}, "data": {"fingerprint": object}, "folders": {EACH: str}}},
    _AGAIN,
)
STAGE = Record("what a stage is made of", dict, "Remove the folder of the stage; the next run that needs it trains it again.")
DONE = Record(
    "the result of a stage",
    {
        "steps": int, "seconds": NUMBER, "metrics": {EACH: (NUMBER, None)}, "output": {EACH: {"bytes": int, "sha256": str}},
        "memory?": (NUMBER, None), "data?": dict, "health?": [_FINDING], "evaluation?": _EVALUATION,
    },
    "Remove it and rerun the command of the run, which trains the stage again.",
)  # fmt: skip
CHECKPOINT = Record("the state of a checkpoint", {"step": int, "state": dict}, "Remove the folder of the checkpoint.")
OUTPUT = Record(
    "what says which policy reads a stage's output", {"kind": str, "policy": str},
    "Remove the folder of the stage and rerun the command of the run, which trains the stage again.",
)  # fmt: skip
EVALUATION = Record("an evaluation", _EVALUATION, OUTPUT.advice)
TASKS = Record(
    "what `lockstep evaluate` found",
    {"results": [{
        "task": str, "metric": str, "value": (NUMBER, None), "stderr": (NUMBER, None), "n": (int, None), "shots": (int, None),
        "limit": (int, None), "chat": bool,
    }]},
    "Remove it and run lockstep evaluate again.",
)  # fmt: skip
SWEEP = Record(
    "the record of a sweep",
    {"jobs": [{"overrides": [str], "status": str, "run?": (str, None), "error?": (str, None), "objective?": (NUMBER, None)}]},
    "Remove it and rerun the command of the sweep: it is written again, and finished jobs are reused.",
)

METRICS = {EACH: (NUMBER, None), "step": int}
SAMPLES = {"step": int}
HEALTH = {"step": int, "name": str, "message": str}


def read_record(file: Path, record: Record) -> Any:
    """
    Raises:
      CheckpointError: the file is missing, or is not such a record.
    """
    if not file.exists():
        raise CheckpointError(f"There is no {file}, {record.what}.")
    try:
        _check_file(file)
        content = load_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. It should be {record.what}. {record.advice}") from error
    if problem := mismatch(content, record.shape):
        raise CheckpointError(f"{file} is not {record.what}: {problem}. {record.advice}")
    return content


def _check_file(path: Path) -> None:
    """Raise FileNotFoundError, or OSError for a file that may have no end, such as a pipe."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no regular file")


def _from_yaml(text: str) -> Any:
    """The content of YAML that Lockstep wrote, which has no aliases: with them, a few lines could be a billion values. In libyaml
    deep nesting would end the process."""
    loader, depth = getattr(yaml, "CSafeLoader", yaml.SafeLoader), 0
    for event in yaml.parse(text, loader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*), which Lockstep does not write")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST} levels deep")
    return yaml.load(text, loader)


_DEEPEST = 100


def read_configuration(run: Path) -> dict[str, Any]:
    """The whole configuration of a run, from its config.yaml.

    Raises:
      CheckpointError: the file is not a configuration.
    """
    file = run / "config.yaml"
    try:
        _check_file(file)
        content = _from_yaml(file.read_text(encoding="utf-8"))
        problem = mismatch(content, {"backend": {"name": str}})
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no {file}, the configuration of a run.") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
    if problem:
        raise CheckpointError(f"{file} is not the configuration of a run: {problem}. {_AGAIN}")
    return content


MADE_BY = "output.json"
"""A file in a stage's output: the kind of the result, and the name of the policy that reads it."""


def outputs(run: Path, kind: str) -> dict[str, Path]:
    """{stage: folder} of a run's results of one kind, in the order of its stages."""
    stages = stage_folders(run, read_record(run / "run.json", RUN))
    made = {name: folder / "output" for name, folder in stages.items() if (folder / "output" / MADE_BY).exists()}
    return {name: folder for name, folder in made.items() if read_record(folder / MADE_BY, OUTPUT)["kind"] == kind}


def stage_folders(run: Path, record: Mapping[str, Any]) -> dict[str, Path]:
    """{stage: its folder} of a run with this `RUN` record. The stages are in the folder that holds the run or, if the run was
    moved deeper, in a folder above that."""
    above = (folder for folder in run.absolute().parents if (folder / "stages").is_dir())
    root = run.parent if (run.parent / "stages").is_dir() else next(above, run.parent)
    return {name: root / stage["folder"] for name, stage in record["stages"].items()}


def read_rows(file: Path, shape: Shape = dict, warn: Callable[[str], None] = log.warning) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file; none if there is no such file. An incomplete last line is being written, or was cut off by a
    crash, and is skipped. Other lines that are not such rows are skipped too, with one call of ``warn``."""
    if not file.is_file():
        if file.exists():
            warn(f"{file} is no regular file")
        return
    bad, first = 0, ""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line.decode())
                problem = mismatch(row, shape)
            except (ValueError, RecursionError) as error:
                problem = str(error)
            if problem is None:
                yield row
            elif line.endswith(b"\n"):
                bad, first = bad + 1, first or f"line {number}: {problem}"
    if bad:
        warn(f"{file}: {bad} line{'s' * (bad > 1)} skipped ({first})")


def mismatch(value: Any, shape: Shape, where: str = "") -> str | None:
    """How ``value`` differs from ``shape``, such as 'stages.sft.folder is missing'; None if it does not."""
    if isinstance(shape, tuple):
        first = mismatch(value, shape[0], where)
        return None if first is None or any(mismatch(value, each, where) is None for each in shape[1:]) else first
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _other(value, list, where)
        return next((p for i, each in enumerate(value) if (p := mismatch(each, shape[0], f"{where}[{i}]"))), None)
    if isinstance(shape, dict):
        return _mismatch_of_keys(value, shape, where)
    if isinstance(shape, re.Pattern):
        return None if isinstance(value, str) and shape.fullmatch(value) else f"{where or 'it'} is {_shown(value)}"
    return None if _is(value, shape) else _other(value, shape, where)


def _mismatch_of_keys(value: Any, shape: Mapping[Any, Shape], where: str) -> str | None:
    if not isinstance(value, dict):
        return _other(value, dict, where)
    for key, inner in shape.items():
        place = f"{where}." if where else ""
        if key is EACH:
            plain = _sufficient(inner)  # most values of most rows of metrics
            names = [name for name, each in value.items() if type(each) not in plain and name not in shape]
        elif (name := key.removesuffix("?")) in value:
            names = [name]
        elif key == name:
            return f"{place}{name} is missing"
        else:
            names = []
        for name in names:
            if problem := mismatch(value[name], inner, f"{place}{_named(name)}"):
                return problem
    return None


def _sufficient(shape: Shape) -> set[type]:
    """The types all of whose values have this shape."""
    kinds = shape if isinstance(shape, tuple) else (shape,)
    return {type(None) if kind is None else kind for kind in kinds if kind is None or isinstance(kind, type)}


def _is(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if kind is NUMBER:
        return isinstance(value, float) or _is(value, int) and abs(value) <= sys.float_info.max
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


_NAMES = {str: "text", int: "a whole number", NUMBER: "a number", dict: "an object", list: "a list", None: "null"}


def _other(value: Any, kind: Any, where: str) -> str:
    return f"{where or 'it'} is {_shown(value)}, not {_NAMES[kind]}"


def _named(key: str) -> str:
    """A key as part of a place such as 'stages.sft'."""
    return key if key.isprintable() and len(key) <= 60 else _shown(key)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    text = text if text.isprintable() else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
