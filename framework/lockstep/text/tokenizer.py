"""Text to token ids and back, with special tokens and chat templates, on the ``tokenizers`` library and jinja2.

transformers' tokenizer classes would work too, but importing them takes seconds and imports torch, even in JAX runs. The
files are the same: ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja``.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from lockstep.config.overrides import override
from lockstep.config.schema import setting
from lockstep.errors import CheckpointError, ConfigError, DataError, did_you_mean, listing, short, told
from lockstep.storage import gguf
from lockstep.storage.files import read_object, write_json
from lockstep.storage.sources import fetch_file
from lockstep.text import templates
from lockstep.text.templates import DATE, TEMPLATES, template_text
from lockstep.types import Message

log = logging.getLogger("lockstep")

PAD = "<|pad|>"
"""The default pad token. It need not be in the vocabulary: padding is masked, so no model reads it."""
GENERATION = "generation_config.json"
"""The file in which transformers looks for the tokens that end a response."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Special-token keys of ``generation_config.json`` and ``config.json``."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer to load, and what to override in it. EOS and pad must differ."""

    path: str | None = setting(None, "A folder or a hub id; null: the policy's own, or else the data source's.")
    eos_token: str | None = setting(None, "Ends a response; null: the tokenizer's own.")
    pad_token: str | None = setting(None, "Fills rows; null: the tokenizer's own.")
    chat_template: str | None = setting(
        None, "One of the names in `TEMPLATES`, a .jinja file, or jinja text; null: the tokenizer's own."
    )
    date: str | None = setting(None, f"Today's date for chat templates that ask for it; null: the tokenizer's own, or {DATE}.")


class Tokenizer:
    """Args:
      core: the underlying tokenizer.
      eos_token: the configured stop token, which ends a response.
      pad_token: fills rows; need not be in the vocabulary (models never see it), must not be EOS.
      chat_template: jinja; None if the tokenizer has none.
      bos_token: begins every text; chat templates write it themselves. None if the tokenizer has none.
      eos_ids: all stop tokens of a checkpoint that has several; saved again for transformers.
      date: today's date for chat templates that ask for it, as 2024-07-26. It is fixed so that prompts do not change overnight.

    Raises:
      ConfigError: pad and EOS are the same, EOS is not in the vocabulary, or the date is invalid.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        eos_token: str,
        pad_token: str | None,
        chat_template: str | None,
        bos_token: str | None = None,
        eos_ids: Sequence[int] = (),
        date: str | None = None,
    ):
        self.core = core
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.chat_template = chat_template
        self.date = templates.day(date).isoformat()
        self._warned: set[str] = set()
        self.eos_ids = tuple(eos_ids)
        ids = core.get_vocab(with_added_tokens=True).values()
        self.vocab_size = 1 + max(ids, default=-1)  # ids may have gaps
        if self.vocab_size > 2 * len(ids) + 100_000:  # nobody means an embedding of that size
            raise ConfigError(
                f"The tokenizer has {len(ids)} tokens with ids up to {self.vocab_size - 1}: tokenizer.json is damaged."
            )
        self.rows = self.vocab_size
        """Ids from this one on lie outside the embedding of the model that reads them."""
        self.beyond: dict[int, str] = {}
        """{id: token} of the tokens outside the embedding, which no text may spell."""
        eos_id = core.token_to_id(eos_token)
        if eos_id is None:
            raise ConfigError(
                f"eos_token '{short(eos_token)}' is not in the vocabulary.{did_you_mean(eos_token, core.get_vocab())} "
                f"Special tokens: {listing(self.special())}. Set policy.tokenizer.eos_token."
            )
        if pad_token == eos_token:
            raise ConfigError(
                f"The tokenizer pads with '{pad_token}', which is also its EOS '{eos_token}': EOS would be masked as "
                f"padding, and the policy would never learn to stop. Give it a separate pad token that never "
                f"occurs in text: {override('policy.tokenizer.pad_token', PAD)} (it need not be in the vocabulary; special "
                f"tokens here: {listing(self.special())})."
            )
        self.pad_token = pad_token or PAD
        self.eos_id: int = eos_id
        pad_id = core.token_to_id(self.pad_token)
        self.pad_id: int = self.vocab_size if pad_id is None else pad_id
        bos_id = core.token_to_id(bos_token) if bos_token else None
        self.start_id: int = eos_id if bos_id is None else bos_id
        """The token a raw text starts from: BOS, or else EOS, as the end of the previous text."""

    def special(self) -> set[str]:
        """The special tokens that are in the vocabulary."""
        return {t.content for t in self.core.get_added_tokens_decoder().values() if t.special}

    @classmethod
    def load(cls, path: str | Path, config: TokenizerConfig | None = None) -> Tokenizer:
        """Load a tokenizer from a folder, a hub id or a GGUF file, with the overrides of ``config``."""
        path = gguf.as_folder(path)
        core = _core(fetch_file(path, "tokenizer.json"))
        core.no_padding()
        core.no_truncation()
        settings = _optional_json(path, "tokenizer_config.json")
        own = {name: _content(path, name, settings.get(name)) for name in ("eos_token", "pad_token", "bos_token")}
        replaced = config or TokenizerConfig(None, None, None, None)
        eos = replaced.eos_token or own["eos_token"]
        if eos is None:
            raise ConfigError(f"The tokenizer in {path} names no EOS token. Set policy.tokenizer.eos_token.")
        return cls(
            core,
            eos_token=eos,
            pad_token=replaced.pad_token or own["pad_token"],
            chat_template=template_text(replaced.chat_template) or _own_template(path, settings.get("chat_template")),
            bos_token=own["bos_token"],
            eos_ids=_own_eos_ids(path),
            date=replaced.date or _content(path, "chat_template_date", settings.get("chat_template_date")),
        )

    def replaced(self, config: TokenizerConfig) -> Tokenizer:
        """A copy with the overrides of ``config``."""
        return Tokenizer(
            self.core,
            eos_token=config.eos_token or self.eos_token,
            pad_token=config.pad_token or self.pad_token,
            chat_template=template_text(config.chat_template) or self.chat_template,
            bos_token=self.bos_token,
            eos_ids=self.eos_ids,
            date=config.date or self.date,
        )

    def check_embedding(self, rows: int, model: str) -> None:
        """Compare the vocabulary with the ``rows`` of a model's embedding. Call this once, before any text is encoded.

        Some public tokenizers have special tokens that their model lacks and that no text should spell (Gemma 3's for images).
        The pad token need not be in the model either. These may lie outside the embedding, except EOS, BOS and special tokens
        that the chat template writes. From then on, `encode` refuses a text that spells one, and `save` leaves out the pad
        token if it is one.

        Raises:
          ConfigError: other tokens lie outside; the message names them.
        """
        if rows >= self.rows:
            return
        written = {token for token in self.special() if token in (self.chat_template or "")}
        spared = (self.special() | {self.pad_token}) - written - {self.eos_token, self.bos_token}
        self.beyond = outside_embedding(self.core.get_vocab(with_added_tokens=True), rows, model, spared)
        self.rows = rows

    def token_ids(self) -> dict[str, Any]:
        """Special-token ids for a model's ``config.json`` and ``generation_config.json``. Ids outside its embedding are left
        out; several stop tokens are a list, as in the checkpoint they came from."""
        ids = [token and self.core.token_to_id(token) for token in (self.bos_token, self.eos_token, self.pad_token)]
        bos, eos, pad = (number if isinstance(number, int) and number < self.rows else None for number in ids)
        several = [eos, *(number for number in self.eos_ids if number != eos and number < self.rows)]
        return dict(zip(TOKEN_IDS, (bos, several if self.eos_ids else eos, pad), strict=True))

    def save(self, folder: Path) -> None:
        """Write files that transformers' AutoTokenizer opens too. A pad token without an embedding row is left out: transformers
        would give it the next id, and a model that reads this id fails."""
        folder.mkdir(parents=True, exist_ok=True)
        self.core.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": None if self.token_ids()["pad_token_id"] is None else self.pad_token,
            "chat_template": self.chat_template,
            "chat_template_date": self.date,
        }
        write_json(folder / "tokenizer_config.json", settings)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of the text, with special tokens only where the text contains them. With ``special``, the tokenizer also
        adds its own around the text, such as BOS."""
        return self._encoded(lambda: [self.core.encode(text, add_special_tokens=special)], [text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encoded(lambda: self.core.encode_batch(list(texts), add_special_tokens=False), texts)

    def _encoded(self, encode: Callable[[], Sequence[tokenizers.Encoding]], texts: Sequence[str]) -> list[list[int]]:
        """
        Raises:
          DataError: a text cannot be written as UTF-8, contains something that the tokenizer has no token for, or spells a
            token outside the model's embedding.
        """
        for text in texts:
            _check_whole(text)
        try:
            found = [encoded.ids for encoded in encode()]
        except Exception as error:  # the library raises nothing more specific
            raise DataError(f"The tokenizer cannot encode a text: {error}.") from error
        for ids in found if self.beyond else ():
            if spelled := self.beyond.keys() & ids:
                number = min(spelled)
                raise DataError(
                    f"A text spells '{self.beyond[number]}', whose id {number} lies outside the model's embedding of {self.rows} "
                    "rows. Remove it from the data."
                )
        return found

    @functools.cached_property
    def unknown_id(self) -> int | None:
        """The unknown token. None for tokenizers without one, for those that write any text in bytes, and for Unigram models,
        whose own stands for a rare character."""
        token = getattr(self.core.model, "unk_token", None)
        return None if token is None or getattr(self.core.model, "byte_fallback", False) else self.core.token_to_id(token)

    def unknown_words(self, text: str) -> list[str]:
        """The words of the text that become the unknown token. A text that spells that token itself is no unknown word."""
        if self.unknown_id is None:
            return []
        _check_whole(text)
        encoded = self.core.encode(text, add_special_tokens=False)
        words = (text[start:end] for i, (start, end) in zip(encoded.ids, encoded.offsets, strict=True) if i == self.unknown_id)
        return [word for word in words if word != self.core.id_to_token(self.unknown_id)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, without special tokens."""
        return self.core.decode([int(i) for i in ids if i < self.vocab_size], skip_special_tokens=True)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The dialogue as the text that the model reads, with its tools' schemas if the template writes them.

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
            self.chat_template, messages, add_generation_prompt=add_generation_prompt, tokens=tokens, tools=tools, date=self.date,
            asked_date=lambda: self.warn_once(f"the chat template writes the date: it is told {self.date}. {_OTHER_DATE}"),
        )  # fmt: skip

    def warn_once(self, message: str) -> None:
        """Log a warning only once, because every dialogue would repeat it."""
        if message not in self._warned:
            log.warning("%s", message)
        self._warned.add(message)

    def spelled(self, text: str) -> str | None:
        """The first special token that the text spells, which the model would read as that token; None if there is none."""
        found = self._special.search(text)
        return found and found[0]

    def broken_up(self, text: str) -> str:
        """The text with a space inside every special token of this tokenizer that it spells."""
        return broken_up(text, self._special)

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        return any_of(self.special())


def any_of(tokens: Collection[str]) -> re.Pattern[str]:
    """Finds these tokens where a text spells them."""
    return re.compile("|".join(map(re.escape, filter(None, sorted(tokens)))) or r"(?!)")


def broken_up(text: str, special: re.Pattern[str]) -> str:
    """The text with a space inside every special token that it spells, so that untrusted text cannot open or close a turn. In
    a rendered dialogue, tokenizers' ``encode_special_tokens`` would turn off the template's own special tokens too."""
    return special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


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


def outside_embedding(vocabulary: Mapping[str, int], rows: int, model: str, spared: Collection[str] = ()) -> dict[int, str]:
    """Return {id: token} for the tokens whose ids lie outside an embedding of ``rows`` rows. A model has no weights for them:
    some libraries fail there, others read NaN.

    Args:
      model: what to call the model in the message.
      spared: tokens that may lie outside.

    Raises:
      ConfigError: other tokens lie outside.
    """
    beyond = {number: token for token, number in vocabulary.items() if number >= rows}
    if wrong := sorted(number for number, token in beyond.items() if token not in spared):
        named = ", ".join(f"'{beyond[number]}' ({number})" for number in wrong[:5])
        rest = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ConfigError(
            f"The tokenizer does not fit {model}: these tokens lie outside its embedding of {rows} rows: {named}{rest}. Use the "
            "tokenizer that the model was trained with, or give the model a row for each of them: in transformers, "
            "model.resize_token_embeddings(len(tokenizer)), then save both."
        )
    return beyond


def _core(file: Path | None) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower one
        raise CheckpointError(f"{file} is not a tokenizer of the tokenizers library: {error}") from error


def _content(path: str | Path, name: str, token: Any) -> str | None:
    """A text from tokenizer_config.json, where a special token is a string or a record with its content."""
    found = token.get("content") if isinstance(token, dict) else token
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"tokenizer_config.json in {path} has {name}={told(token)}, which should be a text.")
    return found


def _own_template(path: str | Path, template: Any) -> str | None:
    """The chat template of a checkpoint: its file ``chat_template.jinja``, or else the one in tokenizer_config.json."""
    if file := fetch_file(path, "chat_template.jinja", optional=True):
        try:
            return file.read_text(encoding="utf-8") or None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    if isinstance(template, list) and all(isinstance(each, dict) for each in template):  # named templates: the default one
        template = next((each.get("template") for each in template if each.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"tokenizer_config.json in {path} has a chat_template that is not a text: {str(template)[:80]}.")
    return template or None


def _own_eos_ids(path: str | Path) -> tuple[int, ...]:
    """The stop tokens of a checkpoint that lists several."""
    for name in (GENERATION, "config.json"):
        ids = _optional_json(path, name).get("eos_token_id")
        if isinstance(ids, list):
            if not all(type(number) is int and number >= 0 for number in ids):
                raise CheckpointError(f"{name} in {path} has eos_token_id={ids}, which should be whole numbers.")
            return tuple(ids)
    return ()


def _optional_json(path: str | Path, name: str) -> dict[str, Any]:
    file = fetch_file(path, name, optional=True)
    return read_object(file) if file else {}
