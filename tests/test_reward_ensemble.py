"""Several reward models as one."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import Scored
from lockstep.commands.run import run_config
from lockstep.config.compose import compose
from lockstep.config.schema import parse
from lockstep.errors import ConfigError
from lockstep.interfaces import Responses
from lockstep.runs.experiment import Experiment
from lockstep.types import Prompt
from lockstep_rlhf.reward_models.ensemble import Ensemble
from runs import DECODER, TINY

TWO = Responses([Prompt.of("w1"), Prompt.of("w2")], ["a", "b"], None, None)
# Of 1, 2 and 6 the mean is 3, the variance (4 + 1 + 9) / 3, its root 2.160247; of three times 2 they are 2, 0 and 0.
MEMBERS = ([1, 2], [2, 2], [6, 2])


def ensemble(combine, coef=1.0, members=MEMBERS, networks=(None, None, None)):
    models = [Scored(lambda _, s=scores: s, network) for scores, network in zip(members, networks, strict=True)]
    resources = SimpleNamespace(reward_model=lambda group: models[group["number"]])
    return Ensemble(Ensemble.Config(tuple({"number": i} for i in range(len(models))), combine, coef), resources)


@pytest.mark.parametrize(
    ("combine", "coef", "expected"),
    [
        ("mean", 1.0, [3, 2]),
        ("worst", 1.0, [1, 2]),
        ("uncertainty_weighted", 0.5, [3 - 0.5 * 14 / 3, 2]),
        ("lower_bound", 0.5, [3 - 0.5 * 2.160247, 2]),
        ("lower_bound", 0.0, [3, 2]),
    ],
)
def test_members_are_combined_as_the_paper_says(combine, coef, expected):
    scores = ensemble(combine, coef).score(TWO)
    assert scores.dtype == np.float32 and scores == pytest.approx(expected, abs=1e-6)


def test_disagreement_is_the_standard_deviation_over_the_members_of_each_response():
    model = ensemble("mean")
    model.score(TWO)
    assert model.details()["disagreement"] == pytest.approx([2.160247, 0], abs=1e-6)


@pytest.mark.parametrize("combine", ["mean", "worst", "uncertainty_weighted", "lower_bound"])
def test_a_response_that_one_member_cannot_score_has_no_score(combine):
    scores = ensemble(combine, members=([1, 2], [np.nan, 2], [6, 2])).score(TWO)
    assert np.isnan(scores[0]) and scores[1] == pytest.approx(2)


def test_the_value_network_is_the_first_members():
    network = SimpleNamespace(copy=lambda: "a copy of the first")
    assert ensemble("mean", networks=(network, None, None)).value_network() == "a copy of the first"
    assert ensemble("mean", networks=(None, network, None)).value_network() is None


def test_an_ensemble_of_one_or_one_that_seeks_disagreement_is_refused():
    with pytest.raises(ConfigError, match="reward_model.members has 1: an ensemble needs two or more"):
        Ensemble.Config(({"name": "learned"},), "mean", 1.0)
    with pytest.raises(ConfigError, match="reward_model.coef=-1.0 must be at least 0"):
        parse(Ensemble.Config, {"coef": -1.0}, "reward_model")


# ------------------------------------------------------------------------------------------------------- in experiments

ENSEMBLE = ["experiment=ensemble", *TINY, *DECODER]


def test_the_stages_of_all_members_are_inputs_and_nested_mistakes_are_found():
    stages = Experiment(compose(ENSEMBLE)).stages
    assert stages["ppo"].inputs == [("sft", "policy"), *((f"reward_{i}", "reward_model") for i in range(3))]
    wrong = compose([*ENSEMBLE, "reward_model.members.1.source=reward_9"])
    with pytest.raises(ConfigError, match="stages.ppo reads the stage 'reward_9'.*Did you mean 'reward_"):
        Experiment(wrong)
    with pytest.raises(ConfigError, match="Unknown key reward_model.sourse"):
        Experiment(compose([*ENSEMBLE, "+reward_model.members.1.sourse=reward_1"]))


def test_a_members_function_is_part_of_what_makes_a_stage():
    config = compose(ENSEMBLE)
    group = {"name": "function", "function": "my_rewards:score", "timeout_seconds": 1.0, "retries": 0, "on_failure": "raise"}
    config["stages"]["ppo"]["reward_model"]["members"] = [group, config["stages"]["ppo"]["reward_model"]["members"][0]]
    modules = Experiment(config).stages["ppo"].modules
    assert "my_rewards" in modules and "lockstep_rlhf.reward_models.learned" in modules


def test_a_run_trains_the_members_from_their_own_seeds_and_logs_how_far_they_disagree(tmp_path):
    short = ["~stages.pretrain", "stages.sft.policy=new", "algorithm.iterations=2", "backend.threads=1"]
    run = run_config(compose([*ENSEMBLE, *short, f"folder={tmp_path}"]), "test")
    record = json.loads((run / "run.json").read_text())
    folders = {name: run.parent / stage["folder"] for name, stage in record["stages"].items()}
    first, second = (json.loads((folders[f"reward_{i}"] / "done.json").read_text())["metrics"] for i in (0, 1))
    assert first["demonstrations/score_std"] != second["demonstrations/score_std"]
    rows = [json.loads(line) for line in (folders["ppo"] / "metrics.jsonl").read_text().splitlines()]
    assert all(row["reward_model/disagreement"] > 0 for row in rows)
    evaluation = json.loads((folders["evaluate"] / "output" / "evaluation.json").read_text())
    assert evaluation["splits"]["heldout"]["ppo"]["reward_model/disagreement"]["mean"] > 0
