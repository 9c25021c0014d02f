"""Sampling: prefill once, then one token per row and step from a KV cache, until every row has stopped.

Prefill and loop are one compiled program: the host waits once per batch, not once per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lockstep.learning import randomness
from lockstep_jax.decoder import Cache, Layers, bind, repeated
from lockstep_jax.device import compiled, decoding
from lockstep_jax.mesh import gathered, whole
from lockstep_jax.network import NetworkSpec, Tree


class DecodeState(NamedTuple):
    """The loop state. ``step`` tokens of each row are written; ``token`` [B] is the last of them, not yet fed."""

    step: Array
    tokens: Array
    mask: Array
    logprobs: Array
    alive: Array
    token: Array
    cache: Cache


class Drawing(NamedTuple):
    """How tokens are drawn. ``seeds`` [B, T]: one per token. ``stops``: the ids that end a row. The rest are scalars."""

    seeds: Any
    temperature: Any
    stops: Any
    pad_id: Any

    @classmethod
    def of(cls, seeds: np.ndarray, temperature: float, stop_ids: Sequence[int], pad_id: int) -> Drawing:
        return cls(seeds, float(temperature), np.asarray(stop_ids, np.int32), np.int32(pad_id))


@compiled(decoding, static_argnames=("spec", "greedy"))
def generate(
    params: Tree, frozen: Tree, prompt_tokens: Array, prompt_mask: Array, drawing: Drawing, past: Layers | None = None,
    *, spec: NetworkSpec, greedy: bool,
) -> tuple[tuple[Array, Array, Array], Layers]:  # fmt: skip
    """See `lockstep.interfaces.Policy.generate`. Returns tokens, mask and logprobs, each [B, T], and the keys and values. A
    prompt may be shared by several neighbouring rows of seeds."""
    decoding = Decoding(params, frozen, drawing, spec, greedy)
    last = decoding.until(drawing.seeds.shape[1], decoding.start(prompt_tokens, prompt_mask, past))
    return whole(spec.mesh, (last.tokens, last.mask, last.logprobs)), last.cache.layers


@compiled(decoding, static_argnames=("spec", "greedy"))
def start(
    params: Tree, frozen: Tree, prompt_tokens: Array, prompt_mask: Array, drawing: Drawing, *, spec: NetworkSpec, greedy: bool
) -> DecodeState:
    """`generate` up to the first token."""
    decoding = Decoding(params, frozen, drawing, spec, greedy)
    return decoding.start(prompt_tokens, prompt_mask)


@compiled(decoding, static_argnames=("spec", "greedy"), donate_argnames="now")
def proceed(params: Tree, frozen: Tree, now: DecodeState, drawing: Drawing, *, spec: NetworkSpec, greedy: bool) -> DecodeState:
    """Continue `generate` by `AT_ONCE` more tokens."""
    decoding = Decoding(params, frozen, drawing, spec, greedy)
    return decoding.until(jnp.minimum(now.step + AT_ONCE, drawing.seeds.shape[1]), now)


AT_ONCE = 4
"""Tokens per call of `proceed`: each call takes the layers out of their stack, which copies all weights."""


class Decoding:
    """The parts that the programs above share, while they are traced."""

    def __init__(self, params: Tree, frozen: Tree, drawing: Drawing, spec: NetworkSpec, greedy: bool):
        params, frozen = (gathered(spec.mesh, spec.cast(tree)) for tree in (params, frozen))
        self.decoder = bind(spec, params, frozen)
        self.layers, self.head = self.decoder.apart(), self.decoder.head().astype(self.decoder.dtype)
        self.drawing, self.greedy = drawing, greedy

    def start(self, prompt_tokens: Array, prompt_mask: Array, past: Layers | None = None) -> DecodeState:
        rows, steps = self.drawing.seeds.shape
        hidden, cache = self.decoder.start(self.layers, prompt_tokens, prompt_mask, steps, past)
        layers, mask, count, length = cache
        hidden, layers, mask, count = repeated((hidden, layers, mask, count), rows // len(prompt_tokens))
        nothing = DecodeState(
            step=jnp.int32(0),
            tokens=jnp.full((rows, steps), self.drawing.pad_id, jnp.int32),
            mask=jnp.zeros((rows, steps), bool),
            logprobs=jnp.zeros((rows, steps)),
            alive=jnp.ones(rows, bool),
            token=jnp.zeros(rows, jnp.int32),
            cache=Cache(layers, mask, count, length),
        )
        return self.draw(hidden, nothing)

    def until(self, end: Array | int, now: DecodeState) -> DecodeState:
        """Continue to ``end`` tokens, or until every row has stopped."""
        return jax.lax.while_loop(lambda now: (now.step < end) & now.alive.any(), self.advance, now)

    def advance(self, now: DecodeState) -> DecodeState:
        hidden, cache = self.decoder.advance(self.layers, now.token, now.cache)
        return self.draw(hidden, now._replace(cache=cache))

    def draw(self, hidden: Array, now: DecodeState) -> DecodeState:
        """Draw the next token of every row, predicted by ``hidden`` [B, d]."""
        logits = self.decoder.logits(hidden, self.head)
        token, logprob = sample(logits, self.drawing.seeds[:, now.step], self.drawing.temperature, self.greedy)
        return now._replace(
            step=now.step + 1,
            tokens=now.tokens.at[:, now.step].set(jnp.where(now.alive, token, self.drawing.pad_id)),
            mask=now.mask.at[:, now.step].set(now.alive),
            logprobs=now.logprobs.at[:, now.step].set(jnp.where(now.alive, logprob, 0.0)),
            alive=now.alive & ~jnp.isin(token, self.drawing.stops),
            token=token,
        )


def sample(logits: Array, seeds: Array, temperature: Array, greedy: bool) -> tuple[Array, Array]:
    """One token [B] per row from softmax(logits / T) by the hash-Gumbel rule, and its log-probability [B].

    logits float32 [B, V], seeds uint32 [B]. Greedy takes the most likely token; its log-probability is at T = 1.
    """
    scaled = logits if greedy else logits / temperature
    noisy = scaled if greedy else scaled + hash_gumbel(seeds, logits.shape[-1])
    token = largest(noisy)
    logprob = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(scaled, axis=-1)
    return token, logprob


def largest(x: Array) -> Array:
    """Index int32 [B] of the largest number in each row of x [B, V], the first if several are equal. `jnp.argmax` gives the same,
    but took five times as long on CPUs."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(x == x.max(axis=-1, keepdims=True), index, x.shape[-1] - 1).min(axis=-1)


def hash_gumbel(seeds: Array, vocab_size: int) -> Array:
    """`lockstep.learning.randomness.hash_gumbel` for uint32 seeds [B]: float32 [B, V]. The integer part is the same code."""
    words = randomness.hash32(np.arange(vocab_size, dtype=np.uint32))
    bits: Any = randomness.hash32(words ^ seeds[:, None])
    u = ((bits >> np.uint32(9)).astype(jnp.float32) + np.float32(0.5)) * np.float32(2**-23)
    return -jnp.log(-jnp.log1p(-u))
