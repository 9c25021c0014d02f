"""Training a reward model."""

from __future__ import annotations

import math

import numpy as np

from lockstep.checking.conformance.algorithms.preferences import need_comparisons, require_right_order
from lockstep.checking.conformance.kit import Inapplicable, check, near, require
from lockstep.checking.conformance.subjects import AlgorithmSubject, loss_of
from lockstep.checking.conformance.world import Data
from lockstep.text import encoding


@check("algorithm", usually="log(sigmoid(x)) in two operations, or weights that do not give the mean over pairs")
def equal_scores_cost_log_two(subject: AlgorithmSubject) -> None:
    """If all scores are equal, the ranking loss is ln 2 per pair. A shift of all scores does not change it, and it is finite at
    differences of 1e4 (invariants 13, 14, 15)."""
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
    """After `finish`, demonstrations score 0 on average, and with 'gain_and_bias' their scores have standard deviation 1; 'bias'
    keeps the differences between scores (invariant 16)."""
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
