"""Personal data in free text, and removal on request.

Free text with personal data stays out of frozen rounds until the operator has released it. If a person asks for removal, their
rows stay without content, and a tombstone says when.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from lockstep_studio.store import people, tasks
from lockstep_studio.store.database import Connection

TEXTS = {
    "label": "SELECT id, json_extract(content, '$.response') AS content FROM labels "
    "WHERE mode = 'write' AND content IS NOT NULL AND id ",
    "message": "SELECT id, content FROM messages WHERE role = 'user' AND content IS NOT NULL AND id ",
    "feedback": "SELECT id, text AS content FROM feedback WHERE text IS NOT NULL AND id ",
    "conversation": "SELECT id, goal AS content FROM conversations WHERE goal IS NOT NULL AND id ",
    "system": "SELECT id, json_extract(how, '$.system') AS content FROM conversations "
    "WHERE mode = 'chat' AND json_extract(how, '$.system') != '' AND id ",
    "task": "SELECT id, json_extract(messages, '$[0].content') AS content FROM tasks "
    "WHERE author IS NOT NULL AND asked IS NULL AND against IS NULL AND messages != '[]' AND id ",
}
"""The free text that people write, by kind. A 'task' is a prompt of a person's own; text in a conversation is a 'message'."""

Finding = tuple[str, int, list[str]]


def scan(connection: Connection, known: Collection[str] = ()) -> list[Finding]:
    """(kind, id, kinds of personal data) of all free text that `remember` has not stored yet. Only reads the database.

    Args:
      known: the operator's own texts, which are not searched.
    """
    from lockstep_studio.exchange.personal import find

    found = []
    for kind, sql in TEXTS.items():
        (last,) = connection.execute("SELECT ifnull(max(id), 0) FROM findings WHERE kind = ?", (kind,)).fetchone()
        for row in connection.execute(sql + "> ? ORDER BY id", (last,)):
            text = row["content"]
            found.append((kind, row["id"], [] if text in known else sorted({each.kind for each in find(text)})))
    return found


def remember(connection: Connection, found: list[Finding], now: float) -> None:
    """Store findings. Text without personal data is released; the rest waits for a decision."""
    rows = [(kind, number, json.dumps(kinds), now, None if kinds else "release") for kind, number, kinds in found]
    connection.executemany("INSERT OR IGNORE INTO findings (kind, id, found, at, decision) VALUES (?, ?, ?, ?, ?)", rows)


def held_back(connection: Connection) -> Iterator[dict[str, Any]]:
    """Texts that wait for the operator's decision: {"kind", "id", "found", "text"}."""
    for row in connection.execute("SELECT * FROM findings WHERE decision IS NULL ORDER BY at LIMIT 200").fetchall():
        text = connection.execute(TEXTS[row["kind"]] + "= ?", (row["id"],)).fetchone()
        if text is not None:
            yield {"kind": row["kind"], "id": row["id"], "found": json.loads(row["found"]), "text": text["content"]}


def decide(connection: Connection, kind: str, number: int, decision: str, now: float) -> None:
    """'release' lets the text leave with the next round; 'withhold' keeps it back for good."""
    sql = (
        "UPDATE findings SET decision = ?, decided = ? WHERE kind = ? AND id = ? AND found != '[]' AND decision IS NOT 'withhold'"
    )
    connection.execute(sql, (decision, now, kind, number))


def remove(connection: Connection, number: int, now: float) -> dict[str, Any]:
    """Remove everything that person ``number`` chose and wrote, and the person's name, password and sessions.

    Returns:
      {"labels", "messages", "rounds"}: how many lost their content, and the names of the closed rounds that hold some of them,
      which do not change.
    """
    rounds = connection.execute(
        "SELECT DISTINCT rounds.name FROM rounds JOIN members ON members.round = rounds.id JOIN labels ON labels.id = members.id "
        "WHERE members.kind = 'label' AND labels.person = ? UNION SELECT DISTINCT rounds.name FROM rounds JOIN members ON "
        "members.round = rounds.id JOIN conversations ON conversations.id = members.id WHERE members.kind = 'conversation' "
        "AND conversations.person = ?",
        (number, number),
    ).fetchall()
    removed = {
        "labels": connection.execute(
            "UPDATE labels SET content = NULL WHERE person = ? AND content IS NOT NULL", (number,)
        ).rowcount,
        "messages": connection.execute(
            "UPDATE messages SET content = NULL, state = 'removed' WHERE content IS NOT NULL AND conversation IN "
            "(SELECT id FROM conversations WHERE person = ?)",
            (number,),
        ).rowcount,
    }
    connection.execute("UPDATE feedback SET text = NULL, thumb = NULL, likert = NULL WHERE person = ?", (number,))
    connection.execute("UPDATE conversations SET title = '', goal = NULL, how = '{}' WHERE person = ?", (number,))
    connection.execute("UPDATE leases SET draft = '{}' WHERE person = ?", (number,))
    connection.execute("UPDATE tasks SET messages = '[]', completions = '[]' WHERE author = ?", (number,))
    connection.execute("UPDATE slots SET open = 0 WHERE task IN (SELECT id FROM tasks WHERE author = ?)", (number,))
    held = "SELECT id FROM leases WHERE outcome IS NULL AND (person = ? OR task IN (SELECT id FROM tasks WHERE author = ?))"
    for row in connection.execute(held, (number, number)).fetchall():
        tasks.end(connection, row["id"], "closed", now)
    connection.execute("DELETE FROM written WHERE person = ?", (number,))
    connection.execute("UPDATE people SET name = NULL, password = NULL, standing = 'removed' WHERE id = ?", (number,))
    people.sign_out_everywhere(connection, number)
    values = (number, now, removed["labels"], removed["messages"])
    connection.execute("INSERT INTO tombstones (person, at, labels, messages) VALUES (?, ?, ?, ?)", values)
    return {**removed, "rounds": [row["name"] for row in rounds]}
