"""Sampling: prefill once, then one token per row and step from a key-value cache, until every row has stopped."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lockstep import randomness
from lockstep.interfaces import Generated
from lockstep_torch.decoder import Network, hash32, high_bits


def generate(
    network: Network,
    prompt_tokens: Tensor,
    prompt_mask: Tensor,
    seeds: Tensor,
    *,
    temperature: float,
    stop_ids: Sequence[int],
    pad_id: int,
) -> Generated:
    """See `lockstep.interfaces.Policy.generate`. Tensors: [B, P] ids, [B, P] mask, [B, T] seeds as int32. The caller sees to it
    that no gradient is recorded."""
    rows, steps = seeds.shape
    tokens = torch.full((rows, steps), pad_id, device=seeds.device)
    mask = torch.zeros((rows, steps), dtype=torch.bool, device=seeds.device)
    logprobs = torch.zeros((rows, steps), device=seeds.device)
    alive = torch.ones(rows, dtype=torch.bool, device=seeds.device)
    stops = torch.tensor(list(stop_ids), device=seeds.device)
    hidden, cache = network.start(prompt_tokens, prompt_mask, steps)
    for t in range(steps):
        token, logprob = sample(network.logits(hidden).float(), seeds[:, t], temperature)
        tokens[:, t] = torch.where(alive, token, pad_id)
        mask[:, t] = alive
        logprobs[:, t] = torch.where(alive, logprob, 0.0)
        alive = alive & ~torch.isin(token, stops)
        if t + 1 == steps or not alive.any():
            break
        hidden = network.advance(token, cache)
    return Generated(tokens.cpu().numpy().astype(np.int32), mask.cpu().numpy(), logprobs.cpu().numpy())


def sample(logits: Tensor, seeds: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token [B] per row from softmax(logits / T) by the hash-Gumbel rule, and its log-probability [B].

    logits float32 [B, V], seeds int32 [B]. Temperature 0 takes the most likely token, at log-probability of T = 1.
    """
    scaled = logits / temperature if temperature > 0 else logits
    noisy = scaled + hash_gumbel(seeds, logits.shape[-1]) if temperature > 0 else scaled
    token = noisy.argmax(-1)
    logprob = scaled.gather(-1, token[:, None])[:, 0] - scaled.logsumexp(-1)
    return token, logprob


def hash_gumbel(seeds: Tensor, vocab_size: int) -> Tensor:
    """`lockstep.randomness.hash_gumbel` for int32 seeds [B]: float32 [B, V]."""
    bits = hash32(_words(vocab_size, seeds.device) ^ seeds[:, None])
    u = high_bits(bits, 23).float().add_(0.5).mul_(2**-23)
    return u.neg_().log1p_().neg_().log_().neg_()  # -log(-log1p(-u)): in place, for large vocabularies


@functools.lru_cache(maxsize=8)
def _words(vocab_size: int, device: torch.device) -> Tensor:
    words = randomness.hash32(np.arange(vocab_size, dtype=np.uint32)).view(np.int32)
    return torch.as_tensor(words, device=device)
