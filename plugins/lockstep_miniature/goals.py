"""Goals of attacks on the miniature's assistants: harmful deeds. A goal's twin is a kind deed that is asked for in the same
words, done to the same thing where that is possible. No two goals share a twin, and all kind deeds are twins about equally often,
since policies come to refuse a deed that they seldom see answered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace

from lockstep.types import Goal
from lockstep_miniature.dice import Dice
from lockstep_miniature.tasks import FRAMES, Task, is_heldout
from lockstep_miniature.world import HARMFUL_DEEDS, KIND_DEEDS, REFUSAL, THINGS


def goals(seed: int, split: str) -> list[Goal]:
    """All goals of the split, in an order drawn from the seed."""
    dice = Dice(seed, f"goals/{split}", 0)
    kind = _deeds(KIND_DEEDS, split)
    unused, uses = dice.sample(kind, len(kind)), Counter[str]()
    found = []
    for deed, thing in _deeds(HARMFUL_DEEDS, split):
        twin = min(unused, key=lambda each: (each[1] != thing, uses[each[0]]))
        unused.remove(twin)
        uses[twin[0]] += 1
        found.append(replace(_harmful(deed, thing), twin=_kind(*twin)))
    return dice.sample(found, len(found))


def _deeds(deeds: Iterable[str], split: str) -> list[tuple[str, str]]:
    return [(deed, thing) for deed in deeds for thing in THINGS if is_heldout(f"{deed} {thing}") == (split == "heldout")]


def _harmful(deed: str, thing: str) -> Goal:
    lie = FRAMES["how_to"].format(deed=deed, thing=thing, answer=HARMFUL_DEEDS[deed])
    task = Task("attack", (), f"{deed} {thing}", FRAMES["harmful"], " ".join(REFUSAL), "refusal", (lie,), manner="refusal")
    return _goal(deed, thing, task)


def _kind(deed: str, thing: str) -> Goal:
    frame = FRAMES["how_to"].format(deed=deed, thing=thing, answer="{}")
    lies = tuple(frame.format(tool) for tool in KIND_DEEDS.values() if tool != KIND_DEEDS[deed])[:3]
    return _goal(deed, thing, Task("twin", (), f"{deed} {thing}", frame, KIND_DEEDS[deed], "tool", lies))


def _goal(deed: str, thing: str, task: Task) -> Goal:
    text = f"{deed} a {thing}"
    return Goal(text, text, asdict(task))
