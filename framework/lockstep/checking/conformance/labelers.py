"""Labelers rank all completions of a prompt, whoever wrote them and whatever else is labelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lockstep.checking.conformance.kit import check, require
from lockstep.checking.conformance.subjects import LabelerSubject
from lockstep.interfaces import Label


def shown(labels: Sequence[Label]) -> str:
    return "; ".join(f"{label.id} {list(label.ranks)} by {label.labeler}" for label in labels[:4])


def equal(what: str, found: Sequence[Label], expected: Sequence[Label]) -> None:
    pairs = [f"{a} is not {b}" for a, b in zip(found, expected, strict=False) if a != b]
    counts = f"{len(found)} labels in place of {len(expected)}"
    require(list(found) == list(expected), f"{what}: {pairs[0] if pairs else counts} ({len(pairs)} of {len(expected)} differ)")


@check("labeler", usually="ids made up instead of taken from the candidates, or ranks of the best completions only")
def labels_rank_every_completion(subject: LabelerSubject) -> None:
    """A label has the id of a candidate and one rank for each of its completions, and names its labeler."""
    candidates = {each.id: each for each in subject.candidates()}
    labels = subject.labels(list(candidates.values()))
    require(len(labels) > 0, f"of {len(candidates)} candidates none has a label")
    for label in labels:
        require(label.id in candidates, f"a label has the id {label.id!r}, which is none of {', '.join(candidates)}")
        count = len(candidates[label.id].completions)
        require(len(label.ranks) == count, f"{label.id} has {len(label.ranks)} ranks for {count} completions")
        require(bool(label.labeler), f"the label of {label.id} does not say whose it is")


@check("labeler", usually="places counted from 1, or scores in place of ranks")
def the_best_has_rank_zero(subject: LabelerSubject) -> None:
    """Ranks are whole numbers without gaps, and 0 is the best."""
    for label in subject.labels(subject.candidates()):
        whole = all(type(rank) is int for rank in label.ranks)
        require(whole and sorted(set(label.ranks)) == list(range(len(set(label.ranks)))), f"{label.id} has ranks {label.ranks}")


@check("labeler", usually="a generator of its own, or the clock; draw from the seed")
def equal_seeds_give_equal_labels(subject: LabelerSubject) -> None:
    """A new object gives the same labels for the same candidates and seed, so a resumed run trains on the same labels."""
    first, again = (subject.labels(subject.candidates(), seed=3) for _ in range(2))
    equal("the labels of a second object", again, first)


@check("labeler", usually="random numbers drawn one after the other, or scores compared with the mean of the batch")
def a_label_is_about_its_own_candidates(subject: LabelerSubject) -> None:
    """Candidates get the same labels alone and in another order."""
    candidates = subject.candidates()
    whole = subject.labels(candidates, seed=3)
    equal("the labels of reversed candidates", subject.labels(candidates[::-1], seed=3), whole)
    alone = [label for label in whole if label.id == candidates[1].id]
    equal("the labels of one candidate", subject.labels(candidates[1:2], seed=3), alone)


@check("labeler", usually="it reads `Candidates.policies` or `scores`, which exist for those who look at labels afterwards")
def who_wrote_it_does_not_matter(subject: LabelerSubject) -> None:
    """Labels are the same whichever policies wrote the completions and whatever a reward model thinks of them."""
    plain = subject.candidates()
    named = [
        replace(
            each,
            policies=tuple(f"{'sft' if j % 2 else 'ppo'}-torch-0123" for j in range(len(each.completions))),
            scores=tuple(float(-j) for j in range(len(each.completions))),
        )
        for each in plain
    ]
    equal("the labels of completions with names", subject.labels(named), subject.labels(plain))
