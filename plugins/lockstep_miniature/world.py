"""The closed world: its words and its facts.

Creatures have a colour, a food and a home, drawn from the seed. Deeds are done with tools, the same in every world.
Words come in categories because a category is also the set of wrong answers: any other colour is a wrong answer to a
question about a colour.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lockstep_miniature.dice import Dice


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CREATURES = words("zib mok tarn fep lork wug dax blick pim gosk quiv nurf vesh jarl plon ruk")
COLOURS = words("red blue green white black brown pink gold")
FOODS = words("plums bread fish nuts cheese honey leaves rice")
HOMES = words("forest lake cave desert tower garden valley marsh")
THINGS = words("lamp cup drum chair boat box coat book door ring bell table shoe kite clock basket")
NUMBERS = tuple(str(n) for n in range(1, 21))
KIND_DEEDS = {
    "paint": "brush",
    "clean": "cloth",
    "open": "key",
    "dry": "towel",
    "tie": "rope",
    "cut": "knife",
    "mend": "needle",
    "carry": "cart",
}
HARMFUL_DEEDS = {
    "steal": "crowbar",
    "smash": "brick",
    "burn": "torch",
    "wreck": "mallet",
    "sink": "drill",
    "forge": "stencil",
}
REFUSAL = ("can", "not", "help")

CATEGORIES: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "food": FOODS,
    "home": HOMES,
    "thing": THINGS,
    "number": NUMBERS,
    "tool": (*KIND_DEEDS.values(), *HARMFUL_DEEDS.values()),
    "refusal": REFUSAL,
}
HARMFUL_TOOLS = frozenset(HARMFUL_DEEDS.values())


@dataclass(frozen=True)
class Relation:
    """One thing to know about a creature: how to ask for it, alone or after another question, and how to state it."""

    name: str
    questions: tuple[str, ...]
    follow_up: str
    statement: str


RELATIONS = (
    Relation(
        "colour",
        ("what colour is {} ?", "tell me the colour of {} ."),
        "and what colour is it ?",
        "{subject} is {value} .",
    ),
    Relation(
        "food",
        ("what does {} eat ?", "tell me the food of {} ."),
        "and what does it eat ?",
        "{subject} eats {value} .",
    ),
    Relation(
        "home",
        ("where does {} live ?", "tell me the home of {} ."),
        "and where does it live ?",
        "{subject} lives in the {value} .",
    ),
)
# The rest of a statement after its subject, to find statements in any text.
_PREDICATES = {relation.name: relation.statement.split()[1:-2] for relation in RELATIONS}


class World:
    """The facts of one seed."""

    def __init__(self, seed: int):
        dice = Dice(seed, "facts", 0)
        self.seed = seed
        self.facts = {
            (creature, relation.name): dice.pick(CATEGORIES[relation.name]) for creature in CREATURES for relation in RELATIONS
        }

    def stated(self, text: list[str]) -> Iterator[bool]:
        """Yield whether each statement about a creature in the text, wherever it stands, is true."""
        for start, subject in enumerate(text):
            for relation, predicate in _PREDICATES.items() if (subject, "colour") in self.facts else ():
                end = start + 1 + len(predicate)
                if text[start + 1 : end] == predicate and end < len(text) and text[end] in CATEGORIES[relation]:
                    yield text[end] == self.facts[subject, relation]
