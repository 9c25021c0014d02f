"""The KL sweep, whole or with jobs killed and then started again: what was made once, what was made again, and whether what a
report rests on is the same.

    python benchmarks/sweep.py runs/kl_sweep                                     # 18 jobs, about 20 minutes on two idle cores
    python benchmarks/sweep.py runs/killed --kill 2 --like runs/kl_sweep         # the same, with two of them killed on the way
    python benchmarks/sweep.py runs/small seed=0 algorithm.iterations=4 ...      # other overrides: a smaller one

``--kill N`` kills N jobs (SIGKILL), each at a random moment of PPO, lets the sweep end, and starts it again. ``--like FOLDER``
compares every metric of every step, but for times, and every evaluation with those of an earlier sweep. Printed as Markdown;
exit code 1 if anything differs or was made twice.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

SWEEP = ["backend=torch,jax", "algorithm.kl_coef=0.05,0.15,0.45", "seed=0,1,2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill", type=int, default=0, help="so many jobs, on the way")
    parser.add_argument("--like", type=Path, help="the folder of an earlier sweep, to compare with")
    parser.add_argument("--parallel", type=int, default=2)
    arguments, overrides = parser.parse_known_args()
    launcher = [f"folder={arguments.folder}", f"hydra.launcher.parallel={arguments.parallel}"]
    command = [sys.executable, "-m", "lockstep", "run", "-m", "experiment=kl_sweep", *merged(overrides), *launcher]
    print(f"    {shlex.join(['lockstep', *command[3:]])}\n", flush=True)

    seconds, code = run(command, arguments.folder, arguments.kill)
    print(f"* {len(runs(arguments.folder))} runs in {seconds / 60:.1f} minutes, exit code {code}; {made(arguments.folder)}")
    problems = [] if code == bool(arguments.kill) else [f"exit code {code}"]
    if arguments.kill:
        before = done(arguments.folder)
        seconds, code = run(command, arguments.folder, 0)
        problems += [] if code == 0 else [f"exit code {code} of the second start"]
        now = done(arguments.folder)
        new = collections.Counter(name.split("-")[0] for name in now if name not in before)
        print(f"* started again: {seconds / 60:.1f} minutes, exit code {code}; finished then: {counts(new)}")
        problems += [f"{name} was made again" for name in before if now.get(name) != before[name]]
    if arguments.like:
        ours, theirs = report(arguments.folder), report(arguments.like)
        differ = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        print(f"* {len(ours) - len(differ)} of {len(theirs)} runs have the metrics and evaluations of {arguments.like}")
        problems += [f"{name} differs" for name in differ]
    print("\n".join(f"* PROBLEM: {problem}" for problem in problems))
    sys.exit(1 if problems else 0)


def merged(overrides: list[str]) -> list[str]:
    """The sweep's overrides, where none of these has the same key."""
    keys = {override.partition("=")[0] for override in overrides}
    return [*(o for o in SWEEP if o.partition("=")[0] not in keys), *overrides]


def run(command: list[str], folder: Path, kills: int) -> tuple[float, int]:
    """Seconds and exit code of the sweep; what it prints goes to sweep.log."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with (
        open(folder / "sweep.log", "a", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as sweep,
    ):
        killed: set[Path] = set()
        while sweep.poll() is None:
            time.sleep(0.5)
            if len(killed) < kills and (found := in_ppo(folder, killed)):
                time.sleep(random.uniform(0, 10))
                killed |= kill_one(found)
    return time.monotonic() - started, sweep.returncode


def in_ppo(folder: Path, killed: set[Path]) -> list[Path]:
    """Stages of PPO that are being made and have a step, but for those whose process was killed."""
    begun = [file.parent for file in folder.glob("stages/ppo-*/metrics.jsonl") if file.stat().st_size]
    return [stage for stage in begun if stage not in killed and not (stage / "done.json").exists()]


def kill_one(stages: list[Path]) -> set[Path]:
    stage = random.choice(stages)
    if (stage / "done.json").exists():
        return set()
    os.kill(int((stage / "lock").read_text(encoding="utf-8").split()[0]), signal.SIGKILL)
    steps = len((stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    print(f"* killed the job that was making {stage.name}, after step {steps}", flush=True)
    return {stage}


def runs(folder: Path) -> list[Path]:
    return [file.parent for file in sorted(folder.glob("*/run.json"))]


def done(folder: Path) -> dict[str, int]:
    """{stage: when it was done}"""
    return {file.parent.name: file.stat().st_mtime_ns for file in folder.glob("stages/*/done.json")}


def made(folder: Path) -> str:
    return "stages: " + counts(collections.Counter(name.split("-")[0] for name in done(folder)))


def counts(counter: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.items()) or "none"


def report(folder: Path) -> dict[str, object]:
    """What `lockstep compare` reads of each run, without times."""
    content = {}
    for run in runs(folder):
        stages = json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"]
        content[run.name] = {name: stage_record(folder / stage["folder"]) for name, stage in stages.items()}
    return content


def stage_record(stage: Path) -> tuple[list[dict], object]:
    file = stage / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    timeless = [{k: v for k, v in row.items() if k != "seconds" and not k.startswith("perf/")} for row in rows]
    return timeless, json.loads((stage / "done.json").read_text(encoding="utf-8")).get("evaluation")


if __name__ == "__main__":
    main()
