"""Labels in files, a JSON object per line:

    candidates.jsonl    {"id", "messages", "completions", "policies", "scores", "truth"}   responses that wait for labelers
    labels.jsonl        {"id", "ranks", "labeler", "group"}                                what labelers think of them
    comparisons.jsonl   {"messages", "completions", "ranks", "labeler", "group", "truth"}  both together: data to train on
    demonstrations.jsonl {"messages", "response"}                                          what people wrote
    prompts.jsonl       {"messages", "goal", "twin", "split", "success", "truth"}          attacks, and their harmless twins

Rows with messages may also have "tools", candidates a "seed", and comparisons "adjudicated". Other keys are allowed and not read
here. A folder with any of the last three files is a source of data for a stage.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lockstep.errors import DataError, MissingData
from lockstep.interfaces import Label
from lockstep.storage.records import NUMBER, mismatch
from lockstep.types import Candidates, Comparison, Demonstration, Message, Prompt, ToolCall

T = TypeVar("T")

CANDIDATES, LABELS, COMPARISONS, DEMONSTRATIONS, PROMPTS = (
    f"{noun}.jsonl" for noun in ("candidates", "labels", "comparisons", "demonstrations", "prompts")
)
MOST_BYTES = 50_000_000
"""The limit for one line."""

_MESSAGE = {"role": str, "content": str, "calls?": [{"name": str, "arguments": dict}]}
_PROMPT = {"messages": [_MESSAGE], "truth?": (dict, None), "tools?": ([dict], None)}
_ROWS: Mapping[str, Any] = {
    CANDIDATES: {"id": str, "completions": [str], "policies?": ([str], None), "scores?": ([NUMBER], None)} | _PROMPT,
    LABELS: {"id": str, "ranks": [int], "labeler": str, "group?": (str, None)},
    COMPARISONS: {"completions": [str], "ranks": [int], "labeler?": (str, None), "group?": (str, None)} | _PROMPT,
    DEMONSTRATIONS: {"response": str} | _PROMPT,
    PROMPTS: {
        "goal?": (str, None),
        "twin?": (bool, None),
        "split?": (str, None),
        "success?": (NUMBER, None),
        "attacker?": (str, None),
    }
    | _PROMPT,
}
_ROLES = ("system", "user", "assistant", "tool")


def candidates_in(file: Path) -> list[Candidates]:
    """
    Raises:
      DataError: a row of the file is damaged.
    """

    def candidates(row: Mapping[str, Any]) -> Candidates:
        texts, policies, scores = (tuple(row.get(key) or ()) for key in ("completions", "policies", "scores"))
        if len(texts) < 2 or any(found and len(found) != len(texts) for found in (policies, scores)):
            raise ValueError("it needs two or more completions, and as many policies and scores as completions")
        return Candidates(row["id"], _prompt(row), texts, policies, scores, row.get("seed"))

    return list(_read(file, candidates))


def labels_in(file: Path, candidates: Sequence[Candidates]) -> list[Label]:
    """
    Raises:
      DataError: a row of the file is damaged, or does not fit the candidates.
    """
    counts = {each.id: len(each.completions) for each in candidates}

    def label(row: Mapping[str, Any]) -> Label:
        if (count := counts.get(row["id"])) is None:
            raise ValueError(f"its id {row['id']!r} is none of the {len(counts)} in {CANDIDATES}")
        if len(row["ranks"]) != count:
            raise ValueError(f"it has {len(row['ranks'])} ranks for {count} completions")
        return Label(row["id"], tuple(row["ranks"]), row["labeler"], row.get("group"))

    return list(_read(file, label))


def comparisons_in(folder: Path) -> list[Comparison]:
    """The comparisons of a folder. Where a task was adjudicated, only the adjudicator counts.

    Raises:
      MissingData: the folder has no comparisons.
      DataError: its file is damaged.
    """

    def comparison(row: Mapping[str, Any]) -> tuple[Comparison, bool]:
        ranked = tuple(row["completions"]), tuple(row["ranks"])
        return Comparison(_prompt(row), *ranked, row.get("labeler"), row.get("group")), row.get("adjudicated") is True

    found = list(_read(_in(folder, COMPARISONS), comparison))
    settled = {(each.prompt.messages, each.completions) for each, adjudicated in found if adjudicated}
    return [each for each, adjudicated in found if adjudicated or (each.prompt.messages, each.completions) not in settled]


def demonstrations_in(folder: Path) -> list[Demonstration]:
    """
    Raises:
      MissingData: the folder has no demonstrations.
      DataError: its file is damaged.
    """
    return list(_read(_in(folder, DEMONSTRATIONS), lambda row: Demonstration(_prompt(row), row["response"])))


def prompts_in(folder: Path, split: str = "train", *, twins: bool | None = None) -> list[Prompt]:
    """The prompts of one split: only twins if ``twins`` is True, only attacks if False. ``truth["goal"]`` is the goal of an
    attack, and ``truth["twin"]`` is True if that is the harmless goal.

    Raises:
      MissingData: the folder has no prompts.
      DataError: its file is damaged.
    """

    def prompt(row: Mapping[str, Any]) -> tuple[Prompt, bool]:
        found, goal = _prompt(row), row.get("goal")
        if goal is not None:
            found = dataclasses.replace(found, truth={**found.truth, "goal": goal, "twin": bool(row.get("twin"))})
        return found, (row.get("split") or "train") == split and twins in (None, bool(row.get("twin")))

    return [found for found, taken in _read(_in(folder, PROMPTS), prompt) if taken]


def prompt_line(prompt: Prompt, **facts: Any) -> str:
    return _line(_prompt_row(prompt) | facts)


def demonstration_line(each: Demonstration) -> str:
    return _line(_prompt_row(each.prompt) | {"response": each.response})


def candidates_line(each: Candidates) -> str:
    facts = {"completions": each.completions, "policies": each.policies or None, "scores": each.scores or None, "seed": each.seed}
    return _line({"id": each.id} | _prompt_row(each.prompt) | facts)


def comparison_line(comparison: Comparison) -> str:
    row = {key: getattr(comparison, key) for key in ("completions", "ranks", "labeler", "group")}
    return _line(_prompt_row(comparison.prompt) | row)


def _prompt_row(prompt: Prompt) -> dict[str, Any]:
    messages = [
        {"role": m.role, "content": m.content} | ({"calls": [dataclasses.asdict(c) for c in m.calls]} if m.calls else {})
        for m in prompt.messages
    ]
    return {"messages": messages, "truth": dict(prompt.truth) or None, "tools": list(prompt.tools) or None}


def _line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON. Dates and the like, which a data set's columns may have, become text."""
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def _prompt(row: Mapping[str, Any]) -> Prompt:
    messages = [Message(m["role"], m["content"], tuple(ToolCall(**call) for call in m.get("calls", ()))) for m in row["messages"]]
    if wrong := next((m.role for m in messages if m.role not in _ROLES), None):
        raise ValueError(f"a message has the role {wrong!r}, which is none of {', '.join(_ROLES)}")
    if not messages or messages[-1].role == "assistant":
        raise ValueError("its messages should end before the assistant's turn")
    return Prompt(tuple(messages), row.get("truth") or {}, tuple(row.get("tools") or ()))


def _in(folder: Path, name: str) -> Path:
    if not (file := folder / name).is_file():
        noun = name.removesuffix(".jsonl")
        raise MissingData(
            f"{folder} has no {name}, so it is no source of {noun}. A stage that collects or attacks, or a closed round, has one."
        )
    return file


def _read(file: Path, item: Callable[[Mapping[str, Any]], T]) -> Iterator[T]:
    """Each row of a file as an item."""
    shape = _ROWS[file.name]
    with open(file, "rb") as lines:
        number = 0
        while line := lines.readline(MOST_BYTES):
            number += 1
            try:
                row = json.loads(line.decode())
                if problem := mismatch(row, shape):
                    raise ValueError(problem)
                yield item(row)
            except (ValueError, TypeError, RecursionError) as error:
                raise DataError(f"{file}, line {number}: {error}. A row of {file.name} has {', '.join(shape)}.") from error
