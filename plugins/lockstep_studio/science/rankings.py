"""Agreement of the labelers of a round on preferences, ratings and flags, per group and per pair of labelers.

Rows are those of a round's ``comparisons.jsonl``. Labelers of the same task are compared on:

* ``preferences``: each pair of completions is better, tie or worse, so a ranking of K gives K(K − 1)/2 units. A tie lies between
  the other two, so alpha is ordinal; kappa is unweighted over the three. Neither depends on the order of the completions.
* ``ratings``: each completion's rating, 1 to 7, with ordinal alpha and quadratic kappa.
* a flag, by its name: whether each completion got it, with nominal alpha and unweighted kappa.

Intervals resample tasks, not pairs, since the pairs of one ranking are not independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lockstep.errors import DataError, did_you_mean, listing, short
from lockstep_studio.science import agreement
from lockstep_studio.science.agreement import Interval, Labels, Level, Weighting

Row = Mapping[str, Any]

PREFERENCES, RATINGS = "preferences", "ratings"


def by_group(
    comparisons: Iterable[Row], what: str = PREFERENCES, *, draws: int = 1000, seed: int = 0
) -> dict[str, dict[str, Interval | int]]:
    """{group: {"raw", "kappa", "alpha": `Interval`, "items": tasks with two labels or more}}; rows without a group form
    the group ''.

    Args:
      what: 'preferences', 'ratings' or the name of a flag.
      draws: resamples of the bootstrap; with 0 there are no intervals.

    Raises:
      DataError: no row has such a flag, or rows of one task differ in their number of completions.
    """
    rows = independent(comparisons)
    level, weighting = _scale(what, rows)
    found: dict[str, dict[str, Interval | int]] = {}
    for group in sorted({_group(row) for row in rows}):
        labels, _ = _labels([row for row in rows if _group(row) == group], what)
        found[group] = {**agreement.measure(labels, level, weighting, draws, seed), "items": labels.items}
    return found


def by_pair(comparisons: Iterable[Row], what: str = PREFERENCES) -> dict[tuple[str, str], dict[str, float]]:
    """{(labeler, labeler): {"raw", "kappa" (Cohen's), "alpha", "units" that both labeled}}, whatever their groups.

    Raises:
      DataError: as `by_group`.
    """
    rows = independent(comparisons)
    level, weighting = _scale(what, rows)
    labels, names = _labels(rows, what)
    return {(names[a], names[b]): found for (a, b), found in agreement.by_pair(labels, level, weighting).items()}


def flag_names(comparisons: Iterable[Row]) -> list[str]:
    """The names of the flags that any completion got."""
    return sorted({name for row in comparisons for names in row.get("flags") or () for name in names or ()})


def independent(comparisons: Iterable[Row]) -> list[Row]:
    """`latest` without adjudicators' rows: they saw what the others chose."""
    return latest(row for row in comparisons if not row.get("adjudicated"))


def latest(comparisons: Iterable[Row]) -> list[Row]:
    """The last row of each labeler on each task: a label that was revised counts once. Rows without a labeler are left out."""
    return list({(row["id"], row["labeler"]): row for row in comparisons if row.get("labeler") is not None}.values())


def _group(row: Row) -> str:
    return row.get("group") or ""


def _scale(what: str, rows: Sequence[Row]) -> tuple[Level, Weighting]:
    if what == PREFERENCES:
        return "ordinal", "none"
    if what == RATINGS:
        return "ordinal", "quadratic"
    if what not in (known := flag_names(rows)):
        known = [PREFERENCES, RATINGS, *known]
        raise DataError(f"No completion has the flag '{short(what)}'.{did_you_mean(what, known)} There are: {listing(known)}.")
    return "nominal", "none"


def _labels(rows: Sequence[Row], what: str) -> tuple[Labels, list[str]]:
    """The rows as labels, and the labelers' names."""
    names = sorted({row["labeler"] for row in rows})
    tasks = {task: i for i, task in enumerate(dict.fromkeys(row["id"] for row in rows))}
    numbers = {name: i for i, name in enumerate(names)}
    sizes: dict[str, int] = {}
    for row in rows:
        if sizes.setdefault(row["id"], len(row["ranks"])) != len(row["ranks"]):
            raise DataError(
                f"Task '{short(row['id'])}' has {sizes[row['id']]} completions in one row and {len(row['ranks'])} in another."
            )
    parts = [_of_size([row for row in rows if len(row["ranks"]) == size], what) for size in sorted(set(sizes.values()))]
    width = max((values.shape[1] for _, values in parts), default=1)
    long = [_long(part, tasks, numbers, width) for part in parts] or [(np.empty(0, np.int64),) * 3]
    labeler, unit, value = (np.concatenate(each) for each in zip(*long, strict=True))
    if what == PREFERENCES:
        values, code = np.array([-1.0, 0.0, 1.0]), value.astype(np.int64) + 1
    else:
        values, code = np.unique(value, return_inverse=True)
    units, unit = np.unique(unit, return_inverse=True)
    return Labels(labeler, unit, code, values, units // width, mirrored=what == PREFERENCES), names


def _of_size(rows: Sequence[Row], what: str) -> tuple[Sequence[Row], np.ndarray]:
    """The rows, with K completions each, and their labels [rows, units of a task], NaN where a label is missing."""
    if what == PREFERENCES:
        ranks = np.array([row["ranks"] for row in rows], np.float64)
        a, b = np.triu_indices(ranks.shape[1], 1)
        return rows, np.sign(ranks[:, b] - ranks[:, a])
    size = len(rows[0]["ranks"])
    if what == RATINGS:
        return rows, np.array([row.get("ratings") or [None] * size for row in rows], np.float64)
    flags = [[None] * size if row.get("flags") is None else [what in (names or ()) for names in row["flags"]] for row in rows]
    return rows, np.array(flags, np.float64)


def _long(
    part: tuple[Sequence[Row], np.ndarray], tasks: Mapping[str, int], numbers: Mapping[str, int], width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, values = part
    row, column = np.nonzero(~np.isnan(values))
    labeler = np.array([numbers[each["labeler"]] for each in rows])
    task = np.array([tasks[each["id"]] for each in rows])
    return labeler[row], task[row] * width + column, values[row, column]
