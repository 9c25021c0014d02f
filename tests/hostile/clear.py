"""The property that every fuzz test states: nothing but a right result or a clear error, within bounds.

A clear error is a `LockstepError` whose message names what is wrong, is not a dump of the input, holds no secret, and can be
printed on any terminal. Every other exception, SystemExit included, is a failure of the test, and so is a call that takes
too long or too much memory.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from lockstep.config import secrets
from lockstep.errors import LockstepError
from lockstep.reporting.console import Console

SECRET = "s3cr3t-5ba1f0"
"""Planted where a secret may be: a token, a password, a key in a URL. It must not come back in anything that is said."""
CHARACTERS = 3000
"""Of a message. The longest legitimate ones list what exists."""
CPU_SECONDS = 10.0
SECONDS = 60.0
"""Long enough for a machine under load: only what waits for something takes it."""
MEMORY = 1 << 30
"""Bytes of address space on top of what the process has."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class TookTooLong(BaseException):
    """Not an Exception, which the code under test might catch."""


@contextlib.contextmanager
def only_clear_errors(*names: str) -> Iterator[None]:
    """Whatever happens inside is right, or a clear error that contains one of ``names``, if any are given."""
    began, said = time.monotonic(), io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    found: LockstepError | None = None
    forgotten = mock.patch.object(secrets, "_remembered", set())  # else what was secret in an earlier call is hidden
    with _bounded(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), _logged(said), forgotten:
        try:
            yield
        except LockstepError as error:
            found = error
            Console().say(f"{type(error).__name__}: {error}")
        except TookTooLong:
            raise AssertionError(f"it took more than {CPU_SECONDS:g} s") from None
    if problem := _problem(found, names, said.buffer.getvalue().decode(), time.monotonic() - began):
        raise AssertionError(problem) from found


def _problem(error: LockstepError | None, names: tuple[str, ...], shown: str, seconds: float) -> str | None:
    """What is not clear about an error, or not allowed in what was shown."""
    message = str(error)
    if not message.strip():
        return f"an empty {type(error).__name__}"
    if len(message) > CHARACTERS:
        return f"a message of more than {CHARACTERS:,} characters: {message[:200]} ... {message[-200:]}"
    if error and names and not any(name in message for name in names):
        return f"a message that names none of {names}: {message}"
    if SECRET in shown:
        return f"the secret is shown: {shown}"
    if CONTROL.search(shown):
        return f"control characters reach the terminal: {shown!r}"
    return f"it took {seconds:.0f} s" if seconds > SECONDS else None


@contextlib.contextmanager
def _logged(to: io.TextIOWrapper) -> Iterator[None]:
    """What Lockstep logs, at any level."""
    logger, handler = logging.getLogger("lockstep"), logging.StreamHandler(to)
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Limits of memory and of CPU time. The clock is not pytest-timeout's."""

    def expired(*_: Any) -> None:
        raise TookTooLong

    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGVTALRM, expired)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
