"""Next-token prediction: pretraining on raw text, and supervised fine-tuning on demonstrations.

InstructGPT (Ouyang et al. 2022), step 1. The loss counts the response's tokens, its EOS included; ``prompt_loss`` counts
the prompt's too, as "The N+ Implementation Details of RLHF with PPO" does. A fraction ``pretrain_mix`` of each SFT batch
may be raw text (InstructGPT's PPO initialisation: 10%), and ``dropout`` on the residual branches may be on in SFT
(InstructGPT: 0.2) and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from lockstep.errors import ConfigError, MissingData
from lockstep.interfaces import Algorithm, Array, DataSource, Dropout, Metrics, Policy, Setting, Term
from lockstep.learning import losses
from lockstep.learning.optimisation import OptimizerConfig, ScheduleConfig, lr_scale
from lockstep.learning.randomness import example_indices, token_seeds
from lockstep.text import encoding
from lockstep.text.encoding import Example, Lengths
from lockstep.text.sequences import Sequences, chunks, in_chunks


@dataclass(frozen=True)
class NextTokenLoss:
    """L = -coef Σ w_t log π(x_t | x_<t), with w = 1 / n over the minibatch's n counted tokens. ``metric`` names the
    unscaled loss in the log where it is one term of several."""

    coef: float = 1.0
    metric: str | None = None
    outputs: ClassVar[tuple[str, ...]] = ("logprobs",)

    def __call__(self, xp: Any, outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
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
        self.total_steps = self.steps(config, len(self.examples))
        check_context(self.policy, config.lengths)

    def load(self, split: str, limit: int | None = None) -> list[Example]:
        raise NotImplementedError

    def block(self, examples: Sequence[Example]) -> Sequences:
        """Each example in a row of its own."""
        raise NotImplementedError

    def packed(self, examples: Sequence[Example]) -> Sequences:
        """Several examples in a row."""
        c = self.config
        prompt_loss = getattr(c, "prompt_loss", False)
        return encoding.packed_block(
            examples, self.tokenizer, c.lengths, prompt_loss=prompt_loss, rows_multiple=c.micro_batch_size
        )

    def batch(self, step: int) -> list[Example]:
        size = self.per_step(self.config)
        indices = example_indices(self.setting.seed, "order", len(self.examples), step * size, size)
        return [self.examples[i] for i in indices]

    def blocks(self, step: int) -> list[Sequences]:
        """The rows of one optimizer step."""
        return [(self.packed if self.config.packing else self.block)(self.batch(step))]

    def step(self, step: int) -> Metrics:
        before = {"heldout/loss": self.heldout_loss(self.policy)} if step == 0 else {}
        scale = lr_scale(self.config.schedule, step, self.total_steps)
        terms = self.terms(step)
        metrics = self.learner.update(terms, scale)
        if self.config.packing:
            metrics["rows"] = float(sum(term.sequences.rows for term in terms))
        return before | metrics | {"perplexity": math.exp(min(metrics["loss"], 50)), "lr_scale": scale}

    def terms(self, step: int) -> list[Term]:
        return next_token_terms(self.blocks(step), self.config.micro_batch_size, NextTokenLoss())

    def finish(self) -> Metrics:
        return {"heldout/loss": self.heldout_loss(self.result())}

    def heldout_loss(self, policy: Policy) -> float:
        """Mean negative log-likelihood per counted token, in nats, over the held-out examples."""
        if not self.heldout:
            return float("nan")
        rows = self.block(self.heldout)
        size = self.config.micro_batch_size or self.config.batch_size
        out = in_chunks(lambda part: policy.evaluate(part, ["logprobs"]), rows, size)
        return float(-np.mean(out["logprobs"][rows.mask], dtype=np.float64))

    @classmethod
    def count(cls, data: DataSource) -> int:
        """How many examples there are to learn from."""
        raise NotImplementedError

    @classmethod
    def per_step(cls, config: Any) -> int:
        """How many of them one step consumes."""
        return config.batch_size

    @classmethod
    def steps(cls, config: Any, examples: int) -> int:
        return steps(config.epochs, examples, cls.per_step(config))

    @classmethod
    def arithmetic(cls, config: Any, data: DataSource) -> str:
        examples, size = cls.count(data), cls.per_step(config)
        raw = f" and {config.batch_size - size} raw texts" if size < config.batch_size else ""
        batch = f"{examples} examples x {config.epochs:g} epochs / {size}{raw} per step = {cls.steps(config, examples)} steps"
        if config.packing:
            columns, micro = config.lengths.prompt + config.lengths.response, config.micro_batch_size
            return f"{batch}, packed into rows of {columns} tokens; micro-batches of {f'{micro} rows' if micro else 'all rows'}"
        return f"{batch}; micro-batches of {min(config.micro_batch_size or config.batch_size, config.batch_size)}"

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
        packing: bool
        heldout_examples: int
        optimizer: OptimizerConfig
        schedule: ScheduleConfig

    @classmethod
    def count(cls, data: DataSource) -> int:
        return len(data.texts("train"))

    def load(self, split: str, limit: int | None = None) -> list[Example]:
        texts = self.setting.data.texts(split)
        fit = self.setting.fit(f"{split} texts")
        return encoding.encode_texts(self.tokenizer, texts[:limit], self.config.lengths, fit)

    def block(self, examples: Sequence[Example]) -> Sequences:
        return encoding.text_block(examples, self.tokenizer, self.config.lengths)


class SFT(LanguageModelling):
    """On demonstrations, with raw text mixed in if asked for."""

    @dataclass(frozen=True)
    class Config:
        epochs: float
        batch_size: int
        micro_batch_size: int | None
        lengths: Lengths
        packing: bool
        assistant_turns: Literal["all", "last"]
        prompt_loss: bool
        pretrain_mix: float
        dropout: float
        heldout_examples: int
        optimizer: OptimizerConfig
        schedule: ScheduleConfig

        def __post_init__(self):
            if not 0 <= self.dropout < 1:
                raise ConfigError(f"sft.dropout={self.dropout:g} should be a rate, 0 <= dropout < 1.")
            if not 0 <= self.pretrain_mix < 1 or round(self.pretrain_mix * self.batch_size) >= self.batch_size:
                raise ConfigError(
                    f"sft.pretrain_mix={self.pretrain_mix:g} of batch_size={self.batch_size} leaves no demonstration in "
                    "a batch. Set a fraction 0 <= pretrain_mix < 1."
                )
            if self.packing and self.dropout:
                raise ConfigError(
                    f"sft.packing=true does not go with sft.dropout={self.dropout:g}: dropout is drawn by row and position, so "
                    "the examples of one row would share it. Set packing=false or dropout=0."
                )

    def __init__(self, config: Config, setting: Setting):
        super().__init__(config, setting)
        self.raw = config.batch_size - self.per_step(config)
        self.texts: list[Example] = []
        if self.raw:
            texts, fit = setting.data.texts("train"), setting.fit("train texts")
            self.texts = encoding.encode_texts(self.tokenizer, texts, config.lengths, fit)

    @classmethod
    def count(cls, data: DataSource) -> int:
        return len(data.demonstrations("train"))

    @classmethod
    def per_step(cls, config: Config) -> int:
        return config.batch_size - round(config.pretrain_mix * config.batch_size)

    def load(self, split: str, limit: int | None = None) -> list[Example]:
        try:
            demonstrations = self.setting.data.demonstrations(split)
        except MissingData:
            if split == "train":
                raise
            return []
        every_turn, fit = self.config.assistant_turns == "all", self.setting.fit(f"{split} demonstrations")
        demonstrations = demonstrations[:limit]
        return encoding.encode_demonstrations(self.tokenizer, demonstrations, self.config.lengths, fit, every_turn=every_turn)

    def block(self, examples: Sequence[Example]) -> Sequences:
        return encoding.block(examples, self.tokenizer, self.config.lengths, prompt_loss=self.config.prompt_loss)

    def blocks(self, step: int) -> list[Sequences]:
        if not self.raw:
            return super().blocks(step)
        indices = example_indices(self.setting.seed, "mix", len(self.texts), step * self.raw, self.raw)
        texts = [self.texts[i] for i in indices]
        if self.config.packing:
            return [self.packed([*self.batch(step), *texts])]
        return [*super().blocks(step), encoding.text_block(texts, self.tokenizer, self.config.lengths)]

    def terms(self, step: int) -> list[Term]:
        terms = super().terms(step)
        if not self.config.dropout:
            return terms
        seeds = token_seeds(self.setting.seed, "dropout", step, sum(term.sequences.rows for term in terms), 1)[:, 0]
        cuts = np.split(seeds, np.cumsum([term.sequences.rows for term in terms])[:-1])
        rate = self.config.dropout
        return [replace(term, dropout=Dropout(rate, rows)) for term, rows in zip(terms, cuts, strict=True)]


def next_token_terms(blocks: Sequence[Sequences], micro_batch_size: int | None, loss: NextTokenLoss) -> list[Term]:
    """The mean next-token loss over all counted tokens of all blocks, as one term per micro-batch."""
    total = sum(int(rows.mask.sum()) for rows in blocks)
    return [
        Term(loss, rows.take(part), {"weights": encoding.token_weights(rows.mask[part], total)})
        for rows in blocks
        for part in chunks(rows.rows, micro_batch_size)
    ]


def steps(epochs: float, examples: int, per_step: int) -> int:
    """Optimizer steps for ``epochs`` passes, at least one; the last batch runs into the next pass."""
    if per_step < 1:
        raise ConfigError(f"batch_size={per_step} must be at least 1.")
    return max(1, math.ceil(epochs * examples / per_step))


def check_context(policy: Policy, lengths: Lengths) -> None:
    if lengths.prompt + lengths.response > policy.context_length:
        raise ConfigError(
            f"lengths.prompt + lengths.response = {lengths.prompt} + {lengths.response} exceeds the policy's context of "
            f"{policy.context_length} tokens. Lower them, or set policy.context_length."
        )
