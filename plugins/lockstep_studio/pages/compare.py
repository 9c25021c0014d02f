"""Compare: answers side by side, in an order drawn for this person. The vote: better, tie or both bad. Names follow the vote."""

from __future__ import annotations

import json
from typing import Any

from lockstep_studio.pages.visit import Visit
from lockstep_studio.store.people import Refused
from lockstep_studio.store.tasks import Lease

TEMPLATE = "compare.html"
TIE, BAD = "tie", "bad"


def view(visit: Visit, lease: Lease) -> dict[str, Any]:
    return {"answers": answers(lease)}


def answers(lease: Lease) -> list[dict[str, Any]]:
    """The completions by their place on the screen, and nothing else about them."""
    return [{"place": place, "text": lease.completions[index]} for place, index in enumerate(lease.shown)]


def read(visit: Visit, lease: Lease) -> dict[str, Any]:
    """Read the vote: ``choice`` is a place on the screen, 'tie' or 'bad'. All answers but the chosen one tie."""
    choice = visit.first("choice")
    if choice not in (TIE, BAD):
        choice = visit.integer("choice", 0, len(lease.shown) - 1)
    best = None if choice in (TIE, BAD) else lease.shown[choice]
    ranks = [0 if best in (None, index) else 1 for index in range(len(lease.completions))]
    return {"ranks": ranks, "both_bad": choice == BAD, "blind": is_blind(visit, lease)}


def is_blind(visit: Visit, lease: Lease) -> bool:
    """False if an answer contains a word that gives a policy away."""
    return not any(name in text.lower() for text in lease.completions for name in visit.studio.names())


def names(lease: Lease) -> list[str | None]:
    """Who wrote the answers, by their place on the screen."""
    return [lease.policies[index] if lease.policies else None for index in lease.shown]


def revealed(lease: Lease, content: str | None) -> dict[str, Any]:
    given = json.loads(content) if content else None
    if given is None:
        raise Refused("This vote was removed.", 410)
    best = [given["ranks"][index] == 0 for index in lease.shown]
    said = "both bad" if given["both_bad"] else "tie" if all(best) else "better"
    shown = [
        {**answer, "name": name, "best": each} for answer, name, each in zip(answers(lease), names(lease), best, strict=True)
    ]
    return {"mode": "compare", "messages": lease.messages, "answers": shown, "said": said}
