"""TRL's unpaired preference columns, conversational: {"prompt": [messages], "completion": [message], "label": bool}, one JSON
line each.

Source: huggingface/trl, docs/source/dataset_formats.md, "Unpaired preference" (KTO's). The thumb on a turn of a conversation
is its label. Of a comparison, the best completions are labelled true and the worst false. Those in between are left out, as are
rankings in which all tie. For pairs this is what TRL's ``unpair_preference_dataset`` makes. Each line is read back as a
conversation with a thumb on its last turn.

Not held: feedback other than thumbs (likert, text), attacks, which completions were compared, id, labeler, group, ratings, flags,
policies, times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lockstep.data.cells import BadRow, LeftOut
from lockstep_studio.exchange import rounds
from lockstep_studio.exchange.rounds import MESSAGE, Row, Written

TAKES = (rounds.CONVERSATIONS, rounds.COMPARISONS)

_SHAPE = {"prompt": [MESSAGE], "completion": [MESSAGE], "label": bool}


def write(rows: Iterable[Row], file: str | Path) -> Written:
    return rounds.write_lines(rows, file, _lines)


def read(file: str | Path) -> Iterator[Row]:
    return rounds.read(file, _row)


def _lines(row: Row) -> Iterator[Row | LeftOut]:
    if rounds.noun_of(row) == rounds.CONVERSATIONS:
        yield from _of_conversation(row)
        return
    best, worst = min(row["ranks"]), max(row["ranks"])
    if best == worst:
        raise LeftOut("rankings that tie all")
    for completion, rank in zip(row["completions"], row["ranks"], strict=True):
        if rank in (best, worst):
            yield _line(row["messages"], completion, rank == best)
        else:
            yield LeftOut("completions that are neither best nor worst")


def _of_conversation(row: Row) -> Iterator[Row | LeftOut]:
    unfinished = row.get("stopped") or ()
    thumbs = [each for each in row.get("feedback") or () if each.get("thumb") and each["turn"] not in unfinished]
    if not thumbs:
        raise LeftOut("conversations without a thumb")
    messages = row["messages"]
    answers = dict(enumerate(rounds.answers(messages)))
    for each in thumbs:
        place = answers.get(each["turn"], 0)
        if place == 0:  # no such answer, or nothing was asked before it
            yield LeftOut("thumbs that are on no answer")
            continue
        yield _line(messages[:place], messages[place]["content"], each["thumb"] > 0)


def _line(prompt: list[Row], completion: str, label: bool) -> Row:
    return {"prompt": prompt, "completion": rounds.answer(completion), "label": label}


def _row(row: Any, number: str) -> Iterator[Row]:
    rounds.fit(row, _SHAPE)
    if not row["prompt"]:
        raise BadRow("a row of another form", "prompt is empty.")
    messages = [{"role": m["role"], "content": m["content"]} for m in row["prompt"]]
    messages += rounds.answer(rounds.only_answer(row["completion"], "completion"))
    feedback = {"turn": len(rounds.answers(messages)) - 1, "thumb": 1 if row["label"] else -1, "likert": None, "text": None}
    yield {
        "id": number, "messages": messages, "labeler": None, "group": None, "policy": None, "seeds": None, "feedback": [feedback],
        "attack": None,
    }  # fmt: skip
