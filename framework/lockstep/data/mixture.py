"""A run's data with other comparisons or demonstrations to train on: labels that stages collected, closed rounds of people's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.data.labels import comparisons_in, demonstrations_in
from lockstep.data.mixing import mix
from lockstep.interfaces import DataSource
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Choice, Comparison, Demonstration, Prompt

READERS: Mapping[str, Callable[[Path], Sequence[Any]]] = {"comparisons": comparisons_in, "demonstrations": demonstrations_in}


class Mixture(DataSource):
    """``data``, except for the training split of the nouns in ``folders``.

    Args:
      folders: {noun: {source: its folder}}; None for the data's own.
      shares: {noun: {source: its share of an epoch}}; all None: every row appears once.
    """

    def __init__(
        self, data: DataSource, folders: Mapping[str, Mapping[str, Path | None]], shares: Mapping[str, Mapping[str, float | None]]
    ):
        self.data, self.folders, self.shares = data, folders, shares
        self._mixed = functools.cache(self._mix)

    def texts(self, split: str) -> Sequence[str]:
        return self.data.texts(split)

    def prompts(self, split: str) -> Sequence[Prompt]:
        return self.data.prompts(split)

    def demonstrations(self, split: str) -> Sequence[Demonstration]:
        return self._of("demonstrations", split)

    def comparisons(self, split: str) -> Sequence[Comparison]:
        return self._of("comparisons", split)

    def tokenizer(self) -> Tokenizer | None:
        return self.data.tokenizer()

    def gold(self, prompt: Prompt, response: str) -> dict[str, float] | None:
        return self.data.gold(prompt, response)

    def ability(self) -> Sequence[Choice]:
        return self.data.ability()

    def _of(self, noun: str, split: str) -> Sequence[Any]:
        return self._mixed(noun) if split == "train" and noun in self.folders else getattr(self.data, noun)(split)

    def _mix(self, noun: str) -> tuple[Any, ...]:
        """
        Raises:
          DataError: a source has no such rows.
        """
        read = READERS[noun]
        parts = [getattr(self.data, noun)("train") if folder is None else read(folder) for folder in self.folders[noun].values()]
        shares = [share for share in self.shares[noun].values() if share is not None]
        return mix(parts, shares or None)
