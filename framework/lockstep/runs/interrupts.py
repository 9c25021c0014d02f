"""Treats Ctrl-C, SIGTERM and a terminal that hangs up as requests: work in progress ends where it can. An exception in the
middle of an update would leave it half done; one in the middle of a compilation has crashed XLA at exit."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from lockstep.reporting.console import nobody_reads

log = logging.getLogger("lockstep")

ENDS = (signal.SIGTERM, signal.SIGHUP)
"""The signals sent by a cluster, a supervisor or a closing terminal."""
Handler = Callable[[int, FrameType | None], None]


class GracefulStop:
    """The first of ``signals`` sets ``asked`` and logs ``message``, if there is one. A second Ctrl-C raises KeyboardInterrupt. A
    second SIGTERM changes nothing: a cluster may send one to a sweep and another to its jobs.
    Signals reach the main thread only; in other threads nothing changes."""

    def __init__(
        self,
        message: str = "stopping after this step; press Ctrl-C again to stop at once",
        signals: Sequence[signal.Signals] = (signal.SIGINT, *ENDS),
    ):
        self.asked, self.message, self.signals = False, message, signals

    def __enter__(self) -> GracefulStop:
        self.handled = handled(self._ask, self.signals)
        self.handled.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.handled.__exit__(None, None, None)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked and self.message:
            log.warning(self.message)
        self.asked = True


@contextlib.contextmanager
def terminable(first: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP call ``first`` and raise KeyboardInterrupt, so that the run ends as on Ctrl-C and is recorded.
    Further ones are ignored. Without this, Python would die at once."""

    def terminate(number: int, frame: FrameType | None) -> None:
        for each in ENDS:
            signal.signal(each, signal.SIG_IGN)
        first()
        raise KeyboardInterrupt

    with handled(terminate, ENDS):
        yield


@contextlib.contextmanager
def handled(handler: Handler, signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Inside, ``handler`` gets these signals, except a SIGHUP that is already ignored, as under `nohup`."""
    in_terminal = sys.stdout.isatty()

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and in_terminal:
            nobody_reads()  # the terminal has gone, and printing to it fails
        handler(number, frame)

    main = threading.current_thread() is threading.main_thread()
    wanted = [s for s in signals if main and not (s == signal.SIGHUP and signal.getsignal(s) == signal.SIG_IGN)]
    before = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
