"""PPO against a reward model, with the KL penalty in the reward and InstructGPT's pretraining mix.

One iteration (`PPO.step`), after Ziegler et al. 2019, Stiennon et al. 2020 and Ouyang et al. 2022 (step 3):

    sample responses y ~ π(. | x) at temperature T
    score them with the reward model; r_t = -β (log π - log π_ref), plus the score on the last token
    advantages and returns by GAE; whiten the advantages over the whole batch
    for each inner epoch, for each minibatch: one optimizer step on
        clipped policy loss + value_coef · clipped value loss (+ ptx_coef · next-token loss on raw text)

Comments name the source of each detail; ``docs/ppo.md`` lists them all. Unlike most implementations, the old log-probabilities
are recomputed with the training graph instead of taken from the sampler, so that the ratio is 1 before the first step. The
sampler's error is logged as ``sampler/mismatch_*``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError
from lockstep.interfaces import Array, Context, DataSource, Learner, Metrics, Policy, ScalarModel, Term, Traits
from lockstep.learning import losses, numerics
from lockstep.learning.online import Clock, Corrected, CorrectedConfig, Rollout
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.learning.randomness import example_indices
from lockstep.text import encoding
from lockstep_rlhf.algorithms.language_modelling import NextTokenLoss, next_token_terms

log = logging.getLogger("lockstep")


@dataclass(frozen=True)
class PPOLoss:
    """Σ w_t [max(-A ρ, -A clip(ρ, 1 ± ε)) + c ½ max((V - R)², (clip(V, V_old ± ε_v) - R)²)], ρ = π / π_old."""

    clip_range: float
    value_clip_range: float
    value_coef: float
    outputs: ClassVar[tuple[str, ...]] = ("logprobs", "values")

    def __call__(self, xp: Any, outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        mask = batch["mask"]
        log_ratio = losses.log_ratio(xp, losses.select(xp, mask, outputs["logprobs"]), batch["old_logprobs"])
        values = losses.select(xp, mask, outputs["values"])
        ratio = xp.exp(log_ratio)
        advantages, old_values, returns = batch["advantages"], batch["old_values"], batch["returns"]
        policy = losses.clipped_policy_loss(xp, ratio, advantages, low=self.clip_range, high=self.clip_range)
        value = losses.clipped_value_loss(xp, values, old_values, returns, clip_range=self.value_clip_range)
        mean = lambda x: losses.weighted_sum(xp, xp.astype(x, ratio.dtype), batch["weights"])  # noqa: E731
        policy_loss = losses.weighted_sum(xp, policy, batch["policy_weights"])
        value_loss = mean(value)
        return policy_loss + self.value_coef * value_loss, {
            "policy/loss": policy_loss,
            "policy/approx_kl": mean(0.5 * log_ratio**2),
            "policy/clip_fraction": mean(policy > -advantages * ratio),  # where clipping binds, as LHP counts
            "value/loss": value_loss,
            "value/clip_fraction": mean(value > 0.5 * (values - returns) ** 2),
        }


class PPO(Corrected):
    outputs = ("logprobs", "entropy", "values")

    @dataclass(frozen=True)
    class Config(CorrectedConfig):
        """LHP is lm-human-preferences; docs/ppo.md compares what each paper did, detail by detail."""

        epochs: int = setting(4, "Inner passes over an iteration's episodes (LHP: 4, InstructGPT: 1).", least=1)
        kl_coef: float = setting(0.02, "β: reward per nat of KL, per token (InstructGPT: 0.02).", least=0)
        kl_target: float | None = setting(None, "KL in nats per response to which β adapts (LHP); null: β is fixed.", above=0)
        kl_horizon: float = setting(10000.0, "Episodes over which β adapts (LHP).", above=0)
        reference: Literal["initial", "average"] = setting(
            "initial", "What the KL is to: the initial policy, or the moving average of optimizer.ema_decay (Xu et al. 2024)."
        )
        gamma: float = setting(1.0, "Discount per token (LHP, InstructGPT: none).", least=0, most=1)
        lam: float = setting(0.95, "λ of GAE per token (LHP; Schulman et al. 2016).", least=0, most=1)
        clip_range: float = setting(0.2, "ε: the ratio of policies is clipped to 1 ± ε (InstructGPT, LHP).", above=0)
        value_clip_range: float = setting(0.2, "Values are clipped to the old ones ± this (LHP).", above=0)
        value_coef: float = setting(0.1, "Weight of the value loss (LHP).", least=0)
        value_network: Literal["separate", "shared"] = setting(
            "separate", "A network started from the reward model (InstructGPT), or a zero head on the policy's trunk (LHP)."
        )
        whiten_advantages: bool = setting(True, "Scale to mean 0 and variance 1 over the whole batch (LHP: per minibatch).")
        whiten_rewards: bool = setting(False, "Scale to variance 1 over the batch and keep the mean (LHP: true, N+: false).")
        ptx_coef: float = setting(0.0, "InstructGPT's γ, 27.8 there: weight of the next-token loss on raw text.", least=0)
        ptx_ratio: float = setting(8.0, "Raw texts per episode (InstructGPT).", least=0)
        value_optimizer: OptimizerConfig = setting(OptimizerConfig(eps=1e-5), "Adam of a separate value network.")

        @property
        def raw_texts(self) -> int:
            """Raw texts per minibatch."""
            return round(self.ptx_ratio * self.episodes / self.minibatches) if self.ptx_coef else 0

        def __post_init__(self):
            super().__post_init__()
            if self.ptx_coef and not self.raw_texts:
                raise ConfigError(
                    f"algorithm.ptx_ratio={self.ptx_ratio:g} gives no raw text to a minibatch of "
                    f"{self.episodes // self.minibatches} episodes. Raise it, or set ptx_coef=0."
                )
            if self.reference == "average" and self.optimizer.ema_decay is None:
                raise ConfigError(
                    "algorithm.reference=average is the moving average of the policy, and algorithm.optimizer.ema_decay=null "
                    "keeps none. Set ema_decay=0.99, or reference=initial."
                )
            if self.value_optimizer.ema_decay is not None:
                raise ConfigError(
                    "algorithm.value_optimizer.ema_decay has no effect: the result is the policy, and nothing reads an average "
                    "of the value network. Set it to null; algorithm.optimizer.ema_decay averages the policy."
                )
            if self.kl_target is not None and self.kl_coef == 0:
                raise ConfigError(
                    "algorithm.kl_target adapts the KL coefficient by factors, and algorithm.kl_coef=0 stays 0. Set "
                    "kl_coef=0.02, or kl_target=null."
                )
            lowest = numerics.MAX_KL_ERROR * self.episodes
            if self.kl_target is not None and self.kl_horizon <= lowest:
                raise ConfigError(
                    f"algorithm.kl_horizon={self.kl_horizon:g} with {self.episodes} episodes may take the KL coefficient "
                    f"below 0 in one iteration. Set kl_horizon above {lowest:g}, or kl_target=null."
                )

    def __init__(self, config: Config, context: Context):
        super().__init__(config, context)
        if config.raw_texts:
            texts, fit = context.data.texts("train"), context.fit("train texts")
            self.texts = encoding.encode_texts(self.tokenizer, texts, config.lengths, fit)
        self.loss = PPOLoss(config.clip_range, config.value_clip_range, config.value_coef)
        self.kl: numerics.FixedKL | numerics.AdaptiveKL = numerics.FixedKL(config.kl_coef)
        if config.kl_target is not None:
            self.kl = numerics.AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)

    def reference(self) -> Policy | None:
        return super().reference() if self.config.reference == "initial" else None  # an average is taken before each step

    def trained_policy(self) -> Policy:
        shared = self.config.value_network == "shared"
        return self.context.policy.with_value_head() if shared else super().trained_policy()

    def make_learner(self) -> Learner:
        if self.config.value_network == "shared":
            return super().make_learner()
        value = self.reward_model.value_network() or self.fresh_value_network()
        self.config.lengths.check(value.context_length, "value network")
        optimizers = {"policy": self.config.optimizer, "value": self.config.value_optimizer}
        return self.context.backend.learner({"policy": self.policy, "value": value}, optimizers)

    def fresh_value_network(self) -> ScalarModel:
        """The policy with a zero head: for reward models without a network that reads the policy's tokens."""
        log.info(
            "the reward model has no network that reads the policy's tokens, so the value network starts from the policy with a "
            "zero head; algorithm.value_network=shared does so at half the compute"
        )
        return self.context.policy.scalar_model(np.zeros(self.context.policy.hidden_size, np.float32))

    # ------------------------------------------------------------------------------------------- the algorithm box

    def step(self, step: int) -> Metrics:
        clock = Clock()
        if self.config.reference == "average":
            self.ref_policy = self.result()  # the average so far
        rollout = self.last = self.rollout(step, clock)
        batch, metrics = self.prepare(rollout)
        trained = self.train(step, rollout.sequences, batch, rollout.forward)
        clock.lap("train")
        self.kl.update(metrics["objective/kl"], self.config.episodes)
        return metrics | trained | self.perf(rollout, clock)

    def prepare(self, rollout: Rollout) -> tuple[dict[str, np.ndarray], Metrics]:
        """Rewards, advantages and returns: the arrays of the loss, and the metrics of the rollout."""
        c, mask, counted = self.config, rollout.sequences.mask, rollout.counted
        rewards = numerics.token_rewards(self.scores(rollout), rollout.kl, mask, self.kl.coef)
        shaped = numerics.scale_to_unit_variance(rewards, mask) if c.whiten_rewards else rewards
        advantages, returns = numerics.gae(shaped, rollout.old_values, mask, gamma=c.gamma, lam=c.lam)
        batch = {
            "mask": mask,
            "old_logprobs": np.where(mask, rollout.old_logprobs, 0).astype(np.float32),
            "old_values": np.where(mask, rollout.old_values, 0).astype(np.float32),
            "advantages": numerics.whiten(advantages, mask) if c.whiten_advantages else advantages,
            "returns": returns,
            "correction": self.correction(rollout),
        }
        return batch, self.objective(rollout) | {
            "objective/reward": float(rewards[counted].sum(axis=1).mean()),
            "kl_coef": self.kl.coef,
            "value/explained_variance": numerics.explained_variance(rollout.old_values, returns, mask),
        }

    def extra_terms(self, step: int, number: int) -> list[Term]:
        """InstructGPT's pretraining gradients (PPO-ptx) for each minibatch: ptx_coef x next-token loss on raw text."""
        c = self.config
        if not c.raw_texts:
            return []
        first = (step * c.epochs * c.minibatches + number) * c.raw_texts
        indices = example_indices(self.context.seed, "ptx", len(self.texts), first, c.raw_texts)
        rows = encoding.text_block([self.texts[i] for i in indices], self.tokenizer, c.lengths)
        return next_token_terms([rows], c.micro_batch_size, NextTokenLoss(c.ptx_coef, "ptx/loss"))

    @classmethod
    def traits(cls, config: Config) -> Traits:
        return replace(super().traits(config), clip="ratio", bounds=(1 - config.clip_range, 1 + config.clip_range))

    @classmethod
    def arithmetic(cls, config: Config, data: DataSource) -> str:
        ptx = f", + {config.raw_texts} raw texts each, from {len(data.texts('train'))}" if config.ptx_coef else ""
        return super().arithmetic(config, data) + ptx

    def state(self) -> dict[str, Any]:
        return {"kl_coef": self.kl.coef}

    def load_state(self, state: dict[str, Any]) -> None:
        self.kl.coef = state["kl_coef"]
