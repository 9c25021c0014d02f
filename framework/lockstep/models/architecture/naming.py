"""How a family names and lays out its tensors, and how our decoder does, which follows Llama:

    model.embed_tokens  model.embed_positions  model.norm  lm_head
    model.layers.N.     input_layernorm  self_attn.{q,k,v,o}_proj  self_attn.{q,k}_norm  attention_out_norm
                        post_attention_layernorm (which comes before the MLP)  mlp.{gate,up,down}_proj  mlp_out_norm

Weights are [out, in], as in torch. Traps: GPT-2's are [in, out]; GPT-2, Phi-3 and GPT-NeoX fuse queries, keys and values,
GPT-NeoX head by head; Gemma's post_attention_layernorm really comes after attention.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lockstep.models.architecture.shape import Architecture

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LINEAR = (*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LANGUAGE_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Naming:
    """Converts between a family's names and layouts and ours. The default is Llama's.

    Args:
      names: {our part of a name: the family's}.
      fused: {the family's name: our tensors, which it stacks by rows}.
      by_head: fused tensors are interleaved head by head.
      transposed: the weights of the family's linear layers are [in, out].
    """

    names: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_head: bool = False
    transposed: bool = False

    def to_checkpoint(self, architecture: Architecture, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Convert tensors from our names and layouts to the family's."""
        join = _alternate if self.by_head else lambda parts, heads: np.concatenate(parts)
        return self._outward(arrays, lambda parts: join(parts, architecture.heads), np.transpose)

    def shapes_to_checkpoint(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """`to_checkpoint` for the shapes of arrays."""
        return self._outward(shapes, lambda parts: (sum(p[0] for p in parts), *parts[0][1:]), lambda shape: shape[::-1])

    def sources(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """{the family's name for a tensor: our names of the tensors that it is made of}."""
        return self._outward({name: (name,) for name in names}, lambda parts: tuple(itertools.chain(*parts)), lambda same: same)

    def to_common(self, architecture: Architecture, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Convert tensors from the family's names and layouts to ours."""
        out = {}
        for name, array in arrays.items():
            ours = _rename(name, {theirs: own for own, theirs in self.names.items()})
            array = array.T if self._is_transposed(name) else array
            for fused, parts in self.fused.items():
                if f".{fused}.lora_A." in name:  # the adapter of a fused layer has one A for all parts
                    out[ours.replace(fused, parts[0])] = array
                    break
                if f".{fused}." in name:
                    cut = _separate(array, architecture.heads) if self.by_head else np.split(array, _ends(architecture, parts))
                    out |= {ours.replace(fused, part): piece for part, piece in zip(parts, cut, strict=True)}
                    break
            else:
                out[ours] = array
        return out

    def rename(self, ours: str) -> str:
        """The family's name for one of our tensors or layers that it does not fuse with others."""
        return _rename(ours, self.names)

    def layer(self, ours: str) -> tuple[str, bool]:
        """The family's name for our linear layer ``ours`` (say 'self_attn.q_proj'), and whether ours is the first of the layers
        that the family fuses there. True if it fuses none."""
        for theirs, parts in self.fused.items():
            if ours in parts:
                return theirs, ours == parts[0]
        return self.rename(ours), True

    def _outward(self, tensors: Mapping[str, Any], join: Callable[[Sequence[Any]], Any], turn: Any) -> dict[str, Any]:
        """`to_checkpoint` for arrays, shapes or names: ``join`` fuses several, ``turn`` transposes one."""
        out = {}
        fused = {parts[0]: (theirs, parts) for theirs, parts in self.fused.items()}
        followers = {part for parts in self.fused.values() for part in parts[1:]}
        for name, tensor in tensors.items():
            module = ".".join(re.sub(r"\.lora_[AB]\b", "", name).split(".")[-3:-1])
            if module in followers:
                continue
            theirs = name
            if module in fused:
                theirs, parts = name.replace(module, fused[module][0]), fused[module][1]
                if ".lora_A." not in name:
                    tensor = join([tensors[name.replace(module, part)] for part in parts])
            theirs = self.rename(theirs)
            out[theirs] = turn(tensor) if self._is_transposed(theirs) else tensor
        return out

    def _is_transposed(self, theirs: str) -> bool:
        """Whether the family stores this tensor as [in, out]."""
        return self.transposed and theirs.endswith(tuple(f".{self.layer(ours)[0]}.weight" for ours in LINEAR))


def _rename(name: str, parts: Mapping[str, str]) -> str:
    """Replace all parts at once, because the new name of one may be the old name of another."""
    if not parts:
        return name
    return re.sub(rf"\b({'|'.join(map(re.escape, parts))})\b", lambda found: parts[found[0]], name)


def _ends(a: Architecture, parts: tuple[str, ...]) -> list[int]:
    """The row where each fused tensor except the last ends."""
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
