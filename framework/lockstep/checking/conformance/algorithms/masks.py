"""Which tokens count, and that the others change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lockstep.checking.conformance.algorithms.traces import demonstrations
from lockstep.checking.conformance.kit import Inapplicable, check, near, near_arrays, require, same
from lockstep.checking.conformance.subjects import AlgorithmSubject, derivative
from lockstep.interfaces import Loss, Term
from lockstep.learning.losses import weighted_sum


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
        if rows.segments is not None:  # examples that share a row each have their own stop
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
    """A loss computed at exactly the outputs in ``at <output>`` but differentiated with respect to the models' outputs. Adding
    and subtracting a large number rounds their difference to 0."""

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
    """The term and outputs, changed so that the policy bitwise equals its old self and its reference, values equal the old
    values, and scores are equal. All numbers are multiples of 1 / 1024, so that sums are exact in any order."""
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
    """Where the policy equals its reference and scores are equal, as at the start of training, the backend's gradient agrees with
    central differences of the loss in float64."""
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
    """Exactly the response of a demonstration and its EOS count, and no token of the prompt (invariant 27)."""
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
                    continue  # raw text that is mixed in
                seen += 1
                require(words in known, f"the tokens {list(words)} count, but no demonstration has that response with EOS")
    require(seen, "of 0 demonstrations anything counts")
