"""Sampling: prefill once, then one token per row and step from a KV cache, until every row has stopped."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lockstep.interfaces import Generated, Past
from lockstep.learning import randomness
from lockstep_torch.network import Network, hash32, high_bits


def generate(
    network: Network,
    prompt_tokens: Tensor,
    prompt_mask: Tensor,
    seeds: Tensor,
    *,
    temperature: float,
    stop_ids: Sequence[int],
    pad_id: int,
    past: Past | None,
) -> Generated:
    """See `lockstep.interfaces.Policy.generate`. Tensors: [B, P] ids, [B, P] mask, [B, T] seeds as int32; or fewer prompts, each
    shared by several neighbouring rows of seeds. The caller must disable gradients."""
    decoding = Decoding(network, prompt_tokens, prompt_mask, seeds, temperature, stop_ids, pad_id, past)
    advance = decoding.advance
    every = 1 if seeds.device.type == "cpu" else LOOK_EVERY
    for t in range(1, seeds.shape[1]):
        if t % every == 0 and not decoding.alive.any():
            break
        if t == WARM_UP and network.replays:
            advance = recorded(advance, seeds.device)
        advance()
    arrays = (decoding.tokens.cpu().numpy().astype(np.int32), decoding.mask.cpu().numpy(), decoding.logprobs.cpu().numpy())
    return Generated(*arrays, network.kept(decoding.cache))


class Decoding:
    """Responses in progress. The constructor draws every row's first token; each `advance` draws one more. All lasting state is
    changed in place, for `recorded`."""

    def __init__(
        self,
        network: Network,
        prompt_tokens: Tensor,
        prompt_mask: Tensor,
        seeds: Tensor,
        temperature: float,
        stop_ids: Sequence[int],
        pad_id: int,
        past: Past | None = None,
    ):
        (rows, steps), device = seeds.shape, seeds.device
        self.network, self.seeds, self.temperature, self.pad_id = network, seeds, temperature, pad_id
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens = torch.full((rows, steps), pad_id, device=device)
        self.mask = torch.zeros((rows, steps), dtype=torch.bool, device=device)
        self.logprobs = torch.zeros((rows, steps), device=device)
        self.alive = torch.ones(rows, dtype=torch.bool, device=device)
        self.last = torch.zeros(rows, dtype=torch.int64, device=device)
        self.stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
        hidden, self.cache = network.start(prompt_tokens, prompt_mask, steps, past)
        if (each := rows // len(prompt_tokens)) > 1:
            hidden, self.cache = hidden.repeat_interleave(each, 0), network.repeated(self.cache, each)
            if self.cache is None:
                every = prompt_tokens.repeat_interleave(each, 0), prompt_mask.repeat_interleave(each, 0)
                hidden, self.cache = network.start(*every, steps)
        self.draw(hidden)

    def advance(self) -> None:
        self.draw(self.network.advance(self.last, self.cache))

    def draw(self, hidden: Tensor) -> None:
        """Draw the next token of every row, predicted by ``hidden`` [B, d]."""
        seeds = self.seeds.index_select(1, self.step)[:, 0]
        token, logprob = sample(self.network.logits(hidden).float(), seeds, self.temperature)
        self.tokens.index_copy_(1, self.step, torch.where(self.alive, token, self.pad_id)[:, None])
        self.mask.index_copy_(1, self.step, self.alive[:, None])
        self.logprobs.index_copy_(1, self.step, torch.where(self.alive, logprob, 0.0)[:, None])
        self.alive.logical_and_((token[:, None] != self.stops).all(-1))
        self.last.copy_(token)
        self.step.add_(1)


LOOK_EVERY = 8
"""On accelerators, tokens drawn between two checks on the host whether all rows have stopped. Each check waits for the
accelerator, which otherwise runs behind the host. Tokens after a row's end are padding."""

WARM_UP = 3
"""Tokens drawn before a step is recorded: the set-up that libraries do on a first call cannot be recorded."""


def recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record ``step`` as one CUDA graph on ``device``, whose kernels are launched together. Otherwise a small network's decoding
    waits for each launch. Recording does not run the step. The step must not read a number on the host, must change memory in
    place, and must read only memory that lives as long as the graph. Weights cast by autocast live until generation ends."""
    return _recorder(device).record(step)


class Recorder:
    """Records one step after another on a device. A graph's memory outlives it and serves the next graph. `torch.cuda.graph`
    would return all free memory to the device instead, and the rest of training would have to ask for it again."""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.last: torch.cuda.CUDAGraph | None = None

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            graph.capture_begin(*([] if self.last is None else [self.last.pool()]))
            try:
                step()
            finally:
                graph.capture_end()
        current.wait_stream(self.stream)
        self.last = graph  # only now: until here the last graph must own the memory
        return graph.replay


_recorder = functools.cache(Recorder)


def sample(logits: Tensor, seeds: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token [B] per row from softmax(logits / T) by the hash-Gumbel rule, and its log-probability [B].

    logits float32 [B, V], seeds int32 [B]. Temperature 0 takes the most likely token; its log-probability is at T = 1.
    """
    scaled = logits / temperature if temperature > 0 else logits
    noisy = scaled + hash_gumbel(seeds, logits.shape[-1]) if temperature > 0 else scaled
    token = noisy.argmax(-1)
    logprob = scaled.gather(-1, token[:, None])[:, 0] - scaled.logsumexp(-1)
    return token, logprob


def hash_gumbel(seeds: Tensor, vocab_size: int) -> Tensor:
    """`lockstep.learning.randomness.hash_gumbel` for int32 seeds [B]: float32 [B, V]."""
    bits = hash32(word_hashes(vocab_size, seeds.device) ^ seeds[:, None])
    u = high_bits(bits, 23).float().add_(0.5).mul_(2**-23)
    return u.neg_().log1p_().neg_().log_().neg_()  # -log(-log1p(-u)): in place, for large vocabularies


@functools.lru_cache(maxsize=8)
def word_hashes(vocab_size: int, device: torch.device) -> Tensor:
    words = randomness.hash32(np.arange(vocab_size, dtype=np.uint32)).view(np.int32)
    return torch.as_tensor(words, device=device)
