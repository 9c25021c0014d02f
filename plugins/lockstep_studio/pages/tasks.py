"""Code that prepared tasks share: leasing, labelling, skipping, revising."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from starlette.responses import Response
from starlette.routing import Route

from lockstep_studio.pages import adjudicate, compare, rank, write
from lockstep_studio.pages.visit import Visit, get, post
from lockstep_studio.store import labels, tasks
from lockstep_studio.store.people import Refused
from lockstep_studio.store.tasks import Lease

REASONS = ("unclear", "personal", "harmful", "other")
"""Why a task may be skipped."""


class Mode(Protocol):
    """A module of this folder that shows a mode's tasks and reads the answers."""

    TEMPLATE: str

    def view(self, visit: Visit, lease: Lease) -> dict[str, Any]: ...

    def read(self, visit: Visit, lease: Lease) -> dict[str, Any]: ...


ALL: Mapping[str, Mode] = {"compare": compare, "rank": rank, "write": write, "adjudicate": adjudicate}


def next_task(mode: str) -> Route:
    async def show(visit: Visit) -> Response:
        lease = tasks.held(visit.reader, visit.me.id, mode, visit.now)
        lease = lease or await visit.studio.database.do(tasks.lease, visit.me, mode, visit.studio.settings, visit.now)
        if lease is None:
            return visit.show("none_left.html", {"mode": mode, "lease": None, **_progress(visit, mode)})
        return _task(visit, lease, 0)

    return get(f"/{mode}", show)


def _task(visit: Visit, lease: Lease, revision: int) -> Response:
    view = ALL[lease.mode].view(visit, lease)
    common = {"mode": lease.mode, "lease": lease.token, "revision": revision, "messages": lease.messages, "reasons": REASONS}
    return visit.show(ALL[lease.mode].TEMPLATE, {**common, **_progress(visit, lease.mode), **view})


def _progress(visit: Visit, mode: str) -> dict[str, Any]:
    done, _ = tasks.progress(visit.reader, visit.me).get(mode, (0, 0))
    undo = labels.last_lease(visit.reader, visit.me.id, mode) if mode != "compare" else None
    return {"done": done, "undo": undo}


async def label(visit: Visit) -> Response:
    lease = tasks.lease_of(visit.reader, visit.me, visit.path("token"))
    content = ALL[lease.mode].read(visit, lease)
    revision = visit.optional("revision", 0, 1000) or 0
    recorded = await visit.studio.database.do(
        labels.record, visit.me, lease.token, revision, content, visit.studio.settings, visit.now
    )
    if lease.mode == "compare":
        return visit.go(f"/lease/{lease.token}", saved=recorded.revision, names=compare.names(lease))
    return visit.go(f"/{lease.mode}", saved=recorded.revision)


async def again(visit: Visit) -> Response:
    """Show a task that the visitor labelled: to change the label, or after a comparison to see the names."""
    lease = tasks.lease_of(visit.reader, visit.me, visit.path("token"))
    last = labels.latest(visit.reader, lease.id)
    if last is None:
        return visit.go(f"/{lease.mode}")
    if lease.mode == "compare":
        return visit.show("names.html", compare.revealed(lease, last["content"]))
    labels.check_revisable(visit.reader, lease)
    return _task(visit, lease, last["revision"] + 1)


async def skip(visit: Visit) -> Response:
    lease = tasks.lease_of(visit.reader, visit.me, visit.path("token"))
    reason = visit.text("reason", required=False) or REASONS[0]
    if reason not in REASONS:
        raise Refused(f"The reason should be one of {', '.join(REASONS)}.", 400)
    await visit.studio.database.do(tasks.skip, visit.me, lease.token, reason, visit.studio.settings, visit.now)
    return visit.go(f"/{lease.mode}")


routes = [
    *(next_task(mode) for mode in ALL),
    post("/lease/{token}", label),
    get("/lease/{token}", again),
    post("/lease/{token}/skip", skip),
    *rank.routes,
    *write.routes,
]
