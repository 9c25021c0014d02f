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
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError
from lockstep.interfaces import (
    Algorithm,
    Array,
    Context,
    DataSource,
    ForwardPass,
    Learner,
    Metrics,
    Model,
    Responses,
    ScalarModel,
    Term,
)
from lockstep.learning import losses, numerics
from lockstep.learning.optimisation import OptimizerConfig, ScheduleConfig, lr_scale
from lockstep.learning.randomness import example_indices, permutation, token_seeds
from lockstep.learning.rollout import Sampler, score, scored_only
from lockstep.text import encoding
from lockstep.text.encoding import Lengths
from lockstep.text.sequences import Sequences, chunks, in_chunks
from lockstep.text.stopping import Stops
from lockstep_rlhf.algorithms.language_modelling import NextTokenLoss, check_context, next_token_terms

log = logging.getLogger("lockstep")
MAX_LOG_RATIO = 20.0
OUTPUTS = ("logprobs", "entropy", "values")


@dataclass(frozen=True)
class PPOLoss:
    """Σ w_t [max(-A ρ, -A clip(ρ, 1 ± ε)) + c ½ max((V - R)², (clip(V, V_old ± ε_v) - R)²)], ρ = π / π_old."""

    clip_range: float
    value_clip_range: float
    value_coef: float
    outputs: ClassVar[tuple[str, ...]] = ("logprobs", "values")

    def __call__(self, xp: Any, outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        mask = batch["mask"]
        log_ratio = losses.select(xp, mask, outputs["logprobs"]) - batch["old_logprobs"]
        log_ratio = xp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)  # e^89 is inf in float32, and its gradient NaN
        values = losses.select(xp, mask, outputs["values"])
        ratio = xp.exp(log_ratio)
        advantages, old_values, returns = batch["advantages"], batch["old_values"], batch["returns"]
        policy = losses.clipped_policy_loss(xp, ratio, advantages, clip_range=self.clip_range)
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


@dataclass(frozen=True)
class Rollout:
    """A batch of episodes. [B] scores and details (of the reward model, before the rule for unfinished responses), finished;
    [B, T] old_logprobs, ref_logprobs, entropy, old_values, sampler_logprobs; ``sequences.mask`` says what counts. ``forward`` is
    the pass that the first update reuses if the whole batch is one term of it."""

    responses: Responses
    sequences: Sequences
    scores: np.ndarray
    details: Mapping[str, np.ndarray]
    finished: np.ndarray
    sampler_logprobs: np.ndarray
    old_logprobs: np.ndarray
    entropy: np.ndarray
    old_values: np.ndarray
    ref_logprobs: np.ndarray
    forward: ForwardPass | None


class PPO(Algorithm):
    produces = "policy"
    needs_reward_model = True

    @dataclass(frozen=True)
    class Config:
        """LHP is lm-human-preferences; docs/ppo.md compares what each paper did, detail by detail."""

        iterations: int = setting(60, "Batches of episodes.", least=1)
        batch_size: int = setting(64, "Episodes per iteration (InstructGPT: 512).", least=1)
        epochs: int = setting(4, "Inner passes over an iteration's episodes (LHP: 4, InstructGPT: 1).", least=1)
        minibatches: int = setting(1, "Optimizer steps per inner pass; divides batch_size.", least=1)
        micro_batch_size: int | None = setting(None, "Rows per forward and backward pass; null: the whole minibatch.", least=1)
        lengths: Lengths = setting(Lengths(), "Limits in tokens.")
        stop_strings: tuple[str, ...] = setting((), "Text that ends a response, as EOS does; or special tokens by name.")
        temperature: float = setting(
            1.0, "For sampling and all log-probabilities: PPO explores by sampling (InstructGPT: 1; LHP, N+: 0.7).", above=0
        )
        kl_coef: float = setting(0.02, "β: reward per nat of KL, per token (InstructGPT: 0.02).", least=0)
        kl_target: float | None = setting(None, "Nats per response to which β adapts (LHP); null: β is fixed.", above=0)
        kl_horizon: float = setting(10000.0, "Episodes over which β adapts (LHP).", above=0)
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
        unfinished_score: float | None = setting(
            -1.0, "Replaces the score of a response without EOS (LHP); null: keep it.", least=-math.inf
        )
        importance_cap: float | None = setting(
            None, "Cap on importance weights that correct for a sampler of lower precision; null: no correction.", above=0
        )
        ptx_coef: float = setting(0.0, "InstructGPT's γ, 27.8 there: weight of the next-token loss on raw text.", least=0)
        ptx_ratio: float = setting(8.0, "Raw texts per episode (InstructGPT).", least=0)
        optimizer: OptimizerConfig = setting(OptimizerConfig(eps=1e-5), "Adam of the policy; ε is LHP's.")
        value_optimizer: OptimizerConfig = setting(OptimizerConfig(eps=1e-5), "Adam of a separate value network.")
        schedule: ScheduleConfig = setting(ScheduleConfig("constant", 10, 0.1, 1.0), "InstructGPT's.")

        @property
        def raw_texts(self) -> int:
            """Raw texts per minibatch."""
            return round(self.ptx_ratio * self.batch_size / self.minibatches) if self.ptx_coef else 0

        def __post_init__(self):
            if self.batch_size % self.minibatches:
                fitting = [n for n in range(1, min(self.batch_size, 256) + 1) if self.batch_size % n == 0]
                raise ConfigError(
                    f"algorithm.batch_size={self.batch_size} is not divisible by algorithm.minibatches="
                    f"{self.minibatches}. Set minibatches to one of {', '.join(map(str, fitting))}."
                )
            if self.ptx_coef and not self.raw_texts:
                raise ConfigError(
                    f"algorithm.ptx_ratio={self.ptx_ratio:g} gives no raw text to a minibatch of "
                    f"{self.batch_size // self.minibatches} episodes. Raise it, or set ptx_coef=0."
                )
            if self.kl_target is not None and self.kl_coef == 0:
                raise ConfigError(
                    "algorithm.kl_target adapts the KL coefficient by factors, and algorithm.kl_coef=0 stays 0. Set "
                    "kl_coef=0.02, or kl_target=null."
                )
            lowest = numerics.MAX_KL_ERROR * self.batch_size
            if self.kl_target is not None and self.kl_horizon <= lowest:
                raise ConfigError(
                    f"algorithm.kl_horizon={self.kl_horizon:g} with batch_size={self.batch_size} may take the KL coefficient "
                    f"below 0 in one iteration. Set kl_horizon above {lowest:g}, or kl_target=null."
                )

    def __init__(self, config: Config, context: Context):
        self.config, self.context = config, context
        self.tokenizer, self.reward_model = context.tokenizer, context.reward_model
        self.sampler = Sampler(Stops(self.tokenizer, config.stop_strings), config.lengths, config.temperature)
        check_context(context.policy, config.lengths)
        prompts, fit = context.data.prompts("train"), context.fit("train prompts")
        self.prompts, self.prompt_ids = encoding.encode_prompts(self.tokenizer, prompts, config.lengths, fit)
        self.ptx_batch = config.raw_texts
        if self.ptx_batch:
            texts, fit = context.data.texts("train"), context.fit("train texts")
            self.texts = encoding.encode_texts(self.tokenizer, texts, config.lengths, fit)

        self.ref_policy = context.policy  # never trained: the learner gets a copy
        self.policy = self.ref_policy.with_value_head() if config.value_network == "shared" else self.ref_policy.copy()
        models: dict[str, Model] = {"policy": self.policy}
        if config.value_network == "separate":
            models["value"] = context.reward_model.value_network() or self.fresh_value_network()
        optimizers = {"policy": config.optimizer, "value": config.value_optimizer}
        self.learner = context.backend.learner(models, {name: optimizers[name] for name in models})
        self.loss = PPOLoss(config.clip_range, config.value_clip_range, config.value_coef)
        adaptive = config.kl_target is not None
        self.kl = (
            numerics.AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
            if adaptive
            else numerics.FixedKL(config.kl_coef)
        )
        self.total_steps = config.iterations
        self.last: Rollout | None = None

    def fresh_value_network(self) -> ScalarModel:
        """For reward models without a network that reads the policy's tokens."""
        log.info(
            "the reward model has no network that reads the policy's tokens, so the value network starts from the policy with a "
            "zero head; algorithm.value_network=shared does so at half the compute"
        )
        return self.context.policy.scalar_model(np.zeros(self.context.policy.hidden_size, np.float32))

    # ------------------------------------------------------------------------------------------- the algorithm box

    def step(self, step: int) -> Metrics:
        clock = Clock()
        rollout = self.last = self.rollout(step, clock)
        batch, metrics = self.prepare(rollout)
        scale = lr_scale(self.config.schedule, step, self.total_steps)
        updates = []
        for epoch in range(self.config.epochs):
            for number, rows in enumerate(self.minibatches(step, epoch)):
                forward = rollout.forward if epoch == 0 else None
                terms = self.terms(rollout.sequences, batch, rows, forward) + self.ptx_terms(step, epoch, number)
                updates.append(self.learner.update(terms, scale))
        clock.lap("train")
        self.kl.update(metrics["objective/kl"], self.config.batch_size)
        metrics |= {name: float(np.mean([update[name] for update in updates])) for name in updates[0]}
        return metrics | self.perf(rollout, clock) | {"lr_scale": scale}

    def rollout(self, step: int, clock: Clock) -> Rollout:
        """Sample, score, and evaluate under the policy, the reference and the value network."""
        c = self.config
        indices = example_indices(self.context.seed, "prompts", len(self.prompts), step * c.batch_size, c.batch_size)
        prompts, ids = [self.prompts[i] for i in indices], [self.prompt_ids[i] for i in indices]
        seeds = token_seeds(self.context.seed, "sampling", step, c.batch_size, c.lengths.response)
        samples = self.sampler.sample(self.policy, prompts, ids, seeds)
        clock.lap("generate")
        scores, details = score(self.reward_model, samples)
        clock.lap("score")

        # One forward pass of each model. If the whole batch is one term, the first update differentiates this same pass.
        sequences, forward = scored_only(samples.sequences, scores), None
        if c.minibatches == 1 and (c.micro_batch_size or c.batch_size) >= c.batch_size:
            forward = self.learner.forward(sequences, OUTPUTS, temperature=c.temperature)
        own = forward.outputs if forward else self.evaluate(self.learner, sequences, OUTPUTS)
        ref = self.evaluate(self.ref_policy, sequences, ["logprobs"])
        clock.lap("evaluate")
        return Rollout(
            responses=samples.responses,
            sequences=sequences,
            scores=scores,
            details=details,
            finished=samples.finished,
            sampler_logprobs=samples.logprobs,
            old_logprobs=own["logprobs"],
            entropy=own["entropy"],
            old_values=own["values"],
            ref_logprobs=ref["logprobs"],
            forward=forward,
        )

    def prepare(self, rollout: Rollout) -> tuple[dict[str, np.ndarray], Metrics]:
        """Rewards, advantages and returns: the arrays of the loss, and the metrics of the rollout."""
        c, mask = self.config, rollout.sequences.mask
        counted = mask.any(axis=1)
        kl = numerics.k1(rollout.old_logprobs, rollout.ref_logprobs, mask)
        scores = numerics.replace_unfinished(rollout.scores, rollout.finished, c.unfinished_score)
        rewards = numerics.token_rewards(scores, kl, mask, self.kl.coef)
        shaped = numerics.scale_to_unit_variance(rewards, mask) if c.whiten_rewards else rewards
        advantages, returns = numerics.gae(shaped, rollout.old_values, mask, gamma=c.gamma, lam=c.lam)
        batch = {
            "mask": mask,
            "old_logprobs": np.where(mask, rollout.old_logprobs, 0).astype(np.float32),
            "old_values": np.where(mask, rollout.old_values, 0).astype(np.float32),
            "advantages": numerics.whiten(advantages, mask) if c.whiten_advantages else advantages,
            "returns": returns,
            "importance": self.importance(rollout),
        }
        mismatch = np.abs(rollout.old_logprobs - rollout.sampler_logprobs)
        metrics = {
            "objective/score": float(rollout.scores[counted].mean()),
            "objective/score_std": float(rollout.scores[counted].std()),
            "objective/reward": float(rewards[counted].sum(axis=1).mean()),
            "objective/kl": float(kl[counted].sum(axis=1).mean()),
            "objective/k3": float(numerics.k3(rollout.old_logprobs, rollout.ref_logprobs, mask)[counted].sum(axis=1).mean()),
            "objective/entropy": numerics.masked_mean(rollout.entropy, mask),
            "objective/length": float(mask[counted].sum(axis=1).mean()),
            "objective/finished": float(rollout.finished[counted].mean()),
            "objective/dropped": float(np.sum(~counted)),
            "kl_coef": self.kl.coef,
            "value/explained_variance": numerics.explained_variance(rollout.old_values, returns, mask),
            "sampler/mismatch_max": float(mismatch[mask].max()),
            "sampler/mismatch_mean": float(mismatch[mask].mean()),
        }
        details = {f"reward_model/{name}": float(values[counted].mean()) for name, values in rollout.details.items()}
        return batch, metrics | details | self.gold(rollout)

    def minibatches(self, step: int, epoch: int) -> list[np.ndarray]:
        """Row indices of each minibatch, reshuffled for each inner epoch."""
        c = self.config
        if c.minibatches == 1:
            return [np.arange(c.batch_size)]
        order = permutation(self.context.seed, "minibatches", step * c.epochs + epoch, c.batch_size)
        return np.split(order, c.minibatches)

    def terms(
        self, sequences: Sequences, batch: Mapping[str, np.ndarray], rows: np.ndarray, forward: ForwardPass | None = None
    ) -> list[Term]:
        """One minibatch as micro-batches, each token weighing 1 / (tokens of the minibatch). ``forward``: the pass over all rows,
        if they are one term."""
        mask = batch["mask"][rows]
        weights = encoding.token_weights(mask, mask.sum())
        terms = []
        for part in chunks(len(rows), self.config.micro_batch_size):
            here = rows[part]
            arrays = {name: array[here] for name, array in batch.items() if name != "importance"}
            arrays["weights"] = weights[part]
            arrays["policy_weights"] = weights[part] * batch["importance"][here]
            terms.append(Term(self.loss, sequences.take(here), arrays, self.config.temperature, forward=forward))
        return terms

    def ptx_terms(self, step: int, epoch: int, number: int) -> list[Term]:
        """InstructGPT's pretraining gradients, added to each minibatch's: ptx_coef x next-token loss on raw text."""
        if not self.ptx_batch:
            return []
        minibatch = (step * self.config.epochs + epoch) * self.config.minibatches + number
        indices = example_indices(self.context.seed, "ptx", len(self.texts), minibatch * self.ptx_batch, self.ptx_batch)
        rows = encoding.text_block([self.texts[i] for i in indices], self.tokenizer, self.config.lengths)
        loss = NextTokenLoss(self.config.ptx_coef, "ptx/loss")
        return next_token_terms([rows], self.config.micro_batch_size, loss)

    # --------------------------------------------------------------------------------------------------- the rest

    def evaluate(self, model: Model | Learner, sequences: Sequences, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        call = lambda rows: model.evaluate(rows, outputs, temperature=self.config.temperature)  # noqa: E731
        return in_chunks(call, sequences, self.config.micro_batch_size)

    def importance(self, rollout: Rollout) -> np.ndarray:
        """[B, T] weights min(π_old / π_sampler, cap) that correct for a sampler of lower precision; 1 without a cap.
        Truncated importance sampling, Ionides 2008."""
        mask = rollout.sequences.mask
        if self.config.importance_cap is None:
            return np.ones(mask.shape, np.float32)
        log_ratio = np.where(mask, rollout.old_logprobs - rollout.sampler_logprobs, 0)
        return np.minimum(np.exp(log_ratio), self.config.importance_cap).astype(np.float32)

    def gold(self, rollout: Rollout) -> Metrics:
        """The true scores of the counted episodes, if the data source knows them: for plots, never for training."""
        episodes = zip(rollout.responses.prompts, rollout.responses.texts, rollout.sequences.mask.any(axis=1), strict=True)
        found = [self.context.data.gold(prompt, text) for prompt, text, counts in episodes if counts]
        golds = [gold for gold in found if gold is not None]
        return {f"objective/{name}": float(np.mean([g[name] for g in golds])) for name in (golds[0] if golds else ())}

    def perf(self, rollout: Rollout, clock: Clock) -> Metrics:
        tokens = float(rollout.sequences.response_mask.sum())
        seconds = {f"perf/seconds_{name}": value for name, value in clock.laps.items()}
        return seconds | {"perf/tokens_per_second": tokens / sum(clock.laps.values())}

    def samples(self) -> list[dict[str, Any]]:
        if self.last is None:
            return []
        responses, rows = self.last.responses, range(min(8, len(self.last.scores)))
        return [
            {
                "prompt": responses.prompts[i].messages[-1].content,
                "response": responses.texts[i],
                "score": float(self.last.scores[i]),
                "finished": bool(self.last.finished[i]),
            }
            for i in rows
        ]

    @classmethod
    def arithmetic(cls, config: Config, data: DataSource) -> str:
        c = config
        minibatch = c.batch_size // c.minibatches
        micro = min(c.micro_batch_size or minibatch, minibatch)
        ptx = f", + {c.raw_texts} raw texts each, from {len(data.texts('train'))}" if c.ptx_coef else ""
        return (
            f"{c.iterations} iterations x {c.batch_size} episodes = {c.iterations * c.batch_size} episodes over "
            f"{len(data.prompts('train'))} prompts; {c.epochs} epochs x {c.minibatches} minibatches of {minibatch} = "
            f"{c.epochs * c.minibatches} optimizer steps per iteration; {math.ceil(minibatch / micro)} micro-batches of "
            f"{micro}{ptx}"
        )

    def result(self) -> Model:
        return self.learner.averaged("policy")

    def state(self) -> dict[str, Any]:
        return {"kl_coef": self.kl.coef}

    def load_state(self, state: dict[str, Any]) -> None:
        self.kl.coef = state["kl_coef"]


class Clock:
    """Seconds of each phase of an iteration."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self.started = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.started
        self.started = now
