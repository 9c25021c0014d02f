"""Turn the rows of a source into the nouns: choose a convention by the columns of the first row, and check what each row says.

A row can be unusable in two ways. `BadRow` is a mistake that the user should know about, so by default it ends the run.
`LeftOut` occurs in good data too (a tie, a transcript that breaks off): such rows are left out and counted. `unread` names
the columns that nothing reads, once per source.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lockstep.data.cells import MOST_CHARACTERS, BadRow, Columns, LeftOut, too_long
from lockstep.data.conventions import ANSWERS, BESIDES, CONVENTIONS, WITHOUT_PROMPTS, Convention
from lockstep.data.messages import OF_A_ROW, Answered, refuse_unreadable
from lockstep.errors import DataError, listing
from lockstep.types import Choice, Comparison, Demonstration, Goal, Prompt


def _demonstration(row: Answered) -> Demonstration:
    """The best completion as a demonstration, so that comparisons can be used too; if several tie, the first."""
    if not row.completions:
        raise BadRow("no response", "the last message should be the assistant's.")
    return Demonstration(row.prompt, row.completions[row.ranks.index(min(row.ranks))], row.dialogue, row.calls)


def _comparison(row: Answered) -> Comparison:
    if len(set(row.completions)) == 1 or len(set(row.ranks)) == 1:
        raise LeftOut("ties")
    return Comparison(row.prompt, row.completions, row.ranks, row.labeler)


_MAKE: Mapping[str, Callable[[Any], Any]] = {
    "demonstrations": _demonstration,
    "comparisons": _comparison,
    "prompts": lambda row: row.prompt,
    "texts": lambda text: text,
    "goals": lambda goal: goal,
    "tests": lambda item: item,
}


def reader(noun: str, first: Any, place: str, named: Sequence[str] = ()) -> Callable[[Any], Any]:
    """The function that makes this noun from each row of a source, chosen by the columns of its first row. The columns ``named``
    go into the prompt's ``truth``.

    Raises:
      DataError: the first row has no columns, or they fit no convention; the message lists the conventions.
    """
    if not isinstance(first, Mapping):
        raise DataError(f"{place}: {_no_object(first)}")
    convention = _convention(noun, first)
    if convention is None:
        known = "; ".join(" + ".join(convention.columns) for convention in CONVENTIONS[noun])
        raise DataError(
            f"{place}: no {noun} can be made from the columns {listing(first)}. Columns that work: {known}. Rename yours; "
            "docs/data.md has an example of each."
        )

    def read(row: Any) -> Any:
        if not isinstance(row, Mapping):
            raise _no_object(row)
        if noun not in WITHOUT_PROMPTS:
            refuse_unreadable(row, OF_A_ROW, "the row")
        if noun == "demonstrations" and convention in ANSWERS and not _desirable(row):
            raise LeftOut("answers that are labelled as bad")
        item = _MAKE[noun](convention.read(row))
        if named and noun not in WITHOUT_PROMPTS:
            item = _with_truth(item, {name: _value(row, name) for name in named})
        for text in texts_of(item):
            _check_text(text)
        return item

    return read


def _value(row: Columns, name: str) -> Any:
    """The value of a column for a reward function: any JSON value, null included."""
    if name not in row:
        raise BadRow(f"no column '{name}'", f"its source names it under columns. The row has: {listing(row)}.")
    try:
        json.dumps(row[name], ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"a column '{name}' that is no JSON value", f"{reprlib.repr(row[name])}: {error}.") from None
    return row[name]


def _with_truth(item: Any, known: Columns) -> Any:
    """The item with ``known`` added to the truth of its prompt or goal."""
    if isinstance(item, Prompt):
        return replace(item, truth={**item.truth, **known})
    if isinstance(item, Goal):
        twin = None if item.twin is None else _with_truth(item.twin, known)
        return replace(item, truth={**item.truth, **known}, twin=twin)
    return replace(item, prompt=_with_truth(item.prompt, known))


def unread(noun: str, first: Columns, columns: Sequence[str], named: Sequence[str] = ()) -> list[str]:
    """The columns of a source that neither the convention of its first row reads nor the source names."""
    convention = _convention(noun, first)
    besides = () if noun in WITHOUT_PROMPTS else (*BESIDES, *OF_A_ROW)
    if noun == "demonstrations" and convention in ANSWERS:
        besides += tuple(name for name in LABELS if _truth_value(first.get(name)) is not None)
    read = {*convention.columns, *convention.also, *besides, *named} if convention else columns
    return [name or "(without a name)" for name in columns if name not in read]


def _convention(noun: str, first: Columns) -> Convention | None:
    return next((convention for convention in CONVENTIONS[noun] if set(convention.columns) <= set(first)), None)


LABELS = ("label", "kto_tag")
"""Columns of KTO (Ethayarajh et al. 2024) that say whether the answer is good, as TRL and LLaMA-Factory name them."""


def _desirable(row: Columns) -> bool:
    """False if a label says that the answer is bad. A word other than true and false is some other kind of label, and ignored."""
    for name in LABELS:
        value = row.get(name)
        if value is not None and not isinstance(value, (bool, str)) or isinstance(value, str) and _is_number(value):
            raise BadRow(
                f"a column '{name}' that is not true or false",
                f"it is {reprlib.repr(value)}, which may mean a bad answer. If it does not, remove the column, or add "
                f"ignore: [{name}] to its source.",
            )
        if _truth_value(value) is False:
            return False
    return True


def _is_number(text: str) -> bool:
    """True for a number in CSV, where every cell is text."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _truth_value(value: Any) -> bool | None:
    """The value of a label, which is a word in CSV; None if it is neither true nor false."""
    return {"true": True, "false": False}.get(str(value).strip().lower())


def texts_of(item: Any) -> Iterator[str]:
    """All texts of an item."""
    if isinstance(item, str):
        yield item
        return
    if isinstance(item, Goal):
        yield from (item.text, item.ask, *(texts_of(item.twin) if item.twin else ()))
        return
    if isinstance(item, Choice):
        yield from (item.context, *item.options)
        return
    prompt = item if isinstance(item, Prompt) else item.prompt
    yield from (message.content for message in prompt.messages)
    if isinstance(item, Demonstration):
        yield item.response
    if isinstance(item, Comparison):
        yield from item.completions


def _check_text(text: str) -> None:
    if len(text) > MOST_CHARACTERS:
        raise too_long()
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start : error.start + 1])
        raise BadRow(
            "half a character", f"a text holds {half}, one half of a surrogate pair, after {error.start} characters."
        ) from None


def _no_object(row: Any) -> BadRow:
    """The error for a row without columns: what `reading` found wrong with it, or that it is another kind of JSON."""
    return row if isinstance(row, BadRow) else BadRow("a line that is not a JSON object", f"{type(row).__name__}.")
