"""`lockstep parity`: runs one experiment on two backends step by step, and shows where and by how much they part.

march         the two runs, compared after each step
differences   the measures
plots         the figure

The table's titles are in `MEASURES`; `docs/parity.md` says how to read them.
"""

from __future__ import annotations

import csv
import datetime
import json
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.checking.parity.differences import Step
from lockstep.checking.parity.march import March, StageSteps
from lockstep.config.secrets import without_secrets
from lockstep.errors import Stopped
from lockstep.reporting.compare.tables import Table, to_markdown, to_rich
from lockstep.reporting.console import Console, Terminal, shown
from lockstep.reporting.markdown import escaped
from lockstep.version import __version__

__all__ = ["ParityReport", "parity", "print_summary"]

MEASURES = {
    "sampler_logprobs": "log-probabilities, sampler",
    "logprobs": "log-probabilities",
    "entropy": "entropy",
    "values": "values",
    "scores": "scores",
    "loss": "loss",
    "gradient": "gradient, relative",
    "parameters": "parameters",
    "parameters_l2": "parameters, relative L2",
}


@dataclass(frozen=True)
class ParityReport:
    names: tuple[str, str]
    same_start: bool
    stages: Sequence[StageSteps]
    facts: Mapping[str, Any]
    files: Sequence[Path]
    stopped: str

    @property
    def sentences(self) -> list[str]:
        return [sentence(stage, self.names, self.same_start) for stage in self.stages if stage.steps]

    @property
    def table(self) -> Table:
        mode = "each step from the same weights" if self.same_start else "free running"
        header = ["stage", "steps", "tokens the same", "first differing token", "log-probs", "loss", "gradient", "parameters"]
        title = f"{self.names[0]} and {self.names[1]}, {mode}: largest differences, and of the parameters at the end"
        return Table(title, header, [row(stage) for stage in self.stages if stage.steps])


def parity(overrides: Sequence[str], *, same_start: bool = False, steps: int | None = None, output: Path) -> ParityReport:
    """Run the experiment on both backends. However the run ends, write report.md, parity.json, steps.csv and the figure to
    ``output`` if at least one step was compared."""
    march = March(overrides, same_start=same_start, steps=steps)
    options = ["--same-start"] * same_start + ["--steps", str(steps)] * (steps is not None)
    started = datetime.datetime.now(datetime.UTC)
    try:
        march.run(Console())
    finally:
        backends = {name: side.backend.describe() for name, side in zip(march.names, march.sides, strict=True)}
        facts = {
            "command": shlex.join(["lockstep", "parity", *without_secrets(overrides), *options, "--output", str(output)]),
            "backends": backends,
            "versions": {"lockstep": __version__, "python": platform.python_version()},
            "started": started.isoformat(timespec="seconds"),
            "seconds": round((datetime.datetime.now(datetime.UTC) - started).total_seconds(), 1),
            "stopped": march.stopped,
        }
        report = ParityReport(march.names, same_start, march.stages, facts, [], march.stopped)
        if any(stage.steps for stage in march.stages):
            report = ParityReport(march.names, same_start, march.stages, facts, write(report, output), march.stopped)
    return report


def print_summary(report: ParityReport, console: Terminal | None = None) -> None:
    """Print the table and a sentence per stage.

    Raises:
      Stopped: the run was stopped; raised after printing.
    """
    console = console or Console().out
    console.print(report.table.title, style="bold")
    console.print(to_rich(report.table))
    for text in report.sentences:
        console.print(text)
    for file in report.files:
        console.print(f"wrote {file}")
    if report.stopped:
        raise Stopped(f"{report.stopped}. The report covers everything until then.")


# ------------------------------------------------------------------------------------------------------------ in words


def sentence(stage: StageSteps, names: tuple[str, str], same_start: bool) -> str:
    """A stage's numbers in words."""
    tokens, same = (sum(getattr(step, name) for step in stage.steps) for name in ("tokens", "tokens_same"))
    parts = []
    if tokens and same == tokens:
        parts.append(f"all {tokens:,} tokens the same")
    elif tokens:
        step = first_difference(stage)
        token = step.first
        drawn = " and ".join(f"{t} on {name}" for t, name in zip(token.tokens, names, strict=True))
        where = f"step {step.number}, row {token.row}, column {token.column}"
        parts.append(f"first differing token at {where} ({drawn}; within {token.tie:.1e} of a tie)")
        parts.append(f"{same / tokens:.3%} of {tokens:,} tokens the same")
    elif largest(stage, "loss") is not None:
        parts.append(f"losses at most {largest(stage, 'loss'):.1e} apart")
    if same_start:
        parts.append(f"one step moves the parameters at most {largest(stage, 'parameters'):.1e} apart")
    else:
        parts.append(f"parameters {stage.steps[-1].measures['parameters']:.1e} apart at the end")
    noted = sorted({note for step in all_steps(stage) for note in step.notes})
    more = f" (and {len(noted) - 3} more notes)" if len(noted) > 3 else ""
    return f"{stage.name}: {'; '.join([*parts, *noted[:3]])}{more}."


def row(stage: StageSteps) -> list[str]:
    tokens, same = (sum(getattr(step, name) for step in stage.steps) for name in ("tokens", "tokens_same"))
    step = first_difference(stage)
    first = f"step {step.number}, row {step.first.row}, column {step.first.column}" if step else "none" if tokens else ""
    count = len(stage.steps)
    return [
        stage.name,
        f"{count}" if count == stage.total else f"{count} of {stage.total}",
        f"{same:,} of {tokens:,}" if tokens else "",
        first,
        *(number(largest(stage, name)) for name in ("logprobs", "loss", "gradient")),
        number(stage.steps[-1].measures["parameters"]),
    ]


def first_difference(stage: StageSteps) -> Step | None:
    return next((step for step in stage.steps if step.first), None)


def all_steps(stage: StageSteps) -> list[Step]:
    return [*stage.steps, *([stage.end] if stage.end else [])]


def largest(stage: StageSteps, name: str) -> float | None:
    return max((step.measures[name] for step in all_steps(stage) if name in step.measures), default=None)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"


# ------------------------------------------------------------------------------------------------------------ the files


def write(report: ParityReport, output: Path) -> list[Path]:
    from lockstep.checking.parity import plots  # matplotlib takes a second to import

    output.mkdir(parents=True, exist_ok=True)
    (output / "report.md").write_text(markdown(report), encoding="utf-8")
    (output / "parity.json").write_text(
        json.dumps(report.facts | {"sentences": report.sentences}, indent=1) + "\n", encoding="utf-8"
    )
    rows = list(tidy(report.stages))
    with open(output / "steps.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    pictures = plots.figure(report.stages, report.names, report.same_start, output)
    return [output / "report.md", output / "parity.json", output / "steps.csv", *pictures]


def tidy(stages: Sequence[StageSteps]) -> Iterator[dict[str, Any]]:
    """One row per step, and one for the end of a stage if `Algorithm.finish` called a model."""
    for stage in stages:
        for step in all_steps(stage):
            first = step.first
            yield {
                "stage": stage.name,
                "step": "end" if step is stage.end else step.number,
                "tokens": step.tokens,
                "tokens_same": step.tokens_same,
                "first_row": first.row if first else "",
                "first_column": first.column if first else "",
                "first_tokens": "/".join(map(str, first.tokens)) if first else "",
                "first_tie": f"{first.tie:.3g}" if first else "",
                **{name: f"{value:.4g}" for name, value in step.measures.items()},
                "parameters_at": step.parameters_at,
                "notes": "; ".join(step.notes),
            }


def markdown(report: ParityReport) -> str:
    facts = report.facts
    machines = [f"{name}: {', '.join(f'{k} {v}' for k, v in about.items())}" for name, about in facts["backends"].items()]
    head = [
        f"# Parity of {report.names[0]} and {report.names[1]}",
        f"    {shown(' '.join(facts['command'].split()))}",
        "\n".join(
            [
                *(f"- {escaped(machine)}" for machine in machines),
                f"- lockstep {__version__}, {facts['started'][:10]}, {facts['seconds']:.0f} s",
            ]
        ),
        "\n".join(f"- {escaped(text)}" for text in report.sentences),
        "![Differences over steps](parity.png)",
    ]
    if report.stopped:
        head.insert(1, f"**{escaped(report.stopped.capitalize())}.**")
    tables = [report.table, *(stage_table(stage) for stage in report.stages if stage.steps)]
    return "\n\n".join([*head, *map(to_markdown, tables)]) + "\n"


def stage_table(stage: StageSteps) -> Table:
    """Every measure of a stage: at the first step, at its largest, at the last step."""
    names = dict.fromkeys(name for step in all_steps(stage) for name in step.measures)
    order = [*(name for name in MEASURES if name in names), *sorted(name for name in names if name not in MEASURES)]
    rows = []
    for name in order:
        steps = [step for step in all_steps(stage) if name in step.measures]
        peak = max(steps, key=lambda step: step.measures[name])
        ends = number(steps[0].measures[name]), number(steps[-1].measures[name])
        where = "end" if peak is stage.end else str(peak.number)
        title = MEASURES.get(name, f"{name.removeprefix('batch.')}, read by the loss")
        rows.append([title, ends[0], number(peak.measures[name]), where, ends[1]])
    return Table(stage.name, ["largest difference of", "at first", "at most", "at step", "at last"], rows)
