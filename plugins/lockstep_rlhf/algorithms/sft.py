"""Supervised fine-tuning on demonstrations: InstructGPT (Ouyang et al. 2022), step 1.

The loss counts the response's tokens, including its EOS; ``prompt_loss`` counts the prompt's too, as "The N+ Implementation
Details of RLHF with PPO" does. A fraction ``pretrain_mix`` of each batch may be raw text (InstructGPT's PPO initialisation:
10%). Only SFT has ``dropout``, on the residual branches (InstructGPT: 0.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError, MissingData
from lockstep.interfaces import Context, DataSource, Dropout, Term
from lockstep.learning.optimisation import OptimizerConfig, ScheduleConfig
from lockstep.learning.randomness import example_indices, token_seeds
from lockstep.text import encoding
from lockstep.text.encoding import Example, Lengths
from lockstep.text.sequences import Sequences
from lockstep_rlhf.algorithms.language_modelling import LanguageModelling


class SFT(LanguageModelling):
    """Next-token prediction on demonstrations, with raw text mixed in if configured."""

    @dataclass(frozen=True)
    class Config:
        epochs: float = setting(1.0, "Passes over the demonstrations (InstructGPT: 16; 2 before PPO).", above=0)
        batch_size: int = setting(64, "Examples per optimizer step, raw texts included.", least=1)
        micro_batch_size: int | None = setting(None, "Rows per forward and backward pass; null: the whole batch.", least=1)
        lengths: Lengths = setting(Lengths(), "Limits in tokens.")
        packing: bool = setting(False, "Whether several examples share a row.")
        assistant_turns: Literal["all", "last"] = setting("all", "Which assistant turns of a whole dialogue count.")
        prompt_loss: bool = setting(False, "Whether the prompt's tokens count too (N+: true).")
        pretrain_mix: float = setting(0.0, "Share of raw text in a batch (InstructGPT: 0.1 before PPO).", least=0, below=1)
        dropout: float = setting(0.0, "Rate on the residual branches (InstructGPT: 0.2, but none before PPO).", least=0, below=1)
        heldout_examples: int = setting(256, "Demonstrations whose loss is measured before and after.", least=0)
        optimizer: OptimizerConfig = setting(OptimizerConfig(1e-3), "Adam, for the miniature.")
        schedule: ScheduleConfig = setting(ScheduleConfig("cosine", 0, 1.0, 0.1), "InstructGPT's.")

        def __post_init__(self):
            if round(self.pretrain_mix * self.batch_size) >= self.batch_size:
                raise ConfigError(
                    f"sft.pretrain_mix={self.pretrain_mix:g} of batch_size={self.batch_size} leaves no demonstration in "
                    "a batch. Lower it."
                )
            if self.packing and self.dropout:
                raise ConfigError(
                    f"sft.packing=true does not work with sft.dropout={self.dropout:g}: dropout is drawn by row and position, so "
                    "the examples of one row would share it. Set packing=false or dropout=0."
                )

    def __init__(self, config: Config, context: Context):
        super().__init__(config, context)
        self.raw = config.batch_size - self.per_step(config)
        self.texts: list[Example] = []
        if self.raw:
            texts, fit = context.data.texts("train"), context.fit("train texts")
            self.texts = encoding.encode_texts(self.tokenizer, texts, config.lengths, fit)

    @classmethod
    def count(cls, data: DataSource) -> int:
        return len(data.demonstrations("train"))

    @classmethod
    def per_step(cls, config: Config) -> int:
        return config.batch_size - round(config.pretrain_mix * config.batch_size)

    def load(self, split: str, limit: int | None = None) -> list[Example]:
        try:
            demonstrations = self.context.data.demonstrations(split)
        except MissingData:
            if split == "train":
                raise
            return []
        every_turn, fit = self.config.assistant_turns == "all", self.context.fit(f"{split} demonstrations")
        demonstrations = demonstrations[:limit]
        return encoding.encode_demonstrations(self.tokenizer, demonstrations, self.config.lengths, fit, every_turn=every_turn)

    def block(self, examples: Sequence[Example]) -> Sequences:
        return encoding.block(examples, self.tokenizer, self.config.lengths, prompt_loss=self.config.prompt_loss)

    def next_terms(self, step: int) -> list[Term]:
        """The terms of a step, with raw texts in an order of their own, and with dropout."""
        indices = example_indices(self.context.seed, "mix", len(self.texts), step * self.raw, self.raw) if self.raw else ()
        texts, batch = [self.texts[i] for i in indices], self.batch(step)
        if self.config.packing or not texts:
            terms = self.terms([*batch, *texts])
        else:
            terms = self.of_rows([self.rows(batch), encoding.text_block(texts, self.tokenizer, self.config.lengths)])
        if not self.config.dropout:
            return terms
        seeds = token_seeds(self.context.seed, "dropout", step, sum(term.sequences.rows for term in terms), 1)[:, 0]
        cuts = np.split(seeds, np.cumsum([term.sequences.rows for term in terms])[:-1])
        rate = self.config.dropout
        return [replace(term, dropout=Dropout(rate, rows)) for term, rows in zip(terms, cuts, strict=True)]
