"""Parameters, their files, and what uses new ones after an update."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lockstep.checking.conformance.kit import check, near, require, same, same_arrays
from lockstep.checking.conformance.policies.calls import (
    COLUMNS,
    LANGUAGE,
    ROWS,
    TEMPERATURE,
    draw,
    drawn_rows,
    evaluate,
    one_update,
)
from lockstep.checking.conformance.world import PAD, World, head, saved_weights
from lockstep.interfaces import Model
from lockstep.models import adapters


@check("policy", usually="a tensor is saved in half precision, under another name, or with the value head")
def checkpoints_round_trip(world: World) -> None:
    """`load` and `load_scalar` give back what `save` wrote, bit for bit: float32 safetensors under the names of `parameters`,
    with a config.json (for an adapter, peft's files). A value head is not part of a policy's checkpoint."""
    policy, rows = world.policy(1), world.rollout()
    folder = _saved(world, policy, "policy")
    again = type(policy).load(folder, world.backend)
    same_arrays("loaded parameter", again.parameters(), policy.parameters())
    same_arrays("loaded policy's", evaluate(again, rows), evaluate(policy, rows))
    valued = _saved(world, policy.with_value_head(), "policy with a value head")
    names, expected = (set(saved_weights(f)[1]) for f in (valued, folder))
    require(
        names == expected,
        f"with a value head the checkpoint has {len(names)} tensors, not {len(expected)}: {sorted(names ^ expected)}",
    )
    scalar = world.scalar_model(1)
    scalar.rescale(1.5, 0.25)
    again = type(policy).load_scalar(_saved(world, scalar, "scalar model"), world.backend)
    same_arrays("loaded scalar model's parameter", again.parameters(), scalar.parameters())
    same_arrays("loaded scalar model's", evaluate(again, rows), evaluate(scalar, rows))


def _saved(world: World, model: Model, name: str) -> Path:
    """Save the model, check its files and return their folder."""
    folder = world.folder / "saved" / name.replace(" ", "_")
    folder.mkdir(parents=True)
    model.save(folder)
    config = adapters.ADAPTER_CONFIG if world.adapted else "config.json"
    require((folder / config).exists(), f"{name}: save wrote {sorted(p.name for p in folder.iterdir())}, but no {config}")
    stored = {key.removeprefix(adapters.PREFIX): array for key, array in saved_weights(folder)[1].items()}
    own = model.parameters()
    missing = stored.keys() ^ own.keys() if "value head" not in name else stored.keys() - own.keys()
    require(not missing, f"{name}: {sorted(missing)} in one of the file ({len(stored)} names) and parameters() ({len(own)})")
    for key, array in stored.items():
        same(f"{name}: {key} in the file", array, own[key])
        require(array.dtype == np.float32, f"{name}: {key} is {array.dtype} in the file where float32 was expected")
    return folder


@check("policy", usually="a buffer is changed in place, or a host array is used as device memory")
def evaluation_changes_nothing(world: World) -> None:
    """Evaluating and sampling change no bit of the parameters or of the arrays passed in."""
    policy, rows, (tokens, mask), seeds = world.policy(), world.rollout(), world.prompts(ROWS), world.seeds(ROWS, COLUMNS)
    given = [rows.tokens, rows.prompt_mask, rows.response_mask, rows.mask, tokens, mask, seeds]
    copies, before = [array.copy() for array in given], policy.parameters()
    evaluate(policy, rows, TEMPERATURE)
    policy.generate(tokens, mask, seeds, temperature=TEMPERATURE, stop_ids=[], pad_id=PAD)
    same_arrays("after evaluating, parameter", policy.parameters(), before)
    names = ["tokens", "prompt_mask", "response_mask", "mask", "prompt tokens", "prompt mask", "seeds"]
    for name, array, copy in zip(names, given, copies, strict=True):
        same(f"after evaluating, the given {name}", array, copy)


@check("policy", usually="parameters() returns the arrays themselves, or views")
def parameters_are_copies(world: World) -> None:
    """Arrays from `parameters` are the caller's own: changing them does not change the model, and vice versa."""
    policy, rows = world.policy(), world.rollout()
    held = policy.parameters()
    kept, before = {name: array.copy() for name, array in held.items()}, evaluate(policy, rows)
    one_update(world, policy)
    same_arrays("taken before an update, parameter", held, kept)
    before = evaluate(policy, rows)
    for array in policy.parameters().values():
        if array.flags.writeable:
            array += 1
    same_arrays("after changing what parameters() gave,", evaluate(policy, rows), before)


@check("policy", usually="the sampler keeps its own weights, cast or merged once and stale after an update")
def all_see_the_new_weights(world: World) -> None:
    """After an update, log-probabilities, samples, heads and checkpoints use the new weights."""
    policy, rows = world.policy(), world.rollout()
    before = evaluate(policy, rows)
    draw(policy, world)
    one_update(world, policy)
    folder = world.folder / "updated"
    policy.save(folder)
    loaded = type(policy).load(folder, world.backend)
    expected, drawn = evaluate(loaded, rows), draw(policy, world)
    moved = np.abs(expected["logprobs"] - before["logprobs"]).max()
    require(moved > 0.3, f"an update moved log-probabilities by at most {moved:.3g}")
    for name, array in evaluate(policy, rows).items():
        near(f"{name} after an update", array, expected[name], world.tolerance(1e-5, 2e-2))
    forced = policy.evaluate(drawn_rows(world, drawn), LANGUAGE, temperature=TEMPERATURE)["logprobs"]
    near("the sampler's logprobs after an update", drawn.logprobs, forced, world.tolerance(1e-4, 0.2))
    values = [evaluate(p.scalar_model(head(p.hidden_size)), rows)["scores"] for p in (policy, loaded)]
    near("scores of a scalar model made after an update", *values, world.tolerance(2e-5, 4e-2))


@check("policy", usually="initial weights come from the library's own generator, or the seed is not used")
def the_same_seed_makes_the_same_policy(world: World) -> None:
    """`create` is a function of its configuration and seed: equal arguments give equal weights, and another seed gives other
    weights unless they come from a checkpoint."""
    first, again, other = (world.created(seed).parameters() for seed in (0, 0, 1))
    same_arrays("created again, parameter", again, first)
    if world.from_checkpoint:
        same_arrays("created with another seed from a checkpoint, parameter", other, first)
        _, stored = saved_weights(world.folder / "checkpoint")
        same_arrays("created from a checkpoint, parameter", {n: first.get(n, np.zeros(0)) for n in stored}, stored)
    else:
        matrices = [name for name, array in first.items() if array.ndim > 1 and array.any()]  # an adapter's B is 0 at first
        equal = [name for name in matrices if (first[name] == other[name]).all()]
        require(not equal, f"with another seed {len(equal)} of {len(matrices)} matrices are the same: {', '.join(equal[:3])}")
