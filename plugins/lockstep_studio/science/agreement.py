"""Agreement of labelers beyond chance: raw agreement, Cohen's and Conger's kappa, Krippendorff's alpha.

Labels come as an array [labelers, items] of numbers, NaN where a labeler did not label an item (`Labels.of`), or in long form
(`Labels`). Only items with two labels or more count. Undefined values are NaN, never 0 or 1:

* no item has two labels: all measures;
* all labels that count are equal: kappa and alpha, since chance then explains any agreement;
* fewer than two tasks: the ends of intervals.

Intervals are percentile bootstraps (Efron 1979) over tasks: units that were judged together are drawn together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from lockstep.errors import DataError
from lockstep.learning.randomness import generator

Level = Literal["nominal", "ordinal", "interval"]
Weighting = Literal["none", "linear", "quadratic"]

CHUNK = 100
"""Resamples computed at a time, to bound memory."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95% interval; NaN where unknown."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Labels:
    """n labels of units in long form: label k is by ``labeler[k]`` on ``unit[k]``, with the value ``values[code[k]]``.

    labeler, unit, code: int [n]; a labeler labels a unit at most once.
    values: float [C], ascending.
    task: int [units], from 0 to tasks - 1: units of one task are resampled together.
    mirrored: whether each unit can also be read backwards (b against a instead of a against b), which negates the value. Chance
      is then computed over both readings, so nothing depends on which was stored.
    """

    labeler: np.ndarray
    unit: np.ndarray
    code: np.ndarray
    values: np.ndarray
    task: np.ndarray
    mirrored: bool = False

    @classmethod
    def of(cls, array: np.ndarray) -> Labels:
        """The labels of an array [labelers, items], where each item is a task.

        Raises:
          DataError: the array is not two-dimensional, or has infinite numbers.
        """
        array = np.asarray(array, np.float64)
        if array.ndim != 2 or np.isinf(array).any():
            raise DataError(f"Labels must be finite numbers [labelers, items], NaN where missing, not an array {array.shape}.")
        labeler, unit = np.nonzero(~np.isnan(array))
        values, code = np.unique(array[labeler, unit], return_inverse=True)
        return cls(labeler, unit, code, values, np.arange(array.shape[1]))

    @cached_property
    def counts(self) -> np.ndarray:
        """How often each unit got each value, float [units, C]; zeros for units with one label."""
        cells = self.unit * len(self.values) + self.code
        shape = len(self.task), len(self.values)
        counts = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)
        return counts * (counts.sum(axis=1, keepdims=True) >= 2)

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """All pairs of labels on the same unit, as two int [P] of label numbers; the first label is by the labeler with the lower
        number."""
        order = np.lexsort((self.labeler, self.unit))
        starts = np.flatnonzero(np.diff(self.unit[order], prepend=-1))
        sizes = np.diff(starts, append=len(order))
        first, second = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for size in np.unique(sizes[sizes >= 2]):
            a, b = np.triu_indices(size, 1)
            here = starts[sizes == size][:, None]
            first.append((here + a).ravel())
            second.append((here + b).ravel())
        return order[np.concatenate(first)], order[np.concatenate(second)]

    @property
    def items(self) -> int:
        """The number of tasks with a unit that has two labels or more."""
        return len(np.unique(self.task[self.counts.any(axis=1)]))


# ------------------------------------------------------------------------------------------------------------ measures


def raw(labels: np.ndarray) -> float:
    """The share of equal labels among the pairs of labels on the same item. Each pair counts the same, so an item with more
    labels counts more: Σ_u Σ_c n_uc (n_uc − 1) / Σ_u m_u (m_u − 1), where item u has m_u labels, n_uc of them c.

    Args:
      labels: float [labelers, items].
    """
    return _Measures(Labels.of(labels), "nominal", "none").plain()["raw"]


def cohen(first: np.ndarray, second: np.ndarray, weighting: Weighting = "none") -> float:
    """Cohen's kappa of two labelers on the items that both labeled (Cohen 1960; weighted: Cohen 1968):

        κ = 1 − Σ_ck v_ck o_ck / Σ_ck v_ck p_c q_k

    where o_ck is the share of items with c by the first and k by the second, p and q are their margins, and v_ck is [c ≠ k],
    |c − k| or (c − k)².

    Args:
      first, second: float [items], NaN where missing.
    """
    return conger(np.stack([first, second]), weighting)


def conger(labels: np.ndarray, weighting: Weighting = "none") -> float:
    """Conger's kappa (Conger 1980; Davies & Fleiss 1982): both sides of Cohen's κ are summed over all pairs of labelers.

    In the papers every labeler labels every item. If labels are missing, a pair of labelers is weighted by the number of items
    that both labeled. A labeler's margin is over all of their items that somebody else labeled too: over the pair's shared items
    alone, chance would explain most of the agreement of a pair that shares few. For two labelers this is Cohen's κ.

    Args:
      labels: float [labelers, items].
    """
    return _Measures(Labels.of(labels), "nominal", weighting).plain()["kappa"]


def krippendorff(labels: np.ndarray, level: Level = "nominal") -> float:
    """Krippendorff's alpha (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section F):

        α = 1 − (n − 1) Σ_ck o_ck δ²_ck / Σ_ck n_c n_k δ²_ck      o_ck = Σ_u n_uc (n_uk − [c = k]) / (m_u − 1)

    with n_c = Σ_k o_ck, n = Σ_c n_c, and δ² the difference of two values at their level of measurement: nominal [c ≠ k], interval
    (c − k)², ordinal (Σ_{g=c..k} n_g − (n_c + n_k)/2)².

    Args:
      labels: float [labelers, items].
    """
    return _Measures(Labels.of(labels), level, "none").plain()["alpha"]


def measure(labels: Labels, level: Level, weighting: Weighting, draws: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """{"raw", "kappa" (Conger's), "alpha"} with their intervals; without draws, the ends are NaN."""
    measures = _Measures(labels, level, weighting)
    plain = measures.plain()
    tasks = measures.tasks
    if not draws or tasks < 2:
        return {name: Interval(value) for name, value in plain.items()}
    rng = generator(seed, "agreement")
    drawn = [measures.weighted(weights) for weights in _resamples(tasks, draws, rng)]
    return {name: _interval(value, np.concatenate([part[name] for part in drawn])) for name, value in plain.items()}


def by_pair(labels: Labels, level: Level, weighting: Weighting) -> dict[tuple[int, int], dict[str, float]]:
    """{(labeler, labeler): {"raw", "kappa" (Cohen's), "alpha", "units"}} on the units that both labeled."""
    first, second = labels.pairs
    count, size = len(labels.values), int(labels.labeler.max(initial=0)) + 1
    pair, index = np.unique(labels.labeler[first] * size + labels.labeler[second], return_inverse=True)
    cells = (index * count + labels.code[first]) * count + labels.code[second]
    both = np.bincount(cells, minlength=len(pair) * count**2).reshape(len(pair), count, count).astype(np.float64)
    units = both.sum(axis=(1, 2))
    same = np.trace(both, axis1=1, axis2=2)
    if labels.mirrored:
        both = (both + both[:, ::-1, ::-1]) / 2
    cost = differences(labels.values, weighting)
    expected = np.einsum("pc,ck,pk->p", both.sum(axis=2), cost, both.sum(axis=1))
    kappa = 1 - _ratio(units * (both * cost).sum(axis=(1, 2)), expected)
    alpha = _alpha(both + both.swapaxes(1, 2), labels.values, level)
    rows = zip(pair, same / units, kappa, alpha, units, strict=True)
    return {
        (int(p) // size, int(p) % size): {"raw": float(r), "kappa": float(k), "alpha": float(a), "units": float(u)}
        for p, r, k, a, u in rows
    }


def differences(values: np.ndarray, weighting: Weighting) -> np.ndarray:
    """v [C, C] of Cohen's weighted kappa, from the values themselves, not from their ranks among the values that occur."""
    apart = np.abs(values[:, None] - values[None, :])
    return {"none": (apart > 0).astype(np.float64), "linear": apart, "quadratic": apart**2}[weighting]


# ------------------------------------------------------------------------------------------------- sums over resamples


class _Measures:
    """The measures as ratios of sums over tasks, so that a resample is a vector of weights [tasks]."""

    def __init__(self, labels: Labels, level: Level, weighting: Weighting):
        self.labels, self.level = labels, level
        counts, task = labels.counts, labels.task
        used = np.unique(task[counts.any(axis=1)])
        self.tasks = len(used)
        if not self.tasks:
            return
        place = np.searchsorted(used, task).clip(max=self.tasks - 1)  # unused tasks only add zeros
        self.same = self._by_task(place, (counts * (counts - 1)).sum(axis=1))
        total = counts.sum(axis=1)
        self.all = self._by_task(place, total * (total - 1))
        self.coincidences = self._by_task(place, _coincidences(counts))
        self.cost = differences(labels.values, weighting)
        self._meetings(place)
        self._margins(place, total)

    def _by_task(self, place: np.ndarray, per_unit: np.ndarray) -> np.ndarray:
        """Sum [units, ...] to [tasks, ...]."""
        flat = per_unit.reshape(len(place), -1)
        summed = np.stack([np.bincount(place, column, self.tasks) for column in flat.T], axis=1)
        return summed.reshape(self.tasks, *per_unit.shape[1:])

    def _meetings(self, place: np.ndarray) -> None:
        """Count how often each pair of labelers meets in each task, sorted by pair. Sum the cost of each task's disagreements."""
        labels = self.labels
        first, second = labels.pairs
        size = int(labels.labeler.max(initial=0)) + 1
        pair = labels.labeler[first] * size + labels.labeler[second]
        task = place[labels.unit[first]]
        self.disagreement = np.bincount(task, self.cost[labels.code[first], labels.code[second]], self.tasks)
        meeting, times = np.unique(pair * self.tasks + task, return_counts=True)
        self.meeting_task, self.times = meeting % self.tasks, times.astype(np.float64)
        pairs, self.pair_starts = np.unique(meeting // self.tasks, return_index=True)
        self.pair_first, self.pair_second = pairs // size, pairs % size

    def _margins(self, place: np.ndarray, total: np.ndarray) -> None:
        """Count how often each labeler gave each value in each task, sorted by labeler."""
        labels, count = self.labels, len(self.labels.values)
        kept = total[labels.unit] >= 2
        row = labels.labeler[kept] * self.tasks + place[labels.unit[kept]]
        rows, index = np.unique(row, return_inverse=True)
        said = np.bincount(index * count + labels.code[kept], minlength=len(rows) * count).reshape(len(rows), count)
        self.said = (said + said[:, ::-1]) / 2 if labels.mirrored else said.astype(np.float64)
        self.said_task = rows % self.tasks
        found, self.said_starts = np.unique(rows // self.tasks, return_index=True)
        self.row_of = np.zeros(int(labels.labeler.max(initial=0)) + 1, np.int64)
        self.row_of[found] = np.arange(len(found))

    def plain(self) -> dict[str, float]:
        if not self.tasks:
            return {"raw": math.nan, "kappa": math.nan, "alpha": math.nan}
        return {name: float(values[0]) for name, values in self.weighted(np.ones((1, self.tasks))).items()}

    def weighted(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The measures [draws] for weights [draws, tasks]."""
        together = np.tensordot(weights, self.coincidences, 1)
        if self.labels.mirrored:
            together = (together + together[:, ::-1, ::-1]) / 2
        return {
            "raw": _ratio(weights @ self.same, weights @ self.all),
            "kappa": 1 - _ratio(weights @ self.disagreement, self._expected(weights)),
            "alpha": _alpha(together, self.labels.values, self.level),
        }

    def _expected(self, weights: np.ndarray) -> np.ndarray:
        """The expected cost of disagreements [draws] if the labelers of each pair drew from their margins."""
        said = np.add.reduceat(weights[:, self.said_task, None] * self.said, self.said_starts, axis=1)
        margin = _ratio(said, said.sum(axis=2, keepdims=True), missing=0.0)
        met = np.add.reduceat(weights[:, self.meeting_task] * self.times, self.pair_starts, axis=1)
        first, second = margin[:, self.row_of[self.pair_first]], margin[:, self.row_of[self.pair_second]]
        return np.einsum("dp,dpc,dpc->d", met, first @ self.cost, second)


def _coincidences(counts: np.ndarray) -> np.ndarray:
    """The coincidences o of each unit, [units, C, C], from counts [units, C]."""
    together = counts[:, :, None] * counts[:, None, :]
    diagonal = np.arange(counts.shape[1])
    together[:, diagonal, diagonal] -= counts
    return together / np.maximum(counts.sum(axis=1) - 1, 1)[:, None, None]


def _alpha(coincidences: np.ndarray, values: np.ndarray, level: Level) -> np.ndarray:
    """α [...] of coincidences [..., C, C]."""
    n = coincidences.sum(axis=-1)
    if level == "ordinal":
        middle = np.cumsum(n, axis=-1) - n / 2
        apart = (middle[..., :, None] - middle[..., None, :]) ** 2
    else:
        apart = differences(values, "quadratic" if level == "interval" else "none")
    observed = (coincidences * apart).sum(axis=(-2, -1))
    expected = (n[..., :, None] * n[..., None, :] * apart).sum(axis=(-2, -1))
    return 1 - _ratio((n.sum(axis=-1) - 1) * observed, expected)


def _ratio(top: np.ndarray, bottom: np.ndarray, missing: float = math.nan) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.shape(top), missing), where=bottom > 0)


def _resamples(tasks: int, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each task is drawn, [draws, tasks], in chunks."""
    for start in range(0, draws, CHUNK):
        count = min(CHUNK, draws - start)
        drawn = rng.integers(tasks, size=(count, tasks)) + tasks * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * tasks).reshape(count, tasks).astype(np.float64)


def _interval(value: float, drawn: np.ndarray) -> Interval:
    """The percentile interval. Draws that are NaN, such as those without variation, are left out."""
    told = drawn[~np.isnan(drawn)]
    if not len(told) or math.isnan(value):
        return Interval(value)
    low, high = np.percentile(told, [2.5, 97.5])
    return Interval(value, float(low), float(high))
