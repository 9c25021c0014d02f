"""What is checked, set up in the small world: a backend or a policy is the `World` itself; a reward model and an algorithm
are built in one, in whatever way a check wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lockstep.conformance.world import World


def subject(
    kind: str, name: str, backend: str, *, precision: str | None = None, overrides: Sequence[str] = (), like: str | None = None
) -> Any:
    """The component ``name`` of ``kind`` on ``backend``, ready for `conform`. Arguments as in `World`; ``like`` names the
    configuration file to start from where the component has none of its own."""
    if kind == "backend":
        return World(name, precision=precision, overrides=overrides, like=like)
    if kind == "policy":
        return World(backend, precision=precision, policy=name, overrides=overrides)
    raise NotImplementedError(kind)
