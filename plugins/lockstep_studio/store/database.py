"""Connections to the studio's SQLite file. All writes go through one thread, many in one transaction.

A write is acknowledged after its transaction is on disk (WAL, synchronous=FULL), so a killed process or a power failure loses no
acknowledged label. Jobs that wait together share a commit, since flushing the disk takes most of the time; each job has a
savepoint of its own, so a failing job takes no other with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from lockstep.errors import CheckpointError
from lockstep.storage.files import sync
from lockstep_studio.store.schema import SCHEMA, UPGRADES, VERSION

T = TypeVar("T")
Connection = sqlite3.Connection
Row = sqlite3.Row

TOGETHER = 64
"""The most writes in one transaction."""
FILE = "studio.sqlite3"

_Job = tuple[Callable[[Connection], Any], "Future[Any]"]


class Database:
    """The database in a folder. One process at a time may have it open."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = folder / FILE
        _for_its_owner_only(folder, self.path)
        self._lock: int | None = _only_process(folder)
        self._local = threading.local()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        connection = connect(self.path)
        _prepare(connection, self.path)
        self._writer = threading.Thread(target=self._write_all, args=(connection,), name="studio-writer", daemon=True)
        self._writer.start()

    @property
    def reader(self) -> Connection:
        """This thread's connection for reading. It sees every acknowledged write."""
        found: Connection | None = getattr(self._local, "connection", None)
        if found is None:
            found = self._local.connection = connect(self.path)
            found.execute("PRAGMA query_only = ON")
        return found

    def submit(self, job: Callable[..., T], *arguments: Any, **named: Any) -> Future[T]:
        """Queue ``job(connection, *arguments)`` for the writer; the future has its result once it is on disk."""
        future: Future[T] = Future()
        self._jobs.put((lambda connection: job(connection, *arguments, **named), future))
        return future

    def now(self, job: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """`submit`, and wait for the result. Call this off the event loop."""
        return self.submit(job, *arguments, **named).result()

    async def do(self, job: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """`submit`, and wait without blocking the event loop. If the caller is cancelled, the write still happens."""
        return await asyncio.shield(asyncio.wrap_future(self.submit(job, *arguments, **named)))

    def backup(self, path: Path) -> Path:
        """Write a consistent copy of the database while it is in use. Returns its path."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = path.with_name(f".{path.name}.part")
        part.unlink(missing_ok=True)
        with contextlib.closing(connect(self.path)) as source, contextlib.closing(sqlite3.connect(part)) as copy:
            source.backup(copy, pages=256, sleep=0.01)
        part.chmod(0o600)
        sync(part)
        os.replace(part, path)
        sync(path.parent)
        return path

    def checkpoint(self) -> None:
        """Write all into the database file and empty its log, which would keep removed text. Call this off the event loop."""
        with contextlib.closing(connect(self.path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Finish the submitted writes, and release the database."""
        if self._lock is not None:
            self._jobs.put(None)
            self._writer.join()
            os.close(self._lock)
            self._lock = None

    def _write_all(self, connection: Connection) -> None:
        with contextlib.closing(connection):
            while jobs := self._waiting():
                _commit(connection, jobs)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _waiting(self) -> list[_Job]:
        """Wait for jobs. Returns at least one, or none once the database is to be closed."""
        first = self._jobs.get()
        jobs = [first] if first is not None else []
        while jobs and len(jobs) < TOGETHER:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)  # found again by the next call
                break
            jobs.append(job)
        return jobs


def connect(path: Path) -> Connection:
    """A connection in autocommit mode; transactions begin explicitly."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=10, cached_statements=512, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.executescript(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA temp_store = MEMORY; "
        "PRAGMA secure_delete = ON;"  # overwrites removed content
    )
    return connection


@contextlib.contextmanager
def transaction(connection: Connection) -> Iterator[Connection]:
    """A transaction that takes the write lock at once, so that it cannot fail halfway because another writer was faster."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _commit(connection: Connection, jobs: list[_Job]) -> None:
    outcomes: list[tuple[Future[Any], Any, BaseException | None]] = []
    try:
        with transaction(connection):
            for job, future in jobs:
                outcomes.append((future, *_attempt(connection, job)))
    except BaseException as error:  # such as a full disk: no job is stored
        outcomes = [(future, None, error) for _, future in jobs]
    for future, result, failure in outcomes:
        if future.set_running_or_notify_cancel():
            future.set_result(result) if failure is None else future.set_exception(failure)


def _attempt(connection: Connection, job: Callable[[Connection], Any]) -> tuple[Any, BaseException | None]:
    connection.execute("SAVEPOINT job")
    try:
        result = job(connection)
    except Exception as error:
        if not connection.in_transaction:  # SQLite rolled back the whole transaction
            raise
        connection.execute("ROLLBACK TO job")
        connection.execute("RELEASE job")
        return None, error
    connection.execute("RELEASE job")
    return result, None


def _prepare(connection: Connection, path: Path) -> None:
    """Make the tables, or bring those of an older version up to date.

    Raises:
      CheckpointError: the tables are of a newer version.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if not 0 <= version <= VERSION:
        raise CheckpointError(
            f"{path} was made by a newer version of the studio (its tables are version {version}, not {VERSION}). "
            "Serve it with that version, or choose another --folder."
        )
    for number, script in enumerate((SCHEMA, *UPGRADES)[version:], version + 1):
        connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")


def _for_its_owner_only(folder: Path, file: Path) -> None:
    """Restrict the database to its owner, before SQLite opens it: SQLite's log gets the permissions of the database. A folder
    with other files but no database yet keeps its permissions."""
    if file.exists() or not any(folder.iterdir()):
        with contextlib.suppress(PermissionError):  # somebody else's folder, in which we may write
            folder.chmod(0o700)
    os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    for each in folder.glob(f"{file.name}*"):
        each.chmod(0o600)


def _only_process(folder: Path) -> int:
    number = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(number)
        raise CheckpointError(f"Another process serves {folder}. Stop it, or choose another --folder.") from error
    return number
