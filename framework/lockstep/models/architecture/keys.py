"""``config.json`` keys that several families share, read into an `Architecture` and written from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.errors import CheckpointError, listing
from lockstep.models.architecture.shape import Architecture, RopeScaling

HFConfig = Mapping[str, Any]
"""A ``config.json``, with defaults for missing keys."""

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu": "gelu", "relu": "relu",
}  # fmt: skip
"""transformers' names to ours."""

KINDS = {True: "sliding_attention", False: "full_attention"}
"""transformers' names of layers with a window and without."""

NO_TOKEN_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""Keys for families whose default token ids in transformers would lie outside a small vocabulary."""


def decoder(c: HFConfig, **switches: Any) -> Architecture:
    """An `Architecture` from Llama's keys. ``switches`` add to the values read or override them."""
    heads = c["num_attention_heads"]
    common = dict(
        family=c["model_type"], vocab_size=c["vocab_size"], hidden_size=c["hidden_size"], layers=c["num_hidden_layers"],
        heads=heads, kv_heads=c.get("num_key_value_heads") or heads, head_dim=head_dim(c),
        intermediate_size=c["intermediate_size"], context_length=c["max_position_embeddings"], norm="rms",
        norm_eps=c.get("rms_norm_eps"), positions="rope", gated=True, attention_bias=False, output_bias=False, mlp_bias=False,
        tied=bool(c["tie_word_embeddings"]),
    )  # fmt: skip
    activation = {} if "activation" in switches else {"activation": read_activation(c["hidden_act"])}
    rope = {} if "rope_theta" in switches else read_rope(c)
    return Architecture(**{**common, **activation, **rope, **switches})


def head_dim(c: HFConfig) -> int:
    return c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]


def write_decoder(a: Architecture) -> dict[str, Any]:
    """Llama's keys for an `Architecture` with rope."""
    return {
        "vocab_size": a.vocab_size, "hidden_size": a.hidden_size, "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads, "head_dim": a.head_dim,
        "intermediate_size": a.intermediate_size, "max_position_embeddings": a.context_length, "rms_norm_eps": a.norm_eps,
        "rope_parameters": write_rope(a), "rope_theta": a.rope_theta, "hidden_act": write_activation(a.activation),
    }  # fmt: skip


def refuse(c: HFConfig, **supported: Any) -> None:
    """Raises CheckpointError for a key that is present, not null and not as in ``supported``."""
    for key, value in supported.items():
        if c.get(key) not in (None, value):
            raise CheckpointError(
                f"This {c['model_type']} model has {key}={c[key]}, which is not supported. Supported: {key}={value}. "
                "backend=torch opens it with policy=huggingface."
            )


def read_activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise CheckpointError(f"Activation '{name}' is not supported. Supported: {listing(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def write_activation(activation: str) -> str:
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == activation)


# ------------------------------------------------------------------------------------------------------------ positions


def read_rope(c: HFConfig, *, kinds: Sequence[str] = ("default", "linear", "llama3"), partial: bool = False) -> dict[str, Any]:
    """rope_theta, rope_scaling and rotary_dims. The older record ``rope_scaling`` wins over ``rope_parameters`` of
    transformers 5, and values in the record win over top-level keys."""
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise CheckpointError(f"This {c['model_type']} model has rope_parameters per kind of layer, which is not supported.")
    both = {"partial_rotary_factor": c.get("partial_rotary_factor"), **rope, "model_type": c["model_type"]}
    if not partial:
        refuse(both, partial_rotary_factor=1.0)
    return {
        "rope_theta": float(rope.get("rope_theta") or c["rope_theta"]),
        "rope_scaling": read_scaling(c, rope, kinds),
        "rotary_dims": _rotary_dims(c, both["partial_rotary_factor"]),
    }


def _rotary_dims(c: HFConfig, fraction: float | None) -> int | None:
    dims = int(head_dim(c) * (1.0 if fraction is None else fraction))
    if dims % 2:
        raise CheckpointError(
            f"This {c['model_type']} model rotates {dims} dimensions of each head. An odd number is not supported."
        )
    return None if dims == head_dim(c) else dims


def read_scaling(c: HFConfig, rope: HFConfig, kinds: Sequence[str]) -> RopeScaling | None:
    """The scaling in one record of rope parameters; None if there is none."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in kinds:
        raise CheckpointError(f"rope_type '{kind}' is not supported for {c['model_type']}. Supported: {listing(kinds)}.")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = rope.get("original_max_position_embeddings") or c["max_position_embeddings"]
    return RopeScaling("llama3", float(rope["factor"]), low, high, int(original))


def write_rope(a: Architecture) -> dict[str, Any]:
    """The rope parameters as a record that `read_rope` reads."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": a.rope_theta}
    if a.rope_scaling is not None:
        rope |= {"rope_type": a.rope_scaling.kind, "factor": a.rope_scaling.factor}
    if a.rope_scaling is not None and a.rope_scaling.kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= dict(zip(names, a.rope_scaling[2:], strict=True))
    if a.rotary_dims is not None:
        rope["partial_rotary_factor"] = a.rotary_dims / a.head_dim
    return rope


# ------------------------------------------------------------------------------------------------------ sliding windows


def read_windows(c: HFConfig, sliding: Sequence[bool], window: int | None) -> tuple[int | None, ...]:
    """The window per layer; () if no layer has one. ``layer_types``, if present, overrides ``sliding``.

    Raises:
      CheckpointError: other kinds of layers, not exactly one kind per layer, or layers with a window but no window size.
    """
    kinds = c.get("layer_types") or [KINDS[s] for s in sliding]
    if len(kinds) != c["num_hidden_layers"] or not set(kinds) <= set(KINDS.values()):
        raise CheckpointError(
            f"This {c['model_type']} model has layer_types={kinds}, which is not supported for {c['num_hidden_layers']} layers. "
            f"Supported: one of {listing(KINDS.values())} per layer."
        )
    if KINDS[True] not in kinds:
        return ()
    if window is None:
        raise CheckpointError(f"This {c['model_type']} model has {KINDS[True]} in layer_types, but no sliding window.")
    return tuple(window if kind == KINDS[True] else None for kind in kinds)


def write_windows(a: Architecture) -> dict[str, Any]:
    kinds = [KINDS[a.window(layer) is not None] for layer in range(a.layers)]
    return {"sliding_window": next(filter(None, a.windows), None), "layer_types": kinds}
