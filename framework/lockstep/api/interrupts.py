"""Ctrl-C as a request to stop where it is safe. An exception in the middle of an update leaves half of it; one in the middle
of a compilation has crashed XLA at exit."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def noted(say: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Yields a function: was Ctrl-C pressed? The first press is recorded and calls ``say``; the second raises KeyboardInterrupt.
    Signals reach only the main thread; in others nothing changes."""
    pressed = threading.Event()

    def note(number: int, frame: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()
        say()

    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
