"""Conversion of parameters between checkpoint names and the tree of the network's modules, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from lockstep.models.architecture import Architecture, family_of
from lockstep_jax.decoder import Tree
from lockstep_jax.mesh import get

TRANSPOSED = ("kernel", "lora_A", "lora_B")


def from_arrays(architecture: Architecture, arrays: Mapping[str, np.ndarray]) -> Tree:
    """Host arrays under checkpoint names -> the tree of parameters, on the host."""
    flat: dict[tuple[str, ...], Any] = {}
    for name, array in family_of(architecture).naming.to_common(architecture, arrays).items():
        *path, leaf = _path(name)
        array = array.T if leaf in TRANSPOSED else array  # torch's [out, in] -> flax's [in, out]
        if path[0] == "layers":
            flat.setdefault((path[0], *path[2:], leaf), {})[int(path[1])] = array
        else:
            flat[*path, leaf] = array
    stacked = {
        path: np.stack([value[layer] for layer in range(architecture.layers)]) if path[0] == "layers" else value
        for path, value in flat.items()
    }
    return nnx.traversals.unflatten_mapping(stacked)


def to_arrays(architecture: Architecture, params: Tree) -> dict[str, np.ndarray]:
    """The tree of parameters (or of gradients, or moments) -> float32 host copies under checkpoint names. On several
    processes, all have to ask."""
    arrays: dict[str, np.ndarray] = {}
    for (*path, leaf), array in nnx.traversals.flatten_mapping(get(params)).items():
        kind = "bias" if leaf == "bias" else "weight"
        own = (lambda x: x.T) if leaf in TRANSPOSED else (lambda x: x)
        path = [*path, leaf] if leaf.startswith("lora") else path  # a separate module there
        if path[0] == "layers":
            rest = ".".join(path[1:])
            arrays |= {f"model.layers.{i}.{rest}.{kind}": own(array[i]) for i in range(architecture.layers)}
        else:
            top = "" if path[0] in ("lm_head", "score") else "model."
            arrays[f"{top}{path[0]}.{kind}"] = own(array)
    # On the CPU, these are views of buffers that a learner will donate: hence the copies.
    named = family_of(architecture).naming.to_checkpoint(architecture, arrays)
    return {name: np.array(array, np.float32, order="C") for name, array in named.items()}


def _path(name: str) -> list[str]:
    """'model.layers.3.mlp.up_proj.weight' -> ['layers', '3', 'mlp', 'up_proj', 'kernel']."""
    *path, module, leaf = name.removeprefix("model.").split(".")
    if module.startswith("lora"):
        return [*path, module]
    if leaf == "weight" and module != "score":
        leaf = "embedding" if module.startswith("embed") else "scale" if module.endswith("norm") else "kernel"
    return [*path, module, leaf]
