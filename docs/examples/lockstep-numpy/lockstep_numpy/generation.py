"""Sampling: one pass over the prompt, then one token per row and step with a KV cache, until every row has stopped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lockstep.interfaces import Generated
from lockstep.learning import randomness
from lockstep.models.architecture import Architecture
from lockstep_numpy.decoder import Cache, Weights, hidden, log_softmax, logits


def generate(
    architecture: Architecture,
    weights: Weights,
    prompt_tokens: np.ndarray,
    prompt_mask: np.ndarray,
    seeds: np.ndarray,
    *,
    temperature: float,
    stop_ids: Sequence[int],
    pad_id: int,
) -> Generated:
    """See `lockstep.interfaces.Policy.generate`."""
    tokens = np.full(seeds.shape, pad_id, np.int32)
    mask = np.zeros(seeds.shape, bool)
    logprobs = np.zeros(seeds.shape, np.float32)
    alive = np.ones(len(seeds), bool)
    new, seen = prompt_tokens, prompt_mask
    cache: Cache = {}
    for t in range(seeds.shape[1]):
        states = hidden(architecture, weights, new, seen, cache=cache)
        token, logprob = sample(logits(weights, states[:, -1]), seeds[:, t], temperature)
        tokens[alive, t], mask[:, t], logprobs[alive, t] = token[alive], alive, logprob[alive]
        alive = alive & ~np.isin(token, stop_ids)
        if not alive.any():
            break
        new, seen = token[:, None], np.pad(seen, ((0, 0), (0, 1)), constant_values=True)
    return Generated(tokens, mask, logprobs)


def sample(logits: np.ndarray, seeds: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """One token [B] per row from softmax(logits / T) by the hash-Gumbel rule, and its log-probability [B].

    logits float32 [B, V], seeds uint32 [B]. Temperature 0 takes the most likely token, at log-probability of T = 1.
    """
    scaled = logits / temperature if temperature > 0 else logits
    noisy = scaled + randomness.hash_gumbel(seeds, logits.shape[-1]) if temperature > 0 else scaled
    token = noisy.argmax(-1)
    return token, log_softmax(scaled)[np.arange(len(token)), token]
