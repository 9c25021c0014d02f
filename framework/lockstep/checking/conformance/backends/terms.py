"""What the checks differentiate and train: the kit's own losses over random rows, with a policy and a value network. The losses
read every output, and arrays that no algorithm reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lockstep.checking.conformance.kit import near, near_arrays, require, same_arrays
from lockstep.checking.conformance.world import World
from lockstep.interfaces import Dropout, Learner, Metrics, Model, Term
from lockstep.learning.losses import clipped_policy_loss, select, sigmoid, softplus, weighted_sum
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.text.sequences import Sequences

OUTPUTS = ("logprobs", "entropy", "values", "scores")
ADAM = OptimizerConfig(
    learning_rate=1e-2, betas=(0.9, 0.95), eps=1e-2, tf_style=False, weight_decay=0.1, max_grad_norm=0.5, ema_decay=0.75
)
"""``eps`` is as large as gradients, so that its place in the formula shows and rounding does not."""
OTHER = OptimizerConfig(
    learning_rate=5e-3, betas=(0.8, 0.99), eps=3e-3, tf_style=True, weight_decay=0.0, max_grad_norm=None, ema_decay=None
)


@dataclasses.dataclass(frozen=True)
class Squares:
    """gain · Σ weights · (output - target)² over all outputs: every output takes part, none linearly."""

    outputs: tuple[str, ...] = OUTPUTS
    gain: float = 1.0

    def __call__(self, xp: Any, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        parts = {}
        for name in self.outputs:
            rows = "row_" if name == "scores" else ""
            keep = lambda x, mask=batch[f"{rows}mask"]: select(xp, mask, x)  # noqa: E731
            error = keep(outputs[name]) - keep(batch[f"{name}_target"])
            parts[f"check/{name}"] = weighted_sum(xp, error * error, keep(batch[f"{rows}weights"]))
        return self.gain * sum(parts.values()), {**parts, "check/weight": xp.sum(select(xp, batch["mask"], batch["weights"]))}


@dataclasses.dataclass(frozen=True)
class Clipped:
    """Σ weights · the clipped loss of PPO."""

    outputs: tuple[str, ...] = ("logprobs",)

    def __call__(self, xp: Any, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        ratio = xp.exp(select(xp, batch["mask"], outputs["logprobs"] - batch["old_logprobs"]))
        loss = clipped_policy_loss(xp, ratio, batch["advantages"], low=0.2, high=0.2)
        return weighted_sum(xp, loss, batch["weights"]), {}


@dataclasses.dataclass(frozen=True)
class AtATie:
    """Σ weights · f(x) at x = 0, where f is the function ``of`` and has derivative 1/2; 'half' has it everywhere. x is the
    log-probabilities minus their known values; adding and subtracting a large number rounds it to exactly 0."""

    of: str
    outputs: tuple[str, ...] = ("logprobs",)

    def __call__(self, xp: Any, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        x = select(xp, batch["mask"], outputs["logprobs"]) - batch["same"] + batch["large"] - batch["large"]
        functions = {
            "half": lambda x: 0.5 * x,
            "softplus": lambda x: softplus(xp, x),
            "sigmoid": lambda x: 2 * sigmoid(xp, x),
            "maximum": lambda x: xp.maximum(x, xp.zeros_like(x)),
        }
        return weighted_sum(xp, functions[self.of](x), batch["weights"]), {}


@dataclasses.dataclass(frozen=True)
class Reads:
    """A loss of 0, with metrics that show which arrays arrive and what the namespace's functions compute."""

    outputs: tuple[str, ...] = ("logprobs",)

    def __call__(self, xp: Any, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        x, y, mask = batch["x"], batch["y"], batch["mask"]
        zero = xp.zeros_like(x)
        found = {
            "row": xp.sum(batch["row"] * xp.asarray(2.0)),
            "table": xp.sum(batch["table"][:, 1, 2]),
            "integers": xp.sum(xp.where(batch["integers"] == 2**24 + 1, 1.0, 0.0)),
            "mask": xp.sum(xp.where(mask & ~batch["other"], x, zero)),
            "any": xp.sum(xp.where(xp.any(mask, axis=1), batch["row"], xp.zeros_like(batch["row"]))),
            "maximum": xp.sum(xp.maximum(x, y)),
            "minimum": xp.sum(xp.minimum(x, y)),
            "clip": xp.sum(xp.clip(x, -0.2, 0.3)),
            "abs": xp.sum(xp.abs(x)),
            "exp": xp.sum(xp.exp(x)),
            "log1p": xp.sum(xp.log1p(xp.abs(x))),
            "expm1": xp.sum(xp.expm1(x)),
            "log": xp.sum(xp.log(xp.exp(x))),
            "reshape": xp.sum(xp.reshape(x, (-1, 2))[:, 1]),
            "tanh": xp.sum(xp.tanh(x)),
            "max": xp.max(x),
            "difference": xp.sum(xp.abs(x[:, None, :] - y[:, :, None])),
            "along_time": xp.sum(xp.max(x, axis=1) * batch["row"]),
            "square": xp.sum(x**2),
            "ordered": xp.sum(xp.where((x > y) | (x <= -1), x, zero)),
        }
        return xp.sum(select(xp, mask, outputs["logprobs"])) * 0, {f"check/{name}": value for name, value in found.items()}


def term(
    world: World, outputs: Sequence[str] = OUTPUTS, *, seed: int = 0, rows: slice = slice(None), scale: float = 1.0,
    gain: float = 1.0, temperature: float = 0.7, dropout: float | None = None, sequences: Sequences | None = None,
) -> Term:  # fmt: skip
    """One summand: `Squares` over ragged rows, weighted by the token count of all rows, not only of the selected ones."""
    sequences = sequences or world.rollout(seed=seed)
    rng, mask = np.random.default_rng(seed), sequences.mask
    batch = {
        "mask": mask,
        "weights": scale * mask / mask.sum(),
        "row_mask": mask.any(axis=1),
        "row_weights": scale * mask.any(axis=1) / mask.any(axis=1).sum(),
    }
    batch |= {f"{name}_target": rng.normal(-1, 1, len(mask) if name == "scores" else mask.shape) for name in outputs}
    batch = {name: array if array.dtype == bool else array.astype(np.float32) for name, array in batch.items()}
    seeds = np.arange(len(mask), dtype=np.uint32) + 2**31
    return Term(
        Squares(tuple(outputs), gain),
        sequences.take(rows),
        {name: array[rows] for name, array in batch.items()},
        temperature,
        None if dropout is None else Dropout(dropout, seeds[rows]),
    )


def pair(world: World, number: int = 0) -> dict[str, Model]:
    """A policy and a value network, so that every output exists."""
    return {"policy": world.policy(number), "value": world.scalar_model(number)}


def learning(world: World, models: Mapping[str, Model]) -> Learner:
    """A learner that trains the policy with ``ADAM`` and the value network with ``OTHER``."""
    return world.backend.learner(models, {"value": OTHER, "policy": ADAM})


def parameters(models: Mapping[str, Model]) -> dict[str, np.ndarray]:
    """All parameters as <model>.<name>, like gradients."""
    return {f"{name}.{key}": array for name, model in models.items() for key, array in model.parameters().items()}


def outputs_of(models: Mapping[str, Model], one: Term) -> dict[str, np.ndarray]:
    """The outputs that a term's loss reads, from `evaluate`."""
    found: dict[str, np.ndarray] = {}
    for model in models.values():
        names = [name for name in one.loss.outputs if name in model.supplies and name not in found]
        if names:
            found |= model.evaluate(one.sequences, names, temperature=one.temperature)
    return found


def on_host(loss: Any, outputs: Mapping[str, np.ndarray], batch: Mapping[str, np.ndarray]) -> Metrics:
    """The loss and its metrics in float64 numpy."""
    wide = lambda a: a.astype(np.float64) if a.dtype == np.float32 else a  # noqa: E731
    value, metrics = loss(np, {n: wide(a) for n, a in outputs.items()}, {n: wide(a) for n, a in batch.items()})
    return {name: float(number) for name, number in {"loss": value, **metrics}.items()}


def repeated(world: World, what: str, found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Require that a repeated computation gives exactly equal arrays in host memory, and equal ones up to rounding on an
    accelerator, which may sum in another order."""
    if world.backend.peak_memory_bytes() is None:
        same_arrays(what, found, expected)
    else:
        near_arrays(what, found, expected, 1e-6)


def near_metrics(what: str, found: Metrics, expected: Metrics, tolerance: float) -> None:
    """Require each expected metric within ``tolerance`` times its size, or times 1 if it is smaller than 1."""
    for name, number in expected.items():
        require(name in found, f"{what}: '{name}' is not among {sorted(found)}")
        require(isinstance(found[name], float), f"{what}: '{name}' is {type(found[name]).__name__} where float was expected")
        near(f"{what}: '{name}'", found[name], number, tolerance * max(1.0, abs(number)))
