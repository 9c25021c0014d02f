"""The sizes and switches of a decoder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from lockstep.config.schema import setting
from lockstep.errors import ConfigError, told
from lockstep.text.tokenizer import TokenizerConfig


class RopeScaling(NamedTuple):
    """How rotary positions extend beyond the trained context. 'linear' divides every frequency by ``factor`` (Chen et al.
    2023); 'llama3' divides only the low ones, chosen by the other three numbers (Dubey et al. 2024), which are 0 for
    'linear'."""

    kind: str
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_context: int = 0


class Rope(NamedTuple):
    """Rotary positions (Su et al. 2021) of one layer: the first ``dims`` dimensions of each head are rotated, in Llama's
    half-split layout; the others are not."""

    theta: float
    dims: int
    scaling: RopeScaling | None


@dataclass(frozen=True)
class Architecture:
    """A pre-norm decoder. ``family`` is the checkpoint format; everything else is read from its ``config.json``.

    ``positions`` is 'rope' or 'learned'; ``norm`` is 'rms' or 'layer'; ``gated`` is the SwiGLU shape of the MLP (Shazeer
    2020). Everything after ``tied`` is off unless a family turns it on:

    rotary_dims: rotated dimensions of each head; None for all.
    local_rope_theta: theta of layers with a window, which then have no rope scaling either.
    unrotated: per layer, True where queries and keys are not rotated; () for nowhere.
    windows: per layer, how many columns a token sees, itself included; None for all before it. () for None everywhere.
    query_scalar: attention logits are divided by its square root; None for head_dim.
    attention_softcap, final_softcap: c in c tanh(x / c), for attention logits and for output logits.
    qk_norm: RMS norm over each head of queries and keys, before rotation.
    unit_offset: RMS norms multiply by 1 + weight.
    out_norms: attention and MLP each end with a norm.
    parallel_residual: attention and MLP read the same input.
    scaled_embedding: embeddings are multiplied by sqrt(hidden_size).
    """

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    context_length: int
    norm: str
    norm_eps: float
    positions: str
    rope_theta: float
    rope_scaling: RopeScaling | None
    activation: str
    gated: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied: bool
    rotary_dims: int | None = None
    local_rope_theta: float | None = None
    unrotated: tuple[bool, ...] = ()
    windows: tuple[int | None, ...] = ()
    query_scalar: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    qk_norm: bool = False
    unit_offset: bool = False
    out_norms: bool = False
    parallel_residual: bool = False
    scaled_embedding: bool = False

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def rope(self, layer: int) -> Rope | None:
        """The rotary positions of a layer; None if it does not rotate."""
        if self.positions != "rope" or (self.unrotated and self.unrotated[layer]):
            return None
        dims = self.rotary_dims or self.head_dim
        if self.local_rope_theta is not None and self.window(layer) is not None:
            return Rope(self.local_rope_theta, dims, None)
        return Rope(self.rope_theta, dims, self.rope_scaling)


COUNTS = ("vocab_size", "hidden_size", "layers", "heads", "kv_heads", "head_dim", "intermediate_size", "context_length")
MAYBE = ("rotary_dims", "local_rope_theta", "query_scalar", "attention_softcap", "final_softcap")


def check_values(a: Architecture) -> None:
    """
    Raises:
      ValueError: a size or another number is impossible for a decoder.
    """
    counts = [(name, getattr(a, name)) for name in COUNTS] + [("sliding_window", w) for w in a.windows if w is not None]
    numbers = [("norm_eps", a.norm_eps), *((name, getattr(a, name)) for name in MAYBE if getattr(a, name) is not None)]
    numbers += [("rope_theta", a.rope_theta)] * (a.positions == "rope")
    numbers += [("factor", a.rope_scaling.factor)] if a.rope_scaling else []
    for name, value in counts:
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} should be a whole number of at least 1, not {told(value)}")
    for name, value in numbers:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{name} should be a number above 0, not {told(value)}")
    if a.heads % a.kv_heads:
        raise ValueError(f"{a.heads} heads cannot share {a.kv_heads} keys and values evenly")
    if a.positions == "rope" and (a.rotary_dims or a.head_dim) % 2:
        raise ValueError(f"head_dim={a.head_dim} is odd, so it cannot be rotated in pairs")


def small_decoder(
    *, vocab_size: int, hidden_size: int, layers: int, heads: int, kv_heads: int, intermediate_size: int,
    context_length: int, rope_theta: float, tied: bool,
) -> Architecture:  # fmt: skip
    """The architecture of a policy that starts from scratch: Llama's shape."""
    return Architecture(
        family="llama", vocab_size=vocab_size, hidden_size=hidden_size, layers=layers, heads=heads, kv_heads=kv_heads,
        head_dim=hidden_size // heads, intermediate_size=intermediate_size, context_length=context_length, norm="rms",
        norm_eps=1e-5, positions="rope", rope_theta=rope_theta, rope_scaling=None, activation="silu", gated=True,
        attention_bias=False, output_bias=False, mlp_bias=False, tied=tied,
    )  # fmt: skip


def is_small_decoder(a: Architecture) -> bool:
    """True if the architecture is Llama's shape and nothing more: no biases, no scaled rotation, SwiGLU."""
    plain = small_decoder(
        vocab_size=a.vocab_size, hidden_size=a.hidden_size, layers=a.layers, heads=a.heads, kv_heads=a.kv_heads,
        intermediate_size=a.intermediate_size, context_length=a.context_length, rope_theta=a.rope_theta, tied=a.tied,
    )  # fmt: skip
    return a == dataclasses.replace(plain, norm_eps=a.norm_eps, head_dim=a.head_dim)


@dataclass(frozen=True)
class SmallDecoderConfig:
    """The configuration of the policy ``decoder``, for every backend."""

    tokenizer: TokenizerConfig = setting(TokenizerConfig(), "Null keys take the data source's own values.")
    layers: int = setting(4, "Transformer blocks.", least=1)
    hidden_size: int = setting(128, "Width of the residual stream.", least=1)
    heads: int = setting(4, "Query heads, each hidden_size / heads wide.", least=1)
    kv_heads: int = setting(4, "Key and value heads; fewer than heads: grouped-query attention (Ainslie et al. 2023).", least=1)
    intermediate_size: int = setting(384, "Width inside the MLP, about 8/3 of hidden_size (SwiGLU; Shazeer 2020).", least=1)
    context_length: int = setting(256, "Tokens, prompt and response together.", least=1)
    rope_theta: float = setting(10000.0, "Base of the rotary frequencies (Su et al. 2021).", above=0)
    tied: bool = setting(True, "Whether input and output embeddings are one matrix.")

    def __post_init__(self) -> None:
        size, heads, kv_heads = self.hidden_size, self.heads, self.kv_heads
        if size % heads or size // heads % 2:
            fitting = [n for n in range(1, min(size, 256) + 1) if size % n == 0 and size // n % 2 == 0]
            told = f"Set heads to one of {', '.join(map(str, fitting))}." if fitting else "Set an even hidden_size."
            raise ConfigError(
                f"policy.hidden_size={size} does not divide into policy.heads={heads} of even width, as rotary positions need. "
                f"{told}"
            )
        if heads % kv_heads:
            fitting = [n for n in range(1, min(heads, 256) + 1) if heads % n == 0]
            raise ConfigError(
                f"policy.heads={heads} is not divisible by policy.kv_heads={kv_heads}. Set kv_heads to one of "
                f"{', '.join(map(str, fitting))}."
            )

    def architecture(self, vocab_size: int) -> Architecture:
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "tokenizer"}
        return small_decoder(vocab_size=vocab_size, **sizes)
