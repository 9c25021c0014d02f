"""1 for responses with the row's answer: a reward for tasks whose answers can be checked."""

from __future__ import annotations

import importlib.util
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError, listing
from lockstep.interfaces import DataSource, Resources, Responses, RewardModel
from lockstep.learning.rows import column, columns_of, first_row
from lockstep_rlhf.reward_models.mathematics import Mathematics
from lockstep_rlhf.reward_models.pattern import compiled

log = logging.getLogger("lockstep")

NO_GOLD, NO_ANSWER, FAILED = "no_gold", "no_answer", "failed"
Outcome = bool | str
"""Whether the answer is right; or, if there was nothing to compare or the comparison failed, one of the three above."""


class Answer(RewardModel):
    """1.0 if the response's answer equals the row's ``column``, else 0.0.

    With ``extract``, the answer is the group of its LAST match in the response, or the whole match if there is no group. Without
    ``extract``, the answer is the whole response. A response without an answer, or with one that ``compare`` cannot read, scores
    0. If the gold answer is null or unreadable, or the comparison fails, there is no score (NaN), and a warning counts such
    responses. `details` marks these cases as ``no_answer``, ``no_gold`` and ``failed``.

    | compare | what counts as equal |
    |---|---|
    | exact | the same characters, except for white space at the ends; a gold number is compared as Python prints it |
    | number | the same number, exactly: 1,000 = 1000 = 1e3 = 2000/2. With anything around it (%, $, cm) it is no number |
    | math | what the package math-verify considers equal: fractions, roots, intervals, sets, equations; it ignores units and % |
    """

    @dataclass(frozen=True)
    class Config:
        column: str = setting("answer", "The column with the gold answer: text or a number.")
        extract: str | None = setting(
            None, "A regular expression with at most one group; its last match is the answer. null: the whole response."
        )
        compare: Literal["exact", "number", "math"] = setting("exact", "How answers are compared: see the table.")
        timeout_seconds: float = setting(10.0, "Limit of one math comparison, and of one extraction.", above=0)

        def __post_init__(self) -> None:
            if self.extract is not None and (groups := compiled(self.extract, "extract").groups) > 1:
                raise ConfigError(
                    f"reward_model.extract has {groups} groups, of which one would be the answer. Write the others as (?:...)."
                )

    @classmethod
    def check(cls, config: Config) -> None:
        if config.compare == "math" and importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "reward_model.compare=math needs the package math-verify. Type: pip install 'lockstep-rlhf[verify]'"
            )

    @classmethod
    def rehearse(cls, config: Config, data: DataSource) -> None:
        if (row := first_row(data)) is not None:
            column(columns_of(row[:1]), config.column, "reward_model=answer")

    def __init__(self, config: Config, resources: Resources):
        self.config = config
        self.pattern = None if config.extract is None else compiled(config.extract, "extract")
        self.compare: Callable[[Any, str], Outcome] = {"exact": same_text, "number": same_number}.get(config.compare)  # type: ignore
        if config.compare == "math":
            self.check(config)
            self.compare = Mathematics(config.timeout_seconds).compare
        self._details: dict[str, np.ndarray] = {}

    def score(self, responses: Responses) -> np.ndarray:
        golds = column(columns_of(responses.prompts), self.config.column, "reward_model=answer")
        outcomes = [self._outcome(gold, text) for gold, text in zip(golds, responses.texts, strict=True)]
        self._details = {
            name: np.array([outcome == name for outcome in outcomes], np.float32) for name in (NO_GOLD, NO_ANSWER, FAILED)
        }
        if counts := [f"{sum(outcome == name for outcome in outcomes)} {name}" for name in (NO_GOLD, FAILED) if name in outcomes]:
            log.warning("reward_model=answer: responses that were not scored: %s", listing(counts))
        return np.array([math.nan if outcome in (NO_GOLD, FAILED) else outcome is True for outcome in outcomes], np.float32)

    def _outcome(self, gold: Any, text: str) -> Outcome:
        try:
            answer = text if self.pattern is None else last_match(self.pattern, text, self.config.timeout_seconds)
        except TimeoutError:
            return FAILED
        return self.compare(gold, answer or "")

    def details(self) -> dict[str, np.ndarray]:
        return self._details


def last_match(pattern: Any, text: str, seconds: float) -> str | None:
    """The last match, searching from the left: its group, or the whole match if the pattern has no group. None without a match,
    or if the group took no part in it."""
    matches = list(pattern.finditer(text, timeout=seconds))
    return matches[-1][pattern.groups] if matches else None


def same_text(gold: Any, answer: str) -> Outcome:
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)) or not str(gold).strip():
        return NO_GOLD
    return str(gold).strip() == answer.strip() if answer.strip() else NO_ANSWER


def same_number(gold: Any, answer: str) -> Outcome:
    right, found = number(gold), number(answer)
    return NO_GOLD if right is None else NO_ANSWER if found is None else found == right


_DECIMAL = r"[+-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,400})(?:\.[0-9]{0,400})?|\.[0-9]{1,400})(?:[eE][+-]?[0-9]{1,3})?"
_NUMBER = re.compile(rf"({_DECIMAL})(?:\s*/\s*({_DECIMAL}))?")


def number(value: Any) -> Fraction | None:
    """The exact value of a number, or of text that is only a number: digits, thousands separated by commas, a decimal point, an
    exponent, or a fraction of two such numbers. None for anything else, and for text with more than 400 digits."""
    if isinstance(value, float):
        value = repr(value)  # 0.1 is the gold answer 1/10
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    if isinstance(value, int):
        return Fraction(value)
    found = _NUMBER.fullmatch(value.strip().replace("\N{MINUS SIGN}", "-")) if len(value) <= 2000 else None
    if found is None:
        return None
    above, below = (Fraction(Decimal(part.replace(",", ""))) if part else Fraction(1) for part in found.groups())
    return above / below if below else None
