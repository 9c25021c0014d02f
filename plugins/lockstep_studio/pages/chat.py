"""Chat: several conversations with any policy, answers streamed; regenerate, edit, stop; feedback on each turn."""

from __future__ import annotations

import json
from typing import Any

import anyio
from starlette.responses import Response

from lockstep_studio.pages import talk
from lockstep_studio.pages.visit import Forbidden, Visit, get, post
from lockstep_studio.store import conversations
from lockstep_studio.store.people import Refused

MOST_TOKENS = 8192


async def overview(visit: Visit) -> Response:
    return visit.show("chat.html", {"conversation": None, "thread": [], "closed": False, **_around(visit)})


async def begin(visit: Visit) -> Response:
    """Begin a conversation. ``policy``, ``system``, ``temperature`` and ``max_tokens`` may be sent if the operator allows it."""
    how, policy = _how(visit), _policy(visit)
    return await talk.begin(visit, "chat", [policy], how)


async def conversation(visit: Visit) -> Response:
    row = conversations.conversation_of(visit.reader, visit.me, visit.path("conversation"), "chat")
    named = "policy" in visit.studio.settings.chat.allowed
    data = {
        "conversation": row["token"], "how": json.loads(row["how"]), "policy": json.loads(row["policies"])[0] if named else None,
        "closed": conversations.is_closed(visit.reader, row["id"]),
    }  # fmt: skip
    return await anyio.to_thread.run_sync(  # a long page does not hold up the others
        lambda: visit.show("chat.html", {**_around(visit), **data, "thread": talk.thread(visit, row)})
    )


async def say(visit: Visit) -> Response:
    row = conversations.conversation_of(visit.reader, visit.me, visit.path("conversation"), "chat")
    return await talk.answer(visit, row, row["head"], visit.text("text"))


async def again(visit: Visit) -> Response:
    """Draw another answer, an alternative to ``message``."""
    row = conversations.conversation_of(visit.reader, visit.me, visit.path("conversation"), "chat")
    message = conversations.message_of(visit.reader, row, visit.text("message"))
    if message["role"] != "assistant":
        raise Refused("Only an answer can be drawn again.", 400)
    return await talk.answer(visit, row, message["parent"], None)


async def edit(visit: Visit) -> Response:
    """Add another wording of ``message``, which begins a branch."""
    row = conversations.conversation_of(visit.reader, visit.me, visit.path("conversation"), "chat")
    message = conversations.message_of(visit.reader, row, visit.text("message"))
    if message["role"] != "user":
        raise Refused("Only your own messages can be edited. To say what an answer should have been, write a demonstration.", 400)
    return await talk.answer(visit, row, message["parent"], visit.text("text"))


async def branch(visit: Visit) -> Response:
    """Show the branch of ``message``."""
    row = conversations.conversation_of(visit.reader, visit.me, visit.path("conversation"), "chat")
    message = conversations.message_of(visit.reader, row, visit.text("message"))
    head = conversations.leaf(visit.reader, message)
    await visit.studio.database.do(conversations.set_head, row["id"], head)
    return visit.go(f"/chat/{row['token']}")


def _around(visit: Visit) -> dict[str, Any]:
    """The data around the thread: other conversations, and what a new one may choose."""
    listed = [dict(row) for row in conversations.listed(visit.reader, visit.me, "chat")]
    chat = visit.studio.settings.chat
    policies = list(visit.studio.policies) if "policy" in chat.allowed else []
    allowed = list(chat.allowed)
    return {"conversations": listed, "policies": policies, "allowed": allowed, "how": talk.sampling(visit), "policy": None}


def _policy(visit: Visit) -> str:
    chosen = visit.text("policy", required=False)
    if not chosen:
        return (
            next(iter(visit.studio.policies), "")
            if "policy" in visit.studio.settings.chat.allowed and visit.studio.policies
            else (visit.studio.draw_policies(1)[0])
        )
    _check_allowed(visit, "policy")
    if chosen not in visit.studio.policies:
        raise Refused(f"There is no policy {chosen!r} here. Policies: {', '.join(visit.studio.policies)}.", 400)
    return chosen


def _how(visit: Visit) -> dict[str, Any]:
    how = talk.sampling(visit)
    if system := visit.text("system", required=False):
        how["system"] = _allowed(visit, "system", system)
    if (most := visit.optional("max_tokens", 1, MOST_TOKENS)) is not None:
        how["max_tokens"] = _allowed(visit, "max_tokens", most)
    if given := visit.first("temperature"):
        how["temperature"] = _allowed(visit, "temperature", _temperature(given))
    return how


def _temperature(given: Any) -> float:
    try:
        value = float(given)
    except (TypeError, ValueError, OverflowError):
        value = -1.0
    if not 0 <= value <= 5:
        raise Refused("temperature should be a number from 0 to 5.", 400)
    return value


def _allowed(visit: Visit, name: str, value: Any) -> Any:
    """The value, if it is the default or labelers may change it; otherwise raises `Forbidden`."""
    if value != getattr(visit.studio.settings.chat, name):
        _check_allowed(visit, name)
    return value


def _check_allowed(visit: Visit, name: str) -> None:
    if name not in visit.studio.settings.chat.allowed:
        raise Forbidden(f"The operator does not allow a {name} of your own: chat.allowed in studio.yaml.")


routes = [
    get("/chat", overview),
    post("/chat", begin),
    get("/chat/{conversation}", conversation),
    post("/chat/{conversation}/say", say),
    post("/chat/{conversation}/again", again),
    post("/chat/{conversation}/edit", edit),
    post("/chat/{conversation}/branch", branch),
    *talk.routes,
]
