"""Reports for the operator: progress of the sources, people, throughput; and the audit export."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

from lockstep_studio.store.database import Connection, Row

CHUNK = 500
"""Rows of the audit read at a time, so that no transaction stays open."""
HOUR = 3600.0


def sources(connection: Connection) -> list[dict[str, Any]]:
    """{"id", "path", "kind", "rows", "given", "wanted", "round"}: labels given and wanted in all groups, not demonstrations."""
    rows = connection.execute(
        "SELECT sources.id, path, kind, rows, rounds.name AS round, "
        "(SELECT count(*) FROM labels JOIN tasks ON tasks.id = labels.task WHERE source = sources.id AND revision = 0 "
        "AND labels.mode = tasks.mode) AS given, "
        "(SELECT ifnull(sum(wanted), 0) FROM slots JOIN tasks ON tasks.id = slots.task WHERE source = sources.id "
        "AND slots.mode = tasks.mode) AS wanted "
        "FROM sources LEFT JOIN rounds ON rounds.id = sources.round ORDER BY sources.id DESC LIMIT 50"
    )
    return [dict(row) for row in rows]


def people(connection: Connection) -> list[dict[str, Any]]:
    """{"id", "pseudonym", "group", "standing", "labels", "seconds" (median), "gold" (mean mark), "last"} of each labeler."""
    found = []
    rows = connection.execute(
        "SELECT id, pseudonym, grp AS 'group', standing FROM people WHERE role = 'labeler' ORDER BY id DESC LIMIT 500"
    )
    for row in rows.fetchall():
        labels = connection.execute(
            "SELECT seconds, correct, at FROM labels WHERE person = ? AND revision = 0 ORDER BY id DESC LIMIT 1000", (row["id"],)
        ).fetchall()
        marks = [each["correct"] for each in labels if each["correct"] is not None]
        found.append({
            **dict(row), "labels": len(labels), "seconds": median(each["seconds"] for each in labels) if labels else None,
            "gold": sum(marks) / len(marks) if marks else None, "last": labels[0]["at"] if labels else None,
        })  # fmt: skip
    return found


def operators(connection: Connection) -> list[dict[str, Any]]:
    """{"id", "pseudonym", "name", "at"} of each current operator."""
    sql = "SELECT id, pseudonym, name, at FROM people WHERE role = 'operator' AND standing != 'removed' ORDER BY id"
    return [dict(row) for row in connection.execute(sql)]


def throughput(connection: Connection, now: float) -> dict[str, int]:
    """How many labels, policies' answers and active people there were in the last hour and day."""
    count = lambda sql, since: int(connection.execute(sql, (since,)).fetchone()[0])  # noqa: E731
    labels, active = "SELECT count(*) FROM labels WHERE at > ?", "SELECT count(DISTINCT person) FROM labels WHERE at > ?"
    answers = "SELECT count(*) FROM messages WHERE role = 'assistant' AND at > ?"
    spans = {"hour": HOUR, "day": 24 * HOUR}
    return {f"{name}_{span}": count(sql, now - seconds) for span, seconds in spans.items()
            for name, sql in {"labels": labels, "people": active, "answers": answers}.items()}  # fmt: skip


def rounds(connection: Connection) -> list[dict[str, Any]]:
    rows = connection.execute("SELECT name, state, at, record FROM rounds ORDER BY id DESC")
    return [{**dict(row), "record": json.loads(row["record"] or "{}")} for row in rows]


# ------------------------------------------------------------------------------------------------------------ audit


_HELD = "NOT EXISTS (SELECT 1 FROM findings WHERE decision = 'release' AND kind"
_SYSTEM_HELD = (
    "(conversations.mode = 'chat' AND ifnull(json_extract(how, '$.system'), '') != '' "
    f"AND {_HELD} = 'system' AND findings.id = conversations.id))"
)
_AUDIT: Mapping[str, str] = {
    "person": "SELECT id, pseudonym, role, grp, standing, at FROM people WHERE id > ? ORDER BY id LIMIT ?",
    "label": "SELECT labels.id, pseudonym, labels.grp, labels.mode, key AS task, sources.path AS source, policies, scores, seed, "
    "shown, probability, labels.at, seconds, revision, instructions, correct, content, "
    f"labels.mode = 'write' AND {_HELD} = 'label' AND findings.id = labels.id) AS withheld FROM labels "
    "JOIN people ON people.id = labels.person JOIN leases ON leases.id = labels.lease JOIN tasks ON tasks.id = labels.task "
    "LEFT JOIN sources ON sources.id = tasks.source WHERE labels.id > ? ORDER BY labels.id LIMIT ?",
    "conversation": "SELECT conversations.id, pseudonym, conversations.grp, mode, conversations.token AS conversation, policies, "
    "json_remove(how, '$.system') AS sampling, json_extract(how, '$.system') AS system, goal, category, success, instructions, "
    "(SELECT token FROM messages WHERE messages.id = head) AS last, conversations.at, finished, "
    f"(goal IS NOT NULL AND {_HELD} = 'conversation' AND findings.id = conversations.id)) OR {_SYSTEM_HELD} AS withheld "
    "FROM conversations JOIN people ON people.id = person WHERE conversations.id > ? ORDER BY conversations.id LIMIT ?",
    "message": "SELECT messages.id, pseudonym, conversations.grp, conversations.token AS conversation, "
    "messages.token AS message, before.token AS parent, messages.role, messages.policy, messages.seed, messages.side, "
    "messages.state, messages.at, messages.content, EXISTS (SELECT 1 FROM messages AS said WHERE said.role = 'user' "
    "AND said.conversation = messages.conversation AND said.content IS NOT NULL AND (said.id = messages.id "
    f"OR messages.role = 'assistant' AND said.id < messages.id) AND {_HELD} = 'message' AND findings.id = said.id)) "
    f"OR messages.role = 'assistant' AND {_SYSTEM_HELD} AS withheld "
    "FROM messages JOIN conversations ON conversations.id = messages.conversation JOIN people ON people.id = person "
    "LEFT JOIN messages AS before ON before.id = messages.parent WHERE messages.id > ? ORDER BY messages.id LIMIT ?",
    "feedback": "SELECT feedback.id, pseudonym, grp, messages.token AS message, policy, seed, feedback.at, revision, thumb, "
    f"likert, text, text IS NOT NULL AND {_HELD} = 'feedback' AND findings.id = feedback.id) AS withheld FROM feedback "
    "JOIN messages ON messages.id = feedback.message "
    "JOIN people ON people.id = feedback.person WHERE feedback.id > ? ORDER BY feedback.id LIMIT ?",
    "lease": "SELECT leases.id, pseudonym, leases.mode, task, leases.at, ended, outcome FROM leases "
    "JOIN people ON people.id = person WHERE leases.id > ? ORDER BY leases.id LIMIT ?",
    "tombstone": "SELECT tombstones.id, pseudonym, tombstones.at, labels, messages FROM tombstones "
    "JOIN people ON people.id = person WHERE tombstones.id > ? ORDER BY tombstones.id LIMIT ?",
    "round": "SELECT id, name, state, at, record FROM rounds WHERE id > ? ORDER BY id LIMIT ?",
}


def audit(reader: Callable[[], Connection]) -> Iterator[dict[str, Any]]:
    """A row, {"record": kind, ...}, for every person, label and feedback in all revisions, conversation, message of every branch,
    lease, tombstone and round. Names, passwords and text that was not released are left out. So are answers that follow such
    text, since they may repeat it.

    Args:
      reader: gives the calling thread's connection; a server may take each row on another thread.
    """
    for kind, sql in _AUDIT.items():
        last = 0
        while rows := reader().execute(sql, (last, CHUNK)).fetchall():
            last = rows[-1]["id"]
            yield from ({"record": kind, **_audited(kind, row)} for row in rows)


def _audited(kind: str, row: Row) -> dict[str, Any]:
    found: dict[str, Any] = dict(row)
    if found.pop("withheld", False):
        found["withheld"] = True
        found |= dict.fromkeys(found.keys() & {"content", "text", "goal", "system"})
    for key in ("policies", "sampling", "scores", "shown", "record", *(["content"] if kind == "label" else [])):
        if isinstance(found.get(key), str):
            found[key] = json.loads(found[key])
    return {("closed_as" if key == "record" else key): value for key, value in found.items()}
