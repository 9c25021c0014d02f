"""What a check is, and how checks run.

A check is a function of a subject. It returns if the property holds, raises `Violation` with the numbers if it does not, and
`Inapplicable` if there is nothing to check. Its docstring states the property.
"""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lockstep.processes import ALONE, Processes, decode, encode

KINDS = {
    "backend": ("backends", "meshes"),
    "policy": ("policies",),
    "reward_model": ("reward_models",),
    "environment": ("environments",),
    "engine": ("engines",),
    "labeler": ("labelers",),
    "attacker": ("attackers",),
    "algorithm": ("algorithms",),
}
"""What can be checked, and the modules of this package that hold the checks."""


class Violation(Exception):
    """The property does not hold; the message has the numbers."""


class Inapplicable(Exception):
    """There is nothing to check here; the message says why."""


@dataclass(frozen=True)
class Check:
    """One property. ``usually``: what a failure usually means."""

    kind: str
    name: str
    run: Callable[[Any], None]
    usually: str

    @property
    def property(self) -> str:
        return " ".join((self.run.__doc__ or "").split())


CHECKS: dict[str, dict[str, Check]] = {kind: {} for kind in KINDS}
"""{kind: {name: check}}. Importing a module again replaces its checks."""


def check(kind: str, usually: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function as a check of ``kind``."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        CHECKS[kind][function.__name__] = Check(kind, function.__name__, function, usually)
        return function

    return register


@dataclass(frozen=True)
class Outcome:
    """The result of a check. ``detail``: the numbers of a failure, or why the check does not apply. ``traceback``: that of an
    unexpected error in the check."""

    check: Check
    status: Literal["passed", "failed", "inapplicable"]
    detail: str
    seconds: float
    traceback: str = ""


def checks(kind: str) -> list[Check]:
    """All checks of this kind, in order."""
    for module in KINDS[kind]:
        importlib.import_module(f"lockstep.checking.conformance.{module}")
    return list(CHECKS[kind].values())


def conform(kind: str, subject: Any, only: Callable[[Check], bool] = lambda check: True) -> Iterator[Outcome]:
    """Run the checks of this kind on a subject, one after the other; an unexpected exception is a failure. Several processes run
    each check together, and it fails if it fails on any of them."""
    processes: Processes = getattr(getattr(subject, "world", subject), "processes", ALONE)
    for each in filter(only, checks(kind)):
        started = time.perf_counter()
        status, detail, raised = "passed", "", ""
        try:
            each.run(subject)
        except Inapplicable as reason:
            status, detail = "inapplicable", str(reason)
        except Violation as violation:
            status, detail = "failed", str(violation)
        except Exception as error:
            status, detail, raised = "failed", f"it raised {type(error).__name__}: {error}", traceback.format_exc()
        everywhere = [decode(message) for message in processes.exchange(encode((status, detail)))]
        if status != "failed" and (failed := [rank for rank, (status, _) in enumerate(everywhere) if status == "failed"]):
            status, detail = "failed", f"on process {failed[0]} of {processes.count}: {everywhere[failed[0]][1]}"
        yield Outcome(each, status, detail, time.perf_counter() - started, raised)


# --------------------------------------------------------------------------------------------------- what checks say


def require(holds: Any, message: str) -> None:
    """
    Raises:
      Violation: ``holds`` is false.
    """
    if not holds:
        raise Violation(message)


def near(what: str, found: Any, expected: Any, tolerance: float) -> None:
    """Require equal shapes, and equal numbers within ``tolerance``; NaN equals nothing.

    Raises:
      Violation: they are not; the message has the place of the largest difference and both numbers.
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    require(found.shape == expected.shape, f"{what} has shape {found.shape} where {expected.shape} was expected")
    gap = np.abs(found - expected)
    gap = np.where(np.isnan(gap), np.inf, gap)
    if gap.size and gap.max() > tolerance:
        place = tuple(int(i) for i in np.unravel_index(gap.argmax(), gap.shape))
        where = f" at {list(place)}" if place else ""
        raise Violation(
            f"{what}: {found[place]:.7g} where {expected[place]:.7g} was expected{where}; the difference {gap[place]:.3g} is "
            f"above {tolerance:.3g}"
        )


def same(what: str, found: Any, expected: Any) -> None:
    """Require equal shapes and exactly equal values; NaN equals NaN.

    Raises:
      Violation: they are not; the message has the first place that differs and both values.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    require(found.shape == expected.shape, f"{what} has shape {found.shape} where {expected.shape} was expected")
    if different := np.argwhere(~((found == expected) | ((found != found) & (expected != expected)))).tolist():
        place = tuple(different[0])
        raise Violation(
            f"{what} differs in {len(different)} of {found.size} places, first {found[place]!r} where {expected[place]!r} "
            f"was expected at {list(place)}"
        )


def same_arrays(what: str, found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Require the same keys, and `same` for each array."""
    require(found.keys() == expected.keys(), f"{what} has keys {sorted(found)} where {sorted(expected)} were expected")
    for name in expected:
        same(f"{what} {name}", found[name], expected[name])


def near_arrays(what: str, found: dict[str, np.ndarray], expected: dict[str, np.ndarray], relative: float) -> None:
    """Require the same keys, and `near` for each array within ``relative`` times the largest number in all expected arrays."""
    require(found.keys() == expected.keys(), f"{what} has keys {sorted(found)} where {sorted(expected)} were expected")
    scale = max((float(np.abs(array).max()) for array in expected.values() if array.size), default=0.0)
    for name in expected:
        near(f"{what} {name}", found[name], expected[name], relative * scale)
