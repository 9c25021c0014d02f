"""Mix several sources into one sequence in which each has its share everywhere, not only overall.

Nothing is random: row j of a source of weight w has time (j + 1/2) / w, and the mixture is all rows in order of time. A
stretch of n rows then has n * w / sum(w) rows of that source, plus or minus the number of sources. Algorithms shuffle
later; a loader that does not, or stops early, still sees the right mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def row_counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows each source contributes to one epoch.

    An epoch ends when every row has appeared at least once: the source that is largest for its weight appears once, and the
    others repeat. So every row is seen, and the proportions hold to the end. A source without rows contributes none.
    """
    end = max(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [max(size, round(end * weight)) if size else 0 for size, weight in zip(sizes, weights, strict=True)]


def mix(parts: Sequence[Sequence[T]], weights: Sequence[float] | None = None) -> tuple[T, ...]:
    """One epoch of the parts. Without weights each part counts by its size, so every row appears exactly once."""
    if weights is None:
        parts = [part for part in parts if part]
        weights = [len(part) for part in parts]
    if not parts:
        return ()
    counts = row_counts([len(part) for part in parts], weights)
    times = np.concatenate([(np.arange(n) + 0.5) / w for n, w in zip(counts, weights, strict=True)])
    rows = [part[j % len(part)] for part, n in zip(parts, counts, strict=True) for j in range(n)]
    return tuple(rows[i] for i in np.argsort(times, kind="stable"))
