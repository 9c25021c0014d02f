"""What gives scores: a learned model, or any Python function over text."""

from __future__ import annotations

import importlib
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lockstep import encoding
from lockstep.encoding import Example, Lengths
from lockstep.errors import ConfigError, RewardError
from lockstep.interfaces import Resources, Responses, RewardModel, ScalarModel
from lockstep.numerics import ends_with_stop
from lockstep.sequences import Sequences, in_chunks

log = logging.getLogger("lockstep")


class Learned(RewardModel):
    """A scalar head on a language model, read at the last real token; made by the algorithm ``reward_modelling``.

    ``source`` is the stage, or a folder that one wrote. A model that reads another tokenizer than the policy's gets the
    text, rendered and encoded its own way.
    """

    @dataclass(frozen=True)
    class Config:
        source: str
        micro_batch_size: int | None

    def __init__(self, config: Config, resources: Resources):
        self.config = config
        self.model, self.tokenizer = resources.scalar_model(config.source)
        self.shares_tokens = self.tokenizer.core.to_str() == resources.tokenizer.core.to_str()

    def score(self, responses: Responses) -> np.ndarray:
        if self.shares_tokens:
            return self._score(responses.sequences)
        examples = self._encode(responses)
        fits = [i for i, example in enumerate(examples) if example is not None]
        scores = np.full(len(examples), np.nan, np.float32)
        if len(fits) < len(examples):
            log.warning("%d prompts are too long for the reward model: not scored", len(examples) - len(fits))
        if fits:
            half = self.model.context_length // 2
            scores[fits] = self._score(encoding.block([examples[i] for i in fits], self.tokenizer, Lengths(half, half, 64)))
        return scores

    def _score(self, rows: Sequences) -> np.ndarray:
        evaluate = lambda part: self.model.evaluate(part, ["scores"])  # noqa: E731
        return in_chunks(evaluate, rows, self.config.micro_batch_size)["scores"]

    def _encode(self, responses: Responses) -> list[Example | None]:
        """In this model's tokens; EOS only where the policy wrote its own. None where the prompt does not fit."""
        half = self.model.context_length // 2
        rows = responses.sequences
        finished = ends_with_stop(rows.responses, rows.response_mask, [responses.tokenizer.eos_id])
        examples = []
        for prompt, text, ended in zip(responses.prompts, responses.texts, finished, strict=True):
            ids = encoding.encode_prompt(self.tokenizer, prompt, half)
            response = (self.tokenizer.encode(text) + [self.tokenizer.eos_id] * bool(ended))[:half]
            examples.append(None if ids is None else Example(ids, response))
        return examples

    def value_network(self) -> ScalarModel | None:
        return self.model.copy() if self.shares_tokens else None


class Function(RewardModel):
    """``function(prompts, responses) -> scores``, named as ``module:function``.

    prompts: a list of dialogues, each a list of {"role", "content"}; responses: a list of str; scores: as many numbers.
    A call that takes longer than ``timeout_seconds``, raises, or returns something else is tried ``retries`` more times.
    After that ``on_failure`` decides: 'raise' stops the run with the reason; 'drop' takes the episodes out of the batch
    (their score is NaN) and logs how many.
    """

    @dataclass(frozen=True)
    class Config:
        function: str
        timeout_seconds: float
        retries: int
        on_failure: Literal["raise", "drop"]

    def __init__(self, config: Config, resources: Resources):
        self.config = config
        self.function = _import(config.function)

    def score(self, responses: Responses) -> np.ndarray:
        prompts = [[{"role": m.role, "content": m.content} for m in p.messages] for p in responses.prompts]
        for attempt in range(self.config.retries + 1):
            try:
                scores = self._call(prompts, list(responses.texts))
                break
            except RewardError as error:
                log.warning("reward function %s, attempt %d: %s", self.config.function, attempt + 1, error)
                failure = error
        else:
            if self.config.on_failure == "raise":
                raise failure
            return np.full(len(responses.texts), np.nan, np.float32)
        with np.errstate(over="ignore"):
            scores = scores.astype(np.float32)
        bad = ~np.isfinite(scores)
        if bad.any() and self.config.on_failure == "raise":
            row = int(np.argmax(bad))
            raise RewardError(
                f"{self.config.function} scored {scores[row]} for the response {responses.texts[row]!r}. "
                "Return a finite number, or set reward_model.on_failure=drop to leave such episodes out."
            )
        return np.where(bad, np.float32(np.nan), scores)

    def _call(self, prompts: list[list[dict[str, str]]], texts: list[str]) -> np.ndarray:
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def call() -> None:
            try:
                answer.put(self.function(prompts, texts))
            except Exception as error:
                answer.put(error)

        # A daemon: a call that never returns must not keep the process alive.
        threading.Thread(target=call, name="reward", daemon=True).start()
        try:
            found = answer.get(timeout=self.config.timeout_seconds)
        except queue.Empty:
            limit = self.config.timeout_seconds
            raise RewardError(f"no answer within reward_model.timeout_seconds={limit:g}") from None
        if isinstance(found, Exception):
            raise RewardError(f"it raised {found!r}") from found
        try:
            scores = np.asarray(found, np.float64)
        except (TypeError, ValueError) as error:
            raise RewardError(f"it returned something that is not a list of numbers: {error}") from error
        if scores.shape != (len(texts),):
            raise RewardError(f"it returned shape {scores.shape} for {len(texts)} responses; one number each is needed")
        return scores


def _import(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's file does when it is imported
        raise ConfigError(f"reward_model.function='{path}' cannot be imported: {error}. Write it as module:function.") from error
