"""What lies between matmuls: operations that pass over memory again and again, unless a compiler joins them.

If the backend is told to, `torch.compile` makes few kernels of each function here. Otherwise it runs as it is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

DEVICES: set[str] = set()
"""The types of device on which pieces are compiled: a backend adds its own."""

FORMS = 64
"""Programs of a function at most, after which torch.compile gives up."""

Given = ParamSpec("Given")
Found = TypeVar("Found")


def joined(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """``function``, compiled where its first argument [..., L, d] is on one of `DEVICES`: once for each d, with and without
    gradients, and for any size but 1 of the axes before. On CPUs one token is not worth the call."""

    @functools.cache
    def compiled() -> Any:  # not before it is needed: it takes seconds
        torch._dynamo.config.recompile_limit = FORMS
        return torch.compile(function)

    @functools.wraps(function)
    def call(*given: Given.args, **named: Given.kwargs) -> Found:
        first: Any = given[0]
        if first.device.type not in DEVICES or (first.shape[-2] == 1 and first.device.type == "cpu"):
            return function(*given, **named)
        for tensor in given:
            if isinstance(tensor, Tensor):
                shared = [axis for axis in range(first.ndim - 1) if tensor.shape[axis : axis + 1] == first.shape[axis : axis + 1]]
                torch._dynamo.maybe_mark_dynamic(tensor, shared)
        return compiled()(*given, **named)

    return call


@joined
def normed(x: Tensor, weight: Tensor, eps: float | None, dtype: torch.dtype) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019) of x [..., d], in ``dtype``."""
    return F.rms_norm(x, weight.shape, weight, eps).to(dtype)


@joined
def rotated(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """x [B, H, L, hd] rotated in float32 by the angles of `DecoderNetwork.rotation`, in ``dtype``."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(dtype)


@joined
def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's product (Shazeer 2020)."""
    return F.silu(gate) * up


@joined
def chosen(logits: Tensor, tokens: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, ...]:
    """Of softmax(logits / T): the log-probability of each token, and the entropy if asked for. float32 [...].

    logits [..., V], tokens int64 [...]. Ids outside the vocabulary are padding; any value will do.
    """
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    logprobs = scaled.log_softmax(-1)
    taken = logprobs.gather(-1, tokens.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0]
    return (taken, -(logprobs.exp() * logprobs).sum(-1)) if entropy else (taken,)
