"""`lockstep compare` on a sweep of two backends, three KL coefficients and three seeds: groups, seeds, baselines, cost."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lockstep.errors import ConfigError
from lockstep.reporting.compare import claims, compare, cost, groups, reading, tables, versus, what_intervals_are_over
from lockstep.runs.runner import peak_memory
from run_folders import GOLD, write_run, write_sweep

BY = ["backend", "algorithm.kl_coef"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder)
    return folder


@pytest.fixture(scope="module")
def whole(runs):
    return groups.group(reading.read([runs]), BY)


@pytest.fixture(scope="module")
def report(runs):
    return compare([runs], runs / "report", BY, "backend=jax")


def told(problems):
    """All but that seeds are few."""
    return [problem for problem in problems if "decide little" not in problem]


def write_golds(folder, golds: dict[tuple[str, int], float]) -> groups.RunComparison:
    """A comparison of runs whose PPO has exactly these gold scores on held-out prompts, {(backend, seed): gold}."""
    for (backend, seed), gold in golds.items():
        run = write_run(folder, backend, seed)
        file = next(folder.glob(f"stages/evaluate-{run.name}/output/evaluation.json"))
        content = json.loads(file.read_text())
        content["splits"]["heldout"]["ppo"]["gold"] = {"mean": gold, "low": gold - 0.1, "high": gold + 0.1, "n": 500}
        file.write_text(json.dumps(content))
    return groups.group(reading.read([folder]))


# ------------------------------------------------------------------------------------------------------------ grouping


def test_runs_are_grouped_by_the_keys_that_were_asked_for(whole):
    assert [g.label for g in whole.groups] == [f"{b}, kl_coef={k}" for b in ("jax", "torch") for k in (0.05, 0.15, 0.45)]
    assert all(g.seeds == [0, 1, 2] for g in whole.groups)
    assert told(whole.problems) == []


def test_keys_that_end_alike_are_tasks_of_their_own(tmp_path):
    keys = ("sft.learning_rate", "reward.learning_rate", "algorithm.learning_rate")
    for values in itertools.product((1, 2), repeat=3):
        for backend in ("torch", "jax"):
            write_run(tmp_path, backend, 0, **dict(zip(keys, values, strict=True)))
    c = groups.group(reading.read([tmp_path]), ["backend"])
    assert [len(set(g.tasks)) for g in c.groups] == [8, 8] and not [each for each in c.problems if "left out" in each]
    assert "algorithm.learning_rate=1, reward.learning_rate=2, sft.learning_rate=2" in c.groups[0].tasks


def test_what_differs_inside_a_group_makes_its_tasks(runs):
    c = groups.group(reading.read([runs]), ["backend"])
    assert [(g.label, len(g.runs)) for g in c.groups] == [("jax", 9), ("torch", 9)]
    assert list(c.groups[0].scores("heldout", "ppo", "gold")) == ["kl_coef=0.05", "kl_coef=0.15", "kl_coef=0.45"]
    assert c.differing["algorithm.kl_coef"] == ["0.05, 0.15, 0.45"] * 2


def test_a_model_that_pooled_runs_share_is_counted_once(runs, whole):
    """Three coefficients go back to one SFT model and one reward model per seed: no more certain than one coefficient's."""
    (jax, _), one = groups.group(reading.read([runs]), ["backend"]).groups, whole.groups[0]
    assert len(jax.policy_estimates("heldout", "sft", "gold")) == 3 and len(jax.policy_estimates("heldout", "ppo", "gold")) == 9
    assert jax.policy("heldout", "sft", "gold") == one.policy("heldout", "sft", "gold")
    assert jax.reward_model("accuracy/gold") == one.reward_model("accuracy/gold")
    assert len(jax.stages("reward")) == 3


def test_a_key_that_no_run_has_suggests_the_nearest(runs):
    with pytest.raises(
        ConfigError, match=r"No run has a key 'algorithm.kl_coeff' to group by\. Did you mean 'algorithm.kl_coef'\?"
    ):
        groups.group(reading.read([runs]), ["algorithm.kl_coeff"])


def test_a_seed_that_only_some_groups_have_is_named(tmp_path):
    for backend, seed in (("jax", 0), ("jax", 1), ("torch", 0)):
        write_run(tmp_path, backend, seed)
    assert told(groups.group(reading.read([tmp_path])).problems) == ["torch: no run with seed 1, which others have."]


def test_of_two_runs_of_the_same_configuration_and_seed_one_counts_and_the_other_is_named(tmp_path):
    first = write_run(tmp_path, "torch", 0)
    copy = shutil.copytree(first, tmp_path / "other")
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(record | {"name": "other"}))
    c = groups.group(reading.read([tmp_path]))
    assert told(c.problems) == ["other is left out: demo-torch-0 has the same configuration and seed."]
    assert len(c.runs) == 1


def test_jobs_of_a_sweep_that_left_no_run_are_named_with_their_error(tmp_path):
    run = write_run(tmp_path, "torch", 0)
    sweep = tmp_path / "sweeps" / "0a1b"
    sweep.mkdir(parents=True)
    jobs = [
        {"overrides": ["seed=0"], "run": run.name, "status": "done", "error": None},
        {"overrides": ["seed=1"], "run": "gone", "status": "failed", "error": "Traceback\nValueError: no memory"},
    ]
    (sweep / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    for path in (sweep, tmp_path):
        found = reading.read([path])
        assert [found.name for found in found.runs] == [run.name]
        assert found.problems == ["The job seed=1 (failed) left no run: ValueError: no memory"]


def test_a_stage_that_did_not_finish_shortens_no_curve(tmp_path):
    folders = [write_run(tmp_path, "torch", seed) for seed in (0, 1)]
    record = json.loads((folders[1] / "run.json").read_text())
    record["stages"]["ppo"]["status"], record["status"] = "failed", "failed"
    (folders[1] / "run.json").write_text(json.dumps(record))
    file = tmp_path / record["stages"]["ppo"]["folder"] / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    c = groups.group(reading.read(folders))
    assert len(c.groups[0].curve("ppo", "objective/kl").steps) == 60
    assert told(c.problems) == ["demo-torch-1 is not finished (failed in ppo): compared as far as it got."]


# ------------------------------------------------------------------------------------------------- against a baseline


def test_differences_are_taken_seed_by_seed_and_what_has_no_partner_is_named(tmp_path):
    c = write_golds(tmp_path, {("jax", 0): 1.0, ("jax", 1): 2.0, ("torch", 0): 1.5, ("torch", 1): 2.5, ("torch", 2): 9.0})
    v = versus.versus(c.groups[1], c.groups[0], "heldout", "ppo", "gold")
    assert (v.difference.mean, v.difference.low, v.difference.high) == (0.5, 0.5, 0.5)  # though seeds differ by 1.0
    assert v.improvement.mean == pytest.approx(5 / 6)  # all pairs but torch 0 (1.5) and jax 1 (2.0)
    assert (v.seeds, v.unpaired) == ([0, 1], ["seed 2 of torch"])
    row = tables.against_baseline(c, [v]).rows[1]
    assert row[:3] == ["torch", "jax", "+0.50"] and row[5] == "0, 1 (not paired: seed 2 of torch)"


def test_a_baseline_value_holds_each_group_against_its_own_counterpart(whole):
    found = [(g.label, b.label) for g, b in versus.pairs(whole, "backend=jax")]
    assert found == [(f"torch, kl_coef={k}", f"jax, kl_coef={k}") for k in (0.05, 0.15, 0.45)]
    found = [(g.label, b.label) for g, b in versus.pairs(whole, "algorithm.kl_coef=0.15")]
    assert found[0] == ("jax, kl_coef=0.05", "jax, kl_coef=0.15") and len(found) == 4
    assert found == [(g.label, b.label) for g, b in versus.pairs(whole, "algorithm.kl_coef=1.5e-1")]


def test_without_a_baseline_the_first_group_is_it_and_a_label_names_one(whole):
    assert {b.label for _, b in versus.pairs(whole, None)} == {"jax, kl_coef=0.05"}
    assert {b.label for _, b in versus.pairs(whole, "torch, kl_coef=0.45")} == {"torch, kl_coef=0.45"}


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("backend=tpu", r"no group has backend=tpu\. There are: jax, torch\."),
        (
            "algorithm.kl_coeff=0.1",
            r"'algorithm.kl_coeff=0.1' is not a key=value of the groups\. Did you mean 'algorithm.kl_coef'\?",
        ),
        ("torch, kl_coef=0.46", r"Did you mean"),
    ],
)
def test_a_baseline_that_is_not_there_says_what_is(whole, baseline, message):
    with pytest.raises(ConfigError, match=message):
        versus.pairs(whole, baseline)


# ------------------------------------------------------------------------------------------------------- what is said


def test_one_seed_has_no_interval_over_seeds_and_the_report_says_so(tmp_path):
    write_run(tmp_path, "torch", 0)
    c = groups.group(reading.read([tmp_path]))
    assert "over prompts. No group has two evaluated seeds" in what_intervals_are_over(c)
    assert tables.over_seeds(c).rows == []
    write_run(tmp_path, "jax", 0)
    c = groups.group(reading.read([tmp_path]))
    assert versus.against_baseline(c, versus.pairs(c, None)) == []
    write_run(tmp_path, "jax", 1)
    c = groups.group(reading.read([tmp_path]))
    assert what_intervals_are_over(c).endswith("Over prompts only, because one seed was evaluated: torch.")
    assert next(row for row in tables.over_seeds(c).rows if row[0] == "torch")[-1] == "0 (one: no interval)"


def test_a_seed_that_was_not_evaluated_makes_no_interval_over_seeds(tmp_path):
    write_run(tmp_path, "torch", 0)
    write_run(tmp_path, "torch", 1, evaluated=False, status="failed")
    c = groups.group(reading.read([tmp_path]))
    assert c.groups[0].seeds == [0, 1] and "over prompts. No group has two evaluated seeds" in what_intervals_are_over(c)


def test_stages_that_runs_share_are_counted_once(whole):
    """6 early stages a seed (2 backends times 3), 3 late ones a run; torch's seconds are those written, jax's 0.8 of them."""
    early, late = 60 + 25 + 40, 180 + 220 + 30
    spent = 3 * 1.8 * (early + 3 * late)
    assert cost.in_all(whole).startswith(f"72 stages took {cost.duration(spent)} of compute. The runs list 108;")


def test_cost_has_time_speed_episodes_and_memory(whole):
    torch = cost.by_backend(whole)[1]
    assert (torch.label, cost.seconds(torch, "ppo"), cost.episodes(torch, "ppo")) == ("torch", 180, 120 * 64)
    assert cost.speed(torch, "ppo") == pytest.approx(5200, rel=0.01)
    assert cost.memory(torch, "ppo") == pytest.approx((900 + 60) / 1024)
    assert cost.episodes(torch, "sft") is None
    three_steps = {"ppo": SimpleNamespace(metrics={"objective/score": SimpleNamespace(steps=[0, 1, 2])})}
    sizes = {"stages.ppo.algorithm.batch_size": 8, "stages.ppo.algorithm.samples": 4}
    runs = [SimpleNamespace(stages=three_steps, config=sizes | changes) for changes in ({}, {"stages.ppo.changes.samples": 2})]
    assert [cost.episodes(SimpleNamespace(runs=[run]), "ppo") for run in runs] == [3 * 8 * 4, 3 * 8 * 2]


def test_warnings_while_training_are_listed_with_seed_and_first_step(tmp_path):
    folder = write_run(tmp_path, "torch", 3)
    record = json.loads((folder / "run.json").read_text())
    record["stages"]["ppo"]["health"] = [{"step": s, "name": "entropy_collapse", "message": "..."} for s in (12, 60)]
    (folder / "run.json").write_text(json.dumps(record))
    c = groups.group(reading.read([tmp_path]))
    assert tables.warnings(c).rows == [["torch", "ppo", "entropy_collapse", "seed 3 at step 12"]]


def test_memory_is_the_accelerators_or_else_the_process_own():
    assert peak_memory(SimpleNamespace(peak_memory_bytes=lambda: 7)) == 7
    assert 20e6 < peak_memory(SimpleNamespace(peak_memory_bytes=lambda: None)) < 64e9


def test_the_pages_contents_are_its_sections(report):
    page = next(file for file in report.files if file.name == "report.html").read_text()
    linked = re.findall(r'<a href="#([\w-]+)">', page)
    assert linked == re.findall(r'<section id="([\w-]+)">', page)
    assert {"claims", "against", "seeds", "frontier", "cost", "samples"} <= set(linked)
    assert page.count('class="dot"') == 6


def test_every_figure_is_there_for_papers_as_png_and_svg(report):
    figures = {file.name: file.read_bytes() for file in report.files if file.parent.name == "figures"}
    assert {name.partition(".")[0] for name in figures} >= {"gold", "against", "frontier", "curves", "cost"}
    assert all(content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml") for name, content in figures.items())
    width, _ = struct.unpack(">II", figures["frontier.png"][16:24])  # of the header
    assert width == 2060  # 10.3 inches at 200 dots
    assert len(figures) % 2 == 0 and b"#333333" in figures["frontier.svg"] and b"var(" not in figures["frontier.svg"]


def test_the_command_takes_groups_and_a_baseline(tmp_path):
    for backend in ("jax", "torch"):
        write_run(tmp_path, backend, 0, gold=GOLD)
    arguments = ["--by", "backend", "--baseline", "backend=torhc", "--output", str(tmp_path / "report")]
    done = subprocess.run(
        [sys.executable, "-m", "lockstep", "compare", str(tmp_path), *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert (
        "ConfigError: --baseline backend=torhc: no group has backend=torhc. There are: jax, torch." in done.stdout + done.stderr
    )


def test_the_claim_about_backends_names_the_setting_once(whole):
    found = [claim.where for claim in claims.find(whole) if claim.text.startswith("final gold")]
    assert found == ["kl_coef=0.05", "kl_coef=0.15", "kl_coef=0.45"]
