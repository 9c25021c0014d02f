"""Is a difference over seeds decided, and how many seeds would decide it?

Differences are taken seed by seed, per task (`statistics`). The tests are Student's: unlike the bootstrap, they account for how
little a few seeds say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special  # type: ignore[import-untyped]

Correction = Literal["holm", "bh", "none"]
CORRECTIONS = {"holm": "by Holm", "bh": "by Benjamini and Hochberg", "none": "uncorrected"}
LEVEL, POWER, MOST_SEEDS = 0.05, 0.8, 1000
NOTHING = 1e-12
"""A standard error below this share of the difference is rounding alone."""
FEW = 5
"""Fewer seeds than this decide little."""


@dataclass(frozen=True)
class Test:
    """A two-sided test of a mean difference against 0. ``deviation`` is the standard deviation of a seed's difference; with
    several ``tasks``, of its mean over the tasks."""

    mean: float
    deviation: float
    seeds: int
    p: float
    tasks: int = 1


def half_width(values: Sequence[float]) -> float:
    """Half the width of Student's 95% interval of the mean of ``values`` (Student 1908); infinite for one value."""
    n = len(values)
    return float(special.stdtrit(n - 1, 1 - LEVEL / 2) * np.std(values, ddof=1) / n**0.5) if n > 1 else float("inf")


def paired_test(gains: Sequence[np.ndarray]) -> Test | None:
    """Student's t-test of the differences (Student 1908). With several tasks it tests the mean of the tasks' means. The variance
    of that mean is the sum of theirs divided by tasks², with Satterthwaite's degrees of freedom (1946). None if a task has fewer
    than two seeds.

    Args:
      gains: per task, the difference of each seed.
    """
    tasks = [np.asarray(task, np.float64) for task in gains]
    if not tasks or min(map(len, tasks)) < 2:
        return None
    mean = float(np.mean([task.mean() for task in tasks]))
    counts = np.array([len(task) for task in tasks])
    own = np.array([task.var(ddof=1) for task in tasks]) / counts
    error, k, n = float(np.sqrt(own.sum())) / len(tasks), len(tasks), int(counts.min())
    if error <= NOTHING * abs(mean) or error == 0:  # the differences are equal up to rounding
        return Test(mean, 0.0, n, float(mean == 0), k)
    degrees = own.sum() ** 2 / (own**2 / (counts - 1)).sum()
    return Test(mean, error * n**0.5, n, float(2 * special.stdtr(degrees, -abs(mean) / error)), k)


def corrected(values: Sequence[float], how: Correction) -> list[float]:
    """The p-values of several comparisons, adjusted. With Holm 1979 the chance of any false decision stays below the level; with
    Benjamini and Hochberg 1995 the expected share of false decisions does."""
    p, m = np.asarray(values, np.float64), len(values)
    if how == "none" or not m:
        return [float(x) for x in p]
    order = np.argsort(p, kind="stable")
    ranked = p[order]
    if how == "holm":
        ranked = np.maximum.accumulate(ranked * np.arange(m, 0, -1))
    else:
        ranked = np.minimum.accumulate((ranked * m / np.arange(1, m + 1))[::-1])[::-1]
    found = np.empty(m)
    found[order] = np.minimum(ranked, 1.0)
    return [float(x) for x in found]


def power(difference: float, deviation: float, seeds: int, tasks: int = 1) -> float:
    """The probability that `paired_test`, with ``seeds`` seeds in each task, decides a difference of this size at the 5% level.
    Computed by the noncentral t distribution (Cohen 1988, section 2.3)."""
    degrees = tasks * (seeds - 1)
    critical = special.stdtrit(degrees, 1 - LEVEL / 2)
    shift = abs(difference) / deviation * np.sqrt(seeds)
    other_side = special.nctdtr(degrees, shift, -critical)  # underflows to NaN where negligible
    return float(1 - special.nctdtr(degrees, shift, critical) + np.nan_to_num(other_side))


def seeds_needed(difference: float, deviation: float, tasks: int = 1) -> int | None:
    """The fewest seeds that decide the difference four times in five; None if it is 0 or needs more than `MOST_SEEDS`."""
    if difference == 0:
        return None
    if deviation == 0:
        return 2
    return next((n for n in range(2, MOST_SEEDS + 1) if power(difference, deviation, n, tasks) >= POWER), None)


def least_difference(deviation: float, seeds: int, tasks: int = 1) -> float:
    """The smallest difference that ``seeds`` seeds decide four times in five, by bisection."""
    if deviation == 0:
        return 0.0
    low, high = 0.0, deviation
    while power(high, deviation, seeds, tasks) < POWER:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, deviation, seeds, tasks) >= POWER else (middle, high)
    return high
