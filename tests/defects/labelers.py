"""Labelers that are wrong on purpose."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from defects import defect
from lockstep.interfaces import Label, Labeler
from lockstep.learning import numerics
from lockstep.learning.randomness import generator


class Longest(Labeler):
    """Prefers more words. Nothing is wrong with it."""

    @dataclass(frozen=True)
    class Config:
        """None."""

    like = "people"

    def __init__(self, config, data, resources):
        pass

    def label(self, candidates, seed, folder):
        return [Label(each.id, numerics.ranks([len(text.split()) for text in each.completions]), "lia") for each in candidates]


@defect("labeler", caught_by="labels_rank_every_completion")
class CountsCandidates(Longest):
    """Numbers the candidates itself."""

    def label(self, candidates, seed, folder):
        return [replace(label, id=str(number)) for number, label in enumerate(super().label(candidates, seed, folder))]


@defect("labeler", caught_by="labels_rank_every_completion")
class OnlyTheBestTwo(Longest):
    """Ranks two completions of each prompt, and says nothing of the others."""

    def label(self, candidates, seed, folder):
        return [replace(label, ranks=label.ranks[:2]) for label in super().label(candidates, seed, folder)]


@defect("labeler", caught_by="the_best_has_rank_zero")
class CountsFromOne(Longest):
    """Places as people say them."""

    def label(self, candidates, seed, folder):
        return [
            replace(label, ranks=tuple(rank + 1 for rank in label.ranks)) for label in super().label(candidates, seed, folder)
        ]


@defect("labeler", caught_by="the_best_has_rank_zero")
class Skips(Longest):
    """After a tie for the first place the next is third, as in sports: a gap that looks like a larger difference."""

    def label(self, candidates, seed, folder):
        labels = super().label(candidates, seed, folder)
        return [replace(label, ranks=tuple(2 * rank for rank in label.ranks)) for label in labels]


@defect("labeler", caught_by="equal_seeds_give_equal_labels")
class OwnDice(Longest):
    """Draws from Python's generator: a resumed run trains on other labels."""

    def label(self, candidates, seed, folder):
        return [
            Label(each.id, numerics.ranks([random.random() for _ in each.completions]), "lia") for each in candidates
        ]  # fmt: skip


@defect("labeler", caught_by="a_label_is_about_its_own_candidates")
class OneGenerator(Longest):
    """Noise is drawn one number after the other, so a label depends on what was labelled before."""

    def label(self, candidates, seed, folder):
        noise = generator(seed, "noise")
        return [Label(each.id, numerics.ranks(noise.random(len(each.completions))), "lia") for each in candidates]


@defect("labeler", caught_by="who_wrote_it_does_not_matter")
class KnowsTheNames(Longest):
    """Likes what the newest policy wrote."""

    def label(self, candidates, seed, folder):
        found = []
        for each, label in zip(candidates, super().label(candidates, seed, folder), strict=True):
            newer = [policy.startswith("ppo") for policy in each.policies] or [len(t.split()) for t in each.completions]
            found.append(replace(label, ranks=numerics.ranks(newer)))
        return found
