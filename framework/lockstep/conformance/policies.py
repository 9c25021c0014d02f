"""Probabilities, sampling, padding, heads and checkpoints. The subject is a `World` whose policy is to be checked."""

from __future__ import annotations

import numpy as np

from lockstep.conformance.kit import check, near, same
from lockstep.conformance.world import World


@check("policy", usually="padding takes part in attention, or positions are counted from the first column")
def padding_is_inert(world: World) -> None:
    """Left padding and whatever ids stand in it change no log-probability, entropy or score (invariant 4)."""
    rows = world.rollout(prompt_columns=7)
    wide = world.rollout(prompt_columns=11)
    policy = world.policy()
    narrow, padded = (policy.evaluate(r, ["logprobs", "entropy"]) for r in (rows, wide))
    for name in narrow:
        near(name, np.where(rows.mask, padded[name], 0), np.where(rows.mask, narrow[name], 0), world.tolerance(1e-5, 2e-2))


@check("policy", usually="an operation in the forward pass draws random numbers, such as dropout that was left on")
def forwards_agree(world: World) -> None:
    """Two evaluations of the same rows are bitwise equal (invariant 22)."""
    rows, policy = world.rollout(), world.policy()
    same("logprobs", policy.evaluate(rows, ["logprobs"])["logprobs"], policy.evaluate(rows, ["logprobs"])["logprobs"])
