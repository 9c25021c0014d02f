"""Hugging Face's ``config.json`` of each family, both ways. A key that changes what is computed is either understood or
refused by name; keys about training, dropout and token ids are left alone. Where a file leaves a key out, as many on the
hub do, it means what transformers' configuration class takes for it: the ``defaults`` below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.errors import CheckpointError, listing
from lockstep.models.architecture.keys import (
    HFConfig,
    decoder,
    read_activation,
    read_rope,
    read_scaling,
    read_windows,
    refuse,
    write_activation,
    write_decoder,
    write_rope,
    write_windows,
)
from lockstep.models.architecture.shape import Architecture


@dataclass(frozen=True)
class Family:
    """Args:
    read, write: its config.json to an `Architecture` and back; ``write`` without the keys that `to_hf` adds for all.
    defaults: what keys mean that are not there.
    causal, classifier: its classes in transformers.
    """

    read: Callable[[HFConfig], Architecture]
    write: Callable[[Architecture], dict[str, Any]]
    defaults: HFConfig
    causal: str
    classifier: str


def from_hf(config: Mapping[str, Any]) -> Architecture:
    """The architecture a ``config.json`` describes.

    Raises:
      CheckpointError: a model type or a switch that is not supported; the message lists what is.
    """
    if config.get("model_type") == "gemma3":  # with images: its text model is one of ours
        config = {**config.get("text_config", {}), "model_type": "gemma3_text"}
    family = config.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(
            f"No decoder for model_type '{family}'. Supported: {listing(FAMILIES)}. "
            "backend=torch opens every causal language model of transformers with policy=huggingface."
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            f"This {family} checkpoint holds quantised weights (quantization_config), which are not supported. Take the model "
            "that they were made from, or a GGUF file of it."
        )
    return FAMILIES[family].read({**FAMILIES[family].defaults, **config})


def to_hf(architecture: Architecture) -> dict[str, Any]:
    """The ``config.json`` of this architecture, without token ids."""
    family = FAMILIES[architecture.family]
    named = {"model_type": architecture.family, "architectures": [family.causal]}
    return {**named, **family.write(architecture), "tie_word_embeddings": architecture.tied, "dtype": "float32"}


NO_TOKEN_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""For families whose defaults in transformers would lie outside a small vocabulary."""


# ------------------------------------------------------------------------------------------------------ Llama, Mistral


def _read_llama(c: HFConfig) -> Architecture:
    bias = bool(c["attention_bias"])
    return decoder(c, attention_bias=bias, output_bias=bias, mlp_bias=bool(c["mlp_bias"]))


def _write_llama(a: Architecture) -> dict[str, Any]:
    return {**write_decoder(a), "attention_bias": a.attention_bias, "mlp_bias": a.mlp_bias}


LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0,
}  # fmt: skip


def _read_mistral(c: HFConfig) -> Architecture:
    refuse(c, layer_types=None)
    return decoder(c, windows=_everywhere(c))


def _everywhere(c: HFConfig) -> tuple[int | None, ...]:
    return read_windows(c, [c["sliding_window"] is not None] * c["num_hidden_layers"], c["sliding_window"])


def _write_mistral(a: Architecture) -> dict[str, Any]:
    return {**write_decoder(a), "sliding_window": a.window(0)}


MISTRAL = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "sliding_window": 4096, "rope_theta": 10000.0,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- Qwen 2 and 3


def _read_qwen2(c: HFConfig) -> Architecture:
    return decoder(c, attention_bias=True, windows=_late(c))


def _read_qwen3(c: HFConfig) -> Architecture:
    bias = bool(c["attention_bias"])
    return decoder(c, attention_bias=bias, output_bias=bias, qk_norm=True, windows=_late(c))


def _late(c: HFConfig) -> tuple[int | None, ...]:
    """Windows, if they are on at all, from a layer on."""
    window = c["sliding_window"] if c["use_sliding_window"] else None
    sliding = [window is not None and layer >= c["max_window_layers"] for layer in range(c["num_hidden_layers"])]
    return read_windows(c, sliding, window)


def _write_qwen2(a: Architecture) -> dict[str, Any]:
    return {**write_decoder(a), **write_windows(a), "use_sliding_window": bool(a.windows)}


def _write_qwen3(a: Architecture) -> dict[str, Any]:
    return {**_write_qwen2(a), "attention_bias": a.attention_bias}


QWEN2 = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
    "rope_theta": 10000.0,
}  # fmt: skip
QWEN3 = {**QWEN2, "head_dim": 128, "attention_bias": False}


# -------------------------------------------------------------------------------------------------------------- Phi-3


def _read_phi3(c: HFConfig) -> Architecture:
    refuse(c, layer_types=None)
    return decoder(c, windows=_everywhere(c), **read_rope(c, kinds=("default",), partial=True))


def _write_phi3(a: Architecture) -> dict[str, Any]:
    return {**_write_mistral(a), **NO_TOKEN_IDS}


PHI3 = {
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
    "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "sliding_window": None, "rope_theta": 10000.0,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ SmolLM3


def _read_smollm3(c: HFConfig) -> Architecture:
    layers, every = c["num_hidden_layers"], c["no_rope_layer_interval"]
    turns = [(layer + 1) % every != 0 for layer in range(layers)]
    if c.get("no_rope_layers") is not None:  # which lists, against its name, the layers that do turn
        turns = [bool(turn) for turn in c["no_rope_layers"][:layers]]
    if len(turns) < layers:
        raise CheckpointError(f"This smollm3 model has {len(turns)} entries in no_rope_layers for {layers} layers.")
    window = c["sliding_window"] if c["use_sliding_window"] else None
    return decoder(
        c,
        attention_bias=bool(c["attention_bias"]),
        output_bias=bool(c["attention_bias"]),
        mlp_bias=bool(c["mlp_bias"]),
        unrotated=() if all(turns) else tuple(not turn for turn in turns),
        windows=read_windows(c, [window is not None and not turn for turn in turns], window),
    )


def _write_smollm3(a: Architecture) -> dict[str, Any]:
    turns = [int(a.rope(layer) is not None) for layer in range(a.layers)]
    windows = {**write_windows(a), "use_sliding_window": bool(a.windows)}
    return {**_write_llama(a), **windows, "no_rope_layers": turns, **NO_TOKEN_IDS}


SMOLLM3 = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": None, "no_rope_layer_interval": 4,
    "attention_bias": False, "mlp_bias": False, "rope_theta": 2000000.0,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- Gemma 2 and 3


def _gemma(c: HFConfig, **switches: Any) -> Architecture:
    refuse(c, use_bidirectional_attention=False)
    bias = bool(c["attention_bias"])
    return decoder(
        c, activation=read_activation(c["hidden_activation"]), attention_bias=bias, output_bias=bias,
        query_scalar=c["query_pre_attn_scalar"], final_softcap=c["final_logit_softcapping"], unit_offset=True,
        out_norms=True, scaled_embedding=True, **switches,
    )  # fmt: skip


def _read_gemma2(c: HFConfig) -> Architecture:
    sliding = [layer % 2 == 0 for layer in range(c["num_hidden_layers"])]
    windows = read_windows(c, sliding, c["sliding_window"])
    return _gemma(c, attention_softcap=c["attn_logit_softcapping"], windows=windows)


def _read_gemma3(c: HFConfig) -> Architecture:
    refuse(c, attn_logit_softcapping=None)  # transformers has the key, and does not read it
    rope = c.get("rope_parameters") or {}
    if not all(isinstance(value, Mapping) for value in rope.values() if value is not None):
        raise CheckpointError("This gemma3_text model has one record of rope_parameters. Supported: one per kind of layer.")
    full = {**(rope.get("full_attention") or {}), **(c.get("rope_scaling") or {})}
    local = rope.get("sliding_attention") or {}
    for record in (full, local):
        refuse({**record, "model_type": c["model_type"]}, partial_rotary_factor=1.0)
    read_scaling(c, local, ("default",))
    sliding = [(layer + 1) % c["sliding_window_pattern"] != 0 for layer in range(c["num_hidden_layers"])]
    return _gemma(
        c,
        rope_theta=float(full.get("rope_theta") or c["rope_theta"]),
        rope_scaling=read_scaling(c, full, ("default", "linear", "llama3")),
        local_rope_theta=float(local.get("rope_theta") or c["rope_local_base_freq"]),
        qk_norm=True,
        windows=read_windows(c, sliding, c["sliding_window"]),
    )


def _write_gemma(a: Architecture) -> dict[str, Any]:
    config = write_decoder(a)
    config.pop("hidden_act")
    return {
        **config, **write_windows(a), **NO_TOKEN_IDS, "attention_bias": a.attention_bias,
        "hidden_activation": "gelu_pytorch_tanh" if a.activation == "gelu_tanh" else write_activation(a.activation),
        "query_pre_attn_scalar": a.query_scalar, "final_logit_softcapping": a.final_softcap,
        "attn_logit_softcapping": a.attention_softcap,
    }  # fmt: skip


def _write_gemma3(a: Architecture) -> dict[str, Any]:
    config = _write_gemma(a)
    config.pop("rope_theta")
    local = {"rope_type": "default", "rope_theta": a.local_rope_theta}
    return {**config, "rope_parameters": {"full_attention": write_rope(a), "sliding_attention": local}}


GEMMA2 = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "rope_theta": 10000.0,
}  # fmt: skip
GEMMA3 = {
    **GEMMA2, "vocab_size": 262208, "max_position_embeddings": 131072, "final_logit_softcapping": None,
    "attn_logit_softcapping": None, "sliding_window_pattern": 6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------- GPT-NeoX, GPT-2


def _read_neox(c: HFConfig) -> Architecture:
    refuse(c, head_dim=c["hidden_size"] // c["num_attention_heads"], num_key_value_heads=c["num_attention_heads"])
    bias = bool(c["attention_bias"])
    c = {**c, "rope_theta": c["rotary_emb_base"], "partial_rotary_factor": c["rotary_pct"]}
    return decoder(
        c, norm="layer", norm_eps=c["layer_norm_eps"], gated=False, attention_bias=bias, output_bias=bias, mlp_bias=True,
        parallel_residual=bool(c["use_parallel_residual"]), **read_rope(c, partial=True),
    )  # fmt: skip


def _write_neox(a: Architecture) -> dict[str, Any]:
    config = write_decoder(a)
    rope = {**config["rope_parameters"], "partial_rotary_factor": (a.rotary_dims or a.head_dim) / a.head_dim}
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta"):
        config.pop(key)
    return {
        **config, "layer_norm_eps": a.norm_eps, "attention_bias": a.attention_bias,
        "use_parallel_residual": a.parallel_residual, "rope_parameters": rope, "rotary_emb_base": a.rope_theta,
        "rotary_pct": rope["partial_rotary_factor"],
    }  # fmt: skip


NEOX = {
    "vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44, "num_attention_heads": 64,
    "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "tie_word_embeddings": False,
    "use_parallel_residual": True, "attention_bias": True, "rotary_emb_base": 10000.0, "rotary_pct": 0.25,
}  # fmt: skip


def _read_gpt2(c: HFConfig) -> Architecture:
    refuse(c, scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False, add_cross_attention=False)
    refuse(c, scale_attn_weights=True)
    sizes = {
        "hidden_size": c["n_embd"], "num_hidden_layers": c["n_layer"], "num_attention_heads": c["n_head"],
        "intermediate_size": c["n_inner"] or 4 * c["n_embd"], "max_position_embeddings": c["n_positions"],
    }  # fmt: skip
    return decoder(
        {**c, **sizes}, norm="layer", norm_eps=c["layer_norm_epsilon"], positions="learned", rope_theta=0.0, rope_scaling=None,
        activation=read_activation(c["activation_function"]), gated=False, attention_bias=True, output_bias=True, mlp_bias=True,
    )  # fmt: skip


def _write_gpt2(a: Architecture) -> dict[str, Any]:
    return {
        "vocab_size": a.vocab_size, "n_embd": a.hidden_size, "n_layer": a.layers, "n_head": a.heads,
        "n_inner": a.intermediate_size, "n_positions": a.context_length, "layer_norm_epsilon": a.norm_eps,
        "activation_function": write_activation(a.activation), "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    }  # fmt: skip


GPT2 = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def _family(read: Any, write: Any, defaults: HFConfig, name: str, **classes: str) -> Family:
    usual = {"causal": f"{name}ForCausalLM", "classifier": f"{name}ForSequenceClassification"}
    return Family(read, write, defaults, **{**usual, **classes})


FAMILIES = {
    "llama": _family(_read_llama, _write_llama, LLAMA, "Llama"),
    "gpt2": _family(_read_gpt2, _write_gpt2, GPT2, "GPT2", causal="GPT2LMHeadModel"),
    "qwen2": _family(_read_qwen2, _write_qwen2, QWEN2, "Qwen2"),
    "qwen3": _family(_read_qwen3, _write_qwen3, QWEN3, "Qwen3"),
    "gemma2": _family(_read_gemma2, _write_gemma, GEMMA2, "Gemma2"),
    "gemma3_text": _family(_read_gemma3, _write_gemma3, GEMMA3, "Gemma3Text", causal="Gemma3ForCausalLM"),
    "gpt_neox": _family(_read_neox, _write_neox, NEOX, "GPTNeoX"),
    "mistral": _family(_read_mistral, _write_mistral, MISTRAL, "Mistral"),
    "phi3": _family(_read_phi3, _write_phi3, PHI3, "Phi3"),
    "smollm3": _family(_read_smollm3, _write_smollm3, SMOLLM3, "SmolLM3"),
}
"""By ``model_type``."""
