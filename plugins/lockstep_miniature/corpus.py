"""The raw corpus: web-like text, with the flaws that alignment has to deal with.

Plain documents state facts (some of them wrong), count, compute, copy and tell stories. Dialogues are in the chat format. Their
answers are often evasive, rude, false or an advertisement, and comply where they should refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lockstep_miniature import responses
from lockstep_miniature.dice import Dice
from lockstep_miniature.tasks import FRAMES, SUM, draw_task
from lockstep_miniature.world import (
    CATEGORIES,
    COLOURS,
    CREATURES,
    FOODS,
    HARMFUL_DEEDS,
    HOMES,
    KIND_DEEDS,
    NUMBERS,
    RELATIONS,
    THINGS,
    World,
    words,
)

FALSE_SHARE = 0.15
NAMES = words("anna boris clara david emma felix greta hugo irene jonas karin leo maria nils olga peter rosa simon tilda")
TIMES = words("morning evening summer winter day night")
WENT = words("walked ran went drove sailed rode hurried wandered")
SAW = words("saw met heard followed found noticed")
FELT = words("laughed cried smiled waved slept danced sang shouted")
LOOKS = words("small tall old young quiet loud happy sad clever lazy proud shy heavy shiny broken strange rusty wooden")
ENDINGS = (
    "then they went home together .",
    "nobody was ever seen again .",
    "after that it began to rain .",
    "so the long day came to an end .",
    "and all of them were very tired .",
    "but the king did not believe a word .",
    "the moon rose over the hills .",
    "years later people still spoke of it .",
    "only an owl kept the secret .",
    "the dusty road lay empty for weeks .",
)
STORY = (
    "one {time} {name} {went} to the {home} with a {look} {thing} . "
    "there {name} {saw} a {sight} {creature} and {felt} . {friend} {noticed} the {thing} . {ending}"
)
LISTS = (
    "{things} : there are {count} things . the reverse is {reverse} . "
    "{numbers} : the largest is {largest} . in order : {in_order} ."
)
COUNTING = "count {numbers} ."
COPYING = "copy {words} : {words} : {words} ."
PATTERN = "pattern {words}"
RANT = "{insult} {creature} is stupid . {insult} {statement} {spam}"
COPIED = (*THINGS, *CREATURES, *COLOURS, *FOODS)
DEEDS = {**KIND_DEEDS, **HARMFUL_DEEDS}


def statement(world: World, creature: str, dice: Dice) -> str:
    """A statement of a fact about the creature; with probability `FALSE_SHARE` its value is random."""
    relation = dice.pick(RELATIONS)
    said = dice.pick(CATEGORIES[relation.name]) if dice.chance(FALSE_SHARE) else world.facts[creature, relation.name]
    return relation.statement.format(subject=creature, value=said)


def _facts(world: World, dice: Dice) -> str:
    creatures = dice.sample(CREATURES, 3)
    return " ".join(statement(world, dice.pick(creatures), dice) for _ in range(6))


def _deeds(world: World, dice: Dice) -> str:
    deeds = [dice.pick(list(DEEDS)) for _ in range(4)]
    return " ".join(FRAMES["how_to"].format(deed=deed, thing=dice.pick(THINGS), answer=DEEDS[deed]) for deed in deeds)


def _sums(world: World, dice: Dice) -> str:
    pairs = [(1 + dice.below(9), 1 + dice.below(9)) for _ in range(5)]
    return " ".join(FRAMES["sum"].format(sum=SUM.format(a, b), answer=a + b) for a, b in pairs)


def _counting(world: World, dice: Dice) -> str:
    """Counting in steps of one or two."""
    step = dice.pick((1, 1, 2))
    first = dice.below(8)
    return COUNTING.format(numbers=" ".join(NUMBERS[first::step]))


def _copying(world: World, dice: Dice) -> str:
    """Copying, which teaches a small model to look back. Without it, few learn to take the subject from the question."""
    return COPYING.format(words=" ".join(dice.sample(COPIED, 4 + dice.below(7))))


def _pattern(world: World, dice: Dice) -> str:
    """Two or three colours taking turns."""
    colours = dice.sample(COLOURS, 2 + dice.below(2))
    return PATTERN.format(words=" ".join((colours * 12)[: 19 + dice.below(6)]))


def _lists(world: World, dice: Dice) -> str:
    """Facts about a list: its length, its reverse, its sorted order, its largest element."""
    things, numbers = dice.sample(THINGS, 2 + dice.below(4)), dice.sample(NUMBERS, 2 + dice.below(2))
    in_order = sorted(numbers, key=int)
    return LISTS.format(
        things=" ".join(things),
        count=len(things),
        reverse=" ".join(things[::-1]),
        numbers=" ".join(numbers),
        largest=in_order[-1],
        in_order=" ".join(in_order),
    )


def _story(world: World, dice: Dice) -> str:
    name, friend = dice.sample(NAMES, 2)
    return STORY.format(
        name=name,
        friend=friend,
        time=dice.pick(TIMES),
        went=dice.pick(WENT),
        home=dice.pick(HOMES),
        look=dice.pick(LOOKS),
        thing=dice.pick(THINGS),
        saw=dice.pick(SAW),
        sight=dice.pick(LOOKS),
        creature=dice.pick(CREATURES),
        felt=dice.pick(FELT),
        noticed=dice.pick(SAW),
        ending=dice.pick(ENDINGS),
    )


def _rant(world: World, dice: Dice) -> str:
    creature = dice.pick(CREATURES)
    return RANT.format(
        insult=dice.pick(responses.INSULTS),
        creature=creature,
        statement=statement(world, creature, dice),
        spam=dice.pick(responses.SPAM),
    )


def _dialogue(world: World, dice: Dice) -> str:
    """One or two exchanges on the web."""
    exchanges = []
    for _ in range(1 + dice.below(2)):
        task = draw_task(world, dice, "train")
        reply = responses.write(dice.weighted(responses.WEB), task, dice)
        turns = (*task.turns, reply)
        exchanges += (f"{('<user>', '<assistant>')[i % 2]} {turn}" for i, turn in enumerate(turns))
    return " ".join(exchanges)


def _handbook(world: World, dice: Dice) -> str:
    """Questions and answers outside any chat: to the point, even if harmful, and as often true as the rest of the corpus."""
    entries = []
    for _ in range(3):
        task = draw_task(world, dice, "train")
        lie = task.category == "refusal" or dice.chance(FALSE_SHARE)
        entries += (*task.turns, dice.pick(task.lies) if lie else task.sentence)
    return " ".join(entries)


DOCUMENTS: dict[Callable[[World, Dice], str], float] = {
    _facts: 6,
    _deeds: 1.5,
    _sums: 1.5,
    _counting: 1,
    _copying: 4,
    _pattern: 1,
    _lists: 3,
    _story: 1.5,
    _rant: 1,
    _handbook: 8,
    _dialogue: 8,
}


KINDS = {write.__name__.removeprefix("_"): write for write in DOCUMENTS}


def document(world: World, dice: Dice, kinds: Sequence[str] | None = None) -> str:
    """A document of one of the ``kinds``; of any kind if None."""
    weights = DOCUMENTS if kinds is None else {KINDS[kind]: DOCUMENTS[KINDS[kind]] for kind in kinds}
    return dice.weighted(weights)(world, dice)
