"""Text to token ids and back, with the special tokens and the chat template: the ``tokenizers`` library and jinja2.

transformers' tokenizer classes would work too, but importing them takes seconds and imports torch, even in JAX runs. The
files are the same: ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja``.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2.ext
import jinja2.sandbox
import tokenizers

from lockstep.config.overrides import override
from lockstep.config.schema import setting
from lockstep.errors import ConfigError, did_you_mean, listing
from lockstep.storage import gguf
from lockstep.storage.files import read_json, write_json
from lockstep.storage.sources import fetch_file
from lockstep.types import Message

TEMPLATES = {
    "dialogue": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '\\n\\n' + {'user': 'Human', 'assistant': 'Assistant', 'system': 'System'}[m.role] + ': ' + m.content }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
    ),
    "plain": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
}
"""Chat templates by name, for tokenizers without one: the HH format, and the plain text."""


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer, and what to replace in it. EOS and pad must differ."""

    path: str | None = setting(None, "A folder or a hub id; null: the policy's own, or else the data source's.")
    eos_token: str | None = setting(None, "Ends a response; null: the tokenizer's own.")
    pad_token: str | None = setting(None, "Fills rows; null: the tokenizer's own.")
    chat_template: str | None = setting(
        None, "One of the names in `TEMPLATES`, a .jinja file, or jinja text; null: the tokenizer's own."
    )


class Tokenizer:
    """Args:
      core: the tokenizer proper.
      eos_token: the configured stop token, which ends a response.
      pad_token: fills rows; need not be in the vocabulary (models never see it), must not be EOS.
      chat_template: jinja; None if the tokenizer has none.
      bos_token: begins every text; chat templates write it themselves. None if the tokenizer has none.

    Raises:
      ConfigError: pad and EOS are the same, or EOS is not in the vocabulary.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        eos_token: str,
        pad_token: str | None,
        chat_template: str | None,
        bos_token: str | None = None,
    ):
        self.core = core
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.chat_template = chat_template
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
        )

    def replaced(self, config: TokenizerConfig) -> Tokenizer:
        """The same with the replacements of ``config``."""
        return Tokenizer(
            self.core,
            eos_token=config.eos_token or self.eos_token,
            pad_token=config.pad_token or self.pad_token,
            chat_template=template_text(config.chat_template) or self.chat_template,
            bos_token=self.bos_token,
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
        }
        write_json(folder / "tokenizer_config.json", settings)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: special tokens only where the text contains them."""
        return self.core.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.core.encode_batch(list(texts), add_special_tokens=False)]

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
        try:
            return _compiled(self.chat_template).render(
                messages=[{"role": m.role, "content": m.content} for m in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token or "",
                eos_token=self.eos_token,
                pad_token=self.pad_token,
                tools=None,
                documents=None,
            )
        except jinja2.TemplateError as error:
            raise ConfigError(f"The chat template fails on this dialogue: {error}") from error


def template_text(given: str | None) -> str | None:
    """The template that a configuration gives by name, as a file or as the text itself.

    Raises:
      ConfigError: it is none of these.
    """
    if not given or given in TEMPLATES:
        return TEMPLATES.get(given or "")
    if given.endswith(".jinja"):
        file = Path(given).expanduser()
        if not file.is_file():
            there = [str(path) for path in file.parent.glob("*.jinja")]
            raise ConfigError(f"policy.tokenizer.chat_template: there is no file {file}.{did_you_mean(str(file), there)}")
        return file.read_text(encoding="utf-8")
    if "{{" not in given and "{%" not in given:
        raise ConfigError(
            f"policy.tokenizer.chat_template='{given}' is not a .jinja file, not jinja text and not one of {listing(TEMPLATES)}."
            f"{did_you_mean(given, TEMPLATES)}"
        )
    return given


class GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's turns in some templates; here it only has to parse."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    """Sandboxed, with the settings, tags and functions that chat templates on the hub rely on."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationTag]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ConfigError(f"The chat template is not valid jinja: {error}") from error


def _content(token: Any) -> str | None:
    """A special token in tokenizer_config.json is a string or a record with its content."""
    return token["content"] if isinstance(token, dict) else token


def _optional_json(path: str | Path, name: str) -> dict[str, Any]:
    file = fetch_file(path, name, optional=True)
    return read_json(file) if file else {}
