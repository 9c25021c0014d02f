"""What the operator sees: progress of the sources, people, throughput; and the audit export."""

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
    """{"id", "path", "kind", "rows", "given", "wanted", "round"}: labels given and wanted, over all groups; no demonstrations."""
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
    """Of each labeler: {"id", "pseudonym", "group", "standing", "labels", "seconds" (median), "gold" (mean mark), "last"}."""
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
    """{"id", "pseudonym", "name", "at"} of each who is one now."""
    sql = "SELECT id, pseudonym, name, at FROM people WHERE role = 'operator' AND standing != 'removed' ORDER BY id"
    return [dict(row) for row in connection.execute(sql)]


def throughput(connection: Connection, now: float) -> dict[str, int]:
    """Labels, answers of policies and people at work, in the last hour and day."""
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


_AUDIT: Mapping[str, str] = {
    "person": "SELECT id, pseudonym, role, grp, standing, at FROM people WHERE id > ? ORDER BY id LIMIT ?",
    "label": "SELECT labels.id, pseudonym, labels.grp, labels.mode, key AS task, sources.path AS source, policies, scores, seed, "
    "shown, probability, labels.at, seconds, revision, instructions, correct, content, labels.mode = 'write' AND NOT EXISTS "
    "(SELECT 1 FROM findings WHERE kind = 'label' AND findings.id = labels.id AND decision = 'release') AS withheld FROM labels "
    "JOIN people ON people.id = labels.person JOIN leases ON leases.id = labels.lease JOIN tasks ON tasks.id = labels.task "
    "LEFT JOIN sources ON sources.id = tasks.source WHERE labels.id > ? ORDER BY labels.id LIMIT ?",
    "feedback": "SELECT feedback.id, pseudonym, grp, messages.token AS message, policy, seed, feedback.at, revision, thumb, "
    "likert, text, text IS NOT NULL AND NOT EXISTS (SELECT 1 FROM findings WHERE kind = 'feedback' "
    "AND findings.id = feedback.id AND decision = 'release') AS withheld FROM feedback "
    "JOIN messages ON messages.id = feedback.message "
    "JOIN people ON people.id = feedback.person WHERE feedback.id > ? ORDER BY feedback.id LIMIT ?",
    "lease": "SELECT leases.id, pseudonym, leases.mode, task, leases.at, ended, outcome FROM leases "
    "JOIN people ON people.id = person WHERE leases.id > ? ORDER BY leases.id LIMIT ?",
    "tombstone": "SELECT tombstones.id, pseudonym, tombstones.at, labels, messages FROM tombstones "
    "JOIN people ON people.id = person WHERE tombstones.id > ? ORDER BY tombstones.id LIMIT ?",
    "round": "SELECT id, name, state, at, record FROM rounds WHERE id > ? ORDER BY id LIMIT ?",
}


def audit(reader: Callable[[], Connection]) -> Iterator[dict[str, Any]]:
    """Every person, label and feedback in all revisions, lease, tombstone and round, a row each: {"record": kind, ...}. Names,
    passwords and text that was not released are left out.

    Args:
      reader: gives the calling thread's connection; a server may take each row on another thread.
    """
    for kind, sql in _AUDIT.items():
        last = 0
        while rows := reader().execute(sql, (last, CHUNK)).fetchall():
            last = rows[-1]["id"]
            yield from ({"record": kind, **_audited(row)} for row in rows)


def _audited(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = dict(row)
    if found.pop("withheld", False):
        found["withheld"] = True
        found |= dict.fromkeys(found.keys() & {"content", "text"})
    for key in ("policies", "scores", "shown", "content", "record"):
        if isinstance(found.get(key), str):
            found[key] = json.loads(found[key])
    return {("closed_as" if key == "record" else key): value for key, value in found.items()}
