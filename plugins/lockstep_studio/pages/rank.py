"""Rank, as for InstructGPT (Ouyang et al. 2022, arXiv 2203.02155, figure 12 and table 3): each answer is judged alone, from 1 to
7 and with eleven labels, before all are ranked, ties included."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from lockstep_studio.pages.compare import answers, is_blind
from lockstep_studio.pages.visit import Visit, post
from lockstep_studio.store import labels, tasks
from lockstep_studio.store.people import Refused, check_standing
from lockstep_studio.store.tasks import Lease

TEMPLATE = "rank.html"
BEST = 7
FLAGS = {
    "fails_instruction": "Does not do what was asked",
    "inappropriate": "Unsuitable for an assistant that serves customers",
    "hallucination": "Invents facts",
    "satisfies_constraint": "Keeps to a constraint in the instruction",
    "sexual": "Sexual content",
    "violent": "Violent content",
    "encourages_harm": "Encourages violence, abuse or self-harm",
    "denigrates": "Puts a group of people down",
    "harmful_advice": "Gives harmful advice",
    "opinion": "Gives an opinion",
    "moral_judgement": "Judges morally",
}
"""The eleven labels. ``satisfies_constraint`` is the only desirable one."""


def view(visit: Visit, lease: Lease) -> dict[str, Any]:
    """Show the first answer without a judgement, alone; all of them once each has one. ``place`` in the URL goes back to one."""
    judged = _judged(lease)
    back = visit.request.query_params.get("place", "")
    missing = [place for place in range(len(lease.shown)) if str(place) not in judged]
    place = int(back) if back in judged else missing[0] if missing else None
    everything = {"of": len(lease.shown), "flags": FLAGS, "best": BEST, "given": _given(visit, lease)}
    if visit.studio.settings.judge_alone and place is not None:
        return {**everything, "step": "judge", "answers": [answers(lease)[place]], "before": judged.get(str(place))}
    return {**everything, "step": "rank", "answers": [{**a, "judged": judged.get(str(a["place"]))} for a in answers(lease)]}


def _judged(lease: Lease) -> dict[str, Any]:
    judged: dict[str, Any] = lease.draft.get("judged", {})
    return judged


def _given(visit: Visit, lease: Lease) -> list[int] | None:
    """The ranks of the label to be changed, from 1, by place on the screen; None without a label."""
    last = labels.latest(visit.reader, lease.id)
    ranks = None if last is None else labels.content_of(last).get("ranks")
    return None if ranks is None else [ranks[index] + 1 for index in lease.shown]


async def judge(visit: Visit) -> Response:
    """Store the judgement of one answer alone: ``place``, ``rating`` and ``flags``."""
    lease = tasks.lease_of(visit.reader, visit.me, visit.path("token"))
    place, rating = visit.integer("place", 0, len(lease.shown) - 1), visit.integer("rating", 1, BEST)
    flags = visit.many("flags")
    if unknown := [flag for flag in flags if not isinstance(flag, str) or flag not in FLAGS]:
        raise Refused(f"There is no label {unknown[0]!r}. Labels: {', '.join(FLAGS)}.", 400)
    await visit.studio.database.do(_keep, lease, str(place), {"rating": rating, "flags": sorted({*flags})}, visit)
    return visit.go(f"/{lease.mode}" if lease.outcome is None else f"/lease/{lease.token}")


def _keep(connection: tasks.Connection, lease: Lease, place: str, given: dict[str, Any], visit: Visit) -> None:
    check_standing(connection, visit.me)
    now = tasks.lease_of(connection, visit.me, lease.token)
    tasks.keep_draft(connection, now, {"judged": {**_judged(now), place: given}})
    tasks.renew(connection, now, visit.studio.settings, visit.now)


def read(visit: Visit, lease: Lease) -> dict[str, Any]:
    """Read ``ranks``, by place on the screen: 1 is best, equal numbers tie. A form sends ``rank-0``, ``rank-1``, ..."""
    judged = _judged(lease)
    if visit.studio.settings.judge_alone and len(judged) < len(lease.shown):
        raise Refused("Judge each answer alone first.")
    return {"ranks": read_ranks(visit, lease), **_ratings(lease, judged), "blind": is_blind(visit, lease)}


def read_ranks(visit: Visit, lease: Lease) -> list[int]:
    """The ranks sent, in the order of the completions, from 0 without gaps."""
    count = len(lease.shown)
    given = visit.many("ranks") or [visit.optional(f"rank-{place}", 1, count) for place in range(count)]
    if len(given) != count or not all(isinstance(each, int) and not isinstance(each, bool) for each in given):
        raise Refused(f"Give each of the {count} answers a rank.", 400)
    return by_completion(lease, dense(given))


def dense(ranks: list[int]) -> list[int]:
    """The ranks from 0 without gaps: 1, 3, 3 -> 0, 1, 1."""
    order = sorted({*ranks})
    return [order.index(rank) for rank in ranks]


def by_completion(lease: Lease, by_place: list[Any]) -> list[Any]:
    """Reorder values from the order on the screen to that of the completions."""
    return [by_place[lease.shown.index(index)] for index in range(len(by_place))]


def _ratings(lease: Lease, judged: dict[str, Any]) -> dict[str, Any]:
    """The ratings and flags of all answers, or nothing: without ``judge_alone`` some may be missing."""
    if len(judged) < len(lease.shown):
        return {}
    each = by_completion(lease, [judged[str(place)] for place in range(len(lease.shown))])
    return {"ratings": [one["rating"] for one in each], "flags": [one["flags"] for one in each]}


routes = [post("/lease/{token}/judge", judge)]
