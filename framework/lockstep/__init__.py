"""Lockstep: RLHF experiments that march in lockstep on PyTorch and JAX.

The core: nouns, verbs, registry, configuration, numerics and the runner. It imports neither torch nor jax.
"""

from lockstep.version import __version__

__all__ = ["__version__"]
