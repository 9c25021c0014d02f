"""Labelers who fail gold items or attention checks, or who always pick the same side.

Results are shares with Wilson's interval (Wilson 1927), which holds for few trials and for shares of 0 and 1:

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)

Rows are those of a round's ``comparisons.jsonl``. Only labels that were given count: a labeler without gold items has no share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from lockstep_studio.science.bradley_terry import NORMAL
from lockstep_studio.science.rankings import latest

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Share:
    """``count`` of ``total``, and the ends of the 95% interval of the share."""

    count: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.count / self.total

    @classmethod
    def of(cls, count: int, total: int) -> Share:
        """The share with its interval.

        Args:
          count: from 0 to total.
          total: at least 1.
        """
        share, spread = count / total, NORMAL**2 / total
        middle = share + spread / 2
        half = NORMAL * math.sqrt(share * (1 - share) / total + spread / (4 * total))
        return cls(count, total, (middle - half) / (1 + spread), (middle + half) / (1 + spread))


def gold(comparisons: Iterable[Row], ranks: Mapping[str, Sequence[int]]) -> dict[str, Share]:
    """{labeler: the share of gold items judged right}.

    Args:
      ranks: {id of a gold item: the right ranks of its completions}.
    """
    return _shares((row["labeler"], right(row["ranks"], ranks[row["id"]])) for row in latest(comparisons) if row["id"] in ranks)


def right(ranks: Sequence[int], gold_ranks: Sequence[int]) -> bool:
    """True if every completion that is better by the gold ranks is ranked better; ranking it as a tie is wrong. Where the gold
    ranks tie, anything is right. An item is right or wrong as a whole, since its pairs are not independent trials."""
    pairs = combinations(range(len(gold_ranks)), 2)
    return all((ranks[a] - ranks[b]) * (gold_ranks[a] - gold_ranks[b]) > 0 for a, b in pairs if gold_ranks[a] != gold_ranks[b])


def attention(comparisons: Iterable[Row], asked: Mapping[str, int]) -> dict[str, Share]:
    """{labeler: the share of attention checks passed}, where the completion that the check names has to be the only best one.

    Args:
      asked: {id of a check: the index of that completion}.
    """
    rows = [row for row in latest(comparisons) if row["id"] in asked]
    return _shares((row["labeler"], _best(row["ranks"]) == [asked[row["id"]]]) for row in rows)


def sides(comparisons: Iterable[Row]) -> dict[str, Share]:
    """{labeler: how often the completion shown first is the best of two}, without ties. About a half if sides are random; near 0
    or 1 for a labeler who always presses the same key."""
    rows = [row for row in latest(comparisons) if len(row["ranks"]) == 2 and row.get("shown") and len(_best(row["ranks"])) == 1]
    return _shares((row["labeler"], _best(row["ranks"]) == [row["shown"][0]]) for row in rows)


def below(shares: Mapping[str, Share], minimum: float) -> list[str]:
    """Labelers whose whole interval lies below the minimum. A labeler with few items is in doubt and not listed."""
    return sorted(labeler for labeler, share in shares.items() if share.high < minimum)


def _best(ranks: Sequence[int]) -> list[int]:
    return [i for i, rank in enumerate(ranks) if rank == min(ranks)]


def _shares(trials: Iterable[tuple[str, bool]]) -> dict[str, Share]:
    found: dict[str, list[bool]] = {}
    for labeler, passed in trials:
        found.setdefault(labeler, []).append(passed)
    return {labeler: Share.of(sum(passed), len(passed)) for labeler, passed in sorted(found.items())}
