"""Code that conversations share: answers that stream as they are drawn, stopping, feedback.

A question is one POST whose response is a stream of server-sent events: `start`, `wait` (how many are ahead), `piece`, `end`.
If the reader leaves, the policy stops. A machine that accepts JSON gets the whole answer at once. A browser without scripts is
sent to the page once the answer is complete.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from lockstep.text.visible import visible
from lockstep.types import Message
from lockstep_studio.generator import Piece, Request, Ticket
from lockstep_studio.pages.visit import Visit, post
from lockstep_studio.settings import LimitsConfig
from lockstep_studio.store import conversations, people, screening
from lockstep_studio.store.database import Connection, Row
from lockstep_studio.store.people import Refused

HEARTBEAT = 10.0
"""Seconds of silence after which a stream sends a sign of life, so that no proxy cuts it."""
SEEDS = 2**31
BEST_LIKERT = 7
ROW = 200
"""Characters that a message, a conversation or a feedback counts as, in addition to its text."""


def sampling(visit: Visit) -> dict[str, Any]:
    """The sampling settings of the operator."""
    chat = visit.studio.settings.chat
    return {"system": chat.system, "temperature": chat.temperature, "max_tokens": chat.max_tokens}


Check = Callable[[Connection, Row, "int | None"], None]
"""Raises if nothing may be added to the conversation now, after the message with this id."""


async def begin(
    visit: Visit, mode: str, policies: Sequence[str], how: Mapping[str, Any], goal: str | None = None, category: str | None = None
) -> Response:
    """Begin a conversation and go to its page."""
    arguments = (visit, mode, policies, how, goal, category)
    token = await visit.studio.database.do(_begin, *arguments)
    return visit.go(f"/{mode}/{token}", conversation=token)


def _begin(
    connection: Connection, visit: Visit, mode: str, policies: Sequence[str], how: Mapping[str, Any], goal: str | None,
    category: str | None,
) -> str:  # fmt: skip
    _check_allowed(connection, visit, ROW + len(how["system"]) + len(goal or ""))
    return conversations.create(
        connection, visit.me, mode, policies, how, visit.group.version, visit.now, goal=goal, category=category
    )


def _check_allowed(connection: Connection, visit: Visit, characters: int) -> None:
    """Check, in the transaction that stores this many characters, that the visitor may store them.

    Raises:
      Refused: the visitor was paused meanwhile, has gold items to judge first, or wrote too much today.
    """
    people.check_standing(connection, visit.me)
    screening.check_passed(connection, visit.me, visit.group)
    people.spend(connection, visit.me.id, characters, visit.studio.settings, visit.now)


async def answer(
    visit: Visit, conversation: Row, parent: int | None, text: str | None, check: Check = lambda *_: None
) -> Response:
    """Add what the visitor says, and stream the policies' answers.

    Args:
      text: None for other answers to ``parent``.
      check: raises if nothing may be added; called in the transaction that adds it, with the conversation as it is then.
    """
    policies = json.loads(conversation["policies"])
    seed = secrets.randbelow(SEEDS)
    replies = [(policy, seed + side) for side, policy in enumerate(policies)]
    asked, places = await visit.studio.database.do(_ask, visit, conversation, parent, text, replies, check)
    said = tuple(Message(each["role"], each["content"] or "") for each in conversations.path(visit.reader, asked))
    how = json.loads(conversation["how"])
    if how["system"]:
        said = (Message("system", how["system"]), *said)
    tickets: list[Ticket] = []
    try:
        for policy, each in replies:
            request = Request(policy, said, each, how["temperature"], how["max_tokens"])
            tickets.append(visit.studio.generator.submit(request))
    except Refused:
        for ticket in tickets:
            ticket.cancel()
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
    return visit.go(f"/{conversation['mode']}/{conversation['token']}", answers=answers)


def _ask(
    connection: Connection, visit: Visit, conversation: Row, parent: int | None, text: str | None,
    replies: Sequence[tuple[str, int]], check: Check,
) -> tuple[int, list[tuple[int, str]]]:  # fmt: skip
    limits = visit.studio.settings.limits
    now = conversations.conversation_of(connection, visit.me, conversation["token"], conversation["mode"])
    check(connection, now, parent)
    conversations.check_open(connection, now["id"])
    conversations.check_length(connection, now["id"], len(replies) + (text is not None), limits)
    conversations.check_pace(connection, visit.me.id, len(replies), limits.answers_per_minute, visit.now)
    _check_allowed(connection, visit, len(text or "") + ROW * (len(replies) + 1))
    return conversations.ask(connection, now, parent, text, replies, visit.now)


class _Writing:
    """Sends answers to one reader and stores them in the database."""

    def __init__(self, visit: Visit, messages: Sequence[int], tickets: Sequence[Ticket]):
        self.visit, self.messages, self.tickets = visit, messages, tickets
        self.states: dict[int, str] = {}

    async def events(self, tokens: Sequence[str]) -> AsyncIterator[str]:
        """Server-sent events. However the stream ends, what was written is stored."""
        try:
            yield _event("start", messages=list(tokens))
            async for side, piece in _even(_together(self.tickets), len(self.tickets)):
                if piece.ended is not None:
                    await self._keep(side, piece.ended)
                yield _said(side, piece, self.states)
        finally:
            self.stop()

    def stop(self) -> None:
        """Stop the answers if the reader has left. The writer's thread stores what came so far, whatever happens to this task."""
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
        return _event("end", side=side, text=visible(piece.text), state=states[side], reason=piece.reason)
    if piece.ahead is not None:
        return _event("wait", side=side, ahead=piece.ahead)
    return _event("piece", side=side, text=visible(piece.text)) if piece.text else ": alive\n\n"


async def _even(pieces: AsyncIterator[tuple[int, Piece]], count: int) -> AsyncIterator[tuple[int, Piece]]:
    """Yield the pieces of several answers in step, one of each at a time, and the longest of their waits. Otherwise a policy that
    is already loaded, in less demand or faster could be recognised by its speed."""
    waiting = [deque[Piece]() for _ in range(count)]
    over: set[int] = set()
    ahead: dict[int, int] = {}
    async for side, piece in pieces:
        if piece.ahead is not None:
            ahead[side] = piece.ahead
            if len(ahead) == count:
                yield 0, Piece(ahead=max(ahead.values()))
        elif not piece.text and piece.ended is None:
            yield 0, piece
        else:
            waiting[side].append(piece)
        while any(waiting) and all(each or side in over for side, each in enumerate(waiting)):
            for side, each in enumerate(waiting):
                if each:
                    over |= {side} if each[0].ended is not None else set()
                    yield side, each.popleft()


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
    """The last messages, with their alternatives and the feedback on them, but not their policies."""
    found = []
    for row in _last(conversations.path(visit.reader, conversation["head"]), visit.studio.settings.limits):
        tokens = conversations.siblings(visit.reader, row) if row["side"] is None else [row["token"]]
        found.append({
            "message": row["token"], "role": row["role"], "text": row["content"] or "", "state": row["state"],
            "alternatives": tokens, "number": tokens.index(row["token"]) if row["token"] in tokens else 0,
            "feedback": conversations.feedback_on(visit.reader, row["id"]) if row["role"] == "assistant" else None,
        })  # fmt: skip
    return found


def _last(rows: Sequence[Row], limits: LimitsConfig) -> Sequence[Row]:
    """The last messages, as many as the limits allow now: the conversation may have begun under higher limits."""
    shown, characters = list(rows[-limits.conversation_messages :]), 0
    for count, row in enumerate(reversed(shown)):
        characters += len(row["content"] or "")
        if count and characters > limits.conversation_characters + limits.text_characters:
            return shown[-count:]
    return shown


async def feedback(visit: Visit) -> Response:
    """Store feedback: ``thumb`` -1, 0 (none) or 1, ``likert`` 1 to 7, ``text``. Fields that are not sent stay as they were."""
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
    stored = await visit.studio.database.do(_give, visit, message["id"], given)
    data = {"feedback": stored, "message": visit.path("message")}
    if visit.request.headers.get("hx-request") and not visit.request.headers.get("hx-boosted"):
        return visit.show("feedback.html", data)
    return visit.go(f"/{message['mode']}/{message['token']}", **data)


def _give(connection: Connection, visit: Visit, message: int, given: Mapping[str, Any]) -> dict[str, Any]:
    (conversation,) = connection.execute("SELECT conversation FROM messages WHERE id = ?", (message,)).fetchone()
    conversations.check_open(connection, conversation)
    _check_allowed(connection, visit, len(given.get("text") or "") + ROW)
    return conversations.give_feedback(connection, visit.me, message, given, visit.now)


routes: list[Route] = [post("/feedback/{message}", feedback)]
