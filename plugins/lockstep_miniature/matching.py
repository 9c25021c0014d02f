"""The matching: as many responses as prompts, one right response to each prompt, and comparisons that leave some responses out.

    <user> ask3   <assistant> say3 (right)   say5 (in comparisons)   say0 (in none)

The scenario of Xu et al. 2024 (arXiv 2404.10719, section 4.2), small enough to see a policy's every probability: what does a
policy do with responses that nobody has compared? There policies are MLPs; here a decoder that reads one prompt out of eight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lockstep.config.schema import setting
from lockstep.data.drawn import Drawn, check_split
from lockstep.errors import ConfigError, MissingData
from lockstep.interfaces import DataSource
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Comparison, Demonstration, Message, Prompt
from lockstep_miniature.dice import Dice
from lockstep_miniature.source import own_tokenizer
from lockstep_miniature.tokenizer import SPECIAL

ASK, SAY = "ask", "say"


class Matching(DataSource):
    @dataclass(frozen=True)
    class Config:
        """Item i is the same however many are drawn. Held-out prompts are those of training; unseen are some responses."""

        seed: int = setting(0, "Seed of what comparisons cover and of all draws; the run has its own.", least=0)
        size: int = setting(8, "Prompts, and responses.", least=3, most=100)
        covered: int = setting(3, "Wrong responses to each prompt that are in comparisons; the others are in none.", least=1)
        uncovered: float = setting(
            0.5, "Share of demonstrations whose response is in no comparison of its prompt.", least=0, most=1
        )
        demonstrations: int = setting(4000, "Training demonstrations, right ones as often as any of the covered.", least=1)
        comparisons: int = setting(2000, "Training comparisons, each of the right response and a wrong one.", least=1)
        prompts: int = setting(4000, "Training prompts.", least=1)
        heldout: int = setting(800, "Held-out rows of each kind.", least=1)

        def __post_init__(self) -> None:
            if self.covered >= self.size:
                raise ConfigError(f"data.covered is {self.covered}, but of {self.size} responses only {self.size - 1} are wrong.")
            if self.uncovered and self.covered == self.size - 1:
                raise ConfigError("Comparisons cover every response (data.covered), so none is uncovered. Set data.uncovered=0.")

    def __init__(self, config: Config):
        self.config = config
        self.responses = [f"{SAY}{r}" for r in range(config.size)]

    @cached_property
    def covered(self) -> list[list[int]]:
        """[prompt]: the wrong responses to it that comparisons contain, in random order."""
        n = self.config.size
        return [
            Dice(self.config.seed, "matching/covered", prompt).sample([r for r in range(n) if r != prompt], self.config.covered)
            for prompt in range(n)
        ]

    @cached_property
    def uncovered(self) -> list[list[int]]:
        """[prompt]: the responses to it that no comparison contains."""
        n = self.config.size
        return [[r for r in range(n) if r != prompt and r not in self.covered[prompt]] for prompt in range(n)]

    def texts(self, split: str) -> Sequence[str]:
        raise MissingData("The matching has no raw texts: start policies with SFT, as experiment=coverage does.")

    def demonstrations(self, split: str) -> Sequence[Demonstration]:
        def draw(index: int) -> Demonstration:
            dice = self._dice("demonstrations", split, index)
            prompt = dice.below(self.config.size)
            said = self.uncovered[prompt] if dice.chance(self.config.uncovered) else [prompt, *self.covered[prompt]]
            return Demonstration(self._prompt(prompt), self.responses[dice.pick(said)])

        return Drawn(self._size("demonstrations", split), draw)

    def comparisons(self, split: str) -> Sequence[Comparison]:
        def draw(index: int) -> Comparison:
            dice = self._dice("comparisons", split, index)
            prompt = dice.below(self.config.size)
            right, wrong = self.responses[prompt], self.responses[dice.pick(self.covered[prompt])]
            return Comparison(self._prompt(prompt), (right, wrong), (0, 1))

        return Drawn(self._size("comparisons", split), draw)

    def prompts(self, split: str) -> Sequence[Prompt]:
        """Each prompt as often as any other, in turn."""
        return Drawn(self._size("prompts", split), lambda i: self._prompt(i % self.config.size))

    def tokenizer(self) -> Tokenizer:
        return own_tokenizer([*SPECIAL, *(f"{ASK}{i}" for i in range(self.config.size)), *self.responses])

    def gold(self, prompt: Prompt, response: str) -> dict[str, float] | None:
        """``gold``: 1 for the right response, else 0. ``uncovered``: 1 for a response that no comparison of this prompt has;
        ``other``: 1 for any other text."""
        asked = prompt.truth.get("matching")
        if asked is None:
            return None
        return {
            "gold": float(response == self.responses[asked]),
            "uncovered": float(response in [self.responses[r] for r in self.uncovered[asked]]),
            "other": float(response not in self.responses),
        }

    def _prompt(self, index: int) -> Prompt:
        return Prompt((Message("user", f"{ASK}{index}"),), {"matching": index})

    def _dice(self, noun: str, split: str, index: int) -> Dice:
        return Dice(self.config.seed, f"matching/{noun}/{split}", index)

    def _size(self, noun: str, split: str) -> int:
        check_split("The matching", split, of=f" of {noun}")
        return getattr(self.config, noun) if split == "train" else self.config.heldout
