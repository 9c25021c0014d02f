"""TRL's prompt-completion columns, conversational: {"prompt": [messages], "completion": [message]}, one JSON line each.

Source: huggingface/trl, docs/source/dataset_formats.md, "Prompt-completion". Holds demonstrations.

Not held: id, labeler, group, times, the instructions' version.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lockstep_studio.exchange import rounds
from lockstep_studio.exchange.rounds import MESSAGE, Row, Written

TAKES = (rounds.DEMONSTRATIONS,)

_SHAPE = {"prompt": [MESSAGE], "completion": [MESSAGE]}


def write(rows: Iterable[Row], file: str | Path) -> Written:
    return rounds.write_lines(rows, file, lambda row: [{"prompt": row["messages"], "completion": rounds.answer(row["response"])}])


def read(file: str | Path) -> Iterator[Row]:
    return rounds.read(file, _row)


def _row(row: Any, number: str) -> Iterator[Row]:
    rounds.fit(row, _SHAPE)
    messages = [{"role": m["role"], "content": m["content"]} for m in row["prompt"]]
    yield rounds.demonstration(number, messages, rounds.only_answer(row["completion"], "completion"))
