"""Kill a whole experiment at random moments, start the same command again until it ends, and compare every bit with a run that
nobody killed.

    python benchmarks/experiment_kills.py --experiment hardening,library --backend torch,jax --kills 20

The experiments are tiny, and all of their stages are there: of `hardening`, attackers that train, attacks (in the miniature's
disguises, since an attacker of three steps names no goal), labels, reward models, defenders and evaluations of two rounds; of
`library`, SFT, GRPO with a search and with an attacker's passages, and both evaluations. A run is killed with SIGKILL again and
again, each time between a half and one and a half of `SHARE` of the uninterrupted run's seconds after its start, until it ends
before its kill. Then it is compared, and the next run begins.

What must be equal, for every stage: the bytes of each output file, the rows of metrics.jsonl (all but timings), the bytes of
samples.jsonl and health.jsonl, the results in done.json. Linux. Writes ``benchmarks/experiment_kills.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kills import DECODER, ROOT, TINY, different, environment, find, head, write_rows

SHARE = 0.4
EXPERIMENTS = {
    "hardening": [
        *TINY, "attacker=miniature", "stages.rounds.repeat=2", "collection.prompts=6", "algorithm.iterations=3",
        "defending.ppo.iterations=3", "algorithm.minibatches=1", "attacking.iterations=3", "attacking.batch_size=2",
        "attacking.samples=2", "learn_to_attack.epochs=1", "attack.goals=6", "attack.heldout_goals=3", "attack.samples=2",
        "evaluation.prompts=4", "tracker=none",
    ],
    "library": [
        "data.prompts=60", "data.demonstrations=60", "data.heldout_prompts=12", "sft.epochs=1", "sft.batch_size=16",
        "algorithm.iterations=4", "algorithm.batch_size=4", "algorithm.samples=2", "evaluation.prompts=6", "tracker=none",
    ],
}  # fmt: skip


class Bench:
    """The kills of one experiment on one backend."""

    def __init__(self, experiment: str, backend: str, folder: Path, seed: int):
        own = {"torch": "backend.threads=1", "jax": f"backend.compilation_cache={folder / 'compiled'}"}[backend]
        chosen = [f"experiment={experiment}", f"backend={backend}", own, "checkpoint_every=1", *DECODER]
        self.command = [sys.executable, "-m", "lockstep", "run", *chosen, *EXPERIMENTS[experiment]]
        self.folder, self.random = folder, random.Random(f"{seed} {experiment} {backend}")

    def start(self, runs: Path) -> subprocess.Popen[bytes]:
        with open(runs.with_suffix(".log"), "ab") as log:
            command = [*self.command, f"folder={runs}"]
            return subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def finish(self, runs: Path, seconds: float | None = None) -> None:
        """Start or go on with a run.

        Raises:
          TimeoutExpired: it took longer than ``seconds`` and was killed.
        """
        process = self.start(runs)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if code:
            raise SystemExit(runs.with_suffix(".log").read_text(encoding="utf-8")[-3000:])

    def reference(self) -> None:
        """The run that nobody kills, and how long it takes."""
        for name in ("warm-up", "whole"):  # the first fills the compilation cache
            self.whole, began = self.folder / name, time.perf_counter()
            self.finish(self.whole)
            self.seconds = time.perf_counter() - began
        self.stages = [done.parent.name.split("-")[0] for done in self.whole.glob("stages/*/done.json")]

    def until_done(self, number: int, most: int) -> dict[str, Any]:
        """A run that is killed until it ends, at most ``most`` times, as a row of the record."""
        runs, killed, done = self.folder / f"run-{number}", [], False
        while not done:
            seconds = SHARE * self.seconds * self.random.uniform(0.5, 1.5)
            try:
                self.finish(runs, seconds if len(killed) < most else None)
                done = True
            except subprocess.TimeoutExpired:
                killed.append(self.current(runs))
        problems = [p for stage in self.stages for p in different(find(self.whole, stage), find(runs, stage))]
        if problems:
            print(f"kept: {runs}", flush=True)
        else:
            shutil.rmtree(runs)
        return {"kills": len(killed), "in": dict(Counter(killed)), "equal": not problems, "problems": problems}

    def current(self, runs: Path) -> str:
        """The stage that a kill came in: the newest that is begun and not done."""
        begun = [f for f in runs.glob("stages/*-*") if not (f / "done.json").exists()]
        return max(begun, key=lambda f: f.stat().st_mtime).name.split("-")[0] if begun else "between stages"


def report(rows: list[dict[str, Any]], seconds: float) -> str:
    lines = ["| experiment | backend | runs | kills | stages in which they came | bit-equal |", "|---|---|---|---|---|---|"]
    for experiment, backend in dict.fromkeys((row["experiment"], row["backend"]) for row in rows):
        here = [row for row in rows if (row["experiment"], row["backend"]) == (experiment, backend)]
        where = sum((Counter(row["in"]) for row in here), Counter())
        stages = ", ".join(f"{stage} {count}" for stage, count in sorted(where.items()))
        equal = sum(row["equal"] for row in here)
        lines.append(f"| {experiment} | {backend} | {len(here)} | {where.total()} | {stages} | {equal} of {len(here)} |")
    return "\n".join(
        [
            *head("Experiments killed at random moments", seconds, ("torch", "jax", "numpy")),
            "Every file that a stage put out, every metric, sample and result of runs that were killed again and again, against "
            "a run that nobody killed. `experiment_kills.py` says what was run and when it was killed; `experiment_kills.json` "
            "has a row per run.",
            "",
            *lines,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each experiment on each backend")
    parser.add_argument("--experiment", default="hardening,library")
    parser.add_argument("--backend", default="torch,jax")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    output, began, rows = ROOT / "benchmarks" / "experiment_kills", time.perf_counter(), []
    for experiment in arguments.experiment.split(","):
        for backend in arguments.backend.split(","):
            folder = Path(tempfile.mkdtemp(prefix=f"kills-{experiment}-{backend}-"))
            bench = Bench(experiment, backend, folder, arguments.seed)
            bench.reference()
            left, number = arguments.kills, 0
            while left > 0:
                number += 1
                row = bench.until_done(number, left)
                left -= row["kills"]
                rows.append({"experiment": experiment, "backend": backend, "run": number, **row})
                write_rows(output, rows)
                said = "equal" if row["equal"] else "; ".join(row["problems"])
                print(f"{experiment} {backend} run {number}: {row['kills']} kills in {row['in']}: {said}", flush=True)
            if all(row["equal"] for row in rows if (row["experiment"], row["backend"]) == (experiment, backend)):
                shutil.rmtree(folder)
    output.with_suffix(".md").write_text(report(rows, time.perf_counter() - began), encoding="utf-8")
    sys.exit(any(row["problems"] for row in rows))


if __name__ == "__main__":
    main()
