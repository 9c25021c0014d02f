"""Sources of scores: a trained reward model, or any Python function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.api import items
from lockstep.api.policies import ChatPolicy
from lockstep.api.sampling import COLUMNS, ROWS
from lockstep.api.sources import find, load_tokenizer, open_backend, reader
from lockstep.errors import ConfigError, DataError, RewardError, told
from lockstep.interfaces import Backend, Responses, RewardModel, ScalarModel
from lockstep.learning.rows import arguments, columns_of, dialogues
from lockstep.learning.scores import scores_of
from lockstep.reporting.console import Console
from lockstep.runs.assembly import save_result
from lockstep.text import encoding
from lockstep.text.encoding import Example, Lengths
from lockstep.text.sequences import Sequences, in_chunks
from lockstep.text.tokenizer import Tokenizer, TokenizerConfig

if TYPE_CHECKING:
    import pandas

Reward = Callable[..., Sequence[float]]
"""``function(prompts, responses, **columns) -> scores``, as ``reward_model=function`` calls it. Prompts are dialogues, lists of
``{"role", "content"}``. Responses are texts. Any other parameter gets what is known about each prompt under that name (``answer``
of ``Prompt.of("1+1?", answer="2")``). Scores are finite numbers, one for each response."""


@dataclass(frozen=True, eq=False, repr=False)
class Scorer:
    """A learned reward model with its tokenizer, on a backend. `train` makes one from comparisons.

    Attributes:
      model: the network (`lockstep.interfaces.ScalarModel`).
      tokenizer, backend, name, metrics: as in `ChatPolicy`.
    """

    model: ScalarModel
    tokenizer: Tokenizer
    backend: Backend
    name: str
    metrics: pandas.DataFrame | None = None

    def __post_init__(self) -> None:
        self.tokenizer.check_embedding(self.model.vocab_size, "the reward model")

    def __repr__(self) -> str:
        return f"Scorer({self.name} on {self.backend.name})"

    @classmethod
    def load(
        cls, source: str | Path, backend: str | Mapping[str, Any] | Backend | None = None, *, stage: str | None = None
    ) -> Scorer:
        """Open a folder that `save` wrote, or a run folder, whose last reward model is taken unless ``stage`` names one."""
        with Console().waiting(f"loading {source}"):
            folder, own = find(source, "reward_model", stage)
            chosen = open_backend(own if backend is None else backend)
            name, opens = reader(folder, chosen)
            tokenizer = load_tokenizer(folder, TokenizerConfig(None, None, None, None))
            return cls(opens.load_scalar(folder, chosen), tokenizer, chosen, name)

    def score(self, prompts: Sequence[Any], responses: Sequence[str]) -> np.ndarray:
        """float32, one score for each response. Prompts are text or dialogues; one that is too long loses its oldest turns.

        Raises:
          DataError: a response and the rest of its prompt do not fit the context, or there are not as many prompts as responses.
        """
        if len(prompts) != len(responses):
            raise DataError(f"Got {len(prompts)} prompts for {len(responses)} responses. Pass one prompt per response.")
        if not responses:
            return np.zeros(0, np.float32)
        context, examples = self.model.context_length, []
        for number, (prompt, response) in enumerate(zip(map(items.prompt, prompts), responses, strict=True)):
            given = encoding.encode_response(self.tokenizer, response, context)
            ids = encoding.encode_prompt(self.tokenizer, prompt, context - len(given)) if len(given) < context else None
            if ids is None:
                raise DataError(f"prompts[{number}] and its response have more than {context} tokens, the model's context.")
            examples.append(Example(ids, given))
        asked, said = max(len(e.prompt) for e in examples), max(len(e.response) for e in examples)
        return self.read(encoding.block(examples, self.tokenizer, Lengths(asked, said, COLUMNS)))

    def read(self, sequences: Sequences) -> np.ndarray:
        """Scores of rows encoded with this tokenizer."""
        return in_chunks(lambda part: self.model.evaluate(part, ["scores"]), sequences, ROWS)["scores"]

    def save(self, folder: str | Path) -> Path:
        """Save a Hugging Face checkpoint of a sequence classifier, with its tokenizer."""
        save_result(Path(folder), self.model, self.tokenizer, "reward_model", self.name)
        return Path(folder)


def reward_model(reward: Reward | Scorer | RewardModel, policy: ChatPolicy) -> RewardModel:
    """The `RewardModel` that algorithms get their scores from.

    Raises:
      ConfigError: it cannot score this policy's responses.
    """
    if isinstance(reward, RewardModel):
        return reward
    if isinstance(reward, Scorer):
        return Learned(reward, policy)
    if not callable(reward):
        raise ConfigError(
            f"reward={reward!r} should be a function (prompts, responses) -> scores, or a Scorer from lockstep.train."
        )
    return Called(reward)


class Learned(RewardModel):
    """A `Scorer` that reads the policy's own tokens."""

    def __init__(self, scorer: Scorer, policy: ChatPolicy):
        self.scorer = scorer
        if scorer.tokenizer.core.to_str() != policy.tokenizer.core.to_str():
            raise ConfigError(
                "The reward model and the policy have different vocabularies. Train the reward model from this policy, or run an "
                "experiment, where reward_model.source takes any reward model."
            )
        if scorer.backend.name != policy.backend.name:
            raise ConfigError(
                f"The reward model is on {scorer.backend.name} and the policy on {policy.backend.name}. Save it, and load it "
                "with backend=policy.backend."
            )

    def score(self, responses: Responses) -> np.ndarray:
        return self.scorer.read(responses.sequences)

    def value_network(self) -> ScalarModel:
        return self.scorer.model.copy()


class Called(RewardModel):
    """A Python function. Its exceptions reach the caller."""

    def __init__(self, function: Reward):
        self.function = function

    def score(self, responses: Responses) -> np.ndarray:
        texts = responses.texts
        named = arguments(self.function, columns_of(responses.prompts))
        found = self.function(dialogues(responses.prompts), list(texts), **named)
        try:
            scores = scores_of(found, len(texts)).astype(np.float32)
        except RewardError as error:
            raise RewardError(f"The reward function failed: {error}.") from error
        if not np.isfinite(scores).all():
            row = int(np.argmin(np.isfinite(scores)))
            raise RewardError(
                f"The reward function scored {scores[row]} for the response {told(texts[row])}. A score must be a finite number."
            )
        return scores
