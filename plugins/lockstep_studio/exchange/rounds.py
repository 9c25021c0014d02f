"""The rows of a closed round, and what all formats share: reading and writing files row by row.

    comparisons.jsonl     {"id", "messages", "completions", "ranks", "labeler", "group", "ratings", "flags", "policies", ...}
    demonstrations.jsonl  {"id", "messages", "response", "labeler", "group", ...}
    conversations.jsonl   {"id", "messages", "labeler", "group", "policy", "feedback", "attack", ...}

A row is a dictionary with these keys, None where unknown. ``ranks`` are in the order of ``completions``: 0 is best, equal ranks
are a tie. ``shown`` is the order on the screen. The ``turn`` of a feedback counts the assistant's messages, from 0.

Files are read and written row by row; only a JSON list that is read is held in memory as a whole.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, TextIO

from lockstep.data.cells import BadRow, LeftOut
from lockstep.data.reading import Source, read_rows
from lockstep.errors import DataError, did_you_mean, listing, short
from lockstep.storage.files import expanded
from lockstep.storage.records import NUMBER, mismatch

log = logging.getLogger("lockstep")

Row = dict[str, Any]
Message = Mapping[str, str]

COMPARISONS, DEMONSTRATIONS, CONVERSATIONS = NOUNS = ("comparisons", "demonstrations", "conversations")

MOST_BYTES = 1_000_000_000
"""The largest file that is one JSON list, and the largest Parquet row group: both have to fit in memory."""

MESSAGE = {"role": re.compile("system|user|assistant|tool"), "content": str}
_WHO = {"id": str, "messages": [MESSAGE], "labeler?": str, "group?": str}
_FEEDBACK = {"turn": int, "thumb?": int, "likert?": int, "text?": str}
SHAPES: Mapping[str, Any] = {
    COMPARISONS: _WHO | {
        "completions": [str], "ranks": [int], "ratings?": [(int, None)], "flags?": [[str]],
        "policies?": [str], "shown?": [int], "seconds?": NUMBER,
    },
    DEMONSTRATIONS: _WHO | {"response": str},
    CONVERSATIONS: _WHO | {"policy?": (str, [str]), "feedback?": [_FEEDBACK], "attack?": dict},
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """How many rows were written, and how many were left out for each reason."""

    count: int
    left_out: Mapping[str, int]

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return f"{self.count} rows" + (f"; left out: {reasons}" if reasons else "")


# ------------------------------------------------------------------------------------------------------ rows of a round


def of_round(folder: str | Path, noun: str) -> Iterator[Row]:
    """The rows of one file of a closed round, checked; none if there is no such file.

    Raises:
      DataError: the folder is not a closed round, or a row is damaged; the message names file and line.
    """
    file = rounds_in(folder, several=False)[0] / f"{noun}.jsonl"
    return read(file, lambda row, _: [checked(row, noun)]) if file.is_file() else iter(())


def rounds_in(folder: str | Path, several: bool = True) -> list[Path]:
    """The folder if it is a closed round; else, with ``several``, the closed rounds directly in it, by name.

    Raises:
      DataError: there is none.
    """
    path = expanded(folder)
    found = [path] if _is_round(path) else sorted(filter(_is_round, path.iterdir())) if several and path.is_dir() else []
    if not found:
        there = [each.name for each in path.iterdir()] if path.is_dir() else []
        files = listing(f"{noun}.jsonl" for noun in NOUNS)
        raise DataError(
            f"{path} is no closed round: it has none of {files}. It has: {listing(there)}. Closing a round writes one."
        )
    return found


def _is_round(path: Path) -> bool:
    return any((path / f"{noun}.jsonl").is_file() for noun in NOUNS)


def checked(row: Any, noun: str) -> Row:
    """A copy of a valid row.

    Raises:
      BadRow: the row is not one of this noun.
    """
    fit(row, SHAPES[noun])
    if not row["messages"]:
        raise BadRow("a row of another form", "messages is empty.")
    if noun == COMPARISONS:
        _check_comparison(row)
    return dict(row)


def _check_comparison(row: Mapping[str, Any]) -> None:
    count = len(row["completions"])
    if count < 2:
        raise BadRow("a row of another form", f"a comparison needs two completions or more, not {count}.")
    for key in ("ranks", "ratings", "flags", "policies", "shown"):
        if (key == "ranks" or row.get(key)) and len(row[key]) != count:
            raise BadRow("a row of another form", f"it has {count} completions, but {len(row[key])} {key}.")
    if wrong := [rating for rating in row.get("ratings") or () if rating is not None and not 1 <= rating <= 7]:
        raise BadRow("a row of another form", f"a rating is {wrong[0]}, not 1 to 7.")
    if row.get("shown") and sorted(row["shown"]) != list(range(count)):
        raise BadRow("a row of another form", f"shown is {row['shown']}, not an order of {count} completions.")


def comparison(id: str, messages: Iterable[Message], completions: Sequence[str], ranks: Sequence[int], **more: Any) -> Row:
    """A row of comparisons.jsonl. Whatever ``more`` does not give is unknown.

    Raises:
      BadRow: the row is invalid.
    """
    row: Row = {
        "id": id, "messages": list(map(dict, messages)), "completions": list(completions), "ranks": list(ranks), "labeler": None,
        "group": None, "ratings": None, "flags": None, "policies": None, "shown": None, "scores": None, "seconds": None,
        "at": None, "instructions": None, "revision": 0, "mode": "compare" if len(completions) == 2 else "rank",
    }  # fmt: skip
    return checked(row | more, COMPARISONS)


def demonstration(id: str, messages: Iterable[Message], response: str) -> Row:
    """A row of demonstrations.jsonl by an unknown labeler.

    Raises:
      BadRow: the row is invalid.
    """
    row: Row = {
        "id": id, "messages": list(map(dict, messages)), "response": response, "labeler": None, "group": None, "at": None,
        "seconds": None, "instructions": None, "mode": "write",
    }  # fmt: skip
    return checked(row, DEMONSTRATIONS)


def noun_of(row: Mapping[str, Any]) -> str:
    return COMPARISONS if "completions" in row else DEMONSTRATIONS if "response" in row else CONVERSATIONS


# ---------------------------------------------------------------------------------------------------- pieces of formats


def fit(row: Any, shape: Any) -> None:
    """Check the shape of a row. A key that is null counts as absent.

    Raises:
      BadRow: the row has another shape (`lockstep.storage.records.mismatch`).
    """
    if problem := mismatch(_told(row), shape):
        raise BadRow("a row of another form", f"{problem}.")


def _told(value: Any) -> Any:
    """The value without keys that are null."""
    if isinstance(value, dict):
        return {key: _told(each) for key, each in value.items() if each is not None}
    return [_told(each) for each in value] if isinstance(value, list) else value


def better_pairs(ranks: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
    """The pairs (better, worse) of completions, and how many pairs tie."""
    pairs = list(combinations(range(len(ranks)), 2))
    told = [(a, b) if ranks[a] < ranks[b] else (b, a) for a, b in pairs if ranks[a] != ranks[b]]
    return told, len(pairs) - len(told)


def ranks_of(numbers: Sequence[float]) -> list[int]:
    """Dense ranks from 0, the lowest number first."""
    order = sorted(set(numbers))
    return [order.index(number) for number in numbers]


def answers(messages: Sequence[Message]) -> list[int]:
    """The positions of the assistant's messages in a conversation. The ``turn`` of a feedback is an index into this list."""
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"]


def answer(content: str) -> list[Row]:
    return [{"role": "assistant", "content": content}]


def only_answer(messages: Sequence[Message], name: str) -> str:
    """The content of the only message, which is the assistant's.

    Raises:
      BadRow: there are more messages, or none, or it is not the assistant's.
    """
    if [message["role"] for message in messages] != ["assistant"]:
        raise BadRow("a row of another form", f"{name} should be one message of the assistant.")
    return messages[0]["content"]


def shared_prompt(one: Sequence[Message], other: Sequence[Message]) -> tuple[Sequence[Message], str, str]:
    """The prompt that two dialogues share, and their last answers.

    Raises:
      LeftOut: the dialogues do not end with an answer, or differ before it.
    """
    if not one or not other or one[-1]["role"] != "assistant" or other[-1]["role"] != "assistant":
        raise LeftOut("dialogues that do not end with the assistant")
    if len(one) < 2 or [dict(m) for m in one[:-1]] != [dict(m) for m in other[:-1]]:
        raise LeftOut("pairs that differ before the last answer")
    return one[:-1], one[-1]["content"], other[-1]["content"]


# --------------------------------------------------------------------------------------------------------------- files


def read(file: str | Path, convert: Callable[[Any, str], Iterable[Row]]) -> Iterator[Row]:
    """The converted rows of a file: JSON lines, one JSON list, or another format that `read_rows` opens. Rows that ``convert``
    leaves out are counted, and logged at the end.

    Args:
      convert: makes rows from a row and its number, which serves as the id of rows without one.

    Raises:
      DataError: there is no such file, or a row cannot be read; the message names file and line.
    """
    path = expanded(file)
    if not path.is_file():
        there = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"No file {path}.{did_you_mean(path.name, there)} Files there: {listing(there[:20])}.")
    if path.name.lower().endswith(".json.gz"):
        raise DataError(f"{path} is a compressed JSON list, of unknown size. Unpack it: gunzip {path}")
    if path.suffix.lower() == ".json" and path.stat().st_size > MOST_BYTES:
        raise DataError(
            f"{path} has {path.stat().st_size / 1e9:.1f} GB, and a JSON list is read at once, up to {MOST_BYTES / 1e9:.0f} GB. "
            "Turn it into JSON Lines (a row a line, named .jsonl), which have no limit."
        )
    return _converted(path, convert)


def _converted(path: Path, convert: Callable[[Any, str], Iterable[Row]]) -> Iterator[Row]:
    left_out, count = Counter[str](), 0
    _check_groups(path)
    for place, row in read_rows(Source(str(path))):
        count += 1
        try:
            if isinstance(row, BadRow):
                raise row
            yield from convert(row, f"{count:06d}")
        except LeftOut as reason:
            left_out[str(reason)] += 1
        except BadRow as bad:
            raise DataError(f"{place}: {bad}") from None
        except RecursionError:
            raise DataError(f"{place}: it is nested too deeply.") from None
        except ValueError as error:  # an integer with thousands of digits
            raise DataError(f"{place}: {str(error).partition(';')[0]}.") from None
    if left_out:
        log.warning("%s: left out of %d rows: %s", path, count, ", ".join(f"{n} {reason}" for reason, n in left_out.items()))


def _check_groups(path: Path) -> None:
    """
    Raises:
      DataError: a row group of a Parquet file is too large for memory.
    """
    if path.suffix.lower() != ".parquet":
        return
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (OSError, ValueError):
        return  # not Parquet, as its reader will report
    largest = max((metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)), default=0)
    if largest > MOST_BYTES:
        raise DataError(f"{path} has {largest / 1e9:.1f} GB of columns in one group of rows. Write it with smaller ones.")


Convert = Callable[[Any], Iterable[Row | LeftOut]]


def write_lines(items: Iterable[Any], file: str | Path, convert: Convert) -> Written:
    """Write the rows that ``convert`` makes of each item as JSON lines. Each `LeftOut` that it yields or raises is counted.

    Raises:
      DataError: nothing can be written. An existing file then stays.
    """
    return _write(items, file, convert, "", "\n", "\n")


def write_list(items: Iterable[Any], file: str | Path, convert: Convert) -> Written:
    """Write one JSON list; otherwise like `write_lines`."""
    return _write(items, file, convert, "[\n", ",\n", "\n]\n")


def _write(items: Iterable[Any], file: str | Path, convert: Convert, before: str, between: str, after: str) -> Written:
    left_out, count = Counter[str](), 0
    with _replaced(expanded(file)) as opened:
        for each in itertools.chain.from_iterable(_made(item, convert) for item in items):
            if isinstance(each, LeftOut):
                left_out[str(each)] += 1
                continue
            opened.write((between if count else before) + json.dumps(each, ensure_ascii=False, allow_nan=False))
            count += 1
        if not count:
            reasons = str(Written(0, left_out)).partition("; ")[2] or "there are no rows of the kind that this format holds"
            raise DataError(f"Nothing can be written to {file}: {reasons}.")
        opened.write(after)
    return Written(count, dict(left_out))


def _made(item: Any, convert: Convert) -> Iterator[Row | LeftOut]:
    try:
        yield from convert(item)
    except LeftOut as reason:
        yield reason


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[TextIO]:
    """A file that gets its name only when it is complete.

    Raises:
      DataError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as opened:
            yield opened
        os.replace(temporary, path)
    except (OSError, ValueError) as error:  # ValueError: half a surrogate pair, NaN
        raise DataError(f"Could not write {path}: {error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def grouped(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The comparisons of each task together, in the order of the tasks' first rows. All rows are held in memory.

    Raises:
      DataError: rows with the same id differ in their messages or completions.
    """
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        first = tasks.setdefault(row["id"], [])
        first.append(row)
        if any(row[key] != first[0][key] for key in ("messages", "completions")):
            raise DataError(f"Two rows have the id '{short(row['id'])}', but not the same messages and completions.")
    yield from tasks.values()


def finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and math.isfinite(number)
