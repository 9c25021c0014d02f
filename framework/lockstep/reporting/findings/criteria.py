"""When the criteria were written down, and when the runs that they judge began."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from lockstep.reporting.compare.cost import stages_made
from lockstep.reporting.compare.records import Run
from lockstep.reporting.findings.finding import Finding, parsed
from lockstep.storage.files import write_text
from lockstep.storage.records import RUN, read_record

FIRST_LINE = "# written down "


def write_down(file: Path, text: str) -> None:
    """Save a finding's text with the current time, unless it was saved before."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, f"{FIRST_LINE}{datetime.now(UTC).isoformat(timespec='seconds')}\n{text}")


def how(file: Path, finding: Finding, runs: Sequence[Run], overrides: Sequence[str]) -> str:
    """Describe when the claims were written down in ``file``, what was run, and what differs from the finding."""
    first, _, before = file.read_text(encoding="utf-8").partition("\n")
    since, began = datetime.fromisoformat(first.removeprefix(FIRST_LINE)), begin(runs)
    if since <= began:
        said = [f"The criteria were written down {_shown(since)}, and the first of these runs began {_shown(began)}."]
    else:
        said = [f"The criteria were written down {_shown(since)}, AFTER the first of these runs had begun, {_shown(began)}."]
    if parsed(before, str(file)).claims != finding.claims:
        said.append(f"They were CHANGED since: {file} has what they were.")
    said.append(f"{len(runs)} runs, whose stages took {sum(stages_made(runs).values()) / 3600:.1f} hours.")
    if overrides:
        said.append(f"Run with other settings than the finding's: {' '.join(overrides)}.")
    return " ".join(said)


def begin(runs: Sequence[Run]) -> datetime:
    """The earliest start of any run or of any of its stages, which may come from earlier runs."""
    times = []
    for run in runs:
        times.append(datetime.fromisoformat(read_record(run.folder / "run.json", RUN)["started"]))
        made = [run.folder.parent / "stages" / stage.identity / "stage.json" for stage in run.stages.values()]
        times += [datetime.fromtimestamp(file.stat().st_mtime, UTC) for file in made if file.exists()]
    return min(times).replace(microsecond=0)


def _shown(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"
