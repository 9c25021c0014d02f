"""What happens to a rollout on the host: [batch, time] numpy arrays in, the same out.

Pure functions in the papers' notation. ``mask`` is True where a token counts; every reduction says what it divides by.
Masked columns may hold anything, NaN included: they are selected away, never multiplied.

References: LHP = Ziegler et al. 2019 and openai/lm-human-preferences; IG = Ouyang et al. 2022 (InstructGPT);
N+ = Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO"; GAE = Schulman et al. 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# ---------------------------------------------------------------------------------------------- masked statistics


def masked_mean(x: np.ndarray, mask: np.ndarray) -> float:
    """Σ_mask x / Σ mask: the mean over all counted entries, not a mean of row means. NaN if nothing counts."""
    return float(np.mean(x[mask], dtype=np.float64)) if mask.any() else float("nan")


def whiten(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(x - μ) / sqrt(σ² + 1e-8) over the counted entries, σ² biased; 0 elsewhere. LHP, `utils/core.whiten`.

    Call it on the whole batch before cutting minibatches: the statistics are the batch's.
    """
    mean = masked_mean(x, mask)
    variance = float(np.var(x[mask], dtype=np.float64))
    return np.where(mask, (x - mean) / np.sqrt(variance + 1e-8), 0).astype(np.float32)


def scale_to_unit_variance(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(x - μ) / sqrt(σ² + 1e-8) + μ over the counted entries; 0 elsewhere. LHP's reward whitening (mean kept)."""
    return np.where(mask, whiten(x, mask) + masked_mean(x, mask), 0).astype(np.float32)


def explained_variance(values: np.ndarray, returns: np.ndarray, mask: np.ndarray) -> float:
    """1 - Var(returns - values) / Var(returns) over the counted entries: 1 is perfect, 0 no better than a constant.
    NaN where the returns do not vary."""
    variance = np.var(returns[mask], dtype=np.float64)
    return float(1 - np.var((returns - values)[mask], dtype=np.float64) / variance) if variance > 0 else float("nan")


# ------------------------------------------------------------------------------------------------------ KL penalty


def k1(logprobs: np.ndarray, ref_logprobs: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """log π - log π_ref per token, 0 where masked: the unbiased estimator of KL(π || π_ref) that LHP, IG eq. 2 and N+
    put into the reward, unclamped. It may be negative for a sample; its expectation is not. Schulman 2020, k1."""
    return np.where(mask, logprobs - ref_logprobs, 0).astype(np.float32)


def k3(logprobs: np.ndarray, ref_logprobs: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """r - 1 - log r with r = π_ref / π, per token, 0 where masked: unbiased too, never negative, of lower variance.
    Logged beside k1. Schulman 2020, "Approximating KL divergence"."""
    log_ratio = np.where(mask, ref_logprobs - logprobs, 0).astype(np.float64)
    return (np.expm1(log_ratio) - log_ratio).astype(np.float32)


@dataclass
class FixedKL:
    """A constant KL coefficient β (IG: 0.02)."""

    coef: float

    def update(self, kl: float, episodes: int) -> None:
        pass


MAX_KL_ERROR = 0.2


@dataclass
class AdaptiveKL:
    """LHP 2.2: e = clip(KL / target - 1, ±0.2); β ← β (1 + e · episodes / horizon).

    ``kl`` is the *sum* over a response's tokens, averaged over responses, in nats. β is state: it is checkpointed.
    """

    coef: float
    target: float
    horizon: float

    def update(self, kl: float, episodes: int) -> None:
        error = np.clip(kl / self.target - 1, -MAX_KL_ERROR, MAX_KL_ERROR)
        self.coef *= float(1 + error * episodes / self.horizon)


# --------------------------------------------------------------------------------------------------------- rewards


def replace_unfinished(scores: np.ndarray, finished: np.ndarray, unfinished_score: float | None) -> np.ndarray:
    """float32 [B]: the score of a response that was cut off is *replaced*, after normalisation (LHP, N+: by -1).
    None leaves the scores alone."""
    if unfinished_score is None:
        return scores.astype(np.float32)
    return np.where(finished, scores, unfinished_score).astype(np.float32)


def token_rewards(scores: np.ndarray, kl: np.ndarray, mask: np.ndarray, kl_coef: float) -> np.ndarray:
    """float32 [B, T]: r_t = -β kl_t, and the score once, on the last counted token (EOS where there is one).

    So Σ_t r_t = score - β Σ_t kl_t. LHP and N+ put the score on the last column or after EOS; here one mask serves
    policy and value, and EOS itself carries it.
    """
    rewards = np.where(mask, -kl_coef * kl, 0).astype(np.float32)
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    rows = mask.any(axis=1)
    rewards[rows, last[rows]] += scores[rows].astype(np.float32)
    return rewards


def gae(rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, *, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns, float32 [B, T], 0 where masked (Schulman et al. 2016, eq. 16).

        δ_t = r_t + γ V_{t+1} - V_t        A_t = δ_t + γλ A_{t+1}        R_t = A_t + V_t

    V after the last counted token is 0. t + 1 is the next *counted* token: a masked gap inside a response (a tool's
    output, say) is stepped over, neither discounted nor valued.
    """
    advantages = np.zeros(rewards.shape, np.float64)
    next_value = np.zeros(len(rewards), np.float64)
    next_advantage = np.zeros(len(rewards), np.float64)
    for t in reversed(range(rewards.shape[1])):
        counts = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = np.where(counts, delta + gamma * lam * next_advantage, 0)
        next_advantage = np.where(counts, advantages[:, t], next_advantage)
        next_value = np.where(counts, values[:, t], next_value)
    returns = np.where(mask, advantages + values, 0)
    return advantages.astype(np.float32), returns.astype(np.float32)


# --------------------------------------------------------------------------------------------------------- ranking


def preferences(ranks: Sequence[Sequence[int]], rows: int) -> np.ndarray:
    """float32 [rows, rows]: W[i, j] > 0 where completion i is ranked above completion j of the same prompt.

    Completions lie in ``rows`` rows, one prompt after the other, in the order of ``ranks``; rows beyond them are
    padding. All strictly ordered pairs of one prompt weigh 1/C(K,2) each and ties are dropped (IG, section 3.5 and
    eq. 1); prompts weigh alike, so that without ties W sums to 1.
    """
    weights = np.zeros((rows, rows), np.float32)
    start = 0
    for rank in map(np.asarray, ranks):
        k = len(rank)
        weights[start : start + k, start : start + k] = (rank[:, None] < rank[None, :]) / (k * (k - 1) / 2)
        start += k
    return weights / len(ranks)


def pair_margins(scores: np.ndarray, preferred: np.ndarray) -> np.ndarray:
    """score_winner - score_loser for every pair marked in ``preferred`` [R, R], in row-major order."""
    winners, losers = np.nonzero(preferred)
    return scores[winners] - scores[losers]


def ranking_accuracy(margins: np.ndarray) -> float:
    """The fraction of pairs in which the preferred completion scores higher; equal scores count a half."""
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


def brier_score(margins: np.ndarray) -> float:
    """Mean (1 - σ(margin))²: the squared error of the predicted preference (Brier 1950). Knowing nothing gives 1/4."""
    return float(np.mean((1 - sigmoid(margins)) ** 2))


def expected_calibration_error(margins: np.ndarray, bins: int = 10) -> float:
    """Σ_bin (n_bin / n) |accuracy - confidence| with confidence = σ(|margin|) in [1/2, 1], ``bins`` equal bins.
    Guo et al. 2017, eq. 3, on the pair's winner as the predicted class."""
    confidence = sigmoid(np.abs(margins))
    right = (margins > 0) + 0.5 * (margins == 0)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    gap = np.bincount(index, weights=right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / count.sum())


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x) without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, np.float64)))


# ------------------------------------------------------------------------------------------------------- intervals


def mean_interval(x: np.ndarray, z: float = 1.96) -> tuple[float, float, float]:
    """Mean and its normal 95% interval, from the unbiased standard error; a degenerate one for a single number."""
    x = np.asarray(x, np.float64)
    half = z * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else 0.0
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def proportion_interval(successes: float, n: int, z: float = 1.96) -> tuple[float, float, float]:
    """A proportion and its 95% interval by Wilson 1927, which stays inside [0, 1]. Ties may count a half."""
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return p, float(centre - half), float(centre + half)
