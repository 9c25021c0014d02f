"""Our own network: a small modern decoder in Llama's shape, with Llama's parameter names. It runs policies that start from
scratch, and checkpoints of that shape."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lockstep.errors import ConfigError
from lockstep.interfaces import Past
from lockstep.models.architecture import Architecture, to_hf
from lockstep_torch.attention import Dense, InOrder, Layout, RealFirst, Stream, Visible, additive, attention_dtype, causal
from lockstep_torch.layers import Layer
from lockstep_torch.mesh import TensorAxis
from lockstep_torch.network import DropoutMask, Network, positions
from lockstep_torch.pieces import rms_norm


@dataclass
class Cache:
    """``keys``, ``values``: per layer [B, H_kv, P + T, hd]. ``column`` [1] is the first free column. Attention reads the first
    ``read`` columns: the filled ones, or all if the network ``replays``. ``mask`` [B, P + T] is True on real columns; ``count``
    [B] is the position of the next token."""

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    count: Tensor
    column: Tensor
    read: int


@dataclass(frozen=True)
class Filled:
    """One layer's cache. New keys and values go into ``columns`` [L]; attention reads the first ``read`` columns."""

    keys: Tensor
    values: Tensor
    columns: Tensor
    read: int

    def with_own(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.keys.index_copy_(2, self.columns, k), self.values.index_copy_(2, self.columns, v)
        return keys[:, :, : self.read], values[:, :, : self.read]


def recalled(past: Past, kept: Sequence[Tensor]) -> list[Tensor]:
    """The known columns of keys or values, as `lockstep.interfaces.Past` defines them: [B, H_kv, known, hd] of each ``kept``
    [rows, H_kv, columns, hd]."""
    device, last = kept[0].device, kept[0].shape[2] - 1
    rows, shift = (torch.as_tensor(numbers, dtype=torch.int64, device=device) for numbers in (past.rows, past.shift))
    columns = (torch.arange(past.known, device=device) + shift[:, None]).clamp(0, last)
    return [each[rows[:, None], :, columns].transpose(1, 2) for each in kept]


class DecoderNetwork(Network):
    """Pre-norm transformer with RMSNorm, rotary positions, grouped-query attention and SwiGLU (Touvron et al. 2023)."""

    def __init__(self, architecture: Architecture, config: dict[str, Any] | None = None):
        super().__init__()
        a = self.architecture = architecture
        self.config = to_hf(architecture) if config is None else config
        self.vocab_size, self.hidden_size, self.context_length = a.vocab_size, a.hidden_size, a.context_length
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(a.vocab_size, a.hidden_size),
                "layers": nn.ModuleList(Layer(a) for _ in range(a.layers)),
                "norm": nn.RMSNorm(a.hidden_size, eps=a.norm_eps),
            }
        )
        self.lm_head = None if a.tied else nn.Linear(a.hidden_size, a.vocab_size, bias=False)
        self.head_parts = 1
        """Processes that the heads are divided among."""

    def hidden(
        self, tokens: Tensor, mask: Tensor, dropout: DropoutMask | None = None, first: int = 0, layout: Layout | None = None
    ) -> Tensor:
        if layout is not None and dropout is None:  # dropout differs from row to row
            return self.of_stream(tokens, mask, layout)
        layers, again = self.layers(), self.gradient_checkpointing and torch.is_grad_enabled()
        as_given = self.view(mask, causal(mask, attention_dtype(mask.device)))
        real_first = RealFirst.of(mask) if len(layers) > 1 else None
        if real_first is None:
            x, view = self.embed(tokens, mask), as_given
        else:
            ordered = real_first.ordered(mask)
            x, view = self.embed(real_first.ordered(tokens), ordered), self.view(ordered, InOrder())
        for number, layer in enumerate(layers):
            start = 0
            if number == len(layers) - 1:  # in the last layer, columns before ``first`` give only keys and values
                start, view = first, as_given
                x = x if real_first is None else real_first.restored(x)
            position, rotation, visible = view
            columns = position[:, start:]
            drop = dropout and (lambda y, part, site=2 * number, columns=columns: dropout(y, site + part, columns))
            call = functools.partial(layer, drop=drop, first=start)
            x = checkpoint(call, x, rotation, visible, use_reentrant=False) if again else call(x, rotation, visible)
        return self.norm(x)

    def of_stream(self, tokens: Tensor, mask: Tensor, layout: Layout) -> Tensor:
        """`hidden` for a layout's stream, from the last column of the prompts on."""
        dtype, columns = attention_dtype(mask.device), layout.columns
        visible = Stream(layout, causal(mask[:: layout.each, :columns], dtype), causal(mask, dtype, columns))
        x, rotation = self.embed(layout.stream(tokens), layout.stream(mask)), self.rotation(layout.stream(positions(mask)))
        layers, again = self.layers(), self.gradient_checkpointing and torch.is_grad_enabled()
        for number, layer in enumerate(layers):
            call = functools.partial(layer, first=layout.before if number == len(layers) - 1 else 0)
            x = checkpoint(call, x, rotation, visible, use_reentrant=False) if again else call(x, rotation, visible)
        return layout.restored(self.norm(x))

    def start(self, tokens: Tensor, mask: Tensor, new_tokens: int, past: Past | None = None) -> tuple[Tensor, Cache]:
        rows, length = tokens.shape
        known = past.known if past else 0
        a = self.architecture
        shape = (rows, a.kv_heads // self.head_parts, length + new_tokens, a.head_dim)
        dtype = attention_dtype(tokens.device)
        cache = Cache(
            keys=[torch.zeros(shape, dtype=dtype, device=tokens.device) for _ in range(a.layers)],
            values=[torch.zeros(shape, dtype=dtype, device=tokens.device) for _ in range(a.layers)],
            mask=F.pad(mask, (0, new_tokens)),
            count=mask.sum(-1),
            column=torch.tensor([length], device=tokens.device),
            read=length + new_tokens if self.replays else length,
        )
        if past is not None:
            known_before = recalled(past, [*past.cache.keys, *past.cache.values])
            for room, columns in zip([*cache.keys, *cache.values], known_before, strict=True):
                room[:, :, :known] = columns
        visible, fed = causal(mask, dtype, known), torch.arange(known, length, device=tokens.device)
        x = self.embed(tokens[:, known:], mask[:, known:])
        rotation = self.rotation(positions(mask)[:, known:])
        for number, layer in enumerate(self.model["layers"]):
            first = length - known - 1 if number == a.layers - 1 else 0
            x = layer(x, rotation, visible, Filled(cache.keys[number], cache.values[number], fed, length), first=first)
        return self.norm(x[:, -1]), cache

    def advance(self, token: Tensor, cache: Cache) -> Tensor:
        cache.mask.index_fill_(1, cache.column, True)
        cache.read = min(cache.read + 1, cache.mask.shape[1])
        x = self.model["embed_tokens"](token)[:, None]
        rotation = self.rotation(cache.count[:, None])
        visible = Dense(additive(cache.mask[:, None, None, : cache.read], attention_dtype(token.device)))
        for layer, keys, values in zip(self.model["layers"], cache.keys, cache.values, strict=True):
            x = layer(x, rotation, visible, Filled(keys, values, cache.column, cache.read))
        cache.column += 1
        cache.count += 1
        return self.norm(x[:, 0])

    def repeated(self, cache: Cache, times: int) -> Cache:
        keys, values = ([each.repeat_interleave(times, 0) for each in layers] for layers in (cache.keys, cache.values))
        mask, count = (each.repeat_interleave(times, 0) for each in (cache.mask, cache.count))
        return replace(cache, keys=keys, values=values, mask=mask, count=count)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model["embed_tokens"].weight if self.lm_head is None else self.lm_head.weight)

    def layers(self) -> list[nn.Module]:
        return list(self.model["layers"])

    def divide_matmuls(self, axis: TensorAxis) -> None:
        if self.architecture.kv_heads % axis.size:
            heads = self.architecture.kv_heads
            raise ConfigError(f"backend.mesh.tensor={axis.size} does not divide {heads} heads of keys evenly.")
        self.head_parts = axis.size
        for layer in self.model["layers"]:
            layer.self_attn.divide(axis)
            layer.mlp.divide(axis)

    def language_head(self) -> nn.Module | None:
        return self.lm_head

    def without_language_head(self) -> DecoderNetwork:
        self.lm_head = None
        return self

    def norm(self, x: Tensor) -> Tensor:
        norm = self.model["norm"]
        return rms_norm(x, norm.weight, norm.eps)

    def embed(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.model["embed_tokens"](torch.where(mask != 0, tokens, 0))

    def view(self, mask: Tensor, visible: Visible) -> tuple[Tensor, tuple[Tensor, Tensor], Visible]:
        """Positions, rotation, and what is visible."""
        position = positions(mask)
        return position, self.rotation(position), visible

    def rotation(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, L, hd / 2] of the rotary angles (Su et al. 2021, in Llama's half-split layout)."""
        half = self.architecture.head_dim // 2
        frequency = self.architecture.rope_theta ** -(torch.arange(half, device=position.device, dtype=torch.float32) / half)
        angle = position[:, None, :, None].float() * frequency
        return angle.cos(), angle.sin()
