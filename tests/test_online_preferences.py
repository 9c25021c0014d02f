"""Preference optimisation on the policy's own samples: which pairs, what they weigh, and what they teach."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conftest import BACKENDS, CONSTANT, Scored, configure
from lockstep.config.compose import compose
from lockstep.config.schema import parse
from lockstep.errors import ConfigError
from lockstep.learning.online import Clock
from lockstep.registry import registry
from lockstep.runs.experiment import Experiment
from lockstep_rlhf.algorithms.online_preferences import OnlinePreferences
from lockstep_rlhf.algorithms.preference_optimisation import preference_arrays

MADE = {"batch_size": 6, "temperature": 0.7, "schedule": CONSTANT, "unfinished_score": None}
REWARDS = np.array([[1.0, 3.0, 2.0], [5.0, 5.0, 4.0], [7.0, 7.0, 7.0], [1.0, 9.0, 2.0]])
COUNTED = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 1]], bool)


@pytest.fixture(scope="session")
def backend():
    """One is enough for what happens on the host; the conformance kit runs on both."""
    cls = registry().resolve("backend", "torch", "torch")
    return cls(parse(cls.Config, BACKENDS["torch"], "backend"))


def chosen(how):
    config = configure("online_preferences", pairs=how, samples=3)[1]
    algorithm = OnlinePreferences.__new__(OnlinePreferences)
    algorithm.config = config
    return [sorted(map(tuple, np.argwhere(pairs > 0).tolist())) for pairs in algorithm.pairs(REWARDS, COUNTED)]


def test_the_best_is_preferred_to_the_worst_and_equals_are_no_pair():
    assert chosen("best_worst") == [[(1, 0)], [(0, 2)], [], [(2, 0)]]
    assert chosen("all") == [[(1, 0), (1, 2), (2, 0)], [(0, 2), (1, 2)], [], [(2, 0)]]


def test_the_arrays_of_a_ranking_name_its_best_and_its_worst():
    pairs = np.zeros((2, 3, 3))
    pairs[0, 1, 0] = pairs[0, 1, 2] = pairs[0, 2, 0] = 1 / 6  # 1 > 2 > 0
    arrays = preference_arrays(pairs, np.ones((2, 3), bool), 2)
    assert arrays["best"].tolist() == [0, 0.5, 0, 0, 0, 0] and arrays["worst"].tolist() == [0.5, 0, 0, 0, 0, 0]


def by_length(responses):
    return responses.sequences.mask.sum(axis=1).astype(np.float32)


def test_every_prompt_with_a_pair_weighs_alike_and_the_first_loss_is_log_two(make):
    algorithm = make("online_preferences", reward_model=Scored(by_length), samples=3, pairs="all", minibatches=2, **MADE)
    rollout = algorithm.rollout(0, Clock())
    rows, batch, metrics = algorithm.prepare(rollout)
    k = algorithm.config.compared
    scores = rollout.scores.reshape(6, 3)
    assert metrics["pairs/share"] == np.mean(scores.max(axis=1) > scores.min(axis=1))
    assert metrics["pairs/gap"] == pytest.approx((scores.max(axis=1) - scores.min(axis=1)).mean())
    (term,) = algorithm.terms(rollout.sequences.take(rows), batch, np.arange(6))
    assert term.sequences.rows == 6 * k and term.batch["pairs"].sum() == pytest.approx(1)
    per_prompt = term.batch["pairs"].sum(axis=(1, 2))
    assert len(set(np.round(per_prompt[per_prompt > 0], 6))) == 1
    for n, i, j in np.argwhere(term.batch["pairs"] > 0):
        assert rollout.scores[rows[n * k + i]] > rollout.scores[rows[n * k + j]]
    assert [rows.size for _, rows in algorithm.passes(0)] == [3, 3]  # prompts of each minibatch
    loss, _ = term.loss(np, {"logprobs": rollout.old_logprobs[rows].astype(np.float64)}, term.batch)
    assert loss == pytest.approx(math.log(2), abs=1e-5)


def test_the_reward_model_is_learned_from(make):
    """Longer responses score higher, and become likelier."""
    settings = {"iterations": 10, "optimizer": {"learning_rate": 1e-2}}
    algorithm = make("online_preferences", reward_model=Scored(by_length), **settings, **MADE)
    lengths = [algorithm.step(step)["objective/length"] for step in range(10)]
    assert np.mean(lengths[-3:]) > np.mean(lengths[:3]) + 1


def test_a_batch_without_a_pair_changes_nothing(make):
    algorithm = make("online_preferences", reward_model=Scored(lambda r: np.ones(len(r.texts))), **MADE)
    before = algorithm.result().parameters()
    metrics = algorithm.step(0)
    assert metrics["pairs/share"] == metrics["pairs/gap"] == 0 and "preference/loss" not in metrics
    after = algorithm.result().parameters()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_minibatch_without_a_pair_is_in_no_mean(make):
    """Two of six prompts have a pair, so at least one of three minibatches has none. The first loss is log 2 for any pair."""
    scores = np.zeros(12, np.float32)
    scores[[0, 2]] = 1
    settings = {"samples": 2, "minibatches": 3, **MADE, "optimizer": {"learning_rate": 1e-9}}
    algorithm = make("online_preferences", reward_model=Scored(lambda r: scores), **settings)
    metrics = algorithm.step(0)
    assert metrics["preference/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert algorithm.learner.steps == 3


def test_a_round_of_iterated_dpo_starts_from_the_stored_result_of_the_last(tmp_path):
    """As docs/algorithms.md writes it: the reference of a round is in a folder that no restart changes."""
    second = "+stages.ppo_2={algorithm: ${algorithm}, policy: ppo, reward_model: ${reward_model}, seed_offset: 1000}"
    experiment = Experiment(compose(["algorithm=online_dpo", "~stages.evaluate", second, f"folder={tmp_path}"]))
    folders = {name: folder.path.name for name, folder in experiment.folders.items()}
    assert experiment.identities["ppo_2"]["inputs"] == {name: folders[name] for name in ("ppo", "reward")}


def test_a_correction_is_refused():
    with pytest.raises(ConfigError, match="Unknown key algorithm.correction"):
        configure("online_preferences", correction={"kind": "truncate"})
