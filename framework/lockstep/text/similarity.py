"""The similarity of two attacks apart from their goals, which measures diversity and novelty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from lockstep.types import Message

EDGE, BLANK = "\0", "\1"


def strategy(messages: Sequence[str], goal: str) -> str:
    """The text of an attack with a blank in place of its goal."""
    return "\n".join(messages).replace(goal, BLANK) if goal else "\n".join(messages)


def users_turns(attack: Sequence[Message]) -> list[str]:
    """What the attacker wrote of an attack: all but the assistant's turns."""
    return [message.content for message in attack if message.role != "assistant"]


def pairs(text: str) -> Counter[tuple[str, str]]:
    """Each pair of neighbouring words, with the edges of the text as words."""
    words = [EDGE, *text.split(), EDGE]
    return Counter(zip(words, words[1:], strict=False))


def similarity(one: Counter[tuple[str, str]], other: Counter[tuple[str, str]]) -> float:
    """2 |A ∩ B| / (|A| + |B|) of two multisets of word pairs, in 0 .. 1 (Dice 1945): 1 for equal texts."""
    return 2 * (one & other).total() / (one.total() + other.total())


class Archive:
    """Known texts, with repetitions."""

    def __init__(self, texts: Iterable[str], neighbours: int):
        counts = sorted(Counter(texts).items())
        self._pairs = [pairs(text) for text, _ in counts]
        self._counts = np.array([count for _, count in counts], np.int64)
        self._nearest = min(neighbours, int(self._counts.sum()))

    def novelty(self, text: str) -> float:
        """The mean distance, 1 minus similarity, to the ``neighbours`` nearest texts: the sparseness of novelty search (Lehman &
        Stanley 2011, "Abandoning objectives", Evolutionary Computation 19(2), equation 1). 1 if the archive is empty."""
        if not self._nearest:
            return 1.0
        own = pairs(text)
        distances = np.array([1.0 - similarity(own, each) for each in self._pairs])
        order = np.argsort(distances, kind="stable")
        before = np.cumsum(self._counts[order]) - self._counts[order]
        taken = np.clip(self._nearest - before, 0, self._counts[order])
        return float(np.sum(distances[order] * taken) / self._nearest)


def diversity(strategies: Sequence[str]) -> float:
    """The mean distance from each strategy to its nearest other. 0 if each occurs twice; 1 if there are fewer than two."""
    counted = [pairs(text) for text in strategies]
    if len(counted) < 2:
        return 1.0
    nearest = [max(similarity(own, other) for j, other in enumerate(counted) if j != i) for i, own in enumerate(counted)]
    return 1.0 - sum(nearest) / len(nearest)
