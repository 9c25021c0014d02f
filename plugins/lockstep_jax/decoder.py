"""The network: tokens in, hidden states out, heads on top, for every `lockstep.models.architecture.Architecture`.

Modules are flax.nnx and exist only inside a trace. Outside, parameters are a plain tree of float32 arrays, which costs no host
time per step; `NetworkSpec.bind` turns them into modules. The layers are one `Layer` whose arrays have a leading [layers] axis.
Deep networks are trained by `jax.lax.scan` over it, so compile time does not grow with depth.

With bfloat16, matmul inputs are bfloat16; on accelerators so are attention and the KV cache. Accumulation, norms, softmax, the
residual stream and logits stay in float32.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from lockstep.learning.randomness import hash32
from lockstep.models.adapters import Adapter
from lockstep.models.architecture import Architecture, Rope, family_of
from lockstep_jax.attention import Dense, Fused, Visible, attend, attention_dtype, causal, softcap
from lockstep_jax.device import JaxDevice
from lockstep_jax.mesh import heads, rows
from lockstep_jax.products import PRODUCTS, product, transposed

Tree = Any
"""Parameters: nested dicts of arrays, named as the modules below are."""

TEACHER = "teacher"


@dataclass(frozen=True)
class NetworkSpec:
    """Everything about a network that a compiled program depends on, besides shapes. Models with equal specs share programs."""

    architecture: Architecture
    platform: str
    precision: str
    gradient_checkpointing: bool | None
    mesh: Mesh | None
    language_head: bool
    scalar_head: bool
    adapter: Adapter | None = None
    teacher: NetworkSpec | None = None
    """The teacher's parameters are among the frozen ones, under `TEACHER`."""
    beta: float = 1.0

    @classmethod
    def on(cls, backend: JaxDevice, architecture: Architecture, **parts: Any) -> NetworkSpec:
        """A spec with this backend's settings."""
        c = backend.config
        return cls(architecture, backend.device.platform, c.precision, c.gradient_checkpointing, backend.mesh, **parts)

    def bind(self, params: Tree, frozen: Tree) -> DecoderNetwork:
        """The modules with these parameters. ``frozen``: the untrained ones of an adapter's trunk; a teacher's are ignored."""
        return nnx.merge(_graph(self), _joined(params, {name: part for name, part in frozen.items() if name != TEACHER}))

    def cast(self, params: Tree) -> Tree:
        """Cast kernels to the matmul precision. A loop over tokens would otherwise do so for each token."""
        cast = lambda path, array: array.astype(self.precision) if path[-1].key == "kernel" else array  # noqa: E731
        return jax.tree_util.tree_map_with_path(cast, params)

    def linear(self, name: str, inputs: int, outputs: int, bias: bool) -> Linear:
        """The linear layer ``name`` of a layer, such as 'self_attn.q_proj'."""
        theirs, first = family_of(self.architecture).naming.layer(name)
        adapter = self.adapter if self.adapter and self.adapter.adapts(theirs) else None
        return Linear(inputs, outputs, bias, jnp.dtype(self.precision), self.platform, adapter, leads=first)


def _joined(one: Tree, other: Tree) -> Tree:
    """Merge two trees of nested dicts that have no leaf in common."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        raise ValueError("the same parameter in both trees")
    both = {key: _joined(one[key], other[key]) for key in one.keys() & other.keys()}
    return {**one, **other, **both}


@functools.cache
def _graph(spec: NetworkSpec) -> Any:
    """The structure of the modules without arrays."""
    return nnx.graphdef(nnx.eval_shape(lambda: DecoderNetwork(spec, nnx.Rngs(0))))


class DropoutMask(NamedTuple):
    """`lockstep.interfaces.Dropout` in a compiled program. ``seeds``: uint32 [B]."""

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
    """[B, L] number of real tokens before each column (LHP), so that left padding does not shift a prompt. With segments, only
    tokens of the same segment count."""
    count = jnp.maximum(jnp.cumsum(mask != 0, axis=-1) - 1, 0)
    if mask.dtype == bool:
        return count
    begins = mask != jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))
    return count - jax.lax.cummax(jnp.where(begins, count, 0), axis=1)


class ScalarHead(nnx.Module):
    """[..., d] -> [...], in float32."""

    def __init__(self, hidden_size: int):
        self.weight = nnx.Param(jnp.zeros((1, hidden_size)))
        self.bias = nnx.Param(jnp.zeros(1))

    def __call__(self, hidden: Array) -> Array:
        return jnp.matmul(hidden, self.weight[0], precision="highest") + self.bias[0]  # whatever the precision of other matmuls


# -------------------------------------------------------------------------------------------------------- the decoder


SHALLOW = 8
"""Networks with at most this many layers are compiled layer by layer, and checkpointed only if the configuration says so. A loop
has to move what it keeps for its gradient, which took a sixth of the time of the benchmark's four layers."""


Layers = list[tuple[Array, Array]]
"""Keys and values of each layer, [B, H_kv, columns, hd]."""


class Cache(NamedTuple):
    """``layers`` with P + T columns, of which ``length`` are filled. ``mask`` [B, P + T] is True on real columns; ``count`` [B]
    is the position of the next token."""

    layers: Layers
    mask: Array
    count: Array
    length: Array


@functools.partial(jax.jit, static_argnames="known")
def recalled(layers: Layers, rows: Array, shift: Array, *, known: int) -> Layers:
    """The known columns of a cache, as `lockstep.interfaces.Past` defines them: each [B, H_kv, known, hd]."""

    def of(kept: Array) -> Array:
        columns = jnp.clip(jnp.arange(known) + shift[:, None], 0, kept.shape[2] - 1)
        return jnp.take_along_axis(kept[rows], columns[:, None, :, None], axis=2)

    return jax.tree.map(of, layers)


Views = tuple[Visible, ...]
"""What queries see in each kind of layer."""


class Kinds(NamedTuple):
    """The kinds of rotation and window among the layers, and the kind of each layer: int32 [layers], or None if there is only
    one kind."""

    ropes: tuple[Rope | None, ...]
    rope_of_layer: np.ndarray | None
    windows: tuple[int | None, ...]
    window_of_layer: np.ndarray | None


@functools.cache
def kinds_of(a: Architecture) -> Kinds:
    return Kinds(*_distinct(a.rope(i) for i in range(a.layers)), *_distinct(a.window(i) for i in range(a.layers)))


def _distinct(per_layer: Iterable[Any]) -> tuple[tuple[Any, ...], np.ndarray | None]:
    per_layer = list(per_layer)
    kinds = tuple(dict.fromkeys(per_layer))
    return kinds, np.array([kinds.index(one) for one in per_layer], np.int32) if len(kinds) > 1 else None


class DecoderNetwork(nnx.Module):
    """Pre-norm transformer, such as Llama (Touvron et al. 2023) or GPT-2 (Radford et al. 2019)."""

    def __init__(self, spec: NetworkSpec, rngs: nnx.Rngs):
        a = self.architecture = spec.architecture
        self.dtype, self.platform = jnp.dtype(spec.precision), spec.platform
        self.gradient_checkpointing, self.mesh = spec.gradient_checkpointing, spec.mesh
        self.embed_tokens = nnx.Embed(a.vocab_size, a.hidden_size, rngs=rngs)
        learned = a.positions == "learned"
        self.embed_positions = nnx.Embed(a.context_length, a.hidden_size, rngs=rngs) if learned else None
        self.layers = Layer(spec, rngs)
        self.norm = norm(a, rngs)
        separate = spec.language_head and not a.tied
        self.lm_head = spec.linear("lm_head", a.hidden_size, a.vocab_size, False) if separate else None
        self.score = ScalarHead(a.hidden_size) if spec.scalar_head else None

    def hidden(
        self, tokens: Array, mask: Array, dropout: DropoutMask | None = None, first: int = 0, rows_per_prompt: int = 1
    ) -> Array:
        """[B, L] ids and attention mask -> [B, L - first, d] after the final norm, for the columns from ``first`` on. Ids under a
        False mask are never read. The mask may be `lockstep.text.sequences.Sequences.segments`, int. If ``rows_per_prompt`` is
        above 1, groups of that many neighbouring rows are equal up to and including column ``first``. Those columns are computed
        once per group: first the prompts, then the responses, which see their prompt's keys. In that case there is no dropout and
        no mesh.

        For the gradient, inputs and results of the layers' matmuls are kept, and everything between them is recomputed. With
        ``gradient_checkpointing``, everything but each layer's input is recomputed (Chen et al. 2016)."""
        position, each, known = positions(mask), rows_per_prompt, first + 1
        parts: list[tuple[slice, ...]] = [(slice(None),)]
        views = [self.causal(mask)]
        if each > 1:
            parts = [(slice(None, None, each), slice(known)), (slice(None), slice(known, None))]
            views = [self.causal(mask[parts[0]]), self.causal(mask, known)]
        xs = [self.embed(tokens[part], mask[part], position[part]) for part in parts]
        rotations = [self.rotations(position[part]) for part in parts]
        graph, stacked = nnx.split(self.layers)
        kinds, count = kinds_of(self.architecture), self.architecture.layers
        again = count > SHALLOW if self.gradient_checkpointing is None else self.gradient_checkpointing
        kept = None if again else PRODUCTS

        def through(xs: list[Array], layer: Any, first: int = 0) -> list[Array]:
            def run(xs: list[Array], weights: Any) -> list[Array]:
                drop = dropout and (lambda y, part: dropout(y, 2 * number + part, position[:, -y.shape[1] :]))
                module, out, earlier = nnx.merge(graph, weights), [], None
                for x, rotation, view in zip(xs, rotations, views, strict=True):
                    start = first if earlier is None else 0
                    x, earlier = module(x, pick(rotation, rope), pick(view, window), earlier=earlier, drop=drop, first=start)
                    earlier = repeated(earlier, each)
                    out.append(rows(self.mesh, x))
                return out

            number, rope, window, weights = layer
            return jax.checkpoint(run, prevent_cse=False, policy=kept)(xs, weights)

        layers = np.arange(count, dtype=np.int32), kinds.rope_of_layer, kinds.window_of_layer, stacked
        if again or count > SHALLOW:  # a loop, so that XLA does not merge recomputation with the first pass
            xs = jax.lax.scan(lambda xs, layer: (through(xs, layer), None), xs, layers)[0]
            xs[0] = xs[0][:, first:]
        else:
            for number in range(count):
                start = first if number == count - 1 else 0  # in the last layer, earlier columns give only keys and values
                xs = through(xs, at(number, layers), start)
        return self.norm(xs[0] if each == 1 else jnp.concatenate([repeated(xs[0], each), xs[1]], axis=1))

    def apart(self) -> list[Layer]:
        """The layers one by one, for `start` and `advance`. Call it before a loop over tokens: inside, it would copy all weights
        out of the stack for each token."""
        graph, stacked = nnx.split(self.layers)
        return [nnx.merge(graph, at(number, stacked)) for number in range(self.architecture.layers)]

    def start(
        self, layers: Sequence[Layer], tokens: Array, mask: Array, new_tokens: int, past: Layers | None = None
    ) -> tuple[Array, Cache]:
        """Prefill. Return the hidden state [B, d] of the last column, and a cache with room for ``new_tokens`` more. ``past``:
        keys and values of the first columns, from `recalled`."""
        a, (count, length) = self.architecture, tokens.shape
        known = past[0][0].shape[2] if past else 0
        shape = count, a.kv_heads, length - known + new_tokens, a.head_dim
        room = jnp.zeros(shape, attention_dtype(self.dtype, self.platform))
        kept = jax.tree.map(lambda part: jnp.concatenate([part, room], axis=2), past) if past else [(room, room)] * a.layers
        position = positions(mask)[:, known:]
        x = self.embed(tokens[:, known:], mask[:, known:], position)
        x, kept = self.feed(layers, x, position, self.causal(mask, known), kept, known, length - known - 1)
        return x, Cache(kept, jnp.pad(mask, ((0, 0), (0, new_tokens))), mask.sum(-1), jnp.int32(length))

    def advance(self, layers: Sequence[Layer], token: Array, cache: Cache) -> tuple[Array, Cache]:
        """Feed one token [B] to every row and return the hidden state [B, d] and the longer cache."""
        kept, mask, count, length = cache
        mask = mask.at[:, length].set(True)
        position = count[:, None]
        x = self.embed(token[:, None], True, position)
        x, kept = self.feed(layers, x, position, self.views(Dense(mask[:, None, None, :]), length), kept, length)
        return x, Cache(kept, mask, count + 1, length + 1)

    def feed(
        self, layers: Sequence[Layer], x: Array, position: Array, views: Views, kept: Any, column: Any, first: int = 0
    ) -> tuple[Array, Any]:
        """Run x [B, L, d] through all layers and write their keys and values into the columns from ``column`` on. Return the
        hidden state [B, d] of the last column, and the cache. In the last layer, columns before ``first`` give only keys and
        values."""
        rotations, kinds = self.rotations(position), kinds_of(self.architecture)
        filled = []
        for number, (layer, cache) in enumerate(zip(layers, kept, strict=True)):
            rope, window = at(number, (kinds.rope_of_layer, kinds.window_of_layer))
            start = first if number == len(layers) - 1 else 0
            x, cache = layer(x, pick(rotations, rope), pick(views, window), (*cache, column), first=start)
            x, cache = rows(self.mesh, x), heads(self.mesh, cache)
            filled.append(cache)
        return self.norm(x[:, -1]), filled

    def head(self) -> Array:
        """The kernel [d, V] for `logits`. Call it before a loop over tokens."""
        return transposed(self.embed_tokens.embedding[...], self.platform) if self.lm_head is None else self.lm_head.kernel[...]

    def logits(self, hidden: Array, head: Array) -> Array:
        """[..., d] -> [..., V]."""
        logits = product(self.dtype, self.platform, hidden.reshape(-1, hidden.shape[-1]), head)
        return softcap(logits, self.architecture.final_softcap).reshape(*hidden.shape[:-1], -1)

    def embed(self, tokens: Array, mask: Array | bool, position: Array) -> Array:
        x = self.embed_tokens(jnp.where(mask, tokens, 0))
        if self.architecture.scaled_embedding:
            x = x * np.float32(self.architecture.hidden_size**0.5)
        return rows(self.mesh, x if self.embed_positions is None else x + self.embed_positions(position))

    def rotations(self, position: Array) -> tuple[Any, ...]:
        """The rotation of each kind of layer: cos and sin [B, 1, L, dims / 2]; a single None if no layer rotates."""
        ropes = kinds_of(self.architecture).ropes
        return ropes if ropes == (None,) else tuple(angles(rope, ropes, position) for rope in ropes)

    def causal(self, mask: Array, known: int = 0) -> Views:
        """`lockstep_jax.attention.causal` for each kind of layer."""
        fused = self.mesh is None and Fused.takes(self.architecture, self.dtype, self.platform)
        return self.views(causal(mask, known, fused=fused), known)

    def views(self, visible: Visible, column: Any) -> Views:
        """``visible`` for each kind of layer. ``column``: the first query's."""
        return tuple(visible.near(window, column) for window in kinds_of(self.architecture).windows)


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
        self.q_proj = spec.linear("self_attn.q_proj", a.hidden_size, a.heads * a.head_dim, a.attention_bias)
        self.k_proj = spec.linear("self_attn.k_proj", a.hidden_size, a.kv_heads * a.head_dim, a.attention_bias)
        self.v_proj = spec.linear("self_attn.v_proj", a.hidden_size, a.kv_heads * a.head_dim, a.attention_bias)
        self.o_proj = spec.linear("self_attn.o_proj", a.heads * a.head_dim, a.hidden_size, a.output_bias)
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


class MLP(nnx.Module):
    def __init__(self, spec: NetworkSpec):
        a = spec.architecture
        self.activation = ACTIVATIONS[a.activation]
        self.gate_proj = spec.linear("mlp.gate_proj", a.hidden_size, a.intermediate_size, a.mlp_bias) if a.gated else None
        self.up_proj = spec.linear("mlp.up_proj", a.hidden_size, a.intermediate_size, a.mlp_bias)
        self.down_proj = spec.linear("mlp.down_proj", a.intermediate_size, a.hidden_size, a.mlp_bias)

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


def at(number: int, stacked: Tree) -> Tree:
    return jax.tree.map(operator.itemgetter(number), stacked)


def pick(kinds: tuple[Any, ...], kind: Array | None) -> Any:
    return kinds[0] if kind is None else jax.tree.map(lambda *each: jax.lax.select_n(kind, *each), *kinds)


def repeated(tree: Tree, times: int) -> Tree:
    """Arrays [B, ...] with each row repeated ``times`` times, copies side by side."""
    return tree if times == 1 else jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


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
