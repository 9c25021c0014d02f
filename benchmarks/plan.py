"""What `lockstep plan` says of memory, beside what a run then takes.

    python benchmarks/plan.py [--backend jax --backend torch] [--output benchmarks/plan]

The miniature's pipeline with a wider decoder, two to eight steps a stage, each stage in a process of its own, since the peak of a
process is that of all it has done. Measured is the process's largest resident size, from ``done.json``; with JAX, of a second
time: in the first, XLA compiles, which takes up to half a GiB that a plan leaves out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lockstep.config.compose import compose
from lockstep.planning.machines import GIB, MACHINES
from lockstep.planning.plan import Rehearsed, planned, rehearsed
from lockstep.runs.experiment import Experiment

STAGES = ("pretrain", "sft", "reward", "ppo")
SIZES = [
    "policy.hidden_size=512", "policy.layers=10", "policy.heads=8", "policy.kv_heads=8", "policy.intermediate_size=1536",
    "policy.context_length=512", "data.texts=64", "data.demonstrations=64", "data.comparisons=64", "data.prompts=64",
    "pretrain.batch_size=16", "sft.batch_size=16", "reward.batch_size=8", "algorithm.iterations=2", "algorithm.batch_size=32",
    "algorithm.epochs=1", "algorithm.micro_batch_size=16", "~stages.ppo_ptx", "~stages.evaluate", "tracker=none",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--backend", choices=("torch", "jax"), action="append")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    lines = ["| backend | stage | planned, GiB | measured, GiB | error |", "|---|---|---|---|---|"]
    for backend in arguments.backend or ("torch", "jax"):
        overrides = [*SIZES, f"backend={backend}", "backend.device=cpu"]
        experiment = Experiment(compose(overrides))
        cls, config = experiment.backend
        planner = cls.planner(config, None)
        plans = {
            each.name: planned(each, planner, MACHINES["h100"], bfloat16=False)
            for each in rehearsed(experiment)
            if isinstance(each, Rehearsed)
        }
        with tempfile.TemporaryDirectory() as folder:
            for number, stage in enumerate(STAGES, 1):
                later = [f"~stages.{name}" for name in STAGES[number:]]
                command = [sys.executable, "-m", "lockstep", "run", *overrides, *later, f"folder={folder}"]
                for again in (False, True) if backend == "jax" else (False,):
                    for old in Path(folder).glob(f"stages/{stage}-{backend}-*") if again else ():
                        shutil.rmtree(old)
                    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                (file,) = Path(folder).glob(f"stages/{stage}-{backend}-*/done.json")
                said, took = plans[stage].memory / GIB, json.loads(file.read_text())["memory"] / GIB
                lines.append(f"| {backend} | {stage} | {said:.2f} | {took:.2f} | {said / took - 1:+.0%} |")
                print(lines[-1], flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "memory.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
