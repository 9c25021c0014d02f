"""Gradients, Adam, micro-batches and restoring. The subject is a `World` with the backend to check and a policy on it.

Losses are the kit's own, so that a check can differentiate every output and read numbers that no algorithm reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.checking.conformance.kit import Inapplicable, Violation, check, near, near_arrays, require, same, same_arrays
from lockstep.checking.conformance.world import World, with_prompts
from lockstep.errors import ConfigError
from lockstep.interfaces import Dropout, Learner, Metrics, Model, ScalarModel, Term
from lockstep.learning import randomness
from lockstep.learning.losses import clipped_policy_loss, select, sigmoid, softplus, weighted_sum
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.models import architecture
from lockstep.storage.files import read_json
from lockstep.storage.weights import read_weights, write_tensors
from lockstep.text.sequences import Sequences

OUTPUTS = ("logprobs", "entropy", "values", "scores")
ADAM = OptimizerConfig(
    learning_rate=1e-2, betas=(0.9, 0.95), eps=1e-2, tf_style=False, weight_decay=0.1, max_grad_norm=0.5, ema_decay=0.75
)
"""As large as gradients, so that its place in the formula shows and rounding does not."""
OTHER = OptimizerConfig(
    learning_rate=5e-3, betas=(0.8, 0.99), eps=3e-3, tf_style=True, weight_decay=0.0, max_grad_norm=None, ema_decay=None
)


@dataclasses.dataclass(frozen=True)
class Squares:
    """gain · Σ weights · (output - target)² over all outputs: each takes part, none linearly."""

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
    """Σ weights · f(x) at x = 0, where f has the derivative 1/2: the function ``of``, or 'half', which has it everywhere. x is
    the difference between log-probabilities and themselves, rounded to exactly 0 by a large number that comes and goes."""

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
    """No objective: metrics of the arrays that arrive, and of the functions of the namespace."""

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
    """One summand: `Squares` over ragged rows, weighted by the token counts of all rows, not only of the selected ones."""
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
    """The policy under ``ADAM``, the value network under ``OTHER``."""
    return world.backend.learner(models, {"value": OTHER, "policy": ADAM})


def parameters(models: Mapping[str, Model]) -> dict[str, np.ndarray]:
    """Parameters as <model>.<name>, like gradients."""
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
    """A repeated computation: bitwise equal in host memory; an accelerator may sum in another order."""
    if world.backend.peak_memory_bytes() is None:
        same_arrays(what, found, expected)
    else:
        near_arrays(what, found, expected, 1e-6)


def near_metrics(what: str, found: Metrics, expected: Metrics, tolerance: float) -> None:
    """Each expected metric within ``tolerance`` of its size, or of 1 if it is smaller."""
    for name, number in expected.items():
        require(name in found, f"{what}: '{name}' is not among {sorted(found)}")
        require(isinstance(found[name], float), f"{what}: '{name}' is {type(found[name]).__name__} where float was expected")
        near(f"{what}: '{name}'", found[name], number, tolerance * max(1.0, abs(number)))


# ---------------------------------------------------------------------------------------------------------- gradients


@check("backend", usually="part of the graph is detached, or a loss is scaled before differentiation")
def gradients_are_derivatives(world: World) -> None:
    """Along the gradient of every parameter, and along a random direction beside it, the loss changes at the rate given by the
    gradient (central finite differences through checkpoints); every parameter takes part."""
    models, one = pair(world), term(world)
    gradients = learning(world, models).gradients([one])
    own = parameters(models)
    require(gradients.keys() == own.keys(), f"gradients and parameters do not both have {sorted(gradients.keys() ^ own.keys())}")
    norms = {name: float(np.linalg.norm(array.astype(np.float64))) for name, array in gradients.items()}
    for name, norm in norms.items():
        require(np.isfinite(norm) and norm > 0, f"the gradient of {name} has norm {norm}")
    rng = np.random.default_rng(4)
    changed = _Changed(world, models, one)
    if world.precision != "float32":  # rounding hides single parameters: check all at once
        for model in models:
            mine = {name: array for name, array in gradients.items() if name.startswith(f"{model}.")}
            norm = np.sqrt(sum(norms[name] ** 2 for name in mine))
            found = changed.slope(model, {name.removeprefix(f"{model}."): array / norm for name, array in mine.items()}, 0.05)
            near(f"the norm of the gradient of {model}, against the slope of the loss", norm, found, 0.15 * norm)
        return
    for name, gradient in gradients.items():
        model, key = name.split(".", 1)
        beside = rng.normal(size=gradient.shape)
        direction = gradient / norms[name] + beside / np.linalg.norm(beside)
        claimed = float((gradient * direction).sum())
        found = changed.slope(model, {key: direction}, 0.02)
        near(f"the gradient of {name} along a direction, against the slope of the loss", claimed, found, 1e-2 * abs(claimed))


class _Changed:
    """The loss of a term with one model's parameters changed, by saving, editing the file and loading."""

    def __init__(self, world: World, models: Mapping[str, Model], one: Term):
        self.world, self.models, self.one = world, models, one
        self.outputs = outputs_of(models, one)
        self.folders = {}
        for name, model in models.items():
            self.folders[name] = world.folder / "differences" / name
            model.save(self.folders[name])
        self.weights = {name: read_weights(folder) for name, folder in self.folders.items()}

    def slope(self, model: str, direction: Mapping[str, np.ndarray], step: float) -> float:
        """(L(θ + step · direction) - L(θ - step · direction)) / (2 step)."""
        return (self.loss(model, direction, step) - self.loss(model, direction, -step)) / (2 * step)

    def loss(self, model: str, direction: Mapping[str, np.ndarray], step: float) -> float:
        weights = dict(self.weights[model])
        for key, array in direction.items():
            weights[key] = (weights[key] + step * array).astype(np.float32)
        write_tensors(self.folders[model] / "model.safetensors", weights)
        cls = type(self.models["policy"])
        load = cls.load_scalar if isinstance(self.models[model], ScalarModel) else cls.load
        changed = load(self.folders[model], self.world.backend)
        outputs = {**self.outputs, **outputs_of({model: changed}, self.one)}
        if model == "policy":  # of two models that supply an output, the first counts
            outputs |= {name: self.outputs[name] for name in ("values", "scores")}
        return on_host(self.one.loss, outputs, self.one.batch)["loss"]


@check("backend", usually="a weight, moment or counter changes, or gradients accumulate into the next call")
def gradients_take_no_step(world: World) -> None:
    """`gradients` changes nothing: a second call returns the same, parameters stay, and an update afterwards equals one without
    it."""
    models = pair(world)
    learner, before, terms = learning(world, models), parameters(models), [term(world)]
    first, again = learner.gradients(terms), learner.gradients(terms)
    repeated(world, "gradients taken again,", again, first)
    same_arrays("after taking gradients, parameter", parameters(models), before)
    learner.update(terms)
    fresh = pair(world)
    learning(world, fresh).update(terms)
    repeated(world, "updated after taking gradients, parameter", parameters(models), parameters(fresh))


@check("backend", usually="the loss is averaged per micro-batch, or terms are averaged instead of summed")
def micro_batches_add_up(world: World) -> None:
    """Gradients and metrics do not depend on how rows are cut into micro-batches (invariant 6)."""
    models, tolerance = pair(world), world.tolerance(1e-5, 2e-2)
    learner, whole = learning(world, models), [term(world)]
    expected, metrics = learner.gradients(whole), on_host(whole[0].loss, outputs_of(models, whole[0]), whole[0].batch)
    cuts = {size: [slice(i, i + size) for i in range(0, 8, size)] for size in (1, 2)}
    cuts["1 and 2"] = [slice(0, 1), slice(1, 3), slice(3, 5), slice(5, 6), slice(6, 8)]
    for size, cut in cuts.items():
        parts = [term(world, rows=rows) for rows in cut]
        near_arrays(f"gradients from micro-batches of {size},", learner.gradients(parts), expected, tolerance)
    found = learning(world, pair(world)).update(parts)
    near_metrics(f"metrics from micro-batches of {size}", found, metrics, world.tolerance(2e-5, 5e-2))


@check("backend", usually="what a prompt's tokens give to the loss of several rows is lost, or counts once")
def gradients_of_rows_with_the_same_prompt(world: World) -> None:
    """Four neighbouring rows with the same prompt have the gradients that they have one by one."""
    rows = with_prompts(world.rollout(4), np.full(4, 3))
    learner, names = learning(world, {"policy": world.policy()}), ("logprobs", "entropy")
    alone = [term(world, names, sequences=rows, rows=slice(i, i + 1)) for i in range(4)]
    found, expected = learner.gradients([term(world, names, sequences=rows)]), learner.gradients(alone)
    near_arrays("of rows with the same prompt, gradients", found, expected, world.tolerance(1e-5, 2e-2))


@check("backend", usually="only the last term counts, or all terms use the first one's settings")
def terms_add_up(world: World) -> None:
    """The gradient of several terms is the sum of theirs, each with its own loss, rows, weights and temperature
    (invariant 24)."""
    learner = learning(world, pair(world))
    one, other = term(world), term(world, ("logprobs",), seed=3, scale=27.8, temperature=1.0)
    first, second, both = (learner.gradients(terms) for terms in ([one], [other], [one, other]))
    tolerance = world.tolerance(2e-6, 1e-2)
    near_arrays("gradients of two terms,", both, {name: first[name] + second[name] for name in first}, tolerance)
    nothing = term(world, ("logprobs",), seed=3, scale=0.0, temperature=1.0)
    near_arrays("with a second term of weight 0, gradients", learner.gradients([one, nothing]), first, tolerance)


@check("backend", usually="compiled programs are cached by the loss's class, not by the loss")
def losses_with_other_settings_are_other_losses(world: World) -> None:
    """Two losses of one class with different settings have different gradients: three times the loss, three times the
    gradient."""
    learner = learning(world, pair(world))
    once, thrice = (learner.gradients([term(world, ("logprobs",), gain=gain)]) for gain in (1.0, 3.0))
    near_arrays("three times the loss: gradients", thrice, {n: 3 * g for n, g in once.items()}, world.tolerance(1e-5, 2e-2))


@check("backend", usually="multiplication by the mask (0 · NaN is NaN), or padding is embedded or attended to")
def masked_columns_are_inert(world: World) -> None:
    """NaN, 1e30 and ids outside the vocabulary under the masks change no bit of the gradients; rows that do not count add
    nothing (invariant 9)."""
    models = pair(world)
    learner, one = learning(world, models), term(world)
    clean, mask = learner.gradients([one]), one.sequences.mask
    require(not mask.all(), "the rows have no padding to check")
    for filling in (np.nan, 1e30):
        batch = {
            name: np.where(mask if array.ndim == 2 else one.batch["row_mask"], array, filling).astype(array.dtype)
            if array.dtype == np.float32 else array
            for name, array in one.batch.items()
        }  # fmt: skip
        repeated(
            world, f"with {filling} under the mask, gradients", learner.gradients([dataclasses.replace(one, batch=batch)]), clean
        )
    for ids in (models["policy"].vocab_size + 1000, -100):
        tokens = np.where(one.sequences.attention_mask, one.sequences.tokens, ids).astype(np.int32)
        filled = dataclasses.replace(one, sequences=dataclasses.replace(one.sequences, tokens=tokens))
        repeated(world, f"with id {ids} as padding, gradients", learner.gradients([filled]), clean)
    counted = mask & (np.arange(len(mask)) < 5)[:, None]
    some = term(world, sequences=dataclasses.replace(one.sequences, mask=counted))
    tokens = np.where((np.arange(len(mask)) < 5)[:, None], some.sequences.tokens, 3).astype(np.int32)
    other = dataclasses.replace(some, sequences=dataclasses.replace(some.sequences, tokens=tokens))
    near_arrays("with other tokens in rows that do not count, gradients",
                learner.gradients([other]), learner.gradients([some]), world.tolerance(1e-6, 1e-2))  # fmt: skip


@check("backend", usually="something is added to every gradient, or clipping lets gradients through")
def clipped_ratios_get_no_gradient(world: World) -> None:
    """Where the ratio is clipped, the gradient of PPO's loss is exactly 0; elsewhere it is not (invariant 20)."""
    policy, rows = world.policy(), world.rollout()
    learner = learning(world, {"policy": policy})
    logprobs = policy.evaluate(rows, ["logprobs"])["logprobs"]
    above = np.arange(rows.mask.shape[1]) % 2 == 0  # columns whose ratio is 1.5; in the others it is 0.5
    for kind, sign in [("clipped", 1), ("open", -1)]:
        batch = {
            "mask": rows.mask,
            "weights": rows.mask / rows.mask.sum(),
            "old_logprobs": logprobs - np.log(np.where(above, 1.5, 0.5)),
            "advantages": sign * np.where(above, 1.0, -1.0) * np.ones(rows.mask.shape),
        }
        batch = {name: array if array.dtype == bool else array.astype(np.float32) for name, array in batch.items()}
        gradients = learner.gradients([Term(Clipped(), rows, batch)])
        largest = max(gradients, key=lambda name: np.abs(gradients[name]).max())
        size = np.abs(gradients[largest]).max()
        require((size == 0) == (kind == "clipped"), f"with all ratios {kind}, the largest gradient is {size:.3g}, in {largest}")


@check("backend", usually="every model runs for every output, so a value loss reaches the policy's trunk")
def each_output_comes_from_the_first_that_supplies_it(world: World) -> None:
    """A loss reads each output from the first model that supplies it; other models get a gradient of exactly 0, and an output
    without a supplier is an error."""
    one, value = term(world, ("values",)), world.scalar_model()
    for name, gradient in learning(world, {"policy": world.policy(), "value": value}).gradients([one]).items():
        size = np.abs(gradient).max()
        require(
            size == 0 or name.startswith("value."), f"values come from 'value', but the gradient of {name} reaches {size:.3g}"
        )
    metrics = learning(world, {"policy": world.policy().with_value_head(), "value": value}).update([one])
    loss = on_host(one.loss, {"values": np.zeros(one.sequences.mask.shape)}, one.batch)["loss"]
    near_metrics("with values from the policy's new head", metrics, {"loss": loss, "grad_norm/value": 0.0}, 1e-5)
    try:
        metrics = learning(world, {"policy": world.policy()}).update([one])
    except Exception:
        return
    raise Violation(f"no model supplies values, but a loss over them was {metrics.get('loss')}")


# --------------------------------------------------------------------------------------------------------- one update


@check("backend", usually="a pass outlives its weights, serves other terms, or has another temperature")
def a_forward_pass_serves_its_own_term(world: World) -> None:
    """`Learner.forward` returns what the models return. A term with a pass has the gradient and the update of the same term
    without it; other terms keep theirs. A pass already used, or older than an update, is refused or rerun: it never gives a
    different gradient."""
    models, one, other = pair(world), term(world), term(world, seed=3)
    learner, tolerance = learning(world, models), world.tolerance(1e-5, 2e-2)

    def passed() -> Term:
        made = learner.forward(one.sequences, OUTPUTS, temperature=one.temperature)
        return dataclasses.replace(one, forward=made)

    warm = dataclasses.replace(one, temperature=1.0)
    near_arrays("outputs of a forward pass,", passed().forward.outputs, outputs_of(models, one), tolerance)
    cases = {
        "a term with its pass": lambda it: [it],
        "the same term without it": lambda it: [one],
        "another term": lambda it: [other],
        "another temperature": lambda it: [warm],
        "two terms, the second with its pass": lambda it: [other, it],
    }
    for what, terms in cases.items():
        expected = learning(world, pair(world)).gradients(terms(one))
        near_arrays(f"after a forward pass, gradients of {what},", learner.gradients(terms(passed())), expected, tolerance)
    spent = passed()
    expected = learner.gradients([spent])
    _refused_or("from a pass already used, gradients", learner, spent, expected, tolerance)
    stale, fresh = passed(), learning(world, pair(world))
    for each in (learner, fresh):
        each.update([other])
    _refused_or("from a pass older than an update, gradients", learner, stale, fresh.gradients([one]), tolerance)
    metrics, expected = learner.update([passed()]), fresh.update([one])
    near_metrics("updated by a term with its pass,", metrics, expected, world.tolerance(1e-4, 5e-2))
    near_arrays("updated by a term with its pass, parameters", parameters(models), parameters(fresh.models), tolerance)


def _refused_or(what: str, learner: Learner, one: Term, expected: dict[str, np.ndarray], tolerance: float) -> None:
    try:
        found = learner.gradients([one])
    except ValueError:
        return
    near_arrays(f"{what}, which were not refused,", found, expected, tolerance)


@check("backend", usually="epsilon inside the root, decay on gains, elementwise clipping, an extra step, or no lr_scale")
def updates_are_adam(world: World) -> None:
    """Three updates are Adam on the learner's own gradients, each model with its own optimizer: bias correction, either
    epsilon, weight decay on matrices, clipping by the global norm, lr_scale, one step per update (invariants 7, 23)."""
    models = pair(world)
    learner = learning(world, models)
    state = {name: [array.astype(np.float64), 0.0, 0.0] for name, array in parameters(models).items()}
    steps = [
        ([term(world), term(world, seed=1)], 1.0),
        ([term(world)], 0.5),
        ([term(world, ("logprobs",), seed=2), term(world, ("logprobs",), seed=3)], 2.0),  # no gradient for the value network
    ]
    for number, (terms, lr_scale) in enumerate(steps, 1):
        gradients = learner.gradients(terms)
        learner.update(terms, lr_scale)
        for model, config in {"policy": ADAM, "value": OTHER}.items():
            _adam(config, number, lr_scale, {n: s for n, s in state.items() if n.startswith(f"{model}.")}, gradients)
        found = parameters(models)
        for name, (expected, _, _) in state.items():
            rate = (ADAM if name.startswith("policy.") else OTHER).learning_rate * lr_scale
            near(f"after update {number}, {name}", found[name], expected, rate * world.tolerance(2e-4, 5e-2) + 2e-7)
            state[name][0] = found[name].astype(np.float64)  # rounding does not accumulate


def _adam(
    config: OptimizerConfig, step: int, lr_scale: float, state: dict[str, list[Any]], gradients: dict[str, np.ndarray]
) -> None:
    """Kingma & Ba 2015, algorithm 1, with decoupled weight decay (Loshchilov & Hutter 2019): [θ, m, v] in place."""
    (first, second), rate = config.betas, config.learning_rate * lr_scale
    wide = {name: gradients[name].astype(np.float64) for name in state}
    norm = np.sqrt(sum((g**2).sum() for g in wide.values()))
    clip = 1.0 if config.max_grad_norm is None else min(1.0, config.max_grad_norm / max(norm, 1e-30))
    eps = config.eps / np.sqrt(1 - second**step) if config.tf_style else config.eps
    for name, entry in state.items():
        theta, mean, square = entry
        mean = first * mean + (1 - first) * clip * wide[name]
        square = second * square + (1 - second) * (clip * wide[name]) ** 2
        direction = (mean / (1 - first**step)) / (np.sqrt(square / (1 - second**step)) + eps)
        decay = config.weight_decay if theta.ndim >= 2 else 0.0
        entry[:] = [theta - rate * (direction + decay * theta), mean, square]


@check("backend", usually="only the last term's metrics, a mean over terms, or the norm after clipping")
def metrics_are_sums(world: World) -> None:
    """An update returns the loss and the losses' metrics, summed over terms and taken before the step, and the norm of each
    model's gradient before clipping."""
    models, terms = pair(world), [term(world), term(world, seed=1, temperature=1.3)]
    expected: Metrics = {}
    for one in terms:
        for name, number in on_host(one.loss, outputs_of(models, one), one.batch).items():
            expected[name] = expected.get(name, 0.0) + number
    learner = learning(world, models)
    gradients = learner.gradients(terms)
    for model in models:
        squares = sum((g.astype(np.float64) ** 2).sum() for n, g in gradients.items() if n.startswith(f"{model}."))
        expected[f"grad_norm/{model}"] = float(np.sqrt(squares))
    require(expected["grad_norm/policy"] > ADAM.max_grad_norm, f"the gradient is too small to be clipped: {expected}")
    near_metrics("metrics of an update of two terms", learner.update(terms), expected, world.tolerance(2e-5, 5e-2))


@check("backend", usually="host arrays are cast to integers or half precision before they reach the loss")
def batches_arrive_as_they_are(world: World) -> None:
    """A loss gets the arrays of its term with their values, shapes and kinds, and a namespace with the functions of the Array
    API standard; both behave as in numpy."""
    rows, rng = world.rollout(), np.random.default_rng(6)
    batch = {
        "x": rng.normal(size=rows.mask.shape).astype(np.float32),
        "y": rng.normal(size=rows.mask.shape).astype(np.float32),
        "row": np.linspace(0.73, 1.37, rows.rows, dtype=np.float32),
        "table": rng.normal(size=(rows.rows, 2, 3)).astype(np.float32),
        "integers": np.full(rows.rows, 2**24 + 1, np.int32),
        "mask": rows.mask,
        "other": rng.random(rows.mask.shape) < 0.5,
    }
    metrics = learning(world, {"policy": world.policy()}).update([Term(Reads(), rows, batch)], lr_scale=0.0)
    near_metrics("read by a loss", metrics, on_host(Reads(), {"logprobs": np.zeros(rows.mask.shape)}, batch), 1e-5)


@check("backend", usually="abs, max or min whose derivative at a tie is all or nothing")
def ties_have_half_the_slope(world: World) -> None:
    """Where a policy equals its reference, the losses of preferences have the derivative of their formula, the same on every
    backend: DPO starts there."""
    rows, policy = world.rollout(), world.policy()
    mask = rows.mask
    with_same = {"mask": mask, "weights": (mask / mask.sum()).astype(np.float32), "large": np.full(mask.shape, 1e6, np.float32)}
    learner = learning(world, {"policy": policy})
    with_same["same"] = np.where(mask, learner.evaluate(rows, ["logprobs"])["logprobs"], 0).astype(np.float32)
    expected = learner.gradients([Term(AtATie("half"), rows, with_same)])
    for of in ("softplus", "sigmoid", "maximum"):
        found = learner.gradients([Term(AtATie(of), rows, with_same)])
        near_arrays(f"at a tie of {of}, the gradient of", found, expected, world.tolerance(1e-4, 5e-2))


@check("backend", usually="the learner trains a copy, or one model's parameters are shared with another")
def models_are_trained_in_place(world: World) -> None:
    """A learner trains the very models it was given, and no others: a reference copied earlier keeps its weights, bit for bit
    (invariant 21)."""
    models = pair(world)
    others = {"a copy": models["policy"].copy(), "another policy": world.policy(1), "a copied network": models["value"].copy()}
    start, untouched = parameters(models), {name: model.parameters() for name, model in others.items()}
    learner = learning(world, models)
    for seed in range(2):
        learner.update([term(world, seed=seed)])
    for name, array in parameters(models).items():
        require((array != start[name]).any(), f"after 2 updates {name} of the given model is unchanged")
    same_arrays("the learner's own model,", parameters(learner.models), parameters(models))
    for name, model in others.items():
        same_arrays(f"after 2 updates, {name}:", model.parameters(), untouched[name])


@check("backend", usually="the average starts at 0, is taken before the step, or is the trained model itself")
def averages_follow_the_weights(world: World) -> None:
    """`averaged` is a copy with d · average + (1 - d) · weights after each update, starting from the initial weights; without
    `ema_decay` it is a copy of the weights. Training does not reach the copy."""
    models = pair(world)
    learner, decay = learning(world, models), ADAM.ema_decay
    expected = {name: array.astype(np.float64) for name, array in models["policy"].parameters().items()}
    for number in range(2):
        if number:
            held = {name: learner.averaged(name) for name in models}
            kept = parameters(held)
        learner.update([term(world, seed=number)])
        weights = models["policy"].parameters()
        expected = {name: decay * average + (1 - decay) * weights[name] for name, average in expected.items()}
        found = learner.averaged("policy").parameters()
        for name in expected:
            near(f"average of {name} after update {number + 1}", found[name], expected[name], 1e-6)
        same_arrays("without ema_decay, averaged", learner.averaged("value").parameters(), models["value"].parameters())
    same_arrays("an average handed out before the last update:", parameters(held), kept)


@check("backend", usually="the step count, moments or average are not saved, or not restored")
def restoring_goes_on_bit_for_bit(world: World) -> None:
    """A saved learner, restored over models with other weights and their own history, continues exactly like the original:
    parameters, averages and metrics (invariant 29). Its files are safetensors and JSON."""
    models = pair(world)
    learner, folder = learning(world, models), world.folder / "learner"
    for number in range(2):
        learner.update([term(world, seed=number)], lr_scale=1 / (1 + number))
    learner.save(folder)
    others = sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix not in (".safetensors", ".json"))
    require(not others, f"save wrote {len(others)} files that are neither safetensors nor JSON: {', '.join(others)}")
    again = pair(world, number=1)
    restored = learning(world, again)
    restored.update([term(world, seed=7)])
    restored.restore(folder)
    same_arrays("restored parameter", parameters(again), parameters(models))
    for number in range(2, 4):
        pair_of_metrics = [one.update([term(world, seed=number)], lr_scale=1 / (1 + number)) for one in (restored, learner)]
        found, expected = ({name: np.asarray(value) for name, value in metrics.items()} for metrics in pair_of_metrics)
        repeated(world, f"update {number + 1} after restoring:", found, expected)
        repeated(world, f"after restoring and update {number + 1}, parameter", parameters(again), parameters(models))
        average, other = (one.averaged("policy").parameters() for one in (restored, learner))
        repeated(world, f"after restoring and update {number + 1}, the average of", average, other)


# ----------------------------------------------------------------------------------------------------------- packing


@check("backend", usually="`Sequences.segments` is not read: attention crosses examples, or positions run through the row")
def examples_that_share_a_row_are_apart(world: World) -> None:
    """Examples that share rows have the same gradients as in separate rows, and the tokens of one change no bit of the outputs
    of another. A backend without packing raises `ConfigError`."""
    names = ("logprobs", "entropy", "values")
    models, one = pair(world), term(world, names)
    packed, learner = sharing_rows(one, [[0, 1, 2], [3], [4, 5, 6, 7]]), learning(world, models)
    try:
        found = learner.gradients([packed])
    except ConfigError as error:
        raise Inapplicable(f"it refuses: {error}") from error
    near_arrays("with examples in shared rows, gradients", found, learner.gradients([one]), world.tolerance(1e-5, 2e-2))
    rows = packed.sequences
    others = rows.mask & (rows.segments[:, 1:] != 2)
    changed = np.where(rows.segments == 2, (rows.tokens + 1) % 34, rows.tokens).astype(np.int32)
    before, after = (
        outputs_of(models, dataclasses.replace(packed, sequences=dataclasses.replace(rows, tokens=tokens)))
        for tokens in (rows.tokens, changed)
    )
    for name in names:
        what = f"with other tokens in the second example of a row, {name} of the others"
        same(what, np.where(others, after[name], 0), np.where(others, before[name], 0))


def sharing_rows(one: Term, groups: Sequence[Sequence[int]], columns: int = 40) -> Term:
    """The term with the examples of each group in one row, back to back."""
    sequences, rows = one.sequences, len(groups)
    arrays = {name: array for name, array in one.batch.items() if array.ndim == 2}
    wide = {"tokens": sequences.tokens, "segments": np.zeros_like(sequences.tokens)}
    wide |= {name: np.pad(array, ((0, 0), (sequences.prompt_length, 0))) for name, array in arrays.items()}
    shared = {name: np.zeros((rows, columns), array.dtype) for name, array in wide.items()}
    for row, members in enumerate(groups):
        end = 0
        for number, member in enumerate(members, 1):
            real = sequences.attention_mask[member]
            start, end = end, end + int(real.sum())
            for name, array in wide.items():
                shared[name][row, start:end] = number if name == "segments" else array[member][real]
    segments, batch = shared["segments"], {name: shared[name][:, 1:] for name in arrays}
    packed = Sequences(shared["tokens"], segments[:, :1] > 0, segments[:, 1:] > 0, batch["mask"], segments)
    return dataclasses.replace(one, sequences=packed, batch=batch)


# ----------------------------------------------------------------------------------------------------------- dropout


@check("backend", usually="bits depend on the row's place or on columns, or do not come from the seeds")
def dropout_depends_on_seeds_alone(world: World) -> None:
    """Dropout repeats, for every cut into micro-batches and behind more padding; another seed gives another dropout; rate 0 is
    none."""
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
    """With dropout the loss is that of a Llama written in numpy, with attention and MLP outputs dropped by
    `randomness.dropout_bits`; likewise without dropout."""
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
    """Log-probabilities and entropy after Touvron et al. 2023, in float64.

    Raises:
      Inapplicable: the policy is no Llama.
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


# ---------------------------------------------------------------------------------------------------------- the rest


@check("backend", usually="a version or a device is an object of the library")
def describes_itself(world: World) -> None:
    """`describe` maps text to text and includes the precision; memory is a count of bytes, or None in host memory."""
    backend, found = world.backend, world.backend.describe()
    wrong = {key: value for key, value in found.items() if not (isinstance(key, str) and isinstance(value, str))}
    require(not wrong, f"describe() has {len(wrong)} entries that are not text: {wrong}")
    require(
        found.get("precision") in ("float32", "bfloat16"), f"precision is {found.get('precision')!r}, not float32 or bfloat16"
    )
    require("device" in found, f"describe() names no device among {len(found)} entries: {sorted(found)}")
    require(isinstance(getattr(backend, "name", None), str), f"the backend's name is {getattr(backend, 'name', None)!r}")
    world.policy().evaluate(world.rollout(), ["logprobs"])
    memory = backend.peak_memory_bytes()
    right = memory is None or (isinstance(memory, int) and memory > 0)
    require(right, f"peak_memory_bytes() is {memory!r} where a positive int or None was expected")
