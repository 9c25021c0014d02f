"""The miniature as a data source: the fruit fly of RLHF research.

A closed world with a known truth, on which a laptop trains in minutes, through the same interface as real data. ``world.py`` has
the facts, ``tasks.py`` the instructions, ``responses.py`` good and bad answers, ``gold.py`` the quality of an answer,
``labelers.py`` people's opinions of it, ``corpus.py`` the web.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.config.schema import setting
from lockstep.data.drawn import SPLITS, Drawn, check_split
from lockstep.errors import ConfigError, did_you_mean, listing, short
from lockstep.interfaces import DataSource
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Choice, Comparison, Demonstration, Goal, Prompt
from lockstep_miniature import ability, corpus
from lockstep_miniature.dice import Dice
from lockstep_miniature.goals import goals
from lockstep_miniature.gold import gold
from lockstep_miniature.labelers import GROUPS, compare, members
from lockstep_miniature.responses import demonstrate
from lockstep_miniature.tasks import FAMILIES, Task, draw_task, weights
from lockstep_miniature.tokenizer import CHAT_TEMPLATE, EOS, PAD, build_tokenizer, vocabulary
from lockstep_miniature.world import World


@dataclass(frozen=True)
class Config:
    """Sizes. Items are drawn when read, and item i is the same for every size: a larger source just continues longer."""

    seed: int = setting(0, "Seed of the world: its facts and all its texts; the run has its own.", least=0)
    texts: int = setting(20000, "Training texts: about 0.6 million tokens, more than a small model needs in one pass.", least=1)
    demonstrations: int = setting(10000, "Training demonstrations: about 0.2 million tokens.", least=1)
    comparisons: int = setting(4000, "Comparisons of 4 to 9 completions (InstructGPT's K): about 80 thousand pairs.", least=1)
    prompts: int = setting(20000, "Training prompts.", least=1)
    heldout_texts: int = setting(500, "Held-out texts.", least=1)
    heldout_demonstrations: int = setting(500, "Held-out demonstrations.", least=1)
    heldout_comparisons: int = setting(600, "Held-out comparisons; a third are by labelers not in the training split.", least=1)
    heldout_prompts: int = setting(500, "Held-out prompts; with 500, the mean gold has a standard error of about 0.15.", least=1)
    adversarial_prompts: int = setting(200, "Harmful requests in disguise.", least=1)
    families: tuple[str, ...] | None = setting(None, "Families of prompts (not of raw texts): [sum, count]; null: all.")
    harmful: float = setting(3.0, "Relative frequency of harmful requests; questions have 3, tasks 1 or 2.", least=0)
    documents: tuple[str, ...] | None = setting(None, "Kinds of raw texts: [sums, counting]; null: all.")
    labelers: tuple[str, ...] = setting(("training",), "Groups whose labelers rank the training comparisons.")
    heldout_labelers: tuple[str, ...] = setting(("training", "heldout"), "Groups that rank the held-out comparisons.")
    ability_items: int = setting(396, "Items of the ability test: 66 of each of its six kinds.", least=1)

    def __post_init__(self) -> None:
        for key, known in (
            ("families", FAMILIES), ("documents", corpus.KINDS), ("labelers", GROUPS), ("heldout_labelers", GROUPS)
        ):  # fmt: skip
            names = getattr(self, key)
            if names == ():
                raise ConfigError(f"data.{key} is empty, so there is nothing to draw. All: {listing(known)}.")
            if wrong := [name for name in names or () if name not in known]:
                raise ConfigError(
                    f"data.{key} has '{short(wrong[0])}', which is none.{did_you_mean(wrong[0], known)} All: {listing(known)}."
                )


class Miniature(DataSource):
    Config = Config

    def __init__(self, config: Any):
        self.config = config
        self.world = World(config.seed)
        self.weights = weights(config.families, config.harmful)

    def texts(self, split: str) -> Sequence[str]:
        size = self._size("texts", split)
        return Drawn(size, lambda i: corpus.document(self.world, self._dice("texts", split, i), self.config.documents))

    def demonstrations(self, split: str) -> Sequence[Demonstration]:
        def draw(index: int) -> Demonstration:
            dice = self._dice("demonstrations", split, index)
            task = self._task(dice, split)
            return Demonstration(task.prompt(), demonstrate(task, dice))

        return Drawn(self._size("demonstrations", split), draw)

    def comparisons(self, split: str) -> Sequence[Comparison]:
        """Training comparisons are by the groups ``labelers``. Held-out comparisons have held-out prompts and are by the groups
        ``heldout_labelers``, some of whom never rank training comparisons."""
        labelers = members(self.config.labelers if split == "train" else self.config.heldout_labelers)

        def draw(index: int) -> Comparison:
            dice = self._dice("comparisons", split, index)
            return compare(self.world, self._task(dice, split), labelers, dice)

        return Drawn(self._size("comparisons", split), draw)

    def prompts(self, split: str) -> Sequence[Prompt]:
        """Prompts of 'train', 'heldout' or 'adversarial': harmful requests in disguises that no other split contains. A prompt's
        truth has the fields of its `Task`, among them ``answer``."""
        size = self._size("prompts", split)
        return Drawn(size, lambda i: self._task(self._dice("prompts", split, i), split).prompt())

    def goals(self, split: str) -> Sequence[Goal]:
        """Harmful deeds. Their twins are kind deeds of the same split."""
        check_split("The miniature", split, of=" of goals")
        return goals(self.config.seed, split)

    def tokenizer(self) -> Tokenizer:
        return own_tokenizer()

    def gold(self, prompt: Prompt, response: str) -> dict[str, float] | None:
        """The gold score and its parts, as in ``gold.py``; None for a prompt from elsewhere."""
        task = Task.of(prompt)
        return None if task is None else gold(self.world, task, response)

    def tests(self) -> Mapping[str, Sequence[Choice]]:
        return {"ability": Drawn(self.config.ability_items, lambda i: ability.item(self.world, i))}

    def _task(self, dice: Dice, split: str) -> Task:
        return draw_task(self.world, dice, split, self.weights)

    def _dice(self, noun: str, split: str, index: int) -> Dice:
        return Dice(self.config.seed, f"{noun}/{split}", index)

    def _size(self, noun: str, split: str) -> int:
        known = (*SPLITS, "adversarial") if noun == "prompts" else SPLITS
        check_split("The miniature", split, known, of=f" of {noun}")
        return getattr(self.config, noun if split == "train" else f"{split}_{noun}")


def own_tokenizer(words: Iterable[str] | None = None) -> Tokenizer:
    """The tokenizer of these words, special ones included; None: of the world's."""
    return Tokenizer(
        build_tokenizer(vocabulary() if words is None else words), eos_token=EOS, pad_token=PAD, chat_template=CHAT_TEMPLATE
    )
