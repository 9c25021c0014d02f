"""Randomness is data: every random number is a pure function of (run seed, stream, step, row), made on the host.

So two backends draw the same tokens from the same weights, the tokens do not depend on how rows are batched or sharded,
and a resumed run needs no generator state. Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is
counter-based, which makes that free.
"""

from __future__ import annotations

import zlib

import numpy as np

from lockstep.errors import ConfigError


def generator(seed: int, stream: str, step: int = 0) -> np.random.Generator:
    """The generator of one stream at one step. ``stream`` names the purpose ('order', 'sampling'); streams are
    independent of each other.

    Raises:
      ConfigError: the seed is not an unsigned 64-bit integer.
    """
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed={seed} must be at least 0 and below 2**64.")
    key = np.array([seed, zlib.crc32(stream.encode())], dtype=np.uint64)
    counter = np.array([0, 0, step, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def seed_of(seed: int, stream: str) -> int:
    """A seed for code that takes one number: 63 random bits of the stream."""
    return int(generator(seed, stream).integers(2**63))


def token_seeds(seed: int, stream: str, step: int, rows: int, columns: int) -> np.ndarray:
    """uint32 [rows, columns]: one seed for each token a policy may draw at this step.

    Row b does not depend on ``rows``: a batch may be cut anywhere.
    """
    return generator(seed, stream, step).integers(0, 2**32, size=(rows, columns), dtype=np.uint32)


def hash32(x: np.ndarray) -> np.ndarray:
    """murmur3's 32-bit finaliser (Appleby 2011, public domain), a bijection on uint32. Elementwise, any shape."""
    x = x.astype(np.uint32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def hash_gumbel(seeds: np.ndarray, vocab_size: int) -> np.ndarray:
    """Standard Gumbel noise float32 [..., vocab_size] for uint32 seeds [...]: the reference that backends reproduce.

        bits = hash32(hash32(v) xor seed)      u = ((bits >> 9) + 1/2) 2^-23      g = -log(-log1p(-u))

    argmax_v(logits_v / T + g_v) is a draw from softmax(logits / T) (Gumbel 1954; Maddison et al. 2014). Using
    ``log1p(-u)`` instead of ``log(u)`` puts the float32 resolution where it matters, in the upper tail. It takes 23 bits
    because with 24 the half is not representable and u may round to 1.
    """
    words = hash32(np.arange(vocab_size, dtype=np.uint32))
    bits = hash32(words ^ seeds[..., None])
    u = ((bits >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)
    return -np.log(-np.log1p(-u))


def dropout_bits(seeds: np.ndarray, site: int, positions: np.ndarray, width: int) -> np.ndarray:
    """24 random bits int [B, L, width] for dropout: the reference that backends reproduce.

        bits = hash32(hash32(position · width + feature) xor hash32(seed xor hash32(site))) >> 8

    An element is dropped where bits < rate · 2^24. ``seeds`` uint32 [B]; ``site`` counts the places in the network;
    ``positions`` [B, L] count real tokens, so that padding changes nothing.
    """
    element = positions[..., None].astype(np.uint32) * np.uint32(width) + np.arange(width, dtype=np.uint32)
    row = hash32(seeds ^ hash32(np.array([site], np.uint32)))
    return hash32(hash32(element) ^ row[:, None, None]) >> np.uint32(8)


def permutation(seed: int, stream: str, epoch: int, size: int) -> np.ndarray:
    """The order of one pass over ``size`` examples: int64 [size]."""
    return generator(seed, stream, epoch).permutation(size)


def indices_of_round(seed: int, stream: str, size: int, count: int, number: int) -> list[int]:
    """Indices of ``count`` (at most ``size``) of ``size`` examples for round ``number``, from 1. None comes twice in a round, nor
    twice before all have come once. The order of pass e is `permutation`'s."""
    taken: list[int] = []
    rest: list[int] = []
    passes = 0
    for _ in range(number):
        taken, rest = rest[:count], rest[count:]
        while len(taken) < count:
            order, before = permutation(seed, stream, passes, size).tolist(), set(taken)
            fresh = [i for i in order if i not in before][: count - len(taken)]
            taken += fresh
            now = set(fresh)
            rest = [i for i in order if i not in now]
            passes += 1
    return taken


def example_indices(seed: int, stream: str, size: int, start: int, count: int) -> np.ndarray:
    """Indices of examples ``start`` .. ``start + count - 1`` of an endless stream of reshuffled passes: int64 [count].

    A pure function of its arguments: step s of batch size B reads ``start = s * B``, today or after a restart.
    """
    positions = np.arange(start, start + count)
    out = np.empty(count, np.int64)
    for epoch in np.unique(positions // size):
        here = positions // size == epoch
        out[here] = permutation(seed, stream, int(epoch), size)[positions[here] % size]
    return out
