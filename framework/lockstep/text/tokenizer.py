"""Text to token ids and back, with the special tokens and the chat template: the ``tokenizers`` library and jinja2.

transformers' tokenizer classes would work too, but importing them takes seconds and imports torch, even in JAX runs. The
files are the same: ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja``.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from lockstep.config.overrides import override
from lockstep.config.schema import setting
from lockstep.errors import ConfigError, DataError, did_you_mean, listing
from lockstep.storage import gguf
from lockstep.storage.files import read_json, write_json
from lockstep.storage.sources import fetch_file
from lockstep.text import templates
from lockstep.text.templates import DATE, TEMPLATES, template_text
from lockstep.types import Message

log = logging.getLogger("lockstep")


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer, and what to replace in it. EOS and pad must differ."""

    path: str | None = setting(None, "A folder or a hub id; null: the policy's own, or else the data source's.")
    eos_token: str | None = setting(None, "Ends a response; null: the tokenizer's own.")
    pad_token: str | None = setting(None, "Fills rows; null: the tokenizer's own.")
    chat_template: str | None = setting(
        None, "One of the names in `TEMPLATES`, a .jinja file, or jinja text; null: the tokenizer's own."
    )
    date: str | None = setting(None, f"Today's, for a chat template that asks for it; null: the tokenizer's own, or {DATE}.")


class Tokenizer:
    """Args:
      core: the tokenizer proper.
      eos_token: the configured stop token, which ends a response.
      pad_token: fills rows; need not be in the vocabulary (models never see it), must not be EOS.
      chat_template: jinja; None if the tokenizer has none.
      bos_token: begins every text; chat templates write it themselves. None if the tokenizer has none.
      date: what a chat template that asks for today's is told, as 2024-07-26, so that prompts do not change overnight.

    Raises:
      ConfigError: pad and EOS are the same, EOS is not in the vocabulary, or the date is not one.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        eos_token: str,
        pad_token: str | None,
        chat_template: str | None,
        bos_token: str | None = None,
        date: str | None = None,
    ):
        self.core = core
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.chat_template = chat_template
        self.date = templates.day(date).isoformat()
        self._warned: set[str] = set()
        self.vocab_size = core.get_vocab_size(with_added_tokens=True)
        eos_id = core.token_to_id(eos_token)
        if eos_id is None:
            raise ConfigError(
                f"eos_token '{eos_token}' is not in the vocabulary.{did_you_mean(eos_token, core.get_vocab())} "
                f"Special tokens: {self._specials()}. Set policy.tokenizer.eos_token."
            )
        if pad_token == eos_token:
            raise ConfigError(
                f"The tokenizer pads with '{pad_token}', which is also its EOS '{eos_token}': EOS would be masked as "
                f"padding, and the policy would never learn to stop. Give it a separate pad token that never "
                f"occurs in text: {override('policy.tokenizer.pad_token', '<|pad|>')} (it need not be in the vocabulary; special "
                f"tokens here: {self._specials()})."
            )
        self.pad_token = pad_token or "<|pad|>"
        self.eos_id: int = eos_id
        pad_id = core.token_to_id(self.pad_token)
        self.pad_id: int = self.vocab_size if pad_id is None else pad_id
        bos_id = core.token_to_id(bos_token) if bos_token else None
        self.start_id: int = eos_id if bos_id is None else bos_id
        """What a raw text starts from: BOS, or EOS as the end of the text before it."""

    def _specials(self) -> str:
        return listing(t.content for t in self.core.get_added_tokens_decoder().values() if t.special)

    @classmethod
    def load(cls, path: str | Path, config: TokenizerConfig | None = None) -> Tokenizer:
        """From a folder, a hub id or a GGUF file, with the replacements of ``config``."""
        path = gguf.as_folder(path)
        core = tokenizers.Tokenizer.from_file(str(fetch_file(path, "tokenizer.json")))
        core.no_padding()
        core.no_truncation()
        settings = _optional_json(path, "tokenizer_config.json")
        template = settings.get("chat_template")
        if isinstance(template, list):  # named templates: the default one
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        if file := fetch_file(path, "chat_template.jinja", optional=True):
            template = file.read_text(encoding="utf-8")
        replaced = config or TokenizerConfig(None, None, None, None)
        eos = replaced.eos_token or _content(settings.get("eos_token"))
        if eos is None:
            raise ConfigError(f"The tokenizer in {path} names no EOS token. Set policy.tokenizer.eos_token.")
        return cls(
            core,
            eos_token=eos,
            pad_token=replaced.pad_token or _content(settings.get("pad_token")),
            chat_template=template_text(replaced.chat_template) or template,
            bos_token=_content(settings.get("bos_token")),
            date=replaced.date or settings.get("chat_template_date"),
        )

    def replaced(self, config: TokenizerConfig) -> Tokenizer:
        """The same with the replacements of ``config``."""
        return Tokenizer(
            self.core,
            eos_token=config.eos_token or self.eos_token,
            pad_token=config.pad_token or self.pad_token,
            chat_template=template_text(config.chat_template) or self.chat_template,
            bos_token=self.bos_token,
            date=config.date or self.date,
        )

    def save(self, folder: Path) -> None:
        """Files that transformers' AutoTokenizer opens too."""
        folder.mkdir(parents=True, exist_ok=True)
        self.core.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "chat_template": self.chat_template,
            "chat_template_date": self.date,
        }
        write_json(folder / "tokenizer_config.json", settings)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: special tokens only where the text contains them."""
        return self._encoded(lambda: [self.core.encode(text, add_special_tokens=False)], [text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encoded(lambda: self.core.encode_batch(list(texts), add_special_tokens=False), texts)

    def _encoded(self, encode: Callable[[], Sequence[tokenizers.Encoding]], texts: Sequence[str]) -> list[list[int]]:
        """
        Raises:
          DataError: a text cannot be written as UTF-8, or has what the tokenizer has no token for.
        """
        for text in texts:
            _check_whole(text)
        try:
            return [encoded.ids for encoded in encode()]
        except Exception as error:  # the library raises nothing more specific
            raise DataError(f"The tokenizer cannot encode a text: {error}.") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self.core.decode([int(i) for i in ids if i < self.vocab_size], skip_special_tokens=True)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The dialogue as the text the model reads.

        Raises:
          ConfigError: there is no chat template, or it does not accept this dialogue.
        """
        if self.chat_template is None:
            raise ConfigError(
                f"This tokenizer has no chat template. Set policy.tokenizer.chat_template to a .jinja file, to jinja "
                f"text or to one of: {listing(TEMPLATES)}."
            )
        tokens = {"bos_token": self.bos_token or "", "eos_token": self.eos_token, "pad_token": self.pad_token}
        return templates.render(
            self.chat_template, messages, add_generation_prompt=add_generation_prompt, tokens=tokens, date=self.date,
            asked_date=lambda: self.warn_once(f"the chat template writes the date: it is told {self.date}. {_OTHER_DATE}"),
        )  # fmt: skip

    def warn_once(self, message: str) -> None:
        """Log what every dialogue would say again."""
        if message not in self._warned:
            log.warning("%s", message)
        self._warned.add(message)

    def spelled(self, text: str) -> str | None:
        """A special token that the text spells, and that the model therefore reads in its place."""
        found = self._special.search(text)
        return found and found[0]

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        names = [token.content for token in self.core.get_added_tokens_decoder().values() if token.special and token.content]
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")


_OTHER_DATE = "To change it, set policy.tokenizer.date"


def _check_whole(text: str) -> None:
    """
    Raises:
      DataError: the text cannot be written as UTF-8.
    """
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        near = ascii(text[max(0, error.start - 20) : error.start + 20])
        raise DataError(f"A text holds half a character, as text that is not UTF-8 may: near {near}.") from None


def _content(token: Any) -> str | None:
    """A special token in tokenizer_config.json is a string or a record with its content."""
    return token["content"] if isinstance(token, dict) else token


def _optional_json(path: str | Path, name: str) -> dict[str, Any]:
    file = fetch_file(path, name, optional=True)
    return read_json(file) if file else {}
