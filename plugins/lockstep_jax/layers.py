"""The decoder's layers: attention, MLP, norms and rotary positions of every family.

With bfloat16, matmul inputs are bfloat16; on accelerators so are attention and the KV cache. Accumulation, norms, softmax, the
residual stream and logits stay in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from lockstep.models.adapters import Adapter
from lockstep.models.architecture import Architecture, Rope, family_of
from lockstep_jax.attention import Visible, attend, attention_dtype
from lockstep_jax.network import NetworkSpec
from lockstep_jax.products import product


class Layer(nnx.Module):
    def __init__(self, spec: NetworkSpec, rngs: nnx.Rngs):
        a = self.architecture = spec.architecture
        self.input_layernorm = norm(a, rngs)
        self.self_attn = Attention(spec, rngs)
        self.attention_out_norm = norm(a, rngs) if a.out_norms else None
        self.post_attention_layernorm = norm(a, rngs)
        self.mlp = MLP(spec)
        self.mlp_out_norm = norm(a, rngs) if a.out_norms else None

    def __call__(
        self,
        x: Array,
        rotation: Any,
        visible: Visible,
        cache: Any = None,
        earlier: Any = None,
        drop: Any = None,
        first: int = 0,
    ) -> tuple[Array, Any]:
        """[B, L, d] -> [B, L - first, d], and keys and values: those of the updated cache if there is one, else those seen."""
        drop = drop or (lambda y, part: y)
        attended, cache = self.self_attn(self.input_layernorm(x), rotation, visible, cache, earlier, first)
        x = x[:, first:]
        if self.attention_out_norm is not None:
            attended = self.attention_out_norm(attended)
        after = x + drop(attended, 0)
        out = self.mlp(self.post_attention_layernorm(x if self.architecture.parallel_residual else after))
        if self.mlp_out_norm is not None:
            out = self.mlp_out_norm(out)
        return after + drop(out, 1), cache


class Attention(nnx.Module):
    def __init__(self, spec: NetworkSpec, rngs: nnx.Rngs):
        a = self.architecture = spec.architecture
        self.dtype, self.platform = jnp.dtype(spec.precision), spec.platform
        self.q_proj = linear(spec, "self_attn.q_proj", a.hidden_size, a.heads * a.head_dim, a.attention_bias)
        self.k_proj = linear(spec, "self_attn.k_proj", a.hidden_size, a.kv_heads * a.head_dim, a.attention_bias)
        self.v_proj = linear(spec, "self_attn.v_proj", a.hidden_size, a.kv_heads * a.head_dim, a.attention_bias)
        self.o_proj = linear(spec, "self_attn.o_proj", a.heads * a.head_dim, a.hidden_size, a.output_bias)
        self.q_norm = rms_norm(a, a.head_dim, rngs) if a.qk_norm else None
        self.k_norm = rms_norm(a, a.head_dim, rngs) if a.qk_norm else None

    def __call__(
        self, x: Array, rotation: Any, visible: Visible, cache: Any, earlier: Any, first: int
    ) -> tuple[Array, tuple[Array, Array]]:
        """x [B, L, d] -> [B, L - first, d]: queries are the columns from ``first`` on. ``visible`` is for all L queries.
        ``cache``: (keys, values, first free column) or None. ``earlier``: keys and values of earlier columns, or None. Also
        returns keys and values: those of the updated cache if there is one, else those seen."""
        a = self.architecture
        q, k = split_heads(self.q_proj(x[:, first:]), a.heads), split_heads(self.k_proj(x, self.q_proj), a.kv_heads)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        visible = visible.since(first)
        q, k = rotate(q, rotation and tuple(angle[:, :, first:] for angle in rotation)), rotate(k, rotation)
        v = split_heads(self.v_proj(x, self.q_proj), a.kv_heads)
        q, k, v = (part.astype(attention_dtype(self.dtype, self.platform)) for part in (q, k, v))
        if cache is not None:
            *cache, column = cache
            cache = [jax.lax.dynamic_update_slice(old, new, (0, 0, column, 0)) for old, new in zip(cache, (k, v), strict=True)]
            k, v = (filled[:, :, : visible.columns] for filled in cache)
        elif earlier is not None:
            k, v = (jnp.concatenate(columns, axis=2) for columns in zip(earlier, (k, v), strict=True))
        return self.o_proj(attend(a, q, k, v, visible)), (k, v) if cache is None else cache


class Linear(nnx.Module):
    """[..., inputs] -> [..., outputs], with or without an adapter (`lockstep.models.adapters`) beside the kernel. If the
    checkpoint fuses several layers, their adapter has one A, kept by the first of them."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: Any, platform: str, adapter: Adapter | None, leads: bool):
        self.dtype, self.platform, self.adapter = dtype, platform, adapter
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None
        self.lora_A = nnx.Param(jnp.zeros((inputs, adapter.rank))) if adapter and leads else None
        self.lora_B = nnx.Param(jnp.zeros((adapter.rank, outputs))) if adapter else None

    def __call__(self, x: Array, leader: Linear | None = None) -> Array:
        flat = x.reshape(-1, x.shape[-1])
        out = product(self.dtype, self.platform, flat, self.kernel[...])
        out = out if self.bias is None else out + self.bias
        if self.adapter is not None:
            down = self.lora_A if self.lora_A is not None else leader.lora_A
            low = product(self.dtype, self.platform, flat, down[...])
            out = out + self.adapter.scale * product(self.dtype, self.platform, low, self.lora_B[...])
        return out.reshape(*x.shape[:-1], -1)


def linear(spec: NetworkSpec, name: str, inputs: int, outputs: int, bias: bool) -> Linear:
    """The linear layer ``name`` of a layer, such as 'self_attn.q_proj'."""
    theirs, first = family_of(spec.architecture).naming.layer(name)
    adapter = spec.adapter if spec.adapter and spec.adapter.adapts(theirs) else None
    return Linear(inputs, outputs, bias, jnp.dtype(spec.precision), spec.platform, adapter, leads=first)


class MLP(nnx.Module):
    def __init__(self, spec: NetworkSpec):
        a = spec.architecture
        self.activation = ACTIVATIONS[a.activation]
        self.gate_proj = linear(spec, "mlp.gate_proj", a.hidden_size, a.intermediate_size, a.mlp_bias) if a.gated else None
        self.up_proj = linear(spec, "mlp.up_proj", a.hidden_size, a.intermediate_size, a.mlp_bias)
        self.down_proj = linear(spec, "mlp.down_proj", a.intermediate_size, a.hidden_size, a.mlp_bias)

    def __call__(self, x: Array) -> Array:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x, self.gate_proj))


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


def norm(a: Architecture, rngs: nnx.Rngs) -> nnx.Module:
    """The norm of a layer's width, in float32. Flax's fast variance E[x²] - E[x]² cancels if the mean is large, so it is off."""
    if a.norm == "rms":
        return rms_norm(a, a.hidden_size, rngs)
    return nnx.LayerNorm(a.hidden_size, epsilon=a.norm_eps, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)


def rms_norm(a: Architecture, size: int, rngs: nnx.Rngs) -> nnx.Module:
    kind = OffsetRMSNorm if a.unit_offset else nnx.RMSNorm
    return kind(size, epsilon=a.norm_eps, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)


class OffsetRMSNorm(nnx.RMSNorm):
    """Gemma's RMSNorm, whose gain is 1 + weight."""

    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon) * (1 + self.scale[...])


def split_heads(x: Array, heads: int) -> Array:
    """[B, L, H hd] -> [B, H, L, hd]."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def rotate(x: Array, rotation: tuple[Array, Array] | None) -> Array:
    """x [B, H, L, hd] rotated by `angles`: the first dims of each head, in Llama's half-split layout; the others stay."""
    if rotation is None:
        return x
    cos, sin = rotation
    dims = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :dims], 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned + [x[..., dims:]] * (dims < x.shape[-1]), axis=-1)


def angles(rope: Rope | None, kinds: tuple[Rope | None, ...], position: Array) -> tuple[Array, Array]:
    """cos and sin [B, 1, L, dims / 2] of the rotary angles (Su et al. 2021) at position [B, L]. If ``rope`` is None, there is no
    rotation, in the shape of the other kinds."""
    turning = rope is not None
    angle = position[:, None, :, None] * (turning * frequencies(rope or next(filter(None, kinds))))
    return jnp.cos(angle), jnp.sin(angle)


def frequencies(rope: Rope) -> np.ndarray:
    """float32 [dims / 2]: radians per position. Linear scaling divides all of them by ``factor`` (Chen et al. 2023). Llama 3's
    scaling stretches long wavelengths by ``factor``, leaves short ones alone and interpolates smoothly in between (Dubey et al.
    2024; the bounds are wavelengths per original context)."""
    frequency = rope.theta ** -(np.arange(0, rope.dims, 2) / rope.dims)
    if rope.scaling is not None:
        kind, factor, low, high, original = rope.scaling
        turns = original * frequency / (2 * np.pi)  # in the original context
        kept = np.clip((turns - low) / (high - low), 0, 1) if kind == "llama3" else 0.0
        frequency = frequency * (kept + (1 - kept) / factor)
    return frequency.astype(np.float32)
