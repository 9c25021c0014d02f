"""The conformance kit on several processes of torch:

    torchrun --nproc-per-node 2 benchmarks/mesh_kit.py [backend:torch policy:decoder ppo ...] [--overrides KEY=VALUE ...]

benchmarks/log.md has what it said.
"""

from __future__ import annotations

import argparse
import collections
import time

import torch

from lockstep.checking.conformance.kit import conform
from lockstep.checking.conformance.subjects import subject
from lockstep.processes import Processes, place
from lockstep_torch.device import TorchDevice

SUBJECTS = ["backend:torch", "policy:decoder", "reward_model:learned", "ppo", "sft", "reward_modelling"]


def main() -> None:
    parsing = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsing.add_argument("subjects", nargs="*", default=SUBJECTS, help="KIND:NAME, or the name of an algorithm")
    parsing.add_argument("--overrides", nargs="+", default=[])
    arguments = parsing.parse_args()
    torch.set_num_threads(1)
    # Each process checks files in a folder of its own, so each has to write them: as for the core, it is alone.
    TorchDevice.processes = property(lambda self: Processes(), lambda self, processes: None)
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
