"""Gymnasium's environments in text: observations are what the policy reads, and its turns are actions.

What is asked is data, and what replies an environment. Both make the same one, and begin it with the prompt's seed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lockstep.config.schema import REQUIRED, setting
from lockstep.data.drawn import Seeded, SeededConfig, check_beginning, opening, seed_of
from lockstep.errors import ConfigError, listing, short, told
from lockstep.interfaces import Environment, Episode, Reply
from lockstep.learning.episodes import EnvironmentConfig
from lockstep.registry import use_current_folder
from lockstep.types import Prompt

COLORS = ("gray", "red", "green", "yellow", "blue", "magenta", "cyan", "white", "crimson")
"""Of the escape codes 30 to 38, and 40 to 48 for the background, as gymnasium.utils.colorize writes them."""


@dataclass(frozen=True, kw_only=True)
class MadeConfig:
    """What gymnasium.make takes."""

    id: str = setting(REQUIRED, "FrozenLake-v1, or my_module:Mine-v0.")
    settings: Mapping[str, Any] = setting({}, "Its keywords: {render_mode: ansi}.")


class Beginnings(Seeded):
    @dataclass(frozen=True, kw_only=True)
    class Config(MadeConfig, SeededConfig):
        pass

    @classmethod
    def check(cls, config: Config) -> None:
        make(config, "data").close()

    def first(self, seed: int) -> str:
        return first(self.config, "data", seed)


class Game(Environment):
    """Each turn is an action: the last word in it that ``actions`` has, or without ``actions`` the whole turn. In a turn without
    such a word no step is taken, and the policy is told the words. Rewards are Gymnasium's; the episode ends where it is
    terminated or truncated."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MadeConfig, EnvironmentConfig):
        actions: Mapping[str, int] = setting(
            {}, "A word for each action: {left: 0, right: 1}; none where an action is text.", least=-math.inf
        )
        invalid_reward: float = setting(0.0, "Of a turn without an action.", least=-math.inf)

        def __post_init__(self) -> None:
            words = [word.strip().lower() for word in self.actions]
            if "" in words or len({*words}) < len(words):
                raise ConfigError("environment.actions needs words that differ, in more than upper and lower case.")

    @classmethod
    def examples(cls, config: Config) -> Sequence[Prompt]:
        return [opening("", first(config, "environment", seed), seed) for seed in range(4)]

    @classmethod
    def check(cls, config: Config) -> None:
        import gymnasium

        game = make(config, "environment")
        space, actions = game.action_space, config.actions
        game.close()
        if isinstance(space, gymnasium.spaces.Text):
            if actions:
                raise ConfigError(f"'{config.id}' takes the policy's turn as it is. Remove environment.actions.")
        elif not actions:
            raise ConfigError(f"'{config.id}' takes actions of {space}. Name them: environment.actions='{{left: 0, right: 1}}'.")
        elif wrong := [word for word, action in actions.items() if action not in space]:
            raise ConfigError(f"environment.actions.{wrong[0]}={actions[wrong[0]]} is no action of '{config.id}': {space}.")

    def __init__(self, config: Config):
        super().__init__(config)
        self.actions = {word.strip().lower(): action for word, action in config.actions.items()}
        longest_first = sorted(self.actions, key=len, reverse=True)
        self.words = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)")

    def reply(self, episode: Episode) -> Reply:
        if episode.state is None:
            episode.state, observation = begin(self.config, "environment", seed_of(episode.prompt))
            check_beginning(episode.prompt, observation)
        said = self.words.findall(episode.text.lower()) if self.actions else ()
        if self.actions and not said:
            words = listing(self.actions)
            return Reply.says(f"No action was taken. Say one of: {words}.", reward=self.config.invalid_reward)
        action = self.actions[said[-1]] if said else episode.text
        observation, reward, terminated, truncated, _ = episode.state.step(action)
        if terminated or truncated:
            return Reply.ends(float(reward))
        return Reply.says(observed(episode.state, observation), reward=float(reward))

    def close(self, episode: Episode) -> None:
        if episode.state is not None:
            episode.state.close()


def make(config: MadeConfig, where: str) -> Any:
    """
    Raises:
      ConfigError: Gymnasium cannot.
    """
    import gymnasium

    use_current_folder()
    try:
        return gymnasium.make(config.id, **config.settings)
    except Exception as error:  # what is registered under an id may raise anything
        raise ConfigError(f"{where}.id='{short(config.id)}' cannot be made: {told(error)}. See {where}.settings too.") from error


def begin(config: MadeConfig, where: str, seed: int) -> tuple[Any, str]:
    """The game and its first observation."""
    game = make(config, where)
    observation, _ = game.reset(seed=seed)
    return game, observed(game, observation)


def first(config: MadeConfig, where: str, seed: int) -> str:
    """The first observation alone."""
    game, observation = begin(config, where, seed)
    game.close()
    return observation


def observed(game: Any, observation: Any) -> str:
    """An observation as text: a text as it is, else what ``render_mode: ansi`` draws, else numbers."""
    if isinstance(observation, str):
        return observation
    return uncolored(game.render()) if game.render_mode == "ansi" else numbers(observation)


def uncolored(drawn: str) -> str:
    """Colours by name, since they may be all that tells where something is: [red S]FFF."""
    named = re.sub(r"\x1b\[[34]([0-8])(;\d+)*m", lambda code: f"[{COLORS[int(code[1])]} ", drawn)
    return named.replace("\x1b[0m", "]").strip("\n")


def numbers(observation: Any) -> str:
    if isinstance(observation, Mapping):
        return "\n".join(f"{name}: {numbers(part)}" for name, part in observation.items())
    if isinstance(observation, str):
        return observation
    if isinstance(observation, tuple):
        return ", ".join(map(numbers, observation))
    return np.array2string(np.asarray(observation), precision=3, separator=", ", threshold=100, suppress_small=True)
