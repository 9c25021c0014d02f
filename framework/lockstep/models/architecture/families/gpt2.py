"""GPT-2 (Radford et al. 2019): learned positions."""

from __future__ import annotations

from typing import Any

from lockstep.models.architecture.family import Family
from lockstep.models.architecture.keys import HFConfig, decoder, read_activation, refuse, write_activation
from lockstep.models.architecture.naming import QKV, Naming
from lockstep.models.architecture.shape import Architecture

SIZES = {
    "hidden_size": ("n_embd", 768), "num_hidden_layers": ("n_layer", 12), "num_attention_heads": ("n_head", 12),
    "max_position_embeddings": ("n_positions", 1024),
}  # fmt: skip
"""{usual name: (GPT-2's own name, default)}; transformers takes either name."""


def read(c: HFConfig) -> Architecture:
    refuse(c, scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False, add_cross_attention=False)
    refuse(c, scale_attn_weights=True)
    sizes = {usual: _size(c, usual, own, default) for usual, (own, default) in SIZES.items()}
    sizes["intermediate_size"] = c["n_inner"] or 4 * sizes["hidden_size"]
    return decoder(
        {**c, **sizes}, norm="layer", norm_eps=c["layer_norm_epsilon"], positions="learned", rope_theta=0.0, rope_scaling=None,
        activation=read_activation(c["activation_function"]), gated=False, attention_bias=True, output_bias=True, mlp_bias=True,
    )  # fmt: skip


def _size(c: HFConfig, usual: str, own: str, default: int) -> Any:
    given = {key: c[key] for key in (own, usual) if key in c}
    if len(set(given.values())) > 1:
        raise ValueError(f"{own}={c[own]} and {usual}={c[usual]} are one size under two names, and differ")
    return next(iter(given.values()), default)


def write(a: Architecture) -> dict[str, Any]:
    return {
        "vocab_size": a.vocab_size, "n_embd": a.hidden_size, "n_layer": a.layers, "n_head": a.heads,
        "n_inner": a.intermediate_size, "n_positions": a.context_length, "layer_norm_epsilon": a.norm_eps,
        "activation_function": write_activation(a.activation), "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    }  # fmt: skip


FAMILY = Family(
    model_type="gpt2",
    read=read,
    write=write,
    defaults={
        "vocab_size": 50257, "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    causal="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
    special="learned positions",
    refused="`scale_attn_by_inverse_layer_idx`, `reorder_and_upcast_attn`, `add_cross_attention`, unscaled attention",
    naming=Naming(
        {
            "model.embed_tokens": "transformer.wte",
            "model.embed_positions": "transformer.wpe",
            "model.norm": "transformer.ln_f",
            "model.layers": "transformer.h",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        fused={"attn.c_attn": QKV},
        transposed=True,
    ),
    aliases={  # in OpenAI's own files
        "wte.": "transformer.wte.", "wpe.": "transformer.wpe.", "h.": "transformer.h.", "ln_f.": "transformer.ln_f.",
    },
)  # fmt: skip
