"""The people who take part: invitations, people and their pseudonyms, sessions, consent. Only hashes of secrets are stored."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lockstep.errors import LockstepError
from lockstep_studio.settings import OPERATORS as OPERATORS
from lockstep_studio.settings import StudioConfig
from lockstep_studio.store.database import Connection, Row

SESSION_SECONDS = 14 * 24 * 3600.0
"""A session ends after this long without a visit."""
MOST_SESSION_SECONDS = 180 * 24 * 3600.0
"""A session ends after this long in any case."""
FAILURE_SECONDS = 900.0
DAY = 24 * 3600.0
NO_WORK = {
    "screened out": "Thank you for trying. The first tasks showed that this work is not for you, so there are no more.",
    "paused": "Your work is paused: some answers looked inattentive. Ask the operator to go on.",
    "removed": "Your work was removed, and nothing more is stored.",
}
"""Why a person gets no work, for each standing other than 'active'."""


class Refused(LockstepError):
    """A person's request is not possible; the message says why, and what is possible. ``status`` is the HTTP status."""

    def __init__(self, message: str, status: int = 409):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Person:
    """A person who is signed in. ``session`` is the hash under which the session is stored."""

    id: int
    pseudonym: str
    role: str
    group: str
    name: str | None
    standing: str
    session: bytes
    expires: float
    began: float

    def until(self, now: float) -> float:
        """When the session ends if it is used at ``now``."""
        return min(now + SESSION_SECONDS, self.began + MOST_SESSION_SECONDS)

    @property
    def operates(self) -> bool:
        return self.role == "operator"


def digest(token: str) -> bytes:
    """The hash under which a secret token is stored. Tokens have 256 random bits, so a fast hash is enough."""
    return hashlib.sha256(token.encode()).digest()


def new_token() -> str:
    return secrets.token_urlsafe(32)


def publish_instructions(connection: Connection, settings: StudioConfig, now: float) -> None:
    """Store each group's instructions under their version.

    Raises:
      Refused: the text of a published version has changed.
    """
    for name, group in settings.groups.items():
        row = connection.execute(
            "SELECT text, consent FROM instructions WHERE grp = ? AND version = ?", (name, group.version)
        ).fetchone()
        if row is None:
            values = (name, group.version, group.instructions, group.consent, now)
            connection.execute("INSERT INTO instructions VALUES (?, ?, ?, ?, ?)", values)
        elif (row["text"], row["consent"]) != (group.instructions, group.consent):
            raise Refused(
                f"groups.{name}: the instructions or the consent changed, but version {group.version!r} was already shown to "
                f"people. Set groups.{name}.version to a new one."
            )


def invite(connection: Connection, role: str, group: str, uses: int, hours: float, now: float) -> str:
    """Make an invitation for ``uses`` people, valid for ``hours``. Returns its token."""
    token = new_token()
    values = (digest(token), role, group, uses, now + 3600 * hours, now)
    connection.execute("INSERT INTO invitations (token, role, grp, uses, expires, at) VALUES (?, ?, ?, ?, ?, ?)", values)
    return token


def invitation(connection: Connection, token: str, now: float) -> Row:
    """The invitation with this token.

    Raises:
      Refused: the invitation is unknown, used up or too old. The message does not say which.
    """
    found: Row | None = connection.execute(
        "SELECT * FROM invitations WHERE token = ? AND uses > 0 AND expires > ?", (digest(token), now)
    ).fetchone()
    if found is None:
        raise Refused("This invitation is used up or too old. Ask the operator for a new one.", 404)
    return found


def is_good(connection: Connection, token: str, now: float) -> bool:
    """True if the token's invitation can still be used."""
    try:
        return invitation(connection, token, now) is not None
    except Refused:
        return False


def invitations(connection: Connection, now: float) -> list[dict[str, object]]:
    """The invitations that can still be used: {"id", "group", "uses", "expires"}. An id lets nobody in."""
    rows = connection.execute("SELECT * FROM invitations WHERE uses > 0 AND expires > ? ORDER BY at DESC LIMIT 200", (now,))
    return [{"id": row["token"].hex(), "group": row["grp"], "uses": row["uses"], "expires": row["expires"]} for row in rows]


def revoke_invitation(connection: Connection, number: str) -> None:
    """Delete an invitation. ``number`` is its id in `invitations`."""
    connection.execute("DELETE FROM invitations WHERE hex(token) = ?", (number.upper(),))


def accept(
    connection: Connection, token: str, name: str | None, password: str | None, now: float, before: bytes | None = None
) -> tuple[Person, str]:
    """Add a person. Returns the person and the token of a session.

    Args:
      name, password: to sign in again later; ``password`` is a hash. None: the session is the only way in.
      before: the visitor's previous session, which ends.

    Raises:
      Refused: the invitation is no longer good, or the name is taken.
    """
    found = invitation(connection, token, now)
    if name is not None and connection.execute("SELECT 1 FROM people WHERE name = ?", (name,)).fetchone():
        raise Refused("This name is taken. Choose another one.")
    connection.execute("UPDATE invitations SET uses = uses - 1 WHERE token = ?", (found["token"],))
    values = (f"p-{secrets.token_hex(6)}", found["role"], found["grp"], name, password, now)
    row = connection.execute(
        "INSERT INTO people (pseudonym, role, grp, name, password, at) VALUES (?, ?, ?, ?, ?, ?) RETURNING id", values
    ).fetchone()
    session = sign_in(connection, row["id"], now, before)
    person = person_of(connection, session, now)
    assert person is not None
    return person, session


def sign_in(connection: Connection, person: int, now: float, before: bytes | None = None, attempts: Sequence[int] = ()) -> str:
    """Start a session. Returns its token, which is always new, never one from before the sign-in.

    Args:
      before: the visitor's previous session, which ends.
      attempts: ids from `attempt` that were not failures after all.
    """
    session = new_token()
    connection.executemany("DELETE FROM failures WHERE id = ?", [(each,) for each in attempts])
    connection.execute("DELETE FROM sessions WHERE expires < ? OR id = ?", (now, before))
    connection.execute("INSERT INTO sessions VALUES (?, ?, ?, ?)", (digest(session), person, now, now + SESSION_SECONDS))
    return session


def sign_out(connection: Connection, session: bytes) -> None:
    connection.execute("DELETE FROM sessions WHERE id = ?", (session,))


def sign_out_everywhere(connection: Connection, person: int) -> None:
    connection.execute("DELETE FROM sessions WHERE person = ?", (person,))


def extend(connection: Connection, session: bytes, now: float) -> None:
    sql = "UPDATE sessions SET expires = min(?, at + ?) WHERE id = ?"
    connection.execute(sql, (now + SESSION_SECONDS, MOST_SESSION_SECONDS, session))


def person_of(connection: Connection, session: str, now: float) -> Person | None:
    row = connection.execute(
        "SELECT people.id, pseudonym, role, grp, name, standing, sessions.id, expires, sessions.at FROM sessions "
        "JOIN people ON people.id = sessions.person WHERE sessions.id = ? AND expires > ? AND sessions.at > ?",
        (digest(session), now, now - MOST_SESSION_SECONDS),
    ).fetchone()
    return Person(*row) if row is not None and row["standing"] != "removed" else None


def password_of(connection: Connection, name: str) -> tuple[int, str] | None:
    """The person with this name, and the hash of the password."""
    row = connection.execute(
        "SELECT id, password FROM people WHERE name = ? AND password IS NOT NULL AND standing != 'removed'", (name,)
    ).fetchone()
    return None if row is None else (row["id"], row["password"])


def agree(connection: Connection, person: Person, version: str, now: float) -> None:
    values = (person.id, person.group, version, now)
    connection.execute("INSERT OR IGNORE INTO consents VALUES (?, ?, ?, ?)", values)


def has_agreed(connection: Connection, person: Person, version: str) -> bool:
    values = (person.id, person.group, version)
    sql = "SELECT 1 FROM consents WHERE person = ? AND grp = ? AND version = ?"
    return connection.execute(sql, values).fetchone() is not None


def attempt(connection: Connection, limits: Mapping[str, int], now: float) -> list[int]:
    """Count an attempt to sign in as a failure of each key in ``limits``, {who: the most}. `sign_in` takes the failures back.

    Returns:
      The ids of the failures.

    Raises:
      Refused: one of the keys has failed too often already.
    """
    connection.execute("DELETE FROM failures WHERE at < ?", (now - FAILURE_SECONDS,))
    if any(failures(connection, who, now) >= most for who, most in limits.items()):
        raise Refused("Too many attempts. Wait 15 minutes.", 429)
    sql = "INSERT INTO failures (who, at) VALUES (?, ?) RETURNING id"
    return [int(connection.execute(sql, (who, now)).fetchone()[0]) for who in limits]


def failures(connection: Connection, who: str, now: float) -> int:
    """The number of failures in the last `FAILURE_SECONDS`. Failures in the future, from before the clock was set back, do not
    count."""
    sql = "SELECT count(*) FROM failures WHERE who = ? AND at > ? AND at <= ?"
    count: int = connection.execute(sql, (who, now - FAILURE_SECONDS, now)).fetchone()[0]
    return count


def check_standing(connection: Connection, person: Person) -> None:
    """Check the standing as it is in the database now: a write may have waited since its request was checked.

    Raises:
      Refused: the person was paused, screened out or removed meanwhile.
    """
    (standing,) = connection.execute("SELECT standing FROM people WHERE id = ?", (person.id,)).fetchone()
    if standing in NO_WORK:
        raise Refused(NO_WORK[standing], 403)


def spend(connection: Connection, person: int, characters: int, settings: StudioConfig, now: float) -> None:
    """Count characters that a person wrote, before they are stored.

    Raises:
      Refused: the person wrote too much today.
    """
    if count_written(connection, person, characters, now) > (most := settings.limits.characters_per_day):
        raise Refused(
            f"That is too much for a day: {most} characters are the limit, with the answers to you. Go on tomorrow.", 429
        )


def count_written(connection: Connection, person: int, characters: int, now: float) -> int:
    """Add to the characters stored for a person. Returns the total of the day."""
    row = connection.execute(
        "INSERT INTO written VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET characters = characters + excluded.characters "
        "RETURNING characters",
        (person, int(now // DAY), characters),
    ).fetchone()
    return int(row["characters"])


def revoke_operator(connection: Connection, person: int) -> None:
    """Take an operator's rights away, at once."""
    connection.execute(
        "UPDATE people SET name = NULL, password = NULL, standing = 'removed' WHERE id = ? AND role = 'operator'", (person,)
    )
    sign_out_everywhere(connection, person)


def set_standing(connection: Connection, person: int, standing: str) -> None:
    connection.execute("UPDATE people SET standing = ? WHERE id = ? AND standing != 'removed'", (standing, person))
