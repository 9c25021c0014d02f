"""Attackers that are wrong on purpose."""

from __future__ import annotations

import random
from dataclasses import dataclass

from defects import defect
from lockstep.interfaces import Attacker
from lockstep.learning.randomness import generator
from lockstep.types import Message

WORDS = ("w1", "w2", "w3", "w4", "w5", "w6")


class Begs(Attacker):
    """Says a word at random, and the goal. Nothing is wrong with it."""

    @dataclass(frozen=True)
    class Config:
        """None."""

    like = "miniature"

    def __init__(self, config, data, resources):
        pass

    def attack(self, goals, seed):
        return [self.begged(goal, generator(seed, "begs", place)) for place, goal in enumerate(goals)]

    def begged(self, goal, dice):
        return [Message("user", f"{WORDS[int(dice.integers(6))]} {goal.text}")]


@defect("attacker", caught_by="one_attack_for_each_goal")
class OncePerGoal(Begs):
    """Attacks each goal once, however often it is given."""

    def attack(self, goals, seed):
        return super().attack(list(dict.fromkeys(goals)), seed)


@defect("attacker", caught_by="one_attack_for_each_goal")
class AnswersItself(Begs):
    """Puts the reply that it wants to hear at the end of the dialogue."""

    def begged(self, goal, dice):
        return [*super().begged(goal, dice), Message("assistant", "w1")]


@defect("attacker", caught_by="equal_seeds_give_equal_attacks")
class OwnDice(Begs):
    """Draws from the process's generator."""

    def begged(self, goal, dice):
        return [Message("user", f"{random.random()} {goal.text}")]


@defect("attacker", caught_by="an_attack_depends_on_its_own_goal")
class OneStream(Begs):
    """Takes its random numbers from one stream, the last goal's first."""

    def attack(self, goals, seed):
        dice = generator(seed, "begs", 0)
        return [self.begged(goal, dice) for goal in goals[::-1]][::-1]


@defect("attacker", caught_by="the_truth_is_not_read")
class KnowsTheAnswer(Begs):
    """Asks for the answer by its name."""

    def begged(self, goal, dice):
        return [Message("user", f"{goal.text} {sorted(goal.truth)}")]


@defect("attacker", caught_by="a_twin_differs_in_its_goal_alone")
class PoliteTwins(Begs):
    """Says please for harmless goals only."""

    def twin(self, messages, goal):
        found = super().twin(messages, goal)
        return None if found is None else [Message("user", f"w6 {found[0].content}")]


@defect("attacker", caught_by="a_twin_differs_in_its_goal_alone")
class TwinsOfAll(Begs):
    """Makes a twin of an attack whose goal has none."""

    def twin(self, messages, goal):
        return super().twin(messages, goal) or list(messages)
