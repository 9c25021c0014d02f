"""Losses over [batch, time], written once against the Array API standard and differentiated by every backend.

``xp`` is the namespace: ``array_api_compat.torch``, ``jax.numpy``, numpy. Each function returns one number per token
(or pair), unreduced; `weighted_sum` reduces with weights made on the host. The built-in losses use only what every backend
has: operators, indexing, where, zeros_like, sum, maximum, abs, exp, log1p, clip and astype. So softplus is spelled out.
"""

from __future__ import annotations

from typing import Any

Array = Any


def weighted_sum(xp: Any, x: Array, weights: Array) -> Array:
    """Σ weights · x over the entries whose weight is not 0; the others are inert, NaN or not, and get no gradient.

    With weights that sum to 1 over a whole minibatch this is the minibatch's mean, however it is cut into micro-batches.
    """
    counts = weights != 0
    return xp.sum(xp.where(counts, x, xp.zeros_like(x)) * weights)


def select(xp: Any, mask: Array, x: Array) -> Array:
    """x where the mask is True, else 0: applied to inputs, it keeps garbage out of the graph and out of gradients."""
    return xp.where(mask, x, xp.zeros_like(x))


def softplus(xp: Any, x: Array) -> Array:
    """log(1 + e^x) = max(x, 0) + log(1 + e^-|x|): finite for every finite x."""
    return xp.maximum(x, xp.zeros_like(x)) + xp.log1p(xp.exp(-xp.abs(x)))


def clipped_policy_loss(xp: Any, ratio: Array, advantages: Array, *, clip_range: float) -> Array:
    """L_t = max(-A_t ρ_t, -A_t clip(ρ_t, 1 - ε, 1 + ε)) with ρ = π / π_old. [B, T]. Schulman et al. 2017, eq. 7."""
    return xp.maximum(-advantages * ratio, -advantages * xp.clip(ratio, 1 - clip_range, 1 + clip_range))


def clipped_value_loss(xp: Any, values: Array, old_values: Array, returns: Array, *, clip_range: float) -> Array:
    """L_t = ½ max((V - R)², (clip(V, V_old ± ε) - R)²). [B, T]. lm-human-preferences, `train_policy.loss`."""
    near = xp.clip(values, old_values - clip_range, old_values + clip_range)  # V itself where clipping does not bind
    return 0.5 * xp.maximum((values - returns) ** 2, (near - returns) ** 2)


def ranking_loss(xp: Any, scores: Array) -> Array:
    """L_ij = -log σ(s_i - s_j), the loss of preferring i to j, for all pairs. [R] -> [R, R].

    Bradley & Terry 1952; InstructGPT eq. 1 is the sum of this, weighted by `lockstep.learning.numerics.preferences`.
    """
    return softplus(xp, scores[None, :] - scores[:, None])
