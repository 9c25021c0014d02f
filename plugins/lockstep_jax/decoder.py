"""Our own network, in flax.nnx, for every `lockstep.models.architecture.Architecture`.

Modules exist only inside a trace. Outside, parameters are a plain tree of float32 arrays, which costs no host time per step;
`bind` turns them into modules. The layers are one `Layer` whose arrays have a leading [layers] axis. Deep networks are trained
by `jax.lax.scan` over it, so compile time does not grow with depth.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from lockstep.models.architecture import Architecture, Rope
from lockstep_jax.attention import Dense, Fused, Visible, attention_dtype, causal, softcap
from lockstep_jax.layers import Layer, angles, linear, norm
from lockstep_jax.mesh import heads, rows
from lockstep_jax.network import TEACHER, DropoutMask, NetworkSpec, ScalarHead, Tree, positions
from lockstep_jax.products import PRODUCTS, product, transposed


def bind(spec: NetworkSpec, params: Tree, frozen: Tree) -> DecoderNetwork:
    """The modules with these parameters. ``frozen``: the untrained ones of an adapter's trunk; a teacher's are ignored."""
    return nnx.merge(_graph(spec), _joined(params, {name: part for name, part in frozen.items() if name != TEACHER}))


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
        self.lm_head = linear(spec, "lm_head", a.hidden_size, a.vocab_size, False) if separate else None
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


def at(number: int, stacked: Tree) -> Tree:
    return jax.tree.map(operator.itemgetter(number), stacked)


def pick(kinds: tuple[Any, ...], kind: Array | None) -> Any:
    return kinds[0] if kind is None else jax.tree.map(lambda *each: jax.lax.select_n(kind, *each), *kinds)


def repeated(tree: Tree, times: int) -> Tree:
    """Arrays [B, ...] with each row repeated ``times`` times, copies side by side."""
    return tree if times == 1 else jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)
