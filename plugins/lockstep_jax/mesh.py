"""Several devices that act as one (GSPMD; Xu et al. 2021). Parameters are sharded among them by a rule for each leaf, rows by
their place in the batch. Arrays [batch, time] are whole where they enter and leave a program, so that losses and algorithms need
not know about the mesh. Without a mesh, the functions for programs return what they are given.

Each process has all devices of its host. Over several hosts, a mesh has the devices of all hosts (`jax.distributed`), and every
process runs the same programs on the same host arrays.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lockstep.config.mesh import MeshConfig
from lockstep.errors import ConfigError
from lockstep.launchers import Place, meeting_place
from lockstep.processes import SILENCE, Processes

Tree = Any
"""Nested dicts of arrays."""

ROWS = ("data", "fsdp")
"""The axes that rows are sharded along: each device has a part of the parameters and a part of the rows (ZeRO-3; Rajbhandari et
al. 2020)."""


def made(config: MeshConfig, devices: list[jax.Device]) -> Mesh | None:
    """A mesh of the first of these devices, as many as the configuration asks for; None if that is one.

    Raises:
      ConfigError: there are fewer devices, or the mesh leaves out devices of other processes.
    """
    sizes = config.sizes(len(devices))
    count, processes = math.prod(sizes.values()), len({device.process_index for device in devices})
    if processes > 1 and count < len(devices):
        raise ConfigError(
            f"backend.mesh={config} is of {count} devices, and {processes} processes have {len(devices)}. "
            "Type: backend.mesh.fsdp=-1"
        )
    if count == 1:
        return None
    places = np.array(devices[:count]).reshape(tuple(sizes.values()))
    return Mesh(places, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


class Group(Processes):
    """The processes of `jax.distributed`, which ends all of them once one gives no sign of life."""

    def __init__(self, where: Place):
        if not jax.distributed.is_initialized():
            address = ":".join(meeting_place(where))
            jax.distributed.initialize(address, where.count, where.rank, heartbeat_timeout_seconds=math.ceil(SILENCE))
        self.rank, self.count = where.rank, where.count

    def gather(self, own: np.ndarray) -> np.ndarray:
        found: np.ndarray = multihost_utils.process_allgather(own, tiled=True)
        return found


def described(mesh: Mesh) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)


def put(mesh: Mesh, tree: Tree) -> Tree:
    """Place host arrays, the same in every process, on the devices as sharded parameters. Each process reads only its own parts.
    The results are never views of host memory."""

    def one(array: Any, place: NamedSharding) -> jax.Array:
        placed = jax.make_array_from_callback(array.shape, place, lambda part: np.array(array[part]))
        return placed.block_until_ready()  # else all host arrays exist at once

    return jax.tree.map(one, tree, shardings(mesh, tree))


def get(array: jax.Array, layer: int | None = None) -> np.ndarray:
    """The whole of a parameter that may be sharded, or of one layer of it, on the host, maybe as a view. Collective: every
    process must call it."""
    if len(array.sharding.device_set) == 1 and array.is_fully_addressable and next(iter(array.devices())).platform == "cpu":
        return np.asarray(array) if layer is None else np.asarray(array)[layer]
    return np.asarray(_whole(array.sharding)(array, layer))


@functools.cache
def _whole(sharding: jax.sharding.Sharding) -> Any:
    place = NamedSharding(sharding.mesh, P()) if isinstance(sharding, NamedSharding) else sharding
    return jax.jit(lambda array, layer: array if layer is None else array[layer], out_shardings=place)


def divided(mesh: Mesh | None, tree: Tree) -> Tree:
    """In a program: parameters, or trees of their shape, sharded as `put` shards them."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shardings(mesh, tree))


def gathered(mesh: Mesh | None, tree: Tree) -> Tree:
    """In a program: parameters sharded along the tensor axis only. Call it before a loop over tokens, which would otherwise
    gather them for each token."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shardings(mesh, tree, ("tensor",)))


def rows(mesh: Mesh | None, tree: Tree) -> Tree:
    """In a program: arrays [B, ...] with sharded rows. Left to itself, XLA gives every device all rows."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P(ROWS)))


def heads(mesh: Mesh | None, tree: Tree) -> Tree:
    """In a program: arrays [B, heads, ...] with sharded rows, and heads sharded as the kernels before them make them."""
    unsaid = P(ROWS, P.UNCONSTRAINED)
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, unsaid))


def row_parts(mesh: Mesh | None) -> int:
    """The number of parts that rows are sharded into."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def whole(mesh: Mesh | None, tree: Tree) -> Tree:
    """In a program: arrays that are whole on every device."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))


def shardings(mesh: Mesh, tree: Tree, axes: tuple[str, ...] = ("fsdp", "tensor")) -> Tree:
    """The sharding of each leaf, along no other axes than these."""
    return jax.tree_util.tree_map_with_path(lambda path, array: _sharding(mesh, path, np.shape(array), axes), tree)


def _sharding(mesh: Mesh, path: Any, shape: tuple[int, ...], axes: tuple[str, ...]) -> NamedSharding:
    """The sharding of one leaf. A dimension that its axis does not divide evenly stays whole."""
    rule = _rule([str(getattr(key, "key", key)) for key in path])
    first = (None,) * (len(shape) - len(rule))  # stacked layers have one more axis, in front
    wanted = [axis if axis in axes else None for axis in (*first, *rule)]
    fitting = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(wanted, shape, strict=True)]
    return NamedSharding(mesh, P(*fitting))


COLUMNS, SUMS = ("fsdp", "tensor"), ("tensor", "fsdp")
"""The axes of a kernel [inputs, outputs]: `COLUMNS` if the tensor axis divides its outputs, `SUMS` if it divides its inputs,
which are summed over."""


def _rule(path: list[str]) -> tuple[str | None, ...]:
    """The axes of a parameter's last dimensions. Vectors are whole."""
    *_, module, leaf = ["", *path]
    inputs, outputs = SUMS if module in ("o_proj", "down_proj") else COLUMNS
    kinds = {
        "embedding": ("tensor", "fsdp"),
        "kernel": (inputs, outputs),
        "lora_A": (inputs, None),
        "lora_B": (None, outputs),
    }
    return kinds.get(leaf, ())
