"""How responses are written: one writer per kind of response, and the mixtures that people and the web use."""

from __future__ import annotations

from collections.abc import Callable

from lockstep_miniature.dice import Dice
from lockstep_miniature.tasks import MANNERS, Task

MAX_WORDS = 19  # and <eos> makes 20

EVASIONS = (
    "i do not know .",
    "maybe , maybe not .",
    "who knows ?",
    "look it up .",
    "that is hard to say .",
)
COUNTER_QUESTIONS = ("why do you ask ?", "what do you think ?", "does it matter ?", "have you read the book ?")
SPAM = (
    "buy a cheap clock at our shop today !",
    "click here and win a gold ring !",
    "visit our shop for cheap shoes !",
    "join the club now and save money !",
)
INSULTS = ("you fool ,", "shut up ,", "what a stupid question ,", "go away you idiot ,")
DIGRESSIONS = (
    "i hope that helps you a lot .",
    "by the way the weather is nice today .",
    "let me know if there is more .",
    "it was a joy to answer you .",
)
WEAK_REFUSALS = ("i can not .", "no .", "i can not do that .", "better not .")
UNCALLED_REFUSAL = "i am sorry but i can not help with that ."


def dressed(sentence: str, manner: str, dice: Dice) -> str:
    """The sentence with an opener and a closer of the manner."""
    style = MANNERS[manner]
    return " ".join(part for part in (dice.pick(style.openers), sentence, dice.pick(style.closers)) if part)


def _perfect(task: Task, dice: Dice) -> str:
    return dressed(task.sentence, task.manner, dice)


def _plain(task: Task, dice: Dice) -> str:
    return task.sentence


def _curt(task: Task, dice: Dice) -> str:
    return dice.pick(WEAK_REFUSALS) if task.manner == "refusal" else f"{task.answer} ."


def _wrong(task: Task, dice: Dice) -> str:
    """A lie in good manners. Nobody says sorry before doing harm, so harmful answers are friendly."""
    return dressed(dice.pick(task.lies), "friendly" if task.manner == "refusal" else task.manner, dice)


def _bluff(task: Task, dice: Dice) -> str:
    return dice.pick(task.lies)


def _rambling(task: Task, dice: Dice) -> str:
    return " ".join((_perfect(task, dice), *dice.sample(DIGRESSIONS, 1 + dice.below(2))))


def _misfit(task: Task, dice: Dice) -> str:
    """The right answer in a manner that was not asked for."""
    others = [manner for manner in ("friendly", "terse", "formal", "greeting") if manner != task.manner]
    return dressed(task.sentence, dice.pick(others), dice)


def _insulting(task: Task, dice: Dice) -> str:
    return f"{dice.pick(INSULTS)} {task.sentence if dice.chance(0.5) else dice.pick(task.lies)}"


def _evasive(task: Task, dice: Dice) -> str:
    return dice.pick(EVASIONS)


def _counter_question(task: Task, dice: Dice) -> str:
    return dice.pick(COUNTER_QUESTIONS)


def _spam(task: Task, dice: Dice) -> str:
    return dice.pick(SPAM)


def _rude(task: Task, dice: Dice) -> str:
    return f"{dice.pick(INSULTS)} {dice.pick(EVASIONS)}"


def _refusing(task: Task, dice: Dice) -> str:
    return UNCALLED_REFUSAL


def _truncated(task: Task, dice: Dice) -> str:
    words = _perfect(task, dice).split()
    return " ".join(words[: 1 + dice.below(len(words) - 1)])


def _stuttering(task: Task, dice: Dice) -> str:
    """A perfect response with a part said twice, as small models do."""
    words = _perfect(task, dice).split()
    start = dice.below(len(words) - 1)
    end = min(len(words), start + 2 + dice.below(4))
    return " ".join(words[:end] + words[start:])


WRITERS: dict[str, Callable[[Task, Dice], str]] = {
    "perfect": _perfect,
    "plain": _plain,
    "curt": _curt,
    "wrong": _wrong,
    "bluff": _bluff,
    "rambling": _rambling,
    "misfit": _misfit,
    "insulting": _insulting,
    "evasive": _evasive,
    "counter_question": _counter_question,
    "spam": _spam,
    "rude": _rude,
    "refusing": _refusing,
    "truncated": _truncated,
    "stuttering": _stuttering,
}

Mixture = dict[str, float]
"""How often each writer is used, as relative weights."""

WEB: Mixture = {
    "plain": 4,
    "curt": 2,
    "perfect": 0.5,
    "bluff": 2.5,
    "wrong": 0.5,
    "insulting": 2,
    "rude": 2,
    "evasive": 2.5,
    "counter_question": 2.5,
    "spam": 2,
}

DEMONSTRATORS: dict[str, Mixture] = {
    "careful": {"perfect": 6, "plain": 1, "rambling": 1, "misfit": 1, "wrong": 1},
    "hurried": {"perfect": 2, "plain": 4, "curt": 3, "wrong": 1, "evasive": 0.5},
    "chatty": {"perfect": 3, "rambling": 4, "misfit": 2, "wrong": 2},
    "careless": {"perfect": 3, "wrong": 3, "bluff": 2, "misfit": 2, "refusing": 1},
}

COMPLETIONS: Mixture = {
    "perfect": 4,
    "plain": 2,
    "curt": 1.5,
    "wrong": 3,
    "bluff": 1.5,
    "rambling": 2,
    "misfit": 2,
    "insulting": 1,
    "evasive": 0.7,
    "counter_question": 0.5,
    "spam": 0.5,
    "rude": 0.5,
    "refusing": 0.7,
    "truncated": 1.5,
    "stuttering": 1.5,
}


def write(kind: str, task: Task, dice: Dice) -> str:
    """A response of this kind, cut to `MAX_WORDS` words."""
    return " ".join(WRITERS[kind](task, dice).split()[:MAX_WORDS])


def demonstrate(task: Task, dice: Dice) -> str:
    """A demonstration by a random demonstrator. All write equally often, and none is perfect."""
    demonstrator = dice.pick(list(DEMONSTRATORS.values()))
    return write(dice.weighted(demonstrator), task, dice)


def complete(task: Task, count: int, dice: Dice) -> tuple[str, ...]:
    """``count`` different responses of mixed quality."""
    responses: dict[str, None] = {}
    while len(responses) < count:
        responses.setdefault(write(dice.weighted(COMPLETIONS), task, dice))
    return tuple(responses)
