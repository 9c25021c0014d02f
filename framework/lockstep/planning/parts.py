"""Bytes and FLOPs by arithmetic, the same on every backend.

Weights and Adam's moments are float32. A matmul of [m, k] and [k, n] is 2 m k n FLOPs; a gradient takes twice the FLOPs of its
forward pass (Kaplan et al. 2020, section 2.1). Attention is counted in full, as for a kernel that skips no masked pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from lockstep.models.blueprint import Blueprint
from lockstep.planning.calls import Call, Planner, Shape
from lockstep.planning.rehearsal import Rehearsal

FLOAT32 = 4
FROZEN, MOMENTS = "weights, frozen", "moments"


def lasting(rehearsal: Rehearsal) -> dict[str, list[Blueprint]]:
    """Memory that lasts from step to step: {part: the models that have it}."""
    trained = [model.network for learner in rehearsal.learners for model in learner.models.values()]
    averaged = [
        model.network
        for learner in rehearsal.learners
        for name, model in learner.models.items()
        if learner.optimizers[name].ema_decay is not None
    ]
    alive = [model.network for model in rehearsal.alive()]
    trunks: dict[str, Blueprint] = {}
    for b in sorted(alive, key=lambda b: b.frozen):
        if b.adapter is not None:
            trunks[b.adapter.base] = b
    found = {
        "weights, trained": trained,
        "weights, other": list((Counter(alive) - Counter(trained)).elements()),
        FROZEN: list(trunks.values()),
        MOMENTS: trained,
        "average": averaged,
    }
    return {part: models for part, models in found.items() if models}


def held(part: str, models: Iterable[Blueprint], planner: Planner) -> int:
    """Bytes of a part of `lasting` on each device."""
    numbers = sum(planner.held(b)[part == FROZEN] for b in models)
    return FLOAT32 * numbers * (2 if part == MOMENTS else 1)


def flops(call: Call, *, shares_prompts: bool = True) -> float:
    """FLOPs of a call on all devices together. With ``shares_prompts``, a prompt of several rows is computed once, except in
    an update with dropout."""

    def computed(shape: Shape, shares: bool) -> Shape:
        return shape if shares else replace(shape, rows_per_prompt=1)

    if call.kind == "update":
        shapes = [computed(part.shape, shares_prompts and not part.dropout) for part in call.terms]
        return sum(_of_update(call.models, s, part.outputs, part.passed) for s, part in zip(shapes, call.terms, strict=True))
    shape = computed(call.shape, shares_prompts)
    if call.kind == "generate":
        return sum(_generated(b, shape) for b in call.models.values())
    return sum(forward(call.models[name], shape, outputs) for name, outputs in call.outputs.items())


def forward(blueprint: Blueprint, shape: Shape, outputs: Iterable[str]) -> float:
    b, a = blueprint, blueprint.architecture
    prompts, responses = shape.prompts, shape.rows * shape.response
    seen = shape.columns if prompts == shape.rows else shape.prompt  # columns that a prompt's token attends to
    pairs = seen * (prompts * shape.prompt * (a.layers - 1) + prompts) + shape.columns * responses * a.layers
    keys_and_values = 2 * a.hidden_size * a.kv_heads * a.head_dim
    # In the last layer, a prompt's tokens except the last need only these.
    spared = (b.multiplied / a.layers - keys_and_values) * (shape.tokens - shape.needed)
    attention = 4 * a.heads * a.head_dim * pairs
    of_logits = bool({"logprobs", "entropy", "divergence"} & set(outputs))
    head = 2 * a.vocab_size * a.hidden_size * shape.rows * shape.response * of_logits
    taught = forward(b.teacher, shape, ("logprobs",)) if b.teacher and "divergence" in outputs else 0.0
    return 2 * (b.multiplied * shape.tokens - spared) + attention + head + taught


def _of_update(models: Mapping[str, Blueprint], shape: Shape, outputs: Mapping[str, Iterable[str]], passed: bool) -> float:
    return sum((2 if passed else 3) * forward(models[name], shape, wanted) for name, wanted in outputs.items())


def _generated(b: Blueprint, shape: Shape) -> float:
    a = b.architecture
    prompt = Shape(shape.prompts, shape.prompt, 0)
    head = 2 * a.vocab_size * a.hidden_size * shape.rows * shape.response
    seen = shape.response * (shape.prompt + shape.response / 2)
    attention = 4 * a.layers * a.heads * a.head_dim * shape.rows * seen
    return forward(b, prompt, ()) + 2 * b.multiplied * shape.rows * shape.response + attention + head


def read_per_token(b: Blueprint, shape: Shape, itemsize: int) -> float:
    """Bytes read to draw one token for every row: the weights once, and the keys and values of the prompt and, on average, half
    of the response."""
    a = b.architecture
    weights = b.multiplied + a.vocab_size * a.hidden_size
    cache = 2 * a.layers * a.kv_heads * a.head_dim * shape.rows * (shape.prompt + shape.response / 2)
    return itemsize * (weights + cache)
