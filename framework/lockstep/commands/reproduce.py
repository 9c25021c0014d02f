"""lockstep reproduce NAME [overrides]: a published finding, asked again here, claim by claim."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.reporting.console import Console

if TYPE_CHECKING:
    from lockstep.reporting.findings.page import Report

HELP = "a published finding, asked again here: its runs, and a page claim by claim"
OVERRIDES = True
FOLDER = "folder=runs/findings"
"""One for all findings, so that they share stages."""
CRITERIA = "criteria.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="the finding; without one, all are listed")
    parser.add_argument("--page", action="store_true", help="start no run: write the page from those that are there")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from lockstep.reporting.findings.finding import finding, findings

    console = Console()
    if arguments.name is None:
        for name in findings():
            found, _ = finding(name)
            console.out.print(f"{name:16} {found.title} ({found.source}); {found.hours:g} h on two cores")
        console.say("To run one: lockstep reproduce NAME hydra.launcher.parallel=2")
        return
    report, output = reproduce(arguments.name, overrides, runs=not arguments.page)
    from lockstep.reporting.findings.page import write

    files = write(report, output)
    console.out.print((output / "page.md").read_text(encoding="utf-8"), markup=False, highlight=False)
    for file in files:
        console.say(f"wrote {file}")


def reproduce(name: str, overrides: Sequence[str], *, runs: bool) -> tuple[Report, Path]:
    """Run what is not done yet of a finding's sweep, with the overrides. The report, and the folder for its page.

    Raises:
      ConfigError: there is no such finding.
      DataError: there is no run yet.
      SweepFailed: some of its jobs failed.
    """
    from lockstep.commands.run.sweeps import sweep, sweep_folder
    from lockstep.reporting.compare.reading import read
    from lockstep.reporting.findings.finding import finding
    from lockstep.reporting.findings.outcomes import between_backends, outcomes
    from lockstep.reporting.findings.page import Report

    found, text = finding(name)
    given = [*found.sweep, FOLDER, *overrides]
    folder = sweep_folder(given)
    output = folder.parents[1] / "pages" / f"{name}-{folder.name}"
    criteria = written_down(output, text)
    if runs:
        Console().say(sweep(["-m", *given]))
    reading = read([folder])
    results, missing = outcomes(found, reading.runs)
    seconds = {s.identity or (r.name, s.name): s.seconds or 0.0 for r in reading.runs for s in r.stages.values()}
    how = [criteria, f"{len(reading.runs)} runs, {sum(seconds.values()) / 3600:.1f} hours of one core or two."]
    if overrides:
        how.append(f"Run with other settings than the finding's: {' '.join(overrides)}.")
    command = shlex.join(["lockstep", "reproduce", name, *overrides])
    problems = [*reading.problems, *missing]
    return Report(found, results, between_backends(results), problems, command, " ".join(how)), output


def written_down(output: Path, text: str) -> str:
    """Keep the criteria before the first run. A sentence: since when they have stood, and whether they were changed since."""
    from datetime import UTC, datetime

    from lockstep.storage.files import write_text

    file, today = output / CRITERIA, datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    if not file.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_text(file, f"# written down {today} UTC\n{text}")
    first, _, before = file.read_text(encoding="utf-8").partition("\n")
    since = first.removeprefix("# written down ")
    if before == text:
        return f"The criteria were written down {since}, before the first of these runs."
    return f"The criteria were CHANGED after they had been written down {since}: {file} has what they were."
