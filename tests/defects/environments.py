"""Environments that are wrong on purpose."""

from __future__ import annotations

import random
import time

from defects import defect
from lockstep.interfaces import Environment, Reply
from lockstep.learning.episodes import EnvironmentConfig


class Counts(Environment):
    """Says how many words it heard, and ends after two turns. Nothing is wrong with it."""

    Config = EnvironmentConfig
    like = "limits"

    def reply(self, episode):
        heard = len(episode.text.split())
        return Reply.ends(float(heard)) if episode.turn == 2 else Reply.says(f"w{heard} w{episode.seed % 7}")


@defect("environment", caught_by="any_turn_gets_a_reply")
class ExpectsANumber(Counts):
    """Fails on a turn that is no number."""

    def reply(self, episode):
        return Reply.ends(float(int(episode.text)))


@defect("environment", caught_by="any_turn_gets_a_reply")
class InfiniteReward(Counts):
    """Divides by the number of words, which may be 0."""

    def reply(self, episode):
        return Reply.ends(1 / len(episode.text.split()) if episode.text.split() else float("inf"))


@defect("environment", caught_by="any_turn_gets_a_reply")
class SpeaksAsThePolicy(Counts):
    """Puts words into the policy's mouth, which would be trained on as if it had said them."""

    def reply(self, episode):
        return Reply.says("w1", role="assistant")


@defect("environment", caught_by="the_same_episode_is_the_same_again")
class OwnDice(Counts):
    """Draws from Python's generator: another reply in every run, and none after a restart is the same."""

    def reply(self, episode):
        return Reply.says(f"w{random.randrange(10**6)}")


@defect("environment", caught_by="the_same_episode_is_the_same_again")
class TheClock(Counts):
    """Tells the time."""

    def reply(self, episode):
        return Reply.says(f"it is {time.perf_counter_ns()}")


@defect("environment", caught_by="episodes_are_apart")
class SharedState(Counts):
    """Counts turns in the object: all episodes together."""

    def __init__(self, config, resources=None):
        super().__init__(config)
        self.heard = 0

    def reply(self, episode):
        self.heard += 1
        return Reply.says(f"w{self.heard}")


@defect("environment", caught_by="what_it_is_given_is_left_alone")
class AppendsItself(Counts):
    """Appends its message to the episode, which the rollout then does again."""

    def reply(self, episode):
        reply = super().reply(episode)
        episode.messages.extend(reply.messages)
        return reply


@defect("environment", caught_by="what_it_is_given_is_left_alone")
class WritesIntoTheRow(Counts):
    """Keeps its state in the row of the data, where the next episode of the prompt finds it."""

    def reply(self, episode):
        episode.prompt.truth["turn"] = episode.turn
        return super().reply(episode)


@defect("environment", caught_by="closing_an_episode_leaves_the_others")
class ClosesAll(Counts):
    """Frees the states of all episodes when one ends."""

    def __init__(self, config, resources=None):
        super().__init__(config)
        self.states = {}

    def reply(self, episode):
        heard = self.states.setdefault(id(episode), []) + [episode.text]
        self.states[id(episode)] = heard
        return Reply.says(f"w{len(heard)}")

    def close(self, episode):
        self.states.clear()


@defect("environment", caught_by="replies_at_once_are_the_same")
class OneAtATime(Counts):
    """Keeps the episode in the object between two lines."""

    def reply(self, episode):
        self.current = episode
        time.sleep(0.01)
        return super().reply(self.current)


@defect("environment", caught_by="replies_at_once_are_the_same")
class MixesUpTheBatch(Counts):
    """Replies to a batch by its longest episodes first, and hands the replies out in that order."""

    def replies(self, episodes):
        return [self.reply(each) for each in sorted(episodes, key=lambda each: -len(each.text))]
