"""Next-token prediction: the shared part of pretraining and SFT, and the loss that PPO mixes in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lockstep.interfaces import Array, Context, DataSource, Metrics, Policy, Term
from lockstep.learning import losses
from lockstep.learning.offline import Offline
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


class LanguageModelling(Offline):
    """The part that `Pretraining` and `SFT` share; each of them chooses the examples."""

    produces = "policy"

    def __init__(self, config: Any, context: Context):
        super().__init__(config, context)
        self.policy: Policy = context.policy
        self.examples = self.load("train")
        self.heldout = self.load("heldout", config.heldout_examples)
        self.learner = context.backend.learner({"policy": self.policy}, {"policy": config.optimizer})
        self.total_steps = self.steps(config, len(self.examples))

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

    def rows(self, examples: Sequence[Example]) -> Sequences:
        """The examples as training lays them out: packed, or each in its own row."""
        return (self.packed if self.config.packing else self.block)(examples)

    def terms(self, batch: Sequence[Example]) -> list[Term]:
        return self.of_rows([self.rows(batch)])

    def of_rows(self, blocks: Sequence[Sequences]) -> list[Term]:
        return next_token_terms(blocks, self.config.micro_batch_size, NextTokenLoss())

    def logged(self, metrics: Metrics, terms: Sequence[Term]) -> Metrics:
        rows = {"rows": float(sum(term.sequences.rows for term in terms))} if self.config.packing else {}
        return metrics | rows | {"perplexity": math.exp(min(metrics["loss"], 50))}

    @property
    def trained(self) -> Policy:
        return self.policy

    def measure(self, policy: Policy) -> Metrics:
        """Mean negative log-likelihood per counted token, in nats."""
        if not self.heldout:
            return {}
        rows = self.block(self.heldout)
        size = self.config.micro_batch_size or self.config.batch_size
        out = in_chunks(lambda part: policy.evaluate(part, ["logprobs"]), rows, size)
        return {"loss": float(-np.mean(out["logprobs"][rows.mask], dtype=np.float64))}

    @classmethod
    def count(cls, data: DataSource) -> int:
        """The number of training examples."""
        raise NotImplementedError

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
