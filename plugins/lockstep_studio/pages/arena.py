"""Ask two: two policies answer a person's own question side by side, and the names follow the vote, as in Chatbot Arena
(Chiang et al. 2024, arXiv 2403.04132). Votes are comparisons like those of prepared tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from lockstep_studio.pages import talk
from lockstep_studio.pages.compare import BAD, TIE
from lockstep_studio.pages.visit import Visit, get, post
from lockstep_studio.store import conversations, labels
from lockstep_studio.store.database import Connection, Row
from lockstep_studio.store.people import Refused

SIDES = 2


async def overview(visit: Visit) -> Response:
    listed = [dict(row) for row in conversations.listed(visit.reader, visit.me, "arena")]
    return visit.show("arena.html", {"conversation": None, "conversations": listed})


async def begin(visit: Visit) -> Response:
    """Begin a question to two policies in random order, with the operator's sampling settings."""
    return await talk.begin(visit, "arena", visit.studio.draw_policies(SIDES), talk.sampling(visit))


async def conversation(visit: Visit) -> Response:
    row = conversations.conversation_of(visit.reader, visit.me, visit.path("conversation"), "arena")
    return visit.show("arena.html", _shown(visit, row))


async def say(visit: Visit) -> Response:
    row = conversations.conversation_of(visit.reader, visit.me, visit.path("conversation"), "arena")
    return await talk.answer(visit, row, None, visit.text("text"), _check_new)


def _check_new(connection: Connection, row: Row, parent: int | None) -> None:
    if row["head"] is not None:
        raise Refused("You asked already. Vote, then ask something new.")


async def again(visit: Visit) -> Response:
    """Draw both answers again if one of them failed or was stopped: nobody can judge those."""
    row = conversations.conversation_of(visit.reader, visit.me, visit.path("conversation"), visit.at.split("/")[1])
    return await talk.answer(visit, row, row["head"], None, _check_spoilt)


def _check_spoilt(connection: Connection, row: Row, parent: int | None) -> None:
    _, replies = _asked(connection, row)
    if row["head"] != parent or row["finished"] is not None or not is_spoilt(replies):
        raise Refused("Only answers that failed or were stopped are drawn again.")


def _asked(connection: Connection, row: Row) -> tuple[list[Row], list[Row]]:
    """The messages so far, and the replies to the last one."""
    said = conversations.path(connection, row["head"])
    return said, conversations.replies_to(connection, row["id"], said[-1]["id"]) if said else []


def is_spoilt(replies: Sequence[Row]) -> bool:
    """True if all replies have ended, but not all are complete."""
    states = {each["state"] for each in replies}
    return bool(states) and "writing" not in states and states != {"done"}


async def vote(visit: Visit) -> Response:
    """Store the vote. ``choice``: 0 (left), 1 (right), 'tie' or 'bad'. The first vote stands."""
    row = conversations.conversation_of(visit.reader, visit.me, visit.path("conversation"), "arena")
    choice = visit.first("choice")
    if choice not in (TIE, BAD):
        choice = visit.integer("choice", 0, SIDES - 1)
    await visit.studio.database.do(_vote, visit, row["token"], choice)
    return visit.go(f"/arena/{row['token']}", names=json.loads(row["policies"]))


def _vote(connection: Connection, visit: Visit, token: str, choice: Any) -> None:
    row = conversations.conversation_of(connection, visit.me, token, "arena")
    task, replies = duel(connection, row)
    ranks = [0 if choice in (TIE, BAD, side) else 1 for side in range(SIDES)]
    texts = [each["content"].lower() for each in replies]
    blind = not any(name in text for text in texts for name in visit.studio.names())
    content = {"ranks": ranks, "both_bad": choice == BAD, "blind": blind, "choice": choice}
    began = max(each["at"] for each in replies)
    settings, name = visit.studio.settings, f"duel-{row['token']}"
    labels.record_at_once(connection, visit.me, task, "compare", range(SIDES), content, settings, name, began, visit.now)
    connection.execute("UPDATE conversations SET finished = ifnull(finished, ?) WHERE id = ?", (visit.now, row["id"]))


def duel(connection: Connection, row: Row) -> tuple[dict[str, Any], list[Row]]:
    """The task of choosing between the replies to the last message, and the replies.

    Raises:
      Refused: a reply is missing or still being written, or one failed or was stopped.
    """
    said, replies = _asked(connection, row)
    if len(replies) != SIDES or any(each["state"] == "writing" for each in replies):
        raise Refused("Wait for both answers first.")
    if is_spoilt(replies):
        raise Refused("One of the answers failed or was stopped, so they cannot be compared. Ask for both again.")
    how = json.loads(row["how"])
    system = [{"role": "system", "content": how["system"]}] if how.get("system") else []
    task = {
        "id": f"{row['token']}-{len(said)}", "messages": system + [{"role": m["role"], "content": m["content"]} for m in said],
        "completions": [each["content"] for each in replies], "policies": [each["policy"] for each in replies],
        "seed": replies[0]["seed"], "asked": said[-1]["id"],
    }  # fmt: skip
    return task, replies


def shown_replies(replies: Sequence[Row]) -> list[dict[str, Any]]:
    """The answers side by side. Neither is shown before both have ended, since the one that comes first could be recognised."""
    waits = any(each["state"] == "writing" for each in replies)
    return [
        {"place": each["side"], "text": "" if waits else each["content"] or "", "state": "writing" if waits else each["state"]}
        for each in replies
    ]


def _shown(visit: Visit, row: Row) -> dict[str, Any]:
    said, replies = _asked(visit.reader, row)
    names = json.loads(row["policies"]) if row["finished"] is not None else None
    label = visit.reader.execute(
        "SELECT labels.* FROM labels JOIN leases ON leases.id = lease WHERE token = ?", (f"duel-{row['token']}",)
    ).fetchone()
    return {
        "conversation": row["token"], "asked": said[-1]["content"] if said else None, "names": names, "conversations": [],
        "answers": shown_replies(replies), "spoilt": is_spoilt(replies),
        "choice": None if label is None else labels.content_of(label).get("choice"),
    }  # fmt: skip


routes = [
    get("/arena", overview),
    post("/arena", begin),
    get("/arena/{conversation}", conversation),
    post("/arena/{conversation}/say", say),
    post("/arena/{conversation}/again", again),
    post("/arena/{conversation}/vote", vote),
]
