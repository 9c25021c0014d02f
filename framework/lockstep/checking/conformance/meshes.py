"""Several devices or processes compute what one device computes. The subject is a `World` whose backend has a mesh, and
`World.alone` is the same world on one device.

    lockstep check jax backend.mesh.fsdp=4        several devices of this process
    lockstep check torch backend.mesh.fsdp=2      two processes, which it starts
    torchrun --nproc-per-node 2 -m lockstep check torch backend.mesh.data=2

Gradients, outputs and parameters are compared in the maximum norm: the largest difference, relative to the largest number among
all arrays. Batches have `ROWS` rows, which an even number of devices does not divide, or one row, so most devices have none.

With TORCH_DISTRIBUTED_DEBUG=DETAIL in the environment, torch names processes whose collectives differ. Without it, processes
that call collectives in different orders wait for each other until they time out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.checking.conformance.backends import terms
from lockstep.checking.conformance.backends.terms import learning, near_metrics, outputs_of, pair, parameters, repeated
from lockstep.checking.conformance.kit import Inapplicable, Violation, check, near_arrays, require, same, same_arrays
from lockstep.checking.conformance.world import PAD, STOP, World
from lockstep.errors import ConfigError, OutOfStep
from lockstep.interfaces import Generated, Learner, Policy, Term
from lockstep.processes import ALONE
from lockstep.storage.weights import read_tensors
from lockstep.text.sequences import Sequences

ROWS = 7


def term(world: World, rows: int = ROWS, **given: Any) -> Term:
    return terms.term(world, rows=slice(0, rows), **given)


def drawn(world: World, policy: Policy, rows: int, temperature: float) -> Generated:
    given = *world.prompts(rows), world.seeds(rows, 12)
    return policy.generate(*given, temperature=temperature, stop_ids=[STOP], pad_id=PAD)


@check("backend", usually="rows are gathered in another order, a device draws with the seeds of its place, or rows are dropped")
def a_mesh_draws_the_tokens_of_one_device(world: World) -> None:
    """A mesh draws the same tokens and mask as one device, also for numbers of rows that it does not divide; log-probabilities
    agree up to rounding."""
    for rows, temperature in ((ROWS, 1.0), (ROWS, 0.0), (1, 1.0)):
        expected, found = (drawn(each, each.policy(), rows, temperature) for each in (world.alone, world))
        what = f"of {rows} rows at temperature {temperature:g},"
        if world.precision == "float32":  # in bfloat16, rounding may choose another token
            same(f"{what} tokens", found.tokens, expected.tokens)
            same(f"{what} mask", found.mask, expected.mask)
            near_arrays(what, {"logprobs": found.logprobs}, {"logprobs": expected.logprobs}, 2e-6)
        require(found.tokens.shape == expected.tokens.shape, f"{what} tokens have shape {found.tokens.shape}")


@check("backend", usually="gradients are averaged over devices, not added; of other rows; or without those of uneven rows")
def a_mesh_computes_what_one_device_computes(world: World) -> None:
    """Outputs and gradients equal those of one device within 2e-6 in float32, with and without dropout, also for numbers of rows
    that the mesh does not divide."""
    (mine, learner), (others, alone) = _learners(world), _learners(world.alone)
    tolerance = world.tolerance(2e-6, 2e-2)
    for rows in (ROWS, 1):
        one = term(world, rows)
        near_arrays(f"of {rows} rows, outputs", outputs_of(mine, one), outputs_of(others, one), tolerance)
        near_arrays(f"of {rows} rows, gradients", learner.gradients([one]), alone.gradients([one]), tolerance)
    with contextlib.suppress(ConfigError):  # a policy without dropout
        found, expected = (each.gradients([term(world, dropout=0.3)]) for each in (learner, alone))
        near_arrays("with dropout, gradients", found, expected, tolerance)


@check(
    "backend", usually="a part of the parameters is updated with the gradient or the moments of another, or clipped by its norm"
)
def a_mesh_learns_what_one_device_learns(world: World) -> None:
    """Three updates of several terms, with clipped gradients, weight decay and a moving average, give the same parameters,
    averages and metrics as on one device."""
    (mine, learner), (others, alone) = _learners(world), _learners(world.alone)
    for number in range(3):
        both = [term(world, seed=number), term(world, 1, seed=number + 5)]
        found, expected = learner.update(both), alone.update(both)
        near_metrics(f"update {number + 1}", found, expected, world.tolerance(1e-5, 5e-2))
    tolerance = world.tolerance(2e-6, 2e-2)
    near_arrays("after three updates, parameter", parameters(mine), parameters(others), tolerance)
    average, other = (each.averaged("policy").parameters() for each in (learner, alone))
    near_arrays("after three updates, the average of", average, other, tolerance)


@check("backend", usually="moments or averages are saved by part, or a part is read at the place of another")
def state_passes_between_a_mesh_and_one_device(world: World) -> None:
    """State saved on a mesh can be restored on one device, and back: parameters, moments and averages are bitwise equal, and the
    next update is that of the saved learner."""
    mine, learner = _learners(world)
    for number in range(2):
        learner.update([term(world, seed=number)])
    saved = _saved(learner, world.folder / "on a mesh")
    others, alone = _learners(world.alone, number=1)
    alone.restore(world.folder / "on a mesh")
    same_arrays("restored on one device, parameter", parameters(others), parameters(mine))
    _saved(alone, world.folder / "on one device")
    again, restored = _learners(world, number=1)
    restored.restore(world.folder / "on one device")
    same_arrays("restored on the mesh, parameter", parameters(again), parameters(mine))
    same_arrays("saved and restored there and back, state", _saved(restored, world.folder / "again"), saved)
    one = [term(world, seed=3)]
    found, expected = restored.update(one), learner.update(one)
    near_metrics("the next update", found, expected, world.tolerance(1e-6, 1e-2))
    repeated(world, "after the next update, parameter", parameters(again), parameters(mine))


# ---------------------------------------------------------------------------------------------------------- processes


@check("backend", usually="a collective is missing, or a process adds in another order")
def all_processes_have_the_same_bits(world: World) -> None:
    """Tokens, outputs, gradients, metrics, and parameters after updates are bitwise equal on all processes."""
    _several(world)
    models, learner = _learners(world)
    sample, one = drawn(world, models["policy"], ROWS, 1.0), term(world)
    _agree(world, "tokens", {"tokens": sample.tokens, "mask": sample.mask, "logprobs": sample.logprobs})
    _agree(world, "outputs", outputs_of(models, one))
    _agree(world, "gradients", learner.gradients([one]))
    metrics = learner.update([one, term(world, 1)])
    _agree(world, "metrics", {name: np.asarray(value) for name, value in metrics.items()})
    _agree(world, "parameters", parameters(models))


@check("backend", usually="the backend does not compare what it was given by `Processes.agree`, or only some of it")
def a_process_out_of_step_is_named(world: World) -> None:
    """If one process comes with other data, another number of rows or another call, all processes raise `OutOfStep`, which names
    it; none waits forever."""
    _several(world)
    models, learner = _learners(world)
    other = world.processes.rank == world.processes.count - 1
    wide, policy = world.rollout(), models["policy"]

    def evaluated(sequences: Sequences, outputs: tuple[str, ...] = ("logprobs",)) -> None:
        policy.evaluate(sequences, outputs)

    cases: dict[str, Callable[[], Any]] = {
        "an update with other data": lambda: learner.update([term(world, seed=int(other))]),
        "gradients of fewer rows": lambda: learner.gradients([term(world, ROWS - other)]),
        "prompts with other seeds": lambda: drawn(world, policy, ROWS - other, 1.0),
        "an evaluation of other tokens": lambda: evaluated(world.rollout(seed=int(other))),
        "an update in place of an evaluation": lambda: learner.update([term(world)]) if other else evaluated(wide),
        "other outputs": lambda: evaluated(wide, ("logprobs", "entropy") if other else ("logprobs",)),
    }
    world.backend.processes = world.processes
    try:
        for what, call in cases.items():
            try:
                call()
            except OutOfStep as error:
                name = f"Process {world.processes.count - 1} of {world.processes.count}"
                require(name in str(error), f"{what}: {name} is not in the message '{error}'")
            else:
                raise Violation(f"{what} on 1 process of {world.processes.count} is no error")
    finally:
        world.backend.processes = ALONE


def _several(world: World) -> None:
    """
    Raises:
      Inapplicable: there is one process.
    """
    _ = world.alone
    if world.processes.count == 1:
        raise Inapplicable("there is one process")


def _agree(world: World, what: str, arrays: Mapping[str, np.ndarray]) -> None:
    """
    Raises:
      Violation: an array differs on some process.
    """
    try:
        for name, array in arrays.items():
            world.processes.agree(f"{what} ({name})", array)
    except OutOfStep as error:
        raise Violation(str(error).partition(",")[0]) from error


# ----------------------------------------------------------------------------------------------------------- learners


def _learners(world: World, number: int = 0) -> tuple[dict[str, Any], Learner]:
    models = pair(world, number)
    return models, learning(world, models)


def _saved(learner: Learner, folder: Path) -> dict[str, np.ndarray]:
    """Save the learner in ``folder`` and return all tensors in its files."""
    learner.save(folder)
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.name} {name}": array for file in files for name, array in read_tensors(file).items()}
