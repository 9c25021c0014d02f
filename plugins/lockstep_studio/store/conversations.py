"""Conversations as trees of messages. Editing or regenerating adds a branch; the conversation's head says which one is shown."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from lockstep_studio.settings import LimitsConfig
from lockstep_studio.store.database import Connection, Row
from lockstep_studio.store.people import Person, Refused, count_written

MOST_TITLE = 60
MOST_UNFINISHED = 4
"""The most answers that policies write for one person at once."""


def create(
    connection: Connection, person: Person, mode: str, policies: Sequence[str], how: Mapping[str, Any], version: str, now: float,
    goal: str | None = None, category: str | None = None,
) -> str:  # fmt: skip
    """Add a conversation with one policy, or with one on each side. Returns its token."""
    token = secrets.token_urlsafe(16)
    connection.execute(
        "INSERT INTO conversations (token, person, grp, mode, policies, how, goal, category, instructions, at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (token, person.id, person.group, mode, json.dumps(list(policies)), json.dumps(how), goal, category, version, now),
    )
    return token


def conversation_of(connection: Connection, person: Person, token: str, mode: str) -> Row:
    """
    Raises:
      Refused: this person has no such conversation.
    """
    found: Row | None = connection.execute(
        "SELECT * FROM conversations WHERE token = ? AND person = ? AND mode = ?", (token, person.id, mode)
    ).fetchone()
    if found is None:
        raise Refused("There is no such conversation among yours.", 404)
    return found


def listed(connection: Connection, person: Person, mode: str) -> list[Row]:
    sql = "SELECT token, title, at, finished FROM conversations WHERE person = ? AND mode = ? ORDER BY id DESC LIMIT 100"
    return connection.execute(sql, (person.id, mode)).fetchall()


def message_of(connection: Connection, conversation: Row, token: str) -> Row:
    """
    Raises:
      Refused: the conversation has no such message.
    """
    found: Row | None = connection.execute(
        "SELECT * FROM messages WHERE token = ? AND conversation = ?", (token, conversation["id"])
    ).fetchone()
    if found is None:
        raise Refused("There is no such message in this conversation.", 404)
    return found


def path(connection: Connection, head: int | None) -> list[Row]:
    """The messages from the first to ``head``."""
    rows = connection.execute(
        "WITH RECURSIVE up AS (SELECT *, 0 AS depth FROM messages WHERE id = ? UNION ALL "
        "SELECT messages.*, depth + 1 FROM messages JOIN up ON messages.id = up.parent) SELECT * FROM up ORDER BY depth DESC",
        (head,),
    )
    return rows.fetchall()


def siblings(connection: Connection, message: Row) -> list[str]:
    """The tokens of a message and its alternatives, oldest first."""
    sql = "SELECT token FROM messages WHERE conversation = ? AND parent IS ? AND role = ? ORDER BY id"
    values = (message["conversation"], message["parent"], message["role"])
    return [row["token"] for row in connection.execute(sql, values)]


def add_message(
    connection: Connection, conversation: int, parent: int | None, role: str, content: str, now: float, *,
    policy: str | None = None, seed: int | None = None, side: int | None = None, state: str = "done",
) -> tuple[int, str]:  # fmt: skip
    """Add a message. Returns its (id, token)."""
    token = secrets.token_urlsafe(16)
    values = (token, conversation, parent, role, content, policy, seed, side, state, now)
    (number,) = connection.execute(
        "INSERT INTO messages (token, conversation, parent, role, content, policy, seed, side, state, at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
        values,
    ).fetchone()
    return int(number), token


def ask(
    connection: Connection,
    conversation: Row,
    parent: int | None,
    text: str | None,
    replies: Sequence[tuple[str, int]],
    now: float,
) -> tuple[int, list[tuple[int, str]]]:
    """Add what the person says and an empty message for each reply.

    Args:
      text: None if the person says nothing new, as for another answer to ``parent``.
      replies: (policy, seed) of each.

    Returns:
      The id of the message that is answered, and the (id, token) of each reply.
    """
    if text is not None:
        parent, _ = add_message(connection, conversation["id"], parent, "user", text, now)
        if not conversation["title"]:
            title = " ".join(text.split())[:MOST_TITLE]
            connection.execute("UPDATE conversations SET title = ? WHERE id = ?", (title, conversation["id"]))
    assert parent is not None
    places = [
        add_message(
            connection, conversation["id"], parent, "assistant", "", now, policy=policy, seed=seed, state="writing",
            side=side if len(replies) > 1 else None,
        )
        for side, (policy, seed) in enumerate(replies)
    ]  # fmt: skip
    set_head(connection, conversation["id"], places[0][0] if len(places) == 1 else parent)
    return parent, places


def finish(connection: Connection, message: int, content: str, state: str) -> None:
    """Store what a policy wrote, complete or as far as it came."""
    sql = "UPDATE messages SET content = ?, state = ? WHERE id = ? AND state = 'writing' RETURNING conversation, at"
    if (row := connection.execute(sql, (content, state, message)).fetchone()) is not None:
        (person,) = connection.execute("SELECT person FROM conversations WHERE id = ?", (row["conversation"],)).fetchone()
        count_written(connection, person, len(content), row["at"])


def stop_unfinished(connection: Connection) -> None:
    """Mark unfinished messages as stopped after a crash: nothing writes them any more."""
    connection.execute("UPDATE messages SET state = 'stopped' WHERE state = 'writing'")


def set_head(connection: Connection, conversation: int, head: int) -> None:
    connection.execute("UPDATE conversations SET head = ? WHERE id = ?", (head, conversation))


def leaf(connection: Connection, message: Row) -> int:
    """The newest end of the branch that begins with this message."""
    last = int(message["id"])
    while True:
        sql = "SELECT id FROM messages WHERE conversation = ? AND parent = ? AND side IS NULL ORDER BY id DESC LIMIT 1"
        row = connection.execute(sql, (message["conversation"], last)).fetchone()
        if row is None:
            return last
        last = row["id"]


def replies_to(connection: Connection, conversation: int, parent: int) -> list[Row]:
    """The newest reply of each side to a message."""
    rows = connection.execute(
        "SELECT *, max(id) FROM messages WHERE conversation = ? AND parent = ? AND side IS NOT NULL GROUP BY side ORDER BY side",
        (conversation, parent),
    )
    return rows.fetchall()


def give_feedback(connection: Connection, person: Person, message: int, given: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Add feedback. Keys that ``given`` lacks stay as they were. Returns the whole feedback. If sent twice, it is stored once."""
    before = feedback_on(connection, message)
    after = {key: given.get(key, before[key]) for key in before}
    if after != before:
        revision = connection.execute("SELECT count(*) FROM feedback WHERE message = ?", (message,)).fetchone()[0]
        connection.execute(
            "INSERT INTO feedback (message, person, revision, thumb, likert, text, at) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (message, person.id, revision, after["thumb"], after["likert"], after["text"], now),
        )
    return after


def feedback_on(connection: Connection, message: int, last: int | None = None) -> dict[str, Any]:
    """The feedback on a message; with ``last``, only what was given up to the feedback with that id."""
    sql = "SELECT thumb, likert, text FROM feedback WHERE message = ? AND id <= ifnull(?, id) ORDER BY revision DESC LIMIT 1"
    row = connection.execute(sql, (message, last)).fetchone()
    return dict(row) if row is not None else {"thumb": None, "likert": None, "text": None}


def check_open(connection: Connection, conversation: int) -> None:
    """
    Raises:
      Refused: the conversation is in a closed round, so anything added would be in no round.
    """
    if is_closed(connection, conversation):
        raise Refused("This conversation is in a closed round, so nothing is added to it. Begin a new one.")


def is_closed(connection: Connection, conversation: int) -> bool:
    sql = "SELECT 1 FROM members WHERE kind = 'conversation' AND id = ?"
    return connection.execute(sql, (conversation,)).fetchone() is not None


def check_length(connection: Connection, conversation: int, more: int, limits: LimitsConfig) -> None:
    """
    Raises:
      Refused: with ``more`` messages the conversation would be too long, or it has too many characters already.
    """
    sql = "SELECT count(*), ifnull(sum(length(content)), 0) FROM messages WHERE conversation = ?"
    messages, characters = connection.execute(sql, (conversation,)).fetchone()
    if messages + more > limits.conversation_messages or characters > limits.conversation_characters:
        raise Refused("This conversation is as long as one may be. Begin a new one.")


def check_pace(connection: Connection, person: int, count: int, most: int, now: float) -> None:
    """
    Raises:
      Refused: with ``count`` more answers the person would have more than ``most`` a minute, or too many at once.
    """
    of_person = "FROM messages JOIN conversations ON conversations.id = conversation WHERE person = ? AND role = 'assistant'"
    (recent,) = connection.execute(f"SELECT count(*) {of_person} AND messages.at > ?", (person, now - 60)).fetchone()
    if recent + count > most:
        raise Refused(f"That was too fast: {most} answers a minute are the limit. Wait a little.", 429)
    (unfinished,) = connection.execute(f"SELECT count(*) {of_person} AND state = 'writing'", (person,)).fetchone()
    if unfinished + count > MOST_UNFINISHED:
        raise Refused("Other answers to you are still being written. Wait for them, or stop them.", 429)
