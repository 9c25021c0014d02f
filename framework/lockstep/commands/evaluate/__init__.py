"""lockstep evaluate RUN_OR_FOLDER --tasks ...: public benchmarks, with the language model evaluation harness."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lockstep.errors import CheckpointError, ConfigError
from lockstep.reporting.console import Console

HELP = "benchmarks of lm_eval: lockstep evaluate runs/NAME --tasks hellaswag,arc_easy"
OVERRIDES = False
INSTALL = "pip install 'lockstep-rlhf[harness]'"
RESULTS = "tasks.json"
"""The results file, in the folder of the stage that made the policy. `lockstep compare` reads it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="run folder (all its policies), stage folder, checkpoint folder, GGUF file or hub id")
    parser.add_argument("--tasks", required=True, help="tasks and groups of tasks, as lm_eval names them: hellaswag,mmlu")
    parser.add_argument("--include", type=Path, metavar="FOLDER", help="task files of your own; code that they name is run")
    parser.add_argument("--stage", help="for a run: only the policy of this stage")
    parser.add_argument("--backend", help="default: the run's, else the configured one")
    parser.add_argument("--fewshot", type=int, metavar="N", help="examples before each question (default: as each task says)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    parser.add_argument("--chat", action="store_true", help="ask in the policy's chat template")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="rows at a time (default: 16)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the results there, as JSON")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"lockstep evaluate needs lm_eval, which is not installed. Type: {INSTALL}")
    from lockstep.api.policies import load
    from lockstep.commands.evaluate import harness
    from lockstep.config.schema import parse
    from lockstep.storage.files import expanded, write_json

    a, console = arguments, Console()
    given = {"shots": a.fewshot, "limit": a.limit, "chat": a.chat, "batch": a.batch}
    settings = parse(harness.Settings, given, "evaluate")
    with console.waiting("reading the tasks"):
        tasks = harness.Tasks(a.tasks.split(","), a.include and expanded(a.include))
    every: dict[str, list[dict[str, Any]]] = {}
    for name, (source, stage) in policies(a.source, a.stage).items():
        chat = load(source, a.backend, stage=stage)
        console.say(f"{name}, on {chat.backend.name}")
        backend = {"name": chat.backend.name, **chat.backend.describe()}
        rows = [{**row, "backend": backend} for row in tasks.run(chat, settings, console)]
        every[name] = rows
        if folder := stage_folder(source, stage):
            keep(folder / RESULTS, rows)
    console.out.print(table(every))
    if a.output:
        write_json(expanded(a.output), {"settings": dataclasses.asdict(settings), "policies": every})
        console.say(f"wrote {a.output}")


def policies(source: str, stage: str | None) -> dict[str, tuple[str, str | None]]:
    """{name: (source, stage)}, for `load`: every policy of a run, or the one that is named.

    Raises:
      CheckpointError: the run has no policy yet.
    """
    from lockstep.storage.records import outputs

    if stage is not None or not (Path(source) / "run.json").exists() or (Path(source) / "config.json").exists():
        return {stage or source: (source, stage)}
    made = outputs(Path(source), "policy")
    if not made:
        raise CheckpointError(f"The run {source} has no policy yet. Finish it first: the same `lockstep run` resumes it.")
    return {name: (source, name) for name in made}


def stage_folder(source: str, stage: str | None) -> Path | None:
    """The folder of the stage that made the policy; None for a checkpoint from elsewhere."""
    from lockstep.storage.records import outputs

    folder = outputs(Path(source), "policy")[stage] if stage else Path(source)
    return next((each for each in (folder, folder.parent) if (each / "done.json").exists()), None)


def keep(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add the rows to those of earlier evaluations. An earlier row of the same task, metric and settings is replaced."""
    from lockstep.storage.files import write_json
    from lockstep.storage.locks import hold
    from lockstep.storage.records import TASKS, read_record

    with hold(file.parent):
        earlier = read_record(file, TASKS)["results"] if file.exists() else []
        write_json(file, {"results": list({_key(row): row for row in [*earlier, *rows]}.values())})


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("task", "metric", "shots", "limit", "chat"))


def table(every: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """A table with a line per task and metric, and a column per policy."""
    found = Table(box=None, pad_edge=False)
    for column in ("task", "metric", *every):
        found.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for first in next(iter(every.values())):
        cells = [shown(next(row for row in rows if _key(row) == _key(first))) for rows in every.values()]
        found.add_row(first["task"], first["metric"], *cells)
    return found


def shown(row: Mapping[str, Any]) -> str:
    """'0.4312 ± 0.0123': the value and its standard error, if the harness gives one."""
    value = "" if row["value"] is None else f"{row['value']:.4f}"
    return value if row["stderr"] is None else f"{value} ± {row['stderr']:.4f}"
