"""A policy's turns in dialogues whose contexts only grow: keys and values of what it has read are kept, and what is new is fed.

    columns   0 .............................................. known .......... P
              left padding | read in earlier turns            | fed now: the last tokens of every row

The contexts are left-padded, as everywhere. So many of their last columns are fed that every row's new tokens are among them;
what else stands there is computed again. Keys are kept with their rotation, and a token keeps its position when its column moves,
so a kept column may be copied to any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lockstep.interfaces import Generated, Past
from lockstep.text.sequences import left_pad

Generate = Callable[[np.ndarray, np.ndarray, np.ndarray, Past | None], Generated]
"""`lockstep.interfaces.Policy.generate` of left-padded tokens, their mask, seeds, and what is known of them."""


LEAST_FED = 8
"""Columns. Twice, four times, ... as many are fed if need be, so that few shapes are compiled."""


class Turns:
    """``generate``, continued."""

    def __init__(self, generate: Generate, pad_id: int):
        self.generate, self.pad_id = generate, pad_id
        self.cache: Any = None
        self.places: dict[int, int] = {}
        self.read: dict[int, list[int]] = {}
        self.begins: dict[int, int] = {}

    def next(self, dialogues: Sequence[int], contexts: Sequence[Sequence[int]], seeds: np.ndarray, columns: int) -> Generated:
        """A turn in each of these dialogues, given by their numbers. A dialogue that is left out cannot come back.

        Args:
          contexts: their whole contexts, as token ids, at most ``columns`` long.
          seeds: uint32 [B, T].
        """
        tokens, mask = left_pad(contexts, self.pad_id, columns)
        drawn = self.generate(tokens, mask, seeds, self.past(dialogues, contexts, columns))
        self.cache = drawn.cache
        self.places = {dialogue: row for row, dialogue in enumerate(dialogues)}
        for row, (dialogue, context) in enumerate(zip(dialogues, contexts, strict=True)):
            self.begins[dialogue] = columns - len(context)
            # The last token of a turn has been drawn and not read.
            self.read[dialogue] = [*context, *drawn.tokens[row][drawn.mask[row]][:-1].tolist()]
        return drawn

    def past(self, dialogues: Sequence[int], contexts: Sequence[Sequence[int]], columns: int) -> Past | None:
        """What is known of the contexts; None if nothing is."""
        if self.cache is None:
            return None
        new = [
            len(context) - min(common(self.read[dialogue], context), len(context) - 1)
            for dialogue, context in zip(dialogues, contexts, strict=True)
        ]
        fed = LEAST_FED
        while fed < max(new):
            fed *= 2
        if (known := columns - fed) <= 0:
            return None
        shift = [self.begins[d] - (columns - len(context)) for d, context in zip(dialogues, contexts, strict=True)]
        rows = [self.places[dialogue] for dialogue in dialogues]
        return Past(self.cache, np.array(rows, np.int32), np.array(shift, np.int32), known)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
