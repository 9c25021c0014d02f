"""A folder that one process at a time works on. The process locks the folder's file ``lock``, and the operating system releases
the lock when the process dies, however it dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lockstep.errors import CheckpointError

log = logging.getLogger("lockstep")
REMOVALS = 100
"""How many times a folder may be removed while a process waits for its lock."""


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Lock ``folder``, waiting while another process holds it. The operating system releases a dead process's lock."""
    for _ in range(REMOVALS):
        if (file := _lock(folder)) is not None:
            break
    else:
        raise CheckpointError(f"{folder} cannot be locked: its file 'lock' is removed again and again, or is a link to nowhere.")
    with file:
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _lock(folder: Path) -> IO[str] | None:
    """The open lock file, locked; None if the folder was removed meanwhile, for example by `lockstep cache prune`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for process %s, which is working on %s", _owner(file), folder.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        return file if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)) else None
    except FileNotFoundError:
        return None
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise CheckpointError(
            f"{error.filename} is in the way of {folder}. Move it away, or choose another name=... or folder=... "
            "(for a GGUF file, XDG_CACHE_HOME)."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        raise CheckpointError(
            f"{folder} cannot be locked: its file system has no locks ({error}). Choose another folder=... "
            "(for a GGUF file, XDG_CACHE_HOME)."
        ) from error


def _owner(file: IO[str]) -> str:
    file.seek(0)
    return file.read(200).strip() or "?"


@contextlib.contextmanager
def hold_if_free(folder: Path) -> Iterator[str | None]:
    """Lock ``folder`` and yield None, or yield the process that holds it. Never waits."""
    with open(folder / "lock", "a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield _owner(file)
        else:
            yield None
