"""Policy gradients without a value network: GRPO and its relatives, as one algorithm with configurable parts.

One iteration (`PolicyGradient.step`):

    sample k responses to each prompt and score them
    advantage of a response: its score against the others of its prompt, or of the batch
    for each inner epoch, for each minibatch: one optimizer step on the mean over tokens of
        policy loss of (ratio, advantage) + β · KL

The published methods differ in the baseline and scale of advantages, the ratio and its clipping, the place of the KL penalty and
what the loss is averaged over. ``conf/algorithm`` has a file for each method (grpo, dr_grpo, rloo, reinforce_pp, dapo, cispo,
gspo) with its equation; ``docs/algorithms.md`` compares them.

Old log-probabilities are recomputed with the training graph, as in PPO, so the first update of a batch has a ratio of exactly 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError, told
from lockstep.interfaces import Array, Context, Metrics, Traits
from lockstep.learning import losses, numerics
from lockstep.learning.online import Clock, Corrected, CorrectedConfig, Rollout, Scored
from lockstep.learning.rollout import concatenate


@dataclass(frozen=True)
class PolicyGradientLoss:
    """Σ w_t L(ρ_t, A_t) + β Σ u_t KL_t, with ρ = π / π_old of a token or, with ``sequence``, the geometric mean over a response:
    s = exp(1/|y| Σ_t log ρ_t) (GSPO: Zheng et al. 2025, eq. 7). ``kl`` is None without a penalty in the loss."""

    clip: str
    low: float
    high: float
    dual: float | None
    sequence: bool
    kl: str | None
    kl_coef: float
    outputs: ClassVar[tuple[str, ...]] = ("logprobs",)

    def __call__(self, xp: Any, outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        mask, advantages = batch["mask"], batch["advantages"]
        logprobs = losses.select(xp, mask, outputs["logprobs"])
        log_ratio = losses.log_ratio(xp, logprobs, batch["old_logprobs"])
        if self.sequence:
            log_ratio = xp.zeros_like(log_ratio) + xp.sum(log_ratio * batch["shares"], axis=1)[:, None]
        ratio = xp.exp(log_ratio)
        unclipped = -advantages * ratio
        if self.clip == "weight":
            policy = losses.clipped_weight_loss(xp, log_ratio, advantages, low=self.low, high=self.high)
            clipped = (ratio < self.low) | (ratio > self.high)
        elif self.clip == "ratio":
            policy = losses.clipped_policy_loss(xp, ratio, advantages, low=self.low, high=self.high, dual=self.dual)
            clipped = policy != unclipped
        else:
            policy, clipped = unclipped, mask & ~mask
        loss = losses.weighted_sum(xp, policy, batch["policy_weights"])
        mean = lambda x: losses.weighted_sum(xp, xp.astype(x, ratio.dtype), batch["weights"])  # noqa: E731
        metrics = {"policy/loss": loss, "policy/approx_kl": mean(0.5 * log_ratio**2), "policy/clip_fraction": mean(clipped)}
        if self.kl is None:
            return loss, metrics
        kl = losses.kl_estimate(xp, self.kl, losses.log_ratio(xp, logprobs, batch["ref_logprobs"]))
        penalty = losses.weighted_sum(xp, kl, batch["kl_weights"])
        return loss + self.kl_coef * penalty, metrics | {"policy/kl_loss": penalty}


class PolicyGradient(Corrected):
    @dataclass(frozen=True)
    class Config(CorrectedConfig):
        """The defaults are GRPO's (Shao et al. 2024), except that sizes suit the miniature and there is no reference."""

        batch_size: int = setting(8, "Prompts per iteration.", least=1)
        samples: int = setting(8, "k: responses per prompt (GRPO: 64).", least=1)
        kl_coef: float | None = setting(None, "β: cost per nat of KL; 0: KL is only measured; null: no reference.", least=0)
        unfinished_score: float | None = setting(
            None, "Replaces the score of a response without EOS; null: keep it.", least=-math.inf
        )
        baseline: Literal["group", "leave_one_out", "none"] = setting(
            "group", "Subtracted from a score: the mean of its prompt's scores; of the prompt's other scores (RLOO); nothing."
        )
        scale: Literal["none", "group", "batch"] = setting(
            "group",
            "Advantages are divided by nothing (Dr. GRPO), by the group's deviation, or whitened over the batch's tokens.",
        )
        ratio: Literal["token", "sequence"] = setting("token", "π / π_old of each token; or one for the response (GSPO).")
        clip: Literal["ratio", "weight", "none"] = setting(
            "ratio", "PPO's clip of the ratio; CISPO's clip of the detached weight to [clip_low, clip_high]; or none."
        )
        clip_low: float = setting(0.2, "The ratio is clipped to at least 1 - this; 'weight': to at least this.", least=0)
        clip_high: float = setting(0.2, "The ratio is clipped to at most 1 + this (DAPO: 0.28); 'weight': to this.", above=0)
        dual_clip: float | None = setting(None, "Bound of the ratio where the advantage is negative; null: none.", above=1)
        aggregation: Literal["token_mean", "response_mean", "response_sum", "constant"] = setting(
            "response_mean", "How the loss is averaged; `lockstep.learning.numerics.mean_weights` has the formulas."
        )
        kl_in: Literal["loss", "reward", "return"] = setting(
            "loss", "Where KL enters: a term of the loss; subtracted from scores (RLOO) or each token's return (REINFORCE++)."
        )
        kl_estimator: Literal["k1", "k2", "k3"] = setting("k3", "Estimator of KL in the loss (GRPO: k3); elsewhere it is k1.")
        extra_rounds: int = setting(
            0, "Dynamic sampling (DAPO): prompts whose scores are all equal are replaced, up to this many times.", least=0
        )
        overlong_buffer: int | None = setting(
            None, "Tokens before the limit over which a penalty grows from 0 to 1 (DAPO, eq. 13); null: none.", least=1
        )
        mask_unfinished: bool = setting(False, "Whether to leave responses without EOS out of the loss and the baseline.")

        def __post_init__(self):
            super().__post_init__()
            if self.samples == 1 and self.baseline != "none":
                raise ConfigError(
                    f"algorithm.baseline={self.baseline} compares the responses to a prompt, and algorithm.samples=1 gives one. "
                    "Set samples=8, or baseline=none scale=batch."
                )
            if self.baseline == "none" and self.scale == "group":
                raise ConfigError(
                    "algorithm.scale=group divides by the deviation of a prompt's scores around their mean, which baseline=none "
                    "does not subtract: equal scores would have advantages in the thousands. Set scale=batch, or scale=none."
                )
            if self.samples == 1 and self.extra_rounds:
                raise ConfigError(
                    "algorithm.extra_rounds replaces prompts whose responses have equal scores, and samples=1 gives one "
                    "response. Set extra_rounds=0."
                )
            bounds = {each.name: each.default for each in fields(self) if each.name in ("clip_low", "clip_high")}
            if self.clip == "none" and any(getattr(self, name) != usual for name, usual in bounds.items()):
                said = " ".join(f"{name}={usual:g}" for name, usual in bounds.items())
                raise ConfigError(f"algorithm.clip_low and clip_high have no effect on clip=none. Set {said}, or clip=ratio.")
            if self.clip == "weight" and not self.clip_low < 1 < self.clip_high:
                raise ConfigError(
                    "algorithm.clip=weight clips the ratio itself, to [clip_low, clip_high]. "
                    f"[{self.clip_low:g}, {self.clip_high:g}] leaves out 1. CISPO has clip_low=0 clip_high=5."
                )
            if self.dual_clip is not None and self.clip != "ratio":
                raise ConfigError(f"algorithm.dual_clip has no effect on clip={self.clip}. Set it to null, or clip=ratio.")
            if self.kl_in != "loss" and self.kl_coef is None:
                raise ConfigError(
                    f"algorithm.kl_in={self.kl_in} has no effect on kl_coef=null, which measures no KL. Set kl_in=loss, or "
                    "kl_coef=0.03."
                )
            if self.kl_estimator != "k3" and self.kl_in != "loss":
                raise ConfigError(f"algorithm.kl_estimator has no effect on kl_in={self.kl_in}. Set it to k3, or kl_in=loss.")
            if self.overlong_buffer and self.overlong_buffer >= self.lengths.response:
                raise ConfigError(
                    f"algorithm.overlong_buffer={self.overlong_buffer} must be below lengths.response={self.lengths.response}."
                )

        @property
        def penalised(self) -> bool:
            """Whether KL is a term of the loss."""
            return self.kl_in == "loss" and bool(self.kl_coef)

        def make_loss(self) -> PolicyGradientLoss:
            kl = self.kl_estimator if self.penalised else None
            sequence = self.ratio == "sequence"
            return PolicyGradientLoss(self.clip, self.clip_low, self.clip_high, self.dual_clip, sequence, kl, self.kl_coef or 0.0)

    def __init__(self, config: Config, context: Context):
        super().__init__(config, context)
        self.loss = config.make_loss()
        self.drawn = 0
        """Prompts drawn so far. Dynamic sampling draws as many as it needs, so their number differs between steps."""

    # ------------------------------------------------------------------------------------------- the algorithm box

    def step(self, step: int) -> Metrics:
        clock = Clock()
        rollout = self.last = self.rollout(step, clock)
        batch, metrics = self.prepare(rollout)
        trained = self.train(step, rollout.sequences, batch, rollout.forward)
        clock.lap("train")
        return metrics | trained | self.perf(rollout, clock)

    def prepare(self, rollout: Rollout) -> tuple[dict[str, np.ndarray], Metrics]:
        """The arrays of the loss, advantages among them, and the metrics of the rollout."""
        c, mask = self.config, rollout.sequences.mask
        if c.mask_unfinished:
            mask = mask & rollout.finished[:, None]
        counted, kl = np.any(mask, axis=1), rollout.kl
        rewards = self.scores(rollout)
        if c.overlong_buffer:
            lengths = rollout.sequences.mask.sum(axis=1)  # the policy's own tokens only
            rewards = rewards + numerics.overlong_penalty(lengths, c.lengths.response, c.overlong_buffer)
        beta = c.kl_coef or 0.0
        if c.kl_in == "reward":
            rewards = rewards - beta * kl.sum(axis=1)
        advantages = self.advantages(rewards, counted)
        if np.shape(advantages) != rewards.shape:
            what = f"an array {advantages.shape}" if isinstance(advantages, np.ndarray) else told(advantages)
            raise ValueError(
                f"{type(self).__name__}.advantages gave {what} for rewards {rewards.shape}: it needs one number for each response"
            )
        advantages = np.where(mask, advantages[:, None], 0).astype(np.float32)
        if c.kl_in == "return":
            advantages = advantages - beta * numerics.to_go(kl, mask)
        if c.scale == "batch" and mask.any():
            advantages = numerics.whiten(advantages, mask)
        batch = {
            "mask": mask,
            "old_logprobs": np.where(mask, rollout.old_logprobs, 0).astype(np.float32),
            "advantages": advantages,
            "correction": np.where(mask, self.correction(rollout), 0).astype(np.float32),
        }
        if c.penalised and rollout.ref_logprobs is not None:
            batch["ref_logprobs"] = np.where(mask, rollout.ref_logprobs, 0).astype(np.float32)
        metrics = self.objective(rollout)
        if c.samples > 1:
            informative = numerics.informative(rollout.scores, counted, c.samples)
            metrics |= {"group/informative": float(informative.mean()), "group/prompts_drawn": float(self.drawn)}
        if c.kl_in != "loss" and c.kl_coef is not None:
            total = rewards if c.kl_in == "reward" else rewards - beta * kl.sum(axis=1)
            metrics |= {"objective/reward": float(total[rollout.counted].mean()), "kl_coef": beta}
        return batch, metrics

    def advantages(self, rewards: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """float32 [B] from rewards [B]. A prompt's ``samples`` responses are neighbours. Responses that do not count are left out
        of their group, and their rewards may be NaN. Override this for a method of your own."""
        return numerics.group_advantages(
            rewards, counted, self.config.samples, baseline=self.config.baseline, scale=self.config.scale
        )

    def sample(self, step: int, clock: Clock) -> Scored:
        """``samples`` responses to each of ``batch_size`` prompts. With dynamic sampling (DAPO, section 3.2), prompts whose
        responses all have the same score are replaced by the next prompts, until the batch is full or ``extra_rounds`` are used
        up. The reward model's own scores are compared: shaping must not make a group look informative."""
        c, kept = self.config, np.zeros(0, bool)
        rounds: list[Scored] = []
        for number in range(1 + c.extra_rounds):
            seeds = self.seeds(step, f"sampling {number}" if number else "sampling")
            rounds.append(self.responses(self.drawn, c.batch_size, seeds, clock))
            self.drawn += c.batch_size
            _, scores, _ = rounds[-1]
            kept = np.append(kept, numerics.informative(scores, np.isfinite(scores), c.samples))
            if kept.sum() >= c.batch_size:
                break
        if len(rounds) == 1:
            return rounds[0]
        groups = np.argsort(~kept, kind="stable")[: c.batch_size]  # informative ones first, in the order drawn
        rows = (groups[:, None] * c.samples + np.arange(c.samples)).reshape(-1)
        samples = concatenate([samples for samples, _, _ in rounds]).take(rows)
        scores = np.concatenate([scores for _, scores, _ in rounds])[rows]
        details = {name: np.concatenate([found[name] for _, _, found in rounds])[rows] for name in rounds[0][2]}
        return samples, scores, details

    def weights(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        c, mask = self.config, batch["mask"]
        used = mask & (batch["correction"] > 0)
        limit = c.lengths.response
        found = {
            "weights": numerics.mean_weights(mask, "token_mean"),
            "policy_weights": numerics.mean_weights(used, c.aggregation, limit) * batch["correction"],
        }
        if c.ratio == "sequence":
            found["shares"] = (mask / np.maximum(mask.sum(axis=1, keepdims=True), 1)).astype(np.float32)
        if c.penalised:
            found["kl_weights"] = numerics.mean_weights(mask, c.aggregation, limit)
        return found

    @classmethod
    def traits(cls, config: Config) -> Traits:
        c, online = config, super().traits(config)
        low, high = (c.clip_low, c.clip_high) if c.clip == "weight" else (1 - c.clip_low, 1 + c.clip_high)
        return replace(
            online,
            rounds=1 + c.extra_rounds,
            compares=c.samples > 1 and c.baseline != "none",
            kl=c.kl_in if c.kl_coef else online.kl,
            clip=c.clip,
            bounds=(low, high) if c.clip != "none" else online.bounds,
        )

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]
