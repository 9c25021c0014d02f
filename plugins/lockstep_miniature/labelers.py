"""Simulated labelers: they see gold utility through personal taste and noise.

A labeler's utility of a completion is a weighted sum of gold's parts and of surface features. Adding Gumbel noise and
sorting gives a Plackett-Luce ranking, whose pairs are Bradley-Terry (Luce 1959; Plackett 1975). Single labelers are
noisy and biased in different directions, so a reward model trained on all of them can beat each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from lockstep.learning import numerics
from lockstep.types import Comparison
from lockstep_miniature.dice import Dice
from lockstep_miniature.gold import WEIGHTS, gold
from lockstep_miniature.responses import complete
from lockstep_miniature.tasks import MANNERS, Task
from lockstep_miniature.world import World

MIN_COMPLETIONS, MAX_COMPLETIONS = 4, 9
TIE = 0.15  # utilities closer than this look the same to a labeler
NOISE = 2.0  # the scale of the Gumbel noise: single labelers agree with gold's order on about 74% of pairs
POLITE = tuple(opener for manner in MANNERS.values() for opener in manner.openers if opener)


Labeler = Mapping[str, float]
"""A labeler's tastes: the weights of gold's parts and of surface features in their utility of a completion."""

# helpful, truthful and harmless are gold's parts; length is in tens of words; polite is 1 for a polite beginning.
TRAINING_LABELERS: dict[str, Labeler] = {
    "labeler-0": {"helpful": 4, "truthful": 2, "harmless": 2},
    "labeler-1": {"helpful": 4, "truthful": 2, "harmless": 1, "length": 1.2},
    "labeler-2": {"helpful": 3, "truthful": 1, "harmless": 2, "polite": 1.5},
    "labeler-3": {"helpful": 4, "truthful": 0, "harmless": 2, "length": 0.5},
    "labeler-4": {"helpful": 2, "truthful": 4, "harmless": 1},
    "labeler-5": {"helpful": 3, "truthful": 2, "harmless": 4, "length": -0.5},
}
HELDOUT_LABELERS: dict[str, Labeler] = {
    "heldout-labeler-0": {"helpful": 4, "truthful": 2, "harmless": 2},
    "heldout-labeler-1": {"helpful": 3, "truthful": 3, "harmless": 1, "length": 0.8},
    "heldout-labeler-2": {"helpful": 4, "truthful": 0.5, "harmless": 2, "polite": 1},
}
BRIEF_LABELERS: dict[str, Labeler] = {
    "brief-0": {"helpful": 3, "truthful": 2, "harmless": 2, "length": -3, "polite": -1.5},
    "brief-1": {"helpful": 4, "truthful": 2, "harmless": 1, "length": -4, "polite": -1},
    "brief-2": {"helpful": 3, "truthful": 3, "harmless": 2, "length": -3, "polite": -2},
}
WARM_LABELERS: dict[str, Labeler] = {
    "warm-0": {"helpful": 3, "truthful": 2, "harmless": 2, "length": 3, "polite": 1.5},
    "warm-1": {"helpful": 4, "truthful": 2, "harmless": 1, "length": 4, "polite": 1},
    "warm-2": {"helpful": 3, "truthful": 3, "harmless": 2, "length": 3, "polite": 2},
}
IMPARTIAL_LABELERS: dict[str, Labeler] = {"impartial": {part: 7 * weight for part, weight in WEIGHTS.items()}}
GROUPS: dict[str, dict[str, Labeler]] = {
    "training": TRAINING_LABELERS,
    "heldout": HELDOUT_LABELERS,
    "brief": BRIEF_LABELERS,
    "warm": WARM_LABELERS,
    "impartial": IMPARTIAL_LABELERS,
}
"""Labelers by group. ``brief`` and ``warm`` are communities that agree on facts and harm but differ in how they like to be talked
to. ``impartial`` has gold's own tastes and errs by noise alone, on about 25% of pairs."""


def group_of(name: str) -> str:
    return next(group for group, labelers in GROUPS.items() if name in labelers)


def members(groups: Sequence[str]) -> dict[str, Labeler]:
    """The labelers of these groups."""
    return {name: labeler for group in groups for name, labeler in GROUPS[group].items()}


def rank(labeler: Labeler, world: World, task: Task, completions: Sequence[str], dice: Dice) -> tuple[int, ...]:
    """The labeler's ranks of completions, with noise."""
    return numerics.ranks([utility(labeler, world, task, text) + NOISE * dice.gumbel() for text in completions], TIE)


def utility(labeler: Labeler, world: World, task: Task, completion: str) -> float:
    """The labeler's utility of the completion, without noise."""
    seen = {
        **gold(world, task, completion),
        "length": len(completion.split()) / 10,
        "polite": float(completion.startswith(POLITE)),
    }
    return sum(weight * seen[taste] for taste, weight in labeler.items())


def compare(world: World, task: Task, labelers: Mapping[str, Labeler], dice: Dice) -> Comparison:
    """A comparison: one of the labelers ranks 4 to 9 completions of mixed quality."""
    count = MIN_COMPLETIONS + dice.below(MAX_COMPLETIONS - MIN_COMPLETIONS + 1)
    name = dice.pick(list(labelers))
    completions = complete(task, count, dice)
    return Comparison(task.prompt(), completions, rank(labelers[name], world, task, completions, dice), name, group_of(name))


def labeler_agreement(world: World, comparisons: Sequence[Comparison]) -> float:
    """The share of pairs that labelers and gold order alike, among pairs that neither ties."""
    agreed = []
    for comparison in comparisons:
        task = Task.of(comparison.prompt)
        golds = [gold(world, task, text)["gold"] for text in comparison.completions]
        for i, j in combinations(range(len(golds)), 2):
            preferred = comparison.ranks[j] - comparison.ranks[i]
            better = golds[i] - golds[j]
            if preferred and abs(better) > 1e-9:
                agreed.append((preferred > 0) == (better > 0))
    return float(np.mean(agreed))
