"""Two checkouts of Lockstep beside each other: is a change slower?

    python benchmarks/speed/checkouts.py MODELS OLD NEW [--only ppo/tiny] [--rounds 9]

Each checkout runs its own ``benchmarks/speed/with_lockstep.py`` in its own ``.venv``. All contestants are at work at once and
take turns, forwards and backwards, so that a slow minute of the machine meets both. Printed: medians, and the median of the
ratios NEW / OLD of the turns of one round. MODELS is made by ``models.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

from worker import WORK

SCRIPT = "benchmarks/speed/with_lockstep.py"


class Process:
    """One checkout on one backend, warmed up."""

    def __init__(self, checkout: Path, backend: str, work: str, models: Path, threads: int):
        options = {"backend": backend, "precision": "float32", "threads": threads}
        spec = {"work": dataclasses.asdict(WORK[work]), "options": options, "device": "cpu", "models": str(models.resolve())}
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [checkout / ".venv/bin/python", checkout / SCRIPT, json.dumps(spec)],
            cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.read()
        self.seconds: list[float] = []

    def read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("A contestant ended; its error is above.")
        return json.loads(line)

    def turn(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.seconds.append(self.read()["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", nargs="*", default=["ppo/tiny"], choices=list(WORK))
    parser.add_argument("--backends", nargs="*", default=["torch", "jax"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    for work in args.only:
        for backend in args.backends:
            found = [Process(checkout, backend, work, args.models, args.threads) for checkout in (args.old, args.new)]
            for number in range(args.rounds):
                for process in found if number % 2 == 0 else found[::-1]:
                    process.turn()
            for process in found:
                process.process.stdin.close()
                process.process.wait()
            old, new = (process.seconds for process in found)
            ratios = [b / a for a, b in zip(old, new, strict=True)]
            print(
                f"{work}, {backend}: old {statistics.median(old):.3f} s, new {statistics.median(new):.3f} s, "
                f"ratio {statistics.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]",
                flush=True,
            )


if __name__ == "__main__":
    main()
