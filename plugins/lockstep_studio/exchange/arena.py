"""Chatbot Arena's battles: {"question_id", "model_a", "model_b", "winner", "judge", "conversation_a", "conversation_b", "turn",
"anony", "tstamp"}; written as JSON lines, read from JSON lines or one JSON list.

Source: lm-sys/FastChat, fastchat/serve/monitor/clean_battle_data.py, which writes lmsys/chatbot_arena_conversations. ``winner``
is model_a, model_b, tie or tie (bothbad). model_a stood on the left, so it is the policy shown first. A ranking of K becomes a
battle for each pair, ties included. tie (bothbad) is a tie with ``both_bad`` true.

Not held: which battles came from one ranking, group, ratings, flags, scores, seconds, the instructions' version. Left out: when
writing, rankings of unknown policies; when reading, battles of several turns whose dialogues differ before the last answer, since
no prompt has both answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from lockstep.data.cells import LeftOut
from lockstep.storage.records import NUMBER
from lockstep_studio.exchange import rounds
from lockstep_studio.exchange.rounds import MESSAGE, Row, Written

TAKES = (rounds.COMPARISONS,)

TIE, BOTH_BAD = "tie", "tie (bothbad)"
_SHAPE = {
    "model_a": str, "model_b": str, "winner": re.compile(r"model_a|model_b|tie|tie \(bothbad\)"), "conversation_a": [MESSAGE],
    "conversation_b": [MESSAGE], "question_id?": str, "judge?": str, "tstamp?": NUMBER,
}  # fmt: skip
_RANKS = {"model_a": [0, 1], "model_b": [1, 0], TIE: [0, 0], BOTH_BAD: [0, 0]}


def write(rows: Iterable[Row], file: str | Path) -> Written:
    return rounds.write_lines(rows, file, _lines)


def read(file: str | Path) -> Iterator[Row]:
    return rounds.read(file, _row)


def _lines(row: Row) -> Iterator[Row]:
    policies, ranks = row.get("policies"), row["ranks"]
    if not policies:
        raise LeftOut("rankings of unknown policies")
    dialogues = [[*row["messages"], *rounds.answer(text)] for text in row["completions"]]
    for a, b in combinations(row.get("shown") or range(len(ranks)), 2):
        tie = BOTH_BAD if row.get("both_bad") else TIE
        yield {
            "question_id": row["id"],
            "model_a": policies[a],
            "model_b": policies[b],
            "winner": tie if ranks[a] == ranks[b] else "model_a" if ranks[a] < ranks[b] else "model_b",
            "judge": row.get("labeler"),
            "conversation_a": dialogues[a],
            "conversation_b": dialogues[b],
            "turn": sum(message["role"] == "user" for message in row["messages"]),
            "anony": True,
            "tstamp": row.get("at"),
        }


def _row(row: Any, number: str) -> Iterator[Row]:
    rounds.fit(row, _SHAPE)
    one, other = ([{"role": m["role"], "content": m["content"]} for m in row[f"conversation_{side}"]] for side in "ab")
    prompt, a, b = rounds.shared_prompt(one, other)
    more = {"both_bad": True} if row["winner"] == BOTH_BAD else {}
    yield rounds.comparison(
        row.get("question_id") or number, prompt, [a, b], _RANKS[row["winner"]], labeler=row.get("judge"),
        policies=[row["model_a"], row["model_b"]], shown=[0, 1], at=row.get("tstamp"), **more,
    )  # fmt: skip
