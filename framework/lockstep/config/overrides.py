"""Overrides as people type them: a value is read twice, by the shell and then by Hydra, and each has its own quoting."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lockstep.errors import ConfigError, short, told

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

_PLAIN = re.compile(r"(?!(null|true|false|nan|inf)$)([A-Za-z_/]|\.(?!\d))[\w/.@+-]*", re.ASCII | re.IGNORECASE)
"""Text that Hydra reads as text even without quotes."""


def override(key: str, value: Any) -> str:
    """``key=value`` to paste into a shell. Every override that is printed with a value goes through here.

    >>> override("policy.tokenizer.pad_token", "<|pad|>")
    policy.tokenizer.pad_token="'<|pad|>'"
    """
    start = key if shlex.quote(key) == key else shell(key)
    return f"{start}={shell(hydra_value(value))}"


def hydra_value(value: Any) -> str:
    """A value in Hydra's grammar: text that it would read as something else is quoted."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {hydra_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(hydra_value, value)) + "]"
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    if _PLAIN.fullmatch(value):
        return value
    literal = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", value)  # else OmegaConf would interpolate it
    return QuotedString(literal, Quote.single).with_quotes()


def shell(word: str) -> str:
    """``word`` quoted for a POSIX shell, in the quotes that are easiest to read."""
    if shlex.quote(word) == word or "'" not in word or re.search(r'["$`\\!]', word):
        return shlex.quote(word)
    return f'"{word}"'


def read(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides.

    Raises:
      ConfigError: Hydra cannot read one of them; the message says what to type instead.
    """
    return [_read(each, overrides[i + 1 :]) for i, each in enumerate(overrides)]


def _read(text: str, following: Sequence[str]) -> Override:
    try:
        found = _parsed(text)
    except Exception as error:  # Hydra's and ANTLR's own, and Python's for numbers of thousands of digits
        raise ConfigError(_advice(text, following, " ".join(str(error).split()))) from error
    if not found.key_or_group:
        raise ConfigError(_NO_OVERRIDE.format(told(text)))
    return found


def _parsed(text: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(text)


_NO_OVERRIDE = "{} is not an override. Write key=value, +key=value to add a key, or ~key to remove one."


def _advice(text: str, following: Sequence[str], reason: str) -> str:
    key, equal, value = text.partition("=")
    if not equal or not re.fullmatch(r"[+~]*[\w$@:/.-]+", key):
        return _NO_OVERRIDE.format(told(text))
    for end in range(1, len(following) + 1):
        if _readable(whole := " ".join([text, *following[:end]])):
            return f"The shell cut {short(whole)} apart at its spaces. Type: {shell(short(whole))}"
    words = text.split()
    if len(words) > 1 and all(map(_readable, words)):
        apart = short(", ".join(map(repr, words)))
        return f"{short(text)} is several overrides in one. In a shell leave out the quotes around them; in Python write {apart}."
    start, reason = f"Hydra cannot read {short(text)}", short(reason)
    if re.fullmatch(r"[+-]?[\d_]+", value):
        return f"{start}: {reason}"
    key, value = short(key), short(value)
    if value.startswith(("[", "{")) and not value.startswith(("{{", "{%")):
        example = override(key, [{"path": "my file.jsonl"}])
        return f"{start} ({reason}). In lists and groups too, text with unusual characters needs quotes: {example}"
    if value.startswith("~"):
        return f"{start}, and no shell expands the ~ there. Type: {override(key, os.path.expanduser(value))}"
    return f"{start}: such text needs quotes, and these need the shell's. Type: {override(key, value)}"


def _readable(text: str) -> bool:
    try:
        return bool(_parsed(text).key_or_group)
    except Exception:
        return False
