"""The network: tokens in, hidden states out, heads on top.

Pure functions of the weights, a dict {Hugging Face name: float32 array}: plain arrays, or autograd's while it records.
Only a generation's KV cache changes in place, so everything else can be differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping

import autograd.numpy as np
import numpy
from autograd.tracer import getval

from lockstep.interfaces import Array, Dropout
from lockstep.learning import randomness
from lockstep.models.architecture import SCALAR_BIAS, SCALAR_HEAD, Architecture

Weights = Mapping[str, Array]
Cache = dict[int, tuple[Array, Array]]
"""Keys and values [B, H_kv, 1, columns, hd] of each layer, for the columns seen so far."""


def hidden(
    a: Architecture, w: Weights, tokens: Array, mask: Array, dropout: Dropout | None = None, cache: Cache | None = None
) -> Array:
    """The last columns' tokens [B, L] and the attention mask [B, columns] of all -> [B, L, d] after the final norm.

    Without a cache all columns are new: L = columns. With one, the earlier columns' keys and values come from the cache and
    the new ones are added. Ids under a False mask are never read. For packed rows the mask is the segments.

    Pre-norm, RMSNorm, rotary positions, grouped-query attention and SwiGLU (Touvron et al. 2023).
    """
    new = slice(mask.shape[1] - tokens.shape[1], None)
    position = positions(mask)[:, new]
    angles, visible = rotation(a, position), causal(mask)[:, new]
    x = w["model.embed_tokens.weight"][np.where(mask[:, new], tokens, 0)]
    for i in range(a.layers):
        layer = f"model.layers.{i}"
        y = attention(a, w, i, norm(a, x, w[f"{layer}.input_layernorm.weight"]), angles, visible, cache)
        x = x + drop(dropout, y, 2 * i, position)
        y = mlp(w, f"{layer}.mlp", norm(a, x, w[f"{layer}.post_attention_layernorm.weight"]))
        x = x + drop(dropout, y, 2 * i + 1, position)
    return norm(a, x, w["model.norm.weight"])


def logits(w: Weights, states: Array) -> Array:
    """[..., d] -> [..., V]. A tied head is the embedding."""
    return states @ w["lm_head.weight" if "lm_head.weight" in w else "model.embed_tokens.weight"].T


def score(w: Weights, states: Array) -> Array:
    """The scalar head: [..., d] -> [...]."""
    return states @ w[SCALAR_HEAD][0] + w[SCALAR_BIAS][0]


def attention(
    a: Architecture, w: Weights, layer: int, x: Array, angles: tuple[Array, Array], visible: Array, cache: Cache | None
) -> Array:
    """softmax(q kᵀ / sqrt(hd)) v over the visible columns. x [B, L, d], visible bool [B, L, columns] -> [B, L, d].

    Heads are [B, H_kv, queries per key, L, hd], so keys and values broadcast over the queries that share them.
    """
    weight = lambda name: w[f"model.layers.{layer}.self_attn.{name}_proj.weight"]  # noqa: E731
    shape = (*x.shape[:2], a.kv_heads, -1, a.head_dim)
    heads = lambda y: np.transpose(np.reshape(y, shape), (0, 2, 3, 1, 4))  # noqa: E731
    q, k, v = (heads(x @ weight(name).T) for name in "qkv")
    q, k = rotate(q, angles), rotate(k, angles)
    if cache is not None:
        if layer in cache:
            k, v = (np.concatenate(pair, axis=3) for pair in zip(cache[layer], (k, v), strict=True))
        cache[layer] = k, v
    hide = np.where(visible, 0.0, -1e30).astype(np.float32)[:, None, None]
    chances = softmax(q @ np.swapaxes(k, -1, -2) * a.head_dim**-0.5 + hide)
    return np.reshape(np.transpose(chances @ v, (0, 3, 1, 2, 4)), (*x.shape[:2], -1)) @ weight("o").T


def mlp(w: Weights, name: str, x: Array) -> Array:
    """SwiGLU: down(silu(gate(x)) · up(x))."""
    gate = x @ w[f"{name}.gate_proj.weight"].T
    silu = gate * 0.5 * (1 + np.tanh(0.5 * gate))  # σ(z) = (1 + tanh(z / 2)) / 2 never overflows
    return (silu * (x @ w[f"{name}.up_proj.weight"].T)) @ w[f"{name}.down_proj.weight"].T


def norm(a: Architecture, x: Array, gain: Array) -> Array:
    """RMSNorm: x / sqrt(mean(x²) + eps) · gain. (autograd's gradient of ``mean`` would be in double precision.)"""
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) / x.shape[-1] + a.norm_eps) * gain


def log_softmax(x: Array) -> Array:
    x = below_zero(x)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def softmax(x: Array) -> Array:
    x = np.exp(below_zero(x))
    return x / np.sum(x, axis=-1, keepdims=True)


def below_zero(x: Array) -> Array:
    """x less its maximum, so that no exponential overflows. Constant to autograd, because it cancels."""
    return x - np.max(getval(x), axis=-1, keepdims=True)


def drop(dropout: Dropout | None, x: Array, site: int, position: Array) -> Array:
    """x [B, L, d] with elements zeroed and the rest scaled up; position [B, L]."""
    if dropout is None:
        return x
    kept = randomness.dropout_bits(dropout.seeds, site, position, x.shape[-1]) >= dropout.rate * 2**24
    return x * (kept / (1 - dropout.rate)).astype(np.float32)


def positions(mask: Array) -> Array:
    """[B, L] number of real tokens (of the same segment) before each column: left padding does not shift a prompt."""
    count = np.maximum(np.cumsum(mask != 0, axis=1) - 1, 0)
    if mask.dtype == bool:
        return count
    begins = mask != np.pad(mask[:, :-1], ((0, 0), (1, 0)))
    return count - numpy.maximum.accumulate(np.where(begins, count, 0), axis=1)


def causal(mask: Array) -> Array:
    """[B, L] attention mask or segments -> bool [B, L, L]: query i sees key j where j <= i and j is real and of the same
    segment, and itself, so that the softmax of a padded query is never empty."""
    length = mask.shape[1]
    alike = (mask[:, :, None] == mask[:, None, :]) & (mask[:, None, :] != 0) if mask.dtype != bool else mask[:, None, :]
    return np.tri(length, dtype=bool) & alike | np.eye(length, dtype=bool)


def rotation(a: Architecture, position: Array) -> tuple[Array, Array]:
    """cos and sin [B, 1, 1, L, hd / 2] of the rotary angles (Su et al. 2021, in Llama's half-split layout)."""
    half = a.head_dim // 2
    frequency = np.float32(a.rope_theta) ** -(np.arange(half, dtype=np.float32) / half)
    angle = position[:, None, None, :, None].astype(np.float32) * frequency
    return np.cos(angle), np.sin(angle)


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
    """x [..., L, hd] turned by the angles of `rotation`."""
    cos, sin = angles
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
