"""A policy's turns in dialogues whose contexts only grow: keys and values of what it has read are kept, and what is new is fed.

    columns   0 .............................................. known .......... P
              left padding | read in earlier turns            | fed now: the last tokens of every row

The contexts are left-padded, as everywhere. So many of their last columns are fed that every row's new tokens are among them;
what else stands there is computed again. Keys are kept with their rotation, and a token keeps its position when its column moves,
so a kept column may be copied to any other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lockstep.interfaces import Generated, Past
from lockstep.text.sequences import left_pad, width

Generate = Callable[[np.ndarray, np.ndarray, np.ndarray, Past | None], Generated]
"""`lockstep.interfaces.Policy.generate` of left-padded tokens, their mask, seeds, and what is known of them."""


LEAST_FED = 8
"""Columns: few shapes are compiled, and a reply is seldom shorter by much."""


class Read(NamedTuple):
    """What a dialogue's row of the cache holds: ``tokens``, from column ``begin`` on."""

    row: int
    begin: int
    tokens: list[int]


class Turns:
    """``generate``, continued."""

    def __init__(self, generate: Generate, pad_id: int):
        self.generate, self.pad_id = generate, pad_id
        self.cache: Any = None
        self.read: dict[int, Read] = {}

    def next(self, dialogues: Sequence[int], contexts: Sequence[Sequence[int]], seeds: np.ndarray, columns: int) -> Generated:
        """A turn in each of these dialogues, given by their numbers. A dialogue that is left out cannot come back.

        Args:
          contexts: their whole contexts, as token ids, at most ``columns`` long.
          seeds: uint32 [B, T].
        """
        tokens, mask = left_pad(contexts, self.pad_id, columns)
        drawn = self.generate(tokens, mask, seeds, self.past(dialogues, contexts, columns))
        self.cache, self.read = drawn.cache, {}
        for row, (dialogue, context) in enumerate(zip(dialogues, contexts, strict=True)):
            said = drawn.tokens[row][drawn.mask[row]].tolist()
            self.read[dialogue] = Read(row, columns - len(context), [*context, *said[:-1]])  # the last was drawn and not read
        return drawn

    def past(self, dialogues: Sequence[int], contexts: Sequence[Sequence[int]], columns: int) -> Past | None:
        """What is known of the contexts; None if nothing is."""
        if self.cache is None:
            return None
        read = [self.read[dialogue] for dialogue in dialogues]
        same = [len(os.path.commonprefix([r.tokens, [*context[:-1]]])) for r, context in zip(read, contexts, strict=True)]
        new = max(len(context) - known for context, known in zip(contexts, same, strict=True))
        if (known := columns - width(new, LEAST_FED)) <= 0:
            return None
        shift = [r.begin - (columns - len(context)) for r, context in zip(read, contexts, strict=True)]
        return Past(self.cache, np.array([r.row for r in read], np.int32), np.array(shift, np.int32), known)
