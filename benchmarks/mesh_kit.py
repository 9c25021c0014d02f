"""The conformance kit on several processes of torch:

    torchrun --nproc-per-node 2 benchmarks/mesh_kit.py [backend:torch policy:decoder ppo ...] [--overrides KEY=VALUE ...]

benchmarks/log.md has what it said. `lockstep check torch backend.mesh.fsdp=2` does the same for one subject.
"""

from __future__ import annotations

import argparse
import collections
import time

import torch

from lockstep.checking.conformance.kit import conform
from lockstep.checking.conformance.subjects import subject
from lockstep.processes import place

SUBJECTS = ["backend:torch", "policy:decoder", "reward_model:learned", "ppo", "sft", "reward_modelling"]


def main() -> None:
    parsing = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsing.add_argument("subjects", nargs="*", default=SUBJECTS, help="KIND:NAME, or the name of an algorithm")
    parsing.add_argument("--overrides", nargs="+", default=[])
    arguments = parsing.parse_args()
    torch.set_num_threads(1)
    for each in arguments.subjects:
        kind, _, name = each.rpartition(":")
        started, outcomes = time.perf_counter(), collections.Counter[str]()
        overrides = ["backend.device=cpu", "backend.mesh.fsdp=-1", *arguments.overrides]
        for outcome in conform(kind or "algorithm", subject(kind or "algorithm", name, "torch", overrides=overrides)):
            outcomes[outcome.status] += 1
            if outcome.status == "failed":
                print(f"process {place().rank}: {each}: {outcome.check.name}: {outcome.detail}\n{outcome.traceback}", flush=True)
        if place().rank == 0:
            print(f"{each}: {dict(outcomes)} in {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
