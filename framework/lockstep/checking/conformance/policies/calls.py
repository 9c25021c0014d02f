"""How the checks call a policy: with few shapes, so that a backend that compiles does so only a few times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lockstep.checking.conformance.backends.terms import OUTPUTS, term
from lockstep.checking.conformance.kit import Inapplicable, require
from lockstep.checking.conformance.world import PAD, World
from lockstep.interfaces import Generated, Model, Policy
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.text.sequences import Sequences, in_chunks, join

ROWS, COLUMNS = 8, 6
TEMPERATURE = 0.7
LANGUAGE = ["logprobs", "entropy"]


def evaluate(model: Model, rows: Sequences, temperature: float = 1.0) -> dict[str, np.ndarray]:
    """Every output that the model supplies, with 0 outside the mask."""
    names = LANGUAGE if isinstance(model, Policy) else ["scores", "values"]
    found = model.evaluate(rows, names, temperature=temperature)
    return {name: array if name == "scores" else np.where(rows.mask, array, 0) for name, array in found.items()}


def draw(
    policy: Policy,
    world: World,
    step: int = 0,
    *,
    prompts: tuple[np.ndarray, np.ndarray] | None = None,
    seeds: np.ndarray | None = None,
    stop_ids: Sequence[int] = (),
    temperature: float = TEMPERATURE,
) -> Generated:
    """One response of ``COLUMNS`` tokens for each of ``ROWS`` prompts, unless other prompts and seeds are given."""
    tokens, mask = world.prompts(ROWS) if prompts is None else prompts
    seeds = world.seeds(len(tokens), COLUMNS, step) if seeds is None else seeds
    return policy.generate(tokens, mask, seeds, temperature=temperature, stop_ids=list(stop_ids), pad_id=PAD)


def drawn_rows(world: World, drawn: Generated) -> Sequences:
    return join(*world.prompts(ROWS), drawn.tokens, drawn.mask)


def enumerated(policy: Policy, rows: Sequences, column: int, temperature: float = 1.0) -> np.ndarray:
    """float64 [B, V]: the log-probability of every token in response column ``column``, one forward pass for each.

    Raises:
      Inapplicable: the vocabulary has more than 4096 tokens.
    """
    size = policy.vocab_size
    if size > 4096:
        raise Inapplicable(f"the vocabulary has {size} tokens: more than 4096 are not enumerated")
    many = rows.take(np.repeat(np.arange(rows.rows), size))
    tokens = many.tokens.copy()
    tokens[:, rows.prompt_length + column] = np.tile(np.arange(size), rows.rows)
    real = np.broadcast_to(np.arange(rows.mask.shape[1]) <= column, many.mask.shape)
    many = Sequences(tokens, many.prompt_mask, real, real.copy())
    found = in_chunks(lambda part: policy.evaluate(part, LANGUAGE, temperature=temperature), many, ROWS)
    return found["logprobs"][:, column].reshape(rows.rows, size).astype(np.float64)


def mostly_same_tokens(world: World, what: str, found: Generated, expected: Generated) -> None:
    """Require the same tokens in every row; in bfloat16, where rounding may tip a draw, in at least half of the rows."""
    equal = (found.tokens == expected.tokens).all(axis=1) & (found.mask == expected.mask).all(axis=1)
    needed = world.tolerance(1.0, 0.5)
    require(
        equal.mean() >= needed,
        f"{what}: {equal.sum()} of {equal.size} rows have the same tokens; row {equal.argmin()} has "
        f"{found.tokens[equal.argmin()].tolist()} where {expected.tokens[equal.argmin()].tolist()} was expected",
    )


def one_update(world: World, model: Model) -> None:
    """Make an update that moves every parameter on which the outputs depend."""
    outputs = [output for output in OUTPUTS if output in model.supplies]
    adam = OptimizerConfig(0.05, (0.9, 0.95), 1e-5, False, 0.0, None, None)
    before = {key: array.copy() for key, array in model.parameters().items()}
    world.backend.learner({"model": model}, {"model": adam}).update([term(world, outputs)])
    after = model.parameters()
    require(any((after[key] != before[key]).any() for key in before), "an update changed none of the parameters")


def full_rows(world: World, **columns: int) -> Sequences:
    """The rows of `World.rollout` with every response column filled."""
    rows = world.rollout(**columns)
    tokens = np.where(rows.attention_mask, rows.tokens, np.random.default_rng(5).integers(0, 34, rows.tokens.shape))
    real = np.ones_like(rows.response_mask)
    return Sequences(tokens.astype(np.int32), rows.prompt_mask, real, real.copy())
