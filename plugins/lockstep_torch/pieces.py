"""The operations between matmuls, which pass over memory again and again unless a compiler fuses them.

With ``compile`` in the backend's configuration, `torch.compile` turns each function here into a few kernels. Otherwise the
functions run as written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

DEVICES: set[str] = set()
"""The device types on which pieces are compiled. A backend adds its own."""

FORMS = 64
"""The most programs of one function; after that, torch.compile gives up."""

Given = ParamSpec("Given")
Found = TypeVar("Found")


def joined(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """``function``, compiled if its first argument [..., L, d] is on one of `DEVICES`. It is compiled once for each d, with and
    without gradients, and for any size but 1 of the axes before. On CPUs, one token is not worth the call."""

    @functools.cache
    def compiled() -> Any:  # only when needed: it takes seconds
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
def normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`rms_norm`, in ``dtype``."""
    return rms_norm(x, weight, eps).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x² + ε) · w (Zhang & Sennrich 2019) of x [..., d]. On CPUs PyTorch has no kernel for it, and with gradients
    its six operations took 3.5 times as long as this."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _scaled(x, weight, eps)[0]


def _scaled(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and r = 1 / sqrt(mean x² + ε) [..., 1]."""
    r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * r).mul_(weight), r


class _RMSNorm(torch.autograd.Function):
    """With y = x r w and the slope g of y: dw = Σ g x r over rows, dx = r (g w - x r² mean(g w x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, r = _scaled(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None]:
        (g,), (x, weight, r) = slopes, ctx.saved_tensors
        products = g * x
        rows = products.flatten(0, -2)
        d_weight = r.flatten() @ rows
        pull = (rows @ weight).view(r.shape).mul_(r).mul_(r).div_(-x.shape[-1])
        return torch.mul(x, pull, out=products).addcmul_(g, weight).mul_(r), d_weight, None


@joined
def rotated(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """x [B, H, L, hd] rotated in float32 by the angles of `DecoderNetwork.rotation`, then cast to ``dtype``."""
    x = x.float()
    if torch.compiler.is_compiling():
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(dtype)
    return (_Rotation.apply(x, cos, sin) if torch.is_grad_enabled() else _turned(x, cos, sin, 1)).to(dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x rotated by the angles times ``sign``."""
    half, out = x.shape[-1] // 2, torch.empty_like(x)
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out


class _Rotation(torch.autograd.Function):
    """A rotation whose gradient is the rotation back. PyTorch's own gradient of the parts takes 1.5 times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(slopes[0], cos, sin, -1), None, None


@joined
def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's product (Shazeer 2020)."""
    return F.silu(gate) * up


@joined
def chosen(logits: Tensor, tokens: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, ...]:
    """The log-probability of each token under softmax(logits / T), and the entropy if asked for. float32 [...].

    logits [..., V], tokens int64 [...]. Ids outside the vocabulary are padding; any value will do.
    """
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    logprobs = scaled.log_softmax(-1)
    taken = logprobs.gather(-1, tokens.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0].clone()  # FSDP warns about views
    return (taken, -(logprobs.exp() * logprobs).sum(-1)) if entropy else (taken,)
