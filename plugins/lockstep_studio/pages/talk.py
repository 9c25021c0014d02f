"""What conversations share: answers that stream as they are drawn, stopping, feedback.

A question is one POST whose response is a stream of server-sent events: `start`, `wait` (how many are ahead), `piece`, `end`.
If the reader leaves, the policy stops. A machine that accepts JSON gets the whole answer at once, and a browser without scripts
the page.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from lockstep.types import Message
from lockstep_studio.generator import Piece, Request, Ticket
from lockstep_studio.pages.visit import Visit, post
from lockstep_studio.store import conversations
from lockstep_studio.store.database import Connection, Row
from lockstep_studio.store.people import Refused

HEARTBEAT = 10.0
"""Seconds of silence after which a stream says that it lives, so that nothing on the way cuts it."""
SEEDS = 2**31
BEST_LIKERT = 7


async def answer(
    visit: Visit, conversation: Row, parent: int | None, text: str | None, policies: Sequence[str], back: str
) -> Response:
    """Add what the visitor says, and stream the answers of ``policies`` to it."""
    _check_pace(visit, len(policies))
    seed = secrets.randbelow(SEEDS)
    replies = [(policy, seed + side) for side, policy in enumerate(policies)]
    asked, places = await visit.studio.database.do(conversations.ask, conversation, parent, text, replies, visit.now)
    said = tuple(Message(each["role"], each["content"] or "") for each in conversations.path(visit.reader, asked))
    how = json.loads(conversation["how"])
    if how["system"]:
        said = (Message("system", how["system"]), *said)
    try:
        tickets = [
            visit.studio.generator.submit(Request(policy, said, each, how["temperature"], how["max_tokens"]))
            for policy, each in replies
        ]
    except Refused:
        for number, _ in places:
            await visit.studio.database.do(conversations.finish, number, "", "failed")
        raise
    writing = _Writing(visit, [number for number, _ in places], tickets)
    if "text/event-stream" in visit.request.headers.get("accept", ""):
        headers = {"x-accel-buffering": "no", "cache-control": "no-store"}
        events = writing.events([token for _, token in places])
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    async for _ in writing.events([]):
        if await visit.request.is_disconnected():
            writing.stop()
    answers = [{"message": token, "text": ticket.text, "state": writing.states[side]}
               for side, ((_, token), ticket) in enumerate(zip(places, tickets, strict=True))]  # fmt: skip
    return visit.go(back, answers=answers)


def _check_pace(visit: Visit, count: int) -> None:
    most = visit.studio.settings.limits.answers_per_minute
    if conversations.answers_since(visit.reader, visit.me.id, visit.now - 60) + count > most:
        raise Refused(f"That was too fast: {most} answers a minute are the limit. Wait a little.", 429)


class _Writing:
    """Answers on their way to one reader and into the database."""

    def __init__(self, visit: Visit, messages: Sequence[int], tickets: Sequence[Ticket]):
        self.visit, self.messages, self.tickets = visit, messages, tickets
        self.states: dict[int, str] = {}

    async def events(self, tokens: Sequence[str]) -> AsyncIterator[str]:
        """Server-sent events. However it ends, what was written is stored."""
        try:
            yield _event("start", messages=list(tokens))
            async for side, piece in _together(self.tickets):
                if piece.ended is not None:
                    await self._keep(side, piece.ended)
                yield _said(side, piece, self.states)
        finally:
            self.stop()

    def stop(self) -> None:
        """For whoever left: the writer's thread stores what came so far, whatever happens to this task."""
        for side, ticket in enumerate(self.tickets):
            ticket.cancel()
            if side not in self.states:
                self.states[side] = "stopped"
                self.visit.studio.database.submit(conversations.finish, self.messages[side], ticket.text, "stopped")

    async def _keep(self, side: int, ended: str) -> None:
        if side not in self.states:
            self.states[side] = ended
            await self.visit.studio.database.do(conversations.finish, self.messages[side], self.tickets[side].text, ended)


def _said(side: int, piece: Piece, states: Mapping[int, str]) -> str:
    if piece.ended is not None:
        return _event("end", side=side, text=piece.text, state=states[side], reason=piece.reason)
    if piece.ahead is not None:
        return _event("wait", side=side, ahead=piece.ahead)
    return _event("piece", side=side, text=piece.text) if piece.text else ": alive\n\n"


def _event(name: str, **data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


async def _together(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Piece]]:
    """The pieces of all tickets as they come, until all have ended."""
    merged: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

    async def forward(side: int, ticket: Ticket) -> None:
        async for piece in ticket.pieces(HEARTBEAT):
            merged.put_nowait((side, piece))

    tasks = [asyncio.create_task(forward(side, ticket)) for side, ticket in enumerate(tickets)]
    left = len(tasks)
    try:
        while left:
            side, piece = await merged.get()
            left -= piece.ended is not None
            yield side, piece
    finally:
        for task in tasks:
            task.cancel()


def thread(visit: Visit, conversation: Row) -> list[dict[str, Any]]:
    """The messages that are shown, with their alternatives and the feedback on them; no policies."""
    found = []
    for row in conversations.path(visit.reader, conversation["head"]):
        tokens = conversations.siblings(visit.reader, row) if row["side"] is None else [row["token"]]
        found.append({
            "message": row["token"], "role": row["role"], "text": row["content"] or "", "state": row["state"],
            "alternatives": tokens, "number": tokens.index(row["token"]) if row["token"] in tokens else 0,
            "feedback": conversations.feedback_on(visit.reader, row["id"]) if row["role"] == "assistant" else None,
        })  # fmt: skip
    return found


async def feedback(visit: Visit) -> Response:
    """``thumb`` -1, 0 (none) or 1, ``likert`` 1 to 7, ``text``; whatever is not sent stays."""
    message = visit.reader.execute(
        "SELECT messages.id, conversations.token, conversations.mode FROM messages "
        "JOIN conversations ON conversations.id = conversation WHERE messages.token = ? AND person = ? AND role = 'assistant'",
        (visit.path("message"), visit.me.id),
    ).fetchone()
    if message is None:
        raise Refused("There is no such answer in your conversations.", 404)
    given: dict[str, Any] = {}
    if "thumb" in visit.fields:
        given["thumb"] = visit.optional("thumb", -1, 1) or None
    if "likert" in visit.fields:
        given["likert"] = visit.optional("likert", 1, BEST_LIKERT)
    if "text" in visit.fields:
        given["text"] = visit.text("text", required=False) or None
    stored = await visit.studio.database.do(_give, visit.me, message["id"], given, visit.now)
    data = {"feedback": stored, "message": visit.path("message")}
    if visit.request.headers.get("hx-request") and not visit.request.headers.get("hx-boosted"):
        return visit.show("feedback.html", data)
    return visit.go(f"/{message['mode']}/{message['token']}", **data)


def _give(connection: Connection, person: Any, message: int, given: Mapping[str, Any], now: float) -> dict[str, Any]:
    return conversations.give_feedback(connection, person, message, given, now)


routes: list[Route] = [post("/feedback/{message}", feedback)]
