"""Mistral (Jiang et al. 2023): one window for all layers."""

from __future__ import annotations

from typing import Any

from lockstep.models.architecture.family import Family
from lockstep.models.architecture.keys import HFConfig, decoder, read_windows, refuse, write_decoder
from lockstep.models.architecture.shape import Architecture


def read(c: HFConfig) -> Architecture:
    refuse(c, layer_types=None)
    return decoder(c, windows=everywhere(c))


def everywhere(c: HFConfig) -> tuple[int | None, ...]:
    return read_windows(c, [c["sliding_window"] is not None] * c["num_hidden_layers"], c["sliding_window"])


def write(a: Architecture) -> dict[str, Any]:
    return {**write_decoder(a), "sliding_window": a.window(0)}


FAMILY = Family(
    model_type="mistral",
    read=read,
    write=write,
    defaults={
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "sliding_window": 4096, "rope_theta": 10000.0,
    },
    causal="MistralForCausalLM",
    classifier="MistralForSequenceClassification",
    special="one window for all layers",
    refused="`layer_types`",
)  # fmt: skip
