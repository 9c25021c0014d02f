"""The language model evaluation harness (EleutherAI's lm_eval) on a Lockstep policy.

Tasks, prompts, few-shot examples, filters, metrics and standard errors are the harness's, and so is the split of a text into
context and continuation. The policy supplies numbers and texts only (`requests.py`). Importing this module needs lm_eval.

A policy's forward pass also reads the last token, so one token less fits before it than with the harness's model ``hf``. Only
texts that do not fit are scored differently.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import evaluator, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from lockstep.api.policies import ChatPolicy
from lockstep.commands.evaluate.requests import Asked, Continuation
from lockstep.config.schema import setting
from lockstep.errors import DataError, did_you_mean, short
from lockstep.reporting.console import Console
from lockstep.storage.files import finite
from lockstep.text.stopping import Stops
from lockstep.types import Message

RESAMPLES = 1000
"""Bootstrap resamples, for metrics whose standard error has no formula. The estimate is then within about 2% of its limit."""
SEED = 1234
"""The harness's own seed: for the choice of few-shot examples, and for tasks that draw."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks use for the limit of a response. If a task has several, the first counts."""


@dataclass(frozen=True)
class Settings:
    """How tasks are run.

    Args:
      shots: examples before each question; None: as each task says. A task that says 0 keeps it, as in the harness.
      limit: documents per task; None: all.
      chat: requests are dialogues in the policy's chat template, with the examples as earlier turns.
      batch: rows at a time.
    """

    shots: int | None = setting(None, "Few-shot examples.", least=0)
    limit: int | None = setting(None, "Documents per task.", least=1)
    chat: bool = setting(False, "Ask in the chat template.")
    batch: int = setting(16, "Rows at a time.", least=1)


@dataclass(frozen=True)
class Sampling:
    """The part of a task's ``generation_kwargs`` that policies support."""

    until: tuple[str, ...]
    limit: int
    temperature: float

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Sampling:
        """Read ``generation_kwargs``.

        Raises:
          DataError: they ask for a way of sampling that is not supported.
        """
        until = given.get("until") or []
        temperature = float(given.get("temperature") or 0.0)
        sampled = given.get("do_sample", temperature > 0)
        neutral = {"top_p": (1.0, None), "top_k": (0, -1, None), "min_p": (0.0, None)}
        if asked := [key for key, fine in neutral.items() if sampled and key in given and given[key] not in fine]:
            raise DataError(
                f"A task samples with {asked[0]}={given[asked[0]]}, which Lockstep cannot do here. Set do_sample: false in its "
                "generation_kwargs, or leave the key out."
            )
        limit = next((given[key] for key in LIMITS if given.get(key) is not None), 256)
        strings = [until] if isinstance(until, str) else until
        return cls(tuple(string for string in strings if string), int(limit), (temperature or 1.0) if sampled else 0.0)


class LockstepLM(TemplateLM):  # type: ignore[misc]  # lm_eval is taken as Any
    """The model that the harness calls. Texts are tokenised as transformers would: with the special tokens that the tokenizer
    puts around a text, unless the text already begins with BOS, as chat templates write it."""

    def __init__(self, chat: ChatPolicy, settings: Settings, console: Console):
        super().__init__()
        self.chat, self.settings, self.console = chat, settings, console
        self.asked = Asked(chat.policy, chat.tokenizer.pad_id, settings.batch)
        self.max_length = chat.policy.context_length - 1

    @property
    def eot_token_id(self) -> int:
        return self.chat.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context: BOS, else EOS."""
        return self.chat.tokenizer.start_id

    @property
    def tokenizer_name(self) -> str:
        return "lockstep"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        tokenizer = self.chat.tokenizer
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(tokenizer.core.id_to_token(tokenizer.start_id))
        return tokenizer.encode(string, special=add_special_tokens)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        asked = [Continuation(context, ids) for _, context, ids in requests]
        with self.console.progress("likelihoods", 0, len(asked)) as progress:
            return self.asked.loglikelihoods(asked, lambda done: progress(done, {}))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihoods of whole texts, cut into windows of the context's length. Each token is scored once, given the tokens
        before it in its window."""
        windows: list[Continuation] = []
        owner: list[int] = []
        for number, (text,) in enumerate(request.args for request in requests):
            rolling = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            found = [Continuation(*utils.make_disjoint_window(window)) for window in rolling]
            windows, owner = windows + found, owner + [number] * len(found)
        with self.console.progress("texts", 0, len(windows)) as progress:
            sums = self.asked.logprob_sums(windows, lambda done: progress(done, {}))
        return np.bincount(owner, sums, len(requests)).tolist() if windows else [0.0] * len(requests)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[str]:
        groups: dict[Sampling, list[int]] = {}
        for number, (_, given) in enumerate(request.args for request in requests):
            groups.setdefault(Sampling.of(given), []).append(number)
        answers = [""] * len(requests)
        for how, members in groups.items():
            for number, text in zip(members, self._sampled(how, [requests[i].args[0] for i in members]), strict=True):
                answers[number] = text
        return answers

    def _sampled(self, how: Sampling, texts: Sequence[str]) -> list[str]:
        contexts = [self.tok_encode(text) or [self.prefix_token_id] for text in texts]
        stops = Stops(self.chat.tokenizer, how.until)
        with self.console.progress("responses", 0, len(contexts)) as progress:
            tell = lambda done: progress(done, {})  # noqa: E731
            return self.asked.continuations(contexts, stops, how.limit, how.temperature, SEED, tell)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The dialogue as text. Without a generation prompt, the last message begins the policy's own answer."""
        messages = [Message(each["role"], each["content"]) for each in chat_history]  # type: ignore[arg-type]
        if add_generation_prompt:
            return self.chat.tokenizer.render(messages, add_generation_prompt=True)
        return self.chat.tokenizer.render(messages[:-1], add_generation_prompt=True) + messages[-1].content

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.chat.tokenizer.chat_template or ""


class Tasks:
    """Tasks by name, from lm_eval and from a folder of the user's own."""

    def __init__(self, names: Sequence[str], include: Path | None):
        """Find the tasks.

        Raises:
          DataError: there is no such task, or no such folder.
        """
        if include is not None and not include.is_dir():
            raise DataError(f"There is no folder {include}. --include takes a folder with task files (*.yaml).")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that a task takes
        self._manager = TaskManager(include_path=include and str(include))
        self.names: list[str] = []
        for name in names:
            found = self._manager.match_tasks([name])
            if not found:
                raise DataError(
                    f"No task named '{short(name)}'.{did_you_mean(name, self._manager.all_tasks)} `lm-eval ls tasks` lists those "
                    "of lm_eval; for your own, give the folder of their files: --include FOLDER."
                )
            self.names += found

    def load(self, settings: Settings) -> dict[str, Any]:
        """Load the tasks, with their few-shot settings.

        Raises:
          DataError: a task cannot be loaded, or runs code that the policy writes.
        """
        try:
            loaded = self._manager.load(self.names)
        except Exception as error:  # anybody may have written a task, and its data come from anywhere
            told = short(" ".join(f"{type(error).__name__}: {error}".split()), 500)
            raise DataError(
                f"The tasks {', '.join(self.names)} cannot be loaded: {told}. If their data are on the hub and there is no "
                "network, use tasks on local files: --include FOLDER."
            ) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise DataError(f"The task {name} runs code that the policy writes, which Lockstep does not do. Leave it out.")
            if settings.shots is not None and task.get_config("num_fewshot") != 0:
                task.set_config("num_fewshot", settings.shots)
            elif task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(SEED)
        return loaded

    def run(self, chat: ChatPolicy, settings: Settings, console: Console) -> list[dict[str, Any]]:
        """Run the tasks. Returns a row per metric of each task or group of tasks, as in `lockstep.storage.records.TASKS`."""
        loaded = self.load(settings)
        random.seed(SEED)
        np.random.seed(SEED)
        with _one_process():
            found = evaluator.evaluate(
                lm=LockstepLM(chat, settings, console), task_dict=loaded, limit=settings.limit, bootstrap_iters=RESAMPLES,
                log_samples=False, apply_chat_template=settings.chat, fewshot_as_multiturn=settings.chat,
            )  # fmt: skip
        return list(_rows(found, settings))


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Inside, the harness does not fork. It would resample in forked processes, which is not safe once an array library has
    threads."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _rows(found: Mapping[str, Any], settings: Settings) -> Iterator[dict[str, Any]]:
    for task, measures in found["results"].items():
        for key, value in measures.items():
            metric, comma, chosen = key.partition(",")  # 'acc,none', 'acc_stderr,none', 'alias'
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = measures.get(f"{metric}_stderr,{chosen}")
            yield {
                "task": task,
                "metric": metric if chosen == "none" else f"{metric} ({chosen})",
                "value": finite(float(value)),
                "stderr": finite(float(stderr)) if isinstance(stderr, (int, float)) else None,
                "n": found.get("n-samples", {}).get(task, {}).get("effective"),
                "shots": found["n-shot"].get(task),
                "limit": settings.limit,
                "chat": settings.chat,
                "version": str(found["versions"].get(task)),
                "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
                "lm_eval": importlib.metadata.version("lm_eval"),
            }
