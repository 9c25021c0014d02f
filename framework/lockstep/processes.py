"""Several processes that run one program: the same code on the same host arrays, each with a device of its own.

Every process computes everything that is [batch, time]; only what has parameters is divided, by the backend. So the processes
stay alike as long as they decide alike, and what could differ (clocks, files, servers, people) is asked by process 0 and shared:

    done = processes.share(lambda: folder.done)     process 0 looks; all know, or all raise its error
    processes.agree("batch", tokens, mask)          an error that names the process whose batch is another

One process alone is `Processes()`, where all of this costs nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from lockstep import errors
from lockstep.errors import ConfigError, LockstepError, OutOfStep, listing, told

T = TypeVar("T")


class Processes:
    """This process among ``count``, as process ``rank``. A backend with several overrides `exchange`."""

    rank: int = 0
    count: int = 1

    def exchange(self, message: bytes) -> list[bytes]:
        """The messages of all processes, in the order of their ranks. Waits for all of them, however long they take."""
        return [message]

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes, tracks and speaks."""
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on process 0, which alone calls it. What it raises there is raised everywhere.

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
            self.exchange(encode((type(error).__name__, str(error))))
            raise
        self.exchange(message)
        return value

    def any(self, true: bool) -> bool:
        """Whether it is true on any process."""
        return b"\1" in self.exchange(bytes([true]))

    def agree(self, what: str, *content: np.ndarray | str) -> None:
        """
        Raises:
          OutOfStep: on all processes, if ``what``, whose content this is, is another on one of them.
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


def asked(outputs: Iterable[str], temperature: float) -> str:
    """For `Processes.agree`: of a call of a model, what is no array. Other outputs have other collectives."""
    return f"{sorted(outputs)} at {temperature}"


def _digest(content: Iterable[np.ndarray | str]) -> bytes:
    found = hashlib.sha256()
    for each in content:
        array = np.frombuffer(each.encode(), np.uint8) if isinstance(each, str) else np.ascontiguousarray(each)
        found.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return found.digest()


def _elsewhere(kind: str, text: str) -> BaseException:
    """The error of process 0 here, where it need not be told again."""
    if kind == "KeyboardInterrupt":
        return KeyboardInterrupt()
    cls = getattr(errors, kind, None)
    error = cls(text) if isinstance(cls, type) and issubclass(cls, LockstepError) else LockstepError(f"{kind}: {text}")
    error.told = True
    return error


# ------------------------------------------------------------------------------------------------------ where this is


@dataclass(frozen=True)
class Place:
    """What the environment says: this is process ``rank`` of ``count``, and number ``local`` on its host."""

    rank: int = 0
    count: int = 1
    local: int = 0


LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
"""Variables of `lockstep run` and torchrun, and of srun."""


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Where a launcher put this process; alone without one. Slurm's variables count inside of srun only: sbatch sets some, too.

    Raises:
      ConfigError: the variables are no numbers.
    """
    for names in LAUNCHERS:
        found = [environment[name] for name in names if name in environment]
        if len(found) < len(names) or names[0].startswith("SLURM") and "SLURM_STEP_ID" not in environment:
            continue
        if not all(each.isdecimal() for each in found):
            raise ConfigError(f"{listing(names)} must be numbers, and are {', '.join(map(told, found))}.")
        here = Place(*map(int, found))
        return here if here.count > 1 else Place()
    return Place()


def meeting_place(where: Place, environment: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """The host and port where the processes find each other.

    Raises:
      ConfigError: the launcher did not say.
    """
    if not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise ConfigError(
            f"{where.count} processes were started, and do not know where to meet. Set MASTER_ADDR to the host of process 0 and "
            "MASTER_PORT to a free port there; docs/scale.md has the lines for Slurm."
        )
    return environment["MASTER_ADDR"], environment["MASTER_PORT"]


# --------------------------------------------------------------------------------------------------------- messages


def encode(value: Any) -> bytes:
    """Without pickle: JSON, with arrays and bytes behind it.

    Raises:
      TypeError: something else is in it.
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
    """As JSON: scalars as they are, everything else as [kind, content]."""
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
