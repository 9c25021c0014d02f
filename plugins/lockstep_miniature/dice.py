"""Seeded randomness.

Everything in the miniature is a pure function of (seed, stream, index): other processes, or calls in another order, draw the
same world.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from lockstep.learning.randomness import generator

T = TypeVar("T")

_BLOCK = 64


class Dice:
    """Uniform draws from the Philox stream named by (seed, stream, index).

    Numbers are drawn a block at a time, since one numpy call per draw would cost more than generating the text.
    """

    def __init__(self, seed: int, stream: str, index: int):
        self._generator = generator(seed, f"miniature/{stream}", index)
        self._block: list[float] = []

    def uniform(self) -> float:
        """A number in [0, 1)."""
        if not self._block:
            self._block = self._generator.random(_BLOCK).tolist()
        return self._block.pop()

    def below(self, n: int) -> int:
        """An integer in 0 .. n - 1."""
        return int(self.uniform() * n)

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """``count`` different options in random order."""
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def weighted(self, weights: dict[T, float]) -> T:
        """A key of ``weights``, in proportion to its value. The values need not add up to one."""
        mark = self.uniform() * sum(weights.values())
        for option, weight in weights.items():
            mark -= weight
            if mark < 0:
                return option
        return option

    def gumbel(self) -> float:
        """A standard Gumbel variate. Added to utilities, it makes their order a Plackett-Luce ranking."""
        return float(-np.log(-np.log(1.0 - self.uniform() + 1e-300) + 1e-300))
