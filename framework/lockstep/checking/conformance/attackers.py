"""Attackers write dialogues that end with the user's turn, each from its goal, its place and the seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lockstep.checking.conformance.kit import check, require
from lockstep.checking.conformance.subjects import AttackerSubject
from lockstep.types import Goal, Message

Attacks = Sequence[Sequence[Message] | None]


def shown(attack: Sequence[Message] | None) -> str:
    return "None" if attack is None else " | ".join(f"{message.role}: {message.content[:60]}" for message in attack)


def equal(what: str, found: Attacks, expected: Attacks) -> None:
    require(len(found) == len(expected), f"{what}: {len(found)} in place of {len(expected)}")
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        same = (one is None and other is None) or (one is not None and other is not None and list(one) == list(other))
        require(same, f"{what}: at place {place}, {shown(one)} is not {shown(other)}")


def check_dialogue(attack: Sequence[Message], what: str) -> None:
    roles = [message.role for message in attack if message.role != "system"]
    turns = ["assistant" if i % 2 else "user" for i in range(len(roles))]
    require(roles == turns and len(roles) % 2 == 1, f"{what} has the turns {', '.join(roles) or 'none'}")
    require(bool(attack[-1].content.strip()), f"{what} ends with an empty turn")


@check("attacker", usually="attacks it could not write are left out, so that the others stand at wrong places; return None there")
def one_attack_for_each_goal(subject: AttackerSubject) -> None:
    """There are as many attacks as goals. Each is None or a dialogue that the user begins and ends."""
    goals = subject.goals()
    attacks = subject.attacks_on(goals)
    require(len(attacks) == len(goals), f"{len(attacks)} attacks on {len(goals)} goals")
    for place, attack in enumerate(attacks):
        if attack is not None:
            check_dialogue(attack, f"the attack at place {place}")


@check("attacker", usually="a generator of its own, or the clock; draw from the seed")
def equal_seeds_give_equal_attacks(subject: AttackerSubject) -> None:
    """A new object gives the same attacks for the same goals and seed, so a resumed run is the same."""
    first, again = (subject.attacks_on(subject.goals(), seed=3) for _ in range(2))
    equal("the attacks of a second object", again, first)


@check("attacker", usually="random numbers drawn one after the other; draw them from the seed and the place")
def an_attack_depends_on_its_own_goal(subject: AttackerSubject) -> None:
    """An attack does not change if later goals are left out or replaced."""
    goals = subject.goals()
    whole = subject.attacks_on(goals, seed=3)
    equal("the attacks on fewer goals", subject.attacks_on(goals[:2], seed=3), whole[:2])
    equal("the attacks before other goals", subject.attacks_on([*goals[:2], *goals[:1:-1]], seed=3)[:2], whole[:2])


@check("attacker", usually="it reads `Goal.truth`, which has what a judge must know and an attacker must not")
def the_truth_is_not_read(subject: AttackerSubject) -> None:
    """Attacks are the same whatever the data know about their goals."""
    goals = subject.goals()
    blind = [replace(goal, truth={}) for goal in goals]
    equal("the attacks on goals of which nothing is known", subject.attacks_on(blind, seed=3), subject.attacks_on(goals, seed=3))


@check("attacker", usually="`twin` writes a new attack; what differs besides the goal teaches policies to tell them apart by it")
def a_twin_differs_in_its_goal_alone(subject: AttackerSubject) -> None:
    """`twin` gives the attack on a goal's twin in the same words, and None for a goal without a twin."""
    goals = [replace(goal, twin=Goal("pet a cat", "pet a cat")) for goal in subject.goals()]
    attacker = subject.build_attacker()
    for place, (goal, attack) in enumerate(zip(goals, attacker.attack(goals, 3), strict=True)):
        if attack is None:
            continue
        twin = attacker.twin(attack, goal)
        if twin is not None:
            check_dialogue(twin, "a twin")
            words = [message.content.replace("pet a cat", goal.text) for message in twin]
            plain = any(goal.text in message.content for message in attack)
            same = not plain or words == [message.content for message in attack]
            require(same, f"the twin of '{shown(attack)}' is '{shown(twin)}'")
        require(
            attacker.twin(attack, replace(goal, twin=None)) is None, f"the goal at place {place} has no twin, and one is made"
        )
