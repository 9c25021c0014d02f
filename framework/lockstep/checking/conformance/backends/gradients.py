"""Gradients are derivatives, whatever the micro-batches, terms and padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from lockstep.checking.conformance.backends.terms import (
    Clipped,
    learning,
    near_metrics,
    on_host,
    outputs_of,
    pair,
    parameters,
    repeated,
    term,
)
from lockstep.checking.conformance.kit import Violation, check, near, near_arrays, require, same_arrays
from lockstep.checking.conformance.world import World, with_prompts
from lockstep.interfaces import Model, ScalarModel, Term
from lockstep.storage.weights import read_weights, write_tensors


@check("backend", usually="part of the graph is detached, or a loss is scaled before differentiation")
def gradients_are_derivatives(world: World) -> None:
    """Along each parameter's gradient plus a random direction, the loss changes at the rate that the gradient gives (central
    finite differences through checkpoints); every parameter takes part."""
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
        if model == "policy":  # if two models supply an output, the first counts
            outputs |= {name: self.outputs[name] for name in ("values", "scores")}
        return on_host(self.one.loss, outputs, self.one.batch)["loss"]


@check("backend", usually="a weight, moment or counter changes, or gradients accumulate into the next call")
def gradients_take_no_step(world: World) -> None:
    """`gradients` changes nothing: a second call returns the same, parameters stay, and a later update equals one without the
    call."""
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
    """Four neighbouring rows with the same prompt have the same gradients together as one by one."""
    rows = with_prompts(world.rollout(4), np.full(4, 3))
    learner, names = learning(world, {"policy": world.policy()}), ("logprobs", "entropy")
    alone = [term(world, names, sequences=rows, rows=slice(i, i + 1)) for i in range(4)]
    found, expected = learner.gradients([term(world, names, sequences=rows)]), learner.gradients(alone)
    near_arrays("of rows with the same prompt, gradients", found, expected, world.tolerance(1e-5, 2e-2))


@check("backend", usually="only the last term counts, or all terms use the first one's settings")
def terms_add_up(world: World) -> None:
    """The gradient of several terms is the sum of the terms' gradients, each with its own loss, rows, weights and temperature
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
