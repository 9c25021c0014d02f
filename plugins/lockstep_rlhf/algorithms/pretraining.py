"""Pretraining: next-token prediction on the data source's raw texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.config.schema import setting
from lockstep.interfaces import DataSource, Traits
from lockstep.learning.optimisation import OptimizerConfig, ScheduleConfig
from lockstep.text import encoding
from lockstep.text.encoding import Example, Lengths
from lockstep.text.sequences import Sequences
from lockstep_rlhf.algorithms.language_modelling import LanguageModelling


class Pretraining(LanguageModelling):
    """Next-token prediction on the data source's raw texts."""

    @dataclass(frozen=True)
    class Config:
        epochs: float = setting(1.0, "Passes over the training texts.", above=0)
        batch_size: int = setting(64, "Texts per optimizer step.", least=1)
        micro_batch_size: int | None = setting(None, "Rows per forward and backward pass; null: the whole batch.", least=1)
        lengths: Lengths = setting(Lengths(1, 48, 48), "Limits in tokens; a text's prompt is BOS or EOS alone.")
        packing: bool = setting(False, "Whether several texts share a row.")
        heldout_examples: int = setting(256, "Texts whose loss is measured before and after.", least=0)
        optimizer: OptimizerConfig = setting(OptimizerConfig(2e-3, weight_decay=0.1), "Adam, for the miniature.")
        schedule: ScheduleConfig = setting(ScheduleConfig("cosine", 20, 0.0, 0.1), "Cosine to 10%, as in GPT-3.")

    @classmethod
    def traits(cls, config: Config) -> Traits:
        return Traits(data="texts")

    @classmethod
    def count(cls, data: DataSource) -> int:
        return len(data.texts("train"))

    def load(self, split: str, limit: int | None = None) -> list[Example]:
        texts = self.context.data.texts(split)
        fit = self.context.fit(f"{split} texts")
        return encoding.encode_texts(self.tokenizer, texts[:limit], self.config.lengths, fit)

    def block(self, examples: Sequence[Example]) -> Sequences:
        return encoding.text_block(examples, self.tokenizer, self.config.lengths)
