"""Simulated labelers: they see gold utility through personal taste and noise.

A labeler's utility of a completion is a weighted sum of the gold parts and of surface features; adding Gumbel noise and
sorting gives a Plackett-Luce ranking, whose pairs are Bradley-Terry (Luce 1959; Plackett 1975). Single labelers are
noisy and biased in different directions, so a reward model trained on all of them can beat each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise

import numpy as np

from lockstep.types import Comparison
from lockstep_miniature.dice import Dice
from lockstep_miniature.gold import gold
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
ALL_LABELERS: dict[str, Labeler] = {**TRAINING_LABELERS, **HELDOUT_LABELERS}


def utility(labeler: Labeler, world: World, task: Task, completion: str) -> float:
    """The labeler's utility of the completion, without noise."""
    seen = {
        **gold(world, task, completion),
        "length": len(completion.split()) / 10,
        "polite": float(completion.startswith(POLITE)),
    }
    return sum(weight * seen[taste] for taste, weight in labeler.items())


def ranks(utilities: Sequence[float]) -> tuple[int, ...]:
    """Places from 0 for the highest; one within `TIE` of the next higher shares its place."""
    order = sorted(range(len(utilities)), key=lambda i: -utilities[i])
    places = [0] * len(order)
    for above, below in pairwise(order):
        places[below] = places[above] + (utilities[above] - utilities[below] > TIE)
    return tuple(places)


def compare(world: World, task: Task, labelers: Mapping[str, Labeler], dice: Dice) -> Comparison:
    """One of the labelers ranks 4 to 9 completions of mixed quality."""
    count = MIN_COMPLETIONS + dice.below(MAX_COMPLETIONS - MIN_COMPLETIONS + 1)
    name = dice.pick(list(labelers))
    completions = complete(task, count, dice)
    felt = [utility(labelers[name], world, task, text) + NOISE * dice.gumbel() for text in completions]
    return Comparison(task.prompt(), completions, ranks(felt), name)


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
