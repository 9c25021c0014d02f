"""Any Python function over text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lockstep.config.schema import REQUIRED, setting
from lockstep.errors import ConfigError
from lockstep.interfaces import Resources
from lockstep.registry import imported, in_the_way, use_current_folder
from lockstep_rlhf.reward_models.outside import Dialogue, NoScores, Outside, within


class Function(Outside):
    """``function(prompts, responses) -> scores``, named as ``module:function``.

    prompts: a list of dialogues, each a list of {"role", "content"}; responses: a list of str; scores: as many numbers.
    A call that takes longer than ``timeout_seconds``, raises, or returns something else is retried up to ``retries`` times.
    Then ``on_failure`` decides, as in `Outside`.
    """

    @dataclass(frozen=True)
    class Config:
        function: str = setting(REQUIRED, "module:function")
        timeout_seconds: float = setting(60.0, "Limit of one call.", above=0)
        retries: int = setting(2, "Further calls after one that fails.", least=0)
        on_failure: Literal["raise", "drop"] = setting(
            "raise", "Stop the run; or drop: leave the episodes out and say how many. A failure is never a score."
        )

    @classmethod
    def check(cls, config: Config) -> None:
        _import(config.function)

    def __init__(self, config: Config, resources: Resources):
        self.config = config
        self.source = f"reward function {config.function}"
        self.function = _import(config.function)

    def ask(self, prompts: list[Dialogue], texts: list[str]) -> np.ndarray:
        try:
            found = within(self.config.timeout_seconds, lambda: self.function(prompts, texts))
        except NoScores:
            raise
        except Exception as error:
            raise NoScores(f"it raised {error!r}") from error
        try:
            scores = np.asarray(found, np.float64)
        except (TypeError, ValueError) as error:
            raise NoScores(f"it returned something that is not a list of numbers: {error}") from error
        if scores.shape != (len(texts),):
            raise NoScores(f"it returned shape {scores.shape} for {len(texts)} responses; one number each is needed")
        return scores


def _import(path: str) -> Callable[..., Any]:
    use_current_folder()
    try:
        return imported(path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's file may raise anything on import, or call sys.exit
        raise ConfigError(
            f"reward_model.function='{path}' cannot be imported: {error!r}.{in_the_way(path)} Write it as module:function."
        ) from error
