"""docs/metrics.md is complete and holds nothing that nobody logs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from conftest import Scored
from lockstep.reporting.health import RULES
from lockstep.runs.runner import flatten
from lockstep.storage.files import read_json
from runs import tiny

PAGE = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")


def documented(*sections: str) -> set[str]:
    """The names in the first column of the tables of these sections; of all others with none."""
    parts = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
    rows = [row for title in sections for row in re.findall(r"^\| (`.+?) \|", parts[title], re.M)]
    return {name for row in rows for name in re.findall(r"`(.+?)`", row)}


TRAINING = [
    "Supervised stages: `pretrain`, `sft`, `reward`",
    "PPO: `objective/`, what is optimised",
    "PPO: `policy/` and `value/`, the update",
    "`sampler/` and `perf/`",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny(
        tmp_path_factory.mktemp("runs"),
        "evaluation.comparisons=12",
        "evaluation.best_of=16",
        "algorithm.iterations=1",
        "backend.threads=1",
        "pretrain.packing=true",
    )


def stages(run):
    return [run.parent / stage["folder"] for stage in read_json(run / "run.json")["stages"].values()]


def rows(stage):
    file = stage / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_every_metric_of_every_algorithm_is_on_the_page_and_no_other(run):
    logged = {name for stage in stages(run) for row in rows(stage) for name in row}
    logged = {re.sub("^grad_norm/.*", "grad_norm/<model>", name) for name in logged - {"step", "seconds"}}
    assert logged == documented(*TRAINING)


@pytest.mark.parametrize(
    ("section", "forms"),
    [
        ("Group methods", [("policy_gradient", {"samples": 2, "kl_coef": 0.1, "correction": {"kind": "mask"}})]),
        ("Distillation", [("distillation", {}), ("distillation", {"loss": "divergence"})]),
        ("Rejection sampling", [("rejection_sampling", {"samples": 2})]),
        ("Preference methods", [("preference_optimisation", {"nll_coef": 0.1}), ("online_preferences", {})]),
    ],
)
def test_every_metric_of_the_other_algorithms_is_on_the_page_and_no_other(make, section, forms):
    algorithms = [make(name, reward_model=Scored(), batch_size=2, **changes) for name, changes in forms]
    logged = {each for algorithm in algorithms for each in [*algorithm.step(0), *algorithm.finish()]}
    logged = {re.sub("^grad_norm/.*", "grad_norm/<model>", each) for each in logged}
    assert logged - documented(*TRAINING) == documented(section)


def test_every_measure_of_the_evaluation_is_on_the_page_and_no_other(run):
    (file,) = [file for stage in stages(run) for file in stage.glob("output/evaluation.json")]
    names = {re.sub(r"best_of_\d+", "best_of_<n>", name) for name in flatten(json.loads(file.read_text()))}
    measured = {re.sub(r"^(reward_model|[^/]+/[^/]+)/", "", name) for name in names}
    assert measured == documented("Evaluation")


def test_every_warning_is_on_the_page_and_no_other():
    assert documented("Health") == {rule.name for rule in RULES}


def test_the_plain_records_have_the_documented_schema(run):
    pandas = pytest.importorskip("pandas")
    for stage in stages(run)[:-1]:
        steps = [row["step"] for row in rows(stage)]
        assert steps == sorted(set(steps)) and steps[0] == 0
        assert all(isinstance(value, (int, float, type(None))) for row in rows(stage) for value in row.values())
        assert (stage / "health.jsonl").exists()
    ppo = next(stage for stage in stages(run) if stage.name.startswith("ppo-"))
    table = pandas.read_json(ppo / "metrics.jsonl", lines=True)
    assert table["objective/score"].tolist() == [pytest.approx(row["objective/score"]) for row in rows(ppo)]
    samples = pandas.read_json(ppo / "samples.jsonl", lines=True)
    assert list(samples.columns) == ["step", "prompt", "response", "score", "finished"]
