"""Steps, batches, seeds and restarts."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.checking.conformance.algorithms.traces import demonstrations, examples_of, timeless
from lockstep.checking.conformance.kit import Inapplicable, check, near, near_arrays, require, same, same_arrays
from lockstep.checking.conformance.subjects import AlgorithmSubject, Trace
from lockstep.checking.conformance.world import Data
from lockstep.checking.tap import GenerateCall
from lockstep.interfaces import Term
from lockstep.learning import randomness


@check("algorithm", usually="`Algorithm.traits` is inherited from another algorithm, or its defaults were left")
def its_traits_are_true(subject: AlgorithmSubject) -> None:
    """The algorithm samples as `traits` says: that many responses per prompt, in at most that many rounds and turns, or none."""
    traits, trace = subject.traits, subject.run(4)
    for step in range(len(trace.steps)):
        calls = trace.of(GenerateCall, step)
        most = traits.rounds * traits.turns if traits.samples else 0
        require(len(calls) <= most, f"step {step} samples {len(calls)} times; its traits say {most} at most")
        require(bool(calls) == bool(traits.samples), f"step {step} samples {len(calls)} times; samples={traits.samples}")
        for call in calls[: traits.rounds]:
            rows = len(call.seeds)
            require(rows % traits.samples == 0, f"{rows} rows are sampled, not a multiple of samples={traits.samples}")


@check("algorithm", usually="an extra step at the end of a pass, or `minibatches` has no effect")
def optimizer_steps_are_counted(subject: AlgorithmSubject) -> None:
    """Each step makes as many updates as `traits` says; the number of steps follows from the configuration (invariant 7)."""
    config = subject.config
    traces = [(subject.run(4), subject.traits)]
    if subject.traits.epochs == "episodes" and hasattr(config, "minibatches"):
        with contextlib.suppress(Inapplicable):
            _, other = subject.configured(minibatches=3)
            traces.append((subject.first_terms(minibatches=3), subject.cls.traits(other)))
    for trace, traits in traces:
        counts = [len(trace.updates(step)) for step in range(len(trace.steps))]
        expected = traits.updates
        require(expected and counts == [expected] * len(counts), f"{counts} updates in the first steps, not {expected} in each")
    total = traces[0][0].algorithm.total_steps
    if hasattr(config, "iterations"):
        require(total == config.iterations, f"total_steps is {total} where iterations is {config.iterations}")
    elif subject.traits.epochs == "data" and hasattr(config, "epochs") and hasattr(config, "batch_size"):
        size = config.batch_size - round(getattr(config, "pretrain_mix", 0) * config.batch_size)
        expected = max(1, math.ceil(config.epochs * Data.rows / size))
        says = f"{config.epochs:g} epochs of {Data.rows} examples in batches of {size}"
        require(total == expected, f"total_steps is {total} where {says} are {expected}")


@check("algorithm", usually="the mean of the micro-batches' means, which is a different loss once lengths differ")
def micro_batches_do_not_matter(subject: AlgorithmSubject) -> None:
    """Gradients, loss and metrics of an update do not depend on how it is cut into micro-batches (invariant 6)."""
    subject.need("micro_batch_size")
    whole = subject.run(1).updates()[0]
    cut = subject.run(1, micro_batch_size=2).updates()[0]
    require(len(cut.terms) > len(whole.terms), f"micro_batch_size=2 makes {len(cut.terms)} terms, no more than null")
    tolerance = subject.world.tolerance(2e-5, 5e-2)
    near_arrays("with micro_batch_size=2, the gradient of", cut.gradients, whole.gradients, tolerance)
    for name in whole.metrics.keys() - jumping(subject, whole.terms):
        scale = max(1.0, abs(whole.metrics[name]))
        near(f"with micro_batch_size=2, {name}", cut.metrics[name], whole.metrics[name], tolerance * scale)


def jumping(subject: AlgorithmSubject, terms: Sequence[Term]) -> set[str]:
    """The metrics that rounding alone decides, such as the accuracy of a policy that equals its reference. They jump when the
    models' outputs move by 1e-6."""
    noise, found = randomness.generator(0, "noise"), []
    for size in (0.0, 1e-6, 1e-6, 1e-6, 1e-6):
        sums: dict[str, float] = {}
        for term in terms:
            outputs = {n: a + size * noise.normal(size=a.shape) for n, a in subject.outputs(term).items()}
            for name, value in term.loss(np, outputs, term.batch)[1].items():
                sums[name] = sums.get(name, 0.0) + float(value)
        found.append(sums)
    near_it = lambda name, value: all(abs(value - sums[name]) <= 1e-3 * max(1.0, abs(value)) for sums in found[1:])  # noqa: E731
    return {name for name, value in found[0].items() if not near_it(name, value)}


@check("algorithm", usually="a private random number generator, or a shared one that other code has used")
def the_same_seed_is_the_same_run(subject: AlgorithmSubject) -> None:
    """Two runs of one seed are bitwise equal; another seed gives another run (invariant 25)."""
    first, second = subject.run(4), subject.run(4, again=True)
    for step, (one, other) in enumerate(zip(first.metrics, second.metrics, strict=True)):
        require(timeless(one).keys() == timeless(other).keys(), f"step {step} logs different metrics in a second run")
        for name, value in timeless(one).items():
            same(f"{name} of step {step} in a second run", other[name], value)
    same_arrays("after a second run, the parameter", second.parameters(), first.parameters())
    third = subject.first_terms(seed=1)
    equal = all(
        np.array_equal(a.sequences.tokens, b.sequences.tokens) for a, b in zip(first.terms(0), third.terms(0), strict=False)
    )
    require(not equal, f"with seeds 0 and 1 it trains on the same {len(first.terms(0))} blocks of tokens in step 0")


@check("algorithm", usually="state missing from both the learner's checkpoint and `state`, or a generator that restarts")
def restarts_change_nothing(subject: AlgorithmSubject) -> None:
    """Two steps, a restart from the checkpoint and two more steps equal four steps, bitwise: weights, metrics, samples
    (invariant 29)."""
    episodes = len(generations[0].seeds) if (generations := subject.run(1).of(GenerateCall, 0)) else 1
    changes: dict[str, Any] = subject.free(kl_target=0.01, kl_horizon=8.0 * episodes)
    if hasattr(subject.config, "optimizer"):
        changes |= subject.free(optimizer={"ema_decay": 0.9})
    whole = subject.run(4, **changes)
    begun = subject.run(2, again=True, **changes)
    algorithm, tap = subject.build(**changes)
    with tempfile.TemporaryDirectory() as folder:
        begun.algorithm.learner.save(Path(folder))
        algorithm.learner.restore(Path(folder))
    algorithm.load_state(json.loads(json.dumps(begun.algorithm.state())))
    rest = Trace(algorithm, tap, {}, [], [])
    subject.go_on(rest, 2, 4)
    for step, (one, other) in enumerate(zip(whole.metrics[2:], rest.metrics, strict=True), 2):
        for name, value in timeless(one).items():
            same(f"{name} of step {step} after a restart", other.get(name), value)
    same_arrays("after a restart, the parameter", rest.parameters(), whole.parameters())
    result, expected = (trace.algorithm.result().parameters() for trace in (rest, whole))
    same_arrays("after a restart, the result's parameter", result, expected)


@check("algorithm", usually="the trained policy is its own reference, or the value network shares weights with the reward model")
def reference_models_are_untouched(subject: AlgorithmSubject) -> None:
    """A model outside the learner keeps its weights, bit for bit (invariant 21)."""
    trace = subject.run(3)
    trained = list(trace.trained().values())
    for position, before in trace.models.items():
        model = trace.tap.models[position]
        if not any(model is each for each in trained):
            same_arrays("of a model that is not trained, the parameter", model.parameters(), before)


@check("algorithm", usually="the learner got copies, or a learning rate of 0: the run trains nothing and reports success")
def training_moves_the_result(subject: AlgorithmSubject) -> None:
    """After four steps `result` differs from the start; with ema_decay it is the moving average (InstructGPT: 0.992)."""
    fresh, _ = subject.build(learns=False)
    start = fresh.result().parameters()
    result = subject.run(4).algorithm.result().parameters()
    moved = max(float(np.abs(result[name] - start[name]).max()) for name in result if name in start)
    require(moved > 0, f"none of {len(result)} parameters changed in 4 steps: the largest change is 0")
    if not hasattr(subject.config, "optimizer"):
        return
    algorithm = subject.run(3, optimizer={"ema_decay": 0.9}, again=True).algorithm
    algorithm.finish()
    result = algorithm.result().parameters()
    for name, model in algorithm.learner.models.items():
        last = model.parameters()
        matrices = [key for key in result if key in last and last[key].ndim > 1]
        equal = all(np.array_equal(result[key], last[key]) for key in matrices)
        require(not equal, f"with ema_decay=0.9 all {len(matrices)} matrices of the result equal the final ones of the {name}")


@check("algorithm", usually="one generator key for every update, or one order for all passes")
def orders_are_fresh(subject: AlgorithmSubject) -> None:
    """Every update has fresh seeds and a fresh order; a pass reads each example once (invariant 25, section 5)."""
    trace = subject.run(4)
    if sampled := [generation.seeds for generation in trace.of(GenerateCall)]:
        seeds = np.concatenate([s.ravel() for s in sampled])
        repeated = len(seeds) - len(np.unique(seeds))
        require(repeated <= 2, f"{repeated} of {len(seeds)} sampling seeds were used before")
        orders = [order for step in range(len(trace.steps)) for order in minibatch_orders(trace, step)]
        if len(trace.terms(0)) == len(minibatch_orders(trace, 0)):
            return  # one term per pass, of all rows: their order does not affect the result
        require(
            len(orders) < 2 or len(set(orders)) > 1,
            f"all {len(orders)} passes over the batches go through their rows in the order {list(orders[0]) if orders else ''}",
        )
        return
    examples = [example for term in trace.terms() for example in examples_of(term)]
    if subject.traits.data == "demonstrations":  # other examples may be mixed in
        known = demonstrations(subject)
        examples = [(p, r) for p, r in examples if any((p + r)[-len(ids) :] == ids for ids in known)]
    times = collections.Counter(examples)
    if subject.cls.produces == "policy":
        require(
            max(times.values()) - min(times.values()) <= 1,
            f"of {len(times)} examples one was read {max(times.values())} times, and another {min(times.values())}",
        )
    count = len(times)
    first, second = examples[:count], examples[count : 2 * count]
    if len(second) < count:
        raise Inapplicable(f"four steps read {len(examples)} examples, less than two passes over {count}")
    require(first != second, f"both passes read their {count} examples in the same order")


def minibatch_orders(trace: Trace, step: int) -> list[tuple[int, ...]]:
    """For each pass over a rollout, the order of its rows in the updates."""
    rollout = trace.generation(step)
    tokens = np.concatenate([rollout.prompt_tokens, rollout.generated.tokens], axis=1)
    place = {row.tobytes(): number for number, row in enumerate(tokens)}
    seen = [
        place[row.tobytes()] for term in trace.terms(step) for row in np.ascontiguousarray(term.sequences.tokens)
        if term.sequences.tokens.shape[1] == tokens.shape[1] and row.tobytes() in place
    ]  # fmt: skip
    return [tuple(seen[i : i + len(tokens)]) for i in range(0, len(seen) - len(tokens) + 1, len(tokens))]
