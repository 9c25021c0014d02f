"""A reward for answers that cite their sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError
from lockstep.interfaces import DataSource, Resources, Responses, RewardModel
from lockstep.learning.rows import column, columns_of, first_row
from lockstep.types import Prompt
from lockstep_rlhf.reward_models.pattern import compiled


class Citations(RewardModel):
    """``supported`` if a cited passage has the answer, minus ``unsupported`` · the share of citations whose passage does not.

    The answer is in the row's ``column``. A passage has it if it contains the same whole words, in upper or lower case. A cited
    number that no passage has supports nothing. A response without citations scores 0; a row without an answer has no score
    (NaN). Passages are lines that match ``passage`` in messages after the policy's first turn: what `environment=search` showed,
    never text of the policy or the question. `details` has the number of citations and whether one supports the answer.
    """

    @dataclass(frozen=True)
    class Config:
        column: str = setting("answer", "The column with the answer that a passage must contain.")
        cite: str = setting(r"\[(\d+)\]", "A regular expression whose group is a cited number.")
        passage: str = setting(r"^\[(\d+)\] (.*)$", "A regular expression for a passage's line; its groups are number and text.")
        supported: float = setting(1.0, "Reward if a citation supports the answer.", least=0)
        unsupported: float = setting(1.0, "Cost if no citation supports the answer; in proportion if some do not.", least=0)

        def __post_init__(self) -> None:
            for key, count in (("cite", 1), ("passage", 2)):
                if compiled(getattr(self, key), key).groups != count:
                    raise ConfigError(f"reward_model.{key}='{getattr(self, key)}' should have {count} group{'s' * (count > 1)}.")

    @classmethod
    def rehearse(cls, config: Config, data: DataSource) -> None:
        if (row := first_row(data)) is not None:
            column(columns_of(row[:1]), config.column, "reward_model=citations")

    def __init__(self, config: Config, resources: Resources):
        self.config = config
        self.cite, self.passage = compiled(config.cite, "cite"), compiled(f"(?m){config.passage}", "passage")
        self._details: dict[str, np.ndarray] = {}

    def score(self, responses: Responses) -> np.ndarray:
        c = self.config
        answers = column(columns_of(responses.prompts), c.column, "reward_model=citations")
        cited = [self.cited(text) for text in responses.texts]
        shown = [self.shown(prompt) for prompt in responses.prompts]
        good = [
            [supports(passages.get(number), answer) for number in numbers]
            for passages, numbers, answer in zip(shown, cited, answers, strict=True)
        ]
        supported = np.array([any(each) for each in good], np.float32)
        wrong = np.array([1 - np.mean(each) if each else 0 for each in good], np.float32)
        self._details = {"cited": np.array([len(numbers) for numbers in cited], np.float32), "supported": supported}
        missing = np.array([answer is None for answer in answers])
        return np.where(missing, np.nan, c.supported * supported - c.unsupported * wrong).astype(np.float32)

    def details(self) -> dict[str, np.ndarray]:
        return self._details

    def cited(self, text: str) -> list[str]:
        """The distinct cited numbers, in order of first mention."""
        return list(dict.fromkeys(self.cite.findall(text, timeout=1.0)))

    def shown(self, prompt: Prompt) -> Mapping[str, str]:
        """{number: passage}"""
        roles = [message.role for message in prompt.messages]
        first = roles.index("assistant") if "assistant" in roles else len(roles)
        said = [message.content for message in prompt.messages[first:] if message.role != "assistant"]
        return {number: text for content in said for number, text in self.passage.findall(content, timeout=1.0)}


def supports(passage: str | None, answer: Any) -> bool:
    """Whether the passage contains the answer as whole words, whatever punctuation is around each."""
    if passage is None or answer is None:
        return False
    words = ((word.strip(".,;:!?\"'()") for word in str(text).casefold().split()) for text in (passage, answer))
    there, wanted = ([word for word in each if word] for each in words)
    return bool(wanted) and any(there[i : i + len(wanted)] == wanted for i in range(len(there) - len(wanted) + 1))
