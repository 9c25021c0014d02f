"""How each family names its tensors and lays them out, and how a decoder of ours does, which is Llama's way:

    model.embed_tokens  model.embed_positions  model.norm  lm_head
    model.layers.N.     input_layernorm  self_attn.{q,k,v,o}_proj  self_attn.{q,k}_norm  attention_out_norm
                        post_attention_layernorm (which comes before the MLP)  mlp.{gate,up,down}_proj  mlp_out_norm

Weights are [out, in], as torch has them. Traps: GPT-2's are [in, out]; GPT-2, Phi-3 and GPT-NeoX fuse queries, keys and
values, the last head by head; Gemma's post_attention_layernorm really comes after attention.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lockstep.models.architecture.shape import Architecture

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Naming:
    """Args:
    names: parts of names, from ours to the family's.
    fused: the family's name of several tensors of ours, one above the other.
    by_head: fused ones alternate head by head.
    transposed: the family's matrices, embeddings apart, are [in, out].
    """

    names: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_head: bool = False
    transposed: bool = False


GEMMA = Naming(
    {
        "attention_out_norm": "post_attention_layernorm",
        "post_attention_layernorm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }
)

NAMINGS = {
    "gpt2": Naming(
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
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt_neox": Naming(
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
    "phi3": Naming(fused={"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}),
}
"""Of the families that do not name everything as Llama does."""


def to_checkpoint(architecture: Architecture, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """From our names and layouts to the family's."""
    join = _alternate if naming(architecture).by_head else lambda parts, heads: np.concatenate(parts)
    return _outward(architecture, arrays, lambda parts: join(parts, architecture.heads), np.transpose)


def shapes_to_checkpoint(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """`to_checkpoint` of arrays of these shapes."""
    return _outward(architecture, shapes, lambda parts: (sum(p[0] for p in parts), *parts[0][1:]), lambda shape: shape[::-1])


def to_common(architecture: Architecture, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """From the family's names and layouts to ours."""
    family, out = naming(architecture), {}
    for name, array in arrays.items():
        ours = _rename(name, {theirs: own for own, theirs in family.names.items()})
        array = array.T if _is_transposed(family, name) else array
        for fused, parts in family.fused.items():
            if f".{fused}.lora_A." in name:  # the adapter of a fused layer has one for all parts
                out[ours.replace(fused, parts[0])] = array
                break
            if f".{fused}." in name:
                cut = _separate(array, architecture.heads) if family.by_head else np.split(array, _ends(architecture, parts))
                out |= {ours.replace(fused, part): piece for part, piece in zip(parts, cut, strict=True)}
                break
        else:
            out[ours] = array
    return out


def layer_name(architecture: Architecture, ours: str) -> tuple[str, bool]:
    """What the family calls the linear layer ``ours`` within a layer, say 'self_attn.q_proj', and whether ours is the first
    of those that are one layer there."""
    for theirs, parts in naming(architecture).fused.items():
        if ours in parts:
            return theirs, ours == parts[0]
    return _rename(ours, naming(architecture).names), True


def naming(architecture: Architecture) -> Naming:
    return NAMINGS.get(architecture.family, Naming())


def _outward(a: Architecture, tensors: Mapping[str, Any], join: Callable[[Sequence[Any]], Any], turn: Any) -> dict[str, Any]:
    """The names of `to_checkpoint`, for arrays or for shapes."""
    family, out = naming(a), {}
    fused = {parts[0]: (theirs, parts) for theirs, parts in family.fused.items()}
    followers = {part for parts in family.fused.values() for part in parts[1:]}
    for name, tensor in tensors.items():
        module = ".".join(re.sub(r"\.lora_[AB]\b", "", name).split(".")[-3:-1])
        if module in followers:
            continue
        theirs = name
        if module in fused:
            theirs, parts = name.replace(module, fused[module][0]), fused[module][1]
            if ".lora_A." not in name:
                tensor = join([tensors[name.replace(module, part)] for part in parts])
        theirs = _rename(theirs, family.names)
        out[theirs] = turn(tensor) if _is_transposed(family, theirs) else tensor
    return out


def _is_transposed(family: Naming, theirs: str) -> bool:
    """Whether the family keeps this tensor as [in, out]: GPT-2's Conv1D."""
    return family.transposed and re.search(r"\.c_\w+\.weight$", theirs) is not None


def _rename(name: str, parts: Mapping[str, str]) -> str:
    """All parts at once: one family's new name may be another's old one."""
    if not parts:
        return name
    return re.sub(rf"\b({'|'.join(map(re.escape, parts))})\b", lambda found: parts[found[0]], name)


def _ends(a: Architecture, parts: tuple[str, ...]) -> list[int]:
    """Where all but the last of some fused tensors end."""
    rows = {QKV[0]: a.heads * a.head_dim, QKV[1]: a.kv_heads * a.head_dim}
    return np.cumsum([rows.get(part, a.intermediate_size) for part in parts[:-1]]).tolist()


def _alternate(parts: Sequence[np.ndarray], heads: int) -> np.ndarray:
    """[H hd, ...] each -> [H 3 hd, ...]: queries, keys and values of the first head, then of the second."""
    split = [part.reshape(heads, -1, *part.shape[1:]) for part in parts]
    return np.concatenate(split, axis=1).reshape(-1, *parts[0].shape[1:])


def _separate(array: np.ndarray, heads: int) -> list[np.ndarray]:
    """The inverse of `_alternate`."""
    split = np.split(array.reshape(heads, -1, *array.shape[1:]), 3, axis=1)
    return [part.reshape(-1, *array.shape[1:]) for part in split]
