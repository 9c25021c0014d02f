"""Ctrl-C and SIGTERM as requests: work in progress ends where it can. An exception in the middle of an update would leave half of
it, and one in the middle of a compilation has crashed XLA when the process exited."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

log = logging.getLogger("lockstep")


class GracefulStop:
    """The first of ``signals`` sets ``asked`` and logs ``message``, if there is one. A second Ctrl-C raises KeyboardInterrupt; a
    second SIGTERM asks for the same again, as when a cluster sends it to a sweep and to its jobs.
    Signals reach the main thread only; in other threads nothing changes."""

    def __init__(
        self,
        message: str = "stopping after this step; press Ctrl-C again to stop at once",
        signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
    ):
        self.asked, self.message = False, message
        self.signals = signals if threading.current_thread() is threading.main_thread() else ()

    def __enter__(self) -> GracefulStop:
        self.before = {number: signal.signal(number, self._ask) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked and self.message:
            log.warning(self.message)
        self.asked = True


@contextlib.contextmanager
def terminable(first: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside, SIGTERM calls ``first`` and raises KeyboardInterrupt, so that it ends like Ctrl-C and is recorded; further ones are
    ignored. Without this, Python would die at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        first()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
