"""What gives scores: a learned model, or any Python function over text."""

from __future__ import annotations

import concurrent.futures
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lockstep import encoding
from lockstep.encoding import Example, Lengths
from lockstep.errors import ConfigError, RewardError
from lockstep.interfaces import Resources, Responses, RewardModel, ScalarModel
from lockstep.sequences import in_chunks

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
        rows = responses.sequences if self.shares_tokens else self._encode(responses)
        return in_chunks(lambda part: self.model.evaluate(part, ["scores"]), rows, self.config.micro_batch_size)["scores"]

    def _encode(self, responses: Responses):
        limit = self.model.context_length
        examples = [
            Example(
                encoding.encode_prompt(self.tokenizer, prompt, limit // 2) or [self.tokenizer.eos_id],
                encoding.encode_response(self.tokenizer, text, limit // 2),
            )
            for prompt, text in zip(responses.prompts, responses.texts, strict=True)
        ]
        return encoding.block(examples, self.tokenizer, Lengths(limit // 2, limit // 2, 64))

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
        bad = ~np.isfinite(scores)
        if bad.any() and self.config.on_failure == "raise":
            row = int(np.argmax(bad))
            raise RewardError(
                f"{self.config.function} scored {scores[row]} for the response {responses.texts[row]!r}. "
                "Return a finite number, or set reward_model.on_failure=drop to leave such episodes out."
            )
        return np.where(bad, np.nan, scores).astype(np.float32)

    def _call(self, prompts: list[list[dict[str, str]]], texts: list[str]) -> np.ndarray:
        pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="reward")
        try:
            scores = pool.submit(self.function, prompts, texts).result(self.config.timeout_seconds)
            scores = np.asarray(scores, np.float64)
        except concurrent.futures.TimeoutError as error:
            raise RewardError(f"no answer within reward_model.timeout_seconds={self.config.timeout_seconds:g}") from error
        except Exception as error:
            raise RewardError(f"it raised {error!r}") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if scores.shape != (len(texts),):
            raise RewardError(f"it returned shape {scores.shape} for {len(texts)} responses; one number each is needed")
        return scores


def _import(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"reward_model.function='{path}' cannot be imported: {error}. Write it as module:function.") from error
