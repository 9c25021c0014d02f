"""What an algorithm does, seen from what crosses the waist: which tokens count, where rewards land, how many steps it takes,
which seeds it uses, and that a restart changes nothing.

Which checks apply follows from the algorithm's `Traits`. Beyond that, a check that sets a configuration key (``gamma``,
``kl_target``) or reads a batch array (``returns``) or a metric (``objective/kl``) applies to every algorithm that has it under
that name. `docs/metrics.md` lists the names.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import math
import tempfile
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.checking.conformance.kit import Inapplicable, check, near, near_arrays, require, same, same_arrays
from lockstep.checking.conformance.subjects import (
    AlgorithmSubject,
    Trace,
    constant,
    derivative,
    loss_of,
    missing_sometimes,
    uneven,
)
from lockstep.checking.conformance.world import Data, Talks
from lockstep.checking.tap import EvaluateCall, GenerateCall, ScoreCall
from lockstep.errors import RewardError, listing
from lockstep.interfaces import Loss, Metrics, Responses, Term
from lockstep.learning import randomness
from lockstep.learning.episodes import EnvironmentConfig
from lockstep.learning.losses import weighted_sum
from lockstep.text import encoding

NO_WHITENING: dict[str, Any] = {"whiten_advantages": False, "whiten_rewards": False}


def timeless(metrics: Metrics) -> Metrics:
    """Drop timings, which differ between two equal runs."""
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def the_metric(metrics: Metrics, name: str) -> float:
    """
    Raises:
      Inapplicable: it is not logged.
    """
    if name not in metrics:
        raise Inapplicable(f"it does not log {name}")
    return metrics[name]


def in_batch(trace: Trace, name: str, step: int = 0) -> list[Term]:
    """The terms whose loss reads the array ``name``.

    Raises:
      Inapplicable: there are none.
    """
    if not (terms := [term for term in trace.terms(step) if name in term.batch]):
        raise Inapplicable(f"its losses read no array called {name}")
    return terms


# --------------------------------------------------------------------------------------------------- steps and batches


@check("algorithm", usually="`Algorithm.traits` is inherited from another algorithm, or its defaults were left")
def its_traits_are_true(subject: AlgorithmSubject) -> None:
    """It samples as often as `traits` says: so many responses per prompt, in so many rounds and turns, or none."""
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
    """Each step makes as many updates as `traits` says; the number of steps is what the configuration says (invariant 7)."""
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
    """Gradients, loss and metrics of an update do not depend on cutting it into micro-batches (invariant 6)."""
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
    """The metrics that rounding alone decides, such as the accuracy of a policy that equals its reference: they jump when the
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
    if subject.traits.data == "demonstrations":  # others may be mixed in
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


def examples_of(term: Term) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(tokens before those that count, tokens that count) of each example, of which several may share a row."""
    rows, found = term.sequences, []
    segments = np.where(rows.attention_mask, 1, 0) if rows.segments is None else rows.segments
    counts = np.concatenate([np.zeros_like(rows.prompt_mask), rows.mask], axis=1)
    for tokens, here, counted in zip(rows.tokens, segments, counts, strict=True):
        for number in range(1, int(here.max(initial=0)) + 1):
            mine = here == number
            if (mine & counted).any():
                found.append((tuple(tokens[mine & ~counted].tolist()), tuple(tokens[mine & counted].tolist())))
    return found


def demonstrations(subject: AlgorithmSubject) -> set[tuple[int, ...]]:
    """The token ids of each demonstration's response, with EOS."""
    tokenizer = subject.world.tokenizer
    return {tuple(tokenizer.encode(d.response) + [tokenizer.eos_id]) for d in subject.data.demonstrations("train")}


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


# ----------------------------------------------------------------------------------------------------------------- masks


@check("algorithm", usually="the mask comes from the padding, or it is off by one at the stop token")
def nothing_after_the_stop_token_counts(subject: AlgorithmSubject) -> None:
    """Neither tokens after EOS nor padding count in the loss (invariant 10)."""
    eos = subject.world.tokenizer.eos_id
    for term in subject.run(4).terms()[:6]:
        rows = term.sequences
        require(
            not (rows.mask & ~rows.response_mask).any(), f"{int((rows.mask & ~rows.response_mask).sum())} padded columns count"
        )
        stops = (rows.responses == eos) & rows.mask
        before = np.cumsum(stops, axis=1) - stops
        if rows.segments is not None:  # of examples in one row, each stops by itself
            here = rows.segments[:, rows.prompt_length :]
            earlier = np.tril(np.ones((here.shape[1],) * 2), -1) * (here[:, :, None] == here[:, None, :])
            before = (earlier * stops[:, None, :]).sum(axis=2)
        late = int((rows.mask & (before > 0)).sum())
        require(not late, f"{late} of {int(rows.mask.sum())} tokens that count come after the stop token")
        if "logprobs" in term.loss.outputs and rows.mask.size <= 200:
            outside = float(np.abs(derivative(term, subject.outputs(term), "logprobs")[~rows.mask]).max(initial=0))
            require(outside == 0, f"the loss has derivative {outside:.3g} in the log-probability of a token that does not count")


@check("algorithm", usually="pad and EOS are the same token, or the mask ends one token too early")
def the_stop_token_is_learned(subject: AlgorithmSubject) -> None:
    """EOS itself is in the loss: a policy learns to stop (invariant 10)."""
    eos, seen, taught = subject.world.tokenizer.eos_id, 0, 0
    trace = subject.run(4)
    first = [term for step in range(4) for update in trace.updates(step)[:1] for term in update.terms]  # no ratio is clipped yet
    for term in (term for term in first if "logprobs" in term.loss.outputs):
        rows = term.sequences
        stops = (rows.responses == eos) & rows.response_mask & rows.mask.any(axis=1)[:, None]  # other rows are padding
        if rows.segments is not None:  # a text may start from EOS
            stops &= rows.segments[:, rows.prompt_length :] == rows.segments[:, rows.prompt_length - 1 : -1]
        if not stops.any():
            continue
        require(rows.mask[stops].all(), f"{int((stops & ~rows.mask).sum())} of {int(stops.sum())} stop tokens do not count")
        slopes = derivative(term, subject.outputs(term), "logprobs")
        others = (np.where(stops, 0, slopes) != 0).any(axis=1)[:, None]  # a response with advantage 0 teaches nothing
        seen += int((stops & others).sum())
        taught += int((slopes[stops & others] != 0).sum())
        if taught:
            return
    require(not seen, f"the loss has derivative 0 in the log-probabilities of all {seen} stop tokens")
    raise Inapplicable("none of its losses reads the log-probability of a stop token")


@dataclass(frozen=True)
class AtOutputs:
    """A loss at exactly the outputs in ``at <output>``, differentiated in the models' own: a large number that comes and goes
    rounds their difference to 0."""

    loss: Loss

    @property
    def outputs(self) -> Sequence[str]:
        return self.loss.outputs

    def __call__(self, xp: Any, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        there = {
            n: outputs[n] - batch[f"at {n}"] + batch[f"large {n}"] - batch[f"large {n}"] + batch[f"at {n}"] for n in self.outputs
        }
        return self.loss(xp, there, batch)


@dataclass(frozen=True)
class Slopes:
    """Σ slope · output, for each output."""

    outputs: tuple[str, ...]

    def __call__(self, xp: Any, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        return sum(weighted_sum(xp, outputs[n], batch[f"slope {n}"]) for n in self.outputs), {}


def at_a_tie(subject: AlgorithmSubject, term: Term) -> tuple[Term, dict[str, np.ndarray]]:
    """The term and outputs such that the policy is bitwise its old self and its reference, values are the old ones, and scores
    are equal. All are multiples of 1 / 1024, so that sums are exact in any order."""
    grid = lambda x: np.round(np.asarray(x, np.float64) * 1024) / 1024  # noqa: E731
    mask, batch, outputs = term.sequences.mask, dict(term.batch), subject.outputs(term)
    close = subject.world.tolerance(1e-2, 0.5)
    for name, found in outputs.items():
        inside = mask if found.ndim == 2 else mask.any(axis=1)
        if name in subject.world.policy().supplies:
            sums = np.where(mask, found, 0).sum(axis=1) if found.ndim == 2 else found
            outputs[name] = tied = np.where(inside, grid(found), 0)
            for key, array in batch.items():
                if array.shape == found.shape and np.abs(array - found)[inside].max(initial=0) < close:
                    batch[key] = tied.astype(np.float32)
                elif array.shape == sums.shape and np.abs(array - sums)[mask.any(axis=1)].max(initial=0) < close:
                    batch[key] = tied.sum(axis=1).astype(np.float32)
        else:
            outputs[name] = np.where(inside, grid(batch.get(f"old_{name}", np.zeros(found.shape))), 0)
            if f"old_{name}" in batch:
                batch[f"old_{name}"] = outputs[name].astype(np.float32)
    return replace(term, batch=batch, dropout=None, forward=None), outputs


@check("algorithm", usually="abs, or max of a thing and itself, whose gradient at 0 each library chooses; or a detached part")
def gradients_at_ties_are_the_losss(subject: AlgorithmSubject) -> None:
    """Where the policy equals its reference and scores are equal, as at the start of training, the backend's gradient is that of
    the loss by central differences in float64."""
    trace = subject.first_terms()
    learner = trace.algorithm.learner
    for number, loss in enumerate(dict.fromkeys(term.loss for term in trace.terms())):
        term, outputs = at_a_tie(subject, next(term for term in trace.terms() if term.loss == loss))
        fixed, slopes = dict(term.batch), dict(term.batch)
        for name, array in outputs.items():
            fixed |= {f"at {name}": array.astype(np.float32), f"large {name}": np.full(array.shape, 2.0**27, np.float32)}
            slopes[f"slope {name}"] = derivative(term, outputs, name, step=2.0**-12).astype(np.float32)
        found = learner.gradients([replace(term, loss=AtOutputs(loss), batch=fixed)])
        expected = learner.gradients([replace(term, loss=Slopes(tuple(outputs)), batch=slopes)])
        what = f"at a tie, the gradient of loss {number + 1} ({type(loss).__name__}) in"
        near_arrays(what, found, expected, subject.world.tolerance(1e-3, 5e-2))


@check("algorithm", usually="masking by multiplication instead of selection: 0 x NaN is NaN")
def masked_outputs_are_inert(subject: AlgorithmSubject) -> None:
    """Model outputs for masked tokens and padded rows change no bit of loss or metrics (invariant 9)."""
    for term in subject.run(1).updates()[0].terms:
        outputs, mask = subject.outputs(term), term.sequences.mask
        for garbage in (np.nan, 1e30):
            dirty = {n: np.where(mask if a.ndim == 2 else mask.any(axis=1), a, garbage) for n, a in outputs.items()}
            clean, other = (term.loss(np, values, term.batch) for values in (outputs, dirty))
            same(f"with {garbage:g} under the mask, the loss", float(other[0]), float(clean[0]))
            for name in clean[1]:
                same(f"with {garbage:g} under the mask, {name}", float(other[1][name]), float(clean[1][name]))


@check("algorithm", usually="each row is averaged first, so a token of a short response weighs more")
def every_token_weighs_the_same(subject: AlgorithmSubject) -> None:
    """In a next-token loss each counted token has weight 1 / n, where n counts the whole update (invariant 27)."""
    for micro_batch_size in (None, 2):
        for update in subject.first_terms(micro_batch_size=micro_batch_size).updates():
            terms = [term for term in update.terms if term.loss.outputs == ("logprobs",) and set(term.batch) == {"weights"}]
            if len(terms) < len(update.terms):
                raise Inapplicable("its loss is not a plain next-token loss")
            slopes = np.concatenate([derivative(t, subject.outputs(t), "logprobs")[t.sequences.mask] for t in terms])
            near("the weight of each token", -slopes * len(slopes), np.ones(len(slopes)), 1e-4)


@check("algorithm", usually="the prompt is trained on too, or a demonstration lacks its EOS")
def only_the_response_counts(subject: AlgorithmSubject) -> None:
    """Of a demonstration, exactly the response and its EOS count, and nothing of the prompt (invariant 27)."""
    subject.need_trait(subject.traits.data == "demonstrations", "it does not learn from demonstrations")
    subject.need_trait(not getattr(subject.config, "prompt_loss", False), "prompt_loss=true was asked for")
    known, seen = demonstrations(subject), 0
    for term in subject.run(1).terms():
        rows = term.sequences
        counted = derivative(term, subject.outputs(term), "logprobs") != 0
        segments = np.where(rows.response_mask, 1, 0) if rows.segments is None else rows.segments[:, rows.prompt_length :]
        for prompt, tokens, here, counts in zip(rows.prompt_mask, rows.responses, segments, counted, strict=True):
            for number in range(1, int(here.max(initial=0)) + 1):
                words = tuple(tokens[counts & (here == number)].tolist())
                if rows.segments is None and prompt.sum() == 1:
                    continue  # raw text, mixed in
                seen += 1
                require(words in known, f"the tokens {list(words)} count, but no demonstration has that response with EOS")
    require(seen, "of 0 demonstrations anything counts")


# --------------------------------------------------------------------------------------------------------- reinforcement


@check("algorithm", usually="log-probabilities not at the sampler's temperature, or dropout in one of two forward passes")
def the_first_update_is_on_policy(subject: AlgorithmSubject) -> None:
    """Before the first step the ratio is 1, whatever the temperature: approx_kl and clip_fraction are 0 (invariant 1)."""
    first = subject.run(1).updates()[0].metrics
    names = [name for name in ("policy/approx_kl", "policy/clip_fraction") if name in first]
    if not names:
        raise Inapplicable("it logs neither policy/approx_kl nor policy/clip_fraction")
    for name in names:
        near(f"{name} of the first update", first[name], 0.0, subject.world.tolerance(1e-6, 1e-2))


@check("algorithm", usually="the reference is not the initial policy, or is evaluated at another temperature")
def kl_is_zero_before_the_first_step(subject: AlgorithmSubject) -> None:
    """objective/kl of step 0 is 0: the policy equals its reference, at every temperature (invariant 1)."""
    for temperature in (0.7, 1.0):
        kl = the_metric(subject.run(1, temperature=temperature).metrics[0], "objective/kl")
        near(f"objective/kl of step 0 at temperature {temperature:g}", kl, 0.0, subject.world.tolerance(1e-5, 5e-2))


@check("algorithm", usually="the reference is the trained policy itself, or is reset during training")
def kl_is_of_the_policy_from_its_start(subject: AlgorithmSubject) -> None:
    """objective/kl is the mean over responses of the *sum* over counted tokens of log pi - log pi_ref, at the temperature of
    the sampler (Ziegler et al. 2019); the reference is the initial policy."""
    trace = subject.run(2)
    logged = the_metric(trace.metrics[1], "objective/kl")
    own = trace.own_evaluation(1)
    temperature = trace.generation(1).temperature
    start = subject.world.policy().evaluate(own.sequences, ["logprobs"], temperature=temperature)["logprobs"]
    sums = np.where(own.sequences.mask, own.outputs["logprobs"].astype(np.float64) - start, 0).sum(axis=1)
    near("objective/kl of step 1", logged, sums.mean(), subject.world.tolerance(1e-4, 5e-2))


@check("algorithm", usually="means over all columns, padding included")
def means_leave_padding_out(subject: AlgorithmSubject) -> None:
    """Logged entropy, length and score are means over the counted tokens and responses (section 5)."""
    trace = subject.run(2)
    own = trace.own_evaluation(1)
    mask, metrics = own.sequences.mask, trace.metrics[1]
    scores = [scoring.scores for scoring in trace.of(ScoreCall, 1)]
    expected = {"objective/length": mask.sum(axis=1).mean()}
    if "entropy" in own.outputs:
        expected["objective/entropy"] = own.outputs["entropy"][mask].mean()
    if scores:
        expected["objective/score"] = np.concatenate(scores).mean()
    for name, value in expected.items():
        if name in metrics:
            near(name, metrics[name], value, 1e-4 * max(1.0, abs(value)))


@check("algorithm", usually="the score is on a pad token, the first token or several tokens, or in an integer array")
def the_reward_lands_once(subject: AlgorithmSubject) -> None:
    """With gamma = lambda = 1, values of 0 and no KL, the return at every counted token is the score, 0.73, which is on the last
    token (invariant 11)."""
    subject.need_reward_model()
    subject.need("gamma", "lam")
    changes = {"gamma": 1.0, "lam": 1.0, "unfinished_score": None, **NO_WHITENING}
    trace = subject.first_terms(reward=constant, **changes)
    tolerance = subject.world.tolerance(1e-4, 2e-2)
    for term in in_batch(trace, "returns"):
        mask = term.sequences.mask
        near("returns", np.where(mask, term.batch["returns"], 0.73), np.full(mask.shape, 0.73), tolerance)
    discounted = subject.first_terms(reward=constant, **{**changes, "gamma": 0.5})
    for term in in_batch(discounted, "returns"):
        mask = term.sequences.mask
        distance = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] - 1
        near("returns at gamma 0.5", np.where(mask, term.batch["returns"], 0), np.where(mask, 0.73 * 0.5**distance, 0), tolerance)


@check("algorithm", usually="the penalty is missing, has the wrong sign, or is a mean instead of a sum")
def the_penalty_is_in_the_reward(subject: AlgorithmSubject) -> None:
    """objective/reward = objective/score - kl_coef x objective/kl once the policy has moved (invariant 11)."""
    subject.need_reward_model()
    subject.need_trait(subject.traits.kl in ("reward", "return"), f"its KL is not in the reward: kl={subject.traits.kl}")
    metrics = subject.run(3, unfinished_score=None, **NO_WHITENING).metrics[2]
    score, kl, coef = (the_metric(metrics, name) for name in ("objective/score", "objective/kl", "kl_coef"))
    require(kl != 0, "objective/kl is still 0 after two steps")
    near("objective/reward", the_metric(metrics, "objective/reward"), score - coef * kl, 1e-4 * max(1.0, abs(score)))


@check("algorithm", usually="eos_token_id is used instead of the configured stop token, or the score is lowered, not replaced")
def unfinished_responses_are_marked_down(subject: AlgorithmSubject) -> None:
    """unfinished_score replaces the score of a response that does not end with the configured stop token; others keep theirs
    (invariant 12)."""
    subject.need_reward_model()
    subject.need("unfinished_score", "gamma", "lam")
    trace = subject.first_terms(reward=constant, gamma=1.0, lam=1.0, unfinished_score=-1.0, **NO_WHITENING)
    stop, seen = subject.world.tokenizer.eos_id, set()
    for term in in_batch(trace, "returns"):
        mask = term.sequences.mask
        finished = ((term.sequences.responses == stop) & mask).any(axis=1)
        expected = np.where(finished, 0.73, -1.0)[:, None] * np.ones(mask.shape)
        returns = np.where(mask, term.batch["returns"], expected)
        near("returns (0.73 where finished, -1 where cut off)", returns, expected, subject.world.tolerance(1e-4, 2e-2))
        seen |= set(finished.tolist())
    require(seen == {True, False}, f"the rollout does not have both kinds of responses, only finished = {seen}")


@check("algorithm", usually="whitening per minibatch, with padding, or of rewards instead of advantages")
def advantages_are_whitened_over_the_batch(subject: AlgorithmSubject) -> None:
    """With whiten_advantages, the advantages of all counted tokens of the batch have mean 0 and variance 1; those of a minibatch
    need not (invariant 17)."""
    subject.need("whiten_advantages", "minibatches")
    trace = subject.first_terms(whiten_advantages=True)
    terms = in_batch(trace, "advantages")
    one_epoch = terms[: len(terms) // subject.config.epochs]
    values = np.concatenate([term.batch["advantages"][term.sequences.mask] for term in one_epoch]).astype(np.float64)
    near("the mean of the batch's advantages", values.mean(), 0.0, 1e-5)
    near("their variance", values.var(), 1.0, 1e-3)
    means = [float(term.batch["advantages"][term.sequences.mask].mean()) for term in one_epoch]
    require(len(means) == 1 or max(map(abs, means)) > 1e-3, f"each minibatch was whitened separately: their means are {means}")


@check("algorithm", usually="advantages are not whitened, or weights do not sum to 1")
def the_first_policy_loss_is_zero(subject: AlgorithmSubject) -> None:
    """With whitened advantages, one minibatch and ratio 1, the first policy loss is 0 (invariant 2)."""
    subject.need("whiten_advantages", "minibatches")
    trace = subject.run(1, whiten_advantages=True, minibatches=1)
    near("policy/loss", the_metric(trace.updates()[0].metrics, "policy/loss"), 0.0, subject.world.tolerance(1e-6, 1e-2))


def moved(subject: AlgorithmSubject, ratio: float, advantage: float) -> np.ndarray:
    """∂ loss / ∂ log π of the first update's tokens that count, had the policy moved by this ratio, with this advantage.

    Raises:
      Inapplicable: its losses read no old log-probabilities.
    """
    term = next((t for t in in_batch(subject.run(1), "advantages") if "old_logprobs" in t.batch), None)
    if term is None:
        raise Inapplicable("its losses read no array called old_logprobs")
    outputs, mask = subject.outputs(term), term.sequences.mask & term.batch.get("mask", term.sequences.mask)
    batch = dict(term.batch)
    batch["old_logprobs"] = np.where(mask, outputs["logprobs"] - np.log(ratio), 0)
    batch["advantages"] = np.where(mask, advantage, 0.0)
    for name in batch.keys() & {"ref_logprobs"}:  # no slope of a KL term
        batch[name] = np.where(mask, outputs["logprobs"], 0)
    return derivative(replace(term, batch=batch), outputs, "logprobs")[mask]


@check("algorithm", usually="max and min are swapped, or advantages have the wrong sign")
def clipping_binds(subject: AlgorithmSubject) -> None:
    """A ratio above the clip's bounds with a positive advantage, or below them with a negative one, has gradient 0; the other two
    do not (invariant 20)."""
    subject.need_trait(subject.traits.clip == "ratio", f"its ratio is not clipped: clip={subject.traits.clip}")
    low, high = subject.traits.bounds
    above, below = 1.6 * high, 0.6 * low
    cases = [(above, 1.0, True), (above, -1.0, False)] + ([(below, -1.0, True), (below, 1.0, False)] if low > 0 else [])
    for ratio, advantage, bound in cases:
        slopes = moved(subject, ratio, advantage)
        largest, downhill = np.abs(slopes).max(), (np.sign(slopes) == -np.sign(advantage)).all()
        where = f"at ratio {ratio:g} and advantage {advantage:+g} the derivative in log-probabilities is"
        require((largest < 1e-9) == bound, f"{where} {largest:.3g}")
        require(bound or downhill, f"{where} {slopes[0]:+.3g}: it raises the loss where it should lower it")


@check("algorithm", usually="bounds are taken for distances from 1, or the weight is part of the gradient")
def the_weight_is_clipped(subject: AlgorithmSubject) -> None:
    """The gradient of a token's log-probability is -advantage x the ratio, clipped to the bounds: it does not vanish beyond them
    (CISPO: MiniMax 2025, eq. 4 and 5)."""
    subject.need_trait(subject.traits.clip == "weight", f"it does not clip weights: clip={subject.traits.clip}")
    low, high = subject.traits.bounds
    for advantage in (1.0, -1.0):
        at_one = moved(subject, 1.0, advantage)
        require((np.sign(at_one) == -advantage).all(), f"at ratio 1 and advantage {advantage:+g} the slope is {at_one[0]:+.3g}")
        for ratio in (0.6 * low, 0.3, 2.0, 1.4 * high):
            if ratio > 0:
                what = f"at ratio {ratio:g} and advantage {advantage:+g}, the weight"
                near(what, moved(subject, ratio, advantage) / at_one, np.full(at_one.shape, np.clip(ratio, low, high)), 1e-3)


@check("algorithm", usually="min instead of max, or values are clipped around the returns instead of the old values")
def value_clipping_only_raises_the_loss(subject: AlgorithmSubject) -> None:
    """A value that moved beyond old_values +- value_clip_range towards the return has gradient 0; one that moved away from the
    return keeps its gradient, so clipping never lowers the loss (invariant 19)."""
    subject.need("value_clip_range")
    reach = subject.config.value_clip_range
    term = in_batch(subject.run(1), "old_values")[0]
    outputs, mask = subject.outputs(term), term.sequences.mask
    for target, bound in ((3.0, True), (-3.0, False)):
        batch = dict(term.batch)
        batch["old_values"] = np.where(mask, outputs["values"] - 2 * reach, 0)
        batch["returns"] = np.where(mask, batch["old_values"] + target * reach, 0)
        largest = np.abs(derivative(replace(term, batch=batch), outputs, "values")[mask]).max()
        where = f"two clip ranges above the old value, and with the return {target:+g} from it, the derivative in values is"
        require((largest == 0) == bound, f"{where} {largest:.3g}")


@check("algorithm", usually="lambda has no effect, an index is off by one, or padding's value follows the last token")
def advantages_are_sums_of_errors(subject: AlgorithmSubject) -> None:
    """A_t = sum of (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, with V = 0 after the last token, and the
    return is A_t + V_t (Schulman et al. 2016, eq. 16; invariant 8). Without KL the score is the only reward."""
    subject.need_reward_model()
    subject.need("gamma", "lam", "kl_coef")
    gamma, lam = 0.9, 0.5
    trace = subject.run(3, reward=constant, gamma=gamma, lam=lam, kl_coef=0.0, unfinished_score=None, **NO_WHITENING)
    largest = 0.0
    for term in in_batch(trace, "old_values", 2):
        mask = term.sequences.mask
        advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
        for row, count in enumerate(mask.sum(axis=1)):
            values = np.append(term.batch["old_values"][row, :count].astype(np.float64), 0.0)
            errors = np.where(np.arange(count) == count - 1, 0.73, 0.0) + gamma * values[1:] - values[:-1]
            for t in range(count):
                advantages[row, t] = sum((gamma * lam) ** k * error for k, error in enumerate(errors[t:]))
            returns[row, :count] = advantages[row, :count] + values[:-1]
            largest = max(largest, np.abs(values).max())
        tolerance = subject.world.tolerance(1e-5, 1e-4)
        near("advantages", np.where(mask, term.batch["advantages"], 0), advantages, tolerance)
        near("returns", np.where(mask, term.batch["returns"], 0), returns, tolerance)
    require(largest > 0, "all values are still 0 after two steps")


@check("algorithm", usually="the controller gets KL per token, or lacks its clip at 0.2")
def the_kl_controller_follows_its_rule(subject: AlgorithmSubject) -> None:
    """kl_coef *= 1 + clip(KL / target - 1, -0.2, 0.2) x episodes / horizon with the KL per response, after each step
    (Ziegler et al. 2019, 2.2; invariant 18)."""
    subject.need("kl_target", "kl_horizon")
    trace = subject.run(2)
    kl, episodes = the_metric(trace.metrics[1], "objective/kl"), len(trace.generation(0).seeds)
    horizon = 8.0 * episodes
    for target in (abs(kl) / 1.1, 1e3, 1e-6):
        metrics = subject.run(2 if target == 1e3 else 3, kl_target=target, kl_horizon=horizon).metrics
        for step in range(len(metrics) - 1):
            error = min(max(metrics[step]["objective/kl"] / target - 1, -0.2), 0.2)
            expected = metrics[step]["kl_coef"] * (1 + error * episodes / horizon)
            near(f"with kl_target={target:.3g}, kl_coef of step {step + 1}", metrics[step + 1]["kl_coef"], expected, 1e-9)


@check("algorithm", usually="ptx_coef multiplies the wrong term, or raw texts replace some episodes")
def the_pretraining_mix_is_added(subject: AlgorithmSubject) -> None:
    """ptx_coef adds ptx_coef x the next-token loss on raw text to each update and leaves the other terms alone (invariant
    24)."""
    subject.need("ptx_coef", "ptx_ratio")
    plain = subject.run(1).updates()[0]
    mixed = subject.first_terms(ptx_coef=3.0, ptx_ratio=1.0).updates()[0]
    extra = mixed.terms[len(plain.terms) :]
    require(extra, f"an update with ptx_coef=3 has {len(mixed.terms)} terms, no more than without")
    for one, other in zip(plain.terms, mixed.terms, strict=False):
        same("the tokens of a term beside the mix", other.sequences.tokens, one.sequences.tokens)
        for name in one.batch:
            same(f"{name} of a term beside the mix", other.batch[name], one.batch[name])
    value = sum(loss_of(term, {"logprobs": np.full(term.sequences.mask.shape, -2.0)}) for term in extra)
    near("the mix's loss with every log-probability at -2 and ptx_coef=3", value, 6.0, 1e-4)


@check("algorithm", usually="the log ratio is differentiated, has the wrong sign, or the teacher reads at another temperature")
def the_teacher_grades_each_token(subject: AlgorithmSubject) -> None:
    """The derivative of the first loss in the log-probability of a sampled token is proportional to log pi - log teacher, at the
    temperature of the sampler (invariant 29)."""
    subject.need("teacher")
    terms = [term for term in subject.run(1).updates()[0].terms if term.loss.outputs == ("logprobs",)]
    if not terms:
        raise Inapplicable("its loss does not read the log-probabilities of sampled tokens alone")
    for term in terms:
        mask, unit = term.sequences.mask, lambda x: x / np.linalg.norm(x)
        student, teacher = (
            subject.world.policy(n).evaluate(term.sequences, ["logprobs"], temperature=0.7)["logprobs"].astype(np.float64)
            for n in (0, 1)
        )
        slopes = derivative(term, {"logprobs": student}, "logprobs")[mask]
        expected = unit((student - teacher)[mask])
        near("the direction of the derivative", unit(slopes), expected, subject.world.tolerance(1e-3, 5e-2))


# ----------------------------------------------------------------------------------------------------------- environments


@check("algorithm", usually="the loss is over all real tokens of an episode: the policy learns to speak for its tools")
def what_was_said_is_not_trained_on(subject: AlgorithmSubject) -> None:
    """In an episode with an environment only what the policy sampled counts, turn by turn, and the outputs for what the
    environment said do not reach the loss (invariant 30)."""
    subject.need_trait(subject.cls.takes_environment, "it takes no environment")
    changes: dict[str, Any] = {"lengths": {"response": 16}, "stop_strings": ["w1", "w2", "w3"]}
    environment = Talks(EnvironmentConfig(turns=2, turn_tokens=6))
    trace, gaps = subject.run(1, environment=environment, learns=False, **changes), 0
    drawn = {
        tuple(tokens[:length])
        for call in trace.of(GenerateCall, 0)
        for tokens in call.generated.tokens.tolist()
        for length in range(1, len(tokens) + 1)
    }
    for term in trace.terms(0):
        rows = term.sequences
        for tokens, mask in zip(rows.responses, rows.mask, strict=True):
            turns = np.split(tokens, np.flatnonzero(np.diff(mask)) + 1)[not mask[0] :: 2] if mask.any() else []
            wrong = [turn.tolist() for turn in turns if tuple(turn.tolist()) not in drawn]
            require(not wrong, f"the tokens {wrong[:1]} count, and no turn of the policy has them")
        said = rows.response_mask & ~rows.mask & rows.mask.any(axis=1, keepdims=True)
        gaps += int(said.any(axis=1).sum())
        outputs = subject.outputs(term)
        noise = randomness.generator(0, "said").normal(size=said.shape)
        moved = {n: a + np.where(said, noise, 0) if a.shape == said.shape else a for n, a in outputs.items()}
        near("the loss under other outputs for what was said", loss_of(term, moved), loss_of(term, outputs), 1e-9)
    require(gaps, "0 of the rows that it trains on have a second turn")


# ---------------------------------------------------------------------------------------------------------------- groups


def by_prompt(responses: Responses) -> np.ndarray:
    """The same score for all responses to a prompt, and another for another prompt."""
    rows = responses.sequences
    tokens = np.where(rows.prompt_mask, rows.tokens[:, : rows.prompt_length], 0)
    return np.sin(0.3 + tokens.sum(axis=1)).astype(np.float32)


def by_prompt_partly(responses: Responses) -> np.ndarray:
    """`by_prompt`, but for about a third that has no score."""
    rows = responses.sequences
    return np.where(missing_sometimes(rows.tokens), np.nan, by_prompt(responses)).astype(np.float32)


def by_prompt_if_finished(responses: Responses) -> np.ndarray:
    """`by_prompt`, but 100 for responses without EOS."""
    rows = responses.sequences
    finished = ((rows.responses == responses.tokenizer.eos_id) & rows.mask).any(axis=1)
    return np.where(finished, by_prompt(responses), 100).astype(np.float32)


def need_groups(subject: AlgorithmSubject) -> None:
    """
    Raises:
      Inapplicable: it does not compare the responses to a prompt.
    """
    subject.need_trait(subject.traits.compares, "it does not compare the responses to a prompt")


def advantages_of(trace: Trace) -> dict[bytes, float]:
    """{a row's tokens: its advantage} of the rows of the first step in which something counts.

    Raises:
      Inapplicable: its losses read no advantages.
    """
    found = {}
    for term in in_batch(trace, "advantages"):
        counted = term.sequences.mask & term.batch.get("mask", term.sequences.mask)
        for tokens, mask, row in zip(term.sequences.tokens, counted, term.batch["advantages"], strict=True):
            if mask.any():
                found[tokens.tobytes()] = float(row[mask].mean(dtype=np.float64))
    return found


SCORES_ALONE = {"kl_coef": 0.0, "unfinished_score": None, "overlong_buffer": None}


@check("algorithm", usually="all samples of a prompt share a seed, or a group's rows are not neighbours")
def a_prompt_has_several_samples(subject: AlgorithmSubject) -> None:
    """Each prompt is sampled as often as `traits` says, in neighbouring rows, each with seeds of its own."""
    subject.need_trait((k := subject.traits.samples) > 1, "it takes one sample per prompt, or none")
    generation = subject.run(1).generation(0)
    rows = len(generation.seeds)
    groups = generation.prompt_tokens.reshape(-1, k, generation.prompt_tokens.shape[1])
    same(f"the prompts of each {k} neighbouring rows", groups, np.repeat(groups[:, :1], k, axis=1))
    prompts = len(np.unique(groups[:, 0], axis=0))
    require(prompts == min(len(groups), Data.rows), f"{rows} rows are of {prompts} prompts, not of {len(groups)}")
    distinct = len(np.unique(generation.seeds, axis=0))
    require(distinct == rows, f"{rows} samples have only {distinct} different rows of seeds")


@check("algorithm", usually="division by a deviation of almost 0, or a baseline of the batch instead of the prompt")
def equal_rewards_say_nothing(subject: AlgorithmSubject) -> None:
    """If all responses to a prompt have the same score, their advantages are exactly 0, whatever other prompts score."""
    need_groups(subject)
    trace = subject.first_terms(reward=by_prompt, **subject.free(samples=7), **SCORES_ALONE)
    largest = max(map(abs, advantages_of(trace).values()))
    require(largest == 0, f"the largest advantage is {largest:.3g}")


@check("algorithm", usually="a missing score became 0, or a response that does not count is still in its prompt's mean")
def responses_that_do_not_count_shift_nothing(subject: AlgorithmSubject) -> None:
    """A response without a score, or one that is masked, is no part of its group: the others' advantages stay exactly 0 if their
    scores are equal."""
    need_groups(subject)
    changes = {**SCORES_ALONE, "extra_rounds": 0}
    cases = {"without a score": subject.first_terms(reward=by_prompt_partly, **changes)}
    if hasattr(subject.config, "mask_unfinished"):
        cases["unfinished, masked and scored 100"] = subject.first_terms(
            reward=by_prompt_if_finished, mask_unfinished=True, **changes
        )
    for what, trace in cases.items():
        advantages = advantages_of(trace)
        largest = max(map(abs, advantages.values()), default=0.0)
        require(largest == 0, f"beside responses {what}, the largest of {len(advantages)} advantages is {largest:.3g}")


@check("algorithm", usually="responses are compared across prompts, or the sign is wrong")
def the_better_response_has_the_higher_advantage(subject: AlgorithmSubject) -> None:
    """Within each prompt, advantages are in the order of scores: not negative for the best, not positive for the worst."""
    need_groups(subject)
    trace = subject.first_terms(**SCORES_ALONE)
    advantages, prompts = advantages_of(trace), collections.defaultdict(dict)
    for scoring in trace.of(ScoreCall, 0):
        rows = scoring.responses.sequences
        for tokens, score in zip(rows.tokens, scoring.scores, strict=True):
            if (row := tokens.tobytes()) in advantages:
                prompts[tokens[: rows.prompt_length].tobytes()][row] = float(score)
    require(prompts, f"none of {len(advantages)} rows that were trained on had been scored")
    for number, scores in enumerate(prompts.values()):
        ordered = sorted((score, advantages[row]) for row, score in scores.items())
        rising = all(b[1] >= a[1] for a, b in itertools.pairwise(ordered))
        right = rising and ordered[0][1] <= 1e-6 and ordered[-1][1] >= -1e-6
        require(right, f"prompt {number}: (score, advantage) are {[(round(a, 4), round(b, 4)) for a, b in ordered]}")


@check("algorithm", usually="the group is judged by its shaped scores, or the extra rounds draw the same prompts again")
def prompts_that_say_nothing_are_replaced(subject: AlgorithmSubject) -> None:
    """With extra_rounds, a group whose scores are all equal gives way to another prompt's, even if a penalty makes its rewards
    differ (DAPO, section 3.2)."""
    changes: dict[str, Any] = {"extra_rounds": 4, "unfinished_score": -1.0, "lengths": {"response": 6}, "overlong_buffer": 3}
    changes = subject.free(**changes)
    traits = subject.cls.traits(subject.configured(**changes)[1])
    subject.need_trait(traits.rounds > 1 and traits.samples > 1, "it never replaces a prompt")
    calls = subject.first_terms(reward=by_prompt, **changes).of(GenerateCall, 0)
    most = traits.rounds
    require(len(calls) == most, f"{len(calls)} batches are sampled where all groups are equal, not {most}")
    first, second = ({row.tobytes() for row in np.ascontiguousarray(call.prompt_tokens)} for call in calls[:2])
    require(first != second, f"the second round samples for the same {len(first)} prompts")


# ----------------------------------------------------------------------------------------------------------- preferences


def need_comparisons(subject: AlgorithmSubject, produces: str) -> None:
    """
    Raises:
      Inapplicable: it does not make this from comparisons.
    """
    subject.need_trait(subject.traits.data == "comparisons", "it does not learn from comparisons")
    subject.need_trait(subject.cls.produces == produces, f"it trains no {produces.replace('_', ' ')}")


def places(subject: AlgorithmSubject) -> dict[tuple[int, ...], tuple[bool, bool]]:
    """{token ids of a completion, with EOS: whether it is a best and whether it is a worst one of its comparison}; without those
    of several comparisons."""
    tokenizer, found, times = subject.world.tokenizer, {}, collections.Counter()
    for comparison in subject.data.comparisons("train"):
        for completion, rank in zip(comparison.completions, comparison.ranks, strict=True):
            ids = tuple(tokenizer.encode(completion) + [tokenizer.eos_id])
            found[ids] = (rank == min(comparison.ranks), rank == max(comparison.ranks))
            times[ids] += 1
    return {ids: place for ids, place in found.items() if times[ids] == 1}


def slopes_of_completions(subject: AlgorithmSubject, terms: Sequence[Term], output: str) -> dict[tuple[int, ...], float]:
    """{token ids of a completion: the derivative of an update's loss in its log-probability or score, summed over its rows}."""
    found: dict[tuple[int, ...], float] = collections.defaultdict(float)
    for term in terms:
        rows = term.sequences
        outputs = {"scores": np.zeros(rows.rows)} if output == "scores" else subject.outputs(term)
        slopes = derivative(term, outputs, output)
        if output != "scores":
            slopes = np.where(rows.mask, slopes, 0).sum(axis=1)
        for tokens, mask, slope in zip(rows.responses, rows.mask, slopes, strict=True):
            if mask.any():
                found[tuple(tokens[mask].tolist())] += float(slope)
    return found


def require_right_order(subject: AlgorithmSubject, terms: Sequence[Term], output: str) -> None:
    """
    Raises:
      Violation: the loss does not fall with a best completion's output, or does not rise with a worst one's.
    """
    known, seen = places(subject), 0
    for ids, slope in slopes_of_completions(subject, terms, output).items():
        first, last = known.get(ids, (False, False))
        seen += first or last
        require(not first or slope < 0, f"the loss has derivative {slope:+.3g} in the {output} of a best completion")
        require(not last or slope > 0, f"the loss has derivative {slope:+.3g} in the {output} of a worst completion")
    require(seen, "none of the completions is a best or a worst one: 0 of the update's rows are")


@check(
    "algorithm",
    usually="the prompt's tokens count, or rows and references are in different orders",
)
def references_are_the_first_policys(subject: AlgorithmSubject) -> None:
    """``ref`` is the log-probability of each completion under the initial policy, summed over its tokens."""
    subject.need_trait(subject.traits.kl != "none", "it has no reference")
    for term in in_batch(subject.run(1), "ref"):
        rows = term.sequences
        policy = subject.world.policy()
        found = policy.evaluate(rows, ["logprobs"], temperature=term.temperature)["logprobs"].astype(np.float64)
        expected = np.where(rows.mask, found, 0).sum(axis=1)
        counted = rows.mask.any(axis=1)
        near("ref", term.batch["ref"][counted], expected[counted], subject.world.tolerance(1e-4, 0.2))


@check("algorithm", usually="chosen and rejected are swapped, or ties count as pairs")
def the_preferred_completion_is_raised(subject: AlgorithmSubject) -> None:
    """The loss falls with the log-probability of the best completion of a prompt and rises with that of the worst."""
    need_comparisons(subject, "policy")
    require_right_order(subject, subject.run(1).updates()[0].terms, "logprobs")


@check("algorithm", usually="one of the names falls back to another's loss")
def every_loss_is_another(subject: AlgorithmSubject) -> None:
    """Each name that the key ``loss`` may have gives another loss of the same outputs."""
    subject.need("loss")
    names = typing.get_args(typing.get_type_hints(type(subject.config)).get("loss"))
    first, found = subject.run(1).updates()[0].terms[0], {}
    outputs = subject.outputs(first)
    moved = randomness.generator(0, "moved").normal(size=first.sequences.mask.shape)
    outputs["logprobs"] = outputs["logprobs"] + 0.3 * moved
    for name in names:
        for others in ({"label_smoothing": 0.1}, {}):  # robust differs from dpo by it, and others refuse it
            with contextlib.suppress(Inapplicable):
                term = subject.first_terms(loss=name, **others).updates()[0].terms[0]
                if set(term.loss.outputs) <= outputs.keys():  # else it is another, of other outputs
                    found[name] = loss_of(term, outputs)
                break
    if len(found) < 2:
        raise Inapplicable(f"only {listing(found)} can be chosen here")
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        require(abs(a - b) > 1e-6 * max(1.0, abs(a)), f"loss={one} and loss={other} both give {a:.7g}")


@check("algorithm", usually="pairs are rolled over the batch for one model, and over the micro-batch for the other")
def the_reference_reads_what_the_policy_reads(subject: AlgorithmSubject) -> None:
    """In each step, what the reference evaluates is what the policy evaluates: otherwise their difference is no KL."""
    trace, seen = subject.run(2), 0
    for step in range(2):
        own: list[dict[bytes, int]] = [collections.Counter(), collections.Counter()]
        for call in trace.of(EvaluateCall, step):
            if "logprobs" in call.outputs and getattr(call.model, "supplies", ()) and "entropy" in call.model.supplies:
                trained = any(call.model is model for model in trace.trained().values())
                own[trained].update(row.tobytes() for row in call.sequences.tokens[call.sequences.response_mask.any(axis=1)])
        missing = own[0].keys() - own[1].keys()
        seen += len(own[0])
        require(not missing, f"{len(missing)} of {len(own[0])} rows that the reference reads in step {step} are not the policy's")
    if not seen:
        raise Inapplicable("no reference is evaluated during a step")


@check("algorithm", usually="the order is reversed, which leaves the middle of an odd batch in place, or another batch is read")
def mismatched_pairs_are_of_the_batch(subject: AlgorithmSubject) -> None:
    """KTO's ``z`` is estimated from the batch's own prompts and completions, none of them with the prompt it belongs to."""
    in_batch(subject.run(1), "z")
    trace = subject.run(2, batch_size=5)
    place = [model for model in trace.trained().values()]
    rows = [row for term in trace.terms(1) for row in examples_of(term)]
    matched, completions = set(rows), {response for _, response in rows}
    pairs = []
    for call in trace.of(EvaluateCall, 1):
        if any(call.model is model for model in place):
            pairs += examples_of(Term(trace.terms(1)[0].loss, call.sequences, {}))
    require(pairs, "it evaluates 0 mismatched pairs")
    own = sum(pair in matched for pair in pairs)
    require(not own, f"{own} of {len(pairs)} mismatched pairs are completions of their own prompts")
    others = {response for _, response in pairs} ^ completions
    require(not others, f"{len(others)} completions are in one of the batch and its mismatched pairs, and not in the other")


def pairs_of_samples(subject: AlgorithmSubject, reward: Any) -> list[tuple[float, float]]:
    """The scores of every two responses (preferred, other) that an update compares.

    Raises:
      Inapplicable: it is not an algorithm that compares what it samples.
    """
    subject.need_reward_model()
    in_batch(subject.run(1), "pairs")
    trace = subject.run(1, reward=reward, kl_coef=0.0, unfinished_score=None)
    place: dict[bytes, float] = {}
    for scoring in trace.of(ScoreCall, 0):
        rows = np.ascontiguousarray(scoring.responses.sequences.tokens)
        place |= {row.tobytes(): score for row, score in zip(rows, scoring.scores, strict=True)}
    found = []
    for term in trace.terms(0):
        scores = [place[row.tobytes()] for row in np.ascontiguousarray(term.sequences.tokens)]
        grid = np.reshape(scores, term.batch["pairs"].shape[:2])
        found += [(float(grid[n, i]), float(grid[n, j])) for n, i, j in np.argwhere(term.batch["pairs"] > 0)]
    return found


@check("algorithm", usually="rewards are taken for costs, or rows are compared in another order than they are scored")
def the_better_response_is_preferred(subject: AlgorithmSubject) -> None:
    """Of two sampled responses that an update compares, the preferred one has the higher score."""
    found = pairs_of_samples(subject, uneven)
    wrong = [pair for pair in found if not pair[0] > pair[1]]
    require(found and not wrong, f"{len(wrong)} of {len(found)} pairs prefer the lower score: {wrong[:3]}")


@check("algorithm", usually="the first response counts as the best of equals")
def equal_scores_make_no_pairs(subject: AlgorithmSubject) -> None:
    """Responses of equal score are not compared."""
    found = pairs_of_samples(subject, by_prompt)
    require(not found, f"{len(found)} pairs of equal scores are compared")


# --------------------------------------------------------------------------------------------------------- reward models


@check("algorithm", usually="log(sigmoid(x)) in two operations, or weights that do not give the mean over pairs")
def equal_scores_cost_log_two(subject: AlgorithmSubject) -> None:
    """If all scores are equal, the ranking loss is ln 2 per pair. A shift does not change it, and it is finite at differences of
    1e4 (invariants 13, 14, 15)."""
    need_comparisons(subject, "reward_model")
    terms = [term for term in subject.run(1).terms() if term.loss.outputs == ("scores",)]
    if not terms:
        raise Inapplicable("none of its losses reads scores alone")
    for term in terms:
        rows = term.sequences.rows
        scores = np.linspace(-1, 1, rows)
        far = 1e4 * scores
        require(np.isfinite(loss_of(term, {"scores": far})), "the loss is not finite at differences of 1e4")
        near("the loss after a shift of 5", loss_of(term, {"scores": scores + 5}), loss_of(term, {"scores": scores}), 1e-6)
        pairs = sum(float(array.sum()) for array in term.batch.values() if array.ndim == 2)
        near("the loss of equal scores", loss_of(term, {"scores": np.zeros(rows)}), pairs * math.log(2), 1e-6)


@check("algorithm", usually="better and worse completions are swapped, or ties count as preferences")
def the_better_completion_is_raised(subject: AlgorithmSubject) -> None:
    """The gradient of the ranking loss raises the best completion of each comparison and lowers the worst; tied completions do
    not move against each other (invariant 14)."""
    need_comparisons(subject, "reward_model")
    require_right_order(subject, subject.run(1).terms(), "scores")


@check("algorithm", usually="normalised before the end of training, on other samples, or with the gain applied twice to the bias")
def scores_are_normalised(subject: AlgorithmSubject) -> None:
    """After `finish`, demonstrations score 0 on average, with 'gain_and_bias' at standard deviation 1, and responses keep their
    order (invariant 16)."""
    subject.need("normalise")
    config = subject.config
    examples = encoding.encode_demonstrations(subject.world.tokenizer, Data().demonstrations("train"), config.lengths)
    rows = encoding.block(examples, subject.world.tokenizer, config.lengths)
    found = {}
    for how in ("none", "bias", "gain_and_bias"):
        algorithm, _ = subject.build(normalise=how)
        algorithm.step(0)
        algorithm.finish()
        found[how] = algorithm.result().evaluate(rows, ["scores"])["scores"].astype(np.float64)
    tolerance = subject.world.tolerance(1e-4, 2e-2)
    near("the mean score of demonstrations", [found["bias"].mean(), found["gain_and_bias"].mean()], [0, 0], tolerance)
    near("their standard deviation with gain_and_bias", found["gain_and_bias"].std(), 1.0, tolerance)
    near("differences of scores", np.diff(found["bias"]), np.diff(found["none"]), tolerance)


# --------------------------------------------------------------------------------------------------------------- failures


def failing(responses: Any) -> np.ndarray:
    raise RewardError("the endpoint is down")


def partly(responses: Any) -> np.ndarray:
    return np.where(missing_sometimes(responses.sequences.tokens), np.nan, uneven(responses)).astype(np.float32)


def none_of_a_prompt(responses: Responses) -> np.ndarray:
    """No score for any response to the first row's prompt."""
    rows = responses.sequences
    prompts = rows.tokens[:, : rows.prompt_length]
    return np.where((prompts == prompts[0]).all(axis=1), np.nan, uneven(responses)).astype(np.float32)


def never(responses: Any) -> np.ndarray:
    return np.full(len(responses.texts), np.nan, np.float32)


@check("algorithm", usually="an `except` around the reward model that continues with zeros")
def failed_rewards_are_heard(subject: AlgorithmSubject) -> None:
    """A failing reward model stops the step with its reason; so does one that scores nothing (section 5)."""
    subject.need_reward_model()
    for reward in (failing, never):
        algorithm, _ = subject.build(reward=reward, learns=False)
        try:
            metrics = algorithm.step(0)
        except Exception:
            continue
        raise_with = {name: value for name, value in metrics.items() if name.startswith("objective/")}
        require(False, f"training continued with a reward model that gives no score ({reward.__name__}): {raise_with}")


@check("algorithm", usually="NaN is replaced by 0, or spreads over the whole batch through a mean")
def episodes_without_a_score_are_left_out(subject: AlgorithmSubject) -> None:
    """An episode whose score is NaN has no weight, and the others' losses and metrics stay finite."""
    subject.need_reward_model()
    for reward in (partly, none_of_a_prompt):
        trace = subject.run(1, reward=reward)
        missing = {row.tobytes() for scoring in trace.of(ScoreCall, 0)
                   for row, score in zip(scoring.responses.sequences.tokens, scoring.scores, strict=True)
                   if np.isnan(score)}  # fmt: skip
        for term in (term for term in trace.terms() if "logprobs" in term.loss.outputs):
            for number, row in enumerate(term.sequences.tokens):
                counted = int(term.sequences.mask[number].sum())
                require(row.tobytes() not in missing or not counted, f"{counted} tokens of an episode without a score count")
        for name, value in timeless(trace.metrics[0]).items():
            require(np.isfinite(value), f"{name} is {value} after a step where episodes had no score ({reward.__name__})")


@check("algorithm", usually="numpy arrays in the state, or an array as a metric")
def it_reports_in_plain_numbers(subject: AlgorithmSubject) -> None:
    """Metrics are floats, `state` and `samples` are JSON, `arithmetic` is one line."""
    trace = subject.run(4)
    for step, metrics in enumerate(trace.metrics):
        for name, value in metrics.items():
            require(isinstance(value, float | int), f"{name} of step {step} is a {type(value).__name__}: {value!r}")
    json.dumps([trace.algorithm.state(), trace.algorithm.samples()])
    line = subject.cls.arithmetic(subject.config, Data())
    require(line and "\n" not in line, f"arithmetic says {line!r}")
