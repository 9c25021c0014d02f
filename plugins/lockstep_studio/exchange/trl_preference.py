"""TRL's preference columns, conversational: {"prompt": [messages], "chosen": [message], "rejected": [message]}, one JSON line
each.

Source: huggingface/trl, docs/source/dataset_formats.md, "Preference". A ranking of K becomes a line for each pair that does not
tie. `read` also accepts implicit prompts, where chosen and rejected are whole dialogues (as in
HuggingFaceH4/ultrafeedback_binarized).

Not held: ties, which pairs came from one ranking, id, labeler, group, ratings, flags, policies, times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lockstep.data.cells import LeftOut
from lockstep_studio.exchange import rounds
from lockstep_studio.exchange.rounds import MESSAGE, Row, Written

TAKES = (rounds.COMPARISONS,)

_IMPLICIT = {"chosen": [MESSAGE], "rejected": [MESSAGE]}
_EXPLICIT = _IMPLICIT | {"prompt": [MESSAGE]}


def write(rows: Iterable[Row], file: str | Path) -> Written:
    return rounds.write_lines(rows, file, _lines)


def read(file: str | Path) -> Iterator[Row]:
    return rounds.read(file, _row)


def _lines(row: Row) -> Iterator[Row | LeftOut]:
    pairs, ties = rounds.better_pairs(row["ranks"])
    for better, worse in pairs:
        chosen, rejected = (rounds.answer(row["completions"][i]) for i in (better, worse))
        yield {"prompt": row["messages"], "chosen": chosen, "rejected": rejected}
    yield from [LeftOut("tied pairs")] * ties


def _row(row: Any, number: str) -> Iterator[Row]:
    if isinstance(row, dict) and row.get("prompt") is not None and len(row.get("chosen") or ()) == 1:
        rounds.fit(row, _EXPLICIT)
        prompt = row["prompt"]
        chosen, rejected = (rounds.only_answer(row[name], name) for name in ("chosen", "rejected"))
    else:
        rounds.fit(row, _IMPLICIT)
        prompt, chosen, rejected = rounds.shared_prompt(row["chosen"], row["rejected"])
    yield rounds.comparison(number, map(bare, prompt), [chosen, rejected], [0, 1])


def bare(message: Any) -> Row:
    """The message with only its role and content."""
    return {"role": message["role"], "content": message["content"]}
