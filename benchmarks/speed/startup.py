"""Seconds from `lockstep run` to the end of the first PPO iteration of the miniature, with the stages before it done.

    python benchmarks/speed/startup.py FOLDER [--times 5]

The first run of each backend in FOLDER makes these stages (and JAX's compilation cache) and is not timed. Each timed run has
a KL coefficient that none before it had, so that PPO starts anew, and is killed once its first row of metrics is written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

LOCKSTEP = Path(sys.executable).with_name("lockstep")
NOTHING = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def until_first_iteration(command: list[str], stages: Path) -> float:
    before = set(stages.glob("ppo-*/metrics.jsonl"))
    command = [*command, f"algorithm.kl_coef={0.03 + len(before) / 10000:.4f}"]
    started = time.perf_counter()
    process = subprocess.Popen(command, **NOTHING)
    try:
        while not any(path.stat().st_size for path in set(stages.glob("ppo-*/metrics.jsonl")) - before):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended before its first iteration")
            time.sleep(0.01)
        return time.perf_counter() - started
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {"torch": [], "jax": []}
    common = [str(LOCKSTEP), "run", f"folder={args.folder}"]
    for backend in seconds:
        subprocess.run([*common, f"backend={backend}", "algorithm.iterations=1"], check=True, **NOTHING)
    for _ in range(args.times):
        for backend, found in seconds.items():
            found.append(round(until_first_iteration([*common, f"backend={backend}"], args.folder / "stages"), 2))
            print(backend, found[-1], flush=True)
    print(json.dumps({backend: {"median": statistics.median(found), "all": found} for backend, found in seconds.items()}))


if __name__ == "__main__":
    main()
