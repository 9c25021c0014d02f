"""Warnings by name: silent on the demo's own numbers, and each of them heard when one thing about those goes wrong."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from lockstep.interfaces import Algorithm
from lockstep.reporting.health import REARM, RULES, Finding, Health, moving_mean, standard_error
from lockstep.storage.files import read_json
from lockstep_rlhf.algorithms.ppo import PPO
from runs import PPO_ONLY, tiny

DEMO = json.loads((Path(__file__).parent / "fixtures" / "demo_metrics.json").read_text())
"""Of `lockstep run experiment=demo` on torch, seed 0: four digits of every metric of its two PPO stages."""
STEPS = np.arange(50)
SUPERVISED = {"loss": 3 * np.exp(-STEPS / 10) + 1, "grad_norm/policy": 1 + np.cos(STEPS) ** 2}


def watch(columns, health: Health | None = None, start: int = 0) -> list[Finding]:
    health, found = health or Health(), []
    for step in range(len(next(iter(columns.values())))):
        found += health.watch(start + step, {name: float(values[step]) for name, values in columns.items()})
    return found


def demo(**changes) -> dict[str, np.ndarray]:
    """The demo's PPO metrics with some replaced; a change of None leaves the metric out."""
    columns = {name: np.array(values) for name, values in DEMO["ppo"].items()} | {
        k.replace("__", "/"): v for k, v in changes.items()
    }
    return {name: values for name, values in columns.items() if values is not None}


def names(found: list[Finding]) -> list[str]:
    return [finding.name for finding in found]


@pytest.mark.parametrize("stage", DEMO)
def test_the_demo_gives_no_warning(stage):
    assert watch(DEMO[stage]) == []


def test_a_falling_supervised_loss_gives_no_warning():
    assert watch(SUPERVISED) == []


kl, score = np.array(DEMO["ppo"]["objective/kl"]), np.array(DEMO["ppo"]["objective/score"])
WRONG = {
    "kl_running_away": demo(objective__kl=kl * np.exp(STEPS / 20)),
    "entropy_collapse": demo(objective__entropy=0.65 * np.exp(-STEPS / 15)),
    "score_against_gold": demo(objective__score=score + STEPS / 20, objective__gold=DEMO["ppo"]["objective/gold"] - STEPS / 10),
    "score_by_length": demo(
        objective__gold=None, objective__score=score + STEPS / 20, objective__length=DEMO["ppo"]["objective/length"] + STEPS / 4
    ),
    "clip_fraction_high": demo(policy__clip_fraction=np.linspace(0, 0.5, 50)),
    "values_uninformative": demo(value__explained_variance=np.full(50, -0.1)),
    "sampler_mismatch": demo(sampler__mismatch_mean=np.full(50, 0.03)),
    "responses_cut_off": demo(objective__finished=np.where(STEPS < 30, 1.0, 0.0)),
    "cutting_off_pays": demo(objective__finished=np.full(50, 0.5), objective__reward=score + np.where(STEPS < 30, -0.1, 0.3)),
    "identical_scores": demo(objective__score_std=np.where(STEPS < 30, 0.5, 1e-8)),
    "not_finite": demo(value__loss=np.where(STEPS < 30, 0.5, math.inf)),
    "gradient_explosion": demo(grad_norm__policy=DEMO["ppo"]["grad_norm/policy"] * np.where(STEPS < 40, 1, 20)),
    "loss_diverging": SUPERVISED | {"loss": SUPERVISED["loss"] + np.where(STEPS < 30, 0, 2)},
}


@pytest.mark.parametrize("name", [rule.name for rule in RULES])
def test_one_thing_gone_wrong_gives_its_warning_once_and_no_other(name):
    assert names(watch(WRONG[name])) == [name]


ONE_BAD_STEP = {
    "objective/kl": 30.0, "objective/entropy": 0.01, "policy/clip_fraction": 0.9, "value/explained_variance": -2.0,
    "sampler/mismatch_mean": 0.04, "objective/finished": 0.0, "objective/score_std": 0.0, "grad_norm/policy": 1000.0,
    "objective/gold": 0.0, "objective/length": 19.0,
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_BAD_STEP)
def test_one_bad_step_is_no_warning(name):
    columns = demo()
    columns[name][40] = ONE_BAD_STEP[name]
    assert watch(columns) == []


def test_a_warning_says_numbers_meaning_and_what_to_try():
    (finding,) = watch(WRONG["responses_cut_off"])
    assert finding.step == 32
    assert finding.message.startswith("100% of the responses of 3 steps have no stop token; objective/length is ")
    assert "The policy has not learned to stop" in finding.message and "Try: a larger lengths.response" in finding.message
    (finding,) = watch(WRONG["not_finite"])
    assert finding.step == 30 and finding.message.startswith("value/loss is not a finite number.")


def test_a_warning_comes_again_only_after_its_cause_was_gone_for_a_while():
    bad, good = [0.0] * 10, [1.0]
    flickering = np.array(bad + good * 10 + bad)
    assert names(watch({"objective/finished": flickering})) == ["responses_cut_off"]
    twice = np.array(bad + good * (REARM + 10) + bad)
    assert [f.step for f in watch({"objective/finished": twice})] == [2, REARM + 22]


def test_held_out_measures_and_the_explained_variance_may_be_undefined():
    assert watch({"loss": [1.0], "heldout/loss": [math.nan], "value/explained_variance": [math.nan]}) == []


def test_a_score_that_rises_while_gold_stays_where_it_is_gives_no_warning():
    """Pure noise in gold, 200 worlds: the best ten steps of many are luck, and must not count as a fall."""
    alarms = 0
    for seed in range(200):
        noise = np.random.default_rng(seed)
        columns = {"objective/score": STEPS / 10 + noise.normal(0, 0.1, 50), "objective/gold": noise.normal(5, 0.5, 50)}
        alarms += "score_against_gold" in names(watch(columns))
    assert alarms <= 2


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("cut", [1, 31, 45])
def test_a_resumed_stage_goes_on_as_if_nothing_had_happened(name, cut):
    """The rows of metrics.jsonl, in which JSON's null stands for what is not finite."""
    columns = WRONG[name]
    whole = watch(columns)
    before = {k: v[:cut] for k, v in columns.items()}
    health = Health()
    health.replay(
        json.loads(
            json.dumps({"step": n, "seconds": 1.0} | {k: float(v[n]) if np.isfinite(v[n]) else None for k, v in columns.items()})
        )
        for n in range(cut)
    )
    after = watch({k: v[cut:] for k, v in columns.items()}, health, start=cut)
    assert watch(before) + after == whole


def test_moving_mean_and_standard_error_by_hand():
    np.testing.assert_allclose(moving_mean(np.array([1.0, 2, 3, 7]), 2), [1.5, 2.5, 5])
    noise = np.random.default_rng(0).normal(0, 3, 20_000)
    means = noise.reshape(-1, 10).mean(axis=1)
    assert standard_error(noise + np.linspace(0, 9, 20_000)) == pytest.approx(np.std(means[::2] - means[1::2]), rel=0.05)


# ----------------------------------------------------------------------------------------------------- in a whole run

ALONE = [
    "~stages.pretrain",
    "~stages.sft",
    "~stages.reward",
    *PPO_ONLY,
    "stages.ppo.policy=new",
    "reward_model=function",
    "backend.threads=1",
]


def findings(run: Path) -> list[dict]:
    stage = read_json(run / "run.json")["stages"]["ppo"]
    rows = [json.loads(line) for line in (run.parent / stage["folder"] / "health.jsonl").read_text().splitlines()]
    assert stage["health"] == rows
    return rows


def test_a_constant_reward_is_told_on_the_console_and_in_the_record(tmp_path, caplog):
    options = ["reward_model.function=reward_functions:constant", "algorithm.iterations=4"]
    run = tiny(tmp_path, *ALONE, *options)
    found = {row["name"]: row for row in findings(run)}
    assert found.keys() == {"identical_scores", "responses_cut_off"}  # the policy has not been taught to stop
    assert found["identical_scores"]["step"] == 2
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == "lockstep"]
    assert any(
        line.startswith("ppo, step 2: identical_scores. all scores of a batch are equal (1), for 3 steps") for line in told
    )


def test_no_kl_penalty_at_a_huge_learning_rate_runs_away(tmp_path):
    options = [
        "reward_model.function=reward_functions:shortness", "algorithm.iterations=6", "algorithm.kl_coef=0.0",
        "algorithm.optimizer.learning_rate=1.0", "algorithm.schedule={shape: constant, warmup_steps: 0}",
        "algorithm.lengths.response=4", "algorithm.unfinished_score=null",
    ]  # fmt: skip
    run = tiny(tmp_path, *ALONE, *options)
    assert "kl_running_away" in {row["name"] for row in findings(run)}


def test_a_resumed_run_has_the_warnings_of_one_that_was_not_interrupted(tmp_path, monkeypatch):
    options = [*ALONE, "reward_model.function=reward_functions:constant", "algorithm.iterations=7", "checkpoint_every=2"]
    whole = findings(tiny(tmp_path / "whole", *options))

    def dies(self: Algorithm, step: int, go_on=PPO.step):
        if step == 3:
            raise RuntimeError("killed")
        return go_on(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(PPO, "step", dies)
        with pytest.raises(RuntimeError, match="killed"):
            tiny(tmp_path / "killed", *options)
    assert whole and findings(tiny(tmp_path / "killed", *options)) == whole


def test_an_algorithm_that_logs_a_spread_without_a_score_is_watched_as_far_as_that_goes():
    health = Health()
    assert [finding for step in range(4) for finding in health.watch(step, {"objective/score_std": 0.0})] == []


def test_a_loss_that_diverges_after_one_that_was_not_finite_is_still_told():
    losses = [2.0] * 5 + [None] + [2.0] * 14 + [29.0 + i for i in range(10)]
    health = Health()
    names = [finding.name for step, loss in enumerate(losses) for finding in health.watch(step, {"loss": loss})]
    assert names == ["not_finite", "loss_diverging"]
