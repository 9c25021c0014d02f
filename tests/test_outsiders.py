"""Numbers that this project did not produce: TRL, lm-human-preferences and "The N+ Implementation Details" ran on the same
inputs (benchmarks/outsiders/ says how), and what came out is in tests/fixtures/outsiders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import Data
from lockstep.nouns import Comparison, Demonstration, Prompt

FIXTURES = Path(__file__).parent / "fixtures" / "outsiders"


def outside(name: str) -> dict:
    return json.loads((FIXTURES / f"{name}.json").read_text())


# ----------------------------------------------------------------------------------------------- TRL, step by step


class Demonstrations(Data):
    def __init__(self, rows):
        self.found = [Demonstration(Prompt.of(row["prompt"]), row["completion"]) for row in rows]

    def demonstrations(self, split):
        return self.found


class Pairs(Data):
    """Every second pair has its rejected completion first: it is the ranks that say which is better."""

    def __init__(self, rows):
        self.found = []
        for i, row in enumerate(rows):
            completions, ranks = (row["chosen"], row["rejected"]), (0, 1)
            if i % 2:
                completions, ranks = completions[::-1], ranks[::-1]
            self.found.append(Comparison(Prompt.of(row["prompt"]), completions, ranks))

    def comparisons(self, split):
        return self.found


def same_settings(fixture: dict, run: dict) -> dict:
    settings, rows = fixture["settings"], len(fixture["data"])
    return {
        "epochs": settings["steps"] * settings["batch_size"] / rows,
        "batch_size": settings["batch_size"],
        "micro_batch_size": run["micro_batch_size"],
        "lengths": {"prompt": 6, "response": 12, "multiple": 12},
        "heldout_examples": 0,
        "optimizer": fixture["adam"] | {"learning_rate": settings["learning_rate"], "ema_decay": None, "tf_style": False},
        "schedule": {"shape": settings["schedule"], "warmup_steps": settings["warmup_steps"], "initial": 0.0, "final": 0.0},
    }


def assert_same_path(algorithm, name: str, run: dict, learning_rate: float) -> None:
    """Loss, gradient norm and rate of every step, and how far each parameter has moved at the end.

    Two float32 programs that round differently: the first loss agrees to 1e-6 of its size, and ten steps of Adam amplify
    that. A gradient of another normalisation, a misplaced epsilon or another group for weight decay moves these by 1e-2.
    """
    model = algorithm.learner.models[name]
    start = model.parameters()
    steps = [algorithm.step(step) for step in range(algorithm.total_steps)]
    end = model.parameters()
    rates = [learning_rate * s["lr_scale"] for s in steps]
    assert steps[0]["loss"] == pytest.approx(run["loss"][0], rel=1e-6)
    assert [s["loss"] for s in steps] == pytest.approx(run["loss"], rel=LOSS)
    assert [s[f"grad_norm/{name}"] for s in steps] == pytest.approx(run["grad_norm"], rel=NORM)
    assert rates == pytest.approx(run["learning_rate"], rel=1e-6, abs=1e-12)
    moved = {n: float(np.linalg.norm(end[n].astype(np.float64) - start[n])) for n in run["moved"]}
    assert moved == pytest.approx(run["moved"], rel=MOVED)
    if "accuracy" in run:
        assert [s["accuracy"] for s in steps] == pytest.approx(run["accuracy"], abs=1e-6)


LOSS, NORM, MOVED = 5e-6, 1e-5, 1e-5


@pytest.mark.parametrize("run", ["whole", "accumulated", "prompt_loss"])
def test_sft_walks_the_path_of_trls_sft_trainer(make, run):
    fixture = outside("trl_sft")
    run = fixture["runs"][run]
    sft = make("sft", data=Demonstrations(fixture["data"]), prompt_loss=run["prompt_loss"], **same_settings(fixture, run))
    assert_same_path(sft, "policy", run, fixture["settings"]["learning_rate"])


@pytest.mark.parametrize("run", ["whole", "accumulated"])
def test_a_reward_model_walks_the_path_of_trls_reward_trainer(make, run):
    fixture = outside("trl_reward")
    run = fixture["runs"][run]
    settings = same_settings(fixture, run)
    algorithm = make("reward_modelling", data=Pairs(fixture["data"]), normalise="none", **settings)
    assert_same_path(algorithm, "reward_model", run, fixture["settings"]["learning_rate"])
