"""Gymnasium environments as text: the policy reads observations, and its turns are actions.

A data source gives the prompts, and an environment replies. Both make the same Gymnasium environment and reset it with the
prompt's seed.
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
from lockstep.interfaces import Environment, Episode, Reply, Resources
from lockstep.learning.episodes import EnvironmentConfig
from lockstep.registry import use_current_folder
from lockstep.types import Prompt

COLORS = ("gray", "red", "green", "yellow", "blue", "magenta", "cyan", "white", "crimson")
"""Names of the escape codes 30 to 38 (40 to 48 for the background) that gymnasium.utils.colorize writes."""


@dataclass(frozen=True, kw_only=True)
class MadeConfig:
    """Arguments of gymnasium.make."""

    id: str = setting(REQUIRED, "Gymnasium's id: FrozenLake-v1, or my_module:Mine-v0.")
    settings: Mapping[str, Any] = setting({}, "Keyword arguments for gymnasium.make: {render_mode: ansi}.")


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
    """Each turn is an action: the last word in it that ``actions`` has or, without ``actions``, the whole turn. A turn without
    such a word takes no step, and the reply lists the words. Rewards are Gymnasium's. The episode ends when Gymnasium terminates
    or truncates it."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MadeConfig, EnvironmentConfig):
        actions: Mapping[str, int] = setting(
            {}, "A word for each action: {left: 0, right: 1}; empty if actions are text.", least=-math.inf
        )
        invalid_reward: float = setting(0.0, "Reward of a turn without an action.", least=-math.inf)

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

    def __init__(self, config: Config, resources: Resources | None = None):
        super().__init__(config, resources)
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
      ConfigError: Gymnasium cannot make the environment.
    """
    import gymnasium

    use_current_folder()
    try:
        return gymnasium.make(config.id, **config.settings)
    except Exception as error:  # a registered environment may raise anything
        raise ConfigError(f"{where}.id='{short(config.id)}' cannot be made: {told(error)}. See {where}.settings too.") from error


def begin(config: MadeConfig, where: str, seed: int) -> tuple[Any, str]:
    """Make a game, reset it with the seed, and return it with its first observation."""
    game = make(config, where)
    observation, _ = game.reset(seed=seed)
    return game, observed(game, observation)


def first(config: MadeConfig, where: str, seed: int) -> str:
    """The first observation alone."""
    game, observation = begin(config, where, seed)
    game.close()
    return observation


def observed(game: Any, observation: Any) -> str:
    """An observation as text: a string as is, else what ``render_mode: ansi`` draws, else numbers."""
    if isinstance(observation, str):
        return observation
    return uncolored(game.render()) if game.render_mode == "ansi" else numbers(observation)


def uncolored(drawn: str) -> str:
    """Replace colour codes by names, because colour alone may show where something is: [red S]FFF."""
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
