"""How alike two attacks are, apart from their goals: the measure of diversity and of novelty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

EDGE, BLANK = "\0", "\1"


def strategy(messages: Sequence[str], goal: str) -> str:
    """The words of an attack with a blank in the place of its goal."""
    return "\n".join(messages).replace(goal, BLANK) if goal else "\n".join(messages)


def pairs(text: str) -> Counter[tuple[str, str]]:
    """Each pair of neighbouring words, with the edges of the text as words."""
    words = [EDGE, *text.split(), EDGE]
    return Counter(zip(words, words[1:], strict=False))


def similarity(one: Counter[tuple[str, str]], other: Counter[tuple[str, str]]) -> float:
    """2 |A ∩ B| / (|A| + |B|) of two multisets of word pairs, in 0 .. 1 (Dice 1945): 1 for equal texts."""
    return 2 * (one & other).total() / (one.total() + other.total())


def novelty(text: str, archive: Sequence[Counter[tuple[str, str]]]) -> float:
    """1 minus the similarity to the nearest of the archive; 1 if that is empty."""
    own = pairs(text)
    return 1.0 - max((similarity(own, each) for each in archive), default=0.0)


def diversity(strategies: Sequence[str]) -> float:
    """The mean novelty of each strategy against all others. 0: each is there twice."""
    counted = [pairs(text) for text in strategies]
    if len(counted) < 2:
        return 1.0
    nearest = [max(similarity(own, other) for j, other in enumerate(counted) if j != i) for i, own in enumerate(counted)]
    return 1.0 - sum(nearest) / len(nearest)
