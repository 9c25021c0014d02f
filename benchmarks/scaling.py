"""How PPO of Llama's 8B scales over hosts of eight H100s, and over slices of v5p, by arithmetic: what each card sends, and what a
step takes.

    python benchmarks/scaling.py h100 --output benchmarks/plan/scaling.md
    python benchmarks/scaling.py v5p --output benchmarks/plan/scaling_v5p.md

As `lockstep plan` on torch, with four models of 8B in bfloat16, 512 episodes a step of 1,024 + 1,024 tokens, on 1 to 8 hosts that
are one group (fsdp) or one group each (data), or divide matmuls among the cards of a host (tensor). All chips of a slice are
linked, and one group. Nothing here has been run on such hosts: a datasheet's figures and the shares in `lockstep.planning.plan`
make the times. H100s take half an hour.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import tpu

from lockstep.commands.plan import short
from lockstep.planning.machines import GIB
from lockstep.planning.plan import StagePlan

HOSTS, CARDS, EPISODES = (1, 2, 4, 8), 8, 512
SLICES = {"2x2x4": 16, "4x4x4": 64, "4x4x8": 128}
TITLE = f"""# PPO of 8 billion parameters on one to eight hosts, by arithmetic

`python benchmarks/scaling.py h100 --output benchmarks/plan/scaling.md`, on torch: four models of Llama 3.1's 8B in bfloat16,
{EPISODES} episodes a step of 1,024 + 1,024 tokens, gradient checkpointing, hosts of eight H100s with a 400 Gbit/s card each.
Datasheets' figures and the shares in `lockstep.planning.plan` make the times: nothing here was run on such hosts. The mesh is
data x fsdp x tensor; rows are those of a micro-batch on a card, or on the cards that divide its matmuls; `sending` is at best; a
step is from all sending hidden behind arithmetic to none.
"""
TITLE_V5P = """# PPO of 8 billion parameters on v5p slices, by arithmetic

`python benchmarks/scaling.py v5p --output benchmarks/plan/scaling_v5p.md`: the models and episodes of [scaling.md](scaling.md),
with all chips linked and in one group (fsdp). It is the arithmetic of FSDP on torch, which gathers float32 weights layer by
layer, with v5p's figures; [tpu.md](tpu.md) has what XLA makes of 4x4x4. A name like v5p-128 counts TensorCores, two to a chip: it
is 4x4x4.
"""
HEADER = "mesh | rows | memory, GiB | sent by a card, GiB | sending | a step | episodes a card and second |"


def meshes(hosts: int) -> Iterator[dict[str, int]]:
    yield {"data": 1, "fsdp": hosts * CARDS, "tensor": 1}
    if hosts > 1:
        yield {"data": hosts, "fsdp": CARDS, "tensor": 1}
    yield {"data": 1, "fsdp": hosts, "tensor": CARDS}


def h100s() -> Iterator[tuple[str, dict[str, int], int]]:
    for hosts in HOSTS:
        for mesh in meshes(hosts):
            for rows in (1, 4) if mesh["tensor"] == 1 else (4,):
                yield str(hosts), mesh, rows


def v5ps() -> Iterator[tuple[str, dict[str, int], int]]:
    for name, chips in SLICES.items():
        yield name, {"data": 1, "fsdp": chips, "tensor": 1}, 4


TABLES = {"h100": (TITLE, "hosts", h100s), "v5p": (TITLE_V5P, "slice", v5ps)}


def ppo(mesh: dict[str, int], rows: int, machine: str) -> StagePlan:
    """``rows``: of a micro-batch, on each card."""
    axes = [f"backend.mesh.{axis}={size}" for axis, size in mesh.items()]
    together = rows * mesh["data"] * mesh["fsdp"]
    sizes = [f"algorithm.batch_size={EPISODES}", f"algorithm.micro_batch_size={together}", "backend.gradient_checkpointing=true"]
    return tpu.ppo("8b", machine, ["backend=torch", *axes, *sizes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", choices=TABLES)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    title, column, sizes = TABLES[arguments.machine]
    header = f"| {column} | {HEADER}"
    lines, output = [title, header, "|" + "---|" * (header.count("|") - 1)], arguments.output
    for name, mesh, rows in sizes():
        found = ppo(mesh, rows, arguments.machine)
        best, worst = found.seconds
        speed = EPISODES / math.prod(mesh.values())
        memory, sent = found.memory / GIB, found.sent / GIB
        needs = f"{name} | {' x '.join(map(str, mesh.values()))} | {rows} | {memory:.0f} | {sent:.0f}"
        times = f"{short(found.sending)} | {short(best)} to {short(worst)}"
        lines.append(f"| {needs} | {times} | {speed / worst:.3f} to {speed / best:.3f} |")
        print(lines[-1], flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
