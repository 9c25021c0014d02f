"""Try new hostile inputs for as long as you like: what `tests/test_fuzz.py` does with the same few hundred every time.

    python benchmarks/fuzz.py [--minutes 10] [--area "run folders"]

Each area (`tests/hostile/areas.py`) has its share of the time and a process of its own, which a crash ends alone. Printed are the
inputs tried and the distinct failures, by where they were raised, each with its shortest input. Exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("framework", "plugins", "tests")]

from hypothesis import Phase, settings  # noqa: E402
from hypothesis.errors import UnsatisfiedAssumption  # noqa: E402

from hostile.areas import AREAS, attempt  # noqa: E402
from lockstep.errors import LockstepError  # noqa: E402

BATCH = settings(max_examples=100, phases=(Phase.generate,))
FEWEST = 50  # inputs tried however short the time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--area", choices=AREAS, action="append", help="only this one; may be repeated")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # in a process of its own: hunt there, report into this file
    args = parser.parse_args()
    areas = args.area or list(AREAS)
    if args.into:
        hunt(areas[0], args.minutes, args.into)
        return
    failed = 0
    for area in areas:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            how_long = args.minutes / len(areas)
            command = [sys.executable, __file__, "--area", area, "--minutes", str(how_long), "--into", str(report)]
            try:
                code = subprocess.run(command, timeout=120 + 120 * how_long).returncode
            except subprocess.TimeoutExpired:
                code = "(it never ended)"
            found = json.loads(report.read_text(encoding="utf-8"))
        if code:
            found["failures"][f"the process ended with code {code}"] = [1, found["last"], ""]
        failed += len(found["failures"])
        print(f"\n{area}: {found['tried']} inputs, {len(found['failures'])} distinct failures", flush=True)
        for where, (count, shortest, trace) in sorted(found["failures"].items()):
            print(f"\n{count} x {where}\n  input: {shortest:.500}\n" + textwrap.indent(trace, "  "), flush=True)
    sys.exit(min(failed, 1))


def hunt(name: str, minutes: float, report: Path) -> None:
    found: dict[str, Any] = {"tried": 0, "last": "", "failures": {}}
    end = time.monotonic() + 60 * minutes

    def check(given: Any) -> None:
        if found["tried"] >= FEWEST and time.monotonic() > end:
            return
        found["last"] = repr(given)
        report.write_text(json.dumps(found), encoding="utf-8")  # before: it may be the last
        try:
            AREAS[name].check(given)
        except UnsatisfiedAssumption:
            raise
        except (Exception, SystemExit) as error:
            count, shortest, trace = found["failures"].get(place(error), (0, None, ""))
            if shortest is None or len(found["last"]) < len(shortest):
                shortest, trace = found["last"], shown(error)
            found["failures"][place(error)] = [count + 1, shortest, trace]
        found["tried"] += 1

    while found["tried"] < FEWEST or time.monotonic() < end:
        attempt(replace(AREAS[name], check=check), BATCH)
    report.write_text(json.dumps(found), encoding="utf-8")


def place(error: BaseException) -> str:
    """The kind of error, and the last line of ours that it passed. If an unclear error was found: what is unclear, and where that
    error came from."""
    unclear = isinstance(error, AssertionError) and isinstance(error.__cause__, LockstepError)
    raised = error.__cause__ if unclear else error
    ours = [frame for frame in traceback.extract_tb(raised.__traceback__) if frame.filename.startswith(str(ROOT))]
    where = f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}" if ours else "?"
    kind = str(error).partition(":")[0][:60] if isinstance(error, AssertionError) else type(error).__name__
    return f"{kind}: {type(raised).__name__} at {where}" if unclear else f"{kind} at {where}"


def shown(error: BaseException) -> str:
    """Its message, and the lines of ours that it passed."""
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/framework/" in frame.filename or "/plugins/" in frame.filename
    ]
    lines = [f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno} {frame.line}" for frame in ours[-3:]]
    return "\n".join([*lines, f"{type(error).__name__}: {str(error)!r:.500}"])


if __name__ == "__main__":
    main()
