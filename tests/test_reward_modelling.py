"""Training a reward model on a tiny real policy.

Expected values come from loops over tokens, from models evaluated one row at a time, or from numbers written here.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from conftest import CONSTANT, Data, relative
from lockstep.errors import MissingData
from lockstep.models.architecture import scalar_head
from lockstep.text.sequences import pack
from lockstep.types import Comparison, Prompt

LN2 = 0.69314718


@pytest.fixture
def rm(make):
    settings = {"batch_size": 4, "schedule": CONSTANT, "optimizer": {"learning_rate": 3e-3}}
    return lambda **changes: make("reward_modelling", **(settings | changes))


def completion_scores(algorithm, ranked):
    """Each completion alone through the model."""
    rows, _ = ranked
    return [float(algorithm.model.evaluate(pack([e.prompt], [e.response], 36), ["scores"])["scores"][0]) for e in rows]


def test_the_loss_is_the_mean_over_prompts_of_the_mean_over_pairs(rm):
    algorithm = rm()
    batch = algorithm.examples[:4]
    assert [ranks for _, ranks in batch] == [(1, 0), (0, 1, 2), (2, 0, 1, 0), (0, 1)]
    expected = 0.0
    for ranked in batch:
        scores, ranks = completion_scores(algorithm, ranked), ranked[1]
        pairs = list(itertools.combinations(range(len(ranks)), 2))
        for i, j in pairs:
            if ranks[i] != ranks[j]:  # ties are dropped
                better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                expected += math.log(1 + math.exp(scores[worse] - scores[better])) / len(pairs) / 4
    assert algorithm.learner.update(algorithm.terms(batch))["loss"] == pytest.approx(expected, rel=1e-5)


class NoTies(Data):
    def comparisons(self, split):
        return [c for c in super().comparisons(split) if len(set(c.ranks)) == len(c.ranks)]


def test_a_zero_head_knows_nothing_and_loses_ln_2(rm):
    algorithm = rm(data=NoTies())
    algorithm.model.rescale(0.0, 0.0)
    assert algorithm.learner.update(algorithm.terms(algorithm.examples))["loss"] == pytest.approx(LN2, abs=1e-6)


def test_a_shift_of_all_scores_changes_neither_loss_nor_accuracy(rm):
    results = []
    for bias in (0.0, 3.0):
        algorithm = rm()
        algorithm.model.rescale(1.0, bias)
        results.append(algorithm.learner.update(algorithm.terms(algorithm.examples)))
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-6)
    assert results[0]["accuracy"] == results[1]["accuracy"]


def test_a_fresh_head_has_the_scale_of_the_published_initial_loss():
    """N(0, 1/(d+1)) on unit features: 0.902 (N+); 1/(d+1) as the standard deviation would give ln 2."""
    features = np.random.default_rng(0).standard_normal((2, 4000, 512))
    chosen, rejected = features @ scalar_head(512, seed=0)
    assert np.mean(np.log1p(np.exp(rejected - chosen))) == pytest.approx(0.902, abs=0.05)


def test_gradients_of_the_reward_model_do_not_depend_on_the_micro_batch(rm):
    found = {}
    for size in (None, 1, 2, 3, 6):
        algorithm = rm(micro_batch_size=size, batch_size=6)
        found[size] = algorithm.learner.gradients(algorithm.terms(algorithm.examples[:6]))
    for size in (1, 2, 3, 6):
        assert relative(found[None], found[size]) < 1e-5, size


def test_one_forward_per_completion_and_a_comparison_is_never_cut(rm):
    algorithm = rm(micro_batch_size=2, batch_size=4)
    terms = algorithm.terms(algorithm.examples[:4])
    assert [int(term.sequences.mask.any(axis=1).sum()) for term in terms] == [5, 6]


class AllTied(Data):
    def comparisons(self, split):
        tied = Comparison(Prompt.of("w1"), ("w2", "w3"), (0, 0))
        return [tied, *super().comparisons(split)[:2], tied]


def test_comparisons_in_which_all_completions_tie_are_left_out(rm):
    assert len(rm(data=AllTied()).examples) == 2


def demonstration_scores(algorithm):
    encode, eos = algorithm.tokenizer.encode, algorithm.tokenizer.eos_id
    texts = [(d.prompt.messages[0].content, d.response) for d in Data().demonstrations("train")]
    alone = [pack([encode(prompt)], [[*encode(response), eos]], 36) for prompt, response in texts]
    return np.array([algorithm.model.evaluate(row, ["scores"])["scores"][0] for row in alone])


@pytest.mark.parametrize("normalise", ["none", "bias", "gain_and_bias"])
def test_after_normalisation_demonstrations_score_zero_on_average(rm, normalise):
    algorithm = rm(normalise=normalise)
    algorithm.model.rescale(3.0, 5.0)
    before = demonstration_scores(algorithm)
    metrics = algorithm.finish()
    after = demonstration_scores(algorithm)
    np.testing.assert_array_equal(np.argsort(before), np.argsort(after))
    if normalise == "none":
        return np.testing.assert_array_equal(before, after)
    assert after.mean() == pytest.approx(0, abs=1e-4)
    assert after.std() == pytest.approx(1 if normalise == "gain_and_bias" else before.std(), rel=1e-3)
    assert metrics["demonstrations/score_mean"] == pytest.approx(before.mean(), abs=1e-4)


class NoDemonstrations(Data):
    def demonstrations(self, split):
        raise MissingData("none")


def test_without_demonstrations_the_best_completions_score_zero_on_average(rm):
    algorithm = rm(data=NoDemonstrations())
    algorithm.finish()
    best = [completion_scores(algorithm, c)[c[1].index(0)] for c in algorithm.examples]
    assert sum(best) / len(best) == pytest.approx(0, abs=1e-4)


def test_a_reward_model_learns_its_comparisons(rm):
    algorithm = rm(epochs=20)
    metrics = [algorithm.step(step) for step in range(algorithm.total_steps)]
    assert metrics[-1]["accuracy"] > 0.999 and metrics[-1]["loss"] < 0.2 < metrics[0]["loss"]
    assert algorithm.finish()["heldout/accuracy"] == 1  # the held-out comparisons of this world are the same


def test_ties_do_not_make_the_training_loss_look_smaller(rm):
    algorithm = rm(batch_size=12)
    algorithm.model.rescale(0.0, 0.0)  # ln 2 for every pair
    metrics = algorithm.step(0)
    assert metrics["loss"] == pytest.approx(metrics["heldout/loss"])


def test_the_moving_average_of_a_reward_model_is_its_result(rm):
    algorithm = rm(optimizer={"ema_decay": 0.99}, normalise="none")
    before = algorithm.model.parameters()
    for step in range(3):
        algorithm.step(step)
    moved = algorithm.model.parameters()
    algorithm.finish()
    result = algorithm.result().parameters()
    assert relative(before, result) < 0.5 * relative(before, moved)
