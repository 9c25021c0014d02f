"""Scores from any Python function of prompts, responses and data columns."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lockstep.config.schema import REQUIRED, setting
from lockstep.errors import RewardError, raised
from lockstep.interfaces import DataSource, Resources
from lockstep.learning.rows import STAND_IN, Columns, Dialogue, arguments, columns_of, dialogues, first_row
from lockstep.learning.scores import scores_of
from lockstep.registry import function_at
from lockstep_rlhf.reward_models.outside import LONGEST_TIMEOUT, MOST_RETRIES, NoScores, OneAtATime, Outside, patiently

log = logging.getLogger("lockstep")


class Function(Outside):
    """Calls ``function(prompts, responses, **columns) -> scores``, named as ``module:function``.

    prompts: a list of dialogues, each a list of {"role", "content"}.
    responses: a list of str.
    columns: every other parameter gets the data column of its name, a list with one value per response
      (`lockstep.learning.rows.arguments`).
    scores: one number per response, in a list, an array or a tensor; None or NaN for a response that it could not score.

    The function may change its arguments. A call that takes longer than ``timeout_seconds``, raises, exits, or returns something
    else is retried up to ``retries`` times. Then ``on_failure`` decides, as in `Outside`.
    """

    @dataclass(frozen=True)
    class Config:
        function: str = setting(REQUIRED, "module:function")
        timeout_seconds: float = setting(60.0, "Limit of one call.", above=0, most=LONGEST_TIMEOUT)
        retries: int = setting(2, "Further calls after one that fails.", least=0, most=MOST_RETRIES)
        on_failure: Literal["raise", "drop"] = setting(
            "raise", "Stop the run; or drop: leave the episodes out and report how many. A failure is never a score."
        )

    @classmethod
    def check(cls, config: Config) -> None:
        function_at(config.function, "reward_model.function")

    def __init__(self, config: Config, resources: Resources | None):
        self.config = config
        self.source = f"reward function {config.function}"
        self.function = function_at(config.function, "reward_model.function")
        self.calls = OneAtATime()

    @classmethod
    def rehearse(cls, config: Config, data: DataSource) -> None:
        """Call the function on two responses to the first prompt, once unless it is out of time. It may leave one of them without
        a score."""
        if (row := first_row(data)) is None:
            return
        model, (prompt, response) = cls(config, None), row
        prompts, texts = [prompt, prompt], [response, STAND_IN]

        def first() -> np.ndarray:
            try:
                return model.ask(dialogues(prompts), texts, columns_of(prompts))
            except NoScores as failure:
                failure.again = failure.__cause__ is None  # out of time, as when it loads a model; an exception would come again
                raise

        try:
            scores = patiently(first, model.source, config.retries, model.pause)
        except NoScores as failure:
            raise RewardError(f"{model.source}, tried on the first prompt: {failure}") from failure
        if not np.isfinite(scores).any():
            nothing = f"{model.source}, tried on the first prompt, scored {scores[0]} and {scores[1]} for two responses."
            if config.on_failure == "raise":
                raise RewardError(f"{nothing} Return finite numbers, or set reward_model.on_failure=drop to leave them out.")
            log.warning("%s Episodes without a finite score are left out.", nothing)

    def ask(self, prompts: list[Dialogue], texts: list[str], columns: Columns) -> np.ndarray:
        given = [[dict(message) for message in dialogue] for dialogue in prompts], list(texts)
        named = arguments(self.function, columns)
        try:
            return self.calls.within(self.config.timeout_seconds, lambda: scores_of(self.function(*given, **named), len(texts)))
        except (NoScores, KeyboardInterrupt):
            raise
        except RewardError as error:
            raise NoScores(str(error)) from error
        except BaseException as error:  # sys.exit too
            raise NoScores(raised(error)) from error
