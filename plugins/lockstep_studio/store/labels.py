"""Labels. A stored label never changes: revisions add rows. Labels of gold items are marked; disagreements go to adjudicators."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from lockstep_studio.settings import GroupConfig, StudioConfig
from lockstep_studio.store import screening
from lockstep_studio.store.database import Connection, Row
from lockstep_studio.store.people import Person, Refused, check_standing, spend
from lockstep_studio.store.tasks import Lease, add_slot, add_task, end, lease_of, revive

SAME_ORDER = 0.5
"""A task goes to an adjudicator if two of its rankings have a lower `concordance`."""


@dataclass(frozen=True)
class Recorded:
    """A stored label. ``again``: the request only repeated a label that was stored before."""

    id: int
    lease: Lease
    revision: int
    content: Mapping[str, Any]
    again: bool


def record(
    connection: Connection,
    person: Person,
    token: str,
    revision: int,
    content: Mapping[str, Any],
    settings: StudioConfig,
    now: float,
) -> Recorded:
    """Store a label of the task that the person holds. The same request sent twice stores one label.

    Args:
      revision: 0 for the first label; one more for each change.
      content: what the mode's page read. ``ranks`` are in the order of the task's completions.

    Raises:
      Refused: the task was skipped or given to somebody else, the person has seen its names or what others chose, its round is
        closed, the revision is not the next, or the person was paused meanwhile or wrote too much today.
    """
    check_standing(connection, person)
    found = lease_of(connection, person, token)
    stored = connection.execute(
        "SELECT id, content FROM labels WHERE lease = ? AND revision = ?", (found.id, revision)
    ).fetchone()
    if stored is not None:
        return _repeated(found, stored, revision, content)
    last = connection.execute("SELECT max(revision) FROM labels WHERE lease = ?", (found.id,)).fetchone()[0]
    if revision != (0 if last is None else last + 1):
        raise Refused("Your answer was changed in another window meanwhile. Open the task again.")
    if last is None:
        _check_unadjudicated(connection, found)
        _take(connection, found, now)
    else:
        check_revisable(connection, found)
    group = settings.groups.get(found.group, GroupConfig())
    correct = None if found.gold is None or "ranks" not in content else concordance(content["ranks"], found.gold)
    written = json.dumps(content, ensure_ascii=False)
    spend(connection, person.id, len(written), settings, now)
    values = (
        found.id, found.task, person.id, found.group, found.mode, revision, written, group.version, _seconds(found.at, now),
        correct, now,
    )  # fmt: skip
    (number,) = connection.execute(
        "INSERT INTO labels (lease, task, person, grp, mode, revision, content, instructions, seconds, correct, at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
        values,
    ).fetchone()
    if correct is not None:
        screening.judge(connection, person, group)
    elif found.mode in ("compare", "rank"):
        _call_adjudicators(connection, found.task, settings)
    return Recorded(number, found, revision, content, False)


def _repeated(found: Lease, stored: Row, revision: int, content: Mapping[str, Any]) -> Recorded:
    before = json.loads(stored["content"] or "null")
    if before != json.loads(json.dumps(content)):
        raise Refused("You answered this task already, differently. The first answer stands; open the task to change it.")
    return Recorded(stored["id"], found, revision, content, True)


def _seconds(began: float, now: float) -> float:
    """The seconds from ``began`` to ``now``; 0 if the clock was set back meanwhile."""
    return round(max(0.0, now - began), 3)


def _check_unadjudicated(connection: Connection, found: Lease) -> None:
    """
    Raises:
      Refused: the person was given the task to adjudicate, and so has seen what others chose.
    """
    sql = "SELECT 1 FROM leases WHERE person = ? AND task = ? AND mode = 'adjudicate'"
    if found.mode in ("compare", "rank") and connection.execute(sql, (found.person, found.task)).fetchone():
        raise Refused("You have seen what others chose here, so your vote would not be your own. Skip this task.")


def _take(connection: Connection, found: Lease, now: float) -> None:
    """End a lease with a label."""
    if found.outcome in ("skipped", "closed"):
        raise Refused("You skipped this task." if found.outcome == "skipped" else "This round was closed meanwhile.", 410)
    if found.outcome == "expired":
        revive(connection, found, now)
        connection.execute("UPDATE leases SET outcome = 'labelled', ended = ? WHERE id = ?", (now, found.id))
    else:
        end(connection, found.id, "labelled", now)


def check_revisable(connection: Connection, found: Lease) -> None:
    """
    Raises:
      Refused: the person has seen who wrote what, or the round is closed.
    """
    if found.mode == "compare":
        raise Refused("You have seen who wrote what, so this vote stands.")
    frozen = connection.execute(
        "SELECT 1 FROM members JOIN labels ON labels.id = members.id WHERE kind = 'label' AND lease = ?", (found.id,)
    ).fetchone()
    if frozen is not None or found.outcome == "closed":
        raise Refused("This round is closed, so its labels stand.")


def record_at_once(
    connection: Connection, person: Person, row: Mapping[str, Any], mode: str, shown: Sequence[int], content: Mapping[str, Any],
    settings: StudioConfig, token: str, began: float, now: float,
) -> int:  # fmt: skip
    """Store a label of a task that the person made: a reply chosen in a conversation, or an answer to the person's own prompt. A
    ``token`` stores one label, however often it is sent. Returns the label's id.

    Raises:
      Refused: the person was paused meanwhile, has gold items to judge first, or wrote too much today.
    """
    check_standing(connection, person)
    stored = connection.execute(
        "SELECT labels.id FROM labels JOIN leases ON leases.id = lease WHERE token = ?", (token,)
    ).fetchone()
    if stored is not None:
        return int(stored["id"])
    group = settings.groups.get(person.group, GroupConfig())
    screening.check_passed(connection, person, group)
    written = json.dumps(content, ensure_ascii=False)
    spend(connection, person.id, len(written) + sum(len(each["content"]) for each in row["messages"]), settings, now)
    task = add_task(connection, row, mode, now, author=person.id)
    (lease,) = connection.execute(
        "INSERT INTO leases (token, task, person, grp, mode, shown, slot, at, expires, outcome, ended) "
        "VALUES (?, ?, ?, ?, ?, ?, 0, ?, ?, 'labelled', ?) RETURNING id",
        (token, task, person.id, person.group, mode, json.dumps(list(shown)), began, now, now),
    ).fetchone()
    values = (lease, task, person.id, person.group, mode, written, group.version, _seconds(began, now), now)
    (number,) = connection.execute(
        "INSERT INTO labels (lease, task, person, grp, mode, revision, content, instructions, seconds, at) "
        "VALUES (?, ?, ?, ?, ?, 0, ?, ?, ?, ?) RETURNING id",
        values,
    ).fetchone()
    return int(number)


def latest(connection: Connection, lease: int) -> Row | None:
    """The last revision of a lease's label."""
    found: Row | None = connection.execute(
        "SELECT * FROM labels WHERE lease = ? ORDER BY revision DESC LIMIT 1", (lease,)
    ).fetchone()
    return found


def content_of(label: Row) -> dict[str, Any]:
    """What was chosen or written; empty if it was removed."""
    content: dict[str, Any] = json.loads(label["content"] or "{}")
    return content


def last_lease(connection: Connection, person: int, mode: str) -> str | None:
    """The token of the task that the person labelled last, for undo."""
    row = connection.execute(
        "SELECT token FROM leases WHERE person = ? AND mode = ? AND outcome = 'labelled' ORDER BY id DESC LIMIT 1",
        (person, mode),
    ).fetchone()
    return None if row is None else str(row["token"])


def judgements(connection: Connection, task: int) -> list[tuple[int, list[int]]]:
    """(person, ranks) of a task: each person's last revision, without adjudicators' labels and removed ones."""
    rows = connection.execute(
        "SELECT person, content, max(revision) FROM labels "
        "WHERE task = ? AND mode IN ('compare', 'rank') AND content IS NOT NULL GROUP BY lease ORDER BY lease",
        (task,),
    )
    return [(row["person"], json.loads(row["content"])["ranks"]) for row in rows]


def concordance(ranks: Sequence[int], others: Sequence[int]) -> float:
    """The share of pairs of completions on which the rankings agree, ties included. A pair that only one ranking ties counts
    half."""
    pairs = list(combinations(range(len(others)), 2))
    signs = [[(r[i] > r[j]) - (r[i] < r[j]) for i, j in pairs] for r in (ranks, others)]
    return sum(1 - abs(one - two) / 2 for one, two in zip(*signs, strict=True)) / max(1, len(pairs))


def _call_adjudicators(connection: Connection, task: int, settings: StudioConfig) -> None:
    """Add slots for adjudicators if two judgements of a task disagree."""
    ranks = [each for _, each in judgements(connection, task)]
    if len(ranks) < 2 or min(concordance(one, two) for one, two in combinations(ranks, 2)) >= SAME_ORDER:
        return
    for name, group in settings.groups.items():
        if "adjudicate" in group.modes:
            add_slot(connection, task, name, "adjudicate", 1)
