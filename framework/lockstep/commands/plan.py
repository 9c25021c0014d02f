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
    from lockstep.planning.plan import Rehearsed, planned, rehearsed
    from lockstep.reporting.console import Console
    from lockstep.runs.experiment import Experiment

    console = Console()
    experiment = Experiment(compose(overrides))
    stages = list(rehearsed(experiment))  # first, because libtpu takes the signal that stops templates
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
    for stage in stages:
        if isinstance(stage, Rehearsed):
            found = planned(stage, planner, has, bfloat16)
            console.out.print(table(found))
            console.say(advice(found, has.memory) + time(found, planner.devices, arguments.price) + "\n")
        else:
            console.say(f"{stage[0]}: {stage[1]}.\n")


def table(plan: StagePlan) -> rich.table.Table:
    shown = rich.table.Table(title=f"stage {plan.name}, on each device", title_justify="left", box=None, pad_edge=False)
    for column, side in (("", "left"), ("GiB", "right"), ("times a step", "right"), ("GiB sent", "right"), ("in", "left")):
        shown.add_column(column, justify=side)
    for part, size in plan.lasting.items():
        shown.add_row(part, gib(size), "", "", "")
    for name, (times, need) in plan.needs.items():
        counts: Counter[str] = Counter()
        for each in need.collectives:
            counts[each.kind] += each.count
        moves = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        shown.add_row(f"temporary: {name}", gib(need.temporary), str(times), gib(need.sent) if need.sent else "", moves)
    sent = (gib(plan.sent), "a step") if plan.sent else ("", "")
    shown.add_row("at the worst moment", gib(plan.memory), "", *sent)
    return shown


def gib(size: float) -> str:
    return f"{size / GIB:.3f}" if size < GIB else f"{size / GIB:.2f}"


def advice(plan: StagePlan, memory: float) -> str:
    """A sentence that says whether the stage fits and, if not, what to change."""
    if plan.memory < 0.9 * memory:
        return f"It fits: {plan.memory / memory:.0%} of the memory."
    lasting = sum(plan.lasting.values())
    if lasting > 0.9 * memory:
        return (
            f"It does not fit: weights and moments alone take {lasting / memory:.0%} of the memory. Raise backend.mesh.fsdp, or "
            "train adapters: policy=lora."
        )
    return (
        f"It does not fit: {plan.memory / memory:.0%} of the memory, where 90% are safe; most of it for '{plan.worst}'. Lower "
        "the stage's micro_batch_size, set backend.gradient_checkpointing=true, or raise backend.mesh.fsdp."
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
