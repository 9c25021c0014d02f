"""Online learning, from the policy's own samples: what all such algorithms share.

    prompts ──sample──> responses, scores ──rollout──> log-probabilities ──prepare──> arrays of the loss ──terms──> updates

A subclass writes the algorithm box (`step`) and what its loss reads (`prepare`), and may change its models (`reference`,
`trained_policy`, `make_learner`). Everything random comes from (seed, step), and every array is [batch] or [batch, time] on the
host.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError
from lockstep.interfaces import (
    Algorithm,
    Context,
    DataSource,
    ForwardPass,
    Learner,
    Loss,
    Metrics,
    Model,
    Policy,
    Responses,
    Term,
    Traits,
)
from lockstep.learning import numerics
from lockstep.learning.episodes import offered
from lockstep.learning.optimisation import OptimizerConfig, ScheduleConfig, lr_scale
from lockstep.learning.randomness import example_indices, permutation, token_seeds
from lockstep.learning.rollout import Sampler, Samples, mark_failed, score, scored_only
from lockstep.learning.served import Served
from lockstep.text import encoding
from lockstep.text.encoding import Lengths
from lockstep.text.sequences import Sequences, chunks, in_chunks
from lockstep.text.stopping import Stops
from lockstep.types import Prompt

log = logging.getLogger("lockstep")

Scored = tuple[Samples, np.ndarray, Mapping[str, np.ndarray]]
"""Samples, their scores and the reward model's details, as `lockstep.learning.rollout.score` returns them."""


@dataclass(frozen=True)
class OnlineConfig:
    """The settings that online algorithms share. LHP is lm-human-preferences."""

    iterations: int = setting(60, "Batches of episodes.", least=1)
    batch_size: int = setting(64, "Prompts per iteration (InstructGPT: 512).", least=1)
    samples: int = setting(1, "Responses per prompt; episodes = batch_size x samples.", least=1)
    epochs: int = setting(1, "Inner passes over an iteration's episodes (LHP: 4, InstructGPT: 1).", least=1)
    minibatches: int = setting(1, "Optimizer steps per inner pass; divides the episodes.", least=1)
    micro_batch_size: int | None = setting(None, "Rows per forward and backward pass; null: the whole minibatch.", least=1)
    lengths: Lengths = setting(Lengths(), "Limits in tokens.")
    stop_strings: tuple[str, ...] = setting((), "Text that ends a response, as EOS does; or special tokens by name.")
    temperature: float = setting(
        1.0, "For sampling and all log-probabilities: policies explore by sampling (InstructGPT: 1; LHP, N+: 0.7).", above=0
    )
    kl_coef: float | None = setting(
        0.02,
        "β: the cost of a nat of KL to the reference (InstructGPT: 0.02); 0: KL is only measured; null: no reference.",
        least=0,
    )
    unfinished_score: float | None = setting(
        -1.0, "Replaces the score of a response without EOS (LHP); null: keep it.", least=-math.inf
    )
    optimizer: OptimizerConfig = setting(OptimizerConfig(eps=1e-5), "Adam of the policy; ε is LHP's.")
    schedule: ScheduleConfig = setting(ScheduleConfig("constant", 10, 0.1, 1.0), "InstructGPT's.")

    @property
    def episodes(self) -> int:
        """Episodes per iteration."""
        return self.batch_size * self.samples

    @property
    def trained(self) -> int:
        """Rows per inner pass: all episodes, unless an algorithm selects some."""
        return self.episodes

    def __post_init__(self) -> None:
        if self.trained % self.minibatches:
            fitting = [n for n in range(1, min(self.trained, 256) + 1) if self.trained % n == 0]
            what = "algorithm.batch_size" + (" x algorithm.samples" if self.trained > self.batch_size else "")
            raise ConfigError(
                f"{what}={self.trained} is not divisible by algorithm.minibatches={self.minibatches}. Set minibatches to one of "
                f"{', '.join(map(str, fitting))}."
            )


@dataclass(frozen=True)
class Rollout:
    """A batch of episodes.

    [B]: finished, and the reward model's scores and details, before the rule for unfinished responses. Without a reward model,
    scores are 0 and details empty. [B, T]: old_logprobs, entropy, sampler_logprobs, ref_logprobs (None without a reference),
    old_values (None without a value function). ``sequences.mask`` marks the tokens that count. ``forward`` is the forward pass
    that the first update reuses if the whole batch is one term of it."""

    responses: Responses
    sequences: Sequences
    scores: np.ndarray
    details: Mapping[str, np.ndarray]
    finished: np.ndarray
    sampler_logprobs: np.ndarray
    old_logprobs: np.ndarray
    entropy: np.ndarray
    old_values: np.ndarray | None
    ref_logprobs: np.ndarray | None
    forward: ForwardPass | None

    @property
    def counted(self) -> np.ndarray:
        """bool [B]: True for episodes that count."""
        return np.any(self.sequences.mask, axis=1)

    @property
    def kl(self) -> np.ndarray:
        """float32 [B, T]: log π - log π_ref of each token; 0 where it does not count, or without a reference."""
        ref = self.old_logprobs if self.ref_logprobs is None else self.ref_logprobs
        return numerics.k1(self.old_logprobs, ref, self.sequences.mask)


class Online(Algorithm):
    produces = "policy"
    needs_reward_model = True
    takes_environment = True
    outputs: tuple[str, ...] = ("logprobs", "entropy")
    """The outputs that a rollout evaluates under the trained models."""

    loss: Loss

    def __init__(self, config: Any, context: Context):
        self.config, self.context = config, context
        self.tokenizer = context.tokenizer
        self.reward_model: Any = context.reward_model  # an experiment has one if the class needs it
        stops = Stops(self.tokenizer, config.stop_strings)
        around, engine = context.environment, context.engine
        self.sampler = Sampler(stops, config.lengths, config.temperature, environment=around, engine=engine)
        self.ahead: Served | None = engine if engine is not None and engine.ahead else None
        if self.ahead is not None:
            self.check_ahead()
        config.lengths.check(context.policy.context_length)
        prompts, fit = offered(context.environment, context.data.prompts("train")), context.fit("train prompts")
        self.prompts, self.prompt_ids = encoding.encode_prompts(self.tokenizer, prompts, config.lengths, fit)
        self.ref_policy = self.reference()
        self.policy = self.trained_policy()
        self.learner = self.make_learner()
        self.total_steps = config.iterations
        self.last: Rollout | None = None

    def reference(self) -> Policy | None:
        """The reference policy of the KL, which is never trained; None without one."""
        return None if self.config.kl_coef is None else self.context.policy

    def trained_policy(self) -> Policy:
        """The policy to train: a copy if the given policy is the reference."""
        return self.context.policy.copy() if self.ref_policy is self.context.policy else self.context.policy

    def make_learner(self) -> Learner:
        """Make the learner of ``self.policy`` and of whatever else is trained."""
        return self.context.backend.learner({"policy": self.policy}, {"policy": self.config.optimizer})

    def check_ahead(self) -> None:
        """Check that ``engine.ahead`` suits the algorithm.

        Raises:
          ConfigError: its samples cannot be drawn one step ahead.
        """
        if self.context.environment is not None:
            raise ConfigError("engine.ahead draws single responses, without an environment. Set engine.ahead=false.")
        if self.traits(self.config).rounds > 1:
            raise ConfigError(
                "engine.ahead needs to know the next step's prompts, which extra_rounds decides. Set engine.ahead=false, or "
                "algorithm.extra_rounds=0."
            )

    # ---------------------------------------------------------------------------------------------------- one batch

    def sample(self, step: int, clock: Clock) -> Scored:
        """Sample ``samples`` responses to each of the step's prompts, and score them."""
        size = self.config.batch_size
        return self.responses(step * size, size, self.seeds(step), clock)

    def seeds(self, step: int, stream: str = "sampling") -> np.ndarray:
        """uint32 [B, T]: the seed of each token in a step's episodes."""
        return token_seeds(self.context.seed, stream, step, self.config.episodes, self.config.lengths.response)

    def responses(self, first: int, count: int, seeds: np.ndarray, clock: Clock) -> Scored:
        """Sample and score responses to ``count`` prompts, from position ``first`` of the endless shuffled stream of prompts."""
        prompts, ids = self.prompts_at(first, count)
        samples = self.sampler.sample(self.policy, prompts, ids, seeds)
        clock.lap("generate")
        if self.reward_model is None:
            return samples, mark_failed(np.zeros(len(seeds), np.float32), samples), {}
        scores, details = score(self.reward_model, samples)
        clock.lap("score")
        return samples, scores, details

    def prompts_at(self, first: int, count: int) -> tuple[list[Prompt], list[list[int]]]:
        """``count`` prompts and their ids, from position ``first`` of the endless shuffled stream of prompts."""
        indices = example_indices(self.context.seed, "prompts", len(self.prompts), first, count)
        return [self.prompts[i] for i in indices], [self.prompt_ids[i] for i in indices]

    def begin(self, step: int) -> None:
        """Let the engine start drawing a step's responses with the current weights."""
        size = self.config.batch_size
        self.sampler.begin(self.policy, self.prompts_at(step * size, size)[1], self.seeds(step))

    def rollout(self, step: int, clock: Clock) -> Rollout:
        """Sample, score, and evaluate under the trained models and the reference.

        One step ahead (``engine.ahead``), the policy of the previous step (the behaviour policy) draws the responses. The old
        log-probabilities, values and KL are those of the current policy (the proximal policy). So PPO's ratio and clip refer to
        the proximal policy, and `Corrected` weights by its ratio to the behaviour policy: the decoupled objective of Hilton et
        al. 2021 (arXiv 2110.00641) and of AReaL (Fu et al. 2025, arXiv 2505.24298)."""
        c = self.config
        samples, scores, details = self.sample(step, clock)
        if self.ahead is not None and step + 1 < self.total_steps:
            self.begin(step + 1)
            clock.lap("hand_over")
        # One forward pass of each model. If the whole batch is one term, the first update differentiates this same pass.
        sequences, forward = scored_only(samples.sequences, scores), None
        if c.minibatches == 1 and c.trained == c.episodes <= (c.micro_batch_size or c.episodes):
            forward = self.learner.forward(sequences, self.outputs, temperature=c.temperature)
        own = forward.outputs if forward else self.evaluate(self.learner, sequences, self.outputs)
        ref = self.evaluate(self.ref_policy, sequences, ["logprobs"])["logprobs"] if self.ref_policy else None
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
            old_values=own.get("values"),
            ref_logprobs=ref,
            forward=forward,
        )

    def evaluate(self, model: Model | Learner, sequences: Sequences, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        call = lambda rows: model.evaluate(rows, outputs, temperature=self.config.temperature)  # noqa: E731
        return in_chunks(call, sequences, self.config.micro_batch_size)

    def scores(self, rollout: Rollout) -> np.ndarray:
        """float32 [B]: the scores after the rule for unfinished responses."""
        return numerics.replace_unfinished(rollout.scores, rollout.finished, self.config.unfinished_score)

    # ------------------------------------------------------------------------------------------------------- updates

    def train(
        self, step: int, sequences: Sequences, batch: Mapping[str, np.ndarray], forward: ForwardPass | None = None
    ) -> Metrics:
        """Take one optimizer step for each minibatch of each inner epoch, unless the whole batch has nothing to learn from.
        ``batch``: the arrays that the loss reads, of the same rows. ``forward``: the rollout's pass over them, for the first
        epoch. Returns the mean of the updates' metrics, without minibatches of which nothing counts."""
        scale, counted = lr_scale(self.config.schedule, step, self.total_steps), self.counted(batch)
        updates = []
        for number, (epoch, rows) in enumerate(self.passes(step)):
            extra = self.extra_terms(step, number)
            if not (counted.any() or extra):
                continue
            terms = self.terms(sequences, batch, rows, forward if epoch == 0 else None)
            update = self.learner.update(terms + extra, scale)
            if counted[rows].any() or extra:
                updates.append(update)
        return means(updates) | {"lr_scale": scale}

    def counted(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """bool [rows]: True for the rows of ``batch`` that the loss learns from."""
        found: np.ndarray = np.any(batch["mask"], axis=1)
        return found

    def extra_terms(self, step: int, number: int) -> list[Term]:
        """Terms to add to the minibatch's in update ``number`` of a step; none by default."""
        return []

    def passes(self, step: int) -> list[tuple[int, np.ndarray]]:
        """(inner epoch, row indices) of each update of a step."""
        return [(epoch, rows) for epoch in range(self.config.epochs) for rows in self.minibatches(step, epoch)]

    def minibatches(self, step: int, epoch: int) -> list[np.ndarray]:
        """Row indices of each minibatch, reshuffled for each inner epoch."""
        c = self.config
        if c.minibatches == 1:
            return [np.arange(c.trained)]
        order = permutation(self.context.seed, "minibatches", step * c.epochs + epoch, c.trained)
        return np.split(order, c.minibatches)

    def terms(
        self, sequences: Sequences, batch: Mapping[str, np.ndarray], rows: np.ndarray, forward: ForwardPass | None = None
    ) -> list[Term]:
        """Split one minibatch into micro-batches. ``forward``: the pass over all rows, if they are one term."""
        read = self.arrays({name: array[rows] for name, array in batch.items()})
        return [
            Term(
                self.loss,
                sequences.take(rows[part]),
                {name: array[part] for name, array in read.items()},
                self.config.temperature,
                forward=forward,
            )
            for part in chunks(len(rows), self.config.micro_batch_size)
        ]

    def arrays(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays that the loss reads for a minibatch: ``batch``, and its `weights`."""
        return {**batch, **self.weights(batch)}

    def weights(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The [B, T] weights of a minibatch: ``weights``, equal for all counted tokens."""
        return {"weights": numerics.mean_weights(batch["mask"], "token_mean")}

    # ------------------------------------------------------------------------------------------------------- records

    def objective(self, rollout: Rollout) -> Metrics:
        """The metrics logged for every rollout; docs/metrics.md defines them."""
        counted, mask = rollout.counted, rollout.sequences.mask
        mismatch = np.abs(rollout.old_logprobs - rollout.sampler_logprobs)[mask]
        metrics = {
            "objective/entropy": numerics.masked_mean(rollout.entropy, mask),
            "objective/length": float(mask[counted].sum(axis=1).mean()),
            "objective/finished": float(rollout.finished[counted].mean()),
            "objective/dropped": float(np.sum(~counted)),
            "sampler/mismatch_max": float(mismatch.max()),
            "sampler/mismatch_mean": float(mismatch.mean()),
        }
        if self.ahead is not None:
            metrics["sampler/steps_behind"] = float(self.ahead.behind)
        if self.reward_model is not None:
            metrics["objective/score"] = float(rollout.scores[counted].mean())
            metrics["objective/score_std"] = float(rollout.scores[counted].std())
        if rollout.ref_logprobs is not None:
            k3 = numerics.k3(rollout.old_logprobs, rollout.ref_logprobs, mask)
            metrics["objective/kl"] = float(rollout.kl[counted].sum(axis=1).mean())
            metrics["objective/k3"] = float(k3[counted].sum(axis=1).mean())
        if (rewards := rollout.responses.rewards) is not None:
            metrics["environment/reward"] = float(rewards[counted].mean())
            metrics["environment/turns"] = float(numerics.turns(mask)[counted].mean())
        details = {
            f"reward_model/{name}": numerics.masked_mean(values, np.isfinite(values)) for name, values in rollout.details.items()
        }
        return metrics | details | self.gold(rollout)

    def gold(self, rollout: Rollout) -> Metrics:
        """The mean true scores of the counted episodes, if the data source knows them: for plots, never for training."""
        episodes = zip(rollout.responses.prompts, rollout.responses.texts, rollout.counted, strict=True)
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
        engine = self.sampler.engine
        by = {} if engine is None or engine.drawn_by is None else {"drawn_by": engine.drawn_by[:12]}
        conversing = responses.rewards is not None
        return [
            {
                "prompt": "\n".join(m.content for m in responses.prompts[i].messages[0 if conversing else -1 :]),
                "response": responses.texts[i],
                "score": None if self.reward_model is None else float(self.last.scores[i]),
                "finished": bool(self.last.finished[i]),
                **by,
            }
            for i in rows
        ]

    @classmethod
    def traits(cls, config: Any) -> Traits:
        """The defaults: KL in the reward, and neither a group baseline nor a clip. A subclass changes what differs."""
        c = config
        kl: Any = "none" if c.kl_coef is None else "reward" if c.kl_coef else "measured"
        return Traits(data="prompts", samples=c.samples, epochs="episodes", updates=c.epochs * c.minibatches, kl=kl)

    @classmethod
    def arithmetic(cls, config: Any, data: DataSource) -> str:
        c = config
        minibatch = c.trained // c.minibatches
        micro = min(c.micro_batch_size or minibatch, minibatch)
        batch = f"{c.batch_size} prompts x {c.samples} responses" if c.samples > 1 else f"{c.batch_size} episodes"
        return (
            f"{c.iterations} iterations x {batch} = {c.iterations * c.episodes} episodes over "
            f"{len(data.prompts('train'))} prompts; {c.epochs} epochs x {c.minibatches} minibatches of {minibatch} = "
            f"{c.epochs * c.minibatches} optimizer steps per iteration; micro-batches of {micro}"
        )

    def result(self) -> Policy:
        trained: Policy = self.learner.averaged("policy")  # type: ignore[assignment]  # the model of this name is one
        return trained


# ------------------------------------------------------------------------------------------- a sampler that differs


READ_BY = {"level": ("truncate", "mask"), "low": ("mask",), "high": ("truncate", "mask")}
"""The kinds of correction that read a setting; with any other kind, a setting that differs from its default is an error."""


@dataclass(frozen=True)
class CorrectionConfig:
    """Importance weights for a sampler that differs from the trained policy (another precision, another engine):
    w = π_old / π_sampler, per token or, per response, the product or geometric mean over its tokens.

    'truncate': min(w, high), truncated importance sampling (Ionides 2008). 'mask': w where low <= w <= high; elsewhere 0, and
    the token or response leaves the mean (IcePop, arXiv 2510.18855, with ``level: token``).
    """

    kind: Literal["none", "truncate", "mask"] = setting("none", "What to do with w out of bounds; none: all weights are 1.")
    level: Literal["token", "sequence", "mean"] = setting("token", "Weights per token; or per response: product, geometric mean.")
    low: float = setting(0.5, "Lower bound of 'mask'.", least=0)
    high: float = setting(2.0, "Upper bound.", above=0)

    def __post_init__(self) -> None:
        for field in fields(self):
            readers = READ_BY.get(field.name, (self.kind,))
            if self.kind not in readers and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"algorithm.correction.{field.name} has no effect on kind={self.kind}. Set it to {field.default}, or kind to "
                    f"{' or '.join(readers)}."
                )


@dataclass(frozen=True)
class CorrectedConfig(OnlineConfig):
    correction: CorrectionConfig = setting(CorrectionConfig(), "Importance weights for a sampler that differs from the policy.")


class Corrected(Online):
    """Base class for per-token losses, where importance weights can correct for the sampler. `prepare` adds ``correction`` to the
    loss's arrays; the loss reads ``policy_weights`` in its place."""

    def check_ahead(self) -> None:
        super().check_ahead()
        if self.config.correction.kind == "none":
            log.warning(
                "engine.ahead: responses are drawn by the policy of one step before, and no correction weighs them. "
                "algorithm.correction.kind=truncate does."
            )

    def correction(self, rollout: Rollout) -> np.ndarray:
        """float32 [B, T]: importance weights for a sampler that differs from the policy; all 1 if no correction is configured."""
        c, mask = self.config.correction, rollout.sequences.mask
        if c.kind == "none":
            return np.ones(mask.shape, np.float32)
        low = c.low if c.kind == "mask" else None
        return numerics.importance(rollout.old_logprobs, rollout.sampler_logprobs, mask, level=c.level, low=low, high=c.high)

    def arrays(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = super().arrays(batch)
        del found["correction"]
        return found

    def weights(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Adds ``policy_weights``, with the correction. Rejected tokens leave the mean."""
        used = batch["mask"] & (batch["correction"] > 0)
        return super().weights(batch) | {"policy_weights": numerics.mean_weights(used, "token_mean") * batch["correction"]}

    def objective(self, rollout: Rollout) -> Metrics:
        found = super().objective(rollout)
        if self.config.correction.kind == "none":
            return found
        w = self.correction(rollout)[rollout.sequences.mask]
        return found | {
            "sampler/weight_mean": float(w.mean()),
            "sampler/weight_max": float(w.max()),
            "sampler/rejected": float((w == 0).mean()),
            "sampler/effective_share": numerics.effective_share(w),
        }


def means(updates: Sequence[Metrics]) -> Metrics:
    """The mean of each metric over the updates of a step; none without updates."""
    return {name: float(np.mean([update[name] for update in updates])) for name in (updates[0] if updates else ())}


class Clock:
    """Seconds of each phase of an iteration."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.started = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.started
        self.started = now
