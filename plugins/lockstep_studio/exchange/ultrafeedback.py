"""UltraFeedback: {"source", "instruction", "models", "completions": [{"model", "response", "overall_score"}, ...]}, one JSON
line each.

Source: Cui et al. 2023, arXiv 2310.01377, and openbmb/UltraFeedback on the Hugging Face hub, whose completions carry GPT-4's
critiques too. `write` stores a labeler's rating, 1 to 7, as ``overall_score`` and says so in ``source``; only then are scores
read back as ratings. In any case the ranks are those of the scores.

Not held: ranks that the ratings do not imply, id, labeler, group, flags, times; dialogues (the instruction is one user message).
Left out: rankings without a rating of each completion.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lockstep.data.cells import LeftOut
from lockstep.storage.records import NUMBER
from lockstep_studio.exchange import rounds
from lockstep_studio.exchange.rounds import Row, Written

TAKES = (rounds.COMPARISONS,)

SOURCE = "people, rated 1 to 7"
_SHAPE = {
    "instruction": str,
    "completions": [{"response": str, "overall_score?": NUMBER, "model?": str}],
}


def write(rows: Iterable[Row], file: str | Path) -> Written:
    return rounds.write_lines(rows, file, _lines)


def read(file: str | Path) -> Iterator[Row]:
    return rounds.read(file, _row)


def _lines(row: Row) -> Iterator[Row]:
    if [message["role"] for message in row["messages"]] != ["user"]:
        raise LeftOut("dialogues of more than one message")
    if not row.get("ratings") or None in row["ratings"]:
        raise LeftOut("rankings without a rating of each completion")
    models = row.get("policies") or [None] * len(row["completions"])
    rated = zip(models, row["completions"], row["ratings"], strict=True)
    yield {
        "source": SOURCE,
        "instruction": row["messages"][0]["content"],
        "models": models,
        "completions": [{"model": model, "response": text, "overall_score": float(rating)} for model, text, rating in rated],
    }


def _row(row: Any, number: str) -> Iterator[Row]:
    rounds.fit(row, _SHAPE)
    completions = row["completions"]
    if len(completions) < 2:
        raise LeftOut("instructions with fewer than two completions")
    scores = [each.get("overall_score") for each in completions]
    if not all(map(rounds.finite, scores)):
        raise LeftOut("instructions with a completion without a score")
    models = [each.get("model") for each in completions]
    yield rounds.comparison(
        number,
        [{"role": "user", "content": row["instruction"]}],
        [each["response"] for each in completions],
        rounds.ranks_of([-score for score in scores]),
        ratings=[int(score) for score in scores] if row.get("source") == SOURCE else None,
        policies=None if None in models else models,
    )
