"""Gemma 2 (Gemma Team 2024): softcaps, windows on every other layer, norms on outputs, scaled embeddings."""

from __future__ import annotations

from typing import Any

from lockstep.models.architecture.family import Family
from lockstep.models.architecture.keys import (
    NO_TOKEN_IDS,
    HFConfig,
    decoder,
    read_activation,
    read_windows,
    refuse,
    write_activation,
    write_decoder,
    write_windows,
)
from lockstep.models.architecture.naming import Naming
from lockstep.models.architecture.shape import Architecture


def read(c: HFConfig) -> Architecture:
    sliding = [layer % 2 == 0 for layer in range(c["num_hidden_layers"])]
    windows = read_windows(c, sliding, c["sliding_window"])
    return gemma(c, attention_softcap=c["attn_logit_softcapping"], windows=windows)


def gemma(c: HFConfig, **switches: Any) -> Architecture:
    refuse(c, use_bidirectional_attention=False)
    bias = bool(c["attention_bias"])
    return decoder(
        c, activation=read_activation(c["hidden_activation"]), attention_bias=bias, output_bias=bias,
        query_scalar=c["query_pre_attn_scalar"], final_softcap=c["final_logit_softcapping"], unit_offset=True,
        out_norms=True, scaled_embedding=True, **switches,
    )  # fmt: skip


def write(a: Architecture) -> dict[str, Any]:
    config = write_decoder(a)
    config.pop("hidden_act")
    return {
        **config, **write_windows(a), **NO_TOKEN_IDS, "attention_bias": a.attention_bias,
        "hidden_activation": "gelu_pytorch_tanh" if a.activation == "gelu_tanh" else write_activation(a.activation),
        "query_pre_attn_scalar": a.query_scalar, "final_logit_softcapping": a.final_softcap,
        "attn_logit_softcapping": a.attention_softcap,
    }  # fmt: skip


FAMILY = Family(
    model_type="gemma2",
    read=read,
    write=write,
    defaults={
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False, "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "rope_theta": 10000.0,
    },
    causal="Gemma2ForCausalLM",
    classifier="Gemma2ForSequenceClassification",
    special="softcaps, windows on every other layer, norms on outputs, scaled embeddings",
    refused="bidirectional attention",
    naming=Naming(  # Gemma's post_attention_layernorm, unlike Llama's, comes after attention
        {
            "attention_out_norm": "post_attention_layernorm",
            "post_attention_layernorm": "pre_feedforward_layernorm",
            "mlp_out_norm": "post_feedforward_layernorm",
        }
    ),
)  # fmt: skip
