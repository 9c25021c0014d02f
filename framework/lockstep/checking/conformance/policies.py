"""Probabilities, sampling, padding, heads and checkpoints. The subject is a `World` with the policy to check.

Most checks use the same few shapes, so that a backend that compiles does so only a few times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.checking.conformance.backends import OUTPUTS, term
from lockstep.checking.conformance.kit import Inapplicable, check, near, require, same, same_arrays
from lockstep.checking.conformance.world import PAD, World, head, saved_weights, with_prompts
from lockstep.errors import ConfigError
from lockstep.interfaces import Generated, Model, Past, Policy
from lockstep.learning import losses, randomness
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.learning.turns import Turns
from lockstep.models import adapters
from lockstep.text.sequences import Sequences, in_chunks, join, left_pad

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
      Inapplicable: too many.
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
    """The same tokens in every row; with bfloat16, where rounding may tip a draw, in at least half of them."""
    equal = (found.tokens == expected.tokens).all(axis=1) & (found.mask == expected.mask).all(axis=1)
    needed = world.tolerance(1.0, 0.5)
    require(
        equal.mean() >= needed,
        f"{what}: {equal.sum()} of {equal.size} rows have the same tokens; row {equal.argmin()} has "
        f"{found.tokens[equal.argmin()].tolist()} where {expected.tokens[equal.argmin()].tolist()} was expected",
    )


def one_update(world: World, model: Model) -> None:
    """Move every parameter that the outputs depend on."""
    outputs = [output for output in OUTPUTS if output in model.supplies]
    adam = OptimizerConfig(0.05, (0.9, 0.95), 1e-5, False, 0.0, None, None)
    before = {key: array.copy() for key, array in model.parameters().items()}
    world.backend.learner({"model": model}, {"model": adam}).update([term(world, outputs)])
    after = model.parameters()
    require(any((after[key] != before[key]).any() for key in before), "an update changed none of the parameters")


# ------------------------------------------------------------------------------------------------------ probabilities


@check("policy", usually="mixture weights are swapped, an end of beta is clamped into the interior, or temperatures differ")
def divergence_is_of_the_whole_vocabulary(world: World) -> None:
    """`toward` supplies the divergence of the whole distributions, at the temperature of the call, and leaves the teacher and the
    other outputs alone (GKD; group methods' invariant 29)."""
    rows, policy, teacher = world.rollout(), world.policy(), world.policy(1)
    try:
        students = {beta: policy.toward(teacher, beta) for beta in (0.3, 1.0)}
    except ConfigError as error:
        raise Inapplicable(str(error)) from None
    own, other = (enumerated(model, rows.take(slice(3)), 0, TEMPERATURE) for model in (policy, teacher))
    for beta, student in students.items():
        require("divergence" in student.supplies, f"supplies lacks divergence: {sorted(student.supplies)}")
        found = student.evaluate(rows, ["divergence"], temperature=TEMPERATURE)["divergence"][:3, 0]
        expected = losses.divergence(np, own, other, beta)
        near(f"divergence with beta={beta:g}", found, expected, world.tolerance(1e-4, 0.2) * max(1.0, expected.max()))
        same_arrays("toward a teacher, the parameter", student.parameters(), policy.parameters())


@check("policy", usually="logits are divided by a token-dependent factor, or entropy has another temperature")
def logprobs_are_normalised(world: World) -> None:
    """Over all tokens probabilities sum to 1, entropy is -Σ p log p, and temperature divides logits."""
    policy, rows = world.policy(), world.rollout().take(slice(0, 3))
    plain = enumerated(policy, rows, 0)
    for temperature in (1.0, TEMPERATURE):
        found = enumerated(policy, rows, 0, temperature)
        near(
            f"the sum of all probabilities at temperature {temperature}",
            np.exp(found).sum(axis=1),
            np.ones(3),
            world.tolerance(1e-5, 2e-2),
        )
        scaled = plain / temperature
        expected = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
        near(f"log-probabilities at temperature {temperature}", found, expected, world.tolerance(2e-5, 3e-2))
        entropy = policy.evaluate(world.rollout(), LANGUAGE, temperature=temperature)["entropy"][:3, 0]
        near(f"entropy at temperature {temperature}", entropy, -(np.exp(found) * found).sum(axis=1), world.tolerance(2e-5, 3e-2))


@check("policy", usually="a device array, or a wrong dtype, shape or name")
def outputs_are_what_was_asked_for(world: World) -> None:
    """`evaluate` returns exactly the named outputs, as finite float32 numpy arrays of the documented shapes, masked columns
    included; `supplies` lists them all; `generate` returns int32, bool and float32."""
    policy, rows = world.policy(), world.rollout()
    scalar = policy.scalar_model(head(policy.hidden_size))
    expected = {"logprobs", "entropy"}
    require(policy.supplies == expected, f"a policy supplies {sorted(policy.supplies)} where {sorted(expected)} was expected")
    valued = policy.with_value_head()
    require(valued.supplies == expected | {"values"}, f"with a value head it supplies {sorted(valued.supplies)}, not values too")
    require(scalar.supplies == {"values", "scores"}, f"a scalar model supplies {sorted(scalar.supplies)}, not scores and values")
    for model, names in [(policy, ["logprobs"]), (valued, ["values"]), (scalar, ["scores"])]:
        found = model.evaluate(rows, names, temperature=TEMPERATURE)
        require(set(found) == set(names), f"asked for {names}, evaluate gave {len(found)}: {sorted(found)}")
        for name, array in found.items():
            shape = (rows.rows,) if name == "scores" else rows.mask.shape
            _is_array(name, array, np.float32, shape)
            require(
                np.isfinite(array).all(), f"{name} has {(~np.isfinite(array)).sum()} of {array.size} numbers that are not finite"
            )
    drawn = draw(policy, world)
    for name, dtype in [("tokens", np.int32), ("mask", np.bool_), ("logprobs", np.float32)]:
        _is_array(f"generated {name}", getattr(drawn, name), dtype, (ROWS, COLUMNS))
    require(np.isfinite(drawn.logprobs).all(), f"the sampler's logprobs are not all finite: {drawn.logprobs.tolist()}")
    for model in (policy, scalar):
        for name, array in model.parameters().items():
            _is_array(f"parameter {name}", array, np.float32, None)


def _is_array(name: str, array: Any, dtype: type, shape: tuple[int, ...] | None) -> None:
    require(type(array) is np.ndarray, f"{name} is {type(array).__name__} where a numpy array was expected")
    require(array.dtype == dtype, f"{name} has dtype {array.dtype} where {np.dtype(dtype)} was expected")
    require(shape is None or array.shape == shape, f"{name} has shape {array.shape} where {shape} was expected")


@check("policy", usually="an operation in the forward pass draws random numbers, such as dropout left on")
def forwards_agree(world: World) -> None:
    """Two evaluations of the same rows are bitwise equal (invariant 22)."""
    rows, policy = world.rollout(), world.policy()
    same_arrays("the second evaluation's", evaluate(policy, rows), evaluate(policy, rows))


@check("policy", usually="the causal mask lets a query see later keys, or states are read one column late")
def future_is_unseen(world: World) -> None:
    """Later tokens change no log-probability of an earlier one, and no entropy or value up to their own column; they do change
    what follows."""
    policy, rows = world.policy(), _full(world)
    scalar = policy.scalar_model(head(policy.hidden_size))
    cut = 3
    tokens = rows.tokens.copy()
    tokens[:, rows.prompt_length + cut :] = (tokens[:, rows.prompt_length + cut :] + 5) % 34
    other = dataclasses.replace(rows, tokens=tokens)
    tolerance = world.tolerance(1e-5, 2e-2)
    for model in (policy, scalar):
        before, after = evaluate(model, rows), evaluate(model, other)
        for name in before.keys() - {"scores"}:
            last = cut if name == "logprobs" else cut + 1
            near(f"{name} before the change in column {cut}", after[name][:, :last], before[name][:, :last], tolerance)
            moved = np.abs(after[name] - before[name])[:, cut + 1 :].max()
            require(
                moved > 10 * tolerance, f"{name} after column {cut} moved by only {moved:.3g} when earlier tokens were changed"
            )


def _full(world: World, **columns: int) -> Sequences:
    """The rows of `World.rollout` with every response column filled."""
    rows = world.rollout(**columns)
    tokens = np.where(rows.attention_mask, rows.tokens, np.random.default_rng(5).integers(0, 34, rows.tokens.shape))
    real = np.ones_like(rows.response_mask)
    return Sequences(tokens.astype(np.int32), rows.prompt_mask, real, real.copy())


@check("policy", usually="padding takes part in attention, or positions are counted from the first column")
def padding_is_inert(world: World) -> None:
    """Padding on either side, and whatever ids it has, changes no log-probability, entropy, value or score (invariant 4)."""
    policy, rows, wide = world.policy(), world.rollout(), world.rollout(prompt_columns=11)
    little = _full(world, prompt_columns=5)  # less than a quarter: a network may leave more out
    for ids in (policy.vocab_size + 1000, -100):
        for what, some in (("", rows), (" of little", little)):
            garbage = dataclasses.replace(some, tokens=np.where(some.attention_mask, some.tokens, ids).astype(np.int32))
            _agree(world, policy, f"with {ids} as padding{what}", some, garbage)
    blank = np.zeros((rows.rows, 3), bool)
    longer = Sequences(
        np.where(np.c_[wide.attention_mask, blank], np.c_[wide.tokens, blank], 7).astype(np.int32),
        wide.prompt_mask,
        np.c_[wide.response_mask, blank],
        np.c_[wide.mask, blank],
    )
    _agree(world, policy, "with 4 more columns on the left and 3 on the right", rows, longer)


def _agree(world: World, policy: Policy, what: str, rows: Sequences, other: Sequences) -> None:
    """Both rows give the same outputs under the mask."""
    for model in (policy, policy.scalar_model(head(policy.hidden_size))):
        expected, found = evaluate(model, rows), evaluate(model, other)
        for name in expected:
            array = found[name] if name == "scores" else found[name][:, : rows.mask.shape[1]]
            near(f"{name} {what}", array, expected[name], world.tolerance(2e-5, 4e-2))


@check("policy", usually="the sampler's prefill sees padding, or its positions count padding")
def padding_does_not_change_what_is_drawn(world: World) -> None:
    """Left padding, whatever its ids, does not change the drawn tokens (invariant 4)."""
    policy, (tokens, mask) = world.policy(), world.prompts(ROWS)
    expected = draw(policy, world)
    garbage = np.where(mask, tokens, policy.vocab_size + 1000).astype(np.int32)
    mostly_same_tokens(
        world, "with ids outside the vocabulary as padding", draw(policy, world, prompts=(garbage, mask)), expected
    )
    wide = draw(policy, world, prompts=world.prompts(ROWS, columns=11))
    mostly_same_tokens(world, "with 4 more columns of padding", wide, expected)


@check("policy", usually="`mask` is used for attention, where `response_mask` says which tokens are real")
def tokens_that_do_not_count_are_still_read(world: World) -> None:
    """`mask` takes tokens out of the loss, not out of the sequence: the other columns and the score do not change."""
    policy, rows = world.policy(), world.rollout()
    later = rows.mask & (np.arange(rows.mask.shape[1]) % 2 == 1)
    for model in (policy, policy.scalar_model(head(policy.hidden_size))):
        expected, found = evaluate(model, rows), evaluate(model, dataclasses.replace(rows, mask=later))
        for name in expected:
            kept = expected[name] if name == "scores" else np.where(later, expected[name], 0)
            near(f"{name} with every second token not counting", found[name], kept, world.tolerance(1e-5, 2e-2))


@check("policy", usually="a batch statistic, a shared position, or noise by row number")
def rows_are_independent(world: World) -> None:
    """Neither the outputs nor the samples of a row depend on its place or on the other rows (invariant 5)."""
    policy, rows = world.policy(), world.rollout()
    order = np.random.default_rng(3).permutation(ROWS)
    tolerance = world.tolerance(1e-5, 2e-2)
    for model in (policy, policy.scalar_model(head(policy.hidden_size))):
        expected, permuted = evaluate(model, rows), evaluate(model, rows.take(order))
        parts = [evaluate(model, rows.take(slice(i, i + 2))) for i in range(0, ROWS, 2)]
        for name in expected:
            near(f"{name} of permuted rows", permuted[name], expected[name][order], tolerance)
            near(f"{name} in batches of 2", np.concatenate([part[name] for part in parts]), expected[name], tolerance)
    together, (tokens, mask), seeds = draw(policy, world), world.prompts(ROWS), world.seeds(ROWS, COLUMNS)

    def rows_of(rows: Any) -> Generated:
        return Generated(together.tokens[rows], together.mask[rows], together.logprobs[rows])

    permuted = draw(policy, world, prompts=(tokens[order], mask[order]), seeds=seeds[order])
    mostly_same_tokens(world, "drawn for permuted rows", permuted, rows_of(order))
    few = slice(3, 6)
    alone = draw(policy, world, prompts=(tokens[few], mask[few]), seeds=seeds[few])
    mostly_same_tokens(world, "drawn in a batch of 3", alone, rows_of(few))


@check("policy", usually="a prompt that several rows have is computed once, and its keys go to other rows")
def rows_may_have_the_same_prompt(world: World) -> None:
    """Neighbouring rows with the same prompt have the outputs and the samples that they have apart."""
    policy = world.policy()
    rows = with_prompts(world.rollout(), np.repeat([4, 1], ROWS // 2))  # of 5 tokens and of 2: four neighbours each
    apart = np.arange(ROWS).reshape(2, -1).T.reshape(-1)
    for model in (policy, policy.scalar_model(head(policy.hidden_size))):
        together, found = evaluate(model, rows), evaluate(model, rows.take(apart))
        for name in together:
            near(f"{name} of rows with the same prompt", together[name][apart], found[name], world.tolerance(1e-5, 2e-2))
    given, seeds = (rows.tokens[:, : rows.prompt_length], rows.prompt_mask), world.seeds(ROWS, COLUMNS)
    drawn = draw(policy, world, prompts=given, seeds=seeds)
    expected = draw(policy, world, prompts=(given[0][apart], given[1][apart]), seeds=seeds[apart])
    in_order = Generated(drawn.tokens[apart], drawn.mask[apart], drawn.logprobs[apart])
    mostly_same_tokens(world, "drawn for rows with the same prompt", in_order, expected)


# ----------------------------------------------------------------------------------------------------------- sampling


@check("policy", usually="the sampler has another temperature, other positions, or a cache off by one column")
def sampler_agrees_with_teacher_forcing(world: World) -> None:
    """The sampler's log-probabilities match teacher forcing at the same temperature (invariant 3)."""
    policy = world.policy()
    for temperature in (1.0, TEMPERATURE):
        drawn = draw(policy, world, temperature=temperature)
        rows = drawn_rows(world, drawn)
        forced = policy.evaluate(rows, LANGUAGE, temperature=temperature)["logprobs"]
        what = f"the sampler's logprobs at temperature {temperature}"
        near(what, drawn.logprobs, forced, world.tolerance(1e-4, 0.2))
        near(f"the mean mismatch of {what}", np.abs(drawn.logprobs - forced).mean(), 0, world.tolerance(2e-5, 2e-2))


@check("policy", usually="seeds are read as signed, reused for every column, or the noise is not hash_gumbel's")
def samples_follow_the_seed_rule(world: World) -> None:
    """Each token is argmax(log p / T + g), where g is `randomness.hash_gumbel` of its seed, for any 32 bits."""
    policy = world.policy()
    seeds = world.seeds(ROWS, COLUMNS)
    seeds[:4, 0] = [0, 1, 2**31, 2**32 - 1]
    drawn = draw(policy, world, seeds=seeds)
    rows, some = drawn_rows(world, drawn), slice(0, 4)
    for column in (0, 3):
        logprobs = enumerated(policy, rows.take(some), column, TEMPERATURE)
        noisy = logprobs + randomness.hash_gumbel(seeds[some, column], policy.vocab_size)
        _takes_the_best(world, noisy, drawn.tokens[some, column], f"column {column}", "log-probability plus noise")


def _takes_the_best(world: World, numbers: np.ndarray, tokens: np.ndarray, where: str, what: str) -> None:
    """Each token has the highest number [B, V] of its row, or one that rounding cannot tell from it."""
    best, rows = numbers.argmax(axis=1), np.arange(len(tokens))
    short = numbers[rows, best] - numbers[rows, tokens]
    row = int(short.argmax())
    require(
        short[row] <= world.tolerance(1e-4, 0.1),
        f"row {row}, {where}: token {tokens[row]} was drawn, but token {best[row]} has the highest {what} "
        f"({numbers[row, best[row]]:.4f}, not {numbers[row, tokens[row]]:.4f})",
    )


@check("policy", usually="a division by temperature 0, or noise is still added")
def temperature_zero_takes_the_most_likely(world: World) -> None:
    """At temperature 0 each token is the most likely one, whatever the seeds."""
    policy = world.policy()
    drawn, again = (draw(policy, world, step, temperature=0.0) for step in (0, 1))
    same("tokens at temperature 0 with other seeds", again.tokens, drawn.tokens)
    require(np.isfinite(drawn.logprobs).all(), f"logprobs at temperature 0 are not finite: {drawn.logprobs[0].tolist()}")
    some = slice(0, 4)
    for column in (0, 3):
        logprobs = enumerated(policy, drawn_rows(world, drawn).take(some), column)
        _takes_the_best(world, logprobs, drawn.tokens[some, column], f"column {column}", "log-probability")


@check("policy", usually="the noise comes from a stateful generator, or from the row number instead of the seeds")
def same_seeds_same_tokens(world: World) -> None:
    """The same seeds draw the same tokens; other seeds draw others; rows with the same prompt draw by their own seeds
    (invariant 25)."""
    policy, (tokens, mask) = world.policy(), world.prompts(ROWS)
    first, again, other = draw(policy, world), draw(policy, world), draw(policy, world, step=1)
    same("tokens drawn again from the same seeds", again.tokens, first.tokens)
    same("logprobs drawn again from the same seeds", again.logprobs, first.logprobs)
    new = (other.tokens != first.tokens).mean()
    require(new > 0.5, f"with other seeds only {new:.0%} of the tokens differ")
    one = tokens[[5] * ROWS], mask[[5] * ROWS]
    different = len({tuple(row) for row in draw(policy, world, prompts=one).tokens.tolist()})
    require(different > ROWS / 2, f"{ROWS} rows with one prompt and different seeds drew only {different} different responses")
    seeds = np.repeat(world.seeds(1, COLUMNS), ROWS, axis=0)
    equal = len({tuple(row) for row in draw(policy, world, prompts=one, seeds=seeds).tokens.tolist()})
    require(equal == 1, f"{ROWS} rows with one prompt and the same seeds drew {equal} different responses")


@check("policy", usually="the stream restarts its seeds or its cache with each token, or does not end with the last row")
def a_stream_gives_the_tokens_of_generate(world: World) -> None:
    """`stream` yields the columns that `generate` draws from the same seeds, and ends with the last row."""
    policy, prompts, seeds = world.policy(), world.prompts(ROWS), world.seeds(ROWS, COLUMNS)
    stop_ids = [int(draw(policy, world).tokens[0, COLUMNS // 2])]  # one row at least ends early
    drawn = draw(policy, world, stop_ids=stop_ids)
    streamed = policy.stream(*prompts, seeds, temperature=TEMPERATURE, stop_ids=stop_ids, pad_id=PAD)
    columns = [np.asarray(column) for column in streamed]
    expected = int(drawn.mask.any(axis=0).sum())
    require(len(columns) == expected, f"the stream has {len(columns)} columns, generate has {expected}")
    same("the streamed tokens", np.stack(columns, axis=1), drawn.tokens[:, :expected])


@check("policy", usually="kept keys belong to other columns or rows, or what follows them is read at positions from 0")
def what_was_read_is_not_read_again(world: World) -> None:
    """A turn that continues from the cache of earlier ones draws what it draws from the whole context, with the same
    log-probabilities: rows of different lengths, in another order, and fewer in each turn."""
    policy, (tokens, mask) = world.policy(), world.prompts(ROWS)
    contexts = [row[here].tolist() for row, here in zip(tokens, mask, strict=True)]
    stop_ids = [int(draw(policy, world).tokens[0, COLUMNS // 2])]  # one row at least ends early
    how: dict[str, Any] = {"temperature": TEMPERATURE, "stop_ids": stop_ids, "pad_id": PAD}
    given: list[Past] = []

    def generate(tokens: np.ndarray, mask: np.ndarray, seeds: np.ndarray, past: Past | None) -> Generated:
        if past is None:
            return policy.generate(tokens, mask, seeds, **how)
        given.append(past)
        return policy.generate(tokens, mask, seeds, **how, past=past)

    turns = Turns(generate, PAD)
    for number, dialogues in enumerate([range(ROWS), [6, 1, 2, 5], [5, 6]]):
        held, seeds, columns = [contexts[d] for d in dialogues], world.seeds(len(dialogues), COLUMNS, number), 8 + 12 * number
        continued = turns.next(dialogues, held, seeds, columns)
        whole = draw(policy, world, prompts=left_pad(held, PAD, columns), seeds=seeds, stop_ids=stop_ids)
        mostly_same_tokens(world, f"in turn {number + 1}, from a cache", continued, whole)
        alike = continued.tokens[:, 0] == whole.tokens[:, 0]
        found, expected = (drawn.logprobs[alike, 0] for drawn in (continued, whole))
        near(f"log-probabilities of first tokens of turn {number + 1}, from a cache", found, expected, world.tolerance(1e-4, 0.2))
        for row, dialogue in enumerate(dialogues):  # what the other side says
            contexts[dialogue] += [*continued.tokens[row][continued.mask[row]].tolist(), *range(1 + (dialogue + number) % 3)]
    if not given:
        raise Inapplicable("the policy keeps no cache from one turn to the next")


@check("policy", usually="the model's own end-of-text id stops a row, or the stop token is cut off or masked")
def responses_end_at_the_first_stop_token(world: World) -> None:
    """A row ends with the first of the configured stop ids, which is kept and counts; masked pad ids follow. No other id ends a
    row, and a row without one is full (invariant 10)."""
    policy, eos = world.policy(), world.tokenizer.eos_id
    for step in range(20):
        free = draw(policy, world, step)
        require(free.mask.all(), f"without stop ids {(~free.mask).sum()} of {free.mask.size} tokens are masked")
        if step > 2 and eos in free.tokens[:, :-1]:
            break
    stops = [int(free.tokens[0, 2]), int(free.tokens[3, 4])]
    drawn = draw(policy, world, step, stop_ids=stops)
    ends = np.isin(free.tokens, stops)
    expected = np.cumsum(ends, axis=1) - ends == 0  # no stop before this token
    same(f"mask with stop ids {stops}", drawn.mask, expected)
    same(f"tokens with stop ids {stops}", drawn.tokens, np.where(expected, free.tokens, PAD))


@check("policy", usually="the KV cache or the position table is one too short")
def the_context_can_be_filled(world: World) -> None:
    """A prompt and a response that together fill `context_length` agree with teacher forcing."""
    policy = world.policy()
    if policy.context_length > 512:
        raise Inapplicable(f"a context of {policy.context_length} tokens takes long to fill")
    new = 6
    tokens, mask = left_pad([np.random.default_rng(2).integers(0, 34, policy.context_length - new).tolist()] * 2, PAD,
                            policy.context_length - new)  # fmt: skip
    drawn = draw(policy, world, prompts=(tokens, mask), seeds=world.seeds(2, new))
    forced = policy.evaluate(join(tokens, mask, drawn.tokens, drawn.mask), LANGUAGE, temperature=TEMPERATURE)["logprobs"]
    what = f"the sampler's logprobs at the end of {policy.context_length} tokens"
    near(what, drawn.logprobs, forced, world.tolerance(1e-4, 0.2))


# -------------------------------------------------------------------------------------------------- copies and heads


@check("policy", usually="a copy shares some or all parameters with the original")
def copies_are_independent(world: World) -> None:
    """Copies, with or without another head, start from the original's parameters, and training or rescaling one does not affect
    the other (invariant 21)."""
    policy, rows = world.policy(), world.rollout()
    scalar = policy.scalar_model(head(policy.hidden_size))
    family = {
        "copy": policy.copy(),
        "with_value_head": policy.with_value_head(),
        "scalar_model": scalar,
        "copy of the scalar model": scalar.copy(),
    }
    start = policy.parameters()
    for name, model in family.items():
        own = model.parameters()
        shared = start.keys() & own.keys()
        require(len(shared) >= min(len(start), len(own)) - 2, f"{name} shares only the names {sorted(shared)} with the policy")
        same_arrays(f"{name}: parameter", {key: own[key] for key in shared}, {key: start[key] for key in shared})
    same_arrays("copy:", evaluate(family["copy"], rows), evaluate(policy, rows))
    same_arrays("copy of the scalar model:", evaluate(family["copy of the scalar model"], rows), evaluate(scalar, rows))
    scalar.rescale(3.0, 1.0)
    everyone = {"policy": policy, **family}
    for name in ("copy of the scalar model", "policy", "with_value_head", "scalar_model"):
        before = {key: model.parameters() for key, model in everyone.items()}
        one_update(world, everyone[name])
        for other in everyone.keys() - {name}:
            same_arrays(f"after an update of {name}, {other}:", everyone[other].parameters(), before[other])
    same_arrays("copy, after all others were trained:", evaluate(family["copy"], rows), evaluate(world.policy(), rows))


@check("policy", usually="the value head starts at random, or replaces part of the policy")
def value_head_starts_at_zero(world: World) -> None:
    """`with_value_head` supplies values that are 0 everywhere and does not change log-probabilities or entropy."""
    policy, rows = world.policy(), world.rollout()
    valued = policy.with_value_head()
    same("values of a new value head", valued.evaluate(rows, ["values"])["values"], np.zeros(rows.mask.shape))
    found, expected = evaluate(valued, rows), evaluate(policy, rows)
    for name in expected:
        near(f"{name} with a value head", found[name], expected[name], world.tolerance(1e-5, 2e-2))


@check("policy", usually="scores are read at the last column, which is padding in all but the longest rows")
def scores_are_read_at_the_last_real_token(world: World) -> None:
    """The score of a prompt with n response tokens is the value before token n + 1 of any longer response; for an empty response
    it is read at the last prompt token."""
    scalar, full = world.scalar_model(), _full(world)
    lengths = np.arange(full.rows) % COLUMNS
    short = np.arange(COLUMNS) < lengths[:, None]
    tokens = full.tokens.copy()
    tokens[:, full.prompt_length :][~short] = PAD
    scores = scalar.evaluate(Sequences(tokens, full.prompt_mask, short, short.copy()), ["scores", "values"])["scores"]
    values = scalar.evaluate(full, ["scores", "values"])["values"]
    near("scores of responses of 0, 1, 2, ... tokens", scores, values[np.arange(full.rows), lengths], world.tolerance(2e-5, 3e-2))


@check("policy", usually="the bias is added before the gain, or only scores are rescaled")
def rescale_is_folded_in(world: World) -> None:
    """`rescale(gain, bias)` maps every score and value to gain · output + bias; a second call does so again."""
    scalar, rows = world.scalar_model(), world.rollout()
    expected = evaluate(scalar, rows)
    for gain, bias in [(2.5, -0.75), (0.5, 3.0)]:
        scalar.rescale(gain, bias)
        expected = {
            "scores": gain * expected["scores"] + bias,
            "values": np.where(rows.mask, gain * expected["values"] + bias, 0),
        }
        found = evaluate(scalar, rows)
        for name in expected:
            near(f"{name} after rescale({gain}, {bias})", found[name], expected[name], world.tolerance(2e-5, 2e-2))


# ------------------------------------------------------------------------------------------- parameters and their files


@check("policy", usually="a tensor is saved in half precision, under another name, or with the value head")
def checkpoints_round_trip(world: World) -> None:
    """`load` and `load_scalar` give back what `save` wrote, bit for bit: float32 safetensors under the names of `parameters`,
    with a config.json (for an adapter, peft's files). A value head is not part of a policy's checkpoint."""
    policy, rows = world.policy(1), world.rollout()
    folder = _saved(world, policy, "policy")
    again = type(policy).load(folder, world.backend)
    same_arrays("loaded parameter", again.parameters(), policy.parameters())
    same_arrays("loaded policy's", evaluate(again, rows), evaluate(policy, rows))
    valued = _saved(world, policy.with_value_head(), "policy with a value head")
    names, expected = (set(saved_weights(f)[1]) for f in (valued, folder))
    require(
        names == expected,
        f"with a value head the checkpoint has {len(names)} tensors, not {len(expected)}: {sorted(names ^ expected)}",
    )
    scalar = world.scalar_model(1)
    scalar.rescale(1.5, 0.25)
    again = type(policy).load_scalar(_saved(world, scalar, "scalar model"), world.backend)
    same_arrays("loaded scalar model's parameter", again.parameters(), scalar.parameters())
    same_arrays("loaded scalar model's", evaluate(again, rows), evaluate(scalar, rows))


def _saved(world: World, model: Model, name: str) -> Path:
    """The folder it was saved to, after checking its files."""
    folder = world.folder / "saved" / name.replace(" ", "_")
    folder.mkdir(parents=True)
    model.save(folder)
    config = adapters.ADAPTER_CONFIG if world.adapted else "config.json"
    require((folder / config).exists(), f"{name}: save wrote {sorted(p.name for p in folder.iterdir())}, but no {config}")
    stored = {key.removeprefix(adapters.PREFIX): array for key, array in saved_weights(folder)[1].items()}
    own = model.parameters()
    missing = stored.keys() ^ own.keys() if "value head" not in name else stored.keys() - own.keys()
    require(not missing, f"{name}: {sorted(missing)} in one of the file ({len(stored)} names) and parameters() ({len(own)})")
    for key, array in stored.items():
        same(f"{name}: {key} in the file", array, own[key])
        require(array.dtype == np.float32, f"{name}: {key} is {array.dtype} in the file where float32 was expected")
    return folder


@check("policy", usually="a buffer is changed in place, or a host array is used as device memory")
def evaluation_changes_nothing(world: World) -> None:
    """Evaluating and sampling change no bit of the parameters or of the arrays passed in."""
    policy, rows, (tokens, mask), seeds = world.policy(), world.rollout(), world.prompts(ROWS), world.seeds(ROWS, COLUMNS)
    given = [rows.tokens, rows.prompt_mask, rows.response_mask, rows.mask, tokens, mask, seeds]
    copies, before = [array.copy() for array in given], policy.parameters()
    evaluate(policy, rows, TEMPERATURE)
    policy.generate(tokens, mask, seeds, temperature=TEMPERATURE, stop_ids=[], pad_id=PAD)
    same_arrays("after evaluating, parameter", policy.parameters(), before)
    names = ["tokens", "prompt_mask", "response_mask", "mask", "prompt tokens", "prompt mask", "seeds"]
    for name, array, copy in zip(names, given, copies, strict=True):
        same(f"after evaluating, the given {name}", array, copy)


@check("policy", usually="parameters() returns the arrays themselves, or views")
def parameters_are_copies(world: World) -> None:
    """Arrays from `parameters` are the caller's own: changing them does not change the model, and vice versa."""
    policy, rows = world.policy(), world.rollout()
    held = policy.parameters()
    kept, before = {name: array.copy() for name, array in held.items()}, evaluate(policy, rows)
    one_update(world, policy)
    same_arrays("taken before an update, parameter", held, kept)
    before = evaluate(policy, rows)
    for array in policy.parameters().values():
        if array.flags.writeable:
            array += 1
    same_arrays("after changing what parameters() gave,", evaluate(policy, rows), before)


@check("policy", usually="the sampler keeps its own weights, cast or merged once and stale after an update")
def all_see_the_new_weights(world: World) -> None:
    """After an update, log-probabilities, samples, heads and checkpoints use the new weights."""
    policy, rows = world.policy(), world.rollout()
    before = evaluate(policy, rows)
    draw(policy, world)
    one_update(world, policy)
    folder = world.folder / "updated"
    policy.save(folder)
    loaded = type(policy).load(folder, world.backend)
    expected, drawn = evaluate(loaded, rows), draw(policy, world)
    moved = np.abs(expected["logprobs"] - before["logprobs"]).max()
    require(moved > 0.3, f"an update moved log-probabilities by at most {moved:.3g}")
    for name, array in evaluate(policy, rows).items():
        near(f"{name} after an update", array, expected[name], world.tolerance(1e-5, 2e-2))
    forced = policy.evaluate(drawn_rows(world, drawn), LANGUAGE, temperature=TEMPERATURE)["logprobs"]
    near("the sampler's logprobs after an update", drawn.logprobs, forced, world.tolerance(1e-4, 0.2))
    values = [evaluate(p.scalar_model(head(p.hidden_size)), rows)["scores"] for p in (policy, loaded)]
    near("scores of a scalar model made after an update", *values, world.tolerance(2e-5, 4e-2))


@check("policy", usually="initial weights come from the library's own generator, or the seed is not used")
def the_same_seed_makes_the_same_policy(world: World) -> None:
    """`create` is a function of its configuration and seed: equal ones give equal weights, and another seed gives others, unless
    the weights come from a checkpoint."""
    first, again, other = (world.created(seed).parameters() for seed in (0, 0, 1))
    same_arrays("created again, parameter", again, first)
    if world.from_checkpoint:
        same_arrays("created with another seed from a checkpoint, parameter", other, first)
        _, stored = saved_weights(world.folder / "checkpoint")
        same_arrays("created from a checkpoint, parameter", {n: first.get(n, np.zeros(0)) for n in stored}, stored)
    else:
        matrices = [name for name, array in first.items() if array.ndim > 1 and array.any()]  # an adapter's B is 0 at first
        equal = [name for name in matrices if (first[name] == other[name]).all()]
        require(not equal, f"with another seed {len(equal)} of {len(matrices)} matrices are the same: {', '.join(equal[:3])}")
