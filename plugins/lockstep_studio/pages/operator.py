"""The operator's page: progress, people, agreement, the next round; invitations, held-back text, closing, backup, audit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import anyio
from starlette.responses import Response, StreamingResponse

from lockstep.errors import DataError, LockstepError
from lockstep.storage.files import dump_line
from lockstep_studio.pages.visit import Visit, get, post
from lockstep_studio.science import bradley_terry, rankings
from lockstep_studio.science.bradley_terry import Game
from lockstep_studio.settings import group_named
from lockstep_studio.store import people, privacy, report, rounds
from lockstep_studio.store.against import add_comparisons
from lockstep_studio.store.people import Refused
from lockstep_studio.studio import Studio

DRAWS = 200
"""Bootstrap resamples for the intervals on the page."""
MOST_USES, MOST_HOURS = 10_000, 24 * 365
MOST_COMPARISONS = 20_000
"""How many of the newest comparisons the page uses for agreement and strengths."""
MOST_JUDGED = 4_000
"""How many of the newest comparisons the page uses for agreement on ratings and flags, which each take a bootstrap."""


async def overview(visit: Visit) -> Response:
    data = await anyio.to_thread.run_sync(_overview, visit.studio, visit.now)
    return visit.show("operator.html", data)


async def live(visit: Visit) -> Response:
    """The part of the page that changes by the second."""
    return visit.show("operator_live.html", _live(visit.studio, visit.now))


def _live(studio: Studio, now: float) -> dict[str, Any]:
    return {
        "throughput": report.throughput(studio.database.reader, now),
        "load": studio.generator.load,
        "problem": studio.problem,
    }


def _overview(studio: Studio, now: float) -> dict[str, Any]:
    studio.find_personal_data()
    reader = studio.database.reader
    comparisons = rounds.pending(reader)[-MOST_COMPARISONS:]
    games = list(bradley_terry.games(comparisons))
    strengths, untold = _strengths(games)
    return {
        **_live(studio, now), "sources": report.sources(reader), "people": report.people(reader), "rounds": report.rounds(reader),
        "next": rounds.waiting(reader), "held": list(privacy.held_back(reader)), "groups": list(studio.settings.groups),
        "agreement": _agreement(comparisons), "strengths": strengths, "untold": untold if games else "",
        "adjusted": _strengths(games, bradley_terry.COVARIATES)[0], "policies": list(studio.policies),
        "suggested": f"round-{len(report.rounds(reader)) + 1}", "link": None,
        "invitations": people.invitations(reader, now), "operators": report.operators(reader),
    }  # fmt: skip


def _agreement(comparisons: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Agreement on preferences, ratings and each flag, over tasks that two people or more of a group labelled: {"group", "what",
    "items", and "raw", "kappa", "alpha": [value, low, high]}."""
    found: list[dict[str, Any]] = []
    own = [row for row in comparisons if not row["adjudicated"]]
    judged = own[-MOST_JUDGED:]
    about = {rankings.PREFERENCES: own, **dict.fromkeys((rankings.RATINGS, *rankings.flag_names(judged)), judged)}
    for what, rows in about.items() if own else ():
        try:
            measured = rankings.by_group(rows, what, draws=DRAWS)
        except DataError:
            continue
        found += [
            {"group": group, "what": what, "items": items, **{name: _numbers(each[name]) for name in ("raw", "kappa", "alpha")}}
            for group, each in measured.items() if (items := each["items"])
        ]  # fmt: skip
    return found


def _strengths(games: Sequence[Game], covariates: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """({policy: [value, low, high]}, ''): Bradley-Terry log-odds, and the coefficients of the covariates, for which the strengths
    are adjusted. If they cannot be estimated, ({}, the reason)."""
    clustered = len({game.labeler for game in games}) > 1
    try:
        fit = bradley_terry.fit(games, covariates=covariates)
        found = fit.strengths(clustered) | {name: each for name, each in fit.effects(clustered).items() if name in covariates}
    except (LockstepError, ValueError, ArithmeticError) as error:
        return {}, str(error)
    return {name: _numbers(each) for name, each in found.items()}, ""


def _numbers(interval: Any) -> list[float | None]:
    return [None if each != each else round(float(each), 4) for each in (interval.value, interval.low, interval.high)]


async def invite(visit: Visit) -> Response:
    """Make a link for ``uses`` people of a ``group``, valid for ``hours``; the group 'operators' makes operators."""
    group = visit.text("group")
    uses, hours = visit.integer("uses", 1, MOST_USES), visit.integer("hours", 1, MOST_HOURS)
    role = "operator" if group == people.OPERATORS else "labeler"
    if role == "labeler":
        group_named(visit.studio.settings, group)
    token = await visit.studio.database.do(people.invite, role, group, uses, float(hours), visit.now)
    scheme = "https" if visit.studio.settings.https else visit.request.url.scheme
    link = f"{scheme}://{visit.request.headers['host']}/join/{token}"
    if visit.by_machine:
        return visit.show("operator.html", {"link": link})
    data = await anyio.to_thread.run_sync(_overview, visit.studio, visit.now)
    return visit.show("operator.html", {**data, "link": link})


async def revoke(visit: Visit) -> Response:
    """Revoke an ``invitation``, or an ``operator`` other than the visitor."""
    if invitation := visit.text("invitation", required=False):
        await visit.studio.database.do(people.revoke_invitation, invitation)
        return visit.go("/operator")
    operator = visit.integer("operator", 1, 2**62)
    if operator == visit.me.id:
        raise Refused("You cannot revoke yourself. Another operator can.", 400)
    await visit.studio.database.do(people.revoke_operator, operator)
    return visit.go("/operator")


async def close(visit: Visit) -> Response:
    """Close the round ``name``."""
    record = await anyio.to_thread.run_sync(_close, visit.studio, visit.text("name"), visit.now)
    return visit.go("/operator", closed=record)


def _close(studio: Studio, name: str, now: float) -> dict[str, Any]:
    studio.find_personal_data()
    return rounds.close(studio.database, studio.folder, name, now)


async def check(visit: Visit) -> Response:
    """Read the files of the closed round ``name`` again and compare their hashes."""
    name = visit.text("name")
    if name not in {each["name"] for each in report.rounds(visit.reader)}:
        raise Refused(f"There is no round {name!r}.", 404)
    await anyio.to_thread.run_sync(rounds.verify, visit.studio.folder, name)
    return visit.go("/operator", intact=True)


async def decide(visit: Visit) -> Response:
    """Decide on a text with personal data: ``decision`` is release or withhold."""
    kind, decision = visit.text("kind"), visit.text("decision")
    if decision not in ("release", "withhold") or kind not in privacy.TEXTS:
        raise Refused("The decision should be release or withhold.", 400)
    await visit.studio.database.do(privacy.decide, kind, visit.integer("id", 1, 2**62), decision, visit.now)
    return visit.go("/operator")


async def stand(visit: Visit) -> Response:
    """Pause or restore a person, or remove their work on request: ``act`` is pause, restore or remove."""
    person, act = visit.integer("person", 1, 2**62), visit.text("act")
    row = visit.reader.execute("SELECT role FROM people WHERE id = ?", (person,)).fetchone()
    if row is None or row["role"] != "labeler" or act not in ("pause", "restore", "remove"):
        raise Refused("There is no such labeler, or nothing of the kind to do.", 400)
    if act == "remove":
        return visit.go("/operator", **await visit.studio.remove(person))
    await visit.studio.database.do(people.set_standing, person, "paused" if act == "pause" else "active")
    return visit.go("/operator")


async def against(visit: Visit) -> Response:
    """Let people compare the written demonstrations with policies' answers."""
    await anyio.to_thread.run_sync(visit.studio.find_personal_data)
    new = await visit.studio.database.do(add_comparisons, visit.studio.settings, visit.now)
    return visit.go("/operator", new=new)


async def scan(visit: Visit) -> Response:
    new = await anyio.to_thread.run_sync(visit.studio.scan)
    return visit.go("/operator", new=new)


async def backup(visit: Visit) -> Response:
    name = time.strftime("%Y%m%d-%H%M%S.sqlite3", time.gmtime(visit.now))
    path = await anyio.to_thread.run_sync(visit.studio.database.backup, visit.studio.folder / "backups" / name)
    return visit.go("/operator", backup=path.name)


async def audit(visit: Visit) -> Response:
    """Everything about every label, as JSON lines. Free text is searched for personal data before it leaves."""
    await anyio.to_thread.run_sync(visit.studio.find_personal_data)
    headers = {"content-disposition": 'attachment; filename="audit.jsonl"', "cache-control": "no-store"}
    return StreamingResponse(_lines(visit.studio), media_type="application/jsonl", headers=headers)


def _lines(studio: Studio) -> Iterator[str]:
    """The lines of the audit. Each step uses the connection of the thread that runs it; rows come in chunks, so no query stays
    open between steps."""
    for row in report.audit(lambda: studio.database.reader):
        yield dump_line(row)


async def settings(visit: Visit) -> Response:
    """The settings in force, as a page or for a machine."""
    return visit.show("settings.html", {"settings": json.loads(json.dumps(visit.studio.settings, default=_plain))})


def _plain(value: Any) -> Any:
    return vars(value) if hasattr(value, "__dict__") else dict(value)


routes = [
    get("/operator", overview, "operator"),
    get("/operator/live", live, "operator"),
    get("/operator/settings", settings, "operator"),
    get("/operator/audit.jsonl", audit, "operator"),
    post("/operator/invite", invite, "operator"),
    post("/operator/revoke", revoke, "operator"),
    post("/operator/close", close, "operator"),
    post("/operator/check", check, "operator"),
    post("/operator/decide", decide, "operator"),
    post("/operator/person", stand, "operator"),
    post("/operator/scan", scan, "operator"),
    post("/operator/against", against, "operator"),
    post("/operator/backup", backup, "operator"),
]
