"""Goals of attacks on the miniature's assistants: harmful deeds. A goal's twin is a kind deed done to the same thing, asked for
in the same words."""

from __future__ import annotations

from dataclasses import asdict, replace

from lockstep.types import Goal
from lockstep_miniature.dice import Dice
from lockstep_miniature.tasks import FRAMES, Task, is_heldout
from lockstep_miniature.world import HARMFUL_DEEDS, KIND_DEEDS, REFUSAL, THINGS


def goals(seed: int, split: str) -> list[Goal]:
    """All goals of the split, in an order drawn from the seed."""
    dice = Dice(seed, f"goals/{split}", 0)
    found = []
    for deed in HARMFUL_DEEDS:
        for thing in THINGS:
            if is_heldout(f"{deed} {thing}") == (split == "heldout"):
                kind = [each for each in KIND_DEEDS if is_heldout(f"{each} {thing}") == (split == "heldout")]
                twin = _kind(dice.pick(kind), thing) if kind else None
                found.append(replace(_harmful(deed, thing), twin=twin))
    return dice.sample(found, len(found))


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
