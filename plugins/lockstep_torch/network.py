"""What every network has: the interface that the rest of this package uses, positions, dropout and the scalar head."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockstep.errors import ConfigError
from lockstep.interfaces import Past
from lockstep.learning import randomness
from lockstep.models.adapters import Adapter
from lockstep.models.architecture import SCALAR_BIAS, SCALAR_HEAD
from lockstep_torch.attention import Layout
from lockstep_torch.mesh import TensorAxis


class Network(nn.Module):
    """The interface of a network that `model.py`, `generation.py` and `learner.py` use."""

    vocab_size: int
    hidden_size: int
    context_length: int
    config: dict[str, Any]
    """The checkpoint's ``config.json``."""
    adapter: Adapter | None = None
    """The adapter, which is trained if the network's own weights are frozen."""
    gradient_checkpointing: bool = False
    """Whether `hidden` recomputes each layer's inner activations for the gradient."""
    replays: bool = False
    """Whether `advance` runs the same kernels on the same memory for every token, so that they can be replayed."""

    def hidden(
        self, tokens: Tensor, mask: Tensor, dropout: DropoutMask | None = None, first: int = 0, layout: Layout | None = None
    ) -> Tensor:
        """[B, L] ids and attention mask -> [B, L - first, d] after the final norm, for the columns from ``first`` on. Ids under a
        False mask are never read. The mask may be `lockstep.text.sequences.Sequences.segments`, int. With a layout, whose prompts
        end in column ``first``, a network may compute only the layout's tokens."""
        raise NotImplementedError

    def start(self, tokens: Tensor, mask: Tensor, new_tokens: int, past: Past | None = None) -> tuple[Tensor, Any]:
        """Prefill. Return the hidden state [B, d] of the last column, and a cache with room for ``new_tokens`` more. ``past``:
        what is known of the first columns."""
        raise NotImplementedError

    def repeated(self, cache: Any, times: int) -> Any:
        """The cache of `start` with each row repeated ``times`` times, copies side by side; None if this network's cache cannot
        be repeated."""
        raise NotImplementedError

    def kept(self, cache: Any) -> Any:
        """The cache; None if `start` cannot continue from it."""
        return cache

    def advance(self, token: Tensor, cache: Any) -> Tensor:
        """Feed one token [B] to every row and return the hidden state [B, d]. Changes the cache in place."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., V]."""
        raise NotImplementedError

    def layers(self) -> list[nn.Module]:
        """The layers in order. Their weights are needed one layer at a time."""
        raise NotImplementedError

    def language_head(self) -> nn.Module | None:
        """The layer that computes logits; None if the embedding does."""
        raise NotImplementedError

    def without_language_head(self) -> Network:
        """The trunk that a scalar model keeps: this network without its language head, or another with the same weights."""
        raise NotImplementedError

    def divide_matmuls(self, axis: TensorAxis) -> None:
        """Keep this process's shard of the layers' trained matmuls. The weights must be filled afterwards. Divide a checkpoint
        that adapters share before it is frozen; the adapters then follow its shards.

        Raises:
          ConfigError: the matmuls cannot be sharded this way.
        """
        raise ConfigError(
            "backend.mesh.tensor on backend=torch divides Llama's shape only, in this project's own decoder. Raise "
            "backend.mesh.fsdp instead, or set backend=jax."
        )

    def checkpoint_name(self, name: str) -> str:
        """The checkpoint's name of this module's parameter ``name``."""
        return name


@dataclass(frozen=True)
class DropoutMask:
    """`lockstep.interfaces.Dropout` on the device. ``seeds``: int32 [B] with the bits of uint32 seeds."""

    rate: float
    seeds: Tensor

    def __call__(self, x: Tensor, site: int, position: Tensor) -> Tensor:
        """x [B, L, d] with elements zeroed and the rest scaled up; position [B, L]."""
        width = x.shape[-1]
        element = position[..., None].int() * width + torch.arange(width, dtype=torch.int32, device=x.device)
        row = hash32(self.seeds ^ int(randomness.hash32(np.array([site], np.uint32)).view(np.int32)[0]))
        kept = high_bits(hash32(hash32(element) ^ row[:, None, None]), 24) >= self.rate * 2**24
        return torch.where(kept, x / (1 - self.rate), 0.0)


def hash32(x: Tensor) -> Tensor:
    """`lockstep.learning.randomness.hash32`. torch has no arithmetic on uint32: int32 holds the bits and wraps the same way."""
    x = high_bits(x, 16).bitwise_xor_(x).mul_(-0x7A143595)  # 0x85EBCA6B
    x = high_bits(x, 19).bitwise_xor_(x).mul_(-0x3D4D51CB)  # 0xC2B2AE35
    return high_bits(x, 16).bitwise_xor_(x)


def high_bits(x: Tensor, count: int) -> Tensor:
    """The uint32 shift x >> (32 - count), on int32, whose own shift would extend the sign."""
    return (x >> (32 - count)).bitwise_and_(2**count - 1)


def positions(mask: Tensor) -> Tensor:
    """[B, L] number of real tokens before each column (LHP), so that left padding does not shift a prompt. With segments, only
    tokens of the same segment count."""
    count = ((mask != 0).cumsum(-1) - 1).clamp(min=0)
    if mask.dtype == torch.bool:
        return count
    begins = mask != F.pad(mask[:, :-1], (1, 0))
    return count - torch.where(begins, count, 0).cummax(-1).values


class ScalarHead(nn.Module):
    """[..., d] -> [...], in float32."""

    def __init__(self, weight: np.ndarray, bias: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float32).reshape(1, -1))
        self.bias = nn.Parameter(torch.tensor([bias], dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # autocast would run it in bfloat16
            return (hidden.float() @ self.weight[0]) + self.bias[0]

    def tensors(self) -> dict[str, Tensor]:
        return {SCALAR_HEAD: self.weight, SCALAR_BIAS: self.bias}


def copy_network(network: Network) -> Network:
    """A copy with its own weights, except frozen ones, which are shared."""
    return copy.deepcopy(network, {id(p): p for p in network.parameters() if not p.requires_grad})
