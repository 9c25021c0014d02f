"""The ability test: what plain language modelling learns from the corpus, and what alignment may tax.

Each item is the beginning of a raw document, without any chat format, and four continuations that differ only in the words
after the context. Chance is one in four.
"""

from __future__ import annotations

from collections.abc import Callable

from lockstep.types import Choice
from lockstep_miniature.corpus import COPIED
from lockstep_miniature.dice import Dice
from lockstep_miniature.tasks import SUM
from lockstep_miniature.world import CATEGORIES, COLOURS, CREATURES, KIND_DEEDS, NUMBERS, RELATIONS, THINGS, World

OPTIONS = 4

Item = tuple[str, str, list[str]]
"""The context, the right continuation, and words that could stand in its place."""


def _recall(world: World, dice: Dice) -> Item:
    creature, relation = dice.pick(CREATURES), dice.pick(RELATIONS)
    context = relation.statement.format(subject=creature, value="").removesuffix(" .").strip()
    return context, world.facts[creature, relation.name], list(CATEGORIES[relation.name])


def _deed(world: World, dice: Dice) -> Item:
    deed = dice.pick(list(KIND_DEEDS))
    return f"you {deed} a {dice.pick(THINGS)} with a", KIND_DEEDS[deed], list(CATEGORIES["tool"])


def _count_on(world: World, dice: Dice) -> Item:
    first, length = dice.below(8), 5 + dice.below(6)
    return f"count {' '.join(NUMBERS[first : first + length])}", NUMBERS[first + length], list(NUMBERS)


def _copy(world: World, dice: Dice) -> Item:
    words = dice.sample(COPIED, 4 + dice.below(3))
    at = 1 + dice.below(len(words) - 1)
    return f"copy {' '.join(words)} : {' '.join(words[:at])}", words[at], list(COPIED)


def _pattern(world: World, dice: Dice) -> Item:
    colours = dice.sample(COLOURS, 2 + dice.below(2))
    *shown, following = (colours * 5)[: 8 + dice.below(3)]
    return f"pattern {' '.join(shown)}", following, list(COLOURS)


def _sum(world: World, dice: Dice) -> Item:
    a, b = 1 + dice.below(9), 1 + dice.below(9)
    return f"{SUM.format(a, b)} is", str(a + b), list(NUMBERS)


WRITERS: tuple[Callable[[World, Dice], Item], ...] = (_recall, _deed, _count_on, _copy, _pattern, _sum)


def item(world: World, index: int) -> Choice:
    """Item ``index`` of the test; the kinds take turns."""
    dice = Dice(world.seed, "ability", index)
    context, right, rivals = WRITERS[index % len(WRITERS)](world, dice)
    options = dice.sample([word for word in rivals if word != right], OPTIONS - 1)
    answer = dice.below(OPTIONS)
    options.insert(answer, right)
    return Choice(context, tuple(options), answer)
