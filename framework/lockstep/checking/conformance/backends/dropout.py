"""Dropout: its bits depend on seeds alone, as in a Llama written in numpy."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lockstep.checking.conformance.backends.terms import (
    learning,
    near_metrics,
    on_host,
    repeated,
    term,
)
from lockstep.checking.conformance.kit import Inapplicable, check, near, near_arrays, require
from lockstep.checking.conformance.world import World
from lockstep.errors import ConfigError
from lockstep.interfaces import Dropout, Model, Term
from lockstep.learning import randomness
from lockstep.models import architecture
from lockstep.storage.files import read_json


@check("backend", usually="bits depend on the row's place or on columns, or do not come from the seeds")
def dropout_depends_on_seeds_alone(world: World) -> None:
    """The same seeds give the same dropout, however rows are cut into micro-batches or padded; other seeds give another dropout;
    rate 0 gives none."""
    learner, names = learning(world, {"policy": world.policy()}), ("logprobs", "entropy")
    one, tolerance = term(world, names, dropout=0.3), world.tolerance(1e-5, 2e-2)
    with _dropout_if_any():
        expected = learner.gradients([one])
    plain = learner.gradients([term(world, names)])
    scale = max(np.abs(g).max() for g in plain.values())
    other = learner.gradients([dataclasses.replace(one, dropout=Dropout(0.3, one.dropout.seeds + np.uint32(1)))])
    for what, found in [("dropout at 0.3", plain), ("another dropout seed", other)]:
        moved = max(np.abs(expected[name] - found[name]).max() for name in plain)
        require(moved > 0.02 * scale, f"{what} moved gradients by at most {moved:.3g}, of up to {scale:.3g}")
    repeated(world, "with the same dropout again, gradients", learner.gradients([one]), expected)
    wide = world.rollout(prompt_columns=11)
    parts = [term(world, names, dropout=0.3, sequences=wide, rows=slice(i, i + 2)) for i in range(0, 8, 2)]
    what = "with dropout, in micro-batches of 2 behind 4 more columns of padding, gradients"
    near_arrays(what, learner.gradients(parts), expected, tolerance)
    near_arrays("with dropout at rate 0, gradients", learner.gradients([term(world, names, dropout=0.0)]), plain, tolerance)


@contextlib.contextmanager
def _dropout_if_any() -> Iterator[None]:
    """
    Raises:
      Inapplicable: the policy has no dropout.
    """
    try:
        yield
    except ConfigError as error:
        raise Inapplicable(f"the policy has no dropout: {error}") from error


@check("backend", usually="kept elements are not scaled up, sites share bits, or another generator is used")
def dropout_is_the_documented_bits(world: World) -> None:
    """With dropout, the loss is that of a Llama written in numpy whose attention and MLP outputs are dropped by
    `randomness.dropout_bits`; without dropout, the outputs are those of the same Llama."""
    policy, names = world.policy(), ("logprobs", "entropy")
    plain, one = (term(world, names, dropout=rate) for rate in (None, 0.3))
    found = policy.evaluate(plain.sequences, list(names), temperature=plain.temperature)
    for name, expected in _llama(world, policy, plain).items():
        mask = plain.sequences.mask
        near(f"{name} of a Llama", np.where(mask, found[name], 0), np.where(mask, expected, 0), world.tolerance(2e-5, 6e-2))
    expected = on_host(one.loss, _llama(world, policy, one), one.batch)
    with _dropout_if_any():
        metrics = learning(world, {"policy": policy}).update([one], lr_scale=0.0)
    near_metrics("with dropout, a loss over a Llama", metrics, expected, world.tolerance(2e-5, 5e-2))


def _llama(world: World, policy: Model, one: Term) -> dict[str, np.ndarray]:
    """Log-probabilities and entropy of a Llama (Touvron et al. 2023), in float64.

    Raises:
      Inapplicable: the policy is not a Llama.
    """
    folder: Path = world.folder / "llama"
    policy.save(folder)
    config, w = read_json(folder / "config.json"), policy.parameters()
    if config.get("model_type") != "llama":
        raise Inapplicable(f"model_type is {config.get('model_type')}: this check only knows Llama")
    a = architecture.from_hf(config)
    w = {name: array.astype(np.float64) for name, array in w.items()}
    mask, dropout = one.sequences.attention_mask, one.dropout
    position = np.maximum(mask.cumsum(axis=1) - 1, 0)
    angle = position[:, None, :, None] * a.rope_theta ** (-np.arange(a.head_dim // 2) / (a.head_dim // 2))
    visible = np.tril(np.ones((mask.shape[1],) * 2, bool)) & mask[:, None, None, :] | np.eye(mask.shape[1], dtype=bool)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + a.norm_eps) * w[name]

    def split(x, heads):
        return x.reshape(*mask.shape, heads, a.head_dim).transpose(0, 2, 1, 3)

    def rotate(x):
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], -1
        )

    def drop(x, site):
        if dropout is None:
            return x
        kept = randomness.dropout_bits(dropout.seeds, site, position, a.hidden_size) >= dropout.rate * 2**24
        return np.where(kept, x / (1 - dropout.rate), 0)

    x = w["model.embed_tokens.weight"][np.where(mask, one.sequences.tokens, 0)]
    for layer in range(a.layers):
        here = f"model.layers.{layer}."
        h = norm(x, here + "input_layernorm.weight")
        q, k, v = (
            split(h @ w[f"{here}self_attn.{part}_proj.weight"].T, heads)
            for part, heads in [("q", a.heads), ("k", a.kv_heads), ("v", a.kv_heads)]
        )
        q, k, v = rotate(q), np.repeat(rotate(k), a.heads // a.kv_heads, axis=1), np.repeat(v, a.heads // a.kv_heads, axis=1)
        attention = np.where(visible, q @ k.swapaxes(-1, -2) / np.sqrt(a.head_dim), -np.inf)
        attention = np.exp(attention - attention.max(axis=-1, keepdims=True))
        out = (attention / attention.sum(axis=-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(*mask.shape, -1)
        x = x + drop(out @ w[here + "self_attn.o_proj.weight"].T, 2 * layer)
        h = norm(x, here + "post_attention_layernorm.weight")
        gate = h @ w[here + "mlp.gate_proj.weight"].T
        h = gate / (1 + np.exp(-gate)) * (h @ w[here + "mlp.up_proj.weight"].T)
        x = x + drop(h @ w[here + "mlp.down_proj.weight"].T, 2 * layer + 1)
    table = w["model.embed_tokens.weight" if a.tied else "lm_head.weight"]
    logits = (norm(x, "model.norm.weight") @ table.T)[:, one.sequences.prompt_length - 1 : -1] / one.temperature
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    tokens = np.where(one.sequences.response_mask, one.sequences.responses, 0)
    taken = np.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
    return {"logprobs": taken, "entropy": -(np.exp(logprobs) * logprobs).sum(axis=-1)}
