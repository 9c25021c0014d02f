"""Pretraining: next-token prediction on the data source's raw texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.interfaces import DataSource
from lockstep.learning.optimisation import OptimizerConfig, ScheduleConfig
from lockstep.text import encoding
from lockstep.text.encoding import Example, Lengths
from lockstep.text.sequences import Sequences
from lockstep_rlhf.algorithms.language_modelling import LanguageModelling


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
        texts = self.context.data.texts(split)
        fit = self.context.fit(f"{split} texts")
        return encoding.encode_texts(self.tokenizer, texts[:limit], self.config.lengths, fit)

    def block(self, examples: Sequence[Example]) -> Sequences:
        return encoding.text_block(examples, self.tokenizer, self.config.lengths)
