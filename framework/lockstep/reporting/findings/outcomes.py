"""What runs say about a finding's claims, on each backend, over seeds.

The mean over seeds has Student's 95% interval (Student 1908). A claim holds if the whole interval meets the criterion, and does
not hold if none of it does. Otherwise it is not decided. It is also not decided with a single seed, if fewer than five seeds all
have the same value, or while a seed of the sweep is missing: the others may be those that went well. Metrics of several runs are
subtracted seed by seed, and so are the two backends.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from lockstep.reporting.compare.decisions import FEW, half_width
from lockstep.reporting.compare.records import Run, StageRecord
from lockstep.reporting.findings.finding import ClaimConfig, Finding, Range, Term

Verdict = Literal["held", "not held", "not decided"]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, with its interval. For one seed the interval is infinite."""

    seeds: Mapping[int, float]

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.seeds.values())))

    @property
    def half(self) -> float:
        return half_width(list(self.seeds.values()))

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def interval(self) -> str:
        """'2.5 ± 2.1'; for one seed, only its value."""
        if len(self.seeds) < 2:
            return f"{self.mean:.3g}"
        digits = max(0, 1 - math.floor(math.log10(self.half))) if self.half else 3  # two significant digits of the half width
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"

    def __str__(self) -> str:
        return f"{self.interval}, {'one seed' if len(self.seeds) < 2 else f'{len(self.seeds)} seeds'}"


@dataclass(frozen=True)
class Outcome:
    """The result for one claim on one backend."""

    name: str
    backend: str
    found: Mean
    verdict: Verdict


@dataclass(frozen=True)
class Difference:
    """The difference of one claim's value between two backends, seed by seed. ``apart``: its interval excludes 0."""

    name: str
    backends: tuple[str, str]
    found: Mean
    verdicts: tuple[Verdict, Verdict]

    @property
    def apart(self) -> bool:
        return self.found.low > 0 or self.found.high < 0


class Absent(Exception):
    """A run lacks a metric, or there is not exactly one run to read it from."""


def outcomes(finding: Finding, runs: Sequence[Run], seeds: Collection[int] = ()) -> tuple[list[Outcome], list[str]]:
    """The outcome of every claim on every backend, and a sentence for each missing value. ``seeds``: all that should be there."""
    by_backend: dict[str, dict[int, list[Run]]] = {}
    for run in runs:
        by_backend.setdefault(str(run.backend["name"]), {}).setdefault(run.seed, []).append(run)
    found, problems = [], []
    for name, claim in finding.claims.items():
        for backend, there in by_backend.items():
            values = {}
            wanted = sorted({*seeds, *there})
            for seed in wanted:
                try:
                    values[seed] = sum(term.sign * measured(term, there.get(seed, [])) for term in claim.terms)
                except Absent as absent:
                    problems.append(f"{name}, {backend}, seed {seed}: {absent}")
            if values:
                found.append(judged(name, claim, backend, values, len(wanted)))
    return found, problems


def judged(name: str, claim: ClaimConfig, backend: str, values: Mapping[int, float], seeds: int) -> Outcome:
    """Judge a claim by its value per seed. It is not decided with fewer than ``seeds`` values."""
    mean = Mean(values)
    return Outcome(name, backend, mean, verdict(claim, mean) if len(values) == seeds else "not decided")


def verdict(claim: ClaimConfig, found: Mean) -> Verdict:
    if found.half == 0 and len(found.seeds) < FEW:
        return "not decided"  # shares of few answers may be equal by chance
    if found.low > claim.bound or found.high < claim.bound:
        return "held" if claim.is_met_by(found.mean) else "not held"
    return "not decided"


def as_claimed(claim: ClaimConfig, found: Mean) -> str:
    """'4 of 5': how many seeds meet the criterion on their own. One seed far from the others makes the interval wide."""
    return f"{sum(map(claim.is_met_by, found.seeds.values()))} of {len(found.seeds)}"


def between_backends(found: Sequence[Outcome]) -> list[Difference]:
    """The differences between each two backends, over the seeds that both have."""
    differences = []
    for a, b in combinations(found, 2):
        common = sorted(a.found.seeds.keys() & b.found.seeds.keys())
        if a.name == b.name and common:
            apart = Mean({seed: a.found.seeds[seed] - b.found.seeds[seed] for seed in common})
            differences.append(Difference(a.name, (a.backend, b.backend), apart, (a.verdict, b.verdict)))
    return differences


def measured(term: Term, runs: Sequence[Run]) -> float:
    """
    Args:
      runs: the runs of one seed on one backend.

    Raises:
      Absent: not exactly one run has the term's settings, or that run lacks the metric.
    """
    fitting = [run for run in runs if all(setting(run, key) == value for key, value in term.where.items())]
    if len(fitting) != 1:
        said = ", ".join(f"{key}={value}" for key, value in term.where.items())
        raise Absent(f"{len(fitting)} runs{f' with {said}' if said else ''}, where there should be one")
    run, (first, _, rest) = fitting[0], term.metric.partition("/")
    policy, _, metric = rest.partition("/")
    evaluation = run.evaluation
    if term.steps is None:
        if first == "reward_model" and rest in evaluation.reward_model:
            return evaluation.reward_model[rest].mean
        if metric in evaluation.splits.get(first, {}).get(policy, {}):
            return evaluation.splits[first][policy][metric].mean
    if first in run.stages and rest in run.stages[first].metrics:
        if run.stages[first].status != "done":
            raise Absent(f"{run.name} has not finished {first}")
        return _logged(run.stages[first], rest, term.steps, run.name)
    raise Absent(f"{run.name} has no {term.metric}{' that is logged by step' if term.steps else ''}")


def _logged(stage: StageRecord, metric: str, steps: Range | None, run: str) -> float:
    """The last value, or the mean over the given steps."""
    series = stage.metrics[metric]
    if steps is None:
        return float(series.values[-1])
    if steps.metric not in stage.metrics:
        raise Absent(f"{run} has no {stage.name}/{steps.metric}")
    other = stage.metrics[steps.metric]
    chosen = other.steps[(other.values >= steps.low) & (other.values <= steps.high)]
    found = series.values[np.isin(series.steps, chosen)]
    if not found.size:
        raise Absent(f"no step of {stage.name} in {run} has {steps}")
    return float(np.mean(found))


def setting(run: Run, key: str) -> str:
    """A run's setting as text: the name of the chosen file, or else the key's value in its configuration."""
    return str(run.config.get(f"choices.{key}", run.config.get(key)))
