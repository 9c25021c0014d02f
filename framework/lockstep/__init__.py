"""Lockstep: RLHF experiments that march in lockstep on PyTorch and JAX.

The Python API, documented in docs/api.md. Names are imported on first use, so `import lockstep` is light; the core imports
neither torch nor jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lockstep.version import __version__

if TYPE_CHECKING:
    from lockstep.api.policies import ChatPolicy, Conversation, load, new_policy
    from lockstep.api.results import Run, results, run
    from lockstep.api.scorers import Scorer
    from lockstep.api.training import train

__all__ = [
    "ChatPolicy",
    "Conversation",
    "Run",
    "Scorer",
    "__version__",
    "load",
    "new_policy",
    "results",
    "run",
    "train",
]

_MODULES = {
    "ChatPolicy": "policies",
    "Conversation": "policies",
    "load": "policies",
    "new_policy": "policies",
    "Run": "results",
    "results": "results",
    "run": "results",
    "Scorer": "scorers",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        from lockstep.errors import did_you_mean

        raise AttributeError(f"module 'lockstep' has no attribute '{name}'.{did_you_mean(name, __all__)}")
    value = globals()[name] = getattr(importlib.import_module(f"lockstep.api.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
