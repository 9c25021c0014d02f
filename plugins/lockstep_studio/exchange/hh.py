"""Anthropic's hh-rlhf: {"chosen": transcript, "rejected": transcript}, one JSON line each (.jsonl; to read, also .jsonl.gz).

Source: Bai et al. 2022, arXiv 2204.05862, and Anthropic/hh-rlhf on the Hugging Face hub. A transcript is a whole dialogue,
'\\n\\nHuman: ...\\n\\nAssistant: ...'; the two on a line agree up to the last answer. A ranking of K becomes a line for each
pair that does not tie.

Not held: ties, which pairs came from one ranking, white space around a turn, id, labeler, group, ratings, flags, policies,
times. Left out: dialogues with a system's or a tool's message, with an empty turn, or with a turn's mark in a text, since they
would be read back as another dialogue.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lockstep.data.cells import LeftOut
from lockstep_studio.exchange import rounds
from lockstep_studio.exchange.rounds import Message, Row, Written

TAKES = (rounds.COMPARISONS,)

_SHAPE = {"chosen": str, "rejected": str}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_NAMES = {"user": "Human", "assistant": "Assistant"}
_ROLES = {name: role for role, name in _NAMES.items()}


def write(rows: Iterable[Row], file: str | Path) -> Written:
    return rounds.write_lines(rows, file, _lines)


def read(file: str | Path) -> Iterator[Row]:
    return rounds.read(file, _row)


def _lines(row: Row) -> Iterator[Row | LeftOut]:
    pairs, ties = rounds.better_pairs(row["ranks"])
    texts = [transcript([*row["messages"], *rounds.answer(text)]) for text in row["completions"]]
    for better, worse in pairs:
        yield {"chosen": texts[better], "rejected": texts[worse]}
    yield from [LeftOut("tied pairs")] * ties


def _row(row: Any, number: str) -> Iterator[Row]:
    rounds.fit(row, _SHAPE)
    prompt, chosen, rejected = rounds.shared_prompt(messages(row["chosen"]), messages(row["rejected"]))
    yield rounds.comparison(number, prompt, [chosen, rejected], [0, 1])


def transcript(dialogue: Iterable[Message]) -> str:
    """A dialogue as a transcript.

    Raises:
      LeftOut: the transcript would be read back as another dialogue.
    """
    turns = [(message["role"], message["content"].strip()) for message in dialogue]
    if any(role not in _NAMES for role, _ in turns):
        raise LeftOut("dialogues with a system's or a tool's message")
    if any(not text for _, text in turns):
        raise LeftOut("dialogues with an empty turn")
    if any(_TURN.search(text) for _, text in turns):
        raise LeftOut("dialogues whose text has a turn's mark in it")
    return "".join(f"\n\n{_NAMES[role]}: {text}" for role, text in turns)


def messages(text: str) -> list[Row]:
    """The messages of a transcript.

    Raises:
      LeftOut: the transcript is broken.
    """
    before, *parts = _TURN.split(text.strip())
    if before or not parts:
        raise LeftOut("texts that are no transcripts")
    turns = [(_ROLES[name], content.strip()) for name, content in zip(parts[::2], parts[1::2], strict=True)]
    if not all(content for _, content in turns):
        raise LeftOut("dialogues with an empty turn")
    return [{"role": role, "content": content} for role, content in turns]
