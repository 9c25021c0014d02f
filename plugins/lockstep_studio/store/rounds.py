"""Closing a round: the labels and conversations since the last round become files that never change.

    rounds/<name>/comparisons.jsonl demonstrations.jsonl conversations.jsonl round.json
    <stage>/labels.jsonl, beside the candidates.jsonl of each stage that waits for labels

First, one transaction decides which rows belong to the round and closes their tasks. Then the files are written from those rows
alone. If the process dies in between, the next start finishes the round, with the same files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lockstep.data.labels import LABELS
from lockstep.errors import DataError
from lockstep.storage.files import checksum, dump_line, move_folder, read_object, write_json, write_text
from lockstep.storage.names import checked_name
from lockstep_studio.exchange.rounds import answers
from lockstep_studio.store import conversations, tasks
from lockstep_studio.store.database import Connection, Database, Row
from lockstep_studio.store.people import Refused

FILES = ("comparisons.jsonl", "demonstrations.jsonl", "conversations.jsonl")
"""The files of a round, in the order in which one hash covers all three."""
LIKED = 6
"""The least rating, of 7, with which an answer in a chat becomes a demonstration."""
JUDGED = ("compare", "rank", "attack", "adjudicate")

_ELIGIBLE = """
FROM labels JOIN leases ON leases.id = labels.lease JOIN tasks ON tasks.id = labels.task JOIN people ON people.id = labels.person
WHERE labels.content IS NOT NULL AND tasks.gold IS NULL AND tasks.messages != '[]' AND people.standing = 'active'
AND labels.revision = (SELECT max(revision) FROM labels AS later WHERE later.lease = labels.lease)
AND NOT EXISTS (SELECT 1 FROM members WHERE kind = 'label' AND members.id = labels.id)
"""
_DECIDED = "SELECT 1 FROM findings WHERE decision = 'release' AND kind"
_RELEASED = f"""
AND (labels.mode != 'write' OR EXISTS ({_DECIDED} = 'label' AND findings.id = labels.id))
AND (tasks.author IS NULL OR tasks.asked IS NOT NULL OR tasks.against IS NOT NULL
  OR EXISTS ({_DECIDED} = 'task' AND findings.id = tasks.id))
AND (tasks.against IS NULL OR EXISTS ({_DECIDED} = 'label' AND findings.id = tasks.against))
AND NOT EXISTS (SELECT 1 FROM messages AS asked JOIN messages AS said ON said.conversation = asked.conversation
  WHERE asked.id = tasks.asked AND said.id <= asked.id AND said.role = 'user'
  AND NOT EXISTS ({_DECIDED} = 'message' AND findings.id = said.id))
"""
"""The condition that everything people wrote in a label or its task, in any mode, is released: nothing waits for the operator or
is withheld."""
_TALKS = """
FROM conversations JOIN people ON people.id = conversations.person
WHERE people.standing = 'active' AND (conversations.mode != 'attack' OR finished IS NOT NULL)
AND NOT EXISTS (SELECT 1 FROM members WHERE kind = 'conversation' AND members.id = conversations.id)
AND EXISTS (SELECT 1 FROM messages WHERE conversation = conversations.id AND role = 'assistant' AND state IN ('done', 'stopped'))
"""
_ALL_RELEASED = f"""
AND (goal IS NULL OR EXISTS ({_DECIDED} = 'conversation' AND findings.id = conversations.id))
AND (conversations.mode != 'chat' OR ifnull(json_extract(how, '$.system'), '') = ''
  OR EXISTS ({_DECIDED} = 'system' AND findings.id = conversations.id))
AND NOT EXISTS (SELECT 1 FROM messages WHERE conversation = conversations.id AND role = 'user'
  AND NOT EXISTS ({_DECIDED} = 'message' AND findings.id = messages.id))
AND NOT EXISTS (SELECT 1 FROM feedback JOIN messages ON messages.id = feedback.message WHERE conversation = conversations.id
  AND feedback.text IS NOT NULL AND NOT EXISTS ({_DECIDED} = 'feedback' AND findings.id = feedback.id))
"""


def waiting(connection: Connection) -> dict[str, int]:
    """What the next round would hold, and how many rows are held back because text in them is not released."""
    count = lambda sql: int(connection.execute("SELECT count(*) " + sql).fetchone()[0])  # noqa: E731
    everything = count(_ELIGIBLE) + count(_TALKS)
    free = {
        "comparisons": count(_ELIGIBLE + "AND labels.mode != 'write'" + _RELEASED),
        "demonstrations": count(_ELIGIBLE + "AND labels.mode = 'write'" + _RELEASED),
        "conversations": count(_TALKS + _ALL_RELEASED),
    }
    return {**free, "held_back": everything - sum(free.values())}


def close(database: Database, folder: Path, name: str, now: float) -> dict[str, Any]:
    """Close a round and write its files. Run `scan` and `remember` of `privacy` first. Returns the round's record.

    Raises:
      ConfigError: the name cannot be that of a folder.
      Refused: the round or its folder exists already, or the round would be empty.
    """
    checked_name("The name of the round", name)
    if (there := folder / "rounds" / name).exists():
        raise Refused(f"{there} exists already, from before this database. A closed round does not change; choose another name.")
    database.now(_begin, name, now)
    return finish(database, folder, name)


def finish_all(database: Database, folder: Path) -> None:
    """Write the files of rounds that the process was closing when it died."""
    for row in database.reader.execute("SELECT name FROM rounds WHERE state = 'closing' ORDER BY id").fetchall():
        finish(database, folder, row["name"])


def finish(database: Database, folder: Path, name: str) -> dict[str, Any]:
    row = database.reader.execute("SELECT * FROM rounds WHERE name = ?", (name,)).fetchone()
    record = _write(database.reader, folder / "rounds" / name, row)
    database.now(_end, row["id"], record)
    return record


def verify(folder: Path, name: str) -> None:
    """Check the files of a closed round against their hashes.

    Raises:
      DataError: a file is missing, or has changed since the round was closed.
    """
    round_folder = folder / "rounds" / name
    record = read_object(round_folder / "round.json")
    for file in FILES:
        if not (round_folder / file).is_file() or checksum(round_folder / file) != record["files"][file]["sha256"]:
            raise DataError(
                f"{round_folder / file} is missing or was changed after the round was closed. Restore it from a copy."
            )


# --------------------------------------------------------------------------------------------------------- deciding


def _begin(connection: Connection, name: str, now: float) -> None:
    if connection.execute("SELECT 1 FROM rounds WHERE name = ?", (name,)).fetchone():
        raise Refused(f"There is a round named {name!r} already. A closed round does not change; choose another name.")
    (number,) = connection.execute(
        "INSERT INTO rounds (name, state, at, last_label, last_message, last_feedback) VALUES (?, 'closing', ?, "
        "(SELECT ifnull(max(id), 0) FROM labels), (SELECT ifnull(max(id), 0) FROM messages), "
        "(SELECT ifnull(max(id), 0) FROM feedback)) RETURNING id",
        (name, now),
    ).fetchone()
    found = 0
    for kind, sql in {
        "label": "SELECT labels.id " + _ELIGIBLE + _RELEASED, "conversation": "SELECT conversations.id " + _TALKS + _ALL_RELEASED
    }.items():  # fmt: skip
        ids = [row[0] for row in connection.execute(sql).fetchall()]
        connection.executemany("INSERT INTO members VALUES (?, ?, ?)", [(kind, each, number) for each in ids])
        found += len(ids)
    if not found:
        raise Refused("Nothing was labelled since the last round, so there is nothing to close.")
    _close_tasks(connection, number, now)


def _close_tasks(connection: Connection, number: int, now: float) -> None:
    """Stop handing out tasks of the sources that were judged in the round."""
    connection.execute(
        "UPDATE sources SET round = ? WHERE round IS NULL AND id IN "
        "(SELECT source FROM members JOIN labels ON labels.id = members.id JOIN tasks ON tasks.id = labels.task "
        "WHERE members.round = ? AND kind = 'label' AND labels.mode != 'write')",
        (number, number),
    )
    for row in connection.execute("SELECT id FROM sources WHERE round = ?", (number,)).fetchall():
        tasks.close_source(connection, row["id"], now)


def _end(connection: Connection, number: int, record: dict[str, Any]) -> None:
    connection.execute("UPDATE rounds SET state = 'closed', record = ? WHERE id = ?", (json.dumps(record), number))


# ---------------------------------------------------------------------------------------------------------- writing


def _write(connection: Connection, folder: Path, row: Row) -> dict[str, Any]:
    if (folder / "round.json").is_file():  # written, but the process died before the database recorded it
        return read_object(folder / "round.json")
    labels, talks = _labels(connection, row["id"]), list(_conversations(connection, row))
    several = len({each["source"] for each in labels} - {None}) > 1  # and each run counts its candidates from 0
    named = [each | {"key": _named(each)} for each in labels] if several else labels
    written = [_demonstration(each) for each in named if each["mode"] == "write"]
    contents = {
        "comparisons.jsonl": [_comparison(each) for each in named if each["mode"] in JUDGED],
        "demonstrations.jsonl": [*written, *(liked for talk in talks for liked in _liked(talk))],
        "conversations.jsonl": talks,
    }
    part = folder.with_name(f".{folder.name}.part")
    part.mkdir(parents=True, exist_ok=True)
    total, files = hashlib.sha256(), {}
    for file in FILES:
        text = "".join(map(dump_line, contents[file]))
        total.update(text.encode())
        write_text(part / file, text)
        files[file] = {"sha256": checksum(part / file), "rows": len(contents[file])}
    record = {
        "name": row["name"], "sha256": total.hexdigest(), "files": files,
        "counts": {file.removesuffix(".jsonl"): each["rows"] for file, each in files.items()},
        "labelers": _labelers(labels), "instructions": _instructions(connection, labels), "closed": row["at"],
        "first": min((each["at"] for each in labels), default=None), "last": max((each["at"] for each in labels), default=None),
        "sources": _write_labels(connection, row["id"], labels),
    }  # fmt: skip
    write_json(part / "round.json", record)
    for file in (*FILES, "round.json"):
        (part / file).chmod(0o444)
    move_folder(part, folder)
    return record


_WITH_TASK = (
    "SELECT labels.*, pseudonym, shown, probability, source, key, messages, completions, policies, scores, tasks.seed, "
    "tasks.mode AS judged "
)


def _labels(connection: Connection, number: int) -> list[dict[str, Any]]:
    """The round's labels, each with its task and its labeler."""
    sql = (
        "FROM members JOIN labels ON labels.id = members.id JOIN leases ON leases.id = labels.lease "
        "JOIN tasks ON tasks.id = labels.task JOIN people ON people.id = labels.person "
        "WHERE members.round = ? AND kind = 'label' AND labels.content IS NOT NULL AND tasks.messages != '[]' ORDER BY labels.id"
    )
    return [_parsed(row) for row in connection.execute(_WITH_TASK + sql, (number,))]


def _parsed(row: Row) -> dict[str, Any]:
    each = dict(row)
    for key in ("content", "shown", "messages", "completions", "policies", "scores"):
        each[key] = None if each[key] is None else json.loads(each[key])
    return each


def pending(connection: Connection) -> list[dict[str, Any]]:
    """The comparisons that the next round would hold, for display. Ids begin with the source's number."""
    rows = connection.execute(_WITH_TASK + _ELIGIBLE + _RELEASED + "AND labels.mode != 'write' ORDER BY labels.id")
    return [{**_comparison(each), "id": _named(each)} for each in map(_parsed, rows)]


def _named(label: dict[str, Any]) -> str:
    """The task's id among those of all sources."""
    return f"{label['source']}:{label['key']}"


def _comparison(label: dict[str, Any]) -> dict[str, Any]:
    content = label["content"]
    return {
        "id": label["key"], "messages": label["messages"], "completions": label["completions"], "ranks": content["ranks"],
        "labeler": label["pseudonym"], "group": label["grp"], "ratings": content.get("ratings"), "flags": content.get("flags"),
        "policies": label["policies"], "shown": label["shown"], "scores": label["scores"], "seed": label["seed"],
        "seconds": label["seconds"], "at": label["at"], "instructions": label["instructions"], "revision": label["revision"],
        "mode": label["judged"], "adjudicated": label["mode"] == "adjudicate", "both_bad": content.get("both_bad", False),
        "blind": content.get("blind", True), "probability": label["probability"],
    }  # fmt: skip


def _demonstration(label: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": label["key"], "messages": label["messages"], "response": label["content"]["response"],
        "labeler": label["pseudonym"], "group": label["grp"], "at": label["at"], "seconds": label["seconds"],
        "instructions": label["instructions"], "revision": label["revision"], "mode": "write",
        "mended": label["content"].get("mended"),
    }  # fmt: skip


def _conversations(connection: Connection, round_row: Row) -> Iterator[dict[str, Any]]:
    rows = connection.execute(
        "SELECT conversations.*, pseudonym FROM members JOIN conversations ON conversations.id = members.id "
        "JOIN people ON people.id = conversations.person WHERE members.round = ? AND kind = 'conversation' ORDER BY members.id",
        (round_row["id"],),
    )
    for row in rows.fetchall():
        said = [
            each for each in conversations.path(connection, row["head"])
            if each["content"] is not None and each["state"] != "writing" and each["id"] <= round_row["last_message"]
        ]  # fmt: skip
        if not said:
            continue
        how, policies = json.loads(row["how"]), json.loads(row["policies"])
        system = [{"role": "system", "content": how["system"]}] if how.get("system") else []
        replies = [each for each in said if each["role"] == "assistant"]
        stopped = [turn for turn, each in enumerate(replies) if each["state"] != "done"]  # or they failed
        given = [conversations.feedback_on(connection, each["id"], round_row["last_feedback"]) for each in replies]
        feedback = [{"turn": turn, **each} for turn, each in enumerate(given) if {*each.values()} != {None}]
        attack = {key: row[key] for key in ("goal", "category", "success")} if row["mode"] == "attack" else None
        yield {
            "id": row["token"], "messages": system + [{"role": each["role"], "content": each["content"]} for each in said],
            "labeler": row["pseudonym"], "group": row["grp"], "policy": policies[0] if len(set(policies)) == 1 else policies,
            "seeds": [each["seed"] for each in replies], "sampling": how, "stopped": stopped, "feedback": feedback,
            "attack": attack, "mode": row["mode"], "instructions": row["instructions"], "at": row["at"],
        }  # fmt: skip


def _liked(talk: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The liked answers of a chat, as demonstrations: with a thumb up, or rated `LIKED` or more without a thumb down. Stopped
    answers are left out."""
    messages = talk["messages"]
    places = answers(messages)
    for each in talk["feedback"] if talk["mode"] == "chat" else ():
        thumb, likert = each["thumb"] or 0, each["likert"] or 0
        place = places[each["turn"]]
        if (thumb > 0 or (thumb == 0 and likert >= LIKED)) and each["turn"] not in talk["stopped"]:
            yield {
                "id": f"{talk['id']}-{each['turn']}", "messages": messages[:place], "response": messages[place]["content"],
                "labeler": talk["labeler"], "group": talk["group"], "policy": talk["policy"], "seed": talk["seeds"][each["turn"]],
                "at": talk["at"], "instructions": talk["instructions"], "mode": "chat", "thumb": each["thumb"],
                "likert": each["likert"],
            }  # fmt: skip


def _labelers(labels: Sequence[dict[str, Any]]) -> dict[str, int]:
    """{group: number of people}."""
    return {
        group: len({each["person"] for each in labels if each["grp"] == group}) for group in sorted({e["grp"] for e in labels})
    }


def _instructions(connection: Connection, labels: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The full instructions and consent of each version that the labelers were given."""
    used = sorted({(each["grp"], each["instructions"]) for each in labels})
    sql = "SELECT grp AS 'group', version, text, consent FROM instructions WHERE grp = ? AND version = ?"
    return [dict(row) for each in used if (row := connection.execute(sql, each).fetchone()) is not None]


def _write_labels(connection: Connection, number: int, labels: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write ``labels.jsonl`` beside the candidates of each judged source. In adjudicated tasks, only the adjudicator counts."""
    written = []
    for source in connection.execute("SELECT * FROM sources WHERE round = ? ORDER BY id", (number,)).fetchall():
        own = sorted(
            (each for each in labels if each["source"] == source["id"] and each["mode"] != "write"), key=lambda e: e["task"]
        )
        rows: list[dict[str, Any]] = []
        for _, group in groupby(own, key=lambda each: each["task"]):
            given = list(group)
            counted = [each for each in given if each["mode"] == "adjudicate"] or given
            rows += [
                {"id": e["key"], "ranks": e["content"]["ranks"], "labeler": e["pseudonym"], "group": e["grp"]} for e in counted
            ]
        file = Path(source["path"]).with_name(LABELS)
        if not file.exists():  # the stage has read the file that is there
            write_text(file, "".join(map(dump_line, rows)))
        written.append({"path": source["path"], "sha256": source["sha256"], "labels": len(rows)})
    return written
