"""GPT-NeoX (Black et al. 2022) and Pythia: parallel residual, partial rotary positions."""

from __future__ import annotations

from typing import Any

from lockstep.models.architecture.family import Family
from lockstep.models.architecture.keys import HFConfig, decoder, read_rope, refuse, write_decoder
from lockstep.models.architecture.naming import QKV, Naming
from lockstep.models.architecture.shape import Architecture


def read(c: HFConfig) -> Architecture:
    refuse(c, head_dim=c["hidden_size"] // c["num_attention_heads"], num_key_value_heads=c["num_attention_heads"])
    bias = bool(c["attention_bias"])
    c = {**c, "rope_theta": c["rotary_emb_base"], "partial_rotary_factor": c["rotary_pct"]}
    return decoder(
        c, norm="layer", norm_eps=c["layer_norm_eps"], gated=False, attention_bias=bias, output_bias=bias, mlp_bias=True,
        parallel_residual=bool(c["use_parallel_residual"]), **read_rope(c, partial=True),
    )  # fmt: skip


def write(a: Architecture) -> dict[str, Any]:
    config = write_decoder(a)
    rope = {**config["rope_parameters"], "partial_rotary_factor": (a.rotary_dims or a.head_dim) / a.head_dim}
    for key in ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta"):
        config.pop(key)
    return {
        **config, "layer_norm_eps": a.norm_eps, "attention_bias": a.attention_bias,
        "use_parallel_residual": a.parallel_residual, "rope_parameters": rope, "rotary_emb_base": a.rope_theta,
        "rotary_pct": rope["partial_rotary_factor"],
    }  # fmt: skip


FAMILY = Family(
    model_type="gpt_neox",
    read=read,
    write=write,
    defaults={
        "vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44, "num_attention_heads": 64,
        "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "tie_word_embeddings": False,
        "use_parallel_residual": True, "attention_bias": True, "rotary_emb_base": 10000.0, "rotary_pct": 0.25,
    },
    causal="GPTNeoXForCausalLM",
    classifier="GPTNeoXForSequenceClassification",
    special="Pythia too: parallel residual, partial rotary positions",
    refused="other head sizes",
    naming=Naming(
        {
            "model.embed_tokens": "gpt_neox.embed_in",
            "model.norm": "gpt_neox.final_layer_norm",
            "model.layers": "gpt_neox.layers",
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
            "lm_head": "embed_out",
        },
        fused={"attention.query_key_value": QKV},
        by_head=True,
    ),
    aliases={"lm_head.": "embed_out."},  # in transformers' modules
)  # fmt: skip
