"""Attention, and what its queries see: `Dense`, a mask in memory, where there are few columns; where there are many, `InOrder`
for rows with real tokens first, and `Blocks`, which makes the mask piece by piece, for all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

PAIRS = 256 * 256
"""Up to so many pairs of a query and a key in a row, `Dense` is no slower. On a CPU with AVX-512 and gradients, `InOrder` took
1.1 of its time at 256 columns, 0.8 at 640 and 0.55 at 2,048; `Blocks` took 1.3, 1.0 and 0.8."""

BLOCK = 256
"""Queries of a block: 512 took 1.1 times as long at 2,048 columns."""


@dataclass(frozen=True)
class Dense:
    """``mask``: bool, or float with -inf where nothing is seen; broadcast to [B, H, L, columns]."""

    mask: Tensor

    def since(self, first: int) -> Dense:
        """Without the first queries."""
        return Dense(self.mask[:, :, first:])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=k.shape[1] != q.shape[1])


@dataclass(frozen=True)
class InOrder:
    """Every query sees all keys up to and including its own column."""

    def since(self, first: int) -> InOrder:
        assert first == 0, "fused kernels count the first query as the first column"
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused(q, k, v, None)


@dataclass(frozen=True)
class Blocks:
    """Query i sees key j if ``queries`` [B, L] and ``keys`` [B, columns] have the same number there and j is not after column
    ``first`` + i, the query's own, which it always sees."""

    queries: Tensor
    keys: Tensor
    first: int

    def since(self, first: int) -> Blocks:
        return Blocks(self.queries[:, first:], self.keys, self.first + first)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries of a block at a time, with the keys up to it. The mask of a block is made again for the gradient, as are its
        scores inside the fused kernel: what is kept grows with the length, not with its square (Rabe & Staats 2021)."""
        found = []
        for start in range(0, q.shape[2], BLOCK):
            end = min(start + BLOCK, q.shape[2])
            inputs = q[:, :, start:end], k[:, :, : self.first + end], v[:, :, : self.first + end]
            found.append(checkpoint(self._block, start, *inputs, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(found, dim=2)

    def _block(self, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = self.first + start + torch.arange(q.shape[2], device=q.device)[:, None]
        column = torch.arange(k.shape[2], device=q.device)
        same = self.queries[:, start : start + q.shape[2], None] == self.keys[:, None, : k.shape[2]]
        return fused(q, k, v, _additive((same & (column <= own) | (column == own))[:, None], q.dtype))


Visible = Dense | InOrder | Blocks


def causal(mask: Tensor, dtype: torch.dtype, known: int = 0) -> Dense | Blocks:
    """[B, columns] attention mask or segments -> what the queries from column ``known`` on see: keys that are not after them, are
    real, and are of the same segment. They also see themselves, so that a padded query's softmax has an input."""
    length = mask.shape[1]
    if (length - known) * length > PAIRS:
        keys = torch.where(mask != 0, mask.int(), -1)
        queries = torch.ones_like(keys) if mask.dtype == torch.bool else mask.int()
        return Blocks(queries[:, known:], keys, known)
    earlier = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    if mask.dtype != torch.bool:
        earlier = earlier & (mask[:, None, :, None] == mask[:, None, None, :])
    seen = earlier & (mask != 0)[:, None, None, :] | torch.eye(length, dtype=torch.bool, device=mask.device)
    return Dense(_additive(seen[:, :, known:], dtype))


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The form that kernels add to scores. They would make it of a bool mask themselves, and keep one for each layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention under this mask, or without one in order. On CUDA devices, heads that share keys get their
    own copies where otherwise no fused kernel would do: FlashAttention takes neither float32 nor a mask, and the
    memory-efficient kernel takes no shared keys."""
    shared = q.shape[1] // k.shape[1]
    if q.device.type == "cuda" and shared > 1 and (mask is not None or q.dtype == torch.float32):
        k, v, shared = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared > 1)


class RealFirst:
    """Columns of each row so ordered that its real tokens come first: there `InOrder` hides padding from them."""

    @classmethod
    def of(cls, mask: Tensor) -> RealFirst | None:
        """[B, L] attention mask or segments; None for those and for rows of few columns, which need a mask or may have one."""
        return cls(mask) if mask.dtype == torch.bool and mask.shape[1] ** 2 > PAIRS else None

    def __init__(self, mask: Tensor):
        self.order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        self.places = self.order.argsort(dim=1)

    def ordered(self, x: Tensor) -> Tensor:
        """x [B, L]."""
        return x.gather(1, self.order)

    def restored(self, x: Tensor, first: int = 0) -> Tensor:
        """x [B, L, d] of ordered columns -> [B, L - first, d], of the columns from ``first`` on as they were."""
        return x.gather(1, self.places[:, first:, None].expand(-1, -1, x.shape[2]))


def attention_dtype(device: torch.device) -> torch.dtype:
    """The dtype of attention and its cache. On the CPU it is float32: there the backward pass of PyTorch's bfloat16 kernel took
    eight times as long as float32's."""
    low = torch.is_autocast_enabled(device.type) and device.type != "cpu"
    return torch.get_autocast_dtype(device.type) if low else torch.float32
