"""OpenEnv environments: a server holds a session for each episode, on its own WebSocket.

The messages are those of openenv-core 0.3 and openenv 0.10. Their client is not used, because it comes with their server's web
framework. The server receives {"type": "reset", "data": {"seed": ...}} and {"type": "step", "data": the action}. It answers
{"type": "observation", "data": {"observation", "reward", "done"}} or {"type": "error", "data": {"message", "code", ...}}.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lockstep.config.schema import REQUIRED, setting
from lockstep.data.drawn import Seeded, SeededConfig, check_beginning, opening, seed_of
from lockstep.errors import ConfigError, EnvironmentFailed, listing, short, told
from lockstep.interfaces import Environment, Episode, Reply
from lockstep.learning.episodes import EnvironmentConfig
from lockstep.types import Prompt

LARGEST_ANSWER = 2**22
"""Bytes. If a server sends more, the connection is closed."""
CLOSING = 1.0
"""Seconds to wait for the server to end a session."""
SECONDS = 60.0
"""Time limit for an answer to the data source. The environment has its own: `environment.timeout_seconds`."""


class Refused(Exception):
    """The action does not fit what the environment declares; the message says why."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    url: str = setting(REQUIRED, "http://127.0.0.1:8000. Part of a stage's identity: include the environment's version in it.")
    observation: str | None = setting(None, "Observation field that the policy reads; null: all but metadata, as JSON.")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", self.url):
            raise ConfigError(f"url='{short(self.url)}' is no address of a server. Write it as http://127.0.0.1:8000.")


class Beginnings(Seeded):
    @dataclass(frozen=True, kw_only=True)
    class Config(ServerConfig, SeededConfig):
        pass

    def first(self, seed: int) -> str:
        return first(self.config, seed)


class Remote(Environment):
    """Each turn is an action: the text of the action's field ``action`` or, if that is null, the whole action as JSON. If the
    server rejects it as invalid, the policy is told why. Rewards are the server's. The episode ends when the server reports
    done."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ServerConfig, EnvironmentConfig):
        action: str | None = setting(None, "Action field that holds the policy's turn; null: the turn is the action, as JSON.")
        invalid_reward: float = setting(0.0, "Reward of a turn that is not a valid action.", least=-math.inf)

    @classmethod
    def examples(cls, config: Config) -> Sequence[Prompt]:
        return [opening("", first(config, seed), seed) for seed in range(4)]

    def reply(self, episode: Episode) -> Reply:
        if episode.state is None:
            episode.state = Session(self.config, self.config.timeout_seconds)
            check_beginning(episode.prompt, episode.state.reset(seed_of(episode.prompt)))
        try:
            action = {self.config.action: episode.text} if self.config.action else _object(episode.text)
            observation, reward, done = episode.state.ask("step", action)
        except Refused as error:
            return Reply.says(f"No action was taken: {error}", reward=self.config.invalid_reward)
        return Reply.ends(reward) if done else Reply.says(observation, reward=reward)

    def close(self, episode: Episode) -> None:
        if episode.state is not None:
            episode.state.close()


class Session:
    """One episode on the server."""

    def __init__(self, config: ServerConfig, seconds: float):
        from websockets.sync.client import connect

        self.config, self.seconds = config, seconds
        try:
            here = urlsplit(config.url).hostname in ("localhost", "127.0.0.1", "::1")
            self.socket = connect(
                f"ws{config.url.removeprefix('http').rstrip('/')}/ws", open_timeout=seconds, close_timeout=CLOSING,
                max_size=LARGEST_ANSWER, proxy=None if here else True,
            ).__enter__()  # fmt: skip  # websockets wants a `with`, but an episode ends elsewhere
        except Exception as error:
            raise EnvironmentFailed(f"there is no connection to {config.url}: {told(error)}") from error

    def reset(self, seed: int) -> str:
        try:
            return self.ask("reset", {"seed": seed})[0]
        except Refused as error:
            raise EnvironmentFailed(f"the server does not begin with a seed: {error}") from error

    def ask(self, what: str, data: Mapping[str, Any]) -> tuple[str, float, bool]:
        """Send a message; return the observation, the reward and whether the episode is over.

        Raises:
          Refused: the server rejects the data as invalid.
          EnvironmentFailed: there is no answer, or not one of this protocol.
        """
        with contextlib.suppress(Exception):  # a full server says so and hangs up before it is asked
            self.socket.send(json.dumps({"type": what, "data": data}))
        try:
            answer = json.loads(self.socket.recv(timeout=self.seconds))
        except Exception as error:  # a broken connection, or an answer that is not JSON
            raise EnvironmentFailed(f"{self.config.url} gave no answer: {told(error)}") from error
        match answer:
            case {"type": "error", "data": {"code": "VALIDATION_ERROR", "errors": [{"loc": where, "msg": why}, *_]}}:
                raise Refused(short(f"{'.'.join(map(str, where))}: {why}"))
            case {"type": "observation", "data": {"observation": dict(seen), "reward": reward, "done": bool(done)}}:
                if reward is None or isinstance(reward, int | float):
                    return self.read(seen), float(reward or 0), done
        raise EnvironmentFailed(f"{self.config.url} answered {told(answer)}")

    def read(self, observation: Mapping[str, Any]) -> str:
        name = self.config.observation
        if name is not None and name not in observation:
            raise EnvironmentFailed(f"an observation has no '{short(name)}'. It has: {listing(observation)}.")
        found = {key: value for key, value in observation.items() if key != "metadata"} if name is None else observation[name]
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    def close(self) -> None:
        """End the session and wait for the server to free it: until then it counts against `max_concurrent_envs`."""
        with contextlib.suppress(Exception):  # the server may have hung up already
            self.socket.send(json.dumps({"type": "close"}))
            self.socket.recv(timeout=CLOSING)
        self.socket.close()


def first(config: ServerConfig, seed: int) -> str:
    """The first observation of the episode with this seed."""
    session = Session(config, SECONDS)
    try:
        return session.reset(seed)
    finally:
        session.close()


def _object(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(f"it is not JSON: {short(str(error))}") from None
    if not isinstance(found, dict):
        raise Refused('it should be a JSON object: {"name": ...}')
    return found
