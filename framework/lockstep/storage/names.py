"""Names that become folders. A run and a stage are one folder each, and one rule holds for both: letters, digits, spaces and
``. _ - + = @``, beginning with a letter, a digit or ``_``, not ending with a dot or a space, and no longer than `LONGEST` bytes.
Such a name can be a folder on every file system and part of a W&B id, and no shell takes it for a path, pattern or option.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lockstep.errors import ConfigError, told
from lockstep.storage.files import expanded

LONGEST = 100
SIGNS = " ._-+=@"
NOT_RUNS = ("stages", "sweeps")
"""Folders beside the runs, so no run may have their names."""
RULE = f"Use letters, digits, spaces and . _ - + = @, beginning with a letter, a digit or _; at most {LONGEST} bytes."


def checked_name(what: str, name: Any, taken: Collection[str] = ()) -> str:
    """Return ``name`` if a folder may have it.

    Args:
      what: the beginning of the error, such as 'The run name'.
      taken: names that mean something else.

    Raises:
      ConfigError: the name is taken or breaks the rule above.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{what} {told(name)} should be text, not {type(name).__name__}.")
    if why := _wrong(name, taken):
        raise ConfigError(f"{what} {told(name)} cannot be that of a folder: {why}. {RULE}")
    return name


def _wrong(name: str, taken: Collection[str]) -> str | None:
    if not name:
        return "it is empty"
    if odd := next((c for c in name if not _allowed(c)), None):
        return f"it has {odd!r}" + (" (to keep some runs apart, set folder=...)" if odd == "/" else "")
    if not (name[0] == "_" or name[0] not in SIGNS):
        return f"it begins with {name[0]!r}"
    if name[-1] in ". ":
        return f"it ends with {name[-1]!r}"
    if (size := len(name.encode())) > LONGEST:
        return f"it is {size} bytes long"
    return f"Lockstep uses {told(name)} itself" if name.casefold() in taken else None


def _allowed(character: str) -> bool:
    return character in SIGNS or unicodedata.category(character)[0] in "LMN"


def in_a_name(text: str) -> str:
    """``text`` as a part of a name: 'my_module:Backend' -> 'my_module-Backend'."""
    return "".join(c if _allowed(c) else "-" for c in text)


def root_folder(folder: Any) -> Path:
    """Where runs and stages are kept: the configuration's ``folder``.

    Raises:
      ConfigError: it is not a path.
    """
    if not isinstance(folder, str) or not folder.strip() or any(unicodedata.category(c) in ("Cc", "Cs") for c in folder):
        raise ConfigError(f"folder={told(folder)} is not a path. Set it to one, such as folder=runs; the current folder is '.'.")
    return expanded(folder)
