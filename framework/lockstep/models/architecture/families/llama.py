"""Llama (Touvron et al. 2023; Dubey et al. 2024)."""

from __future__ import annotations

from typing import Any

from lockstep.models.architecture.family import Family
from lockstep.models.architecture.keys import HFConfig, decoder, write_decoder
from lockstep.models.architecture.shape import Architecture


def read(c: HFConfig) -> Architecture:
    bias = bool(c["attention_bias"])
    return decoder(c, attention_bias=bias, output_bias=bias, mlp_bias=bool(c["mlp_bias"]))


def write(a: Architecture) -> dict[str, Any]:
    return {**write_decoder(a), "attention_bias": a.attention_bias, "mlp_bias": a.mlp_bias}


FAMILY = Family(
    model_type="llama",
    read=read,
    write=write,
    defaults={
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0,
    },
    causal="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    special="biases, free head size, Llama 3's and linear scaling of positions",
    refused="other kinds of scaling",
)  # fmt: skip
