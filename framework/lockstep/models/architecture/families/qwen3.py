"""Qwen 3 (Yang et al. 2025): Qwen 2 with norms on queries and keys."""

from __future__ import annotations

from typing import Any

from lockstep.models.architecture.families import qwen2
from lockstep.models.architecture.family import Family
from lockstep.models.architecture.keys import HFConfig, decoder
from lockstep.models.architecture.shape import Architecture


def read(c: HFConfig) -> Architecture:
    bias = bool(c["attention_bias"])
    return decoder(c, attention_bias=bias, output_bias=bias, qk_norm=True, windows=qwen2.late_windows(c))


def write(a: Architecture) -> dict[str, Any]:
    return {**qwen2.write(a), "attention_bias": a.attention_bias}


FAMILY = Family(
    model_type="qwen3",
    read=read,
    write=write,
    defaults={**qwen2.FAMILY.defaults, "head_dim": 128, "attention_bias": False},
    causal="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    special="norms on queries and keys; windows on some layers",
    refused="other kinds of scaling (YaRN)",
)
