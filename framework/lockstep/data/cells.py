"""Checks of a row's cells, and the two exceptions for a row that cannot be used: `BadRow`, a mistake that the user should know
about, and `LeftOut`, which occurs in good data too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lockstep.errors import listing

Columns = Mapping[str, Any]

MOST_CHARACTERS = 50_000_000
"""The limit for one row and for one text; a novel has a million."""


class BadRow(Exception):
    """``problem`` is the same for all rows of its kind, so that they can be counted; ``detail`` is about this row."""

    def __init__(self, problem: str, detail: str):
        super().__init__(f"{problem}: {detail}")
        self.problem = problem


class LeftOut(Exception):
    """A row to leave out; the message is the reason, such as 'ties' in '3 rows were left out: 2 ties'."""


def cell(row: Columns, name: str, kinds: type | tuple[type, ...], expected: str) -> Any:
    if name not in row:
        raise BadRow("a missing column", f"no '{name}'. The row has: {listing(key for key in row if row[key] is not None)}.")
    if row[name] is None:
        raise BadRow("a null", f"'{name}' is null (in CSV: the row ends before it). It should be {expected}.")
    if not isinstance(row[name], kinds) or isinstance(row[name], bool):
        raise BadRow("a wrong type", f"'{name}' should be {expected}, not {type(row[name]).__name__}.")
    return row[name]


def text_in(row: Columns, name: str) -> str:
    return not_empty(cell(row, name, str, "text"), name)


def not_empty(text: str, where: str) -> str:
    if not text.strip():
        raise BadRow("an empty text", f"'{where}' should not be empty.")
    return text


def list_in(row: Columns, name: str, of: str) -> list[Any]:
    values = cell(row, name, (list, tuple), f"a list of {of}")
    if not values:
        raise BadRow("an empty list", f"'{name}' should hold {of}.")
    return list(values)


def says_nothing(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(says_nothing, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(says_nothing, value))
    return value is None or isinstance(value, str) and value.strip() in ("", "[]", "{}", "null")


def without_fill(row: Any, inside: bool = False) -> Any:
    """A row from Arrow (Parquet, ``datasets``) without the null keys inside its ``tools`` and ``tool_calls``, at any depth. Arrow
    gives all groups of a column the same keys, so a null there stands for a key that the row does not have. Other nulls stay.

    Args:
      inside: the row is part of tools or calls.
    """
    if isinstance(row, dict):
        return {
            name: without_fill(value, inside or name in ("tools", "tool_calls"))
            for name, value in row.items()
            if not (inside and value is None)
        }
    return [without_fill(each, inside) for each in row] if isinstance(row, list) else row


def from_json(value: Any) -> Any:
    """The value of a JSON text; None if the text is not JSON. Any other value is returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def too_long() -> BadRow:
    return BadRow("too long a text", f"it has more than {MOST_CHARACTERS:,} characters. Split it.")
