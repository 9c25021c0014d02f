"""Gemma 3's text model (Gemma Team 2025): Gemma 2 with norms on queries and keys, and one theta per kind of layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lockstep.errors import CheckpointError
from lockstep.models.architecture.families import gemma2
from lockstep.models.architecture.family import Family
from lockstep.models.architecture.keys import HFConfig, read_scaling, read_windows, refuse, write_rope
from lockstep.models.architecture.shape import Architecture


def read(c: HFConfig) -> Architecture:
    refuse(c, attn_logit_softcapping=None)  # transformers has the key but does not read it
    rope = c.get("rope_parameters") or {"full_attention": {"rope_type": "default"}}  # so "type" in rope_scaling does not count
    if not all(isinstance(value, Mapping) for value in rope.values() if value is not None):
        raise CheckpointError("This gemma3_text model has one record of rope_parameters. Supported: one per kind of layer.")
    full = {**(rope.get("full_attention") or {}), **(c.get("rope_scaling") or {})}
    local = rope.get("sliding_attention") or {}
    for record in (full, local):
        refuse({**record, "model_type": c["model_type"]}, partial_rotary_factor=1.0)
    read_scaling(c, local, ("default",))
    sliding = [(layer + 1) % c["sliding_window_pattern"] != 0 for layer in range(c["num_hidden_layers"])]
    return gemma2.gemma(
        c,
        rope_theta=float(full.get("rope_theta") or c["rope_theta"]),
        rope_scaling=read_scaling(c, full, ("default", "linear", "llama3")),
        local_rope_theta=float(local.get("rope_theta") or c["rope_local_base_freq"]),
        qk_norm=True,
        windows=read_windows(c, sliding, c["sliding_window"]),
    )


def write(a: Architecture) -> dict[str, Any]:
    config = gemma2.write(a)
    config.pop("rope_theta")
    local = {"rope_type": "default", "rope_theta": a.local_rope_theta}
    return {**config, "rope_parameters": {"full_attention": write_rope(a), "sliding_attention": local}}


FAMILY = Family(
    model_type="gemma3_text",
    read=read,
    write=write,
    defaults={
        **gemma2.FAMILY.defaults, "vocab_size": 262208, "max_position_embeddings": 131072, "final_logit_softcapping": None,
        "attn_logit_softcapping": None, "sliding_window_pattern": 6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
    },
    causal="Gemma3ForCausalLM",
    classifier="Gemma3TextForSequenceClassification",
    special="two thetas, norms on queries and keys; the text model of a `gemma3` is read too, and saved alone",
    refused="bidirectional attention, softcaps in attention",
    naming=gemma2.FAMILY.naming,
    aliases={"language_model.lm_head.": "lm_head.", "language_model.model.": "model.", "model.language_model.": "model."},
    foreign=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
    text_model_of="gemma3",
)  # fmt: skip
