"""Write: how the assistant should have answered, from nothing or by mending an answer; or an own prompt with its answer."""

from __future__ import annotations

import secrets
from typing import Any

from starlette.responses import Response

from lockstep_studio.pages.compare import answers
from lockstep_studio.pages.visit import Visit, get, post
from lockstep_studio.store import labels
from lockstep_studio.store.people import Refused
from lockstep_studio.store.tasks import Lease

TEMPLATE = "write.html"


def view(visit: Visit, lease: Lease) -> dict[str, Any]:
    """``place`` in the address begins with that answer, to be mended. A changed mind begins with what was written."""
    shown, chosen = answers(lease), visit.request.query_params.get("place", "")
    place = int(chosen) if chosen.isdigit() and int(chosen) < len(shown) else None
    last = labels.latest(visit.reader, lease.id)
    text = labels.content_of(last).get("response", "") if last is not None else "" if place is None else shown[place]["text"]
    return {"answers": shown, "place": place, "text": text}


def read(visit: Visit, lease: Lease) -> dict[str, Any]:
    place = visit.optional("place", 0, len(lease.shown) - 1)
    mended = None if place is None else lease.shown[place]
    response = visit.text("response")
    if mended is not None and response == lease.completions[mended].strip():
        raise Refused("This is the answer as it was. Mend it, or skip the task.", 400)
    return {"response": response, "mended": mended}


async def own(visit: Visit) -> Response:
    return visit.show("write_own.html", {"mode": "write", "once": f"{visit.now:.0f}-{secrets.token_urlsafe(16)}"})


async def keep_own(visit: Visit) -> Response:
    """A prompt of one's own with its answer. ``once`` names the form, so that it is stored once, and says when it was opened."""
    prompt, response, once = visit.text("prompt"), visit.text("response"), visit.text("once", most=64)
    row = {"id": once, "messages": [{"role": "user", "content": prompt}], "completions": []}
    opened = once.partition("-")[0]
    began = min(visit.now, float(opened)) if opened.isdigit() else visit.now
    await visit.studio.database.do(
        labels.record_at_once, visit.me, row, "write", (), {"response": response, "mended": None}, visit.studio.settings,
        f"own-{visit.me.id}-{once}", began, visit.now,
    )  # fmt: skip
    return visit.go("/write/own", saved=0)


routes = [get("/write/own", own), post("/write/own", keep_own)]
