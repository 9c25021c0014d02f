"""Files, folders and Hugging Face data sets as rows. A row is a place to name in an error, and a mapping of columns.

Local files are read here, not by ``datasets``, which would copy them into its cache, infer one schema for all rows and lose
the line of an error. ``datasets`` is only for the hub and for data sets that it saved itself.
"""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import itertools
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lockstep.config.schema import REQUIRED, setting
from lockstep.data.cells import MOST_CHARACTERS, BadRow, too_long, without_fill
from lockstep.errors import ConfigError, DataError, Unreachable, did_you_mean, listing, short
from lockstep.storage.files import checksum, expanded
from lockstep.storage.hub import hub

log = logging.getLogger("lockstep")

Row = tuple[str, Any]
"""'file:line', and the row's columns or, if it cannot be read, what is wrong with it."""


@dataclass(frozen=True)
class Source:
    """One source of rows. In a folder, a split is every file whose name or folder begins with the split's name; a single file
    has only 'train'."""

    path: str = setting(REQUIRED, "A file, a folder, or a hub id, optionally with a folder: 'Anthropic/hh-rlhf/harmless-base'.")
    split: str = setting("train", "'train', 'test[:100]', 'train[500:1000]', ...")
    weight: float | None = setting(
        None, "Share of the mixture, relative to the other sources of the list; null: by its size.", above=0
    )
    config: str | None = setting(None, "Which configuration of a hub data set; null: its only one.")
    revision: str | None = setting(None, "Branch, tag or commit of a hub data set; null: the newest.")
    ignore: tuple[str, ...] = setting((), "Columns, and keys of messages, to leave unread although they may matter.")
    where: Mapping[str, Any] = setting({}, "Only rows whose columns have these values: {label: safe}.")
    columns: tuple[str, ...] = setting((), "Columns for rewards, not for the model: they go into `Prompt.truth`.")


def has(row: Any, values: Mapping[str, Any]) -> bool:
    """True if the row has these values in its columns, as themselves or as text; also True for a row that could not be read,
    because it might have them."""
    if not isinstance(row, Mapping):
        return True
    return all(name in row and _plain(row[name]) == _plain(value) for name, value in values.items())


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def source_digest(source: Source) -> str | None:
    """SHA-256 of the contents of a local source and, in a folder, of its files' names, which decide what is read. None for the
    hub, where the revision identifies the data."""
    path = expanded(source.path)
    if path.is_file():
        return checksum(path)
    if not path.is_dir():
        return None
    names = "".join(f"{p.relative_to(path)}\0{checksum(p)}" for p in sorted(path.rglob("*")) if p.is_file())
    return hashlib.sha256(names.encode()).hexdigest()


def read_rows(source: Source, first: int | None = None) -> Iterator[Row]:
    """The rows of a source, in file order. Rows are numbered from 1, and blank lines count. If ``first`` is given, only that
    many rows of a hub data set are streamed.

    Raises:
      DataError: the source does not exist or cannot be read.
    """
    split, part = parse_split(source.split)
    path = expanded(source.path)
    if path.is_file():
        if split != "train":
            raise DataError(f"{path} is one file: its only split is 'train', not '{short(split)}'. A folder can have others.")
        rows = _file(path)
    elif any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        rows = _saved(path, split)
    elif path.is_dir():
        rows = itertools.chain.from_iterable(map(_file, _files_of_split(path, split)))
    elif _HUB_ID.fullmatch(source.path) and _suffix(path) not in FORMATS and not path.parent.is_dir():
        rows = _hub(source, split, first)
    else:
        raise DataError(_not_found(path))
    return itertools.islice(rows, part.start, part.stop)


def parse_split(split: str) -> tuple[str, slice]:
    """'test[:100]' as ('test', slice(None, 100)).

    Raises:
      ConfigError: the split has another form.
    """
    match = re.fullmatch(r"(\w+)(?:\[(\d{0,18}):(\d{0,18})\])?", split)
    if match is None:
        raise ConfigError(
            f"split '{short(split)}' should look like train, test[:100] or train[500:1000]. A bound has at most 18 digits."
        )
    start, stop = (int(bound) if bound else None for bound in match.group(2, 3))
    return match.group(1), slice(start, stop)


# ------------------------------------------------------------------------------------------------------- local files


def _open(path: Path) -> TextIO:
    """Open a file as text, unzipped if needed, without a byte order mark. Bytes that are not UTF-8 become surrogates, which
    `_not_utf8` finds."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with _open(path) as file:
        for number, line in enumerate(_lines(file), 1):
            if isinstance(line, BadRow):
                yield number, line
            elif line.strip():
                row = _parsed(line)
                hint = _misnamed(path, line) if number == 1 and not isinstance(row, Mapping) else None
                yield number, BadRow(_NO_JSON, f"{hint}.") if hint else row


def _lines(file: TextIO) -> Iterator[str | BadRow]:
    """The lines of a file. A line that is too long becomes a `BadRow`, and no more than the limit of it is ever in memory."""
    while line := file.readline(MOST_CHARACTERS + 1):
        if len(line) <= MOST_CHARACTERS:
            yield line
            continue
        while line and not line.endswith(("\n", "\r")):
            line = file.readline(MOST_CHARACTERS)
        yield too_long()


def _parsed(text: str) -> Any:
    """One row of JSON. Errors are returned, not raised: the caller decides whether a bad row ends the run."""
    if wrong := _not_utf8(text):
        return wrong
    try:
        row = json.loads(text, object_pairs_hook=_unique)
        if _SURROGATE.search(text):  # a valid pair, or half a character, which does not encode
            json.dumps(row, ensure_ascii=False).encode()
        return row
    except UnicodeEncodeError as error:
        return BadRow("half a character", f"it has {ascii(error.object[error.start])}, one half of a surrogate pair.")
    except BadRow as wrong:
        return wrong
    except RecursionError:
        return BadRow("JSON that is nested too deeply", f"it begins {text[:40]!r}.")
    except json.JSONDecodeError as error:
        return BadRow(_NO_JSON, f"{error}.")
    except ValueError as error:  # a whole number of thousands of digits
        return BadRow("a number that is too long", f"{str(error).partition(';')[0]}.")


_NO_JSON = "a line that is not a JSON object"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """
    Raises:
      BadRow: a key occurs twice; json would keep the last.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise BadRow("a key that is there twice", f"{listing({name for name in names if names.count(name) > 1})}.")
    return found


def _not_utf8(text: str) -> BadRow | None:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        near = ascii(text[max(0, error.start - 20) : error.start + 20])
        return BadRow("bytes that are not UTF-8", f"near {near}. Convert the file to UTF-8.")
    return None


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of one JSON list, or of JSON lines, which are often named .json too."""
    with _open(path) as file:
        beginning = file.read(1000)
        if not beginning.lstrip().startswith("["):
            return _jsonl(path)
        return enumerate(_elements(beginning + file.read()), 1)


_PUNCTUATION = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)


def _elements(text: str) -> Iterator[Any]:
    """The elements of a JSON list, one by one, so that a bad one can be named and skipped.

    Raises:
      ValueError: an element is not JSON, so that its end is unknown, or the list is broken.
    """
    start, depth, number = text.index("[") + 1, 0, 0
    for found in _PUNCTUATION.finditer(text, start):
        mark = found[0]
        if mark in "{[":
            depth += 1
        elif depth and mark in "]}":
            depth -= 1
        elif not depth and mark in ",]}":
            element = text[start : found.start()]
            if mark == "," or element.strip():
                number, row = number + 1, _parsed(element)
                if isinstance(row, BadRow) and row.problem == _NO_JSON:
                    raise ValueError(f"row {number} is not JSON: {row}")
                yield row
            start = found.end()
            if mark != ",":
                break
    else:
        raise ValueError("its list does not end")
    if mark == "}" or text[start:].strip():
        raise ValueError(f"after its list comes {text[start - 1 : start + 40]!r}")


def _csv(path: Path, delimiter: str = ",") -> Iterator[tuple[int, Any]]:
    """Rows of CSV, read strictly: a quote that is never closed, or not doubled inside quotes, would otherwise change or swallow
    rows."""
    csv.field_size_limit(MOST_CHARACTERS)
    with _open(path) as file:
        if hint := _misnamed(path, file.readline(10_000)):
            raise ValueError(hint)
        file.seek(0)
        reader = csv.DictReader(file, restkey=_EXTRA, delimiter=delimiter, strict=True)
        names = list(reader.fieldnames or [])
        if wrong := _not_utf8("".join(names)):
            raise ValueError(str(wrong))
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"its header has {listing(twice)} twice")
        while True:
            row: Any
            try:
                row = next(reader, None)
            except csv.Error as error:
                where = f"in the row that begins in line {reader.line_num + 1}"
                raise ValueError(f"{where}, {error}. Inside quotes, a quote is written twice") from error
            if row is None:
                return
            if any(extra := row.pop(_EXTRA, ())):
                row = BadRow("more fields than the header has", f"{len(extra)} more. Text that has a comma needs quotes.")
            else:
                row = _not_utf8("".join(text for text in row.values() if text)) or row
            yield reader.line_num, row


_EXTRA = "(without a header)"


_NAME = r'(?:"[\w .-]+"|\w[\w .-]*)'
_HEADERS = {".csv": ",", ".tsv": "\t", "semicolons": ";"}
"""{format: what separates the columns in its header}."""


def _misnamed(path: Path, line: str) -> str | None:
    """What a file is by its first line, and how to rename it; None if it may be what its name says."""
    own, line = _suffix(path), line.strip()
    headers = (name for name, mark in _HEADERS.items() if re.fullmatch(rf"{_NAME}(?:{mark}{_NAME})+", line))
    found = {"[": ".json", "{": ".jsonl"}.get(line[:1]) or next(headers, None)
    if found is None or own.removesuffix(".gz") == found or own.startswith(".json") and found == ".jsonl":
        return None
    if found == "semicolons":
        return "its first line is a header with semicolons. Save it as CSV with commas"
    kinds = {".json": "begins with '[', as a JSON list does", ".jsonl": "begins with '{', as JSON lines do"}
    what = kinds.get(found, f"is a header, as of {found}")
    ending = f"{found}.gz" if own.endswith(".gz") else found
    return f"its first line {what}. Rename it to {path.name[: -len(own)]}{ending}"


PARQUET_ROWS = 64
"""How many rows of Parquet are decoded together."""


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """Unpack rows one by one: a file of some kilobytes may unpack to gigabytes, because a text that all rows share is stored only
    once."""
    import pyarrow.parquet

    batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=PARQUET_ROWS)
    rows = (batch.slice(i, 1).to_pylist()[0] for batch in batches for i in range(len(batch)))
    return enumerate(map(without_fill, rows), 1)


FORMATS: Mapping[str, Callable[[Path], Iterable[tuple[int, Any]]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".json": _json,
    ".json.gz": _json,
    ".csv": _csv,
    ".csv.gz": _csv,
    ".tsv": functools.partial(_csv, delimiter="\t"),
    ".tsv.gz": functools.partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
}


def _suffix(path: Path) -> str:
    """'.jsonl.gz' of 'my.data.jsonl.gz' and of 'MY.JSONL.GZ'."""
    kept = 2 if path.suffix.lower() == ".gz" else 1
    return "".join(path.suffixes[-kept:]).lower()


_UNREADABLE = (OSError, EOFError, ValueError, zlib.error, csv.Error)
"""Errors that readers raise for files that are truncated, not UTF-8 or not in the format of their name."""


def _file(path: Path) -> Iterator[Row]:
    if _suffix(path) not in FORMATS:
        raise DataError(f"{path} has an unsupported format. Formats: {', '.join(FORMATS)}.")
    try:
        for number, row in FORMATS[_suffix(path)](path):
            yield f"{path}:{number}", row
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read as {_suffix(path)}: {error}") from error


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The files of a split. 'train' matches train.jsonl, train-00000-of-00002.parquet, data/train.csv and train/0.parquet, but
    not training.csv. Files of the split in other formats are named in a warning or in the error."""
    names = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    begins = re.compile(rf"{re.escape(split)}(?![a-zA-Z])")
    of_split = [name for name in names if any(map(begins.match, name.parts))]
    chosen = [folder / name for name in of_split if _suffix(name) in FORMATS]
    others = [name for name in of_split if _suffix(name) not in FORMATS]
    unread = f" Files of the split that are not read: {_some(others)}. Formats: {', '.join(FORMATS)}." if others else ""
    if not chosen:
        readable = _some(name for name in names if _suffix(name) in FORMATS)
        raise DataError(
            f"{folder} has no split '{short(split)}': no data file or folder in it begins with that. It has: {readable}. "
            f"A path can also name one of them.{unread}"
        )
    if others:
        log.warning("%s, split '%s':%s", folder, short(split), unread)
    return chosen


def _not_found(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"No file {path}: there is no folder {folder}."
    there = [f.name for f in folder.iterdir() if (f.is_dir() or _suffix(f) in FORMATS) and not f.name.startswith(".")]
    return f"No file {path}.{did_you_mean(path.name, there)} Files and folders there: {_some(there)}."


def _some(names: Iterable[Any], most: int = 10) -> str:
    """A listing that stays readable for a folder of a thousand shards."""
    shown = sorted(map(str, names))
    return listing(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


# ------------------------------------------------------------------------------------------------ Hugging Face data sets

_HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/[\w.-]+)(?:/(?P<folder>[\w./-]+))?")


def _hub(source: Source, split: str, first: int | None) -> Iterator[Row]:
    import datasets

    match = _HUB_ID.fullmatch(source.path)
    with hub(source.path) as why:
        try:
            data = datasets.load_dataset(
                match["id"], name=source.config, data_dir=match["folder"], split=split, revision=source.revision,
                streaming=first is not None,
            )  # fmt: skip
            data = data if first is None else list(itertools.islice(data, first))
        except Exception as error:  # many kinds: no network, no such id, private, no such split
            raise Unreachable(
                f"'{source.path}' is not a local file or folder, and it could not be loaded from the Hugging Face hub: "
                f"{str(why(error)).rstrip('.')}. A local path works too: download the data set where there is a network "
                "and set path to its folder."
            ) from error
    return _numbered(source.path, data)


def _saved(folder: Path, split: str) -> Iterator[Row]:
    """The rows that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # many kinds: files that are missing, damaged or of another version
        raise DataError(f"{folder} cannot be read as a data set that was saved to disk: {error}") from error
    splits = data if isinstance(data, dict) else {"train": data}
    if split not in splits:
        raise DataError(f"{folder} has no split '{short(split)}'.{did_you_mean(split, splits)} It has: {', '.join(splits)}.")
    return _numbered(str(folder), splits[split])


def _numbered(name: str, data: Iterable[Any]) -> Iterator[Row]:
    number = 0
    try:
        for number, row in enumerate(data, 1):
            yield f"{name}:{number}", without_fill(row)
    except Exception as error:  # images without a decoder, a damaged file, a network that went away
        raise DataError(f"{name} cannot be read beyond row {number}: {error}") from error
