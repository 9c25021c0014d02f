"""A function call in its own thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Aside(Generic[T]):
    """A call that runs in its own thread, called ``name``. Ctrl-C ends a wait for the call, not the call itself. The interpreter
    exits without waiting for it, unlike with `concurrent.futures`."""

    def __init__(self, call: Callable[[], T], name: str):
        self._found: list[T] = []
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._found.append(call())
            except BaseException as error:  # SystemExit too, which would end the thread silently
                self._error = error

        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def finished(self, seconds: float) -> bool:
        """Wait up to ``seconds``. Return True if the call has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> T:
        """Wait for the call to end, and return or raise what it did."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found[0]
