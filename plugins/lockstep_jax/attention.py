"""Attention, and what its queries see. `Dense` holds a mask in memory, for few columns. `Blocks` computes the mask block by
block, for many. `Fused` is cuDNN's kernel, for GPUs in bfloat16."""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lockstep.errors import short
from lockstep.models.architecture import Architecture

log = logging.getLogger(__name__)

PAIRS = 256 * 256
"""Up to this many query-key pairs per row, `Dense` is used: it compiles a second faster per layer. On a CPU with AVX-512, with
gradients, `Blocks` took 0.85 to 0.95 of its time at 256 columns, 0.65 at 384, 0.55 at 640 and 0.33 at 2,048."""

MASK = 2**28
"""The most elements of a `Fused` mask. The kernel is given three bytes for each."""

BLOCK = 128
"""Queries and keys per block. A block's scores should stay in a core's cache: 256 took 1.0 to 1.5 times as long."""

UNSEEN = 0.7 * float(jnp.finfo(jnp.float32).min)
LEAST = -1e30
"""`UNSEEN` is the score of an unseen pair; `LEAST` is the least that a row's largest score can be. exp(UNSEEN - LEAST) is 0, so a
row that sees nothing gives zeros, not NaN."""


class Dense(NamedTuple):
    """``mask``: bool, broadcast to [B, H, L, columns]."""

    mask: Array

    @property
    def columns(self) -> int:
        return self.mask.shape[-1]

    def since(self, first: int) -> Dense:
        """The same without the first queries."""
        return self._replace(mask=self.mask[:, :, first:])

    def near(self, window: int | None, column: Any) -> Dense:
        """The same, but each query sees only the last ``window`` of these keys, up to and including its own. ``column``: the
        first query's."""
        if window is None:
            return self
        queries, columns = self.mask.shape[-2:]
        return self._replace(mask=self.mask & (jnp.arange(columns) > column + jnp.arange(queries)[:, None] - window))

    def attend(self, scale: float, cap: float | None, q: Array, k: Array, v: Array) -> Array:
        """A row that sees nothing gives the mean of all values."""
        products = jnp.einsum("bhgld,bhkd->bhglk", q, k, preferred_element_type=jnp.float32)
        products = jnp.where(self.mask[:, :, None], softcap(scale * products, cap), UNSEEN)
        weights = jax.nn.softmax(products, axis=-1).astype(v.dtype)
        out = jnp.einsum("bhglk,bhkd->bhgld", weights, v)
        rows, heads, groups, length, size = out.shape
        return out.reshape(rows, heads * groups, length, size).swapaxes(1, 2).reshape(rows, length, -1)


class Fused(Dense):
    """`Dense` by cuDNN's kernel, which never writes out the scores."""

    @staticmethod
    def takes(a: Architecture, dtype: Any, platform: str) -> bool:
        """True if the kernel supports this network, dtype and platform."""
        known = a.attention_softcap is None and a.head_dim % 8 == 0 and a.head_dim <= 128
        return platform == "gpu" and dtype == jnp.bfloat16 and known and _cudnn()

    def attend(self, scale: float, cap: float | None, q: Array, k: Array, v: Array) -> Array:
        rows, _, _, length, size = q.shape
        more = length % 2, k.shape[2] % 2  # the kernel has no gradient for odd lengths: pad by one, unseen
        q, k, v = (x.reshape(rows, -1, x.shape[-2], size).swapaxes(1, 2) for x in (q, k, v))
        q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x, extra in ((q, more[0]), (k, more[1]), (v, more[1])))
        mask = jnp.pad(self.mask, ((0, 0), (0, 0), (0, more[0]), (0, more[1])))
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")[:, :length]
        # The next product's gradient is float32, which the kernel does not take. This conversion turns it into bfloat16.
        return out.reshape(rows, length, -1).astype(jnp.float32)


@functools.cache
def _cudnn() -> bool:
    """True if the kernel runs here. Older cards and other makers' do not have it."""
    try:
        with jax.ensure_compile_time_eval():  # also while a program is traced
            x = jnp.zeros((1, 64, 1, 64), jnp.bfloat16)
            jax.nn.dot_product_attention(x, x, x, implementation="cudnn").block_until_ready()
    except Exception as error:  # of many types
        log.warning("cuDNN's attention does not run on this GPU, and takes no part: %s", short(str(error)))
        return False
    return True


class Blocks(NamedTuple):
    """Query i is in column ``first`` + i. It sees key j if their numbers in ``queries`` [B, L] and ``keys`` [B, columns] are
    equal and j is among the last ``window`` columns up to and including its own. Both arrays are int32."""

    queries: Array
    keys: Array
    first: Any
    window: Any

    @property
    def columns(self) -> int:
        return self.keys.shape[1]

    def since(self, first: int) -> Blocks:
        return self._replace(queries=self.queries[:, first:], first=self.first + first)

    def near(self, window: int | None, column: Any) -> Blocks:
        return self._replace(window=jnp.int32(self.columns if window is None else window))

    def attend(self, scale: float, cap: float | None, q: Array, k: Array, v: Array) -> Array:
        """A row that sees nothing gives zeros."""
        return in_blocks(scale, cap, q, k, v, self)


Visible = Dense | Blocks


def causal(mask: Array, known: int = 0, *, fused: bool = False) -> Visible:
    """Turn an attention mask or segments [B, columns] into what the queries from column ``known`` on see: real keys of the same
    segment, up to their own column. ``fused``: the answer of `Fused.takes`."""
    rows, length = mask.shape
    pairs = (length - known) * length
    form = Fused if fused and rows * pairs <= MASK else Dense
    if form is Dense and pairs > PAIRS:
        keys = jnp.where(mask != 0, mask.astype(jnp.int32), -1)
        queries = jnp.ones_like(keys) if mask.dtype == bool else mask.astype(jnp.int32)
        return Blocks(queries, keys, jnp.int32(0), jnp.int32(length)).since(known)
    earlier = jnp.tril(jnp.ones((length, length), bool))
    if mask.dtype != bool:
        earlier = earlier & (mask[:, None, :, None] == mask[:, None, None, :])
    return form(earlier & (mask != 0)[:, None, None, :]).since(known)


def attend(a: Architecture, q: Array, k: Array, v: Array, visible: Visible) -> Array:
    """q [B, H, L, hd], k and v [B, H_kv, columns, hd] -> [B, L, H hd]; matmul results and softmax in float32."""
    scale = (a.head_dim if a.query_scalar is None else a.query_scalar) ** -0.5
    groups = q.reshape(q.shape[0], a.kv_heads, -1, *q.shape[2:])
    return visible.attend(scale, a.attention_softcap, groups, k, v)


def attention_dtype(dtype: Any, platform: str) -> Any:
    """The dtype of attention and its cache. On CPUs it is float32, whose batched matmuls are faster there."""
    return jnp.dtype(jnp.float32) if platform == "cpu" else dtype


def softcap(x: Array, cap: float | None) -> Array:
    """c tanh(x / c): close to x if x is small, within ±c everywhere (Gemma Team 2024, section 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


# ---------------------------------------------------------------------------------------------------------- in blocks


class Cut(NamedTuple):
    """An axis of queries or keys, cut into ``blocks`` of ``size``."""

    blocks: int
    size: int

    @classmethod
    def of(cls, length: int) -> Cut:
        count = -(-length // BLOCK)
        return cls(count, -(-length // (16 * count)) * 16)

    def filled(self, x: Array, axis: int, value: int = 0) -> Array:
        """x, padded to fill the last block."""
        missing = self.blocks * self.size - x.shape[axis]
        return jnp.pad(x, [(0, missing * (here == axis)) for here in range(x.ndim)], constant_values=value)

    def block(self, x: Array, axis: int, number: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, number * self.size, self.size, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_blocks(scale: float, cap: float | None, q: Array, k: Array, v: Array, visible: Blocks) -> Array:
    """softmax(softcap(scale q kᵀ)) v over the visible pairs: q [B, H_kv, G, L, hd], k, v [B, H_kv, columns, hd] -> [B, L, H hd].

    Only one block of the scores exists at a time (Rabe & Staats 2021; Dao et al. 2022, algorithms 1 and 4). Blocks that are
    hidden entirely by order or window are skipped. For the gradient, the output o and ℓ = log Σ exp s for each row of scores s
    are kept. With p = exp(s - ℓ), dv = pᵀ do and ds = p (do vᵀ - Σ do o), with the sum over a head's elements."""
    return _forward(scale, cap, q, k, v, visible)[0]


def _forward(scale: float, cap: float | None, q: Array, k: Array, v: Array, visible: Blocks) -> tuple[Array, Array]:
    """The output [B, L, H hd], and ℓ [B, H_kv, G, L]."""
    (rows, heads, groups, length, size), queries, keys = q.shape, Cut.of(q.shape[3]), Cut.of(k.shape[2])
    q, k, v, visible = queries.filled(q, 3), keys.filled(k, 2), keys.filled(v, 2), _filled(visible, queries, keys)

    def of_queries(i: Array) -> tuple[Array, Array]:
        q_i = queries.block(q, 3, i)

        def with_keys(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            largest, total, out = state
            scores = _scores(scale, cap, q_i, keys.block(k, 2, j), _seen(visible, queries, keys, i, j))
            larger = jnp.maximum(largest, scores.max(-1))
            weights, shrink = jnp.exp(scores - larger[..., None]), jnp.exp(largest - larger)
            more = _product("bhgqk,bhkd->bhgqd", weights.astype(v.dtype), keys.block(v, 2, j))
            return larger, total * shrink + weights.sum(-1), out * shrink[..., None] + more

        begin = visible.first + i * queries.size
        first, end = jnp.maximum(begin + 1 - visible.window, 0), begin + queries.size
        each = rows, heads, groups, queries.size
        nothing = jnp.full(each, LEAST), jnp.zeros(each), jnp.zeros((*each, size))
        some = first // keys.size, jnp.minimum(-(-end // keys.size), keys.blocks)
        largest, total, out = jax.lax.fori_loop(*some, with_keys, nothing)
        total = jnp.where(total == 0, 1, total)
        return (out / total[..., None]).astype(v.dtype), largest + jnp.log(total)

    out, logs = jax.lax.map(of_queries, jnp.arange(queries.blocks))
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(rows, -1, heads * groups * size)[:, :length]
    return out, logs.transpose(1, 2, 3, 0, 4).reshape(rows, heads, groups, -1)[..., :length]


def _keeping(scale: float, cap: float | None, q: Array, k: Array, v: Array, visible: Blocks) -> tuple[Array, Any]:
    out, logs = (checkpoint_name(part, "attended") for part in _forward(scale, cap, q, k, v, visible))
    return out, (q, k, v, visible, out, logs)


def _backward(scale: float, cap: float | None, kept: Any, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, visible, out, logs = kept
    (rows, heads, groups, length, size), columns = q.shape, k.shape[2]
    queries, keys = Cut.of(length), Cut.of(columns)
    by_head = lambda x: x.reshape(rows, length, heads, groups, -1).transpose(0, 2, 3, 1, 4)  # noqa: E731
    sums = by_head(d_out.astype(jnp.float32) * out).sum(-1)
    q, d_out, logs, sums = (queries.filled(x, 3) for x in (q, by_head(d_out.astype(v.dtype)), logs, sums))
    k, v, visible = keys.filled(k, 2), keys.filled(v, 2), _filled(visible, queries, keys)

    def of_keys(dq: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        k_j, v_j = keys.block(k, 2, j), keys.block(v, 2, j)

        def with_queries(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = state
            q_i, d_i = queries.block(q, 3, i), queries.block(d_out, 3, i)
            scores = _scores(scale, cap, q_i, k_j, _seen(visible, queries, keys, i, j))
            weights = jnp.exp(scores - queries.block(logs, 3, i)[..., None])
            ds = weights * (_product("bhgqd,bhkd->bhgqk", d_i, v_j) - queries.block(sums, 3, i)[..., None])
            if cap is not None:
                ds *= 1 - jnp.square(jnp.maximum(scores, -cap) / cap)
            ds = ds.astype(q.dtype)
            dq_i = queries.block(dq, 3, i) + _product("bhgqk,bhkd->bhgqd", ds, k_j)
            dq = jax.lax.dynamic_update_slice_in_dim(dq, dq_i, i * queries.size, 3)
            dk += _product("bhgqk,bhgqd->bhkd", ds, q_i)
            dv += _product("bhgqk,bhgqd->bhkd", weights.astype(v.dtype), d_i)
            return dq, dk, dv

        begin = j * keys.size - visible.first
        first, end = jnp.maximum(begin, 0), begin + keys.size + visible.window - 1
        nothing = jnp.zeros((rows, heads, keys.size, size))
        some = first // queries.size, jnp.minimum(-(-end // queries.size), queries.blocks)
        dq, dk, dv = jax.lax.fori_loop(*some, with_queries, (dq, nothing, nothing))
        return dq, (dk, dv)

    dq, parts = jax.lax.scan(of_keys, jnp.zeros(q.shape), jnp.arange(keys.blocks))
    dk, dv = (part.transpose(1, 2, 0, 3, 4).reshape(rows, heads, -1, size)[:, :, :columns] for part in parts)
    return (scale * dq[:, :, :, :length]).astype(q.dtype), (scale * dk).astype(k.dtype), dv.astype(v.dtype), None


in_blocks.defvjp(_keeping, _backward)


def _filled(visible: Blocks, queries: Cut, keys: Cut) -> Blocks:
    return visible._replace(queries=queries.filled(visible.queries, 1), keys=keys.filled(visible.keys, 1, -1))


def _seen(visible: Blocks, queries: Cut, keys: Cut, i: Array, j: Array) -> Array:
    """Which pairs of a block are seen: bool [B, 1, 1, queries, keys]."""
    own = visible.first + i * queries.size + jnp.arange(queries.size)[:, None]
    column = j * keys.size + jnp.arange(keys.size)
    near = (column <= own) & (column > own - visible.window)
    same = queries.block(visible.queries, 1, i)[:, :, None] == keys.block(visible.keys, 1, j)[:, None]
    return (near & same)[:, None, None]


def _scores(scale: float, cap: float | None, q: Array, k: Array, seen: Array) -> Array:
    """The scores of a block: [B, H_kv, G, queries, keys]."""
    return jnp.where(seen, softcap(scale * _product("bhgqd,bhkd->bhgqk", q, k), cap), UNSEEN)


def _product(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
