"""Conversion of parameters between checkpoint names and the tree of the network's modules, both ways, a part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from flax import nnx

from lockstep.models.architecture import Architecture, family_of
from lockstep.storage.weights import as_float32
from lockstep_jax.mesh import get
from lockstep_jax.network import Tree

TRANSPOSED = ("kernel", "lora_A", "lora_B")


class Leaf:
    """A parameter of the tree on the host, in float32; each part is read when it is asked for. If ``stacked``, ``layers`` has one
    function for each index of the first axis; otherwise it has one function, which gives the whole."""

    dtype = np.dtype(np.float32)

    def __init__(self, layers: list[Callable[[], np.ndarray]], shape: tuple[int, ...], *, stacked: bool):
        self.layers, self.stacked = layers, stacked
        self.shape = (len(layers), *shape) if stacked else shape

    def __getitem__(self, part: tuple[slice, ...]) -> np.ndarray:
        if not self.stacked:
            return as_float32(self.layers[0]()[part])
        chosen = self.layers[part[0]]
        found = [slice(*each.indices(size)) for each, size in zip(part[1:], self.shape[1:], strict=True)]
        out = np.empty((len(chosen), *(each.stop - each.start for each in found)), self.dtype)
        for number, layer in enumerate(chosen):
            out[number] = as_float32(layer()[tuple(found)])
        return out


def from_arrays(architecture: Architecture, arrays: Mapping[str, np.ndarray]) -> Tree:
    """Turn host arrays under checkpoint names, in memory or `lockstep.storage.weights.mapped`, into the tree of parameters, with
    `Leaf` leaves."""
    to_common = family_of(architecture).naming.to_common
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    parts: dict[tuple[str, ...], dict[int, Callable[[], np.ndarray]]] = {}
    for stored in arrays:
        for name, array in to_common(architecture, {stored: arrays[stored]}).items():
            *path, leaf = _path(name)
            turned, layer = leaf in TRANSPOSED, 0

            def read(stored: str = stored, name: str = name, turned: bool = turned) -> np.ndarray:
                array = to_common(architecture, {stored: arrays[stored]})[name]
                return array.T if turned else array  # torch's [out, in] -> flax's [in, out]

            if path[0] == "layers":
                layer = int(path.pop(1))
            shapes[*path, leaf] = array.shape[::-1] if turned else array.shape
            parts.setdefault((*path, leaf), {})[layer] = read
    leaves = {}
    for place, shape in shapes.items():
        stacked = place[0] == "layers"
        layers = [parts[place][layer] for layer in range(architecture.layers if stacked else 1)]
        leaves[place] = Leaf(layers, shape, stacked=stacked)
    return nnx.traversals.unflatten_mapping(leaves)


class Gathered(Mapping[str, np.ndarray]):
    """The tree of parameters (or of gradients, or moments) under checkpoint names. Each value is a float32 host copy, made when
    it is asked for. Collective: all processes must ask for it."""

    def __init__(self, architecture: Architecture, params: Tree):
        self.architecture, naming = architecture, family_of(architecture).naming
        self.places: dict[str, tuple[jax.Array, int | None, bool]] = {}
        """By our own names: an array of the tree, the layer in it, and whether it is transposed."""
        for (*path, leaf), array in nnx.traversals.flatten_mapping(params).items():
            kind, turned = "bias" if leaf == "bias" else "weight", leaf in TRANSPOSED
            path = [*path, leaf] if leaf.startswith("lora") else path  # in checkpoints, a separate module
            if path[0] == "layers":
                rest = ".".join(path[1:])
                self.places |= {f"model.layers.{i}.{rest}.{kind}": (array, i, turned) for i in range(architecture.layers)}
            else:
                top = "" if path[0] in ("lm_head", "score") else "model."
                self.places[f"{top}{path[0]}.{kind}"] = array, None, turned
        self.shapes = naming.shapes_to_checkpoint({name: _shape(*place) for name, place in self.places.items()})
        self.sources = naming.sources(self.places)

    def __getitem__(self, name: str) -> np.ndarray:
        ours = {}
        for source in self.sources[name]:
            array, layer, turned = self.places[source]
            ours[source] = get(array, layer).T if turned else get(array, layer)
        (array,) = family_of(self.architecture).naming.to_checkpoint(self.architecture, ours).values()
        return np.array(array, np.float32, order="C")  # copied: on the CPU, the array may be a view of what a learner will donate

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _shape(array: jax.Array, layer: int | None, turned: bool) -> tuple[int, ...]:
    shape = array.shape if layer is None else array.shape[1:]
    return shape[::-1] if turned else shape


def _path(name: str) -> list[str]:
    """'model.layers.3.mlp.up_proj.weight' -> ['layers', '3', 'mlp', 'up_proj', 'kernel']."""
    *path, module, leaf = name.removeprefix("model.").split(".")
    if module.startswith("lora"):
        return [*path, module]
    if leaf == "weight" and module != "score":
        leaf = "embedding" if module.startswith("embed") else "scale" if module.endswith("norm") else "kernel"
    return [*path, module, leaf]
