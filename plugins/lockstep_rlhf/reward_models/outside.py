"""Scores from code outside Lockstep: retries and the handling of failures. A failure is never replaced by a number."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from lockstep.errors import RewardError, told
from lockstep.interfaces import Responses, RewardModel
from lockstep.learning.aside import Aside
from lockstep.learning.rows import Columns, Dialogue, columns_of, dialogues
from lockstep.text.sequences import chunks

log = logging.getLogger("lockstep")

T = TypeVar("T")

LONGEST_TIMEOUT = 86400.0
"""A day, in seconds."""
MOST_RETRIES = 1000


class NoScores(RewardError):
    """The reason why there are no scores. ``again``: whether a retry may help, after at least ``wait`` seconds."""

    def __init__(self, reason: str, *, again: bool = True, wait: float = 0.0):
        super().__init__(reason)
        self.again, self.wait = again, wait


class Outside(RewardModel):
    """Base of reward models whose scores come from outside. A subclass gets the scores in `ask` and names their origin in
    ``source``. Its ``Config`` has ``retries`` and ``on_failure``: 'raise' stops the run with the reason; 'drop' takes the
    episodes out of the batch (their score is NaN) and logs how many.
    """

    config: Any
    source: str
    batch_size: int | None = None
    """Responses per call of `ask`; None: all."""

    @abstractmethod
    def ask(self, prompts: list[Dialogue], texts: list[str], columns: Columns) -> np.ndarray:
        """Scores, float64 [B]; not finite where a response could not be scored. ``columns``: what is known about each prompt.

        Raises:
          NoScores: the whole call failed.
        """

    def pause(self, attempt: int) -> float:
        """Seconds between attempt ``attempt`` (from 0) and the next."""
        return 0.0

    def score(self, responses: Responses) -> np.ndarray:
        prompts, texts, columns = dialogues(responses.prompts), list(responses.texts), columns_of(responses.prompts)
        parts = [
            self._batch(prompts[part], texts[part], {name: values[part] for name, values in columns.items()})
            for part in chunks(len(texts), self.batch_size or max(1, len(texts)))
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def _batch(self, prompts: list[Dialogue], texts: list[str], columns: Columns) -> np.ndarray:
        """float32 [B]: the scores of one call of `ask`, after retries; NaN where there is none."""
        try:
            scores = self.attempt(prompts, texts, columns)
        except NoScores as failure:
            if self.config.on_failure == "raise":
                raise RewardError(f"{self.source}: {failure}") from failure
            log.warning("%s: left out %d episodes: %s", self.source, len(texts), failure)
            return np.full(len(texts), np.nan, np.float32)
        with np.errstate(over="ignore"):
            scores = scores.astype(np.float32)
        bad = ~np.isfinite(scores)
        if bad.any() and self.config.on_failure == "raise":
            row = int(np.argmax(bad))
            raise RewardError(
                f"{self.source} scored {scores[row]} for the response {told(texts[row])}. "
                "Return a finite number, or set reward_model.on_failure=drop to leave such episodes out."
            )
        return np.where(bad, np.float32(np.nan), scores)

    def attempt(self, prompts: list[Dialogue], texts: list[str], columns: Columns) -> np.ndarray:
        """Call `ask`, with the configured retries."""
        return patiently(lambda: self.ask(prompts, texts, columns), self.source, self.config.retries, self.pause)


def patiently(ask: Callable[[], T], source: str, retries: int, pause: Callable[[int], float]) -> T:
    """Return what ``ask`` returns, retrying it up to ``retries`` times and logging why. Attempts are ``pause(attempt)`` seconds
    apart, or the failure's ``wait`` if that is longer.

    Raises:
      NoScores: the last attempt failed, or one failed for which a retry cannot help.
    """
    for attempt in range(retries + 1):
        try:
            return ask()
        except NoScores as error:
            failure = error
        if not failure.again or attempt == retries:
            break
        log.warning("%s, attempt %d: %s", source, attempt + 1, failure)
        time.sleep(max(failure.wait, pause(attempt)))
    raise failure


class OneAtATime:
    """Runs calls with a time limit, each in a thread. Python cannot stop a thread, so a call that runs out of time continues, at
    most until the program ends. The next call waits for it, so two calls never run at once.
    """

    def __init__(self) -> None:
        self._last: Aside[Any] | None = None

    def within(self, seconds: float, call: Callable[[], Any], grace: float = 0.0) -> Any:
        """Return or raise what ``call`` does. ``grace``: further seconds, for a call that keeps the limit itself.

        Raises:
          NoScores: the call takes longer, or an earlier one is still running after ``seconds``.
        """
        late = f"no answer within reward_model.timeout_seconds={seconds:g}"
        if self._last is not None and not self._last.finished(seconds):
            raise NoScores(f"{late}: an earlier call is still running")
        self._last = Aside(call, "reward")
        if not self._last.finished(seconds + grace):
            raise NoScores(late)
        return self._last.result()
