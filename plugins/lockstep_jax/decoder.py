"""The network: tokens in, hidden states out, heads on top, for every `lockstep.architecture.Architecture`.

Modules are flax.nnx and exist inside a trace only. Outside, parameters are a plain tree of float32 arrays, which costs
no host time per step, and `Network.bind` makes modules of them. The layers are one `Layer` whose arrays have a leading
[layers] axis, run by `jax.lax.scan`, so compile time does not grow with depth.

In bfloat16, matrix products and the key-value cache are; norms, softmax, residual stream and logits stay in float32.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lockstep.architecture import Architecture
from lockstep.randomness import hash32

Array = jax.Array
Tree = Any
"""Parameters: nested dicts of arrays, named as the modules below are."""


@dataclass(frozen=True)
class Network:
    """Which network: all that a compiled program depends on besides shapes. Models with equal ones share programs."""

    architecture: Architecture
    precision: str
    language_head: bool
    scalar_head: bool

    def bind(self, params: Tree) -> DecoderNetwork:
        """The modules with these parameters. Kernels are cast once here, not once per use in a generation loop."""
        cast = lambda path, array: array.astype(self.precision) if path[-1].key == "kernel" else array  # noqa: E731
        return nnx.merge(_graph(self), jax.tree_util.tree_map_with_path(cast, params))


@functools.cache
def _graph(network: Network) -> Any:
    """The structure of the modules without arrays."""
    return nnx.graphdef(nnx.eval_shape(lambda: DecoderNetwork(network, nnx.Rngs(0))))


class Dropout(NamedTuple):
    """`lockstep.interfaces.Dropout` in a compiled program: ``seeds`` uint32 [B]."""

    rate: Any
    seeds: Array

    def __call__(self, x: Array, site: Any, position: Array) -> Array:
        """x [B, L, d] with elements zeroed and the rest scaled up; position [B, L]."""
        width = x.shape[-1]
        element = position[..., None].astype(jnp.uint32) * np.uint32(width) + jnp.arange(width, dtype=jnp.uint32)
        row = hash32(self.seeds ^ hash32(jnp.asarray(site)))
        kept = hash32(hash32(element) ^ row[:, None, None]) >> np.uint32(8) >= self.rate * 2**24
        return jnp.where(kept, x / (1 - self.rate), 0.0)


def positions(mask: Array) -> Array:
    """[B, L] number of real tokens before each column (LHP): left padding does not shift a prompt."""
    return jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)


class ScalarHead(nnx.Module):
    """[..., d] -> [...], in float32."""

    def __init__(self, hidden_size: int):
        self.weight = nnx.Param(jnp.zeros((1, hidden_size)))
        self.bias = nnx.Param(jnp.zeros(1))

    def __call__(self, hidden: Array) -> Array:
        return hidden @ self.weight[0] + self.bias[0]


# -------------------------------------------------------------------------------------------------------- the decoder


class Cache(NamedTuple):
    """keys, values: [layers, B, P + T, H_kv, hd]; ``length`` columns are filled. ``mask`` [B, P + T] is True on real
    ones; ``count`` [B] is the position of the next token."""

    keys: Array
    values: Array
    mask: Array
    count: Array
    length: Array


class DecoderNetwork(nnx.Module):
    """Pre-norm transformer: Llama's (Touvron et al. 2023) or GPT-2's (Radford et al. 2019), or between."""

    def __init__(self, network: Network, rngs: nnx.Rngs):
        a = self.architecture = network.architecture
        self.dtype = jnp.dtype(network.precision)
        self.embed_tokens = nnx.Embed(a.vocab_size, a.hidden_size, rngs=rngs)
        learned = a.positions == "learned"
        self.embed_positions = nnx.Embed(a.context_length, a.hidden_size, rngs=rngs) if learned else None
        self.layers = Layer(a, self.dtype, rngs)
        self.norm = norm(a, rngs)
        separate = network.language_head and not a.tied
        self.lm_head = Linear(a.hidden_size, a.vocab_size, False, self.dtype) if separate else None
        self.score = ScalarHead(a.hidden_size) if network.scalar_head else None

    def hidden(self, tokens: Array, mask: Array, dropout: Dropout | None = None) -> Array:
        """[B, L] ids and attention mask -> [B, L, d] after the final norm. Ids under a False mask are never read."""
        position = positions(mask)
        drop = dropout and (lambda y, site: dropout(y, site, position))
        x, _ = self.run(self.embed(tokens, mask, position), self.rotation(position), causal(mask), drop=drop)
        return self.norm(x)

    def start(self, tokens: Array, mask: Array, new_tokens: int) -> tuple[Array, Cache]:
        """Hidden state [B, d] of the last column, and a cache with room for ``new_tokens`` more."""
        a, (rows, length) = self.architecture, tokens.shape
        room = jnp.zeros((a.layers, rows, length + new_tokens, a.kv_heads, a.head_dim), self.dtype)
        position = positions(mask)
        x = self.embed(tokens, mask, position)
        x, (keys, values) = self.run(x, self.rotation(position), causal(mask), (room, room), 0)
        cache = Cache(keys, values, jnp.pad(mask, ((0, 0), (0, new_tokens))), mask.sum(-1), jnp.int32(length))
        return self.norm(x[:, -1]), cache

    def advance(self, token: Array, cache: Cache) -> tuple[Array, Cache]:
        """Feed one token [B] to every row; hidden state [B, d] and the longer cache."""
        keys, values, mask, count, length = cache
        mask = mask.at[:, length].set(True)
        position = count[:, None]
        x = self.embed(token[:, None], True, position)
        x, (keys, values) = self.run(x, self.rotation(position), mask[:, None, None, :], (keys, values), length)
        return self.norm(x[:, 0]), Cache(keys, values, mask, count + 1, length + 1)

    def logits(self, hidden: Array) -> Array:
        """[..., d] -> float32 [..., V]."""
        kernel = self.embed_tokens.embedding.T if self.lm_head is None else self.lm_head.kernel
        return jnp.matmul(hidden.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=jnp.float32)

    def embed(self, tokens: Array, mask: Array | bool, position: Array) -> Array:
        x = self.embed_tokens(jnp.where(mask, tokens, 0))
        return x if self.embed_positions is None else x + self.embed_positions(position)

    def rotation(self, position: Array) -> tuple[Array, Array] | None:
        """cos and sin [B, L, 1, hd / 2] of the rotary angles (Su et al. 2021, in Llama's half-split layout)."""
        if self.architecture.positions != "rope":
            return None
        angle = position[:, :, None, None] * frequencies(self.architecture)
        return jnp.cos(angle), jnp.sin(angle)

    def run(
        self, x: Array, rotation: Any, visible: Array, cache: Any = None, column: Any = 0, drop: Any = None
    ) -> tuple[Array, Any]:
        """All layers. The cache (keys, values) is carried from layer to layer, each writing its own slice from
        ``column`` on: as an input and output of the scan it would be copied at every step.

        The backward pass computes a layer's inner activations again (Chen et al. 2016): memory for one layer instead of
        all, and no slower on the CPU, where moving them costs as much as the arithmetic."""
        graph, stacked = nnx.split(self.layers)

        def body(carry: Any, layer: Any) -> tuple[Any, None]:
            index, arrays = layer
            return nnx.merge(graph, arrays)(*carry, rotation, visible, index, column, drop), None

        again = jax.checkpoint(body, prevent_cse=False)  # within a scan nothing could be merged with the first pass
        return jax.lax.scan(again, (x, cache), (jnp.arange(self.architecture.layers), stacked))[0]


class Layer(nnx.Module):
    def __init__(self, architecture: Architecture, dtype: Any, rngs: nnx.Rngs):
        self.input_layernorm = norm(architecture, rngs)
        self.self_attn = Attention(architecture, dtype)
        self.post_attention_layernorm = norm(architecture, rngs)
        self.mlp = MLP(architecture, dtype)

    def __call__(
        self, x: Array, cache: Any, rotation: Any, visible: Array, layer: Array, column: Any, drop: Any
    ) -> tuple[Array, Any]:
        drop = drop or (lambda y, site: y)
        attended, cache = self.self_attn(self.input_layernorm(x), cache, rotation, visible, layer, column)
        x = x + drop(attended, 2 * layer)
        return x + drop(self.mlp(self.post_attention_layernorm(x)), 2 * layer + 1), cache


class Attention(nnx.Module):
    def __init__(self, architecture: Architecture, dtype: Any):
        a = self.architecture = architecture
        self.q_proj = Linear(a.hidden_size, a.heads * a.head_dim, a.attention_bias, dtype)
        self.k_proj = Linear(a.hidden_size, a.kv_heads * a.head_dim, a.attention_bias, dtype)
        self.v_proj = Linear(a.hidden_size, a.kv_heads * a.head_dim, a.attention_bias, dtype)
        self.o_proj = Linear(a.heads * a.head_dim, a.hidden_size, a.output_bias, dtype)

    def __call__(self, x: Array, cache: Any, rotation: Any, visible: Array, layer: Array, column: Any) -> tuple[Array, Any]:
        """x [B, L, d]; visible bool, broadcast to [B, H, L, columns]; cache (keys, values) of all layers, or None."""
        a = self.architecture
        q = rotate(split_heads(self.q_proj(x), a.heads), rotation)
        k = rotate(split_heads(self.k_proj(x), a.kv_heads), rotation)
        v = split_heads(self.v_proj(x), a.kv_heads)
        if cache is not None:
            place = (layer, 0, column, 0, 0)
            cache = tuple(jax.lax.dynamic_update_slice(old, new[None], place) for old, new in zip(cache, (k, v), strict=True))
            k, v = (filled[layer, :, : visible.shape[-1]] for filled in cache)
        # The mask is a large negative number, not -inf: a padded row that sees nothing stays finite.
        out = jax.nn.dot_product_attention(q, k, v, mask=visible)
        return self.o_proj(out.reshape(*out.shape[:2], -1)), cache


class Linear(nnx.Module):
    """[..., inputs] -> [..., outputs]."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: Any):
        self.dtype = dtype
        self.kernel = nnx.Param(jnp.zeros((inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: Array) -> Array:
        out = product(x.reshape(-1, x.shape[-1]).astype(self.dtype), self.kernel.astype(self.dtype))
        out = out if self.bias is None else out + self.bias.astype(self.dtype)
        return out.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def product(x: Array, kernel: Array) -> Array:
    """[rows, inputs] @ [inputs, outputs], with gradients whose operands are transposed first and multiplied then. Left to
    itself XLA's CPU compiler multiplies transposed operands as they lie, at half to three quarters of the speed, and slower
    still where x has more axes in front than one."""
    return x @ kernel


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _product_backward(operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = (jax.lax.optimization_barrier(operand.T) for operand in operands)
    return gradient @ kernel, x @ gradient


product.defvjp(_product_forward, _product_backward)


class MLP(nnx.Module):
    def __init__(self, architecture: Architecture, dtype: Any):
        a = architecture
        self.activation = ACTIVATIONS[a.activation]
        self.gate_proj = Linear(a.hidden_size, a.intermediate_size, a.mlp_bias, dtype) if a.gated else None
        self.up_proj = Linear(a.hidden_size, a.intermediate_size, a.mlp_bias, dtype)
        self.down_proj = Linear(a.intermediate_size, a.hidden_size, a.mlp_bias, dtype)

    def __call__(self, x: Array) -> Array:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


def norm(a: Architecture, rngs: nnx.Rngs) -> nnx.Module:
    """In float32. Flax's fast variance E[x²] - E[x]² cancels where the mean is large: off."""
    kind = nnx.RMSNorm if a.norm == "rms" else nnx.LayerNorm
    return kind(a.hidden_size, epsilon=a.norm_eps, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)


def causal(mask: Array) -> Array:
    """[B, L] attention mask -> bool [B, 1, L, L]: query i sees key j where j <= i and j is real."""
    length = mask.shape[1]
    return jnp.tril(jnp.ones((length, length), bool)) & mask[:, None, None, :]


def split_heads(x: Array, heads: int) -> Array:
    """[B, L, H hd] -> [B, L, H, hd]."""
    return x.reshape(*x.shape[:2], heads, -1)


def rotate(x: Array, rotation: tuple[Array, Array] | None) -> Array:
    """x [B, L, H, hd] turned by the angles of `DecoderNetwork.rotation`."""
    if rotation is None:
        return x
    cos, sin = rotation
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def frequencies(a: Architecture) -> np.ndarray:
    """float32 [hd / 2]: radians per position. Llama 3 stretches long wavelengths by ``factor``, leaves short ones alone
    and goes over smoothly in between (Dubey et al. 2024; the bounds are wavelengths per original context)."""
    frequency = a.rope_theta ** -(np.arange(0, a.head_dim, 2) / a.head_dim)
    if a.rope_scaling is not None:
        factor, low, high, original = a.rope_scaling
        turns = original * frequency / (2 * np.pi)  # in the original context
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    return frequency.astype(np.float32)


# ---------------------------------------------------------------------------------------- checkpoint names, both ways


def from_arrays(architecture: Architecture, arrays: Mapping[str, np.ndarray]) -> Tree:
    """Host arrays under checkpoint names -> the tree of parameters, on the host."""
    if architecture.family == "gpt2":
        arrays = _gpt2_to_llama(arrays)
    flat: dict[tuple[str, ...], Any] = {}
    for name, array in arrays.items():
        *path, leaf = _path(name)
        array = array.T if leaf == "kernel" else array  # torch's [out, in] -> flax's [in, out]
        if path[0] == "layers":
            flat.setdefault((path[0], *path[2:], leaf), {})[int(path[1])] = array
        else:
            flat[*path, leaf] = array
    stacked = {
        path: np.stack([value[layer] for layer in range(architecture.layers)]) if path[0] == "layers" else value
        for path, value in flat.items()
    }
    return nnx.traversals.unflatten_mapping(stacked)


def to_arrays(architecture: Architecture, params: Tree) -> dict[str, np.ndarray]:
    """The tree of parameters (or of gradients, or moments) -> float32 host copies under checkpoint names."""
    arrays: dict[str, np.ndarray] = {}
    for (*path, leaf), array in nnx.traversals.flatten_mapping(jax.device_get(params)).items():
        kind = "bias" if leaf == "bias" else "weight"
        own = (lambda x: x.T) if leaf == "kernel" else (lambda x: x)
        if path[0] == "layers":
            rest = ".".join(path[1:])
            arrays |= {f"model.layers.{i}.{rest}.{kind}": own(array[i]) for i in range(architecture.layers)}
        else:
            top = "" if path[0] in ("lm_head", "score") else "model."
            arrays[f"{top}{path[0]}.{kind}"] = own(array)
    if architecture.family == "gpt2":
        arrays = _llama_to_gpt2(arrays)
    # On the CPU, device_get gives views of buffers that a learner will donate: hence the copies.
    return {name: np.array(array, np.float32, order="C") for name, array in arrays.items()}


def _path(name: str) -> list[str]:
    """'model.layers.3.mlp.up_proj.weight' -> ['layers', '3', 'mlp', 'up_proj', 'kernel']."""
    *path, module, leaf = name.removeprefix("model.").split(".")
    if leaf == "weight" and module != "score":
        leaf = "embedding" if module.startswith("embed") else "scale" if module.endswith("norm") else "kernel"
    return [*path, module, leaf]


GPT2_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.wpe": "model.embed_positions",
    "transformer.ln_f": "model.norm",
    "transformer.h": "model.layers",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
"""Parts of GPT-2's names and of Llama's; ``attn.c_attn`` is q, k and v side by side."""

QKV = ("q_proj", "k_proj", "v_proj")


def _gpt2_to_llama(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Conv1D [in, out] -> [out, in], and the fused projection cut in three."""
    out = {}
    for name, array in arrays.items():
        array = array.T if re.search(r"\.c_\w+\.weight$", name) else array
        llama = _rename(name, GPT2_NAMES)
        if "attn.c_attn" in name:
            for part, rows in zip(QKV, np.split(array, 3), strict=True):
                out[llama.replace("attn.c_attn", f"self_attn.{part}")] = rows
        else:
            out[llama] = array
    return out


def _llama_to_gpt2(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `_gpt2_to_llama`."""
    back = {llama: gpt2 for gpt2, llama in GPT2_NAMES.items()}
    out = {}
    for name, array in arrays.items():
        if "self_attn.q_proj" in name:
            array = np.concatenate([arrays[name.replace("q_proj", part)] for part in QKV])
        elif "self_attn.k_proj" in name or "self_attn.v_proj" in name:
            continue
        gpt2 = _rename(name, back).replace("self_attn.q_proj", "attn.c_attn")
        out[gpt2] = array.T if re.search(r"\.c_\w+\.weight$", gpt2) else array
    return out


def _rename(name: str, parts: Mapping[str, str]) -> str:
    for old, new in parts.items():
        name = re.sub(rf"\b{re.escape(old)}\b", new, name)
    return name
