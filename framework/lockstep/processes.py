"""Several processes that run one program: the same code on the same host arrays, each with a device of its own.

Every process computes everything of shape [batch, time]; the backend divides only what has parameters. So the processes stay
identical as long as they make the same decisions. Process 0 asks for whatever could differ (clocks, files, servers, people)
and shares the answer:

    done = processes.share(lambda: folder.done)     process 0 looks; all get the answer, or all raise its error
    processes.agree("batch", tokens, mask)          raises an error that names the process whose batch differs

A single process is `Processes()`, where all of this costs nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np

from lockstep import errors
from lockstep.errors import LockstepError, OutOfStep, told

T = TypeVar("T")
SILENCE = 100.0
"""Seconds. While processes wait for each other, one that does not give a sign of life for this long has stopped, and the others
end. One that is busy, as process 0 may be for hours with a slow server, gives signs of life from a thread of its own."""


class Processes:
    """This process among ``count``, as process ``rank``. A backend with several overrides `gather`."""

    rank: int = 0
    count: int = 1

    def gather(self, own: np.ndarray) -> np.ndarray:
        """All rows of the processes' arrays [rows, ...], which have equal shapes, in the order of the ranks. Waits for all
        processes, however long they take, as long as they live (`SILENCE`)."""
        return own

    def exchange(self, message: bytes) -> list[bytes]:
        """The messages of all processes, in the order of their ranks."""
        if self.count == 1:
            return [message]
        lengths = self.gather(np.array([len(message)], np.int32))
        width = 1 << int(lengths.max()).bit_length()  # few widths: each may need a program compiled
        rows = self.gather(np.frombuffer(message.ljust(width, b"\0"), np.uint8)[None])
        return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]

    @property
    def leads(self) -> bool:
        """True if this process is the one that writes, tracks and prints."""
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> T:
        """Call ``make`` on process 0 only and return its value on all processes. An exception there is raised on all.

        The value is made of None, bool, int, float, str, bytes, lists, tuples, dicts and numpy arrays.
        """
        if self.count == 1:
            return make()
        if not self.leads:
            kind, value = decode(self.exchange(b"")[0])
            if kind == "value":
                return value
            raise _elsewhere(kind, value)
        try:
            value = make()
            message = encode(("value", value))
        except BaseException as error:
            self.exchange(encode(_told(error)))
            raise
        self.exchange(message)
        return value

    def settle(self, trouble: Exception | None) -> None:
        """Raise on all processes the first error that any of them had in its share of the work; ``trouble`` is this process's."""
        if trouble is not None and self.count == 1:
            raise trouble
        for other in map(decode, self.exchange(encode(trouble and _told(trouble)))):
            if other is not None:
                raise _elsewhere(*other) from trouble

    def together(self, do: Callable[[], object]) -> None:
        """Call ``do`` on each process. An exception on one is raised on all, once each has done its part."""
        trouble: Exception | None = None
        try:
            do()
        except Exception as error:
            trouble = error
        self.settle(trouble)

    def each(self, make: Callable[[], T]) -> list[T]:
        """Call ``make`` on each process and return all values, of the types that `share` takes, in the order of the ranks. An
        exception on one process is raised on all."""
        made: list[T] = []
        self.together(lambda: made.append(make()))
        return [decode(message) for message in self.exchange(encode(made[0]))]

    def any(self, true: bool) -> bool:
        """True if ``true`` is true on any process."""
        return b"\1" in self.exchange(bytes([true]))

    def agree(self, what: str, *content: np.ndarray | str) -> None:
        """Check that the content of ``what`` is the same on all processes.

        Raises:
          OutOfStep: on all processes, if it differs on one.
        """
        if self.count == 1:
            return
        found = self.exchange(_digest(content))
        if other := [rank for rank, each in enumerate(found) if each != found[0]]:
            raise OutOfStep(
                f"Process {other[0]} of {self.count} has not the same {what} as process 0, so this run cannot continue. All "
                "processes need the same code, configuration, data and kind of processor. Look for what a plugin draws without "
                "the run's seed, or takes from a set, a clock or a file that differs between hosts."
            )


ALONE = Processes()


def call_text(outputs: Iterable[str], temperature: float) -> str:
    """The arguments of a model call that are not arrays, for `Processes.agree`. Other outputs have other collectives."""
    return f"{sorted(outputs)} at {temperature}"


def _digest(content: Iterable[np.ndarray | str]) -> bytes:
    found = hashlib.sha256()
    for each in content:
        array = np.frombuffer(each.encode(), np.uint8) if isinstance(each, str) else np.ascontiguousarray(each)
        found.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return found.digest()


def _told(error: BaseException) -> tuple[str, str]:
    return type(error).__name__, str(error)


def _elsewhere(kind: str, text: str) -> BaseException:
    """Another process's error, to raise here without reporting it again."""
    if kind == "KeyboardInterrupt":
        return KeyboardInterrupt()
    cls = getattr(errors, kind, None)
    error = cls(text) if isinstance(cls, type) and issubclass(cls, LockstepError) else LockstepError(f"{kind}: {text}")
    error.told = True
    return error


# --------------------------------------------------------------------------------------------------------- messages


def encode(value: Any) -> bytes:
    """Serialise a value that `Processes.share` takes, without pickle: JSON, followed by arrays and bytes.

    Raises:
      TypeError: the value contains something else.
    """
    parts: list[bytes] = []
    text = json.dumps(_plain(value, parts)).encode()
    return b"".join(len(each).to_bytes(8, "little") + each for each in (text, *parts))


def decode(message: bytes) -> Any:
    parts, position = [], 0
    while position < len(message):
        start = position + 8
        position = start + int.from_bytes(message[position:start], "little")
        parts.append(message[start:position])
    return _valued(json.loads(parts[0]), parts)


def _plain(value: Any, parts: list[bytes]) -> Any:
    """``value`` for JSON: scalars as they are, everything else as [kind, content]."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return [type(value).__name__, [_plain(each, parts) for each in value]]
    if type(value) is dict:
        return ["dict", [[_plain(key, parts), _plain(each, parts)] for key, each in value.items()]]
    if type(value) is bytes:
        parts.append(value)
        return ["bytes", len(parts)]
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        file = io.BytesIO()
        np.save(file, value, allow_pickle=False)
        parts.append(file.getvalue())
        return ["array", len(parts)]
    raise TypeError(f"{told(value)} cannot be shared between processes: it is a {type(value).__name__}")


def _valued(plain: Any, parts: list[bytes]) -> Any:
    if not isinstance(plain, list):
        return plain
    kind, content = plain
    if kind == "dict":
        return {_valued(key, parts): _valued(each, parts) for key, each in content}
    if kind in ("list", "tuple"):
        values = [_valued(each, parts) for each in content]
        return values if kind == "list" else tuple(values)
    return parts[content] if kind == "bytes" else np.load(io.BytesIO(parts[content]), allow_pickle=False)
