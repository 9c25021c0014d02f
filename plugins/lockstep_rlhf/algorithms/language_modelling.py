"""Next-token prediction: the shared part of pretraining and SFT, and the loss that PPO mixes in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lockstep.interfaces import Algorithm, Array, Context, DataSource, Metrics, Policy, Term
from lockstep.learning import losses
from lockstep.learning.optimisation import lr_scale
from lockstep.learning.randomness import example_indices
from lockstep.text import encoding
from lockstep.text.encoding import Example
from lockstep.text.sequences import Sequences, chunks, in_chunks


@dataclass(frozen=True)
class NextTokenLoss:
    """L = -coef Σ w_t log π(x_t | x_<t), with w = 1 / n over the minibatch's n counted tokens. ``metric`` names the
    unscaled loss in the log if it is one term of several."""

    coef: float = 1.0
    metric: str | None = None
    outputs: ClassVar[tuple[str, ...]] = ("logprobs",)

    def __call__(self, xp: Any, outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        loss = losses.weighted_sum(xp, -outputs["logprobs"], batch["weights"])
        return self.coef * loss, {self.metric: loss} if self.metric else {}


class LanguageModelling(Algorithm):
    """The shared part; `Pretraining` and `SFT` choose the examples."""

    produces = "policy"

    def __init__(self, config: Any, context: Context):
        self.config, self.context = config, context
        self.tokenizer = context.tokenizer
        self.policy: Policy = context.policy
        self.examples = self.load("train")
        self.heldout = self.load("heldout", config.heldout_examples)
        self.learner = context.backend.learner({"policy": self.policy}, {"policy": config.optimizer})
        self.total_steps = self.steps(config, len(self.examples))
        config.lengths.check(self.policy.context_length)

    def load(self, split: str, limit: int | None = None) -> list[Example]:
        raise NotImplementedError

    def block(self, examples: Sequence[Example]) -> Sequences:
        """Each example in its own row."""
        raise NotImplementedError

    def packed(self, examples: Sequence[Example]) -> Sequences:
        """Several examples per row."""
        c = self.config
        prompt_loss = getattr(c, "prompt_loss", False)
        return encoding.packed_block(
            examples, self.tokenizer, c.lengths, prompt_loss=prompt_loss, rows_multiple=c.micro_batch_size
        )

    def batch(self, step: int) -> list[Example]:
        size = self.per_step(self.config)
        indices = example_indices(self.context.seed, "order", len(self.examples), step * size, size)
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
        """The number of training examples."""
        raise NotImplementedError

    @classmethod
    def per_step(cls, config: Any) -> int:
        """The number of examples that one step consumes."""
        return config.batch_size

    @classmethod
    def steps(cls, config: Any, examples: int) -> int:
        return steps(config.epochs, examples, cls.per_step(config))

    @classmethod
    def arithmetic(cls, config: Any, data: DataSource) -> str:
        examples, size = cls.count(data), cls.per_step(config)
        raw = f" and {config.batch_size - size} raw texts" if size < config.batch_size else ""
        batch = f"{examples} examples x {config.epochs:g} epochs / {size}{raw} per step = {cls.steps(config, examples)} steps"
        batch += f", from {len(data.texts('train'))} raw texts" if raw else ""
        if config.packing:
            columns, micro = config.lengths.prompt + config.lengths.response, config.micro_batch_size
            return f"{batch}, packed into rows of {columns} tokens; micro-batches of {f'{micro} rows' if micro else 'all rows'}"
        return f"{batch}; micro-batches of {min(config.micro_batch_size or config.batch_size, config.batch_size)}"

    def result(self) -> Policy:
        return self.learner.averaged("policy")


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
    return max(1, math.ceil(epochs * examples / per_step))
