"""Environments reply to anything, the same each time, and to each episode independently of others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from lockstep.checking.conformance.kit import check, require
from lockstep.checking.conformance.subjects import EnvironmentSubject
from lockstep.interfaces import Environment, Episode, Reply
from lockstep.learning.episodes import checked, replies
from lockstep.types import Message

SAID = (
    ("w1 w2", "7", "yes"),
    ("", " ", "\n"),
    ("x" * 10_000, "1e999", "nan"),
    ('{"name": "w1", "arguments": {}}', "<tool_call>", '<tool_call>{"name": "w1", "arguments": [1]}</tool_call>'),
    ("<stop> <|im_end|> </s>", "\u26fa \ufffd \u202e", "-1 0 12345678901234567890"),
)
"""Turns of an untrained policy, one episode per row."""


def turns(said: Sequence[str], environment: Environment) -> list[str]:
    """As many turns as an episode may have, 6 at most."""
    return [said[i % len(said)] for i in range(min(environment.config.turns, 6))]


def take(environment: Environment, episode: Episode, text: str) -> Reply:
    """Append one more turn and the reply to it; return the reply."""
    episode.messages.append(Message("assistant", text))
    reply = checked(environment.reply(episode))
    episode.messages += reply.messages
    return reply


def transcript(environment: Environment, episode: Episode, said: Sequence[str]) -> list[Reply]:
    """The replies of a whole episode, which is closed at its end."""
    found: list[Reply] = []
    for text in turns(said, environment):
        found.append(take(environment, episode, text))
        if found[-1].done or not found[-1].messages:
            break
    environment.close(episode)
    return found


def shown(found: Sequence[Reply]) -> str:
    return "; ".join(f"{[m.content[:40] for m in reply.messages]} {reply.reward:g}{' done' * reply.done}" for reply in found)


def equal(what: str, found: Sequence[Reply], expected: Sequence[Reply]) -> None:
    require(list(found) == list(expected), f"{what} are {shown(found)} where they were {shown(expected)} ({len(expected)} turns)")


@check("environment", usually="a parser that expects what a trained policy writes; a fresh one writes anything")
def any_turn_gets_a_reply(subject: EnvironmentSubject) -> None:
    """Whatever the policy says, `reply` returns a `Reply` with a finite reward and messages from users or tools."""
    for number, said in enumerate(SAID):
        for episode in subject.episodes(1, seed=number):
            transcript(subject.build_environment(), episode, said)


@check("environment", usually="a generator of its own, or the clock; draw from `Episode.seed`")
def the_same_episode_is_the_same_again(subject: EnvironmentSubject) -> None:
    """A new object gives the same replies to the same prompt, seed and turns."""
    for said in SAID:
        first, again = (transcript(subject.build_environment(), subject.episodes(1)[0], said) for _ in range(2))
        equal("the replies in a second run", again, first)


@check("environment", usually="state kept in the object, where all episodes share it, instead of in `Episode.state`")
def episodes_are_apart(subject: EnvironmentSubject) -> None:
    """Two interleaved episodes get the replies that each gets alone."""
    said = SAID[0], SAID[1]
    apart = zip(subject.episodes(2), said, strict=True)
    alone = [transcript(subject.build_environment(), episode, words) for episode, words in apart]
    environment, together = subject.build_environment(), subject.episodes(2)
    found: list[list[Reply]] = [[], []]
    for i in range(len(turns(said[0], environment))):
        for which, episode in enumerate(together):
            if not found[which] or (found[which][-1].messages and not found[which][-1].done):
                found[which].append(take(environment, episode, turns(said[which], environment)[i]))
    for which, episode in enumerate(together):
        environment.close(episode)
        equal(f"the replies to episode {which} beside another", found[which], alone[which])


@check("environment", usually="messages appended by the environment itself: the rollout does that, after checking them")
def what_it_is_given_is_left_alone(subject: EnvironmentSubject) -> None:
    """`reply` does not change the prompt, its truth, the seed or the messages so far."""
    environment = subject.build_environment()
    (episode,) = subject.episodes(1)
    for number, text in enumerate(turns(SAID[0], environment), 1):
        episode.messages.append(Message("assistant", text))
        before = copy.deepcopy((episode.prompt, dict(episode.prompt.truth), episode.messages, episode.seed))
        reply = checked(environment.reply(episode))
        after = (episode.prompt, dict(episode.prompt.truth), episode.messages, episode.seed)
        require(after == before, f"in turn {number} `reply` changed the episode that it was given")
        if reply.done or not reply.messages:
            break
        episode.messages += reply.messages
    environment.close(episode)


@check("environment", usually="`close` frees what other episodes still use, or fails on an episode that is not finished")
def closing_an_episode_leaves_the_others(subject: EnvironmentSubject) -> None:
    """Closing an episode after its first turn does not affect another episode."""
    expected = transcript(subject.build_environment(), subject.episodes(2)[1], SAID[0])
    environment = subject.build_environment()
    closed, other = subject.episodes(2)
    take(environment, closed, SAID[0][0])
    first = take(environment, other, SAID[0][0])
    environment.close(closed)
    found = [first]
    for text in turns(SAID[0], environment)[1:]:
        if found[-1].done or not found[-1].messages:
            break
        found.append(take(environment, other, text))
    environment.close(other)
    equal("the replies after another episode was closed", found, expected)


@check("environment", usually="a shared variable between two lines of `reply`; with environment.at_once=1 nobody notices")
def replies_at_once_are_the_same(subject: EnvironmentSubject) -> None:
    """Replies made in four threads, or by `replies`, equal replies made one after the other."""

    def first(at_once: int, ask: Callable[[Environment, Sequence[Episode]], Sequence[Reply | None]]) -> list[Reply]:
        environment, episodes = subject.build_environment(at_once=at_once), subject.episodes(12)
        for number, episode in enumerate(episodes):
            episode.messages.append(Message("assistant", SAID[number % len(SAID)][0]))
        found = [reply for reply in ask(environment, episodes) if reply is not None]
        for episode in episodes:
            environment.close(episode)
        return found

    alone = first(1, lambda environment, episodes: [checked(environment.reply(episode)) for episode in episodes])
    equal("the first replies with at_once=4", first(4, replies), alone)
