"""Ctrl-C as a request: work in progress ends where it can. An exception in the middle of an update would leave half of it, and
one in the middle of a compilation has crashed XLA when the process exited."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Sequence
from types import FrameType

log = logging.getLogger("lockstep")


class GracefulStop:
    """The first of ``signals`` sets ``asked`` and logs ``message``, if there is one. The second raises KeyboardInterrupt.
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
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self.message:
            log.warning(self.message)
