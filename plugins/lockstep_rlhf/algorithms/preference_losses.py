"""The losses of preference methods, over the log-probabilities of completions. Beside each formula is its source.

With h(y) = log π(y | x) - log π_ref(y | x), the sum or the mean over the tokens of a completion, β h is the implicit reward. Rows
are completions, K for each of N prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lockstep.interfaces import Array
from lockstep.learning import losses

NOTHING = -1e4
"""The utility of a missing completion: finite, and below that of any real one."""

TIE = 1e-5
"""Two completions tie if their h differ by at most this many nats for each token of both. While the policy is the reference, h is
the rounding error of two float32 passes, which is smaller."""


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss(ABC):
    """What all of them share: h, the metrics, and ``nll_coef`` times the next-token loss of the best completions. It reads the
    rows' ``mask``, ``ref`` and ``lengths``, and `preference_arrays`."""

    beta: float
    mean: bool = False
    nll_coef: float = 0.0
    outputs: ClassVar[tuple[str, ...]] = ("logprobs",)

    @abstractmethod
    def of(self, xp: Any, h: Array, batch: Mapping[str, Array]) -> Array:
        """The loss from h [R]."""

    def arrays(self, ranks: np.ndarray, real: np.ndarray, prompts: int) -> dict[str, np.ndarray]:
        """What `of` reads besides `preference_arrays`. ``ranks`` [N, K], 0 the best; ``real`` bool [N, K], False where a prompt
        has fewer completions; ``prompts``: number of prompts in the whole update."""
        return {}

    def __call__(self, xp: Any, outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        logprobs = losses.select(xp, batch["mask"], outputs["logprobs"])
        sums = xp.sum(logprobs, axis=1) - batch["ref"]
        h = sums / batch["lengths"] if self.mean else sums
        loss = self.of(xp, h, batch)
        rewards = grid(xp, self.beta * h, batch)
        margins = rewards[:, :, None] - rewards[:, None, :]
        ties = xp.reshape(self.beta * TIE * (xp.ones_like(h) if self.mean else batch["lengths"]), rewards.shape)
        ties = ties[:, :, None] + ties[:, None, :]
        right = xp.astype(margins > ties, margins.dtype) + 0.5 * xp.astype(xp.abs(margins) <= ties, margins.dtype)
        metrics = {
            "preference/loss": loss,
            "preference/accuracy": losses.weighted_sum(xp, right, batch["pairs"]),
            "preference/margin": losses.weighted_sum(xp, margins, batch["pairs"]),
            "preference/chosen": xp.sum(self.beta * h * batch["best"]),
            "preference/rejected": xp.sum(self.beta * h * batch["worst"]),
        }
        if not self.nll_coef:
            return loss, metrics
        nll = losses.weighted_sum(xp, -logprobs, batch["nll_weights"])
        return loss + self.nll_coef * nll, metrics | {"preference/nll": nll}


@dataclass(frozen=True, kw_only=True)
class PairLoss(PreferenceLoss):
    """Σ_n Σ_ab w_nab f(u_na - u_nb) over pairs a > b of the completions of prompt n, where u is h, or o for orpo. With
    m = β (h_a - h_b):

    dpo     f = -log σ(m)                             Rafailov et al. 2023, eq. 7; with smoothing ε, Mitchell's cDPO:
                                                      -(1 - ε) log σ(m) - ε log σ(-m)
    robust  [-(1 - ε) log σ(m) + ε log σ(-m)] / (1 - 2 ε)     Chowdhury et al. 2024, eq. 12
    hinge   max(0, 1 - m)                             Zhao et al. 2023 (SLiC), Liu et al. 2024 (RSO)
    ipo     (h_a - h_b - 1 / (2 β))²                  Azar et al. 2023, eq. 17, where β is called τ
    simpo   -log σ(β (p_a - p_b) - γ)                 Meng et al. 2024, eq. 6; p is the mean log-probability
    orpo    -β log σ(o_a - o_b), o = p - log(1 - e^p) Hong et al. 2024, eq. 6 and 7, where β is called λ
    """

    kind: str = "dpo"
    smoothing: float = 0.0
    margin: float = 0.0

    def of(self, xp: Any, h: Array, batch: Mapping[str, Array]) -> Array:
        u = grid(xp, losses.log_odds(xp, h) if self.kind == "orpo" else h, batch)
        return losses.weighted_sum(xp, self.of_difference(xp, u[:, :, None] - u[:, None, :]), batch["pairs"])

    def of_difference(self, xp: Any, d: Array) -> Array:
        """f(d), elementwise."""
        if self.kind == "ipo":
            return (d - 1 / (2 * self.beta)) ** 2
        if self.kind == "hinge":
            return xp.maximum(1 - self.beta * d, xp.zeros_like(d))
        if self.kind == "orpo":
            return self.beta * losses.softplus(xp, -d)
        if self.kind == "simpo":
            return losses.softplus(xp, self.margin - self.beta * d)
        right, wrong = losses.softplus(xp, -self.beta * d), losses.softplus(xp, self.beta * d)
        if self.kind == "robust":
            return ((1 - self.smoothing) * right - self.smoothing * wrong) / (1 - 2 * self.smoothing)
        return (1 - self.smoothing) * right + self.smoothing * wrong if self.smoothing else right


@dataclass(frozen=True, kw_only=True)
class PlackettLuceLoss(PreferenceLoss):
    """K completions as one ranking: -Σ_k log softmax(β h over k, .., K)_k (Rafailov et al. 2023, eq. 20)."""

    def of(self, xp: Any, h: Array, batch: Mapping[str, Array]) -> Array:
        rankings = losses.plackett_luce(xp, grid(xp, self.beta * h, batch), batch["real"])
        return losses.weighted_sum(xp, rankings, batch["rankings"])

    def arrays(self, ranks: np.ndarray, real: np.ndarray, prompts: int) -> dict[str, np.ndarray]:
        return {"rankings": (np.any(real, axis=1) / prompts).astype(np.float32)}


@dataclass(frozen=True, kw_only=True)
class KTOLoss(PreferenceLoss):
    """λ σ(-s β (h - z)) of each completion by itself, s = 1 for the best and -1 for the others (Ethayarajh et al. 2024, eq. 8).
    λ is `desirable` for the best and `undesirable` for the others, divided by the prompt's number of completions. It also reads
    ``z`` [R], the estimate of KL that the algorithm makes."""

    desirable: float = 1.0
    undesirable: float = 1.0

    def of(self, xp: Any, h: Array, batch: Mapping[str, Array]) -> Array:
        return xp.sum(batch["kto"] * losses.sigmoid(xp, -batch["sign"] * self.beta * (h - batch["z"])))

    def arrays(self, ranks: np.ndarray, real: np.ndarray, prompts: int) -> dict[str, np.ndarray]:
        good = real & (ranks == ranks[:, :1])
        counts = np.maximum(real.sum(axis=1), 1)[:, None]
        weights = np.where(good, self.desirable, self.undesirable) * real / counts / prompts
        sign = np.where(good, 1, -1)
        return {name: x.reshape(-1).astype(np.float32) for name, x in (("sign", sign), ("kto", weights))}


def grid(xp: Any, u: Array, batch: Mapping[str, Array]) -> Array:
    """[R] utilities -> [N, K], a row per prompt; `NOTHING` where there is no completion."""
    real = batch["real"]
    return losses.select(xp, real, xp.reshape(u, real.shape)) + xp.where(real, 0.0, NOTHING)


def preference_arrays(pairs: np.ndarray, real: np.ndarray, prompts: int) -> dict[str, np.ndarray]:
    """The arrays from which a `PreferenceLoss` reads how completions compare.

    Args:
      pairs: [N, K, K], the weight of preferring completion i of a prompt to completion j. Over the whole update the weights sum
        to 1, or to less where ties are left out.
      real: bool [N, K], False where a prompt has fewer completions. Completion k of prompt n is row n · K + k.
      prompts: number of prompts in the whole update.
    """
    wins, defeats = np.any(pairs > 0, axis=2), np.any(pairs > 0, axis=1)
    best, worst = wins & ~defeats, defeats & ~wins
    first = best & (np.cumsum(best, axis=1) == 1)
    last = worst & (np.cumsum(worst[:, ::-1], axis=1)[:, ::-1] == 1)
    flat = {name: (rows / prompts).reshape(-1).astype(np.float32) for name, rows in (("best", first), ("worst", last))}
    return {"real": real, "pairs": pairs.astype(np.float32), **flat}
