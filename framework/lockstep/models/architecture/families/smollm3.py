"""SmolLM3 (Hugging Face, 2025): some layers without positions (NoPE; Kazemnejad et al. 2023)."""

from __future__ import annotations

from typing import Any

from lockstep.errors import CheckpointError
from lockstep.models.architecture.families import llama
from lockstep.models.architecture.family import Family
from lockstep.models.architecture.keys import NO_TOKEN_IDS, HFConfig, decoder, read_windows, write_windows
from lockstep.models.architecture.shape import Architecture


def read(c: HFConfig) -> Architecture:
    layers, every = c["num_hidden_layers"], c["no_rope_layer_interval"]
    turns = [(layer + 1) % every != 0 for layer in range(layers)]
    if c.get("no_rope_layers") is not None:  # despite its name, it marks the layers that are rotated
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


def write(a: Architecture) -> dict[str, Any]:
    turns = [int(a.rope(layer) is not None) for layer in range(a.layers)]
    windows = {**write_windows(a), "use_sliding_window": bool(a.windows)}
    return {**llama.write(a), **windows, "no_rope_layers": turns, **NO_TOKEN_IDS}


FAMILY = Family(
    model_type="smollm3",
    read=read,
    write=write,
    defaults={
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": None,
        "no_rope_layer_interval": 4, "attention_bias": False, "mlp_bias": False, "rope_theta": 2000000.0,
    },
    causal="SmolLM3ForCausalLM",
    classifier="SmolLM3ForSequenceClassification",
    special="layers without positions, windows",
    refused="other kinds of scaling (YaRN)",
)  # fmt: skip
