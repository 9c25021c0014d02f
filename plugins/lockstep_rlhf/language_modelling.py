"""Next-token prediction: pretraining on raw text, and supervised fine-tuning on demonstrations.

InstructGPT (Ouyang et al. 2022), step 1. The loss counts the response's tokens, its EOS included; ``prompt_loss`` counts
the prompt's too, as "The N+ Implementation Details of RLHF with PPO" does. A fraction ``pretrain_mix`` of each SFT batch
may be raw text (InstructGPT's PPO initialisation: 10%).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lockstep import encoding, losses
from lockstep.encoding import Example, Lengths
from lockstep.errors import ConfigError, MissingData
from lockstep.interfaces import Algorithm, Array, DataSource, Metrics, Policy, Setting, Term
from lockstep.optimisation import OptimizerConfig, ScheduleConfig, lr_scale
from lockstep.randomness import example_indices
from lockstep.sequences import Sequences, chunks, in_chunks


@dataclass(frozen=True)
class NextTokenLoss:
    """L = -coef Σ w_t log π(x_t | x_<t), with w = 1 / n over the minibatch's n counted tokens. ``metric`` names the
    unscaled loss in the log where it is one term of several."""

    coef: float = 1.0
    metric: str | None = None
    outputs: ClassVar[tuple[str, ...]] = ("logprobs",)

    def __call__(
        self, xp: Any, outputs: Mapping[str, Array], batch: Mapping[str, Array]
    ) -> tuple[Array, dict[str, Array]]:
        loss = losses.weighted_sum(xp, -outputs["logprobs"], batch["weights"])
        return self.coef * loss, {self.metric: loss} if self.metric else {}


class LanguageModelling(Algorithm):
    """What both have in common; `Pretraining` and `SFT` say which examples."""

    produces = "policy"

    def __init__(self, config: Any, setting: Setting):
        self.config, self.setting = config, setting
        self.tokenizer = setting.tokenizer
        self.policy: Policy = setting.policy
        self.examples = self.load("train")
        self.heldout = self.load("heldout", config.heldout_examples)
        self.learner = setting.backend.learner({"policy": self.policy}, {"policy": config.optimizer})
        self.total_steps = steps(config, len(self.examples))
        check_context(self.policy, config.lengths)

    def load(self, split: str, limit: int | None = None) -> list[Example]:
        raise NotImplementedError

    def batch(self, step: int) -> list[Example]:
        size = self.config.batch_size
        indices = example_indices(self.setting.seed, "order", len(self.examples), step * size, size)
        return [self.examples[i] for i in indices]

    def block(self, examples: Sequence[Example]) -> Sequences:
        return encoding.block(examples, self.tokenizer, self.config.lengths)

    def step(self, step: int) -> Metrics:
        before = {"heldout/loss": self.heldout_loss()} if step == 0 else {}
        scale = lr_scale(self.config.schedule, step, self.total_steps)
        rows = self.block(self.batch(step))
        terms = next_token_terms(rows, self.config.micro_batch_size, NextTokenLoss())
        metrics = self.learner.update(terms, scale)
        return before | metrics | {"perplexity": math.exp(min(metrics["loss"], 50)), "lr_scale": scale}

    def finish(self) -> Metrics:
        return {"heldout/loss": self.heldout_loss()}

    def heldout_loss(self) -> float:
        """Mean negative log-likelihood per counted token, in nats, over the held-out examples."""
        if not self.heldout:
            return float("nan")
        rows = self.block(self.heldout)
        size = self.config.micro_batch_size or self.config.batch_size
        out = in_chunks(lambda part: self.policy.evaluate(part, ["logprobs"]), rows, size)
        return float(-np.mean(out["logprobs"][rows.mask], dtype=np.float64))

    @classmethod
    def count(cls, data: DataSource) -> int:
        raise NotImplementedError

    @classmethod
    def arithmetic(cls, config: Any, data: DataSource) -> str:
        examples, size = cls.count(data), config.batch_size
        micro = min(config.micro_batch_size or size, size)
        return (
            f"{examples} examples x {config.epochs:g} epochs / {size} per step = {steps(config, examples)} steps; "
            f"{math.ceil(size / micro)} micro-batches of {micro}"
        )

    def result(self) -> Policy:
        return self.learner.averaged("policy")


class Pretraining(LanguageModelling):
    """On the data source's raw texts."""

    @dataclass(frozen=True)
    class Config:
        epochs: float
        batch_size: int
        micro_batch_size: int | None
        lengths: Lengths
        heldout_examples: int
        optimizer: OptimizerConfig
        schedule: ScheduleConfig

    @classmethod
    def count(cls, data: DataSource) -> int:
        return len(data.texts("train"))

    def load(self, split: str, limit: int | None = None) -> list[Example]:
        texts = self.setting.data.texts(split)
        return encoding.encode_texts(self.tokenizer, texts[:limit], self.config.lengths)


class SFT(LanguageModelling):
    """On demonstrations, with raw text mixed in if asked for."""

    @dataclass(frozen=True)
    class Config:
        epochs: float
        batch_size: int
        micro_batch_size: int | None
        lengths: Lengths
        prompt_loss: bool
        pretrain_mix: float
        heldout_examples: int
        optimizer: OptimizerConfig
        schedule: ScheduleConfig

        def __post_init__(self):
            if not 0 <= self.pretrain_mix < 1:
                raise ConfigError(f"pretrain_mix={self.pretrain_mix} must be a fraction of the batch, 0 <= mix < 1.")

    def __init__(self, config: Config, setting: Setting):
        super().__init__(config, setting)
        self.mixed = round(config.pretrain_mix * config.batch_size)
        if self.mixed:
            self.texts = encoding.encode_texts(self.tokenizer, setting.data.texts("train"), config.lengths)

    @classmethod
    def count(cls, data: DataSource) -> int:
        return len(data.demonstrations("train"))

    def load(self, split: str, limit: int | None = None) -> list[Example]:
        try:
            demonstrations = self.setting.data.demonstrations(split)
        except MissingData:
            if split == "train":
                raise
            return []
        return encoding.encode_demonstrations(self.tokenizer, demonstrations[:limit], self.config.lengths)

    def batch(self, step: int) -> list[Example]:
        examples = super().batch(step)
        if not self.mixed:
            return examples
        raw = example_indices(self.setting.seed, "mix", len(self.texts), step * self.mixed, self.mixed)
        return examples[: len(examples) - self.mixed] + [self.texts[i] for i in raw]

    def block(self, examples: Sequence[Example]) -> Sequences:
        return encoding.block(examples, self.tokenizer, self.config.lengths, prompt_loss=self.config.prompt_loss)


def next_token_terms(rows: Sequences, micro_batch_size: int | None, loss: NextTokenLoss) -> list[Term]:
    """The minibatch's mean next-token loss, as one term per micro-batch."""
    weights = encoding.token_weights(rows.mask)
    return [Term(loss, rows.take(part), {"weights": weights[part]}) for part in chunks(rows.rows, micro_batch_size)]


def steps(config: Any, examples: int) -> int:
    """Optimizer steps for ``epochs`` passes, at least one; the last batch runs into the next pass."""
    return max(1, math.ceil(config.epochs * examples / config.batch_size))


def check_context(policy: Policy, lengths: Lengths) -> None:
    if lengths.prompt + lengths.response > policy.context_length:
        raise ConfigError(
            f"lengths.prompt + lengths.response = {lengths.prompt} + {lengths.response} exceeds the policy's context of "
            f"{policy.context_length} tokens. Lower them, or set policy.context_length."
        )
