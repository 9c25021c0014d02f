"""Plugins that are wrong on purpose: each is a mistake somebody made, and says which check has to catch it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lockstep.checking.conformance import Outcome, conform, subject
from lockstep.checking.conformance.kit import KINDS
from lockstep.registry import Plugin, registry

DEFECTS: dict[str, list[tuple[type, str]]] = {kind: [] for kind in KINDS}


def defect(kind: str, caught_by: str) -> Callable[[type], type]:
    """Register a class as a deliberately broken component of ``kind``; the docstring says what the mistake is."""

    def register(cls: type) -> type:
        DEFECTS[kind].append((cls, caught_by))
        return cls

    return register


def broken(kind: str, cls: Any) -> Any:
    """The class as a subject, on torch unless it says otherwise."""
    target = f"{cls.__module__}:{cls.__name__}"
    if kind != "backend":
        return subject(kind, target, "torch", overrides=["backend.threads=1"], like=getattr(cls, "like", None))
    if ("backend", cls.__name__, cls.__name__) not in registry().components:
        policy = getattr(cls, "policy", "lockstep_torch.policies:Decoder")
        components = {"backend": {cls.__name__: target}, "policy": {"decoder": policy}}
        registry().add(Plugin(components, backend=cls.__name__), "defects")
    overrides, like = getattr(cls, "overrides", ()), getattr(cls, "like", "torch")
    return subject(kind, cls.__name__, cls.__name__, overrides=overrides, like=like)


def caught(kind: str, cls: Any, caught_by: str) -> Outcome:
    """Of that check on this class."""
    (outcome,) = conform(kind, broken(kind, cls), only=lambda check: check.name == caught_by)
    return outcome
