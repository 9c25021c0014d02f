"""A reward server: JSON over HTTP. ``docs/rewards.md`` has the protocol and an example server."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from lockstep.config.schema import setting
from lockstep.config.secrets import redact
from lockstep.errors import RewardError
from lockstep.interfaces import Resources
from lockstep.learning.rows import Columns, Dialogue
from lockstep.learning.scores import scores_of
from lockstep_rlhf.reward_models.outside import NoScores, OneAtATime, Outside
from lockstep_rlhf.reward_models.server import LARGEST_ANSWER, Server, ServerConfig, shown, token

LARGEST_SCORE = 2**10
"""Bytes that an answer may have for each response, in addition to `LARGEST_ANSWER`."""


class Endpoint(Outside):
    """POSTs {"prompts": [[{"role", "content"}, ...], ...], "responses": [str, ...]} to ``url``; gets {"scores": [number, ...]}.
    If the prompts have columns, the request also has "columns": {name: [value, ...]}.

    A request is retried, up to ``retries`` times, if the connection fails or breaks off, no answer comes within
    ``timeout_seconds``, or the status is 429 or 5xx. Retries wait ``backoff_seconds``, doubled each time, with jitter, and at
    least as long as Retry-After says. Any other status fails at once, and so does an answer that is not one number per response.
    A score of null or NaN means that the server could not score that response. When a request has failed, ``on_failure`` applies
    to its batch, as in `Outside`.
    """

    @dataclass(frozen=True)
    class Config(ServerConfig):
        batch_size: int = setting(64, "Responses per request.", least=1)

    @classmethod
    def check(cls, config: Config) -> None:
        token(config.token_variable)

    def __init__(self, config: Config, resources: Resources):
        self.config, self.batch_size = config, config.batch_size
        self.server, self.calls = Server(config), OneAtATime()
        self.source = f"reward server {self.server.name}"

    def pause(self, attempt: int) -> float:
        return self.server.pause(attempt)

    def ask(self, prompts: list[Dialogue], texts: list[str], columns: Columns) -> np.ndarray:
        known = {"columns": columns} if columns else {}
        try:
            question = json.dumps({"prompts": prompts, "responses": texts, **known}).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(f"The columns of the prompts are no JSON, so {self.source} cannot be asked: {error}.") from error
        body = self.server.post(question, LARGEST_ANSWER + LARGEST_SCORE * len(texts), self.calls)
        try:
            return scores_in(body, len(texts))
        except RewardError:
            hidden = redact(body.decode(errors="replace"))
        try:  # parse it again without secrets, for a reason that shows none
            scores_in(hidden.encode(), len(texts))
            reason = "its answer is not JSON in UTF-8"
        except RewardError as error:
            reason = str(error)
        raise NoScores(f"{reason}; it said: {shown(hidden) or '(nothing)'}", again=False)


def scores_in(body: bytes, count: int) -> np.ndarray:
    """The scores in the body of an answer, float64 [count]; NaN for null.

    Raises:
      RewardError: the body is not {"scores": [one number for each response]}.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RewardError(f"its answer is not JSON ({error})") from None
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise RewardError('its answer should be {"scores": [...]}')
    return scores_of(scores, count)
