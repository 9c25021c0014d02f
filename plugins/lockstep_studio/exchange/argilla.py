"""Argilla's records with a ranking question: one JSON list, with a record for each task and a response for each labeler.

    {"id", "fields": {"prompt": [messages], "completion-1": text, ...},
     "responses": {"ranking": [{"value": ["completion-2", "completion-1"], "user_id"}], "rating-1": [...], "flags-1": [...]},
     "metadata": {"labelers", "groups", "ranks"}, "suggestions": {}, "vectors": {}, "_server_id": null}

Source: argilla-io/argilla, argilla/src/argilla/records/_resource.py (``Record.to_dict``) and _io/_json.py:
``records.to_json`` writes this form and ``records.from_json`` reads it. The data set in Argilla needs a chat field 'prompt', a
text field for each completion, and a ranking question 'ranking' whose values are the completions' names. ``user_id`` has to be a
UUID, so one is made from the pseudonym.

The SDK writes a ranking as names from best to worst, without ties; the server's own form, [{"value", "rank"}, ...], has ties.
Both are read. To keep ties, pseudonyms and groups, `write` also stores them as metadata, in the order of the responses. `read`
uses them if they fit the responses.

Not held: policies, order on the screen, scores, times, the instructions' version, flags of somebody who set none. Files from
elsewhere are read if each option of the ranking is the name of a field, and the prompt is the only other field or is named
'prompt'. Suggestions are not labels, so they are not read.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.data.cells import BadRow, LeftOut
from lockstep.errors import listing
from lockstep_studio.exchange import rounds
from lockstep_studio.exchange.rounds import MESSAGE, Row, Written

TAKES = (rounds.COMPARISONS,)

_RESPONSE = {"user_id?": str, "status?": str}
_SHAPE = {"fields": dict, "responses?": dict, "metadata?": dict, "id?": (str, int)}
_RANKING = [_RESPONSE | {"value": ([str], [{"value": str, "rank": int}])}]
_NAMESPACE = uuid.UUID("5b1d9f4e-6a57-5c0b-9d5e-0a6f2f6a3c11")


def write(rows: Iterable[Row], file: str | Path) -> Written:
    """Write a record for each task. All rows are held in memory, to group them by task."""
    return rounds.write_list(rounds.grouped(rows), file, _record)


def read(file: str | Path) -> Iterator[Row]:
    return rounds.read(file, _rows)


def user_id(labeler: str | None) -> str:
    """The pseudonym if it is a UUID, else a UUID made from it."""
    try:
        return str(uuid.UUID(labeler or ""))
    except ValueError:
        return str(uuid.uuid5(_NAMESPACE, labeler or ""))


# ------------------------------------------------------------------------------------------------------------- written


def _record(task: Sequence[Row]) -> Iterator[Row]:
    first = task[0]
    names = [f"completion-{i + 1}" for i in range(len(first["completions"]))]
    responses: dict[str, list[Row]] = {"ranking": []}
    for row in task:
        who = user_id(row.get("labeler"))
        best_first = sorted(range(len(names)), key=lambda i: row["ranks"][i])
        responses["ranking"].append({"value": [names[i] for i in best_first], "user_id": who})
        for i, rating in enumerate(row.get("ratings") or ()):
            if rating is not None:
                responses.setdefault(f"rating-{i + 1}", []).append({"value": rating, "user_id": who})
        for i, flags in enumerate(row.get("flags") or ()):
            if flags:
                responses.setdefault(f"flags-{i + 1}", []).append({"value": flags, "user_id": who})
    yield {
        "id": first["id"],
        "fields": {"prompt": first["messages"]} | dict(zip(names, first["completions"], strict=True)),
        "metadata": {
            "labelers": [row.get("labeler") or "" for row in task],
            "groups": [row.get("group") or "" for row in task],
            "ranks": [" ".join(map(str, row["ranks"])) for row in task],
        },
        "suggestions": {},
        "responses": responses,
        "vectors": {},
        "_server_id": None,
    }


# ---------------------------------------------------------------------------------------------------------------- read


def _rows(record: Any, number: str) -> Iterator[Row]:
    rounds.fit(record, _SHAPE)
    responses, fields = record.get("responses") or {}, record["fields"]
    question = (
        "ranking"
        if "ranking" in responses
        else next((name for name in responses if _ranks_fields(responses[name], fields)), None)
    )
    if question is None or not responses[question]:
        raise LeftOut("records without a response to a ranking question")
    rounds.fit(responses[question], _RANKING)
    given = [each for each in responses[question] if each.get("status") in (None, "submitted")]
    if not given:
        raise LeftOut("records without a submitted response")
    names = _options(given, fields)
    prompt, completions = _prompt(fields, names), [fields[name] for name in names]
    known = _metadata(record.get("metadata") or {}, given, names)
    for response, (labeler, group, ranks) in zip(given, known, strict=True):
        who = response.get("user_id")
        yield rounds.comparison(
            str(record.get("id") or number), prompt, completions, ranks, labeler=labeler, group=group,
            ratings=_answers(responses, "rating", who, names, None), flags=_answers(responses, "flags", who, names, []),
        )  # fmt: skip


def _ranks_fields(given: Any, fields: Mapping[str, Any]) -> bool:
    try:
        rounds.fit(given, _RANKING)
    except BadRow:
        return False
    return all(len(each["value"]) > 1 and {_name(option) for option in each["value"]} <= fields.keys() for each in given)


def _name(option: Any) -> str:
    return str(option if isinstance(option, str) else option["value"])


def _options(given: Sequence[Row], fields: Mapping[str, Any]) -> list[str]:
    """The options of a ranking, in the order of the fields."""
    ranked = {_name(option) for option in given[0]["value"]}
    if wrong := sorted(ranked - fields.keys()):
        raise BadRow("a ranking of what is no field", f"{listing(wrong)}; the fields are {listing(fields)}.")
    if any(sorted(map(_name, each["value"])) != sorted(ranked) for each in given):
        raise BadRow("rankings of different options", f"each response should rank {listing(ranked)}, and each once.")
    names = [name for name in fields if name in ranked]
    rounds.fit([fields[name] for name in names], [str])
    return names


def _prompt(fields: Mapping[str, Any], names: Sequence[str]) -> list[Row]:
    """The messages of the prompt: those of a chat field, or one user message from a text field."""
    others = [name for name in fields if name not in names]
    name = "prompt" if "prompt" in others else others[0] if len(others) == 1 else None
    if name is None:
        raise BadRow(
            "no prompt", f"no field is named 'prompt', and there are {len(others)} besides the options: {listing(others)}."
        )
    if isinstance(fields[name], str):
        return [{"role": "user", "content": fields[name]}]
    rounds.fit(fields[name], [MESSAGE])
    return [{"role": m["role"], "content": m["content"]} for m in fields[name]]


Known = tuple[str | None, str | None, list[int]]


def _metadata(metadata: Mapping[str, Any], given: Sequence[Row], names: Sequence[str]) -> list[Known]:
    """(labeler, group, ranks) of each response: from the metadata of `write` if it fits the response, else from the response."""
    labelers, groups, ranks = (metadata.get(key) for key in ("labelers", "groups", "ranks"))
    found: list[Known] = []
    for i, each in enumerate(given):
        who, order = each.get("user_id"), _ranks(each["value"], names)
        kept = [
            values[i] if isinstance(values, list) and len(values) == len(given) else None for values in (labelers, groups, ranks)
        ]
        found.append(_believed(kept, who, order) or (who, None, order))
    return found


def _believed(kept: Sequence[Any], who: str | None, order: list[int]) -> Known | None:
    """The metadata of a response; None if it belongs to another response."""
    labeler, group, text = kept
    if not all(isinstance(each, str) for each in kept) or who != user_id(labeler):
        return None
    ranks = [int(rank) for rank in text.split() if rank.isdecimal() and len(rank) < 10]
    return (labeler or None, group or None, ranks) if _orders(ranks, order) else None


def _orders(ranks: Sequence[int], order: Sequence[int]) -> bool:
    """True if the ranks, which may have ties, do not contradict the order."""
    by_order = [rank for _, rank in sorted(zip(order, ranks, strict=False))]
    return len(ranks) == len(order) and by_order == sorted(ranks)


def _ranks(value: Sequence[Any], names: Sequence[str]) -> list[int]:
    """Ranks from names, best to worst, or from the server's {"value", "rank"}."""
    place = {_name(option): i if isinstance(option, str) else option["rank"] for i, option in enumerate(value)}
    return rounds.ranks_of([place[name] for name in names])


def _answers(responses: Mapping[str, Any], kind: str, who: str | None, names: Sequence[str], none: Any) -> list[Any] | None:
    """The answers of user ``who`` to 'rating-1', 'rating-2', ... (or another ``kind``); None if there are none."""
    found = []
    for i in range(len(names)):
        given = responses.get(f"{kind}-{i + 1}") or []
        rounds.fit(given, [_RESPONSE | {"value": int if none is None else [str]}])
        found.append(next((each["value"] for each in given if each.get("user_id") == who), none))
    return found if any(found) else None
