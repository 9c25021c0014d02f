"""lockstep plan [overrides]: what a run will need on each device, before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import rich.table

from lockstep.planning.machines import GIB, MACHINES

if TYPE_CHECKING:
    from lockstep.planning.plan import StagePlan

HELP = "memory per device and time per step of a run, before it starts"
OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", help="devices that are not here: v5e:4x4, v5p:2x2x1 (JAX, with libtpu)")
    parser.add_argument("--machine", choices=("cpu", *MACHINES), help="what each device is; default: what is here")
    parser.add_argument("--price", type=float, help="of one device for an hour, in any currency")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from lockstep.config.compose import compose
    from lockstep.interfaces import Backend
    from lockstep.planning.machines import machine, share
    from lockstep.planning.plan import Rehearsed, largest_micro_batch, planned, rehearsed
    from lockstep.reporting.console import Console
    from lockstep.runs.experiment import Experiment

    console = Console()
    experiment = Experiment(compose(overrides))
    backend: type[Backend]
    backend, config = experiment.backend
    planner, bfloat16 = backend.planner(config, arguments.topology), getattr(config, "precision", None) == "bfloat16"
    kind = arguments.machine or planner.kind
    has = machine(kind)
    if planner.memory is not None and arguments.machine is None:
        has = dataclasses.replace(has, memory=planner.memory)
    if kind == "cpu":
        has = share(has, planner.devices)
    many = f"{planner.devices} x {kind}" if planner.devices > 1 else kind
    console.say(f"{experiment.backend_name} on {many}, {has.memory / GIB:.0f} GiB each. Compiling or tracing takes a while.")
    for stage in rehearsed(experiment):
        if isinstance(stage, Rehearsed):
            found = planned(stage, planner, has, bfloat16)
            console.out.print(table(found))
            largest = largest_micro_batch(experiment, stage, found, planner, has.memory, console.waiting)
            console.say(advice(found, has.memory, largest) + time(found, planner.devices, arguments.price) + "\n")
        else:
            console.say(f"{stage[0]}: {stage[1]}.\n")


def table(plan: StagePlan) -> rich.table.Table:
    shown = rich.table.Table(title=f"stage {plan.name}, on each device", title_justify="left", box=None, pad_edge=False)
    for column in ("", "GiB", "times a step", "TFLOP", "GiB sent", "in"):
        shown.add_column(column, justify="right" if column not in ("", "in") else "left")
    for part, size in plan.lasting.items():
        shown.add_row(part, gib(size))
    for name, (times, need) in plan.needs.items():
        counts: Counter[str] = Counter()
        for each in need.collectives:
            counts[each.kind] += each.count
        moves = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        sent = gib(need.sent) if need.sent else ""
        shown.add_row(f"temporary: {name}", gib(need.temporary), str(times), f"{plan.flops[name] / 1e12:.3g}", sent, moves)
        for part, size in need.parts.items():
            shown.add_row(f"  of which {part}", gib(size))
    sent = gib(plan.sent) if plan.sent else ""
    shown.add_row("at the worst moment", gib(plan.memory), "", f"{plan.computed / 1e12:.3g}", sent, "a step")
    return shown


def gib(size: float) -> str:
    return f"{size / GIB:.3f}" if size < GIB else f"{size / GIB:.2f}"


def advice(plan: StagePlan, memory: float, largest: str | None) -> str:
    """Whether the stage fits and, if not, what to change. ``largest``: see `largest_micro_batch`."""
    from lockstep.planning.plan import SAFE

    if plan.memory <= SAFE * memory:
        said = f"It fits: {plan.memory / memory:.0%} of the memory."
        return said if largest is None else f"{said} The largest micro_batch_size that does is {largest}."
    lasting = sum(plan.lasting.values())
    if lasting > SAFE * memory:
        return (
            f"It does not fit: weights and moments alone take {lasting / memory:.0%} of the memory. Raise backend.mesh.fsdp, or "
            "train adapters: policy=lora."
        )
    said = f"It does not fit: {plan.memory / memory:.0%} of the memory, where {SAFE:.0%} are safe; most of it for '{plan.worst}'."
    if largest:
        return f"{said} Lower the stage's micro_batch_size to {largest}, with which it fits, or raise backend.mesh.fsdp."
    return (
        f"{said} No micro_batch_size helps: set backend.gradient_checkpointing=true, lower the stage's batch_size, or raise "
        "backend.mesh.fsdp."
    )


def time(plan: StagePlan, devices: int, price: float | None) -> str:
    best, worst = plan.seconds
    least, most = (seconds * plan.steps for seconds in plan.seconds)
    cost = "" if price is None else " and {:.2f} to {:.2f}".format(*(devices * price * each / 3600 for each in (least, most)))
    said = f" A step takes {short(best)} to {short(worst)}; {plan.steps} steps {short(least)} to {short(most)}{cost}."
    if plan.sending > 0.5 * best:
        share = f"{plan.sending / best:.0%}"
        said += (
            f" At best, {share} of it is sending: raise the stage's micro_batch_size, as each micro-batch gathers all weights."
        )
    return said


def short(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms"
