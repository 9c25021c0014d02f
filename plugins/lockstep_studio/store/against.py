"""Comparisons of people's demonstrations with policies' answers: blind, like those between policies."""

from __future__ import annotations

import json
import random
import secrets

from lockstep_studio.settings import StudioConfig
from lockstep_studio.store.database import Connection, Row
from lockstep_studio.store.tasks import add_slot, add_task

PERSON = "person"
"""Stands in place of a policy's name."""
_dice = random.SystemRandom()

_WRITTEN = (
    "SELECT labels.id, labels.person, json_extract(content, '$.response') AS response, messages, completions, policies, seed "
    "FROM labels JOIN tasks ON tasks.id = labels.task JOIN findings ON findings.kind = 'label' AND findings.id = labels.id "
    "WHERE labels.mode = 'write' AND decision = 'release' AND content IS NOT NULL AND completions != '[]' AND revision = "
    "(SELECT max(revision) FROM labels AS later WHERE later.lease = labels.lease) AND NOT EXISTS "
    "(SELECT 1 FROM tasks AS made WHERE made.against = labels.id)"
)


def add_comparisons(connection: Connection, settings: StudioConfig, now: float) -> int:
    """Add a task for each released demonstration that has none yet: the demonstration against a random answer to the same prompt.
    Returns how many tasks are new. Run `scan` and `remember` of `privacy` first."""
    rows = connection.execute(_WRITTEN).fetchall()
    for row in rows:
        _add(connection, row, settings, now)
    return len(rows)


def _add(connection: Connection, row: Row, settings: StudioConfig, now: float) -> None:
    completions, policies = json.loads(row["completions"]), json.loads(row["policies"] or "null")
    index = _dice.randrange(len(completions))
    task = {
        "id": f"against-{row['id']}",
        "messages": json.loads(row["messages"]),
        "completions": [row["response"], completions[index]],
        "policies": [PERSON, policies[index] if policies else "policy"],
        "seed": row["seed"],
        "against": row["id"],
    }
    number = add_task(connection, task, "compare", now, author=row["person"])
    for name, group in settings.groups.items():
        if "compare" in group.modes and group.labels:
            add_slot(connection, number, name, "compare", group.labels)
    connection.execute(  # nobody judges their own: for the author the task counts as skipped
        "INSERT INTO leases (token, task, person, grp, mode, shown, slot, at, expires, outcome, ended) "
        "SELECT ?, ?, id, grp, 'compare', '[]', 0, ?, ?, 'skipped', ? FROM people WHERE id = ?",
        (secrets.token_urlsafe(16), number, now, now, now, row["person"]),
    )
