"""Runs as a comparison sees them: plain records. Nothing here knows about plots, statistics or where records come from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval, which has no width if unknown. ``n`` is the number of things the mean is over."""

    mean: float
    low: float
    high: float
    n: int = 0

    @property
    def standard_error(self) -> float:
        return (self.high - self.low) / (2 * 1.96)

    @property
    def has_interval(self) -> bool:
        """False for a bare number, as W&B's summaries have: nothing says how far it may be off."""
        return self.low < self.high or self.n > 0


Estimates = Mapping[str, Estimate]


@dataclass(frozen=True)
class Series:
    """One metric of one stage over its steps, ascending."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class StageRecord:
    name: str
    kind: str
    algorithm: str | None
    status: str
    seconds: float | None
    metrics: Mapping[str, Series]
    identity: str = ""  # the same in all runs that share the stage
    health: Sequence[Mapping[str, Any]] = ()  # warnings while it trained: step, name, message
    produces: str = ""  # 'policy', 'reward_model' or 'evaluation'
    memory: float | None = None  # peak bytes: of the accelerator, or of the process if there is none


@dataclass(frozen=True)
class EvaluationRecord:
    """What an evaluation stage found: ``splits[split][policy][metric]``, in the order written."""

    baseline: str | None
    splits: Mapping[str, Mapping[str, Estimates]]
    reward_model: Estimates


@dataclass(frozen=True)
class Run:
    name: str
    folder: Path
    experiment: str
    seed: int
    backend: Mapping[str, Any]
    status: str
    seconds: float | None
    command: str
    stages: Mapping[str, StageRecord]
    config: Mapping[str, Any]  # flat: 'algorithm.kl_coef' -> 0.02
    evaluation: EvaluationRecord
    samples: Sequence[Mapping[str, Any]]
    tasks: Mapping[str, Estimates] = field(default_factory=dict)  # from `lockstep evaluate`: {policy: {'arc_easy acc': ...}}


@dataclass
class Reading:
    """The runs that were read, and one sentence per problem."""

    runs: list[Run] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """('algorithm.kl_coef', 0.02) for every leaf; a list is a leaf."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def series(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Rows as one series per metric. A resumed stage repeats the steps since its checkpoint; the later row counts."""
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        step = row["step"]
        for metric, value in row.items():
            if isinstance(value, (float, int)):
                values[metric][step] = value
    for no_metric in ("step", "seconds"):
        values.pop(no_metric, None)
    ordered = ((metric, found, sorted(found)) for metric, found in values.items())
    return {metric: Series(np.array(steps), np.array([found[s] for s in steps], float)) for metric, found, steps in ordered}
