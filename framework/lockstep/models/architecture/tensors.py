"""A decoder's tensors: their names, shapes and initial values."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from lockstep.errors import CheckpointError
from lockstep.learning import randomness
from lockstep.models.architecture.families import family_of
from lockstep.models.architecture.naming import LANGUAGE_HEAD
from lockstep.models.architecture.shape import Architecture

T = TypeVar("T")

SCALAR_HEAD = "score.weight"
"""[1, hidden_size]: its name in transformers' sequence classifiers."""
SCALAR_BIAS = "score.bias"
"""[1]: our own; transformers ignores it, which shifts all scores by a constant."""


def trunk_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """{name: shape} of everything below the heads, in the checkpoint's layout."""
    return family_of(architecture).naming.shapes_to_checkpoint(_trunk(architecture))


def head_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the language head; empty where it is tied to the embedding."""
    shape = (architecture.vocab_size, architecture.hidden_size)
    return {} if architecture.tied else family_of(architecture).naming.shapes_to_checkpoint({LANGUAGE_HEAD: shape})


def parameter_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    return trunk_shapes(architecture) | head_shapes(architecture)


def scalar_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the trunk with a scalar head."""
    return trunk_shapes(architecture) | {SCALAR_HEAD: (1, architecture.hidden_size), SCALAR_BIAS: (1,)}


def _trunk(a: Architecture) -> dict[str, tuple[int, ...]]:
    """`trunk_shapes` under our names, which all families share: `lockstep.models.architecture.naming`."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab_size, a.hidden_size)}
    if a.positions == "learned":
        shapes["model.embed_positions.weight"] = (a.context_length, a.hidden_size)
    layer = _layer(a)
    for i in range(a.layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | _norm(a, "model.norm", a.hidden_size)


def _layer(a: Architecture) -> dict[str, tuple[int, ...]]:
    d, q, kv, f = a.hidden_size, a.heads * a.head_dim, a.kv_heads * a.head_dim, a.intermediate_size
    shapes = _norm(a, "input_layernorm", d)
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        shapes |= _linear(f"self_attn.{name}_proj", (rows, d), a.attention_bias)
    shapes |= _linear("self_attn.o_proj", (d, q), a.output_bias)
    if a.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (a.head_dim,), "self_attn.k_norm.weight": (a.head_dim,)}
    if a.out_norms:
        shapes |= _norm(a, "attention_out_norm", d) | _norm(a, "mlp_out_norm", d)
    shapes |= _norm(a, "post_attention_layernorm", d)
    for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
        if name != "gate" or a.gated:
            shapes |= _linear(f"mlp.{name}_proj", shape, a.mlp_bias)
    return shapes


def _linear(name: str, shape: tuple[int, int], bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def _norm(a: Architecture, name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,)} | ({f"{name}.bias": (size,)} if a.norm == "layer" else {})


def linear_layers(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """{name: (inputs, outputs)} of the layers that can be adapted: the trunk's linear layers, as the checkpoint names them."""
    naming = family_of(architecture).naming
    shapes = {name: shape for name, shape in _trunk(architecture).items() if len(shape) == 2 and ".embed_" not in name}
    step = 1 if naming.transposed else -1
    return {name.removesuffix(".weight"): shape[::step] for name, shape in naming.shapes_to_checkpoint(shapes).items()}


BUFFERS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
"""Causal masks and rotary tables, which old versions of transformers saved among the weights."""


def usual_names(architecture: Architecture, names: Iterable[str]) -> dict[str, str]:
    """{usual name: name in the file}. Files may use a family's aliases, or leave out the prefix of a trunk that was saved alone.

    Raises:
      CheckpointError: two names in the file mean the same tensor.
    """
    family = family_of(architecture)
    bare = {name.partition(".")[2]: name for name in trunk_shapes(architecture)}
    found: dict[str, str] = {}
    for name in names:
        usual = family.usual_name(name)
        usual = bare.get(usual, usual)
        if usual in found:
            raise CheckpointError(f"The tensor {usual} is stored twice, as {found[usual]} and as {name}.")
        found[usual] = name
    return found


def usual_tensors(architecture: Architecture, tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors under their usual names, without the extras of some checkpoints: buffers, parts of a larger model, and a second
    copy of a tied embedding."""
    family = family_of(architecture)
    return {
        name: tensors[stored]
        for name, stored in usual_names(architecture, tensors).items()
        if not BUFFERS.search(name)
        and not name.startswith(family.foreign)
        and not (architecture.tied and name == family.naming.rename(LANGUAGE_HEAD))
    }


WRAPPERS = {
    "_orig_mod.": "torch.compile", "module.": "DistributedDataParallel", "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "peft", "pretrained_model.": "a value head",
}  # fmt: skip
"""{prefix of tensor names that were saved from inside a wrapper: the wrapper}."""


def check_shapes(source: object, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that every expected tensor is present with its shape and that none is left over.

    Raises:
      CheckpointError: tensors are missing, unused or of another shape; the message names the first few.
    """
    other = {name: (found[name], shape) for name, shape in expected.items() if found.get(name, shape) != shape}
    refuse_tensors(source, missing=expected.keys() - found.keys(), unused=found.keys() - expected.keys(), other=other)


def refuse_tensors(
    source: object, *, missing: Collection[str], unused: Collection[str], other: Mapping[str, tuple[Any, Any]]
) -> None:
    """
    Args:
      missing: tensors that the model has and the checkpoint lacks; a model would start from random numbers there.
      unused: tensors of the checkpoint that the model does not have.
      other: {name: (shape in the checkpoint, shape in the model)}.

    Raises:
      CheckpointError: any of the three is not empty.
    """
    shapes = [f"{name} is {tuple(stored)}, not {tuple(own)}" for name, (stored, own) in sorted(other.items())]
    parts = [f"{what}: {_some(sorted(names))}" for what, names in (("missing", missing), ("unused", unused)) if names]
    parts += [_some(shapes)] * bool(shapes)
    if not parts:
        return
    wrapper = next((prefix for prefix in WRAPPERS if unused and all(name.startswith(prefix) for name in unused)), None)
    hint = wrapper and (
        f" The names begin with '{wrapper}': the model was saved inside {WRAPPERS[wrapper]}. Save the model that is inside, or "
        "remove the prefix."
    )
    raise CheckpointError(f"The weights in {source} do not fit its config.json: {'; '.join(parts)}.{hint or ''}")


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def check_labels(source: object, count: int) -> None:
    """Raises CheckpointError unless there is one number per response."""
    if count != 1:
        raise CheckpointError(
            f"'{source}' has num_labels={count}: it is a classifier, and Lockstep cannot know which of its classes is good. "
            "A reward model has num_labels=1."
        )


def initial_parameters(architecture: Architecture, seed: int) -> dict[str, np.ndarray]:
    """Fresh weights, float32: N(0, 0.02²); projections that write into the residual stream are scaled by 1/sqrt(2 L)
    (Radford et al. 2019, section 2.3); norm gains 1, biases 0. Drawn on the host, so all backends start alike."""
    rng = randomness.generator(seed, "initial parameters")
    naming = family_of(architecture).naming
    residual = tuple(f".{naming.rename(layer)}.weight" for layer in ("self_attn.o_proj", "mlp.down_proj"))
    out = {}
    for name, shape in parameter_shapes(architecture).items():
        if len(shape) == 1:
            out[name] = np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
        else:
            std = 0.02 / math.sqrt(2 * architecture.layers) if name.endswith(residual) else 0.02
            out[name] = (std * rng.standard_normal(shape, dtype=np.float32)).astype(np.float32)
    return out


def scalar_head(hidden_size: int, seed: int) -> np.ndarray:
    """A fresh reward head float32 [hidden_size], N(0, 1/(d + 1)): LHP and Stiennon et al. 2020."""
    rng = randomness.generator(seed, "scalar head")
    return (rng.standard_normal(hidden_size) / math.sqrt(hidden_size + 1)).astype(np.float32)
