"""Keeps credentials out of records: run folders, trackers, errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SECRET_WORDS = {"key", "token", "secret", "password", "passwd", "credential", "credentials", "authorization", "bearer"}
_TEXT_TOKENS = {"eos", "pad", "bos", "unk", "stop", "sep", "cls", "mask", "special"}
_PASSWORD_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")


def without_secrets(config: Any) -> Any:
    """``config`` without the keys that look like credentials, and without the user part of URLs.

    A key looks like a credential if its last word is 'key', 'token', 'password' and so on; `eos_token` is text.
    """
    if isinstance(config, Mapping):
        return {key: without_secrets(value) for key, value in config.items() if not _is_secret(str(key))}
    if isinstance(config, (list, tuple)):
        return [without_secrets(value) for value in config]
    if isinstance(config, str):
        return _PASSWORD_IN_URL.sub("", config)
    return config


def _is_secret(key: str) -> bool:
    words = re.sub(r"([a-z])([A-Z])", r"\1_\2", key).lower().replace("-", "_").split("_")
    if words[-1].startswith("apikey"):
        return True
    return words[-1] in _SECRET_WORDS and not (words[-1] == "token" and words[0] in _TEXT_TOKENS)
