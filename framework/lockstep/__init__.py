"""Lockstep: RLHF experiments that march in lockstep on PyTorch and JAX.

The core: nouns, verbs, registry, configuration, numerics and the runner. It imports neither torch nor jax.
"""

__version__ = "0.1.0"
