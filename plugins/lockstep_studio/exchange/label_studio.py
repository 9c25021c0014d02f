"""Label Studio's tasks with annotations: one JSON list, with a task for each prompt and an annotation for each labeler.

    {"data": {"id", "messages", "items": [{"id": "1", "title", "body"}, ...], "labelers": [...], "groups": [...]},
     "annotations": [{"result": [{"from_name": "rank", "to_name": "items", "type": "ranker",
                                  "value": {"ranker": {"rank-1": ["2"], "rank-2": ["1", "3"]}}}], "lead_time": seconds, ...}]}

Source: HumanSignal/label-studio, web/libs/editor/src/tags/control/Ranker.jsx and Pairwise.js, and
labelstud.io/guide/task_format. A bucket is a rank, so ties are kept. Import into this labeling interface, with as many buckets as
completions:

    <View><Paragraphs name="dialogue" value="$messages" layout="dialogue" nameKey="role" textKey="content"/>
    <List name="items" value="$items" title="Answers"/>
    <Ranker name="rank" toName="items"><Bucket name="rank-1" title="Best"/><Bucket name="rank-2"/>...</Ranker></View>

`read` also accepts a Ranker without buckets, whose one list goes from best to worst; and a Pairwise, left or right. The two texts
of a Pairwise are those that its ``to_name`` names, or text1 and text2 (as in the template of Label Studio), or answer1 and
answer2. Label Studio does not store a Pairwise without a choice.

``completed_by`` must be a user of the server, so pseudonyms and groups are stored in the data, in the order of the annotations.
They are read back if there are as many of them as annotations.

Not held: ratings, flags, policies, order on the screen, scores, time of day, the instructions' version; ranks are renumbered
without gaps. Cancelled annotations are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.data.cells import BadRow, LeftOut
from lockstep.errors import listing
from lockstep.storage.records import NUMBER
from lockstep_studio.exchange import rounds
from lockstep_studio.exchange.rounds import MESSAGE, Row, Written

TAKES = (rounds.COMPARISONS,)

_ANNOTATION = {"result": [{"type": str, "value": dict}], "was_cancelled?": bool, "lead_time?": NUMBER}
_SHAPE = {"data": dict, "annotations": [_ANNOTATION], "id?": (str, int)}
_ITEMS = [{"id": (str, int), "body?": str, "title?": str}]
_SIDES = (("text1", "text2"), ("answer1", "answer2"))


def write(rows: Iterable[Row], file: str | Path) -> Written:
    """Write an entry for each task. All rows are held in memory, to group them by task."""
    return rounds.write_list(rounds.grouped(rows), file, _task)


def read(file: str | Path) -> Iterator[Row]:
    return rounds.read(file, _rows)


def _task(task: Sequence[Row]) -> Iterator[Row]:
    first = task[0]
    items = [{"id": str(i), "title": f"Answer {i}", "body": text} for i, text in enumerate(first["completions"], 1)]
    who = {f"{key}s": [row.get(key) or "" for row in task] for key in ("labeler", "group")}
    yield {
        "data": {"id": first["id"], "messages": first["messages"], "items": items} | who,
        "annotations": [_annotation(row) for row in task],
    }


def _annotation(row: Row) -> Row:
    buckets: dict[str, list[str]] = {}
    ranks = rounds.ranks_of(row["ranks"])
    for i in sorted(range(len(ranks)), key=lambda i: ranks[i]):
        buckets.setdefault(f"rank-{ranks[i] + 1}", []).append(str(i + 1))
    result = {"from_name": "rank", "to_name": "items", "type": "ranker", "value": {"ranker": buckets}}
    return {"result": [result], "was_cancelled": False, "ground_truth": False, "lead_time": row.get("seconds")}


# ---------------------------------------------------------------------------------------------------------------- read


def _rows(task: Any, number: str) -> Iterator[Row]:
    rounds.fit(task, _SHAPE)
    data, annotations = task["data"], task["annotations"]
    who = [data.get(key) for key in ("labelers", "groups")]
    ours = all(isinstance(names, list) and len(names) == len(annotations) for names in who)
    named = list(zip(*who, strict=True)) if ours else [(_completed_by(each), None) for each in annotations]
    found = 0
    for annotation, (labeler, group) in zip(annotations, named, strict=True):
        judged = None if annotation.get("was_cancelled") else _judged(annotation["result"], data)
        if judged is not None:
            found += 1
            completions, ranks = judged
            yield rounds.comparison(
                str(data.get("id") or task.get("id") or number), _prompt(data), completions, ranks, labeler=labeler or None,
                group=group or None, seconds=annotation.get("lead_time"),
            )  # fmt: skip
    if not found:
        raise LeftOut("tasks without a ranking or a choice of two")


def _completed_by(annotation: Mapping[str, Any]) -> str | None:
    """The number of the user; from newer exports, which have the whole user, the e-mail address if there is one."""
    who = annotation.get("completed_by")
    if isinstance(who, dict):
        who = who.get("email") or who.get("id")
    return None if who is None else str(who)


def _prompt(data: Mapping[str, Any]) -> list[Row]:
    name = next((name for name in ("messages", "prompt", "instruction", "question") if data.get(name)), None)
    if name is None:
        raise BadRow(
            "no prompt", f"none of its data is named messages, prompt, instruction or question. It has: {listing(data)}."
        )
    if isinstance(data[name], str):
        return [{"role": "user", "content": data[name]}]
    rounds.fit(data[name], [MESSAGE])
    return [{"role": m["role"], "content": m["content"]} for m in data[name]]


def _judged(result: Sequence[Row], data: Mapping[str, Any]) -> tuple[list[str], list[int]] | None:
    """(completions, ranks) of an annotation; None if it has neither a Ranker nor a Pairwise."""
    for each in result:
        if each["type"] == "ranker":
            return _ranker(each["value"].get("ranker"), data, each.get("from_name"))
        if each["type"] == "pairwise":
            left, right = _sides(each, data)
            chosen = each["value"].get("selected")
            if chosen not in ("left", "right"):
                raise BadRow("a choice of neither side", "selected should be left or right.")
            return [left, right], [0, 1] if chosen == "left" else [1, 0]
    return None


def _ranker(buckets: Any, data: Mapping[str, Any], tag: Any) -> tuple[list[str], list[int]]:
    """(completions, ranks) from {bucket: ids of items}, or from {tag's name: ids from best to worst}."""
    rounds.fit(buckets, dict)
    rounds.fit(list(buckets.values()), [[(str, int)]])
    items = next((value for value in data.values() if _is_items(value)), None)
    if items is None:
        raise BadRow("no list of items", f"none of its data is a list of {{id, body}}. It has: {listing(data)}.")
    groups = [list(map(str, ids)) for ids in _in_order(buckets, tag)]
    rank = {item: i for i, ids in enumerate(groups) for item in ids}
    names = [str(item["id"]) for item in items]
    if sorted(names) != sorted(item for ids in groups for item in ids):
        raise BadRow("a ranking that is not of all items", f"it ranks {listing(rank)}; the items are {listing(names)}.")
    return [item.get("body") or item.get("title") or "" for item in items], rounds.ranks_of([rank[name] for name in names])


def _is_items(value: Any) -> bool:
    try:
        rounds.fit(value, _ITEMS)
    except BadRow:
        return False
    return bool(value)


def _in_order(buckets: Mapping[str, list[Any]], tag: Any) -> list[list[Any]]:
    """The ids of items in groups that tie, best first. ``tag``: the name of the Ranker."""
    full = {name: ids for name, ids in buckets.items() if ids}
    if len(full) == 1 and ((only := next(iter(full))) == tag or not re.fullmatch(r"\D*\d+", only)):
        return [[item] for item in next(iter(full.values()))]
    places = {name: re.fullmatch(r"\D*(\d{1,4})", name) for name in full}
    if wrong := [name for name, place in places.items() if place is None]:
        raise BadRow(
            "buckets whose order is unknown",
            f"{listing(wrong)}. Name them by their rank in the file: rank-1 (the best), rank-2, ...",
        )
    return [full[name] for name in sorted(full, key=lambda name: int(places[name][1]))]  # type: ignore[index]


def _sides(result: Row, data: Mapping[str, Any]) -> tuple[str, str]:
    named = tuple(str(result.get("to_name") or "").split(","))
    pairs = [pair for pair in (named, *_SIDES) if len(pair) == 2 and all(isinstance(data.get(name), str) for name in pair)]
    if not pairs:
        raise BadRow(
            "two texts that are not found", f"data has no text1 and text2. It has: {listing(data)}. Rename the two texts."
        )
    return data[pairs[0][0]], data[pairs[0][1]]
