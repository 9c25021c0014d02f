"""Sampled tokens and their log-probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np

from lockstep.checking.conformance.kit import Inapplicable, check, near, require, same
from lockstep.checking.conformance.policies.calls import (
    COLUMNS,
    LANGUAGE,
    ROWS,
    TEMPERATURE,
    draw,
    drawn_rows,
    enumerated,
    mostly_same_tokens,
)
from lockstep.checking.conformance.world import PAD, World
from lockstep.interfaces import Generated, Past
from lockstep.learning import randomness
from lockstep.learning.turns import Turns
from lockstep.text.sequences import join, left_pad


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
    """Each token is argmax(log p / T + g), where g is `randomness.hash_gumbel` of its seed; a seed may be any 32 bits."""
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
    """Require that each token has the highest of its row's ``numbers`` [B, V], or one that rounding cannot tell from it."""
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
    """`stream` yields the columns that `generate` draws from the same seeds, and ends when the last row ends."""
    policy, prompts, seeds = world.policy(), world.prompts(ROWS), world.seeds(ROWS, COLUMNS)
    stop_ids = [int(draw(policy, world).tokens[0, COLUMNS // 2])]  # at least one row ends early
    drawn = draw(policy, world, stop_ids=stop_ids)
    streamed = policy.stream(*prompts, seeds, temperature=TEMPERATURE, stop_ids=stop_ids, pad_id=PAD)
    columns = [np.asarray(column) for column in streamed]
    expected = int(drawn.mask.any(axis=0).sum())
    require(len(columns) == expected, f"the stream has {len(columns)} columns, generate has {expected}")
    same("the streamed tokens", np.stack(columns, axis=1), drawn.tokens[:, :expected])


@check("policy", usually="kept keys belong to other columns or rows, or what follows them is read at positions from 0")
def what_was_read_is_not_read_again(world: World) -> None:
    """A turn that continues from the KV cache of earlier turns draws the same tokens, with the same log-probabilities, as from
    the whole context: for rows of different lengths, in another order, and fewer in each turn."""
    policy, (tokens, mask) = world.policy(), world.prompts(ROWS)
    contexts = [row[here].tolist() for row, here in zip(tokens, mask, strict=True)]
    stop_ids = [int(draw(policy, world).tokens[0, COLUMNS // 2])]  # at least one row ends early
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
        for row, dialogue in enumerate(dialogues):  # append the response, and what the other side says
            contexts[dialogue] += [*continued.tokens[row][continued.mask[row]].tolist(), *range(1 + (dialogue + number) % 3)]
    if not given:
        raise Inapplicable("the policy keeps no cache from one turn to the next")


@check("policy", usually="the model's own end-of-text id stops a row, or the stop token is cut off or masked")
def responses_end_at_the_first_stop_token(world: World) -> None:
    """A row ends with its first configured stop id, which is kept and counts; masked pad ids follow. No other id ends a row, and
    a row without a stop id is full (invariant 10)."""
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
