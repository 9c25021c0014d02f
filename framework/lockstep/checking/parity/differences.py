"""How far two steps differ: each crossing of `lockstep.checking.tap`, then each parameter.

Rows with different tokens are not compared, because a model's outputs for them answer different questions. Nothing outside the
mask is compared either. A step's measure is the largest over its crossings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np

from lockstep.checking.tap import Crossing, EvaluateCall, GenerateCall, ScoreCall, UpdateCall
from lockstep.interfaces import Learner, Term
from lockstep.learning.randomness import hash_gumbel
from lockstep.text.sequences import Sequences


@dataclass(frozen=True)
class Token:
    """The first differing token of a step: in the earliest column, the first row.

    tie: the gap between the two winners' log-probability + Gumbel noise. If it is as small as the differences between
      log-probabilities, rounding decided a tie. If it is large, the sampling rules or the noise differ.
    """

    row: int
    column: int
    tokens: tuple[int, int]
    tie: float


@dataclass
class Step:
    """``measures``: see `docs/parity.md`. ``notes``: what could not be compared, and why."""

    stage: str
    number: int
    tokens: int = 0
    tokens_same: int = 0
    first: Token | None = None
    measures: dict[str, float] = field(default_factory=dict)
    parameters_at: str = ""
    notes: list[str] = field(default_factory=list)

    def raise_to(self, name: str, difference: float | None) -> None:
        if difference is not None:
            self.measures[name] = max(self.measures.get(name, 0.0), difference)


def compare_crossings(step: Step, names: tuple[str, str], first: Sequence[Crossing], second: Sequence[Crossing]) -> None:
    """Compare crossings pair by pair, up to the first pair of different kinds."""
    for number, pair in enumerate(zip_longest(first, second)):
        kinds = ["nothing" if crossing is None else type(crossing).__name__ for crossing in pair]
        if kinds[0] != kinds[1]:
            crossed = " and ".join(f"{kind} on {name}" for kind, name in zip(kinds, names, strict=True))
            step.notes.append(f"crossing {number} is {crossed}: nothing after it is compared")
            return
        COMPARE[type(pair[0])](step, *pair)


# ------------------------------------------------------------------------------------------------- crossing by crossing


def _generation(step: Step, one: GenerateCall, other: GenerateCall) -> None:
    a, b = one.generated, other.generated
    for what in ("prompt_tokens", "prompt_mask", "seeds"):
        if not np.array_equal(getattr(one, what), getattr(other, what)):
            step.notes.append(f"generate was given different {what}")
    if a.tokens.shape != b.tokens.shape:
        step.notes.append(f"generated blocks of shapes {a.tokens.shape} and {b.tokens.shape}")
        return
    real = a.mask | b.mask
    same = a.mask & b.mask & (a.tokens == b.tokens)
    step.tokens += int(real.sum())
    step.tokens_same += int(same.sum())
    alike = (same | ~real).all(axis=1)
    step.raise_to("sampler_logprobs", _largest(a.logprobs, b.logprobs, real & alike[:, None]))
    if not alike.all() and step.first is None:
        differing = real & ~same
        column = int(differing.any(axis=0).argmax())
        row = int(differing[:, column].argmax())
        winners = [_winner(crossing, row, column) for crossing in (one, other)]
        tokens = int(a.tokens[row, column]), int(b.tokens[row, column])
        step.first = Token(row, column, tokens, abs(winners[0] - winners[1]))


def _winner(crossing: GenerateCall, row: int, column: int) -> float:
    """The drawn token's log-probability + Gumbel noise, the largest of all tokens; at temperature 0 without noise."""
    token, logprob = crossing.generated.tokens[row, column], float(crossing.generated.logprobs[row, column])
    if crossing.temperature == 0:
        return logprob
    return logprob + float(hash_gumbel(crossing.seeds[row, column], crossing.model.vocab_size)[token])


def _evaluation(step: Step, one: EvaluateCall, other: EvaluateCall) -> None:
    same = _same_rows(step, one.sequences, other.sequences)
    for name in one.outputs.keys() & other.outputs.keys():
        step.raise_to(
            name, _largest(one.outputs[name], other.outputs[name], _counted(one.outputs[name], one.sequences.mask, same))
        )


def _scoring(step: Step, one: ScoreCall, other: ScoreCall) -> None:
    same = _same_rows(step, one.responses.sequences, other.responses.sequences)
    step.raise_to("scores", _largest(one.scores, other.scores, same))


def _update(step: Step, one: UpdateCall, other: UpdateCall) -> None:
    if len(one.terms) != len(other.terms):
        step.notes.append(f"an update has {len(one.terms)} and {len(other.terms)} terms")
    for a, b in zip(one.terms, other.terms, strict=False):
        _term(step, a, b)
    if one.lr_scale != other.lr_scale:
        step.notes.append(f"the learning rate is scaled by {one.lr_scale:g} and {other.lr_scale:g}")
    step.raise_to("loss", abs(one.metrics["loss"] - other.metrics["loss"]))
    if one.gradients is not None and other.gradients is not None:
        _, relative, _ = distance(step, one.gradients, other.gradients)
        step.measures["gradient"] = relative


def _term(step: Step, a: Term, b: Term) -> None:
    """Compare the arrays that the loss reads."""
    same = _same_rows(step, a.sequences, b.sequences)
    mask = np.asarray(a.batch.get("mask", a.sequences.mask))
    for name in a.batch.keys() & b.batch.keys():
        one, other = a.batch[name], b.batch[name]
        step.raise_to(f"batch.{name}", _largest(one, other, _counted(one, mask, same)))


COMPARE: dict[type, Callable[[Step, Any, Any], None]] = {
    GenerateCall: _generation,
    EvaluateCall: _evaluation,
    ScoreCall: _scoring,
    UpdateCall: _update,
}


def _same_rows(step: Step, a: Sequences, b: Sequences) -> np.ndarray:
    """bool [B]: rows with the same tokens under the same masks."""
    if a.tokens.shape != b.tokens.shape or a.prompt_length != b.prompt_length:
        step.notes.append(f"blocks of shapes {a.tokens.shape} and {b.tokens.shape} were not compared")
        return np.zeros(a.rows, bool)
    attention = a.attention_mask == b.attention_mask
    return (attention & ((a.tokens == b.tokens) | ~a.attention_mask)).all(axis=1) & (a.mask == b.mask).all(axis=1)


def _counted(array: np.ndarray, mask: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which elements to compare, where ``rows`` marks the rows that are the same on both sides. An array with an entry per token:
    those under the mask in these rows. Per row: these rows. Per prompt, whose rows are neighbours: prompts whose rows are all the
    same. Any other array: everything if all rows are the same, else nothing."""
    if array.shape == mask.shape:
        return mask & rows[:, None]
    if len(array) and len(rows) % len(array) == 0:
        return np.asarray(rows.reshape(len(array), -1).all(axis=1))
    return np.full(len(array), bool(rows.all()))


def _largest(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float | None:
    """max |a - b| over ``where``; None if that is empty. Two NaNs agree; NaN and a number, or arrays of different shapes, are
    infinitely far apart."""
    if a.shape != b.shape:
        return float("inf") if where.any() else None
    a, b = np.asarray(a[where], np.float64), np.asarray(b[where], np.float64)
    if not a.size:
        return None
    with np.errstate(invalid="ignore"):
        difference = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, np.abs(a - b))
    return float(np.where(np.isnan(difference), np.inf, difference).max())


# ------------------------------------------------------------------------------------------------------------ parameters


def compare_parameters(step: Step, one: Learner, other: Learner) -> None:
    largest, relative, where = distance(step, parameters(one), parameters(other))
    step.measures |= {"parameters": largest, "parameters_l2": relative}
    step.parameters_at = where


def parameters(learner: Learner) -> dict[str, np.ndarray]:
    """The parameters of all models that the learner trains."""
    return {f"{model}.{name}": p for model, m in learner.models.items() for name, p in m.parameters().items()}


def distance(step: Step, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> tuple[float, float, str]:
    """The largest absolute difference, ||a - b|| / ||a||, and the name of the array with the largest difference."""
    if unknown := sorted(a.keys() ^ b.keys()):
        step.notes.append(f"only one of the two has {', '.join(unknown[:3])}")
    largest, where, apart, size = 0.0, "", 0.0, 0.0
    for name in [name for name in a if name in b]:
        difference = np.abs(a[name] - b[name])
        here = float(difference.max())
        if not np.isfinite(here):
            return float("inf"), float("inf"), name
        if here > largest:
            largest, where = here, name
        apart += float(np.square(difference, dtype=np.float64).sum())
        size += float(np.square(a[name], dtype=np.float64).sum())
    relative = float(np.sqrt(apart / size)) if size else (0.0 if apart == 0 else float("inf"))
    return largest, relative, where
