"""Load or make a policy, chat with it, save it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.api import items, sampling
from lockstep.api.sampling import Sampling
from lockstep.api.sources import find, laid_over, load_tokenizer, open_backend, reader
from lockstep.config.compose import compose, group
from lockstep.config.root import component_config
from lockstep.config.schema import parse
from lockstep.errors import ConfigError, DataError
from lockstep.interfaces import Backend, Policy
from lockstep.registry import registry
from lockstep.reporting.console import Console
from lockstep.runs.assembly import save_result
from lockstep.text import encoding
from lockstep.text.tokenizer import Tokenizer, TokenizerConfig
from lockstep.types import Message, Prompt

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class ChatPolicy:
    """A policy with its tokenizer, on a backend. `load`, `new_policy` and `train` return one; training never changes it.

    A prompt is text or a dialogue, a list of messages ``{"role": "user", "content": "..."}``. A response ends with EOS, at one
    of the texts ``stop``, or after ``max_tokens``: by default 256, or half the context if that is less. A dialogue that is too
    long loses its oldest turns. Temperature 0 takes the most likely token. Equal seeds give equal texts, on every backend.

    Attributes:
      policy: the model (`lockstep.interfaces.Policy`).
      tokenizer: its tokenizer (`lockstep.text.tokenizer.Tokenizer`).
      backend: where it runs (`lockstep.interfaces.Backend`).
      name: the registered policy that reads its checkpoint.
      metrics: a row per step of its training, and one of the final measures (`pandas.DataFrame`); None if it was not trained
        by `train`.
    """

    policy: Policy
    tokenizer: Tokenizer
    backend: Backend
    name: str
    metrics: pandas.DataFrame | None = None

    def __post_init__(self) -> None:
        self.tokenizer.check_embedding(self.policy.vocab_size, "the policy")

    def __repr__(self) -> str:
        return f"ChatPolicy({self.name} on {self.backend.name})"

    def chat(
        self, prompt: Any, *, max_tokens: int | None = None, temperature: float = 1.0, stop: Sequence[str] = (), seed: int = 0
    ) -> str:
        """The response to one prompt, in the policy's chat template."""
        how = self._sampling(max_tokens, temperature, stop, seed)
        return self._respond([self._encoded(prompt, how)], how)[0]

    def stream(
        self, prompt: Any, *, max_tokens: int | None = None, temperature: float = 1.0, stop: Sequence[str] = (), seed: int = 0
    ) -> Iterator[str]:
        """The text of `chat` in pieces, as they are drawn."""
        how = self._sampling(max_tokens, temperature, stop, seed)
        return sampling.stream(self.policy, self.tokenizer, self._encoded(prompt, how), how)

    def respond(
        self, prompts: Sequence[Any], *, max_tokens: int | None = None, temperature: float = 1.0, stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[str]:  # fmt: skip
        """Like `chat`, for many prompts at once."""
        how = self._sampling(max_tokens, temperature, stop, seed)
        return self._respond([self._encoded(prompt, how) for prompt in _listed(prompts)], how)

    def complete(
        self,
        texts: Sequence[str],
        *,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[str]:
        """Continuations of raw texts, without a chat template. A text starts with BOS, or with EOS if the tokenizer has none, as
        in pretraining."""
        how = self._sampling(max_tokens, temperature, stop, seed)
        return self._respond([self._start(text, how) for text in _listed(texts)], how)

    def conversation(
        self, *, system: str | None = None, max_tokens: int | None = None, temperature: float = 1.0, stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Conversation:  # fmt: skip
        """A dialogue of several turns, starting with the message ``system``."""
        return Conversation(self, self._sampling(max_tokens, temperature, stop, seed), system)

    def save(self, folder: str | Path) -> Path:
        """Save a Hugging Face checkpoint with its tokenizer, for transformers, `load` and ``lockstep chat``."""
        save_result(Path(folder), self.policy, self.tokenizer, "policy", self.name)
        return Path(folder)

    # ------------------------------------------------------------------------------------------------------------------

    def _sampling(self, max_tokens: int | None, temperature: float, stop: Sequence[str], seed: int) -> Sampling:
        context = self.policy.context_length
        limit = min(256, context // 2) if max_tokens is None else max_tokens
        given = {"max_tokens": limit, "temperature": temperature, "stop": stop, "seed": seed}
        how = parse(Sampling, given, "")
        if how.max_tokens >= context:
            raise ConfigError(f"max_tokens={max_tokens} leaves no room for a prompt in a context of {context} tokens.")
        return how

    def _encoded(self, prompt: Any, how: Sampling) -> list[int]:
        limit = self.policy.context_length - how.max_tokens
        ids = encoding.encode_prompt(self.tokenizer, items.prompt(prompt), limit)
        if ids is None:
            raise DataError(_TOO_LONG.format(limit=limit, context=self.policy.context_length, max_tokens=how.max_tokens))
        return ids

    def _start(self, text: str, how: Sampling) -> list[int]:
        limit = self.policy.context_length - how.max_tokens
        ids = [self.tokenizer.start_id, *self.tokenizer.encode(text)]
        if len(ids) > limit:
            raise DataError(_TOO_LONG.format(limit=limit, context=self.policy.context_length, max_tokens=how.max_tokens))
        return ids

    def _respond(self, prompts: Sequence[Sequence[int]], how: Sampling) -> list[str]:
        with Console().waiting(f"sampling {len(prompts)} responses"):
            return sampling.respond(self.policy, self.tokenizer, prompts, how)


def _listed(texts: Sequence[Any]) -> Sequence[Any]:
    if isinstance(texts, str):
        raise DataError(f"Expected a list of texts, not one text. Write [{texts!r}].")
    return texts


_TOO_LONG = (
    "The prompt has more than {limit} tokens: the context holds {context}, of which max_tokens={max_tokens} are for the "
    "response. Shorten the prompt, or set a smaller max_tokens."
)


class Conversation:
    """A dialogue with a policy, a turn at a time. `ChatPolicy.conversation` returns one. Without a chat template there are no
    turns: each text is continued by itself.

    Attributes:
      messages: the dialogue so far.
    """

    def __init__(self, policy: ChatPolicy, how: Sampling, system: str | None = None):
        self.policy, self._how, self._turn = policy, how, 0
        self.reset(system)

    @property
    def system(self) -> str | None:
        """The system message."""
        return next((message.content for message in self.messages if message.role == "system"), None)

    def reset(self, system: str | None = None) -> None:
        """Start over, from the message ``system``."""
        self.messages: list[Message] = [Message("system", system)] if system else []

    def say(self, text: str) -> Iterator[str]:
        """The policy's answer, in pieces as they are drawn. If interrupted, the text so far stays in the dialogue."""
        self.messages.append(Message("user", text))
        return self._answer()

    def regenerate(self) -> Iterator[str]:
        """Another answer in place of the last one.

        Raises:
          DataError: there is no answer yet.
        """
        if self.messages and self.messages[-1].role == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1].role != "user":
            raise DataError("There is no answer to regenerate. Say something first.")
        return self._answer()

    def _answer(self) -> Iterator[str]:
        policy, how = self.policy, Sampling(**{**vars(self._how), "turn": self._turn})
        self._turn += 1
        plain = policy.tokenizer.chat_template is None
        try:
            ids = policy._start(self.messages[-1].content, how) if plain else policy._encoded(Prompt(tuple(self.messages)), how)
        except (ConfigError, DataError):
            self.messages.pop()  # a message that cannot be sent does not count as said
            raise
        answer = ""
        try:
            for piece in sampling.stream(policy.policy, policy.tokenizer, ids, how):
                answer += piece
                yield piece
        finally:
            self.messages.append(Message("assistant", answer))


def load(
    source: str | Path, backend: str | Mapping[str, Any] | Backend | None = None, *, stage: str | None = None,
    chat_template: str | None = None, eos_token: str | None = None, pad_token: str | None = None, date: str | None = None,
) -> ChatPolicy:  # fmt: skip
    """Open a policy that was saved or published.

    Args:
      source: a checkpoint folder, a hub id, a GGUF file, or a peft adapter; or a run folder, whose last policy is taken.
      backend: its name ('torch'), or its configuration ({'name': 'torch', 'precision': 'bfloat16'}), or another policy's
        ``backend``; None takes the run's, else the default of `conf/config.yaml`.
      stage: for a run folder, the stage whose policy is taken.
      chat_template, eos_token, pad_token, date: replace the tokenizer's own, as `lockstep.text.tokenizer.TokenizerConfig` says.

    Raises:
      LockstepError: there is no such policy, or it does not fit the backend.
    """
    config = TokenizerConfig(None, eos_token, pad_token, chat_template, date)
    with Console().waiting(f"loading {source}"):
        folder, own = find(source, "policy", stage)
        chosen = open_backend(own if backend is None else backend)
        name, cls = reader(folder, chosen)
        return ChatPolicy(cls.load(folder, chosen), load_tokenizer(folder, config), chosen, name)


def new_policy(
    backend: str | Mapping[str, Any] | Backend | None = None, *, policy: str | None = None,
    tokenizer: Tokenizer | str | Path | None = None, seed: int = 0, **settings: Any,
) -> ChatPolicy:  # fmt: skip
    """Make a policy with fresh weights, the same on every backend; or fresh adapters on a checkpoint: policy='lora', path='...'.

    Args:
      backend: as for `load`.
      policy: the registered policy; None takes the default of `conf/config.yaml`, a small decoder.
      tokenizer: a tokenizer, or the folder or hub id of one; None takes the checkpoint's, else that of the default data source,
        the miniature.
      seed: for the weights.
      settings: keys of the policy's configuration that differ from its file in `conf/policy`: layers=2, hidden_size=64, ...

    Raises:
      ConfigError: an unknown key, or sizes that do not fit.
    """
    defaults, chosen = compose([]), open_backend(backend)
    keys = group("policy", policy) | {"name": policy} if policy else defaults["policy"]
    cls: type[Policy] = registry().resolve("policy", keys["name"], chosen.name)
    config = component_config(cls, laid_over(keys, settings), "policy")
    replacements = cls.tokenizer_config(config)
    if isinstance(tokenizer, Tokenizer):
        own: Tokenizer | None = tokenizer
    elif path := tokenizer or replacements.path:
        own = load_tokenizer(path, replacements)
    else:
        source = registry().resolve("data", defaults["data"]["name"])
        own = source(component_config(source, defaults["data"], "data")).tokenizer()
    if own is None:
        raise ConfigError("A policy that starts from scratch needs a tokenizer. Pass tokenizer=, a folder or a hub id.")
    return ChatPolicy(cls.create(config, chosen, own, seed), own, chosen, keys["name"])
