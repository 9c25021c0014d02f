"""Who takes part: invitations, people and their pseudonyms, sessions, consent. Only hashes of secrets are stored."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

from lockstep.errors import LockstepError
from lockstep_studio.settings import StudioConfig
from lockstep_studio.store.database import Connection, Row

SESSION_SECONDS = 14 * 24 * 3600.0
"""A session ends after so long without a visit."""
FAILURE_SECONDS = 900.0
OPERATORS = "operators"


class Refused(LockstepError):
    """What a person asked for is not possible; the message says why and what is. ``status`` is HTTP's."""

    def __init__(self, message: str, status: int = 409):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Person:
    """Who visits. ``session`` is the hash by which the session is stored."""

    id: int
    pseudonym: str
    role: str
    group: str
    name: str | None
    standing: str
    session: bytes
    expires: float

    @property
    def operates(self) -> bool:
        return self.role == "operator"


def digest(token: str) -> bytes:
    """By which a secret token is stored: tokens have 256 random bits, so a fast hash is enough."""
    return hashlib.sha256(token.encode()).digest()


def new_token() -> str:
    return secrets.token_urlsafe(32)


def publish_instructions(connection: Connection, settings: StudioConfig, now: float) -> None:
    """Store each group's instructions under their version.

    Raises:
      Refused: a version that was published has another text now.
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
    """A token that lets ``uses`` people in within ``hours``."""
    token = new_token()
    values = (digest(token), role, group, uses, now + 3600 * hours, now)
    connection.execute("INSERT INTO invitations (token, role, grp, uses, expires, at) VALUES (?, ?, ?, ?, ?, ?)", values)
    return token


def invitation(connection: Connection, token: str, now: float) -> Row:
    """
    Raises:
      Refused: it is unknown, used up or too old; which of these is not said.
    """
    found: Row | None = connection.execute(
        "SELECT * FROM invitations WHERE token = ? AND uses > 0 AND expires > ?", (digest(token), now)
    ).fetchone()
    if found is None:
        raise Refused("This invitation is used up or too old. Ask the operator for a new one.", 404)
    return found


def accept(connection: Connection, token: str, name: str | None, password: str | None, now: float) -> tuple[Person, str]:
    """A new person, and the token of a session.

    Args:
      name, password: to sign in again later; ``password`` is a hash. None: the session is the only way in.

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
    session = sign_in(connection, row["id"], now)
    person = person_of(connection, session, now)
    assert person is not None
    return person, session


def sign_in(connection: Connection, person: int, now: float) -> str:
    """The token of a new session: never one that existed before someone signed in."""
    session = new_token()
    connection.execute("DELETE FROM sessions WHERE expires < ?", (now,))
    connection.execute("INSERT INTO sessions VALUES (?, ?, ?, ?)", (digest(session), person, now, now + SESSION_SECONDS))
    return session


def sign_out(connection: Connection, session: bytes) -> None:
    connection.execute("DELETE FROM sessions WHERE id = ?", (session,))


def extend(connection: Connection, session: bytes, now: float) -> None:
    connection.execute("UPDATE sessions SET expires = ? WHERE id = ?", (now + SESSION_SECONDS, session))


def person_of(connection: Connection, session: str, now: float) -> Person | None:
    row = connection.execute(
        "SELECT people.id, pseudonym, role, grp, name, standing, sessions.id, expires FROM sessions "
        "JOIN people ON people.id = sessions.person WHERE sessions.id = ? AND expires > ?",
        (digest(session), now),
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


def fail(connection: Connection, who: list[str], now: float) -> None:
    """Remember a wrong password or token."""
    connection.execute("DELETE FROM failures WHERE at < ?", (now - FAILURE_SECONDS,))
    connection.executemany("INSERT INTO failures (who, at) VALUES (?, ?)", [(each, now) for each in who])


def failures(connection: Connection, who: str, now: float) -> int:
    sql = "SELECT count(*) FROM failures WHERE who = ? AND at > ?"
    count: int = connection.execute(sql, (who, now - FAILURE_SECONDS)).fetchone()[0]
    return count


def set_standing(connection: Connection, person: int, standing: str) -> None:
    connection.execute("UPDATE people SET standing = ? WHERE id = ? AND standing != 'removed'", (standing, person))
