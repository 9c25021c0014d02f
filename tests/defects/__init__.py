"""Plugins that are wrong on purpose: each is a mistake somebody made, and says which check has to catch it."""

from __future__ import annotations

from collections.abc import Callable

from lockstep.checking.conformance.kit import KINDS

DEFECTS: dict[str, list[tuple[type, str]]] = {kind: [] for kind in KINDS}


def defect(kind: str, caught_by: str) -> Callable[[type], type]:
    """Register a class as a deliberately broken component of ``kind``; the docstring says what the mistake is."""

    def register(cls: type) -> type:
        DEFECTS[kind].append((cls, caught_by))
        return cls

    return register
