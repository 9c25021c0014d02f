"""A run's data with other prompts, comparisons or demonstrations to train on: labels that stages collected, attacks, or closed
rounds of a studio."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.data.labels import comparisons_in, demonstrations_in, prompts_in
from lockstep.data.mixing import mix
from lockstep.errors import MissingData
from lockstep.interfaces import DataSource
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Choice, Comparison, Demonstration, Goal, Message, Prompt

log = logging.getLogger("lockstep")

READERS: Mapping[str, Callable[[Path], Sequence[Any]]] = {
    "prompts": prompts_in, "comparisons": comparisons_in, "demonstrations": demonstrations_in
}  # fmt: skip
DATA, GOALS = "data", "goals"
"""Two of the sources that a stage may train on: the run's own data, and its goals as prompts for an attacker."""
TWINS = "_twins"
"""The suffix of a split with the twins of a stage's attacks."""


class Mixture(DataSource):
    """``data`` with another training split for the nouns in ``folders``, and with more splits of prompts.

    Args:
      folders: {noun: {source: its folder}}; the folders of 'data' and 'goals' are ignored.
      shares: {noun: {source: its share of an epoch}}; all None: every row appears once.
      attacks: {split: the folder whose held-out attacks are its prompts}; their twins are the split ``<split>_twins``.
    """

    def __init__(
        self, data: DataSource, folders: Mapping[str, Mapping[str, Path]], shares: Mapping[str, Mapping[str, float | None]],
        attacks: Mapping[str, Path] | None = None,
    ):  # fmt: skip
        self.data, self.folders, self.shares = data, folders, shares
        self.attacks = attacks or {}
        self._mixed = functools.cache(self._mix)

    def texts(self, split: str) -> Sequence[str]:
        return self.data.texts(split)

    def prompts(self, split: str) -> Sequence[Prompt]:
        if split in self.attacks:
            return prompts_in(self.attacks[split], "heldout", twins=False)
        if split.removesuffix(TWINS) in self.attacks:
            return prompts_in(self.attacks[split.removesuffix(TWINS)], "heldout", twins=True)
        return self._of("prompts", split)

    def goals(self, split: str) -> Sequence[Goal]:
        return self.data.goals(split)

    def demonstrations(self, split: str) -> Sequence[Demonstration]:
        return self._of("demonstrations", split)

    def comparisons(self, split: str) -> Sequence[Comparison]:
        return self._of("comparisons", split)

    def tokenizer(self) -> Tokenizer | None:
        return self.data.tokenizer()

    def gold(self, prompt: Prompt, response: str) -> dict[str, float] | None:
        return self.data.gold(prompt, response)

    def tests(self) -> Mapping[str, Sequence[Choice]]:
        return self.data.tests()

    def _trainable(self, noun: str, rows: Sequence[Any]) -> Sequence[Any]:
        """The rows whose prompts neither are held out nor go on from one that is."""
        kept = [row for row in rows if not any(part in self._heldout for part in _beginnings(row))]
        if len(kept) < len(rows):
            log.warning("%d %s were left out, because the data hold their prompts out", len(rows) - len(kept), noun)
        return kept

    @functools.cached_property
    def _heldout(self) -> set[tuple[Message, ...]]:
        """The held-out prompts of the data, of whatever noun."""
        found: set[tuple[Message, ...]] = set()
        for noun in READERS:
            with contextlib.suppress(MissingData):
                found |= {_prompt(row).messages for row in getattr(self.data, noun)("heldout")}
        return found

    def _of(self, noun: str, split: str) -> Sequence[Any]:
        return self._mixed(noun) if split == "train" and noun in self.folders else getattr(self.data, noun)(split)

    def _mix(self, noun: str) -> tuple[Any, ...]:
        """
        Raises:
          DataError: a source has no rows of this noun, or they are damaged.
        """

        def rows(source: str, folder: Path) -> Sequence[Any]:
            if source == DATA:
                return getattr(self.data, noun)("train")
            return [goal.prompt() for goal in self.data.goals("train")] if source == GOALS else READERS[noun](folder)

        parts = [rows(source, folder) for source, folder in self.folders[noun].items()]
        own = [source in (DATA, GOALS) for source in self.folders[noun]]
        parts = [part if is_own else self._trainable(noun, part) for part, is_own in zip(parts, own, strict=True)]
        shares = [share for share in self.shares[noun].values() if share is not None]
        return mix(parts, shares or None)


def _prompt(row: Any) -> Prompt:
    return row if isinstance(row, Prompt) else row.prompt


def _beginnings(row: Any) -> Iterator[tuple[Message, ...]]:
    messages = _prompt(row).messages
    return (messages[:end] for end in range(1, len(messages) + 1))
