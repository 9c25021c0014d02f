"""A reward server: JSON over HTTP. ``docs/rewards.md`` has the protocol and a server to start from."""

from __future__ import annotations

import datetime
import email.utils
import http.client
import json
import os
import random
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from lockstep.config.schema import REQUIRED, setting
from lockstep.errors import ConfigError
from lockstep.interfaces import Resources
from lockstep_rlhf.reward_models.outside import Dialogue, NoScores, Outside, within

LONGEST_PAUSE = 60.0
"""Seconds between two attempts, unless the server asks for more."""
LONGEST_WAIT = 600.0
"""Seconds that a server may ask for; one that asks for more is down."""
SHOWN = 200
"""Characters of a refusal shown in the error."""


class Endpoint(Outside):
    """POST {"prompts": [[{"role", "content"}, ...], ...], "responses": [str, ...]} to ``url``; {"scores": [number, ...]} back.

    A request is retried, up to ``retries`` times, if the connection fails or breaks off, no answer comes within
    ``timeout_seconds``, or the status is 429 or 5xx. Retries wait ``backoff_seconds``, doubled each time, with jitter, and at
    least as long as Retry-After says. Any other status, or an answer that is not one number per response, fails at once. null
    and NaN mean that the server could not score this one response. A failure is then handled for the batch by ``on_failure``,
    as in `Outside`.

    ``token_variable`` names the environment variable with a bearer token: the token itself never appears in a configuration,
    log or error. Redirects are not followed: they would take the token elsewhere.
    """

    @dataclass(frozen=True)
    class Config:
        url: str = setting(REQUIRED, "http://127.0.0.1:8000/score. Part of a stage's identity: name the model's version in it.")
        token_variable: str | None = setting(None, "The NAME of an environment variable with a bearer token; null: none.")
        batch_size: int = setting(64, "Responses per request.", least=1)
        timeout_seconds: float = setting(60.0, "Limit of one request, from first to last byte.", above=0)
        retries: int = setting(5, "Further attempts after one that fails.", least=0)
        backoff_seconds: float = setting(1.0, "Before the first retry; doubled each time, with jitter.", least=0)
        on_failure: Literal["raise", "drop"] = setting(
            "raise", "Stop the run; or drop: leave the episodes out and say how many. A failure is never a score."
        )

        def __post_init__(self):
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ConfigError(f"reward_model.url='{self.url}' should look like http://127.0.0.1:8000/score.")
            if parts.username or parts.password:
                raise ConfigError(
                    f"reward_model.url of {parts.hostname} holds credentials. Put the token in an environment variable and name "
                    "it: reward_model.token_variable=REWARD_TOKEN."
                )

    @classmethod
    def check(cls, config: Config) -> None:
        _token(config.token_variable)

    def __init__(self, config: Config, resources: Resources):
        self.config, self.batch_size = config, config.batch_size
        parts = urlsplit(config.url)
        self.source = f"reward server {parts.scheme}://{parts.netloc}{parts.path}"  # without the query, which may hold a key
        self.token = _token(config.token_variable)
        self.opener = urllib.request.build_opener(_NoRedirects)

    def ask(self, prompts: list[Dialogue], texts: list[str]) -> np.ndarray:
        question = json.dumps({"prompts": prompts, "responses": texts}).encode()
        return scores_in(within(self.config.timeout_seconds, lambda: self._post(question)), len(texts))

    def pause(self, attempt: int) -> float:
        """With jitter, so that jobs that failed together do not retry together. Nothing else here is random, and it changes no
        score."""
        return min(LONGEST_PAUSE, self.config.backoff_seconds * 2**attempt) * random.uniform(0.5, 1.0)

    def _post(self, question: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        request = urllib.request.Request(self.config.url, data=question, headers=headers, method="POST")
        try:
            with self.opener.open(request, timeout=self.config.timeout_seconds) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:  # no connection, or one that broke off
            raise NoScores(f"no connection: {error!r}") from None

    def _refusal(self, error: urllib.error.HTTPError) -> NoScores:
        try:
            said = error.read(4 * SHOWN).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            said = ""
        said = (said.replace(self.token, "***") if self.token else said)[:SHOWN].strip()
        wait = _retry_after(error.headers.get("Retry-After"))
        again = (error.code == 429 or error.code >= 500) and wait <= LONGEST_WAIT
        asked = f", retry after {wait:g} seconds" if wait else ""
        return NoScores(f"it answered {error.code} {error.reason}{asked}: {said or '(nothing more)'}", again=again, wait=wait)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None  # then the status is an error like any other


def scores_in(body: bytes, count: int) -> np.ndarray:
    """float64 [count] of an answer's body; NaN for null.

    Raises:
      NoScores: the body is not {"scores": [one number for each response]}.
    """
    try:
        answer = json.loads(body)
    except ValueError as error:
        raise NoScores(f"its answer is not JSON ({error}): {body[:SHOWN]!r}", again=False) from None
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise NoScores(f'its answer should be {{"scores": [...]}}, not {body[:SHOWN]!r}', again=False)
    if len(scores) != count:
        raise NoScores(f"it sent {len(scores)} scores for {count} responses; one number each is needed", again=False)
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, (int, float, type(None))):
            raise NoScores(f"it sent the score {score!r}, which is not a number", again=False)
    try:
        return np.array([np.nan if score is None else float(score) for score in scores])
    except OverflowError as error:
        raise NoScores(f"it sent a score that is too large: {error}", again=False) from None


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ConfigError(
            f"The environment variable {variable} is not set. Put the reward server's token there, or set "
            "reward_model.token_variable=null."
        )
    if not token.isascii() or not token.isprintable():
        raise ConfigError(f"The token in the environment variable {variable} has characters that no HTTP header may have.")
    return token


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, which is a number or a date (RFC 9110, 10.2.3); 0 without a usable one."""
    if not value:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        then = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    then = then if then.tzinfo else then.replace(tzinfo=datetime.UTC)
    return max(0.0, (then - datetime.datetime.now(datetime.UTC)).total_seconds())
