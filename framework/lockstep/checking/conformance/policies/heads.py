"""Copies, value heads and scores."""

from __future__ import annotations

import numpy as np

from lockstep.checking.conformance.kit import check, near, require, same, same_arrays
from lockstep.checking.conformance.policies.calls import (
    COLUMNS,
    evaluate,
    full_rows,
    one_update,
)
from lockstep.checking.conformance.world import PAD, World, head
from lockstep.text.sequences import Sequences


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
        for other in sorted(everyone.keys() - {name}):  # a set has another order in each process
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
    scalar, full = world.scalar_model(), full_rows(world)
    lengths = np.arange(full.rows) % COLUMNS
    short = np.arange(COLUMNS) < lengths[:, None]
    tokens = full.tokens.copy()
    tokens[:, full.prompt_length :][~short] = PAD
    scores = scalar.evaluate(Sequences(tokens, full.prompt_mask, short, short.copy()), ["scores", "values"])["scores"]
    values = scalar.evaluate(full, ["scores", "values"])["values"]
    near("scores of responses of 0, 1, 2, ... tokens", scores, values[np.arange(full.rows), lengths], world.tolerance(2e-5, 3e-2))


@check("policy", usually="the bias is added before the gain, or only scores are rescaled")
def rescale_is_folded_in(world: World) -> None:
    """`rescale(gain, bias)` maps every score and value to gain · output + bias; a second call rescales the result again."""
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
