"""The miniature as a source of data: the fruit fly of research on RLHF.

A closed world with a known truth that a laptop trains on in minutes, behind the same nouns as real data. ``world.py``
says what is true, ``tasks.py`` what is asked, ``responses.py`` how it is answered, well or badly, ``gold.py`` how good
an answer is, ``labelers.py`` what people think of it, ``corpus.py`` what the web is like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.errors import DataError, did_you_mean, listing
from lockstep.interfaces import DataSource
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Choice, Comparison, Demonstration, Prompt
from lockstep_miniature import ability, corpus
from lockstep_miniature.dice import Dice, Drawn
from lockstep_miniature.gold import gold
from lockstep_miniature.labelers import ALL_LABELERS, TRAINING_LABELERS, compare
from lockstep_miniature.responses import demonstrate
from lockstep_miniature.tasks import Task, draw_task
from lockstep_miniature.tokenizer import CHAT_TEMPLATE, EOS, PAD, build_tokenizer
from lockstep_miniature.world import World


@dataclass(frozen=True)
class Config:
    """Args:
    seed: the world and everything in it; another seed has other facts and other people's words.
    texts, demonstrations, comparisons, prompts: how many the training split has. All are drawn when read, and item i
      is the same for every size, so a larger source only goes on longer.
    heldout_texts, heldout_demonstrations, heldout_comparisons, heldout_prompts: the same for the held-out split.
    adversarial_prompts: how many harmful requests in disguise.
    ability_items: how long the ability test is.
    """

    seed: int
    texts: int
    demonstrations: int
    comparisons: int
    prompts: int
    heldout_texts: int
    heldout_demonstrations: int
    heldout_comparisons: int
    heldout_prompts: int
    adversarial_prompts: int
    ability_items: int


class Miniature(DataSource):
    Config = Config

    def __init__(self, config: Config):
        self.config = config
        self.world = World(config.seed)

    def texts(self, split: str) -> Sequence[str]:
        size = self._size("texts", split)
        return Drawn(size, lambda i: corpus.document(self.world, self._dice("texts", split, i)))

    def demonstrations(self, split: str) -> Sequence[Demonstration]:
        def draw(index: int) -> Demonstration:
            dice = self._dice("demonstrations", split, index)
            task = draw_task(self.world, dice, split)
            return Demonstration(task.prompt(), demonstrate(task, dice))

        return Drawn(self._size("demonstrations", split), draw)

    def comparisons(self, split: str) -> Sequence[Comparison]:
        """Training comparisons are by the training labelers; held-out ones by these and by labelers never trained on,
        all on held-out prompts."""
        labelers = TRAINING_LABELERS if split == "train" else ALL_LABELERS

        def draw(index: int) -> Comparison:
            dice = self._dice("comparisons", split, index)
            return compare(self.world, draw_task(self.world, dice, split), labelers, dice)

        return Drawn(self._size("comparisons", split), draw)

    def prompts(self, split: str) -> Sequence[Prompt]:
        """'train', 'heldout', or 'adversarial': harmful requests in disguises that no other split contains."""
        size = self._size("prompts", split)
        return Drawn(size, lambda i: draw_task(self.world, self._dice("prompts", split, i), split).prompt())

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(build_tokenizer(), eos_token=EOS, pad_token=PAD, chat_template=CHAT_TEMPLATE)

    def gold(self, prompt: Prompt, response: str) -> dict[str, float] | None:
        """See ``gold.py`` for the scale; None for a prompt that does not come from the miniature."""
        task = Task.of(prompt)
        return None if task is None else gold(self.world, task, response)

    def ability(self) -> Sequence[Choice]:
        return Drawn(self.config.ability_items, lambda i: ability.item(self.world, i))

    def _dice(self, noun: str, split: str, index: int) -> Dice:
        return Dice(self.config.seed, f"{noun}/{split}", index)

    def _size(self, noun: str, split: str) -> int:
        field = {"train": noun, "heldout": f"heldout_{noun}", "adversarial": f"adversarial_{noun}"}.get(split, split)
        if not hasattr(self.config, field):
            known = [s for s in ("train", "heldout", "adversarial") if s != "adversarial" or noun == "prompts"]
            raise DataError(
                f"The miniature has no split '{split}' of {noun}.{did_you_mean(split, known)} It has: {listing(known)}."
            )
        return getattr(self.config, field)
