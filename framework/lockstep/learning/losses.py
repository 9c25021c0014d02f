"""Losses over [batch, time], written once against the Array API standard and differentiated by every backend.

``xp`` is the namespace: ``array_api_compat.torch``, ``jax.numpy``, numpy. Each function returns one number per token
(or pair), unreduced; `weighted_sum` reduces with weights made on the host. The built-in losses use only what every backend
has: operators, indexing, where, zeros_like, sum, maximum, exp, log1p and astype (preferences also reshape, log and expm1).
So softplus is spelled out.
"""

from __future__ import annotations

import math
from typing import Any

Array = Any
MAX_LOG_RATIO = 20.0


def weighted_sum(xp: Any, x: Array, weights: Array) -> Array:
    """Σ weights · x over the entries whose weight is not 0. The others contribute nothing, even if NaN, and get no gradient.

    With weights that sum to 1 over a whole minibatch this is the minibatch's mean, however it is cut into micro-batches.
    """
    counts = weights != 0
    return xp.sum(xp.where(counts, x, xp.zeros_like(x)) * weights)


def select(xp: Any, mask: Array, x: Array) -> Array:
    """x where the mask is True, else 0: applied to inputs, it keeps garbage out of the graph and out of gradients."""
    return xp.where(mask, x, xp.zeros_like(x))


def clip(xp: Any, x: Array, low: Array | float, high: Array | float) -> Array:
    """x within [low, high]. On a bound the derivative is 1; with the libraries' own clip functions it is 1 or 1/2."""
    zero = xp.zeros_like(x)
    return xp.where(x < low, zero + low, xp.where(x > high, zero + high, x))


def log_ratio(xp: Any, logprobs: Array, others: Array) -> Array:
    """log π - log π', within ±20: e^89 is inf in float32, and its gradient NaN. [B, T]."""
    return clip(xp, logprobs - others, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def softplus(xp: Any, x: Array) -> Array:
    """log(1 + e^x) = max(x, 0) + log(1 + e^-|x|): finite for every finite x. It is spelled without max and |x|, whose derivatives
    at 0 differ between libraries: in this form the derivative at 0 is 1/2 in all of them."""
    positive = x > 0
    return xp.where(positive, x, xp.zeros_like(x)) + xp.log1p(xp.exp(xp.where(positive, -x, x)))


def clipped_policy_loss(xp: Any, ratio: Array, advantages: Array, *, low: float, high: float, dual: float | None = None) -> Array:
    """L_t = max(-A_t ρ_t, -A_t clip(ρ_t, 1 - low, 1 + high)) with ρ = π / π_old. [B, T].

    PPO (Schulman et al. 2017, eq. 7) has low = high = ε; DAPO (Yu et al. 2025, eq. 8) raises ``high``. ``dual`` bounds the loss
    where A < 0: L_t <= -A_t · dual (Ye et al. 2020, arXiv 1912.09729, eq. 5). Spelled without max: on an edge, such as ρ = 1 with
    ``low`` = 0, the gradient is the unclipped one.
    """
    beyond = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    loss = -advantages * xp.where(beyond, clip(xp, ratio, 1 - low, 1 + high), ratio)
    if dual is None:
        return loss
    bound = -advantages * dual
    return xp.where((advantages < 0) & (loss > bound), bound, loss)


def clipped_weight_loss(xp: Any, log_ratio: Array, advantages: Array, *, low: float, high: float) -> Array:
    """CISPO (MiniMax 2025, arXiv 2506.13585, eq. 4 and 5): a loss whose gradient is -A_t clip(ρ_t, low, high) ∇ log π. [B, T].

    The paper writes -A sg(clip(ρ)) log π, where sg stops the gradient. This is the integral of that gradient over log ρ from 0,
    so no gradient has to be stopped, which every array library does differently. The bounds are for ρ itself, not for ρ - 1.
    """
    ratio = xp.exp(log_ratio)
    floor = low * (log_ratio - math.log(low)) + low - 1 if low > 0 else xp.zeros_like(ratio) - 1
    ceiling = high * (log_ratio - math.log(high)) + high - 1
    return -advantages * xp.where(ratio < low, floor, xp.where(ratio > high, ceiling, ratio - 1))


def kl_estimate(xp: Any, kind: str, log_ratio: Array) -> Array:
    """Estimates of KL(π || π_ref) from log ρ = log π - log π_ref of sampled tokens. [B, T]. Schulman 2020, "Approximating KL
    divergence": k1 = log ρ, k2 = ½ log² ρ, k3 = 1 / ρ - 1 + log ρ.

    As a term of a loss on the policy's own samples, k2 has the gradient of the reverse KL; k1's is 0 in expectation, and k3's is
    that of the forward KL (Liu et al. 2025, arXiv 2512.21852).
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio**2
    return xp.exp(-log_ratio) - 1 + log_ratio


def divergence(xp: Any, logprobs: Array, teacher: Array, beta: float) -> Array:
    """The divergence [...] in nats between student S and teacher T, from their log-probabilities [..., V] over the vocabulary.

        0 < β < 1   β KL(T || M) + (1 - β) KL(S || M), M = β T + (1 - β) S; ½ is the Jensen-Shannon divergence
        β = 0       KL(T || S), forward
        β = 1       KL(S || T), reverse

    Agarwal et al. 2024 (GKD, arXiv 2306.13649), eq. 1. The mixture formula tends to 0 at both ends, so these are special cases.
    """

    def kl(p: Array, q: Array) -> Array:
        return xp.sum(xp.exp(p) * (p - q), axis=-1)

    if beta in (0, 1):
        return kl(logprobs, teacher) if beta else kl(teacher, logprobs)
    mixture = xp.logaddexp(teacher + math.log(beta), logprobs + math.log(1 - beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(logprobs, mixture)


def clipped_value_loss(xp: Any, values: Array, old_values: Array, returns: Array, *, clip_range: float) -> Array:
    """L_t = ½ max((V - R)², (clip(V, V_old ± ε) - R)²). [B, T]. lm-human-preferences, `train_policy.loss`."""
    near = clip(xp, values, old_values - clip_range, old_values + clip_range)  # V itself where clipping does not bind
    return 0.5 * xp.maximum((values - returns) ** 2, (near - returns) ** 2)


def ranking_loss(xp: Any, scores: Array) -> Array:
    """L_ij = -log σ(s_i - s_j), the loss of preferring i to j, for all pairs. [R] -> [R, R].

    Bradley & Terry 1952; InstructGPT eq. 1 is the sum of this, weighted by `lockstep.learning.numerics.preferences`.
    """
    return softplus(xp, scores[None, :] - scores[:, None])


def sigmoid(xp: Any, x: Array) -> Array:
    """1 / (1 + e^-x), finite for every finite x."""
    return xp.exp(-softplus(xp, -x))


def log_odds(xp: Any, x: Array) -> Array:
    """log(p / (1 - p)) for x = log p < 0, capped at -1e-7. Hong et al. 2024 (ORPO), eq. 4. Near 0, computing 1 - e^x loses
    precision to cancellation, so -expm1(x) is used there (Mächler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    x = xp.where(x < -1e-7, x, xp.zeros_like(x) - 1e-7)
    near = x > -math.log(2)
    close, far = xp.where(near, x, xp.zeros_like(x) - 0.5), xp.where(near, xp.zeros_like(x) - 1, x)  # both are safe everywhere
    return x - xp.where(near, xp.log(-xp.expm1(close)), xp.log1p(-xp.exp(far)))


def plackett_luce(xp: Any, utilities: Array, real: Array) -> Array:
    """-Σ_k log softmax(u_k, .., u_K)_k of rankings [N, K], the best first -> [N]. ``real`` is False on the padding of rankings
    with fewer items; utilities there must be far below all others. Plackett 1975; Rafailov et al. 2023, eq. 18."""
    last = utilities.shape[1] - 1
    rest, loss = utilities[:, last], xp.zeros_like(utilities[:, last])
    for k in range(last - 1, -1, -1):
        behind = softplus(xp, rest - utilities[:, k])  # -log of the probability that k comes first among those from k on
        loss = loss + xp.where(real[:, k], behind, xp.zeros_like(behind))
        rest = utilities[:, k] + behind
    return loss
