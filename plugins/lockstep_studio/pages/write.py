"""Write: how the assistant should have answered, from scratch or by editing an answer; or one's own prompt with its answer."""

from __future__ import annotations

import re
import secrets
from typing import Any

from starlette.responses import Response

from lockstep.text.visible import visible
from lockstep_studio.pages.compare import answers
from lockstep_studio.pages.visit import Visit, get, post
from lockstep_studio.store import labels
from lockstep_studio.store.people import Refused
from lockstep_studio.store.tasks import Lease

TEMPLATE = "write.html"
MOST_ONCE = 200


def view(visit: Visit, lease: Lease) -> dict[str, Any]:
    """Show the task. ``place`` in the URL starts from that answer, to be edited. A revision starts from what was written."""
    shown, chosen = answers(lease), visit.request.query_params.get("place", "")
    place = int(chosen) if re.fullmatch("[0-9]{1,3}", chosen) and int(chosen) < len(shown) else None
    last = labels.latest(visit.reader, lease.id)
    text = labels.content_of(last).get("response", "") if last is not None else "" if place is None else shown[place]["text"]
    return {"answers": shown, "place": place, "text": text}


def read(visit: Visit, lease: Lease) -> dict[str, Any]:
    place = visit.optional("place", 0, len(lease.shown) - 1)
    mended = None if place is None else lease.shown[place]
    response = visit.text("response")
    if mended is not None and visible(response) == visible(lease.completions[mended].strip()):
        raise Refused("This is the answer as it was. Mend it, or skip the task.", 400)
    return {"response": response, "mended": mended}


async def own(visit: Visit) -> Response:
    form = f"own-{visit.me.id}-{visit.now:.0f}-{secrets.token_hex(16)}"
    return visit.show("write_own.html", {"mode": "write", "once": visit.studio.keys.sign(form, "form")})


async def keep_own(visit: Visit) -> Response:
    """Store a prompt of one's own with its answer. ``once`` is the signed name of the form, so that the form is stored once; it
    also says for whom and when the form was opened."""
    prompt, response = visit.text("prompt"), visit.text("response")
    form = visit.studio.keys.unsign(visit.text("once", most=MOST_ONCE), "form") or "own-0-0-"
    _, person, began, _ = form.split("-")
    if int(person) != visit.me.id:
        raise Refused("This form is too old. Open it again, and copy what you wrote.", 400)
    row = {"id": form, "messages": [{"role": "user", "content": prompt}], "completions": []}
    await visit.studio.database.do(
        labels.record_at_once, visit.me, row, "write", (), {"response": response, "mended": None}, visit.studio.settings,
        form, float(began), visit.now,
    )  # fmt: skip
    return visit.go("/write/own", saved=0)


routes = [get("/write/own", own), post("/write/own", keep_own)]
