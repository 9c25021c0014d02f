"""Qwen 2 and 2.5 (Yang et al. 2024): biases on queries, keys and values; windows from a given layer on."""

from __future__ import annotations

from typing import Any

from lockstep.models.architecture.family import Family
from lockstep.models.architecture.keys import HFConfig, decoder, read_windows, write_decoder, write_windows
from lockstep.models.architecture.shape import Architecture


def read(c: HFConfig) -> Architecture:
    return decoder(c, attention_bias=True, windows=late_windows(c))


def late_windows(c: HFConfig) -> tuple[int | None, ...]:
    """Windows, if enabled, from layer ``max_window_layers`` on."""
    window = c["sliding_window"] if c["use_sliding_window"] else None
    sliding = [window is not None and layer >= c["max_window_layers"] for layer in range(c["num_hidden_layers"])]
    return read_windows(c, sliding, window)


def write(a: Architecture) -> dict[str, Any]:
    return {**write_decoder(a), **write_windows(a), "use_sliding_window": bool(a.windows)}


FAMILY = Family(
    model_type="qwen2",
    read=read,
    write=write,
    defaults={
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 4096,
        "max_window_layers": 28, "rope_theta": 10000.0,
    },
    causal="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    special="Qwen 2 and 2.5: biases on queries, keys and values; windows on some layers",
    refused="other kinds of scaling (YaRN)",
)  # fmt: skip
