"""What is secret, and how it stays out of every record and message. One rule for all of them:

1. The value of a key whose name is a credential's: `api_key`, `HF_TOKEN`, `client_secret`, `Authorization`. Names for tokens of
   text and for columns do not count: `eos_token`, `prompt_key`, `max_new_tokens`. Nor do names for places: `token_variable`,
   `key_file`.
2. In a URL, the user and password, and parameters of the query with such a name.
3. Text in the form of a well-known credential: `hf_...`, `sk-...`, a JWT.
4. Wherever they occur, the values of environment variables with such a name, and those that `remember` was given.

Below `where` and `weights`, keys are names of columns and of parts of a reward, so that only 2 to 4 apply there.

A secret becomes `***`. What decides a result is stored without secrets (`Experiment.identities`), so the stage and the run stay
the same with another key or token in the same place.
"""

from __future__ import annotations

import functools
import os
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
SHORTEST = 8
"""The fewest characters of a secret that is hidden wherever it occurs; a shorter one could be part of any word."""

_CREDENTIALS = "password passwd passphrase passcode pass pwd secret credential authorization bearer cookie auth"
_ALWAYS = {form for word in _CREDENTIALS.split() for form in (word, f"{word}s")}
_JOINED = re.compile(r"(api|access|secret|security|private|auth|bearer|refresh|session|hf|wandb)(key|token)s?$")
_FORMATS = {"pem", "value", "string", "base64"}
"""Words after the name of a credential that do not change what it is."""
_OF_TEXT = (
    "eos bos pad unk sep cls mask stop special start begin end first last image audio video think thinking tool user system "
    "assistant header newline eot eom prompt response answer step good bad positive negative yes no true false label verdict "
    "choice separator prefix suffix fim blank word text vocab max min num per"
)
"""Words before `token` that make it a token of text."""
_OF_COLUMNS = (
    "prompt prompts input inputs output outputs response responses answer answers question questions label labels text texts "
    "chosen rejected image images message messages dialogue conversation conversations column columns sort primary foreign "
    "group cache dict json field metric score scores reward target source data dataset row index id name lookup query value "
    "feature features fn public"
)
"""Words before `key` that make it the name of a column or field."""
_IN_QUERIES = {"sig", "signature", "jwt", "code"}
"""Query parameters that hold a URL's signature or a function key, if the value is long enough for one."""
_NAMED_BY_DATA = {"where", "weights"}

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,20}://[^\s'\"<>]+")
_USER = re.compile(r"(?<=://)[^/?#]*@")
_PARAMETER = re.compile(r"(?<=[?&;#])([^=&;#?]+)=([^&;#]*)")
_OVERRIDE = re.compile(r"([+~]*[\w./@\[\]-]+)=(.*)", re.DOTALL)
_VALUE = r"(\"[^\"]*\"|'[^']*'|(?:Bearer |Basic )?(?:\$\{[^}]*\}|[^\s,;&'\"()\[\]{}])+)"
_ASSIGNED = re.compile(r"(?<![\w.-])(-{0,2}[A-Za-z_][\w.-]*)(\s*=\s*)" + _VALUE)
_TOLD = re.compile(r"(?<![\w.-])([A-Za-z_][\w.-]*)([\"']?\s*:\s*)" + _VALUE)
_FORMS = re.compile(
    r"(?<![\w-])(hf_\w{20,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)|(?<=[Bb]earer )(?=[^\s\d]{0,99}\d)[\w.~+/=-]{8,}"
)

_remembered: set[str] = set()


def remember(secret: str) -> None:
    """Hide this value from now on, wherever it occurs. For a token from a variable whose name does not show that it is one."""
    if len(secret) >= SHORTEST // 2:  # the user says that it is a secret
        _remembered.add(secret)


def without_secrets(config: Any) -> Any:
    """``config``, or a list of overrides, with every secret in it hidden; everything else stays as it is."""
    return _without(config, _known())


def redact(text: str) -> str:
    """A message with every secret in it hidden, also where it says ``name=value`` or ``name: value``."""
    text = _ASSIGNED.sub(_assigned, _hide(text, _known()))
    return _TOLD.sub(_told, text)


def is_secret(name: str, value: Any = "") -> bool:
    """True if the value of a key with this name is a credential."""
    if value is None or isinstance(value, bool) or (isinstance(value, str) and _stands_for_another(value)):
        return False
    kind = _kind(name)
    if kind == "key" and isinstance(value, str):
        return len(value) >= 20 or re.search(r"\d", value) is not None and not value.isdigit()
    return kind == "always" or kind == "token" and isinstance(value, str) and not re.fullmatch(r"<.*>|\[.*\]|\d{1,7}", value)


# ------------------------------------------------------------------------------------------------------------------------------


@functools.cache
def _kind(name: str) -> str | None:
    """When the value of a key with this name is a credential. 'always': whatever it is. 'token': if it is text. 'key': if it also
    looks like a credential and not like a column's name. None: never."""
    words = re.findall(r"[a-z]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower())
    words = words[:-1] if words and words[-1] in _FORMATS else words
    if not words:
        return None
    if words[-1] in _ALWAYS or _JOINED.search("".join(words[-2:])):
        return "always"
    harmless = {"token": _OF_TEXT, "key": _OF_COLUMNS}.get(words[-1])
    return words[-1] if harmless is not None and not set(words[:-1]) & set(harmless.split()) else None


def _stands_for_another(value: str) -> bool:
    """True if the value is empty, a switch, missing, hidden already, or a reference to another: ${oc.env:TOKEN}."""
    return value.lower() in ("", "???", "...", "null", "none", "true", "false", HIDDEN) or bool(
        re.fullmatch(r"\$\{[^,]*\}", value)
    )


def _without(config: Any, known: re.Pattern[str] | None) -> Any:
    if isinstance(config, Mapping):
        return {key: _value(str(key), value, known) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [_without(value, known) for value in config]
    return _leaf(config, known) if isinstance(config, str) else config


def _value(name: str, value: Any, known: re.Pattern[str] | None) -> Any:
    if name in _NAMED_BY_DATA and isinstance(value, Mapping):
        return {key: _without(each, known) for key, each in value.items()}
    if isinstance(value, (list, tuple)) and _kind(name):
        return [_value(name, each, known) for each in value]
    if isinstance(value, (Mapping, list, tuple)) or not is_secret(name, value):
        return _without(value, known)
    return HIDDEN


def _leaf(text: str, known: re.Pattern[str] | None) -> str:
    if override := _OVERRIDE.fullmatch(text):  # Hydra's, whose value may be a group: {api_key: ...}
        value = HIDDEN if is_secret(_last(override[1]), override[2]) else _TOLD.sub(_told, override[2])
        text = f"{override[1]}={value}"
    return _hide(text, known)


def _hide(text: str, known: re.Pattern[str] | None) -> str:
    text = _URL.sub(_url, text)
    text = _FORMS.sub(HIDDEN, text)
    return known.sub(HIDDEN, text) if known else text


def _url(found: re.Match[str]) -> str:
    return _PARAMETER.sub(_parameter, _USER.sub(f"{HIDDEN}@", found[0]))


def _parameter(found: re.Match[str]) -> str:
    name, value = urllib.parse.unquote(found[1]), found[2]
    signed = name.lower() in _IN_QUERIES and len(value) >= 20
    key = _kind(name) == "key" and not value.isdigit() and not _stands_for_another(value)
    return f"{found[1]}={HIDDEN}" if signed or key or is_secret(name, value) else found[0]


def _assigned(found: re.Match[str]) -> str:
    name, value = found[1], found[3].strip("'\"")
    prose = found[2] != "=" and _kind(_last(name)) != "always"
    return found[0] if prose or not is_secret(_last(name), value) else f"{name}{found[2]}{HIDDEN}"


def _told(found: re.Match[str]) -> str:
    """Hide a value after a name and a colon, as in JSON, headers and {api_key: ...}. A bare 'token:' or 'key:' is prose."""
    name, value = found[1], found[3].strip("'\"")
    sure = _kind(_last(name)) == "always" and name.lower() not in ("secret", "auth", "credentials", "password", "pass", "cookie")
    quoted = found[2][0] in "'\"" and is_secret(_last(name), value)
    return f"{name}{found[2]}{HIDDEN}" if (sure or quoted) and not _stands_for_another(value) else found[0]


def _last(path: str) -> str:
    return path.partition("@")[0].rpartition(".")[2]


def _known() -> re.Pattern[str] | None:
    """A pattern of the values that are secret in this process, the longest first: as they are, as URLs quote them, and as
    PHP's JSON escapes them."""
    return _pattern(frozenset(os.environ.items()), frozenset(_remembered))


@functools.lru_cache(maxsize=1)
def _pattern(variables: frozenset[tuple[str, str]], remembered: frozenset[str]) -> re.Pattern[str] | None:
    named = {name: value for name, value in variables if name != "PWD" and len(value) >= SHORTEST}  # a shell's working directory
    found = {value for name, value in named.items() if is_secret(name, value)} | remembered
    found |= {urllib.parse.quote(value, safe="") for value in found} | {value.replace("/", r"\/") for value in found}
    return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True)))) if found else None
