"""The calls that a step makes to models and learners, and what each needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from lockstep.learning.optimisation import OptimizerConfig
from lockstep.models.blueprint import Blueprint
from lockstep.text.sequences import Sequences


@dataclass(frozen=True)
class Shape:
    """The shape of a batch: rows, columns of prompts and of responses, whether examples share rows, and how many rows share a
    prompt."""

    rows: int
    prompt: int
    response: int
    packed: bool = False
    rows_per_prompt: int = 1

    @classmethod
    def of(cls, sequences: Sequences) -> Shape:
        s = sequences
        return cls(s.rows, s.prompt_length, s.mask.shape[1], s.segments is not None, s.rows_per_prompt)

    @property
    def columns(self) -> int:
        return self.prompt + self.response

    @property
    def prompts(self) -> int:
        return self.rows // self.rows_per_prompt

    @property
    def tokens(self) -> int:
        """Tokens of all rows; a shared prompt counts once."""
        return self.prompts * self.prompt + self.rows * self.response

    @property
    def needed(self) -> int:
        """Those of the `tokens` whose last hidden state is read: the last of each prompt, and the responses."""
        return self.prompts + self.rows * self.response


@dataclass(frozen=True)
class Part:
    """One term of an update.

    outputs: {model: the outputs that the loss reads}.
    loss: a `lockstep.interfaces.Loss`.
    batch: {array: (shape, dtype)}.
    passed: whether its forward pass was made before the update and kept."""

    shape: Shape
    outputs: Mapping[str, tuple[str, ...]]
    loss: Any
    batch: Mapping[str, tuple[tuple[int, ...], str]]
    dropout: bool
    passed: bool


@dataclass(frozen=True)
class Call:
    """One call of a model or of a learner.

    models: {name: blueprint}; for a forward pass or an update, all models of the learner.
    outputs: for an evaluation or a forward pass, {model: its outputs}.
    terms, optimizers: only for an update.
    """

    kind: Literal["generate", "evaluate", "forward", "update"]
    models: Mapping[str, Blueprint]
    shape: Shape
    outputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    terms: tuple[Part, ...] = ()
    optimizers: Mapping[str, OptimizerConfig] | None = None

    @property
    def name(self) -> str:
        return f"{self.kind} {', '.join(self.models)}"


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a call. A collective in a loop over layers counts once for each layer.

    sent: bytes that a device sends in all of them together.
    members: devices that take part in one.
    stride: the difference between the numbers of two neighbouring members; devices of one host are numbered consecutively.
    """

    kind: str
    count: int
    sent: float
    members: int
    stride: int = 1


SENT: Mapping[str, Callable[[int], float]] = {
    "all-gather": lambda members: (members - 1) / members,
    "reduce-scatter": lambda members: (members - 1) / members,
    "all-to-all": lambda members: (members - 1) / members,
    "all-reduce": lambda members: 2 * (members - 1) / members,
    "collective-permute": lambda members: 1,
}
"""The share of an array that a device sends in a ring (Patarasuk and Yuan 2009). The array is the gathered one, or the one to
be reduced."""


def traffic(kind: str, count: int, size: float, members: int, stride: int = 1) -> Traffic:
    """The traffic of ``count`` collectives over arrays of ``size`` bytes each."""
    return Traffic(kind, count, count * size * SENT[kind](members), members, stride)


GRADIENTS, ACTIVATIONS, CACHE, GATHERED = "gradients", "activations", "keys and values", "gathered weights"


@dataclass(frozen=True)
class Need:
    """What one call needs on one device.

    temporary: peak bytes beside the weights and moments of all models.
    parts: {part: its bytes at that moment}, of the parts of ``temporary`` that the planner can tell apart: `GRADIENTS`,
      `ACTIVATIONS` that are kept for them, `CACHE` (of the tokens drawn so far), `GATHERED`.
    """

    temporary: int
    collectives: tuple[Traffic, ...] = ()
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def sent(self) -> float:
        """Bytes that the device sends in all collectives."""
        return sum(each.sent for each in self.collectives)


class Planner(Protocol):
    """
    devices, kind: the number of devices, and the kind of each: 'cpu', 'v5e', or its maker's name for it.
    rows: the number of parts that the rows of a batch are divided into.
    shares_prompts: whether a prompt of several rows is computed once.
    memory: bytes of each device; None if unknown, for example because no such device is present.
    process: bytes of the same memory that a process takes without any model, for libraries, data and compiler. 0 where models
      have memory of their own.
    """

    devices: int
    kind: str
    rows: int
    shares_prompts: bool
    memory: int | None
    process: int

    def held(self, blueprint: Blueprint) -> tuple[int, int]:
        """How many trained and how many frozen parameters of a network a device holds while nothing is computed."""

    def measure(self, call: Call) -> Need: ...
