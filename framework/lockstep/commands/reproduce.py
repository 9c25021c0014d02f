"""lockstep reproduce NAME [overrides]: test a published finding again, claim by claim."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.reporting.console import Console

if TYPE_CHECKING:
    from lockstep.reporting.findings.page import Report

HELP = "reproduce a published finding: its runs, and a page claim by claim"
OVERRIDES = True
FOLDER = "folder=runs/findings"
"""The same folder for all findings, so that they share stages."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="the finding; without one, all are listed")
    parser.add_argument("--page", action="store_true", help="start no run: write the page from those that are there")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from lockstep.reporting.findings.finding import findings, parsed

    console = Console()
    if arguments.name is None:
        for name, file in findings().items():
            found = parsed(file.read_text(encoding="utf-8"), str(file))
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
    """Run the jobs of a finding's sweep that are not done yet, with the overrides; none unless ``runs``. Return the report, and
    the folder for its page.

    Raises:
      ConfigError: there is no such finding.
      DataError: there is no run yet.
      SweepFailed: some jobs of the sweep failed.
    """
    from lockstep.commands.run.sweeps import sweep, sweep_folder
    from lockstep.config.secrets import without_secrets
    from lockstep.reporting.compare.reading import read
    from lockstep.reporting.findings import criteria
    from lockstep.reporting.findings.finding import finding
    from lockstep.reporting.findings.outcomes import between_backends, outcomes
    from lockstep.reporting.findings.page import Report

    found, text = finding(name)
    given = [*found.sweep, FOLDER, *overrides]
    folder = sweep_folder(given)
    pages = folder.parents[1] / "pages"
    kept, output = pages / f"{name}.yaml", pages / f"{name}-{folder.name}"
    criteria.write_down(kept, text)
    if runs:
        Console().say(sweep(["-m", *given]))
    reading = read([folder])
    results, missing = outcomes(found, reading.runs, seeds(given))
    overrides = without_secrets(list(overrides))
    command = shlex.join(["lockstep", "reproduce", name, *overrides])
    how = criteria.how(kept, found, reading.runs, overrides)
    return Report(found, results, between_backends(results), [*reading.problems, *missing], command, how), output


def seeds(given: Sequence[str]) -> set[int]:
    """All seeds of the sweep."""
    from lockstep.config.overrides import read

    swept = [override for override in read(list(given)) if override.key_or_group == "seed"]
    if not swept:
        return set()
    last = swept[-1]
    return set(map(int, last.sweep_string_iterator() if last.is_sweep_override() else [last.value()]))
