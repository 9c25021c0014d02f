"""What the network is made from: the specification that compiled programs depend on, positions, dropout and the scalar head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from lockstep.learning.randomness import hash32
from lockstep.models.adapters import Adapter
from lockstep.models.architecture import Architecture
from lockstep_jax.device import JaxDevice

Tree = Any
"""Parameters: nested dicts of arrays, named as the modules of ``decoder.py`` and ``layers.py`` are."""


TEACHER = "teacher"


@dataclass(frozen=True)
class NetworkSpec:
    """Everything about a network that a compiled program depends on, besides shapes. Models with equal specs share programs."""

    architecture: Architecture
    platform: str
    precision: str
    gradient_checkpointing: bool | None
    mesh: Mesh | None
    language_head: bool
    scalar_head: bool
    adapter: Adapter | None = None
    teacher: NetworkSpec | None = None
    """The teacher's parameters are among the frozen ones, under `TEACHER`."""
    beta: float = 1.0

    @classmethod
    def on(cls, backend: JaxDevice, architecture: Architecture, **parts: Any) -> NetworkSpec:
        """A spec with this backend's settings."""
        c = backend.config
        return cls(architecture, backend.device.platform, c.precision, c.gradient_checkpointing, backend.mesh, **parts)

    def cast(self, params: Tree) -> Tree:
        """Cast kernels to the matmul precision. A loop over tokens would otherwise do so for each token."""
        cast = lambda path, array: array.astype(self.precision) if path[-1].key == "kernel" else array  # noqa: E731
        return jax.tree_util.tree_map_with_path(cast, params)


class DropoutMask(NamedTuple):
    """`lockstep.interfaces.Dropout` in a compiled program. ``seeds``: uint32 [B]."""

    rate: Any
    seeds: Array

    def __call__(self, x: Array, site: Any, position: Array) -> Array:
        """x [B, L, d] with elements zeroed and the rest scaled up; position [B, L]."""
        width = x.shape[-1]
        element = position[..., None].astype(jnp.uint32) * np.uint32(width) + jnp.arange(width, dtype=jnp.uint32)
        row = hash32(self.seeds ^ hash32(jnp.asarray(site)))
        kept = hash32(hash32(element) ^ row[:, None, None]) >> np.uint32(8) >= self.rate * 2**24
        return jnp.where(kept, x / (1 - self.rate), 0.0)


def positions(mask: Array) -> Array:
    """[B, L] number of real tokens before each column (LHP), so that left padding does not shift a prompt. With segments, only
    tokens of the same segment count."""
    count = jnp.maximum(jnp.cumsum(mask != 0, axis=-1) - 1, 0)
    if mask.dtype == bool:
        return count
    begins = mask != jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))
    return count - jax.lax.cummax(jnp.where(begins, count, 0), axis=1)


class ScalarHead(nnx.Module):
    """[..., d] -> [...], in float32."""

    def __init__(self, hidden_size: int):
        self.weight = nnx.Param(jnp.zeros((1, hidden_size)))
        self.bias = nnx.Param(jnp.zeros(1))

    def __call__(self, hidden: Array) -> Array:
        return jnp.matmul(hidden, self.weight[0], precision="highest") + self.bias[0]  # whatever the precision of other matmuls
