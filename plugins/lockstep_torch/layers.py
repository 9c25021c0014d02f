"""The decoder's layers. Their parameters have Llama's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockstep.models.architecture import Architecture
from lockstep_torch.attention import Visible, attention_dtype
from lockstep_torch.mesh import TensorAxis, local
from lockstep_torch.pieces import gated, normed, rotated


class Layer(nn.Module):
    def __init__(self, architecture: Architecture):
        super().__init__()
        d, eps = architecture.hidden_size, architecture.norm_eps
        self.input_layernorm = nn.RMSNorm(d, eps=eps)
        self.self_attn = Attention(architecture)
        self.post_attention_layernorm = nn.RMSNorm(d, eps=eps)
        self.mlp = MLP(architecture)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Visible, cache: Any = None, drop: Any = None, first: int = 0
    ) -> Tensor:
        """[B, L, d] -> [B, L - first, d]."""
        drop = drop or (lambda y, part: y)
        x = since(x, first) + drop(self.self_attn(self.before(self.input_layernorm, x), rotation, visible, cache, first), 0)
        return x + drop(self.mlp(self.before(self.post_attention_layernorm, x)), 1)

    def before(self, norm: nn.RMSNorm, x: Tensor) -> Tensor:
        """The norm of x in matmul precision, cast once for all its readers: autocast would cast it again for each of them."""
        return normed(x, norm.weight, norm.eps, matmul_dtype(x.device))


@dataclass(frozen=True)
class LowRank:
    """What peft adds to a linear layer: x Aᵀ Bᵀ times ``scale``."""

    a: nn.Linear
    b: nn.Linear
    scale: float

    @classmethod
    def of(cls, layer: Any) -> LowRank | None:
        if not hasattr(layer, "lora_A"):
            return None
        return cls(layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"])

    def divide(self, axis: TensorAxis, side: int, base: Tensor) -> None:
        """Shard B by its outputs (0) or A by its inputs (1), as ``base`` is, this process's shard of the layer's own weight. The
        weight must be filled afterwards."""
        rank = self.a.weight.shape[0]
        layer, shape = (self.a, (rank, base.shape[1])) if side else (self.b, (base.shape[0], rank))
        layer.weight = nn.Parameter(axis.placed(base.new_empty(shape), side))


class Divisible(nn.Module):
    """Matmuls that may be sharded among processes: the ``ends`` by their inputs, the others by their outputs. Of an
    adapter, B is sharded by its outputs, or A by its inputs; the other matrix is whole on every process."""

    ends: tuple[str, ...]
    axis: TensorAxis | None = None

    def divide(self, axis: TensorAxis) -> None:
        """Shard the matmuls that are trained."""
        self.axis = axis
        for name, layer in self.named_children():
            side = 1 if name in self.ends else 0
            if low := LowRank.of(layer):
                low.divide(axis, side, layer.weight)
            elif layer.weight.requires_grad:
                axis.divide(layer, side)

    def copied(self, x: Tensor) -> Tensor:
        return x if self.axis is None else self.axis.copied(x)

    def split(self, layer: Any, x: Tensor) -> Tensor:
        """This process's outputs of ``layer``, none of the ``ends``, for x from `copied`."""
        if self.axis is None:
            return layer(x)
        out = F.linear(x, local(layer.weight))
        if low := LowRank.of(layer):  # A is whole, and each process's gradient of it is of its own outputs
            out = out + F.linear(F.linear(x, self.axis.copied(low.a.weight)), local(low.b.weight)) * low.scale
        return out

    def summed(self, layer: Any, x: Tensor) -> Tensor:
        """``layer``, one of the ``ends``, applied to x and summed over the processes."""
        if self.axis is None:
            return layer(x)
        product, dtype = self.axis.product, matmul_dtype(x.device)
        part = product(x, local(layer.weight), dtype)
        if low := LowRank.of(layer):  # B is whole, and each process's gradient of it is of its own inputs
            part = part + product(product(x, local(low.a.weight), dtype), self.axis.copied(low.b.weight), dtype) * low.scale
        return self.axis.summed(part)


class Attention(Divisible):
    ends = ("o_proj",)

    def __init__(self, architecture: Architecture):
        super().__init__()
        a = self.architecture = architecture
        self.q_proj = nn.Linear(a.hidden_size, a.heads * a.head_dim, bias=False)
        self.k_proj = nn.Linear(a.hidden_size, a.kv_heads * a.head_dim, bias=False)
        self.v_proj = nn.Linear(a.hidden_size, a.kv_heads * a.head_dim, bias=False)
        self.o_proj = nn.Linear(a.heads * a.head_dim, a.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Visible, cache: Any = None, first: int = 0) -> Tensor:
        """x [B, L, d] -> [B, L - first, d]: queries are the columns from ``first`` on. ``visible`` is for all L queries.
        ``cache``: `Filled` or None."""
        a = self.architecture
        cos, sin = rotation
        visible, dtype = visible.since(first), attention_dtype(x.device)
        x = self.copied(x)
        q = split_heads(self.split(self.q_proj, since(x, first)), a.head_dim)
        q = rotated(q, cos[:, :, first:], sin[:, :, first:], dtype)
        k = rotated(split_heads(self.split(self.k_proj, x), a.head_dim), cos, sin, dtype)
        v = split_heads(self.split(self.v_proj, x), a.head_dim).to(dtype)
        if cache is not None:
            k, v = cache.with_own(k, v)
        with torch.autocast(x.device.type, enabled=False):
            out = visible.attend(q, k, v)
        return self.summed(self.o_proj, out.transpose(1, 2).flatten(2))


class MLP(Divisible):
    ends = ("down_proj",)

    def __init__(self, architecture: Architecture):
        super().__init__()
        d, f = architecture.hidden_size, architecture.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.copied(x)
        return self.summed(self.down_proj, gated(self.split(self.gate_proj, x), self.split(self.up_proj, x)))


def matmul_dtype(device: torch.device) -> torch.dtype:
    """The dtype of matmul inputs."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def since(x: Tensor, first: int) -> Tensor:
    """x[:, first:]; x itself if ``first`` is 0, because a slice of everything would have a gradient to copy."""
    return x[:, first:] if first else x


def split_heads(x: Tensor, size: int) -> Tensor:
    """[B, L, H hd] -> [B, H, L, hd]."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)
