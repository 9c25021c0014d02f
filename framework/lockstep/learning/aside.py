"""A call in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Aside(Generic[T]):
    """A call that has begun. Ctrl-C ends a wait for it, not the call, and the interpreter exits without waiting, unlike with
    `concurrent.futures`. ``name``: of its thread."""

    def __init__(self, call: Callable[[], T], name: str):
        self._found: list[T] = []
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._found.append(call())
            except BaseException as error:  # SystemExit too, which would end the thread without a word
                self._error = error

        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def finished(self, seconds: float) -> bool:
        """Whether it ends within so many seconds from now."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> T:
        """What it returns or raises, once it has ended."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found[0]
