"""Log-probabilities, entropy, padding and the independence of rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lockstep.checking.conformance.kit import Inapplicable, check, near, require, same_arrays
from lockstep.checking.conformance.policies.calls import (
    COLUMNS,
    LANGUAGE,
    ROWS,
    TEMPERATURE,
    draw,
    enumerated,
    evaluate,
    full_rows,
    mostly_same_tokens,
)
from lockstep.checking.conformance.world import World, head, with_prompts
from lockstep.errors import ConfigError
from lockstep.interfaces import Generated, Policy
from lockstep.learning import losses
from lockstep.text.sequences import Sequences


@check("policy", usually="mixture weights are swapped, an end of beta is clamped into the interior, or temperatures differ")
def divergence_is_of_the_whole_vocabulary(world: World) -> None:
    """`toward` supplies the divergence over the whole vocabulary, at the temperature of the call, and keeps the policy's
    parameters (GKD; group methods' invariant 29)."""
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
    """Probabilities sum to 1 over all tokens, entropy is -Σ p log p, and temperature divides logits."""
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
    """`evaluate` returns exactly the named outputs, as float32 numpy arrays of the documented shapes that are finite even in
    masked columns; `supplies` lists all outputs; `generate` returns int32, bool and float32."""
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
    """A token changes no earlier token's log-probability, and no entropy or value up to its own column; it does change later
    ones."""
    policy, rows = world.policy(), full_rows(world)
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


@check("policy", usually="padding takes part in attention, or positions are counted from the first column")
def padding_is_inert(world: World) -> None:
    """Padding on either side, whatever its ids, changes no log-probability, entropy, value or score (invariant 4)."""
    policy, rows, wide = world.policy(), world.rollout(), world.rollout(prompt_columns=11)
    little = full_rows(world, prompt_columns=5)  # padding is less than a quarter: a network may leave out more
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
    """Require that both blocks of rows give the same outputs under the mask of ``rows``."""
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
    """`mask` takes tokens out of the loss, not out of the sequence: outputs of the other columns and the score do not change."""
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
    """Rows with the same prompt have the same outputs and samples as neighbours and apart."""
    policy = world.policy()
    rows = with_prompts(world.rollout(), np.repeat([4, 1], ROWS // 2))  # of 5 and of 2 tokens, each in four neighbouring rows
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
