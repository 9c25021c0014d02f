"""What a step asks of models and learners, and what that needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from lockstep.learning.optimisation import OptimizerConfig
from lockstep.models.blueprint import Blueprint
from lockstep.text.sequences import Sequences


@dataclass(frozen=True)
class Shape:
    """Of a batch: rows, columns of prompts and of responses, whether examples share rows, and how many rows share a prompt."""

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
        """Of all rows, a shared prompt once."""
        return self.prompts * self.prompt + self.rows * self.response

    @property
    def needed(self) -> int:
        """Of these, the ones whose last hidden state is read: the last of each prompt, and the responses."""
        return self.prompts + self.rows * self.response


@dataclass(frozen=True)
class Part:
    """One term of an update: what the loss reads of each model, and the arrays of its batch by name: (shape, dtype).

    loss: a `lockstep.interfaces.Loss`.
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

    models: {name: what it is}; of an update, all that the learner trains.
    outputs: of an evaluation or a forward pass, {model: what comes from it}.
    terms, optimizers: of an update.
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
    """Collectives of one kind in a call, each as often as it is made: one in a loop over layers counts once for each layer.

    sent: bytes that a device sends in all of them together.
    members: devices that take part in one.
    stride: between the numbers of two neighbours; devices that share a host have numbers that follow each other.
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
"""What a device sends of a whole array, in a ring (Patarasuk and Yuan 2009): of the gathered one, or of the one to be reduced."""


def traffic(kind: str, count: int, size: float, members: int, stride: int = 1) -> Traffic:
    """Of ``count`` collectives over arrays of ``size`` bytes each."""
    return Traffic(kind, count, count * size * SENT[kind](members), members, stride)


@dataclass(frozen=True)
class Need:
    """Of one call, on one device. temporary: bytes beside the weights and moments of all models, at the worst moment."""

    temporary: int
    collectives: tuple[Traffic, ...] = ()

    @property
    def sent(self) -> float:
        """Bytes."""
        return sum(each.sent for each in self.collectives)


class Planner(Protocol):
    """
    devices, kind: how many there are, and what each is: 'cpu', 'v5e', or the name its maker gives it.
    rows: parts that rows are divided into.
    shares_prompts: whether a prompt of several rows is computed once.
    memory: bytes of each; None if no such device is at hand.
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
        """How many of the trained and of the frozen parameters of a network a device holds while nothing is computed."""

    def measure(self, call: Call) -> Need: ...
