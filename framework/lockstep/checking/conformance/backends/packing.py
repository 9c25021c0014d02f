"""Several examples in one row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from lockstep.checking.conformance.backends.terms import (
    learning,
    outputs_of,
    pair,
    term,
)
from lockstep.checking.conformance.kit import Inapplicable, check, near_arrays, same
from lockstep.checking.conformance.world import World
from lockstep.errors import ConfigError
from lockstep.interfaces import Term
from lockstep.text.sequences import Sequences


@check("backend", usually="`Sequences.segments` is not read: attention crosses examples, or positions run through the row")
def examples_that_share_a_row_are_apart(world: World) -> None:
    """Examples that share rows have the same gradients as in separate rows, and the tokens of one change no bit of the outputs
    of another. A backend without packing raises `ConfigError`."""
    names = ("logprobs", "entropy", "values")
    models, one = pair(world), term(world, names)
    packed, learner = sharing_rows(one, [[0, 1, 2], [3], [4, 5, 6, 7]]), learning(world, models)
    try:
        found = learner.gradients([packed])
    except ConfigError as error:
        raise Inapplicable(f"it refuses: {error}") from error
    near_arrays("with examples in shared rows, gradients", found, learner.gradients([one]), world.tolerance(1e-5, 2e-2))
    rows = packed.sequences
    others = rows.mask & (rows.segments[:, 1:] != 2)
    changed = np.where(rows.segments == 2, (rows.tokens + 1) % 34, rows.tokens).astype(np.int32)
    before, after = (
        outputs_of(models, dataclasses.replace(packed, sequences=dataclasses.replace(rows, tokens=tokens)))
        for tokens in (rows.tokens, changed)
    )
    for name in names:
        what = f"with other tokens in the second example of a row, {name} of the others"
        same(what, np.where(others, after[name], 0), np.where(others, before[name], 0))


def sharing_rows(one: Term, groups: Sequence[Sequence[int]], columns: int = 40) -> Term:
    """The term with the examples of each group in one row, back to back."""
    sequences, rows = one.sequences, len(groups)
    arrays = {name: array for name, array in one.batch.items() if array.ndim == 2}
    wide = {"tokens": sequences.tokens, "segments": np.zeros_like(sequences.tokens)}
    wide |= {name: np.pad(array, ((0, 0), (sequences.prompt_length, 0))) for name, array in arrays.items()}
    shared = {name: np.zeros((rows, columns), array.dtype) for name, array in wide.items()}
    for row, members in enumerate(groups):
        end = 0
        for number, member in enumerate(members, 1):
            real = sequences.attention_mask[member]
            start, end = end, end + int(real.sum())
            for name, array in wide.items():
                shared[name][row, start:end] = number if name == "segments" else array[member][real]
    segments, batch = shared["segments"], {name: shared[name][:, 1:] for name in arrays}
    packed = Sequences(shared["tokens"], segments[:, :1] > 0, segments[:, 1:] > 0, batch["mask"], segments)
    return dataclasses.replace(one, sequences=packed, batch=batch)
