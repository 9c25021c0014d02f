"""Is a difference over seeds decided, and how many seeds would decide it?

Differences are taken seed by seed. A seed's difference is its mean over the tasks (`statistics`), whose runs may share models.
The tests are Student's: unlike the bootstrap, they account for how little a few seeds say.
"""

from __future__ import annotations

import math
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
BY_SIGN = 6
"""Seeds whose differences, all equal, are decided by their sign: 2 / 2⁶ is below the level."""
FEW = 5
"""Fewer seeds than this decide little."""


@dataclass(frozen=True)
class Test:
    """A two-sided test of a mean difference against 0. ``deviation`` is the standard deviation of a seed's difference."""

    mean: float
    deviation: float
    seeds: int
    p: float


def half_width(values: Sequence[float]) -> float:
    """Half the width of Student's 95% interval of the mean of ``values`` (Student 1908); infinite for one value, and 0 for values
    that are equal up to rounding."""
    n = len(values)
    return float(special.stdtrit(n - 1, 1 - LEVEL / 2) * _standard_error(values)) if n > 1 else math.inf


def _standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Of the mean of ``values``; 0 if they are equal up to rounding."""
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return error if error > NOTHING * abs(float(np.mean(values))) else 0.0


def paired_test(gains: Sequence[float] | np.ndarray) -> Test | None:
    """Student's t-test of the differences, one per seed (Student 1908); None for fewer than two. Differences that are all equal,
    as shares of few prompts may be by chance, are tested by their sign alone."""
    n = len(gains)
    if n < 2:
        return None
    mean, error = float(np.mean(gains)), _standard_error(gains)
    if not error:
        return Test(mean, 0.0, n, 2 * 0.5**n if mean else 1.0)
    return Test(mean, float(np.std(gains, ddof=1)), n, float(2 * special.stdtr(n - 1, -abs(mean) / error)))


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


def power(difference: float, deviation: float, seeds: int) -> float:
    """The probability that `paired_test` of so many seeds decides a difference of this size at the 5% level. Computed by the
    noncentral t distribution (Cohen 1988, section 2.3)."""
    degrees = seeds - 1
    critical = special.stdtrit(degrees, 1 - LEVEL / 2)
    shift = abs(difference) / deviation * np.sqrt(seeds)
    other_side = special.nctdtr(degrees, shift, -critical)  # underflows to NaN where negligible
    return float(1 - special.nctdtr(degrees, shift, critical) + np.nan_to_num(other_side))


def seeds_needed(difference: float, deviation: float) -> int | None:
    """The fewest seeds that decide the difference four times in five; None if it is 0 or needs more than `MOST_SEEDS`."""
    if difference == 0:
        return None
    if deviation == 0:
        return BY_SIGN
    return next((n for n in range(2, MOST_SEEDS + 1) if power(difference, deviation, n) >= POWER), None)


def least_difference(deviation: float, seeds: int) -> float:
    """The smallest difference that ``seeds`` seeds decide four times in five, by bisection."""
    if deviation == 0:
        return 0.0 if seeds >= BY_SIGN else float("inf")
    low, high = 0.0, deviation
    while power(high, deviation, seeds) < POWER:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, deviation, seeds) >= POWER else (middle, high)
    return high
