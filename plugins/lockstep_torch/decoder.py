"""The network: tokens in, hidden states out, heads on top.

`Network` is the interface that the rest of this package uses. `DecoderNetwork` is a small modern decoder in Llama's shape, with
Llama's parameter names. It runs policies that start from scratch, and checkpoints of that shape.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lockstep.errors import ConfigError
from lockstep.interfaces import Past
from lockstep.learning import randomness
from lockstep.models.adapters import Adapter
from lockstep.models.architecture import SCALAR_BIAS, SCALAR_HEAD, Architecture, to_hf
from lockstep_torch.attention import Dense, InOrder, Layout, RealFirst, Stream, Visible, additive, attention_dtype, causal
from lockstep_torch.mesh import TensorAxis, local
from lockstep_torch.pieces import gated, normed, rms_norm, rotated


class Network(nn.Module):
    """The interface of a network that `model.py`, `generation.py` and `learner.py` use."""

    vocab_size: int
    hidden_size: int
    context_length: int
    config: dict[str, Any]
    """The checkpoint's ``config.json``."""
    adapter: Adapter | None = None
    """The adapter, which is trained if the network's own weights are frozen."""
    gradient_checkpointing: bool = False
    """Whether `hidden` recomputes each layer's inner activations for the gradient."""
    replays: bool = False
    """Whether `advance` runs the same kernels on the same memory for every token, so that they can be replayed."""

    def hidden(
        self, tokens: Tensor, mask: Tensor, dropout: DropoutMask | None = None, first: int = 0, layout: Layout | None = None
    ) -> Tensor:
        """[B, L] ids and attention mask -> [B, L - first, d] after the final norm, for the columns from ``first`` on. Ids under a
        False mask are never read. The mask may be `lockstep.text.sequences.Sequences.segments`, int. With a layout, whose prompts
        end in column ``first``, a network may compute only the layout's tokens."""
        raise NotImplementedError

    def start(self, tokens: Tensor, mask: Tensor, new_tokens: int, past: Past | None = None) -> tuple[Tensor, Any]:
        """Prefill. Return the hidden state [B, d] of the last column, and a cache with room for ``new_tokens`` more. ``past``:
        what is known of the first columns."""
        raise NotImplementedError

    def repeated(self, cache: Any, times: int) -> Any:
        """The cache of `start` with each row repeated ``times`` times, copies side by side; None if this network's cache cannot
        be repeated."""
        raise NotImplementedError

    def kept(self, cache: Any) -> Any:
        """The cache; None if `start` cannot continue from it."""
        return cache

    def advance(self, token: Tensor, cache: Any) -> Tensor:
        """Feed one token [B] to every row and return the hidden state [B, d]. Changes the cache in place."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., V]."""
        raise NotImplementedError

    def layers(self) -> list[nn.Module]:
        """The layers in order. Their weights are needed one layer at a time."""
        raise NotImplementedError

    def language_head(self) -> nn.Module | None:
        """The layer that computes logits; None if the embedding does."""
        raise NotImplementedError

    def without_language_head(self) -> Network:
        """The trunk that a scalar model keeps: this network without its language head, or another with the same weights."""
        raise NotImplementedError

    def divide_matmuls(self, axis: TensorAxis) -> None:
        """Keep this process's shard of the layers' matmuls. The weights must be filled afterwards.

        Raises:
          ConfigError: the matmuls cannot be sharded this way.
        """
        raise ConfigError(
            "backend.mesh.tensor on backend=torch divides Llama's shape only, in this project's own decoder. Raise "
            "backend.mesh.fsdp instead, or set backend=jax."
        )

    def checkpoint_name(self, name: str) -> str:
        """The checkpoint's name of this module's parameter ``name``."""
        return name


@dataclass(frozen=True)
class DropoutMask:
    """`lockstep.interfaces.Dropout` on the device. ``seeds``: int32 [B] with the bits of uint32 seeds."""

    rate: float
    seeds: Tensor

    def __call__(self, x: Tensor, site: int, position: Tensor) -> Tensor:
        """x [B, L, d] with elements zeroed and the rest scaled up; position [B, L]."""
        width = x.shape[-1]
        element = position[..., None].int() * width + torch.arange(width, dtype=torch.int32, device=x.device)
        row = hash32(self.seeds ^ int(randomness.hash32(np.array([site], np.uint32)).view(np.int32)[0]))
        kept = high_bits(hash32(hash32(element) ^ row[:, None, None]), 24) >= self.rate * 2**24
        return torch.where(kept, x / (1 - self.rate), 0.0)


def hash32(x: Tensor) -> Tensor:
    """`lockstep.learning.randomness.hash32`. torch has no arithmetic on uint32: int32 holds the bits and wraps the same way."""
    x = high_bits(x, 16).bitwise_xor_(x).mul_(-0x7A143595)  # 0x85EBCA6B
    x = high_bits(x, 19).bitwise_xor_(x).mul_(-0x3D4D51CB)  # 0xC2B2AE35
    return high_bits(x, 16).bitwise_xor_(x)


def high_bits(x: Tensor, count: int) -> Tensor:
    """The uint32 shift x >> (32 - count), on int32, whose own shift would extend the sign."""
    return (x >> (32 - count)).bitwise_and_(2**count - 1)


def positions(mask: Tensor) -> Tensor:
    """[B, L] number of real tokens before each column (LHP), so that left padding does not shift a prompt. With segments, only
    tokens of the same segment count."""
    count = ((mask != 0).cumsum(-1) - 1).clamp(min=0)
    if mask.dtype == torch.bool:
        return count
    begins = mask != F.pad(mask[:, :-1], (1, 0))
    return count - torch.where(begins, count, 0).cummax(-1).values


class ScalarHead(nn.Module):
    """[..., d] -> [...], in float32."""

    def __init__(self, weight: np.ndarray, bias: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float32).reshape(1, -1))
        self.bias = nn.Parameter(torch.tensor([bias], dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # autocast would run it in bfloat16
            return (hidden.float() @ self.weight[0]) + self.bias[0]

    def tensors(self) -> dict[str, Tensor]:
        return {SCALAR_HEAD: self.weight, SCALAR_BIAS: self.bias}


def copy_network(network: Network) -> Network:
    """A copy with its own weights, except frozen ones, which are shared."""
    return copy.deepcopy(network, {id(p): p for p in network.parameters() if not p.requires_grad})


# -------------------------------------------------------------------------------------------------------- the decoder


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


class Linear(nn.Linear):
    """A linear layer whose weight may be a shard."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local(self.weight))


class Divisible(nn.Module):
    """Matmuls that may be sharded among processes: the ``ends`` by their inputs, the others by their outputs."""

    ends: tuple[str, ...]
    axis: TensorAxis | None = None

    def divide(self, axis: TensorAxis) -> None:
        self.axis = axis
        for name, layer in self.named_children():
            axis.divide(layer, 1 if name in self.ends else 0)

    def copied(self, x: Tensor) -> Tensor:
        return x if self.axis is None else self.axis.copied(x)

    def summed(self, layer: Linear, x: Tensor) -> Tensor:
        """``layer``, one of the ``ends``, applied to x and summed over the processes."""
        return layer(x) if self.axis is None else self.axis.summed(x, local(layer.weight), matmul_dtype(x.device))


class Attention(Divisible):
    ends = ("o_proj",)

    def __init__(self, architecture: Architecture):
        super().__init__()
        a = self.architecture = architecture
        self.q_proj = Linear(a.hidden_size, a.heads * a.head_dim, bias=False)
        self.k_proj = Linear(a.hidden_size, a.kv_heads * a.head_dim, bias=False)
        self.v_proj = Linear(a.hidden_size, a.kv_heads * a.head_dim, bias=False)
        self.o_proj = Linear(a.heads * a.head_dim, a.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], visible: Visible, cache: Any = None, first: int = 0) -> Tensor:
        """x [B, L, d] -> [B, L - first, d]: queries are the columns from ``first`` on. ``visible`` is for all L queries.
        ``cache``: `Filled` or None."""
        a = self.architecture
        cos, sin = rotation
        visible, dtype = visible.since(first), attention_dtype(x.device)
        x = self.copied(x)
        q = rotated(split_heads(self.q_proj(since(x, first)), a.head_dim), cos[:, :, first:], sin[:, :, first:], dtype)
        k = rotated(split_heads(self.k_proj(x), a.head_dim), cos, sin, dtype)
        v = split_heads(self.v_proj(x), a.head_dim).to(dtype)
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
        self.gate_proj = Linear(d, f, bias=False)
        self.up_proj = Linear(d, f, bias=False)
        self.down_proj = Linear(f, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.copied(x)
        return self.summed(self.down_proj, gated(self.gate_proj(x), self.up_proj(x)))


def matmul_dtype(device: torch.device) -> torch.dtype:
    """The dtype of matmul inputs."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def since(x: Tensor, first: int) -> Tensor:
    """x[:, first:]; x itself if ``first`` is 0, because a slice of everything would have a gradient to copy."""
    return x[:, first:] if first else x


def split_heads(x: Tensor, size: int) -> Tensor:
    """[B, L, H hd] -> [B, H, L, hd]."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)
