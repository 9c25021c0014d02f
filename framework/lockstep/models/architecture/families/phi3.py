"""Phi-3 (Abdin et al. 2024): fused tensors, partial rotary positions, one window for all layers."""

from __future__ import annotations

from typing import Any

from lockstep.models.architecture.families import mistral
from lockstep.models.architecture.family import Family
from lockstep.models.architecture.keys import NO_TOKEN_IDS, HFConfig, decoder, read_rope, refuse
from lockstep.models.architecture.naming import QKV, Naming
from lockstep.models.architecture.shape import Architecture


def read(c: HFConfig) -> Architecture:
    refuse(c, layer_types=None)
    return decoder(c, windows=mistral.everywhere(c), **read_rope(c, kinds=("default",), partial=True))


def write(a: Architecture) -> dict[str, Any]:
    return {**mistral.write(a), **NO_TOKEN_IDS}


FAMILY = Family(
    model_type="phi3",
    read=read,
    write=write,
    defaults={
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
        "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "sliding_window": None, "rope_theta": 10000.0,
    },
    causal="Phi3ForCausalLM",
    classifier="Phi3ForSequenceClassification",
    special="fused tensors, partial rotary positions, one window for all layers",
    refused="`longrope` (the long-context variants)",
    naming=Naming(fused={"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}),
)  # fmt: skip
