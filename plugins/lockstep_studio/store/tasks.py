"""Tasks and their leases. The database hands out tasks: a lease takes a slot of a task in the same transaction that finds the
task, so two people hold one task only if several labels of it are wanted. A lease that expires frees its slot.

A slot is the entry of a task for one group and mode: ``wanted`` labels, of which ``taken`` are given or being given.
"""

from __future__ import annotations

import hashlib
import json
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep_studio.settings import GroupConfig, StudioConfig
from lockstep_studio.store import screening
from lockstep_studio.store.database import Connection, Row
from lockstep_studio.store.people import Person, Refused, check_standing

LEAST_WEIGHT = 0.1
"""The weight of a task whose scores agree; the task whose scores differ most has 1. Above 0, so that any task may be drawn."""
TRIES = 64
_dice = random.SystemRandom()


@dataclass(frozen=True)
class Lease:
    """A task that a person holds. ``shown`` is the order of the completions on the screen."""

    id: int
    token: str
    task: int
    person: int
    group: str
    mode: str
    shown: tuple[int, ...]
    probability: float | None
    draft: Mapping[str, Any]
    at: float
    expires: float
    outcome: str | None
    messages: Sequence[Mapping[str, Any]]
    completions: Sequence[str]
    policies: Sequence[str] | None
    gold: Sequence[int] | None
    slot: bool


_LEASE = (
    "SELECT leases.id, token, task, person, grp, leases.mode, shown, probability, draft, leases.at, expires, outcome, messages, "
    "completions, policies, gold, slot FROM leases JOIN tasks ON tasks.id = leases.task "
)


def _lease(row: Row) -> Lease:
    found = dict(row)
    for key in ("shown", "draft", "messages", "completions", "policies", "gold"):
        found[key] = None if found[key] is None else json.loads(found[key])
    found |= {"group": found.pop("grp"), "shown": tuple(found["shown"]), "slot": bool(found["slot"])}
    return Lease(**found)


# ----------------------------------------------------------------------------------------------------------- adding


def begin_source(connection: Connection, path: str, kind: str, sha256: str, rows: int, now: float) -> tuple[int, set[str]] | None:
    """(source, keys of its stored tasks) for a new source, or one that was partly read when the process died; None for a complete
    source. A source of gold items retires all others.

    Raises:
      Refused: the file has changed since it was partly read.
    """
    if kind == "gold":
        _retire_gold(connection, path, sha256, now)
    row = connection.execute("SELECT id, sha256, complete FROM sources WHERE path = ?", (path,)).fetchone()
    if row is None:
        values = (path, kind, sha256, rows, now)
        sql = "INSERT INTO sources (path, kind, sha256, rows, at) VALUES (?, ?, ?, ?, ?) RETURNING id, sha256, complete"
        row = connection.execute(sql, values).fetchone()
    if row["complete"]:
        return None
    if row["sha256"] != sha256:
        raise Refused(f"{path} has changed since half of it was read. Restore it, or serve another --folder.")
    keys = connection.execute("SELECT key FROM tasks WHERE source = ?", (row["id"],))
    return row["id"], {each["key"] for each in keys}


def add_tasks(
    connection: Connection,
    source: int,
    kind: str,
    rows: Sequence[tuple[Mapping[str, Any], float]],
    settings: StudioConfig,
    now: float,
) -> None:
    """Add tasks with their slots. Gold items get no slots.

    Args:
      rows: each with its weight: {"id", "messages", "completions", "policies", "scores", "seed"}; gold items also have "ranks".
    """
    for row, weight in rows:
        mode = settings.mode_of(len(row["completions"]))
        task = add_task(connection, row, mode, now, source)
        if kind == "candidates":
            _add_slots(connection, task, str(row["id"]), settings, weight, mode)


def end_source(connection: Connection, source: int) -> None:
    connection.execute("UPDATE sources SET complete = 1 WHERE id = ?", (source,))


def _retire_gold(connection: Connection, path: str, sha256: str, now: float) -> None:
    """Stop handing out gold items of other files, and of this one as it was before. Their marks stay."""
    rows = connection.execute("SELECT id, path, sha256 FROM sources WHERE kind = 'gold' AND round IS NULL").fetchall()
    for row in rows:
        if (row["path"], row["sha256"]) != (path, sha256):
            new = f"{row['path']} {row['id']} {row['sha256']}"  # a path is there once
            connection.execute("UPDATE sources SET round = 0, path = ? WHERE id = ?", (new, row["id"]))
            close_source(connection, row["id"], now)


def close_source(connection: Connection, source: int, now: float) -> None:
    """Stop handing out the source's tasks, and take back those that people hold."""
    chosen = "task IN (SELECT id FROM tasks WHERE source = ?)"
    connection.execute(f"UPDATE slots SET open = 0 WHERE open AND {chosen}", (source,))
    for row in connection.execute(f"SELECT id FROM leases WHERE outcome IS NULL AND {chosen}", (source,)).fetchall():
        end(connection, row["id"], "closed", now)


def add_task(
    connection: Connection, row: Mapping[str, Any], mode: str, now: float, source: int | None = None, author: int | None = None
) -> int:
    """Add a task without slots. Returns its id. ``truth`` is not stored, since nobody here may see it. ``author`` is the person
    whose words are in the task. Rows that the studio makes may also have ``asked``, the message whose answers are compared, or
    ``against``, the demonstration that is compared."""
    written = {key: json.dumps(row[key], ensure_ascii=False) for key in ("messages", "completions")}
    policies, scores, gold = (
        json.dumps(row[key]) if row.get(key) is not None else None for key in ("policies", "scores", "ranks")
    )
    values = (
        source, str(row["id"]), mode, written["messages"], written["completions"], policies, scores, row.get("seed"), gold,
        author, *((row.get("asked"), row.get("against")) if source is None else (None, None)), now,
    )  # fmt: skip
    sql = (
        "INSERT INTO tasks (source, key, mode, messages, completions, policies, scores, seed, gold, author, asked, against, at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id"
    )
    (task,) = connection.execute(sql, values).fetchone()
    return int(task)


def _add_slots(connection: Connection, task: int, key: str, settings: StudioConfig, weight: float, mode: str) -> None:
    for name, group in settings.groups.items():
        overlaps = fraction(f"{name}:{key}") < group.overlap_share and group.labels
        wanted = {mode: max(group.labels, group.overlap) if overlaps else group.labels, "write": 1}
        chosen = weight if group.order == "disagreement" else 1.0
        for each in (each for each in wanted if each in group.modes and wanted[each]):
            add_slot(connection, task, name, each, wanted[each], chosen if each == mode else 1.0)


def add_slot(connection: Connection, task: int, group: str, mode: str, wanted: int, weight: float = 1.0) -> None:
    sql = "INSERT OR IGNORE INTO slots (task, grp, mode, wanted, weight) VALUES (?, ?, ?, ?, ?)"
    connection.execute(sql, (task, group, mode, wanted, weight))


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on ``text`` alone, so that the tasks of the overlap are fixed, not random."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def disagreement(scores: Sequence[Sequence[float] | None]) -> list[float]:
    """Weights from `LEAST_WEIGHT` to 1, by the spread of the scores of a task's completions relative to the widest spread."""
    spreads = [max(each) - min(each) if each else 0.0 for each in scores]
    widest = max(spreads, default=0.0) or 1.0
    return [LEAST_WEIGHT + (1 - LEAST_WEIGHT) * spread / widest for spread in spreads]


# ----------------------------------------------------------------------------------------------------------- leases


def held(connection: Connection, person: int, mode: str, now: float) -> Lease | None:
    """The task of this mode that the person holds; None if there is none."""
    row = connection.execute(
        _LEASE + "WHERE person = ? AND leases.mode = ? AND outcome IS NULL AND expires > ?", (person, mode, now)
    ).fetchone()
    return None if row is None else _lease(row)


def lease_of(connection: Connection, person: Person, token: str) -> Lease:
    """The person's lease with this token.

    Raises:
      Refused: the person never held such a lease, or the author of the task had it removed.
    """
    row = connection.execute(_LEASE + "WHERE token = ? AND person = ?", (token, person.id)).fetchone()
    if row is None:
        raise Refused("There is no such task among yours.", 404)
    if row["messages"] == "[]":
        raise Refused("Whoever wrote this had it removed. The next task is waiting.", 410)
    return _lease(row)


def lease(
    connection: Connection, person: Person, mode: str, settings: StudioConfig, now: float, dice: random.Random = _dice
) -> Lease | None:
    """The task that the person holds, else a new one; None if none is left. A new task is drawn from those that are open to the
    group and new to the person, and the lease records its probability. Gold items come first in screening, later unannounced.

    Raises:
      Refused: the person gets no tasks any more, or the gold items of the screening are in another mode or have run out.
    """
    check_standing(connection, person)
    expire(connection, now)
    if (found := held(connection, person.id, mode, now)) is not None:
        return found
    group = settings.groups.get(person.group, GroupConfig())
    task, probability, slot = _next(connection, person, mode, group, dice)
    if task is None:
        return None
    (completions,) = connection.execute("SELECT completions FROM tasks WHERE id = ?", (task,)).fetchone()
    shown = dice.sample(range(count := len(json.loads(completions))), count)
    token, until = secrets.token_urlsafe(16), now + 60 * settings.lease_minutes
    if slot:
        sql = "UPDATE slots SET taken = taken + 1 WHERE task = ? AND grp = ? AND mode = ?"
        connection.execute(sql, (task, person.group, mode))
    connection.execute(
        "INSERT INTO leases (token, task, person, grp, mode, shown, probability, slot, at, expires) VALUES (?,?,?,?,?,?,?,?,?,?)",
        (token, task, person.id, person.group, mode, json.dumps(shown), probability, slot, now, until),
    )
    return lease_of(connection, person, token)


def _next(
    connection: Connection, person: Person, mode: str, group: GroupConfig, dice: random.Random
) -> tuple[int | None, float | None, bool]:
    """(task, its probability, whether it takes a slot)."""
    if screening.left(connection, person.id, group):
        if (gold := _gold(connection, person, mode, dice)) is None:
            screening.check_passed(connection, person, group)
        return gold, None, False
    task, probability = _draw(connection, person, mode, dice)
    if task is None or probability is None:  # no gold item either, which would be recognised as one
        return None, None, False
    gold = _gold(connection, person, mode, dice) if mode in ("compare", "rank") else None
    share = 0.0 if gold is None else group.checks_share
    if dice.random() < share:
        return gold, None, False
    return task, probability * (1 - share), True


def _gold(connection: Connection, person: Person, mode: str, dice: random.Random) -> int | None:
    """A gold item that is new to the person; None if there is none."""
    rows = connection.execute(f"SELECT id FROM tasks WHERE mode = ? AND {screening.NEW_GOLD}", (mode, person.id)).fetchall()
    return int(dice.choice(rows)["id"]) if rows else None


def _seen(mode: str) -> str:
    """The SQL condition for leases after which the person no longer gets the task in this mode. Whoever judged a task does not
    judge it again. Whoever was given a task to judge does not adjudicate it, nor the reverse, since adjudicators see what others
    chose. Writing is independent of both."""
    if mode == "write":
        return "leases.mode = 'write' AND outcome IN ('labelled', 'skipped')"
    given = "!=" if mode == "adjudicate" else "="
    return f"leases.mode != 'write' AND (outcome IN ('labelled', 'skipped') OR leases.mode {given} 'adjudicate')"


def _draw(connection: Connection, person: Person, mode: str, dice: random.Random) -> tuple[int | None, float | None]:
    """A task drawn by weight from those open to the group and new to the person, and its probability.

    Ids are drawn, and accepted with the task's weight, until a task is open and new to the person. This avoids a scan of all
    tasks. If few tasks are open, it would take long; then, after `TRIES`, the open tasks are scanned, which are few.
    """
    where = (person.group, mode)
    pool = connection.execute("SELECT tasks, weight FROM pools WHERE grp = ? AND mode = ?", where).fetchone()
    seen, seen_weight = connection.execute(
        f"SELECT count(*), total(weight) FROM (SELECT DISTINCT task AS one FROM leases WHERE person = ? AND {_seen(mode)}) "
        "JOIN slots ON slots.task = one WHERE grp = ? AND slots.mode = ? AND open AND taken < wanted",
        (person.id, *where),
    ).fetchone()
    if pool is None or pool["tasks"] <= seen:
        return None, None
    free = "FROM slots WHERE grp = ? AND mode = ? AND open AND taken < wanted "
    first = connection.execute(f"SELECT task {free} ORDER BY task LIMIT 1", where).fetchone()["task"]
    last = connection.execute(f"SELECT task {free} ORDER BY task DESC LIMIT 1", where).fetchone()["task"]
    for _ in range(TRIES):
        task = dice.randint(first, last)
        row = connection.execute(f"SELECT weight {free} AND task = ?", (*where, task)).fetchone()
        if row is not None and dice.random() < row["weight"] and not _has_seen(connection, person.id, task, mode):
            return task, min(1.0, row["weight"] / (pool["weight"] - seen_weight))
    unseen = f"AND NOT EXISTS (SELECT 1 FROM leases WHERE leases.person = ? AND leases.task = slots.task AND {_seen(mode)})"
    rows = connection.execute(f"SELECT task, weight {free} {unseen}", (*where, person.id)).fetchall()
    (row,) = dice.choices(rows, [row["weight"] for row in rows])
    return row["task"], row["weight"] / sum(each["weight"] for each in rows)


def _has_seen(connection: Connection, person: int, task: int, mode: str) -> bool:
    sql = f"SELECT 1 FROM leases WHERE person = ? AND task = ? AND {_seen(mode)}"
    return connection.execute(sql, (person, task)).fetchone() is not None


def expire(connection: Connection, now: float) -> None:
    """End the leases whose time is over, and free their slots."""
    for row in connection.execute("SELECT * FROM leases WHERE outcome IS NULL AND expires <= ?", (now,)).fetchall():
        end(connection, row["id"], "expired", now)


def end(connection: Connection, lease: int, outcome: str, now: float) -> None:
    """End a lease. Unless it ends with a label, its slot is given back, so a skipped task is offered to others."""
    row = connection.execute(
        "UPDATE leases SET outcome = ?, ended = ? WHERE id = ? AND outcome IS NULL RETURNING task, grp, mode, slot",
        (outcome, now, lease),
    ).fetchone()
    if row is not None and row["slot"] and outcome != "labelled":
        sql = "UPDATE slots SET taken = taken - 1 WHERE task = ? AND grp = ? AND mode = ?"
        connection.execute(sql, (row["task"], row["grp"], row["mode"]))


def skip(connection: Connection, person: Person, token: str, reason: str, settings: StudioConfig, now: float) -> None:
    """Give a task back for good. Skipping it twice is the same as once."""
    found = lease_of(connection, person, token)
    if found.outcome == "labelled":
        raise Refused("This task is labelled already.")
    keep_draft(connection, found, {"reason": reason})
    end(connection, found.id, "skipped", now)
    if found.gold is not None and found.outcome is None:
        screening.judge(connection, person, settings.groups.get(found.group, GroupConfig()))


def revive(connection: Connection, found: Lease, now: float) -> None:
    """Take an expired lease's slot again.

    Raises:
      Refused: somebody else has the task by now, or its round is closed.
    """
    if not found.slot:
        return
    row = connection.execute(
        "UPDATE slots SET taken = taken + 1 WHERE task = ? AND grp = ? AND mode = ? AND open AND taken < wanted RETURNING task",
        (found.task, found.group, found.mode),
    ).fetchone()
    if row is None:
        raise Refused("This task took too long and was given to somebody else. The next one is waiting.", 410)


def renew(connection: Connection, found: Lease, settings: StudioConfig, now: float) -> None:
    """Extend a lease while the person works on the task."""
    until = now + 60 * settings.lease_minutes
    connection.execute("UPDATE leases SET expires = max(expires, ?) WHERE id = ? AND outcome IS NULL", (until, found.id))


def keep_draft(connection: Connection, found: Lease, part: Mapping[str, Any]) -> None:
    """Add to the draft, the person's work on the task so far."""
    written = json.dumps({**found.draft, **part}, ensure_ascii=False)
    connection.execute("UPDATE leases SET draft = ? WHERE id = ?", (written, found.id))


def progress(connection: Connection, person: Person) -> dict[str, tuple[int, int]]:
    """{mode: (labels by this person, labels that the group still wants)}."""
    done = dict(
        connection.execute("SELECT mode, count(*) FROM labels WHERE person = ? AND revision = 0 GROUP BY mode", (person.id,))
    )
    left = dict(connection.execute("SELECT mode, labels FROM pools WHERE grp = ?", (person.group,)))
    return {mode: (done.get(mode, 0), left.get(mode, 0)) for mode in {*done, *left}}
