"""The training stages of an experiment, rehearsed: what each needs on each device, and how long a step takes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lockstep.errors import ConfigError
from lockstep.interfaces import Backend, Classifier, Environment, Policy, RewardModel, ScalarModel
from lockstep.learning.served import Served
from lockstep.models.blueprint import Blueprint
from lockstep.models.checkpoint import CONFIG, is_known, read_blueprint, read_config
from lockstep.planning import parts
from lockstep.planning.calls import Call, Need, Planner
from lockstep.planning.machines import Machine
from lockstep.planning.rehearsal import Noise, Rehearsal, ShapePolicy
from lockstep.runs.assembly import Assembly, load_own_tokenizer
from lockstep.runs.experiment import Experiment
from lockstep.runs.stages import NEW, Stage
from lockstep.storage.records import MADE_BY
from lockstep.text.tokenizer import Tokenizer

COMPUTE, BANDWIDTH = (0.2, 0.6), (0.3, 0.8)
"""The shares of the maker's FLOP/s and bytes/s that programs reach, from poor to good ones. `benchmarks/speed` has ours."""

SAFE = 0.9
"""The share of a device's memory that a plan may fill."""


@dataclass(frozen=True)
class Rehearsed:
    """
    Args:
      lasting: {part: the models that have it}, from `lockstep.planning.parts.lasting`.
      calls: the distinct calls of the first two steps, and how often the second makes each. The first step also measures
        held-out data.
      steps: the number of steps of the stage.
    """

    name: str
    lasting: Mapping[str, Sequence[Blueprint]]
    calls: Sequence[tuple[Call, int]]
    steps: int


@dataclass(frozen=True)
class StagePlan:
    """
    Args:
      lasting: {part: bytes} on one device.
      needs: {call: (how often a usual step makes it, what it needs)}.
      flops: {call: the FLOPs of one device in one such call}.
      seconds: seconds per step, at best and at worst.
      sending: seconds per step that are spent sending, at best, whether or not arithmetic hides them.
      steps: the number of steps of the stage.
    """

    name: str
    lasting: Mapping[str, int]
    needs: Mapping[str, tuple[int, Need]]
    flops: Mapping[str, float]
    seconds: tuple[float, float]
    sending: float
    steps: int

    @property
    def worst(self) -> str:
        """The call with the most temporary memory."""
        return max(self.needs, key=lambda name: self.needs[name][1].temporary)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a usual step."""
        return sum(times * need.sent for times, need in self.needs.values())

    @property
    def computed(self) -> float:
        """The FLOPs of a device in a usual step."""
        return sum(times * self.flops[name] for name, (times, _) in self.needs.items())

    @property
    def memory(self) -> int:
        """Peak bytes on one device."""
        return sum(self.lasting.values()) + self.needs[self.worst][1].temporary


def rehearsed(experiment: Experiment) -> Iterator[Rehearsed | tuple[str, str]]:
    """Yield each stage rehearsed, or its name and why it cannot be planned."""
    for stage in experiment.stages.values():
        if stage.kind != "train":
            yield stage.name, "only stages that train are planned"
        elif missing := experiment.collected(stage):
            yield stage.name, f"known once {', '.join(missing)} is done"
        else:
            yield _rehearsed(experiment, stage)


def _rehearsed(experiment: Experiment, stage: Stage) -> Rehearsed:
    assembly = Planned(experiment)
    algorithm, calls = assembly.algorithm(stage), assembly.rehearsal.calls
    for step in range(min(2, algorithm.total_steps)):
        before = len(calls)
        algorithm.step(step)
    usual = calls[before:]
    distinct = [call for i, call in enumerate(calls) if call not in calls[:i]]
    lasting = parts.lasting(assembly.rehearsal)
    return Rehearsed(stage.name, lasting, [(call, usual.count(call)) for call in distinct], algorithm.total_steps)


def planned(stage: Rehearsed, planner: Planner, machine: Machine, bfloat16: bool) -> StagePlan:
    needs: dict[str, tuple[int, Need]] = {}
    computed: dict[str, float] = {}
    names: Counter[str] = Counter()
    for call, times in stage.calls:
        names[call.name] += 1
        name = call.name if names[call.name] == 1 else f"{call.name} ({names[call.name]})"
        needs[name], computed[name] = (times, planner.measure(call)), flops(call, planner)
    lasting = {"the process itself": planner.process} if planner.process else {}
    lasting |= {part: parts.held(part, models, planner) for part, models in stage.lasting.items()}
    least = most = sending = 0.0
    slow, fast = BANDWIDTH
    for (call, times), (_, need) in zip(stage.calls, needs.values(), strict=True):
        computing, wire = duration(call, planner, machine, bfloat16), on_the_wire(need, machine)
        least += times * max(computing[0], wire / fast)  # all sending is hidden behind arithmetic
        most += times * (computing[1] + wire / slow)
        sending += times * wire / fast
    return StagePlan(stage.name, lasting, needs, computed, (least, most), sending, stage.steps)


def largest_micro_batch(
    experiment: Experiment, stage: Rehearsed, plan: StagePlan, planner: Planner, memory: float,
    measuring: Callable[[str], contextlib.AbstractContextManager[None]],
) -> str | None:  # fmt: skip
    """The largest ``micro_batch_size`` with which a stage fits: 'null' for whole minibatches, or a power of two of rows for each
    part that rows are divided into. '' if none fits. None if there is nothing to choose: the stage has no such setting, or
    already takes whole minibatches and fits, or what lasts takes all the memory.

    Args:
      plan: of ``stage``, as configured.
      memory: bytes of a device.
      measuring: what is entered, with the size, while one is tried: a few, by bisection.
    """
    chosen = experiment.stages[stage.name]
    room, fits_now = SAFE * memory - sum(plan.lasting.values()), plan.memory <= SAFE * memory
    own = getattr(chosen.config, "micro_batch_size", None)
    if not hasattr(chosen.config, "micro_batch_size") or room < 0 or (own is None and fits_now):
        return None

    def tried(size: int | None) -> Rehearsed:
        return _rehearsed(
            experiment, dataclasses.replace(chosen, config=dataclasses.replace(chosen.config, micro_batch_size=size))
        )

    whole = tried(None)
    if _shapes(whole) == _shapes(stage):
        own = None
        if fits_now:
            return None
    rows = max(part.shape.rows for call, _ in whole.calls for part in call.terms)
    sizes = [planner.rows * 2**power for power in range(rows.bit_length()) if planner.rows * 2**power < rows]
    if own is not None:
        sizes = [size for size in sizes if (size > own if fits_now else size < own)]
    candidates: list[int | None] = [*sizes, *([None] if fits_now else [])]
    known = [(call, need) for (call, _), (_, need) in zip(stage.calls, plan.needs.values(), strict=True)]
    best = str(own) if fits_now else ""
    while candidates:
        middle = len(candidates) // 2
        size = candidates[middle]
        text = "null" if size is None else str(size)
        with measuring(f"trying micro_batch_size={text}"):
            fits = _fits(whole if size is None else tried(size), planner, room, known)
        best = text if fits else best
        candidates = candidates[middle + 1 :] if fits else candidates[:middle]
    return best


def _shapes(stage: Rehearsed) -> list[Any]:
    return [(call.shape, [part.shape for part in call.terms], times) for call, times in stage.calls]


def _fits(stage: Rehearsed, planner: Planner, room: float, known: list[tuple[Call, Need]]) -> bool:
    """True if no call of a stage needs more than ``room``. ``known``: what was measured before; it grows. Of the others, updates
    need the most and come first."""
    found = [(call, next((need for other, need in known if other == call), None)) for call, _ in stage.calls]
    for call, need in sorted(found, key=lambda each: (each[1] is None, each[0].kind != "update")):
        if need is None:
            need = planner.measure(call)
            known.append((call, need))
        if need.temporary > room:
            return False
    return True


def on_the_wire(need: Need, machine: Machine) -> float:
    """Seconds that the collectives of a call take at the maker's figures. A ring through several hosts is as fast as its
    slowest part; parallel rings share the bandwidth of a host. Latency is left out."""
    seconds = 0.0
    for each in need.collectives:
        together = min(each.members, max(1, machine.host // each.stride))  # members that share a host
        speed = machine.link
        if machine.network is not None and each.members > together:
            speed = min(speed, machine.network * together / machine.host)
        seconds += each.sent / speed
    return seconds


def flops(call: Call, planner: Planner) -> float:
    """The FLOPs of one device in a call."""
    return parts.flops(call, shares_prompts=planner.shares_prompts) / planner.devices


def duration(call: Call, planner: Planner, machine: Machine, bfloat16: bool) -> tuple[float, float]:
    """Seconds of a call without its collectives, at best and at worst. This is the time of its arithmetic or, if longer, of
    reading all weights and the KV cache for each token that it draws."""
    arithmetic = flops(call, planner) / (machine.bfloat16 if bfloat16 else machine.float32)
    reading = 0.0
    if call.kind == "generate":
        (blueprint,) = call.models.values()
        shape = dataclasses.replace(call.shape, rows=-(-call.shape.rows // planner.rows))
        tensor = planner.devices // planner.rows
        per_token = parts.read_per_token(blueprint, shape, 2 if bfloat16 else parts.FLOAT32) / tensor
        reading = call.shape.response * per_token / machine.bandwidth
    (low, high), (slow, fast) = COMPUTE, BANDWIDTH
    return max(arithmetic / high, reading / fast), max(arithmetic / low, reading / slow)


class Planned(Assembly):
    """An assembly whose models are shapes. Reward models without a network of their own are `Noise`; environments and engines
    are left out."""

    def __init__(self, experiment: Experiment):
        super().__init__(experiment, {})
        self.rehearsal = Rehearsal(experiment.backend_name)

    @property
    def backend(self) -> Backend:  # type: ignore[override]
        return self.rehearsal

    def policy(self, source: str) -> Policy:
        return ShapePolicy(self._blueprint(source), self.rehearsal, source)

    def other_policy(self, source: str) -> tuple[Policy, Tokenizer]:
        inside = source == NEW or source in self.experiment.stages
        return self.policy(source), self.tokenizer if inside else load_own_tokenizer(self._source_folder(source))

    def kind(self, source: str) -> Literal["stage", "decoder", "encoder"]:
        folder = self._source_folder(source) if source not in self.experiment.stages else None
        if folder is None or (folder / MADE_BY).exists():
            return "stage"
        return "decoder" if (folder / CONFIG).exists() and is_known(read_config(folder)) else "encoder"

    def scalar_model(self, source: str) -> tuple[ScalarModel, Tokenizer]:
        policy, tokenizer = self.other_policy(source)
        model: Any = policy.scalar_model(None)  # type: ignore[arg-type]  # the head needs no weights
        model.name = source
        return model, tokenizer

    def classifier(self, source: str) -> Classifier:
        raise ConfigError(f"'{source}' is an encoder, whose memory cannot be planned.")

    def reward_model(self, stage: Stage, group: Mapping[str, Any] | None = None) -> RewardModel | None:
        if (group := group or stage.reward_model) is None:
            return None
        scorer = stage.scorer(group)
        inputs = scorer.component.inputs(scorer.config)
        return super().reward_model(stage, group) if inputs.outputs or inputs.members else Noise()

    def environment(self, stage: Stage) -> Environment | None:
        return None

    def engine(self, stage: Stage) -> Served | None:
        return None

    def _blueprint(self, source: str) -> Blueprint:
        if source == NEW or source in self.experiment.stages:
            cls: type[Policy]
            cls, config = self.experiment.policy
            blueprint: Blueprint = cls.blueprint(config, self.tokenizer.vocab_size)
            return blueprint
        return read_blueprint(source)
