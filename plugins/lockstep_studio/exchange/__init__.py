"""Conversion of rounds to the formats of other tools, and of their files to rows of a round.

    export("studio/rounds/round-1", "trl-preference", "pairs.jsonl")
    rows = import_("battles.json", "arena")

rounds.py            the rows of a closed round; reading and writing files row by row
trl_preference.py    prompt, chosen, rejected
trl_unpaired.py      prompt, completion, label
trl_completion.py    prompt, completion
hh.py                Anthropic's transcripts
ultrafeedback.py     instructions, and completions with ratings
arena.py             Chatbot Arena's battles
argilla.py           records with a ranking question
label_studio.py      tasks with a Ranker or a Pairwise
personal.py          personal data in free text

Each module of `FORMATS` has ``TAKES``, the nouns that the format holds, ``write(rows, file)`` and ``read(file)``. Its docstring
describes the format, its source, and what it cannot hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from lockstep.errors import ConfigError, DataError, did_you_mean, listing, short
from lockstep.storage.files import expanded
from lockstep_studio.exchange import (
    arena,
    argilla,
    hh,
    label_studio,
    rounds,
    trl_completion,
    trl_preference,
    trl_unpaired,
    ultrafeedback,
)
from lockstep_studio.exchange.rounds import Row, Written

FORMATS: Mapping[str, ModuleType] = {
    "trl-preference": trl_preference,
    "trl-unpaired": trl_unpaired,
    "trl-completion": trl_completion,
    "hh": hh,
    "ultrafeedback": ultrafeedback,
    "arena": arena,
    "argilla": argilla,
    "label-studio": label_studio,
}


def export(folder: str | Path, format: str, output: str | Path) -> Written:
    """Write a closed round's rows as a file of this format.

    Raises:
      ConfigError: there is no such format.
      DataError: the folder is not a closed round, or has nothing that the format can hold. An existing file then stays.
    """
    module = _named(format)
    rows: Iterator[Row] = itertools.chain.from_iterable(rounds.of_round(folder, noun) for noun in module.TAKES)
    written: Written = module.write(rows, output)
    return written


def import_(file: str | Path, format: str) -> Iterator[Row]:
    """The rows of a file of this format, read one by one.

    Raises:
      ConfigError: there is no such format.
      DataError: there is no such file; or, while reading, a row is damaged, and the message names its line.
    """
    rows: Iterator[Row] = _named(format).read(file)
    return rows


def import_round(file: str | Path, format: str, folder: str | Path) -> Written:
    """Convert a file of this format to a folder that stages and `data=human` read.

    Raises:
      ConfigError: there is no such format.
      DataError: the folder is not empty, or the file cannot be read or has no rows.
    """
    if (there := expanded(folder)).exists() and any(there.iterdir()):
        raise DataError(f"{there} is not empty. Give a new folder for the rows of {file}.")
    rows = import_(file, format)
    if (first := next(rows, None)) is None:
        raise DataError(f"{file} has no rows.")
    noun = rounds.noun_of(first)
    return rounds.write_lines(itertools.chain([first], rows), there / f"{noun}.jsonl", lambda row: [row])


def _named(format: str) -> ModuleType:
    if format not in FORMATS:
        raise ConfigError(f"No format '{short(format)}'.{did_you_mean(format, FORMATS)} There are: {listing(FORMATS)}.")
    return FORMATS[format]
