"""One step: Adam, its metrics, what it reads, and resuming after a restart."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lockstep.checking.conformance.backends.terms import (
    ADAM,
    OTHER,
    OUTPUTS,
    AtATie,
    Reads,
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
from lockstep.checking.conformance.world import World
from lockstep.errors import CheckpointError
from lockstep.interfaces import Learner, Metrics, Term
from lockstep.learning.optimisation import OptimizerConfig


@check("backend", usually="a pass outlives its weights, serves other terms, or has another temperature")
def a_forward_pass_serves_its_own_term(world: World) -> None:
    """`Learner.forward` returns the outputs of the models. A term with a pass gives the same gradient and update as without it,
    and other terms keep their gradients. A pass already used, or older than an update, is refused or rerun: it never gives a
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
            state[name][0] = found[name].astype(np.float64)  # so that rounding does not accumulate


def _adam(
    config: OptimizerConfig, step: int, lr_scale: float, state: dict[str, list[Any]], gradients: dict[str, np.ndarray]
) -> None:
    """Update [θ, m, v] in place: Kingma & Ba 2015, algorithm 1, with decoupled weight decay (Loshchilov & Hutter 2019)."""
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
    """An update returns the loss and its metrics, summed over terms and taken before the step, and the norm of each model's
    gradient before clipping."""
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
    """A loss gets the arrays of its term with values, shapes and kinds unchanged, and a namespace with the functions of the Array
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
    """Where a policy equals its reference, as at the start of DPO, the functions in preference losses have the derivative of
    their formula, the same on every backend."""
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
    """A learner trains the models it was given, in place, and no others: a reference copied earlier keeps its weights, bit for
    bit (invariant 21)."""
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
    `ema_decay` it is a copy of the weights. Training does not change the copy."""
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


@check("backend", usually="tensors that the files have and the learner lacks are passed over, or steps are read first")
def restoring_refuses_another_state(world: World) -> None:
    """Restoring a state with averages into a learner without `ema_decay`, or the reverse, raises `CheckpointError` and leaves the
    learner unchanged."""
    averaging = dataclasses.replace(OTHER, ema_decay=0.75)
    for saved, restored in ((averaging, OTHER), (OTHER, averaging)):
        models, again, untouched = ({"policy": world.policy()} for _ in range(3))
        learner, other, expected = (
            world.backend.learner(each, {"policy": optimizer})
            for each, optimizer in ((models, saved), (again, restored), (untouched, restored))
        )
        folder = world.folder / f"state of {saved.ema_decay}"
        one = term(world, ("logprobs",))
        for _ in range(2):
            learner.update([one])
        learner.save(folder)
        for each in (other, expected):
            each.update([one])
        what = f"a state with ema_decay={saved.ema_decay} in a learner with {restored.ema_decay}"
        try:
            other.restore(folder)
        except CheckpointError:
            pass
        else:
            raise Violation(f"{what} was restored")
        for each in (other, expected):
            each.update([one])
        repeated(world, f"after {what} was refused, parameter", parameters(again), parameters(untouched))
