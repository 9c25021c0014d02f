"""A policy's turns in dialogues whose contexts only grow: the KV cache of earlier turns is reused, and only the end is fed.

    columns   0 .............................................. known .......... P
              left padding | read in earlier turns            | fed now: the last tokens of every row

The contexts are left-padded, as everywhere. Enough of their last columns are fed to cover every row's new tokens; older tokens
in these columns are recomputed. Cached keys are already rotated, and a token keeps its position when its column moves, so a
cached column may be copied to any other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lockstep.interfaces import Generated, Past
from lockstep.text.sequences import left_pad, width

Generate = Callable[[np.ndarray, np.ndarray, np.ndarray, Past | None], Generated]
"""`lockstep.interfaces.Policy.generate`, called with left-padded tokens, their mask, seeds, and what the cache has of them."""


LEAST_FED = 8
"""The fewest columns to feed: it keeps the number of compiled shapes low, and a reply is seldom much shorter."""


class Read(NamedTuple):
    """A dialogue's row in the cache: it holds ``tokens``, from column ``begin`` on."""

    row: int
    begin: int
    tokens: list[int]


class Turns:
    """Successive calls of ``generate``, each of which reuses the cache of the one before."""

    def __init__(self, generate: Generate, pad_id: int):
        self.generate, self.pad_id = generate, pad_id
        self.cache: Any = None
        self.read: dict[int, Read] = {}

    def next(self, dialogues: Sequence[int], contexts: Sequence[Sequence[int]], seeds: np.ndarray, columns: int) -> Generated:
        """Generate a turn in each of these dialogues, given by number. A dialogue that was left out of a call is read anew.

        Args:
          contexts: the whole context of each, as token ids, at most ``columns`` long.
          seeds: uint32 [B, T].
        """
        tokens, mask = left_pad(contexts, self.pad_id, columns)
        drawn = self.generate(tokens, mask, seeds, self.past(dialogues, contexts, columns))
        self.cache, self.read = drawn.cache, {}
        for row, (dialogue, context) in enumerate(zip(dialogues, contexts, strict=True)):
            said = drawn.tokens[row][drawn.mask[row]].tolist()
            self.read[dialogue] = Read(row, columns - len(context), [*context, *said[:-1]])  # the last token was drawn, not fed
        return drawn

    def past(self, dialogues: Sequence[int], contexts: Sequence[Sequence[int]], columns: int) -> Past | None:
        """The part of the contexts that the cache holds; None if there is none."""
        if self.cache is None:
            return None
        read = [self.read.get(dialogue, Read(0, 0, [])) for dialogue in dialogues]
        same = [len(os.path.commonprefix([r.tokens, [*context[:-1]]])) for r, context in zip(read, contexts, strict=True)]
        new = max(len(context) - known for context, known in zip(contexts, same, strict=True))
        if (known := columns - width(new, LEAST_FED)) <= 0:
            return None
        shift = [r.begin - (columns - len(context)) for r, context in zip(read, contexts, strict=True)]
        return Past(self.cache, np.array([r.row for r in read], np.int32), np.array(shift, np.int32), known)
