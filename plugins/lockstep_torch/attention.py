"""Attention, and what its queries see. `Dense` holds a mask in memory, for few columns. For many columns, `InOrder` serves rows
with real tokens first, and `Blocks`, which makes the mask block by block, serves all others. `Stream` leaves out padding and
computes a prompt that several rows share once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

PAIRS = 256 * 256
"""Up to this many query-key pairs per row, `Dense` is no slower. On a CPU with AVX-512, with gradients, `InOrder` took 1.1 times
as long as `Dense` at 256 columns, 0.8 at 640 and 0.55 at 2,048; `Blocks` took 1.3, 1.0 and 0.8."""

BLOCK = 256
"""Queries per block. 512 took 1.1 times as long at 2,048 columns."""


@dataclass(frozen=True)
class Dense:
    """``mask``: bool, or float with -inf where nothing is seen; broadcast to [B, H, L, columns]."""

    mask: Tensor

    def since(self, first: int) -> Dense:
        """The same without the first queries."""
        return Dense(self.mask[:, :, first:])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] > 1:
            return fused(q, k, v, self.mask)
        # Decoding, one query: heads that share keys see the same. As queries of one head, they read its keys once.
        return fused(q.reshape(q.shape[0], k.shape[1], -1, q.shape[3]), k, v, self.mask).reshape(q.shape)


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
    """Query i is in column ``first`` + i. It sees its own column, and each earlier key j whose number in ``keys`` [B, columns]
    equals its own in ``queries`` [B, L]."""

    queries: Tensor
    keys: Tensor
    first: int

    def since(self, first: int) -> Blocks:
        return Blocks(self.queries[:, first:], self.keys, self.first + first)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend one block of queries at a time, with the keys up to the block's end. The gradient recomputes each block's mask,
        and the fused kernel recomputes its scores, so memory grows with the length, not with its square (Rabe & Staats 2021)."""
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
        return fused(q, k, v, additive((same & (column <= own) | (column == own))[:, None], q.dtype))


@dataclass(frozen=True)
class Layout:
    """A layout in which each token is computed once: no padding, and each prompt once for all its rows. The rows [B, P + T]
    become one stream of tokens [1, N]. Its cells are the prompts' columns, each with all G prompts, then the B responses. The
    stream holds the cells with real tokens, in order.

        prompts [G, P]    a b | - d                          stream    a | b d | x x x | y | z z z | w w
        responses [B, T]  x x x, y - - to the first,         G = 2, P = 2, B = 4, T = 3: 16 cells
                          z z z, w w -                       the prompts' last column begins at cell (P - 1) G

    Everything but attention works on single tokens, so it needs no other form.

    Args:
      prompts, columns: G and P.
      rows, length: B and T.
      real: int64 [N], the cells of the stream's tokens; None if the stream holds all cells, because nearly all are real.
      before: tokens in the stream before the prompts' last column.
    """

    prompts: int
    columns: int
    rows: int
    length: int
    real: Tensor | None
    before: int

    @classmethod
    def of(cls, mask: np.ndarray, columns: int, each: int, device: torch.device) -> Layout | None:
        """The layout of rows with this attention mask [B, P + T], in which each prompt has ``each`` neighbouring rows; None if it
        would save little."""
        rows, width = mask.shape
        real = np.flatnonzero(np.append(mask[::each, :columns].T, mask[:, columns:]))
        padded, cells = len(real) < MOST_REAL * rows * width, rows // each * columns + rows * (width - columns)
        long = width * width > PAIRS  # without a layout, these use `InOrder`, which is faster than `Blocks`
        if cells > FEW_CELLS * rows * width if long else each == 1 and not padded:
            return None
        last = (columns - 1) * (rows // each)
        some = torch.as_tensor(real, device=device) if len(real) < MOST_REAL * cells else None
        return cls(rows // each, columns, rows, width - columns, some, last if some is None else int((real < last).sum()))

    @property
    def each(self) -> int:
        """Rows per prompt."""
        return self.rows // self.prompts

    @property
    def last(self) -> int:
        """The first cell of the prompts' last column."""
        return (self.columns - 1) * self.prompts

    @property
    def cells(self) -> int:
        return self.prompts * self.columns + self.rows * self.length

    def stream(self, x: Tensor) -> Tensor:
        """[B, P + T] -> [1, N]."""
        prompts = x[:: self.each, : self.columns].T
        found = torch.cat([prompts.reshape(-1), x[:, self.columns :].reshape(-1)])
        return (found if self.real is None else found[self.real])[None]

    def restored(self, x: Tensor) -> Tensor:
        """[1, n, d], the stream from the prompts' last column on -> [B, 1 + T, d], 0 on padding."""
        last, responses = self.spread(x, self.last)[0].split([self.prompts, self.rows * self.length])
        last = last.repeat_interleave(self.each, dim=0)[:, None]
        return torch.cat([last, responses.reshape(self.rows, self.length, x.shape[-1])], dim=1)

    def spread(self, x: Tensor, first: int) -> Tensor:
        """[..., n, d], a stream from cell ``first`` on -> [..., cells, d], 0 on padding."""
        if self.real is None:
            return x
        skipped = 0 if first == 0 else self.before
        return _Spread.apply(x, self.real[skipped:] - first, self.cells - first)

    def picked(self, x: Tensor, first: int) -> Tensor:
        """The reverse of `spread`."""
        return x if self.real is None else _Picked.apply(x, self.real[0 if first == 0 else self.before :] - first)

    def parts(self, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """[1, H, n, hd], a stream from cell ``first`` on -> [G, H, columns, hd] and [B, H, T, hd]."""
        cells = self.spread(x[0], first)
        prompts, responses = cells.split([cells.shape[1] - self.rows * self.length, self.rows * self.length], dim=1)
        of_prompts = prompts.unflatten(1, (-1, self.prompts)).permute(2, 0, 1, 3)
        return of_prompts, responses.unflatten(1, (self.rows, self.length)).transpose(0, 1)

    def seen_by_responses(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """Keys or values [G, H, P, hd] and [B, H, T, hd] -> [B, H, P + T, hd]."""
        return torch.cat([prompts.repeat_interleave(self.each, dim=0), responses], dim=2)


FEW_CELLS = 0.6
"""Long rows use a stream up to this share of cells. At 0.75 (two rows per prompt) a stream took 1.2 times as long as none, at
0.62 the same, at 0.56 0.7."""

MOST_REAL = 0.75
"""From this share of real tokens on, padding is computed too. For a small network with gradients, a stream took 0.7 of the time
at a share of 0.47, 0.87 at 0.7, and the same at 0.8."""


class _Spread(torch.autograd.Function):
    """[..., n, d] -> [..., size, d] with zeros between. The places are distinct, which torch's own gradient cannot know."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(*x.shape[:-2], size, x.shape[-1]).index_copy_(-2, places, x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        return slopes[0].index_select(-2, *ctx.saved_tensors), None, None


class _Picked(torch.autograd.Function):
    """The reverse of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = x.shape[-2]
        return x.index_select(-2, places)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (slope,), (places,) = slopes, ctx.saved_tensors
        return slope.new_zeros(*slope.shape[:-2], ctx.size, slope.shape[-1]).index_copy_(-2, places, slope), None


@dataclass(frozen=True)
class Stream:
    """What the tokens of a stream see: each prompt sees itself; each response sees its prompt and itself. ``prompts`` is over
    [G, P]; ``responses`` is over queries [B, T] and keys [B, P + T]. Queries begin at cell ``first``."""

    layout: Layout
    prompts: Dense | Blocks
    responses: Dense | Blocks
    first: int = 0

    def since(self, first: int) -> Stream:
        """The same without the queries before the prompts' last column; unchanged if ``first`` is 0."""
        if first == 0:
            return self
        return replace(self, prompts=self.prompts.since(self.layout.columns - 1), first=self.layout.last)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (q, q_own), (k, k_own), (v, v_own) = (self.layout.parts(x, f) for x, f in ((q, self.first), (k, 0), (v, 0)))
        keys, values = self.layout.seen_by_responses(k, k_own), self.layout.seen_by_responses(v, v_own)
        prompts, responses = self.prompts.attend(q, k, v), self.responses.attend(q_own, keys, values)
        heads, width = q.shape[1], q.shape[3]
        of_prompts = prompts.permute(1, 2, 0, 3).reshape(heads, -1, width)
        cells = torch.cat([of_prompts, responses.transpose(0, 1).reshape(heads, -1, width)], dim=1)
        return self.layout.picked(cells, self.first)[None]


Visible = Dense | InOrder | Blocks | Stream


def causal(mask: Tensor, dtype: torch.dtype, known: int = 0) -> Dense | Blocks:
    """Turn an attention mask or segments [B, columns] into what the queries from column ``known`` on see: real keys of the same
    segment, up to their own column. A query always sees itself, so that a padded query's softmax has an input."""
    length = mask.shape[1]
    if (length - known) * length > PAIRS:
        keys = torch.where(mask != 0, mask.int(), -1)
        queries = torch.ones_like(keys) if mask.dtype == torch.bool else mask.int()
        return Blocks(queries[:, known:], keys, known)
    column = torch.arange(length, device=mask.device)
    query = column[known:, None]
    earlier = column <= query
    if mask.dtype != torch.bool:
        earlier = earlier & (mask[:, None, known:, None] == mask[:, None, None, :])
    return Dense(additive(earlier & (mask != 0)[:, None, None, :] | (column == query), dtype))


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask that kernels add to scores: 0 where a key is seen, else -inf. Given a bool mask, they would make this themselves
    and keep one for each layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention with this mask; causal if it is None. On CUDA devices, heads that share keys get their own
    copies where no fused kernel would run otherwise: FlashAttention takes neither float32 nor a mask, and the memory-efficient
    kernel takes no shared keys. The kernel that remains would write out all scores."""
    shared = q.shape[1] // k.shape[1]
    if q.device.type == "cuda" and shared > 1 and (mask is not None or q.dtype == torch.float32):
        k, v, shared = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared > 1)


class RealFirst:
    """An order of each row's columns that puts real tokens first, so that `InOrder` hides padding from them."""

    @classmethod
    def of(cls, mask: Tensor) -> RealFirst | None:
        """The order for an attention mask or segments [B, L]. None for segments, which need a mask, and, except on CUDA, for few
        columns, where a mask is no slower."""
        many = mask.device.type == "cuda" or mask.shape[1] ** 2 > PAIRS  # CUDA's FlashAttention takes no mask
        return cls(mask) if mask.dtype == torch.bool and many else None

    def __init__(self, mask: Tensor):
        self.order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        self.places = self.order.argsort(dim=1)

    def ordered(self, x: Tensor) -> Tensor:
        """x [B, L] in this order."""
        return x.gather(1, self.order)

    def restored(self, x: Tensor, first: int = 0) -> Tensor:
        """x [B, L, d] in this order -> [B, L - first, d], the columns from ``first`` on in their original order."""
        return x.gather(1, self.places[:, first:, None].expand(-1, -1, x.shape[2]))


def attention_dtype(device: torch.device) -> torch.dtype:
    """The dtype of attention and its cache. On the CPU it is float32: there the backward pass of PyTorch's bfloat16 kernel took
    eight times as long as float32's."""
    low = torch.is_autocast_enabled(device.type) and device.type != "cpu"
    return torch.get_autocast_dtype(device.type) if low else torch.float32
