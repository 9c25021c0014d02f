"""Errors a person can act on: what was asked, where, what exists, what to type next.

The command line prints a `LockstepError` as one message without a traceback; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import os
import reprlib
import sysconfig
import traceback
from collections.abc import Iterable
from types import FrameType


class LockstepError(Exception):
    """A user error; the message explains the fix. ``told`` is True if process 0 reports it."""

    told = False


class ConfigError(LockstepError):
    """A configuration that cannot work: unknown or missing keys, wrong types, sizes that do not fit."""


class RegistryError(LockstepError):
    """A plugin that is unknown, registered twice or not usable."""


class DataError(LockstepError):
    """A row, file or data set that cannot be read as requested."""


class MissingData(DataError):
    """A data source without the data that the stage needs."""


class Unreachable(DataError):
    """A hub data set that could not be loaded, perhaps only for lack of a network."""


class CheckpointError(LockstepError):
    """A checkpoint that is missing, damaged or of another architecture."""


class Diverged(LockstepError):
    """Training whose numbers are no longer finite."""


class OutOfStep(LockstepError):
    """Processes of one run that should agree and do not."""


class Stopped(LockstepError):
    """The run was asked to stop and has saved its state."""


class Waiting(Stopped):
    """The run needs labels that people still have to give."""


class RewardError(LockstepError):
    """A reward that could not be computed. It is never replaced by a number."""


class EnvironmentFailed(LockstepError):
    """An environment that did not reply, or whose reply is not valid."""


class EngineFailed(LockstepError):
    """An engine that drew no tokens, or whose answer cannot be samples of the policy."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean 'ppo'?' for the nearest known name, whatever its case, or an empty string."""
    lower = {each.lower(): each for each in known}
    nearest = difflib.get_close_matches(name.lower(), list(lower), n=1)
    return f" Did you mean '{short(lower[nearest[0]])}'?" if nearest else ""


def told(value: object) -> str:
    """The repr of a user's ``value`` for a message: of bounded length, even if the value is huge or its own repr fails."""
    return _SHORT.repr(value)


def raised(error: BaseException) -> str:
    """An exception in a user's own code for a message, with its innermost line outside of Lockstep and the standard library,
    and outside of other libraries if there is one: "my_rewards.py:7: ZeroDivisionError('division by zero')"."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_outside(frame)]
    if not frames and isinstance(error, SyntaxError) and error.filename:
        frames = [(error.filename, error.lineno or 1)]
    own = [(file, line) for file, line in frames if "-packages" not in file]
    if not frames:
        return told(error)
    file, line = (own or frames)[-1]
    return f"{file.removeprefix(os.path.join(os.getcwd(), ''))}:{line}: {told(error)}"


def _is_outside(frame: FrameType) -> bool:
    """True for code of neither Lockstep nor the standard library."""
    file, package = frame.f_code.co_filename, str(frame.f_globals.get("__name__")).partition(".")[0]
    library = file.startswith(("<frozen", sysconfig.get_path("stdlib"))) and "-packages" not in file
    return not library and package.partition("_")[0] != "lockstep"


def short(text: str, most: int = 200) -> str:
    """``text`` for a message; only the beginning of a long one."""
    return text if len(text) <= most else f"{text[:most]}..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def listing(names: Iterable[str]) -> str:
    """The names, sorted, for the end of an error message. A long list is cut and ends with the total number."""
    found = sorted(map(short, names))
    text = ", ".join(found) or "none"
    return text if len(text) <= 2000 else f"{text[:2000].rpartition(', ')[0]}, ... ({len(found)} in all)"
