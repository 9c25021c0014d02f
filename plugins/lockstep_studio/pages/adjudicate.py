"""Adjudicate: two people ordered the same answers differently; a third, who knows both orders, decides."""

from __future__ import annotations

from typing import Any

from lockstep_studio.pages.compare import answers, is_blind
from lockstep_studio.pages.rank import read_ranks
from lockstep_studio.pages.visit import Visit
from lockstep_studio.store import labels
from lockstep_studio.store.tasks import Lease

TEMPLATE = "adjudicate.html"


def view(visit: Visit, lease: Lease) -> dict[str, Any]:
    """Show each answer with the ranks that it got, from 1. The judges are columns without names."""
    given = [ranks for _, ranks in labels.judgements(visit.reader, lease.task)]
    shown = [{**each, "ranks": [ranks[lease.shown[each["place"]]] + 1 for ranks in given]} for each in answers(lease)]
    return {"answers": shown, "judges": len(given), "of": len(shown), "given": None}


def read(visit: Visit, lease: Lease) -> dict[str, Any]:
    return {"ranks": read_ranks(visit, lease), "blind": is_blind(visit, lease)}
