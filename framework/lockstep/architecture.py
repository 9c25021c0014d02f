"""What a decoder is, apart from any array library: sizes and switches, initial weights, names of tensors.

Backends build the network; this file says which one. Parameters travel as ``{name: float32 array}`` under the names and
in the layouts of the Hugging Face checkpoint of the family, so that a checkpoint of either backend opens in the other
and in transformers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lockstep import randomness
from lockstep.errors import CheckpointError, listing
from lockstep.tokenizer import TokenizerConfig


@dataclass(frozen=True)
class Architecture:
    """A pre-norm decoder. ``family`` is the checkpoint format; everything else is read from its ``config.json``.

    ``positions`` is 'rope' (Su et al. 2021) or 'learned'; ``norm`` is 'rms' or 'layer'; ``gated`` is the SwiGLU shape of
    the MLP (Shazeer 2020). ``rope_scaling`` holds Llama 3's four numbers or None.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    context_length: int
    norm: str
    norm_eps: float
    positions: str
    rope_theta: float
    rope_scaling: tuple[float, float, float, int] | None
    activation: str
    gated: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied: bool


def small_decoder(
    *, vocab_size: int, hidden_size: int, layers: int, heads: int, kv_heads: int, intermediate_size: int,
    context_length: int, rope_theta: float, tied: bool,
) -> Architecture:  # fmt: skip
    """The policy that starts from scratch: Llama's shape."""
    return Architecture(
        family="llama", vocab_size=vocab_size, hidden_size=hidden_size, layers=layers, heads=heads, kv_heads=kv_heads,
        head_dim=hidden_size // heads, intermediate_size=intermediate_size, context_length=context_length, norm="rms",
        norm_eps=1e-5, positions="rope", rope_theta=rope_theta, rope_scaling=None, activation="silu", gated=True,
        attention_bias=False, output_bias=False, mlp_bias=False, tied=tied,
    )  # fmt: skip


def is_small_decoder(a: Architecture) -> bool:
    """Whether it is Llama's shape and no more: no biases, no scaled rotation, SwiGLU."""
    plain = small_decoder(
        vocab_size=a.vocab_size, hidden_size=a.hidden_size, layers=a.layers, heads=a.heads, kv_heads=a.kv_heads,
        intermediate_size=a.intermediate_size, context_length=a.context_length, rope_theta=a.rope_theta, tied=a.tied,
    )  # fmt: skip
    return a == dataclasses.replace(plain, norm_eps=a.norm_eps, head_dim=a.head_dim)


@dataclass(frozen=True)
class SmallDecoderConfig:
    """The configuration of the policy ``decoder``, for every backend."""

    tokenizer: TokenizerConfig
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    intermediate_size: int
    context_length: int
    rope_theta: float
    tied: bool

    def architecture(self, vocab_size: int) -> Architecture:
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "tokenizer"}
        return small_decoder(vocab_size=vocab_size, **sizes)


# ---------------------------------------------------------------------------------- Hugging Face's config.json, both ways


def from_hf(config: Mapping[str, Any]) -> Architecture:
    """The architecture a ``config.json`` describes.

    Raises:
      CheckpointError: a model type or a switch that is not supported; the message lists what is.
    """
    family = config.get("model_type")
    if family not in READERS:
        raise CheckpointError(
            f"No decoder for model_type '{family}'. Supported: {listing(READERS)}. "
            "backend=torch opens every causal language model of transformers with policy=huggingface."
        )
    return READERS[family](config)


def _from_llama(c: Mapping[str, Any]) -> Architecture:
    rope = c.get("rope_parameters") or {**(c.get("rope_scaling") or {}), "rope_theta": c.get("rope_theta", 10000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"rope_type '{kind}' is not supported. Supported: default, llama3.")
    scaling = None
    if kind == "llama3":
        scaling = (
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    bias = bool(c.get("attention_bias", False))
    return Architecture(
        family="llama",
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
        head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        intermediate_size=c["intermediate_size"],
        context_length=c["max_position_embeddings"],
        norm="rms",
        norm_eps=c["rms_norm_eps"],
        positions="rope",
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=scaling,
        activation=_activation(c["hidden_act"]),
        gated=True,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(c.get("mlp_bias", False)),
        tied=bool(c.get("tie_word_embeddings", False)),
    )


def _from_gpt2(c: Mapping[str, Any]) -> Architecture:
    unsupported = [k for k in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention") if c.get(k)]
    if unsupported or not c.get("scale_attn_weights", True):
        raise CheckpointError(
            f"This GPT-2 uses switches that are not supported: {listing(unsupported or ['scale_attn_weights'])}."
        )
    return Architecture(
        family="gpt2",
        vocab_size=c["vocab_size"],
        hidden_size=c["n_embd"],
        layers=c["n_layer"],
        heads=c["n_head"],
        kv_heads=c["n_head"],
        head_dim=c["n_embd"] // c["n_head"],
        intermediate_size=c.get("n_inner") or 4 * c["n_embd"],
        context_length=c["n_positions"],
        norm="layer",
        norm_eps=c["layer_norm_epsilon"],
        positions="learned",
        rope_theta=0.0,
        rope_scaling=None,
        activation=_activation(c["activation_function"]),
        gated=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied=bool(c.get("tie_word_embeddings", True)),
    )


READERS = {"llama": _from_llama, "gpt2": _from_gpt2}

ACTIVATIONS = {"silu": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise CheckpointError(f"Activation '{name}' is not supported. Supported: {listing(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def to_hf(architecture: Architecture) -> dict[str, Any]:
    """The ``config.json`` of this architecture, without token ids."""
    a = architecture
    hf_activation = next(hf for hf, ours in ACTIVATIONS.items() if ours == a.activation)
    if a.family == "gpt2":
        return {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": a.vocab_size,
            "n_embd": a.hidden_size, "n_layer": a.layers, "n_head": a.heads, "n_inner": a.intermediate_size,
            "n_positions": a.context_length, "layer_norm_epsilon": a.norm_eps, "activation_function": hf_activation,
            "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": a.tied, "dtype": "float32",
        }  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": a.rope_theta}
    if a.rope_scaling:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope |= {"rope_type": "llama3", **dict(zip(names, a.rope_scaling, strict=True))}
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size, "num_hidden_layers": a.layers, "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads, "head_dim": a.head_dim, "intermediate_size": a.intermediate_size,
        "max_position_embeddings": a.context_length, "rms_norm_eps": a.norm_eps, "rope_parameters": rope,
        "rope_theta": a.rope_theta, "hidden_act": hf_activation, "attention_bias": a.attention_bias,
        "mlp_bias": a.mlp_bias, "tie_word_embeddings": a.tied, "dtype": "float32",
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------- names and shapes

SCALAR_HEAD = "score.weight"
"""[1, hidden_size]: the name that transformers' sequence classifiers give it."""
SCALAR_BIAS = "score.bias"
"""[1]: ours; transformers ignores it, which shifts all scores by a constant."""


def trunk_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """{name: shape} of everything below the heads, in the checkpoint's layout."""
    return _gpt2_trunk(architecture) if architecture.family == "gpt2" else _llama_trunk(architecture)


def head_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the language head; empty where it is tied to the embedding."""
    return {} if architecture.tied else {"lm_head.weight": (architecture.vocab_size, architecture.hidden_size)}


def parameter_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    return trunk_shapes(architecture) | head_shapes(architecture)


def _llama_trunk(a: Architecture) -> dict[str, tuple[int, ...]]:
    d, q, kv, f = a.hidden_size, a.heads * a.head_dim, a.kv_heads * a.head_dim, a.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab_size, d)}
    for i in range(a.layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (d,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, d)
            if a.attention_bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (d, q)
        if a.output_bias:
            shapes[f"{layer}.self_attn.o_proj.bias"] = (d,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (d,)
        for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = shape
            if a.mlp_bias:
                shapes[f"{layer}.mlp.{name}_proj.bias"] = shape[:1]
    shapes["model.norm.weight"] = (d,)
    return shapes


def _gpt2_trunk(a: Architecture) -> dict[str, tuple[int, ...]]:
    """GPT-2's Conv1D weights are [in, out], with q, k and v fused."""
    d, f = a.hidden_size, a.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (a.vocab_size, d),
        "transformer.wpe.weight": (a.context_length, d),
    }
    for i in range(a.layers):
        layer = f"transformer.h.{i}"
        for name, shape in (
            ("ln_1", (d,)), ("attn.c_attn", (d, 3 * d)), ("attn.c_proj", (d, d)),
            ("ln_2", (d,)), ("mlp.c_fc", (d, f)), ("mlp.c_proj", (f, d)),
        ):  # fmt: skip
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = shape[-1:]
    return shapes | {"transformer.ln_f.weight": (d,), "transformer.ln_f.bias": (d,)}


def check_parameters(
    architecture: Architecture, parameters: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Every expected tensor is there with its shape, and no tensor is left over.

    Raises:
      CheckpointError: names the first few that are missing, unused or of another shape.
    """
    missing = sorted(shapes.keys() - parameters.keys())
    unused = sorted(parameters.keys() - shapes.keys())
    other = [f"{n} is {parameters[n].shape}, not {s}" for n, s in shapes.items() if n in parameters and parameters[n].shape != s]
    if missing or unused or other:
        found = [f"missing: {', '.join(missing[:3])}"] * bool(missing) + [f"unused: {', '.join(unused[:3])}"] * bool(unused)
        raise CheckpointError(f"The tensors do not fit this {architecture.family} architecture: {'; '.join(found + other[:3])}.")


def initial_parameters(architecture: Architecture, seed: int) -> dict[str, np.ndarray]:
    """Fresh weights, float32: N(0, 0.02²); the projections that write into the residual stream scaled by 1/sqrt(2 L)
    (Radford et al. 2019, section 2.3); norm gains 1, biases 0. Drawn on the host, so all backends start alike."""
    rng = randomness.generator(seed, "initial parameters")
    residual = ("o_proj.weight", "down_proj.weight", "c_proj.weight")
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
