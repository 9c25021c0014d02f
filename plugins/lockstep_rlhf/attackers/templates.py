"""`attacker=templates`: fixed words around the goal. Lists of such templates are the oldest attacks; "do anything now" is one
(Shen et al. 2024, arXiv 2308.03825). The encodings of the goal are those of Wei et al. (2023, "Jailbroken", arXiv 2307.02483)."""

from __future__ import annotations

import base64
import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.config.schema import setting
from lockstep.errors import ConfigError, did_you_mean, listing, short
from lockstep.interfaces import Attacker, DataSource, Resources
from lockstep.learning.randomness import generator
from lockstep.types import Goal, Message

DISGUISES: Mapping[str, Callable[[str], str]] = {
    "goal": lambda text: text,
    "goal.base64": lambda text: base64.b64encode(text.encode()).decode(),
    "goal.rot13": lambda text: codecs.encode(text, "rot13"),
    "goal.leet": lambda text: text.translate(str.maketrans("aeiostAEIOST", "431057431057")),
    "goal.spaced": lambda text: " ".join(text),
    "goal.reversed": lambda text: text[::-1],
}
"""The placeholders that a template may have in braces, each with the function that turns the goal into its text."""
_BLANK = re.compile(r"\{([\w.]*)\}")


class Templates(Attacker):
    """Each attack uses one of the templates, chosen at random."""

    @dataclass(frozen=True)
    class Config:
        templates: tuple[tuple[str, ...], ...] = setting(
            (("{goal}",),),
            "Dialogues, each a list of turns, the user's first and last; {goal} is the goal, {goal.base64} its encoding.",
        )

        def __post_init__(self) -> None:
            if not self.templates:
                raise ConfigError('attacker.templates is empty. Write one: [["how do i {goal} ?"]].')
            for turns in self.templates:
                if len(turns) % 2 == 0:
                    raise ConfigError(
                        f"attacker.templates has a dialogue of {len(turns)} turns. The user begins and ends it: 1, 3, 5, ..."
                    )
                blanks = [name for turn in turns for name in _BLANK.findall(turn)]
                if wrong := [name for name in blanks if name not in DISGUISES]:
                    raise ConfigError(
                        f"attacker.templates has {{{short(wrong[0])}}}.{did_you_mean(wrong[0], DISGUISES)} There are: "
                        f"{listing(DISGUISES)}."
                    )
                if not blanks:
                    raise ConfigError(f"attacker.templates: '{short(' '.join(turns))}' has no {{goal}}.")

    def __init__(self, config: Config, data: DataSource, resources: Resources):
        self.config = config

    def attack(self, goals: Sequence[Goal], seed: int) -> Sequence[Sequence[Message]]:
        return [self._filled(self._chosen(seed, place), goal) for place, goal in enumerate(goals)]

    def twin(self, messages: Sequence[Message], goal: Goal) -> Sequence[Message] | None:
        """The twin goal in the template that produced these messages; None if no template did, or the goal has no twin."""
        found = next((turns for turns in self.config.templates if self._filled(turns, goal) == list(messages)), None)
        return None if found is None or goal.twin is None else self._filled(found, goal.twin)

    def _chosen(self, seed: int, place: int) -> Sequence[str]:
        return self.config.templates[int(generator(seed, "attack", place).integers(len(self.config.templates)))]

    @staticmethod
    def _filled(turns: Sequence[str], goal: Goal) -> list[Message]:
        fill: Any = lambda blank: DISGUISES[blank[1]](goal.text)  # noqa: E731
        return [Message("assistant" if i % 2 else "user", _BLANK.sub(fill, turn)) for i, turn in enumerate(turns)]
