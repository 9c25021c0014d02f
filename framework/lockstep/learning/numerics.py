"""The host's arithmetic on rollouts: [batch, time] numpy arrays in, the same out.

Pure functions in the papers' notation. ``mask`` is True where a token counts; every reduction says what it divides by.
Masked columns may hold anything, NaN included: they are selected away, never multiplied.

References: LHP = Ziegler et al. 2019 and openai/lm-human-preferences; IG = Ouyang et al. 2022 (InstructGPT);
N+ = Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO"; GAE = Schulman et al. 2016.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

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


# ---------------------------------------------------------------------------------------------------------- groups

GROUP_EPS = 1e-4
"""Added to a group's standard deviation. Rewards that differ only by rounding then stay small: seven float32 rewards of 0.1
would otherwise have advantages near 1."""


def group_advantages(rewards: np.ndarray, counted: np.ndarray, samples: int, *, baseline: str, scale: str) -> np.ndarray:
    """float32 [B]: each response's reward relative to the others of its prompt; 0 where the response does not count.

    A prompt's ``samples`` responses are neighbours. ``baseline``: 'group', R - mean (GRPO: Shao et al. 2024, 4.1.2);
    'leave_one_out', R - mean of the others (RLOO: Ahmadian et al. 2024, eq. 6), which is k / (k - 1) times that; 'none', R.
    ``scale``: 'group' divides by std + 1e-4, with Bessel's correction; otherwise nothing (Dr. GRPO: Liu et al. 2025).
    Responses that do not count (no score, say) are not part of their group. A group of equal rewards, or of one, has advantages
    of exactly 0 unless the baseline is 'none'.
    """
    groups, counts = rewards.astype(np.float64).reshape(-1, samples), counted.reshape(-1, samples)
    groups = np.where(counts, groups, 0.0)
    n = counts.sum(axis=1, keepdims=True)
    centred = groups - groups.sum(axis=1, keepdims=True) / np.maximum(n, 1)
    if baseline == "none":
        found = groups
    elif baseline == "leave_one_out":
        found = centred * n / np.maximum(n - 1, 1)
    else:
        found = centred
    if scale == "group":
        variance = np.where(counts, centred**2, 0).sum(axis=1, keepdims=True) / np.maximum(n - 1, 1)
        found = found / (np.sqrt(variance) + GROUP_EPS)
    told = counts if baseline == "none" else counts & informative(rewards, counted, samples)[:, None]
    return np.where(told, found, 0).reshape(-1).astype(np.float32)


def informative(scores: np.ndarray, counted: np.ndarray, samples: int) -> np.ndarray:
    """bool [prompts]: True if a prompt's responses have different scores. Only such a group tells better responses from worse
    (DAPO: Yu et al. 2025, section 3.2)."""
    groups, counts = scores.reshape(-1, samples), counted.reshape(-1, samples)
    high = np.where(counts, groups, -np.inf).max(axis=1)
    low = np.where(counts, groups, np.inf).min(axis=1)
    return high > low


def overlong_penalty(lengths: np.ndarray, limit: int, buffer: int) -> np.ndarray:
    """float32 [B]: 0 up to limit - buffer tokens, then falling linearly to -1 at the limit. DAPO (Yu et al. 2025), eq. 13."""
    return np.clip((limit - buffer - lengths) / buffer, -1, 0).astype(np.float32)


def turns(mask: np.ndarray) -> np.ndarray:
    """int64 [B]: the number of runs of counted tokens in each row of ``mask`` bool [B, T]: the policy's turns in an episode."""
    return mask[:, 0] + np.sum(mask[:, 1:] & ~mask[:, :-1], axis=1)


def to_go(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Σ_{i >= t} x_i over the counted tokens of a row, float32 [B, T], 0 where masked."""
    sums = np.cumsum(np.where(mask, x, 0)[:, ::-1].astype(np.float64), axis=1)[:, ::-1]
    return np.where(mask, sums, 0).astype(np.float32)


def mean_weights(mask: np.ndarray, aggregation: str, limit: int | None = None) -> np.ndarray:
    """float32 [B, T] weights of a mean over the counted tokens of a whole minibatch, so that its gradient does not depend on how
    it is cut. N is the number of responses with counted tokens; ``aggregation`` is

        token_mean      all tokens weigh alike (DAPO: Yu et al. 2025, eq. 12)
        response_mean   1 / N for each response, shared by its tokens (GRPO: Shao et al. 2024, eq. 3)
        response_sum    1 / N for each token: a response is one action (RLOO: Ahmadian et al. 2024, section 2)
        constant        1 / (N · limit) for each token (Dr. GRPO: Liu et al. 2025), where ``limit`` is the longest response that
                        may be generated, not the width of the block
    """
    lengths = mask.sum(axis=1, keepdims=True)
    responses = max(1, int((lengths > 0).sum()))
    divisors: dict[str, Any] = {
        "token_mean": max(1, int(lengths.sum())),
        "response_mean": responses * np.maximum(lengths, 1),
        "response_sum": responses,
        "constant": responses * (limit or 1),
    }
    return (mask / divisors[aggregation]).astype(np.float32)


def importance(
    old_logprobs: np.ndarray, sampler_logprobs: np.ndarray, mask: np.ndarray, *, level: str, low: float | None, high: float
) -> np.ndarray:
    """float32 [B, T]: w = π_old / π_sampler on counted tokens, 0 elsewhere. ``level``: one w per token ('token'), or one per
    response: the product ('sequence') or the geometric mean ('mean') over its tokens. Without ``low``, the result is min(w, high)
    (truncated importance sampling: Ionides 2008); with it, w, or 0 where w is outside [low, high].
    """
    log = np.where(mask, old_logprobs.astype(np.float64) - sampler_logprobs, 0)
    if level != "token":
        sums = log.sum(axis=1, keepdims=True)
        log = np.broadcast_to(sums / np.maximum(mask.sum(axis=1, keepdims=True), 1) if level == "mean" else sums, mask.shape)
    with np.errstate(over="ignore"):
        w = np.exp(log)
    kept = np.minimum(w, high) if low is None else np.where((w >= low) & (w <= high), w, 0)
    return np.where(mask, kept, 0).astype(np.float32)


def effective_share(weights: np.ndarray) -> float:
    """(Σ w)² / (n Σ w²) of n weights: the effective sample size as a share of the sample (Kish 1965). 1 for equal weights; NaN if
    all are 0."""
    w = weights.astype(np.float64)
    return float(w.sum() ** 2 / (w.size * (w**2).sum())) if w.any() else float("nan")


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


def ranks(values: Sequence[float] | np.ndarray, tie: float = 0.0) -> tuple[int, ...]:
    """Places, from 0 for the highest value. A value within ``tie`` of the next higher one shares its place."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    places = [0] * len(order)
    for above, below in pairwise(order):
        places[below] = places[above] + bool(values[above] - values[below] > tie)
    return tuple(places)


def ranking_accuracy(margins: np.ndarray) -> float:
    """The fraction of pairs in which the preferred completion scores higher; equal scores count a half."""
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))


def agreement(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    """The fraction of the pairs ordered by ``theirs`` [K] that ``ours`` [K] orders the same way; ties in ``ours`` count half.
    None if ``theirs`` orders no pair. This is the concordance index (Harrell et al. 1982, "Evaluating the yield of medical
    tests").
    """
    first, second = np.triu_indices(len(ours), 1)
    sign = np.sign(theirs[first] - theirs[second])
    product = np.sign(ours[first] - ours[second])[sign != 0] * sign[sign != 0]
    return float(np.mean((product > 0) + 0.5 * (product == 0))) if product.size else None


def brier_score(margins: np.ndarray) -> float:
    """Mean (1 - σ(margin))²: the squared error of the predicted preference (Brier 1950). Knowing nothing gives 1/4."""
    return float(np.mean((1 - sigmoid(margins)) ** 2))


def expected_calibration_error(margins: np.ndarray, bins: int = 10) -> float:
    """Σ_bin (n_bin / n) |accuracy - confidence| with confidence = σ(|margin|) in [1/2, 1], in ``bins`` bins of equal width.
    Guo et al. 2017, eq. 3, with the pair's winner as the predicted class."""
    confidence = sigmoid(np.abs(margins))
    right = (margins > 0) + 0.5 * (margins == 0)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    gap = np.bincount(index, weights=right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / count.sum())


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x) without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, np.float64)))


# ------------------------------------------------------------------------------------------- tests of several options


def prefers(logprobs: np.ndarray, answer: int, right: Sequence[int]) -> bool:
    """True if the option ``answer`` has a higher log-probability than every wrong one. TruthfulQA's MC1 (Lin et al. 2022, section
    3.2); with one right answer, plain accuracy."""
    wrong = np.delete(logprobs, right)
    return bool(logprobs[answer] > wrong.max())


def option_probabilities(logprobs: np.ndarray) -> np.ndarray:
    """float64 [K]: probabilities, normalised over the options. Their sum over the right options is TruthfulQA's MC2."""
    shifted = np.exp(np.asarray(logprobs, np.float64) - np.max(logprobs))
    return shifted / shifted.sum()


def entropy_bits(probabilities: np.ndarray) -> float:
    """-Σ p log2 p. With two options: 1 if neither is preferred, 0 if one is certain. The measure of bias on Winogender and
    CrowS-Pairs in Ouyang et al. 2022, arXiv 2203.02155, section 4.2."""
    p = probabilities[probabilities > 0]
    return float(-(p * np.log2(p)).sum())


# -------------------------------------------------------------------------------------------------------- best of n


def best_of_sizes(most: int) -> list[int]:
    """1, 2, 4, ... below ``most``, and ``most`` itself."""
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most] if most else []


def best_of(scores: np.ndarray, n: int) -> np.ndarray:
    """float64 [N]: the probability that each of N samples of a prompt is the best of n of them, drawn without replacement. So
    Σ probability · value is an unbiased estimate of the expected value of the best of n fresh samples, for every n <= N.

        C(i - 1, n - 1) / C(N, n) for the sample in place i, counted from the lowest score

    (Nakano et al. 2021, WebGPT; Gao et al. 2022, arXiv 2210.10760; Hilton & Gao 2022, "Measuring Goodhart's law"). Samples of
    equal score share their probability equally. If c scores are 1 and the others 0, Σ probability · score is pass@n =
    1 - C(N - c, n) / C(N, n) (Chen et al. 2021, arXiv 2107.03374, eq. 1).
    """
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    drawn, up_to = np.arange(n), np.append(0, np.cumsum(count))
    within = np.prod(np.maximum(up_to[:, None] - drawn, 0) / (len(scores) - drawn), axis=1)  # C(i, n) / C(N, n)
    odds: np.ndarray = (np.diff(within) / count)[place]
    return odds


def best_of_kl_bound(n: int) -> float:
    """log n - (n - 1) / n: an upper bound on KL(best of n || policy) in nats, exact where no two samples have the same score
    (Beirami et al. 2024, arXiv 2401.01879, theorem 3.1)."""
    return math.log(n) - (n - 1) / n


def best_of_kl(scores: np.ndarray, n: int) -> float:
    """KL(best of n || policy) in nats, from the scores [N] of samples of one prompt.

    Let u = F(s) be the probability of a score of at most s, and a = F(s-) that of a score below s. The best of n, with ties
    broken at random, scores s with probability u^n - a^n; the policy does with u - a. Within a level of equal scores both choose
    alike, so

        KL = Σ_s (u^n - a^n) log((u^n - a^n) / (u - a))

    (Beirami et al. 2024 give π_n; the sum over a level's responses is one term.) Where scores never repeat this is the bound,
    ∫ n u^(n-1) log(n u^(n-1)) du. The estimate takes F from the observed shares. It adds the sum's term for each level seen at
    least twice and, for each score seen once, the integral from a to u. Without ties it is the bound itself; with many it is
    the plug-in estimate.
    """
    _, count = np.unique(scores, return_counts=True)
    u = np.cumsum(count) / len(scores)
    a, once = u - count / len(scores), count == 1
    share = u**n - a**n
    level = share * np.log(np.maximum(share, 1e-300) / (u - a))
    return float(np.where(once, _best_of_integral(u, n) - _best_of_integral(a, n), level).sum())


def overoptimisation(kl: np.ndarray, gain: np.ndarray) -> tuple[float, float]:
    """α and β of gain = d (α - β d) with d = √KL, by least squares over [N] points: how the gold score of the best of n rises and
    falls as it moves away from the policy (Gao et al. 2022, arXiv 2210.10760, section 3.1, R_bon)."""
    d = np.sqrt(kl)
    (alpha, slope), *_ = np.linalg.lstsq(np.stack([d, d**2], axis=1), gain, rcond=None)
    return float(alpha), -float(slope)


def without_fall(kl: np.ndarray, gain: np.ndarray) -> float:
    """α of gain = α √KL by least squares: `overoptimisation` without a fall."""
    d = np.sqrt(kl)
    return float(d @ gain / (d @ d))


def _best_of_integral(u: np.ndarray, n: int) -> np.ndarray:
    """∫_0^u n v^(n-1) log(n v^(n-1)) dv = u^n (log n + (n - 1) (log u - 1 / n))."""
    return u**n * (math.log(n) + (n - 1) * (np.log(np.maximum(u, 1e-300)) - 1 / n))


# ------------------------------------------------------------------------------------------------------- intervals


def clustered_error(x: np.ndarray, clusters: np.ndarray | None = None) -> float:
    """The standard error of a mean over rows of which only the clusters are independent (Liang & Zeger 1986, doi
    10.1093/biomet/73.1.13): from the sums of deviations of each cluster. With a row in each it is the unbiased one; of one
    cluster it is 0.

    Args:
      x: [N].
      clusters: int [N], the cluster of each row, such as its prompt; None: each is its own.
    """
    own = np.arange(len(x)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    sums = np.bincount(own, x - x.mean())
    return float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(x)) if len(sums) > 1 else 0.0


def mean_interval(x: np.ndarray, clusters: np.ndarray | None = None, z: float = 1.96) -> tuple[float, float, float]:
    """Mean and its normal 95% interval, by `clustered_error`; the interval of a single cluster has width 0."""
    x = np.asarray(x, np.float64)
    half = z * clustered_error(x, clusters)
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def proportion_interval(x: np.ndarray, clusters: np.ndarray | None = None, z: float = 1.96) -> tuple[float, float, float]:
    """A proportion and its 95% interval by Wilson 1927, which stays inside [0, 1]. If only ``clusters`` are independent, N is the
    number of independent rows that would have the error of these (Korn & Graubard 1998), at most all. If all rows are alike, or
    in one cluster, it is the number of clusters.

    Args:
      x: [N], 1 for a success, 0 for a failure, ½ for a tie.
    """
    x = np.asarray(x, np.float64)
    n, p = float(len(x)), float(x.mean())
    if clusters is not None:
        count, alone, together = len(np.unique(clusters)), clustered_error(x), clustered_error(x, clusters)
        if not alone or count == 1:
            n = float(count)
        elif together > alone:
            n *= alone**2 / together**2
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return p, float(centre - half), float(centre + half)


def length_controlled_win_rate(wins: np.ndarray, difference: np.ndarray, z: float = 1.96) -> tuple[float, float, float] | None:
    """The win rate there would be at equal length, and its 95% interval: σ(a) of the logistic regression

        P(win) = σ(a + b tanh(d / std(d))) with d = length - length of the other response

    (Dubois et al. 2024, arXiv 2404.04475, section 3; their third term, the difficulty of an instruction, takes many policies to
    know). The fit maximises log-likelihood + ½ log |information| (Firth 1993), which has a maximum even where one side always
    wins. The interval is a's, ± z standard errors, under σ; it covers prompts, not the choice of tanh.

    Args:
      wins: float [N], 1 if won, 0 if lost, ½ for a tie.
      difference: [N], in any unit.

    Returns:
      None if the same side is longer everywhere, since nothing then shows how it fares at equal length (or if the fit does not
      converge). If lengths are equal everywhere, the win rate with half a win and half a loss more.
    """
    from scipy import optimize  # type: ignore[import-untyped]  # most runs do without

    if difference.min() > 0 or difference.max() < 0:
        return None
    columns = [np.ones(len(wins))]
    if np.any(difference):
        columns.append(np.tanh(difference / np.std(difference)))
    x = np.stack(columns, axis=1)

    def information(fit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = sigmoid(x @ fit)
        return p, (x.T * (p * (1 - p))) @ x

    def loss(fit: np.ndarray) -> float:
        logits = x @ fit
        return float((np.logaddexp(0, logits) - wins * logits).sum() - 0.5 * np.linalg.slogdet(information(fit)[1])[1])

    def slope(fit: np.ndarray) -> np.ndarray:
        p, known = information(fit)
        leverage = p * (1 - p) * np.einsum("ni,ij,nj->n", x, np.linalg.inv(known), x)
        return -(x.T @ (wins - p + leverage * (0.5 - p)))

    fit = optimize.minimize(loss, np.zeros(len(columns)), jac=slope, method="BFGS", options={"gtol": 1e-9}).x
    if not np.abs(slope(fit)).max() < 1e-5:
        return None
    covariance = np.linalg.inv(information(fit)[1])
    middle, half = fit[0], z * np.sqrt(covariance[0, 0])
    rate, low, high = (float(sigmoid(value)) for value in (middle, middle - half, middle + half))
    return rate, low, high
