"""Gold items. New members judge some before anything else, and all members get some unannounced. A skipped item counts as wrong;
otherwise whoever recognises a gold item could skip it."""

from __future__ import annotations

from lockstep.errors import listing
from lockstep_studio.settings import MODES, GroupConfig
from lockstep_studio.store.database import Connection
from lockstep_studio.store.people import Person, Refused, set_standing

DONE = "outcome IN ('labelled', 'skipped')"


def marks(connection: Connection, person: int) -> list[float]:
    """The mark of each gold item that the person has labelled or skipped, in order: its concordance with the gold ranks, from 1
    (right) to 0 (wrong); 0 if skipped."""
    rows = connection.execute(
        "SELECT ifnull(correct, 0) AS mark FROM leases JOIN tasks ON tasks.id = leases.task "
        "LEFT JOIN labels ON labels.lease = leases.id AND revision = 0 "
        f"WHERE leases.person = ? AND gold IS NOT NULL AND {DONE} ORDER BY ended, leases.id",
        (person,),
    )
    return [row["mark"] for row in rows]


def left(connection: Connection, person: int, group: GroupConfig) -> int:
    """The number of gold items that the person still has to judge before anything else."""
    return max(0, group.screening - len(marks(connection, person))) if group.screening else 0


def check_passed(connection: Connection, person: Person, group: GroupConfig) -> None:
    """
    Raises:
      Refused: the person has gold items to judge first.
    """
    if not (first := left(connection, person.id, group)):
        return
    rows = connection.execute(f"SELECT DISTINCT mode FROM tasks WHERE {NEW_GOLD}", (person.id,)).fetchall()
    if not rows:
        raise Refused(f"Your first tasks have run out: {first} are missing. Tell the operator, who has to add some.", 403)
    where = listing(MODES[row["mode"]] for row in rows)
    raise Refused(f"Your first {first} {'task is' if first == 1 else 'tasks are'} in {where}. Then comes all else.", 403)


CURRENT = "gold IS NOT NULL AND source IN (SELECT id FROM sources WHERE kind = 'gold' AND round IS NULL)"
"""The condition for gold items of the file that is configured now."""
NEW_GOLD = f"{CURRENT} AND NOT EXISTS (SELECT 1 FROM leases WHERE leases.task = tasks.id AND person = ? AND {DONE})"
"""The condition for gold items that are new to a person. An item whose lease expired comes again."""


def judge(connection: Connection, person: Person, group: GroupConfig) -> None:
    """Screen out, or pause, a person who judges too many gold items wrongly."""
    found = marks(connection, person.id)
    if len(found) == group.screening and sum(found) / len(found) < group.screening_accuracy:
        set_standing(connection, person.id, "screened out")
    recent = found[group.screening :][-group.checks_window :]
    if len(recent) == group.checks_window and sum(recent) / len(recent) < group.checks_accuracy:
        set_standing(connection, person.id, "paused")
