"""Tests of differences over seeds, corrections for many of them, and how many seeds they need: against scipy, R and G*Power."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from scipy import stats

from lockstep.commands.compare import _positive
from lockstep.errors import ConfigError
from lockstep.reporting.compare import claims, compare, decisions, groups, plots, reading, tables, versus
from run_folders import GOLD, write_run
from test_compare import comparison_of

SLEEP = ([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
"""Student's own data of 1908: additional hours of sleep by two drugs, ten patients."""


def test_the_test_gives_students_own_result():
    """R: t.test(extra ~ group, data = sleep, paired = TRUE) has t = -4.0621, df = 9, p-value = 0.002833."""
    found = decisions.paired_test(np.subtract(SLEEP[1], SLEEP[0]))
    assert found.mean == pytest.approx(1.58) and found.p == pytest.approx(0.002833, abs=5e-7) and found.seeds == 10
    assert found.deviation == pytest.approx(1.58 / 4.0621 * math.sqrt(10), rel=1e-4)


def test_one_seed_tells_nothing_and_equal_differences_all():
    assert decisions.paired_test([0.3]) is None and decisions.paired_test([]) is None
    gains = [0.1 + 0.2, 0.3, 0.3]  # equal, but for rounding
    assert len(set(gains)) > 1 and decisions.seeds_needed(0.3, decisions.paired_test(gains).deviation) == 6
    assert decisions.seeds_needed(0, 0) is None and decisions.paired_test([0.0] * 3).p == 1
    for n in (2, 5, 6):  # by their sign alone
        assert decisions.paired_test([-0.5] * n).p == stats.binomtest(n, n, 0.5).pvalue
        assert (decisions.paired_test([-0.5] * n).p < 0.05) == (n >= decisions.seeds_needed(0.5, 0.0))


def test_corrections_are_those_of_r():
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02, with "BH" 0.02 0.04 0.04 0.02."""
    p = [0.01, 0.04, 0.03, 0.005]
    assert decisions.corrected(p, "holm") == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert decisions.corrected(p, "bh") == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert decisions.corrected(p, "none") == p and decisions.corrected([], "holm") == []
    assert decisions.corrected([0.6, 0.9], "holm") == [1.0, 1.0]
    assert decisions.corrected(p, "bh") == pytest.approx(stats.false_discovery_control(p))


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10), (2.0, 5)])
def test_seeds_that_an_effect_needs_are_gpowers(effect, seeds):
    """G*Power 3.1, difference of two dependent means, two tails, alpha 0.05, power 0.8; R's power.t.test(type = "paired") too."""
    assert decisions.seeds_needed(effect, 1.0) == decisions.seeds_needed(-3 * effect, 3.0) == seeds
    assert decisions.power(effect, 1.0, seeds) >= 0.8 > decisions.power(effect, 1.0, seeds - 1)


def test_power_is_how_often_the_test_decides():
    drawn = np.random.default_rng(0).normal(1.2, 1.0, (4000, 6))
    decided = np.mean([decisions.paired_test(row).p < 0.05 for row in drawn])
    assert decisions.power(1.2, 1.0, 6) == pytest.approx(decided, abs=0.025)


def test_the_least_difference_needs_just_the_seeds_at_hand():
    least = decisions.least_difference(0.4, 5)
    assert decisions.power(least, 0.4, 5) == pytest.approx(0.8, abs=1e-6)
    assert stats.nct.sf(stats.t.ppf(0.975, 1), 1, decisions.least_difference(1.0, 2) * 2**0.5) == pytest.approx(0.8)
    assert decisions.seeds_needed(0, 1.0) is None and decisions.seeds_needed(0.1, 0.0) == 6
    assert decisions.least_difference(0.0, 5) == math.inf and decisions.least_difference(0.0, 6) == 0


# ---------------------------------------------------------------------------------------------------------- in a report


def sweep(folder, seeds=(0, 1, 2, 3, 4, 5)):
    """PPO with a second setting that is better by 0.3, give or take 0.1 from seed to seed."""
    for seed in seeds:
        luck = np.random.default_rng(seed).normal(0, 0.1)
        for kl, more in ((0.1, 0.0), (0.2, 0.3 + luck)):
            gold = {**GOLD, "ppo": 1.2 + more, "ppo_ptx": 1.0 + more}
            write_run(folder, "torch", seed, gold=gold, **{"algorithm.kl_coef": kl})
    return comparison_of(folder)


def test_p_values_are_corrected_for_all_rows_of_the_table(tmp_path):
    c = sweep(tmp_path)
    found = versus.against_baseline(c, versus.pairs(c, None))
    raw = [v.test.p for v in found]
    shown = {how: tables.against_baseline(c, found, how) for how in decisions.CORRECTIONS}
    column = {how: [row[4] for i, row in enumerate(t.rows) if i not in t.headings] for how, t in shown.items()}
    assert column["none"] == [tables._p(p) for p in raw]
    assert column["holm"] == [tables._p(p) for p in decisions.corrected(raw, "holm")] != column["none"]
    assert shown["holm"].title == f"Against the baseline: p by Holm over {len(raw)}"


def test_the_report_says_how_many_seeds_a_difference_needs(tmp_path):
    c = sweep(tmp_path)
    table = tables.power(c, versus.against_baseline(c, versus.pairs(c, None)), difference=0.05)
    rows = {row[0]: row[1:] for row in table.rows}
    assert table.header[-1] == "0.05 needs"
    mean, deviation, seeds, least, needed, wanted = rows["ppo: torch, kl_coef=0.2 over torch, kl_coef=0.1"]
    assert 0.2 < float(mean) < 0.4 and 0.03 < float(deviation) < 0.25 and seeds == "6"
    assert float(least) < 0.4 and int(needed) < 10 < int(wanted)
    assert "ppo over sft, torch, kl_coef=0.1" in rows


def test_runs_that_share_their_baseline_count_once_a_seed(tmp_path):
    """A coefficient that gains 1 and one that loses 3, on the same SFT models: on average -1, in every seed."""
    for seed in (0, 1, 2):
        for kl, gold in ((0.1, 1.35 + 0.1 * seed), (0.02, -2.65 + 0.1 * seed)):
            write_run(tmp_path, "torch", seed, shared=True, gold={**GOLD, "ppo": gold}, **{"algorithm.kl_coef": kl})
    c = groups.group(reading.read([tmp_path]), ["backend"])
    test = versus.gain_test(c, c.groups[0], "ppo", "gold")
    assert test.mean == pytest.approx(-0.9, abs=0.2) and test.seeds == 3


def test_over_few_seeds_a_headline_needs_the_test_too(tmp_path):
    """The intervals, of 1.96 standard errors of three seeds, are apart; by Student's test p is above 0.05."""
    for seed, gold in enumerate((1.9, 0.85, 1.8)):
        write_run(tmp_path, "torch", seed, gold={**GOLD, "ppo": gold, "ppo_ptx": 0.3})
    c = comparison_of(tmp_path)
    assert next(claim for claim in claims.find(c) if claim.text == "gold: sft < ppo").verdict == "yes"
    assert versus.gain_test(c, c.groups[0], "ppo", "gold").p > 0.05
    assert claims.headline(c).startswith("No policy is known to raise the gold score of sft: ")


def test_over_few_seeds_a_win_rate_needs_the_test_too(tmp_path):
    """Two seeds at 55% and 60% are no decision, narrow as their intervals over prompts are."""
    for seed, rate in ((0, 0.55), (1, 0.60)):
        run = write_run(tmp_path, "torch", seed)
        file = tmp_path / json.loads((run / "run.json").read_text())["stages"]["evaluate"]["folder"] / "output/evaluation.json"
        content = json.loads(file.read_text())
        for name, measures in content["splits"]["heldout"].items():
            kept = {"mean": rate, "low": rate - 0.01, "high": rate + 0.01, "n": 5000} if name == "ppo" else None
            measures.clear()
            measures.update({"win_rate": kept} if kept else {})
        content["splits"] = {"heldout": content["splits"]["heldout"]}
        content.pop("reward_model")
        file.write_text(json.dumps(content))
    c = groups.group(reading.read([tmp_path]))
    test = versus.gain_test(c, c.groups[0], "ppo", "win_rate")
    assert test.p == pytest.approx(stats.ttest_1samp([0.55, 0.60], 0.5).pvalue) and test.p > 0.1
    assert "wins more than half" not in claims.headline(c)


def test_a_run_without_the_measure_is_no_crash(tmp_path):
    for seed, policy in ((0, "sft"), (1, "ppo")):
        run = write_run(tmp_path, "torch", seed)
        file = tmp_path / json.loads((run / "run.json").read_text())["stages"]["evaluate"]["folder"] / "output/evaluation.json"
        found = json.loads(file.read_text())
        kept = {"sft": found["splits"]["heldout"]["sft"]} | ({} if policy == "sft" else {"ppo": {}})
        file.write_text(json.dumps(found | {"splits": {"heldout": kept}}))
    assert claims.headline(comparison_of(tmp_path)).startswith("sft reaches ")


def test_a_split_that_another_stage_evaluates_again_is_another_split(tmp_path):
    """As the library's, in another environment; a later round of the same evaluation replaces the earlier one."""
    run = write_run(tmp_path, "torch", 0)
    record = json.loads((run / "run.json").read_text())
    first = tmp_path / record["stages"]["evaluate"]["folder"]
    for name, gold in (("evaluate_attacked", 0.125), ("evaluate_2", 7.5)):
        folder = tmp_path / "stages" / f"{name}-torch-x"
        shutil.copytree(first, folder)
        found = json.loads((folder / "output/evaluation.json").read_text())
        found["splits"]["heldout"]["ppo"]["gold"] = {"mean": gold, "low": gold, "high": gold, "n": 5}
        (folder / "output/evaluation.json").write_text(json.dumps(found))
        record["stages"][name] = {**record["stages"]["evaluate"], "folder": f"stages/{name}-torch-x"}
    (run / "run.json").write_text(json.dumps(record))
    (g,) = comparison_of(tmp_path).groups
    assert g.policy("heldout@evaluate_attacked", "ppo", "gold").mean == 0.125
    assert g.policy("heldout", "ppo", "gold").mean == 7.5


def test_few_seeds_are_a_warning_and_enough_are_none(tmp_path):
    few, enough = sweep(tmp_path / "few", (0, 1, 2)), sweep(tmp_path / "enough")
    assert any(problem.startswith("3 seeds decide little (torch, kl_coef=0.1; torch, kl_coef=0.2)") for problem in few.problems)
    assert not any("decide little" in problem for problem in enough.problems)


def test_tables_are_written_for_latex(tmp_path):
    sweep(tmp_path / "runs")
    report = compare([tmp_path / "runs"], tmp_path / "report")
    text = next(file for file in report.files if file.name == "report.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == len(report.tables)
    assert r"torch, kl\_coef=0.2" in text and "95%" not in text.replace(r"\%", "")
    page = next(file for file in report.files if file.name == "report.html").read_text()
    assert '<section id="power">' in page and "by Holm over" in page


def test_any_metric_is_drawn_by_its_name(tmp_path):
    sweep(tmp_path / "runs", (0,))
    report = compare([tmp_path / "runs"], tmp_path / "report", metrics=["finished", "objective/entropy"])
    names = {file.name for file in report.files}
    assert {"metric-finished.png", "metric-objective-entropy.svg"} <= names
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count('aria-label="metric-') == 2 and '<section id="metrics">' in page and 'href="#metrics"' in page
    with pytest.raises(ConfigError, match="--metric objective/entropi: no run has it. Did you mean 'objective/entropy'?"):
        compare([tmp_path / "runs"], tmp_path / "report", metrics=["objective/entropi"])


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf"])
def test_a_difference_to_decide_is_a_number_above_zero(text):
    with pytest.raises(Exception, match="above 0"):
        _positive(text)


# ---------------------------------------------------------------------------------------------- what the page may not do


def evaluated_as(folder, backend, seed, name, gold, **changes):
    """A run whose only policy after SFT has this name."""
    run = write_run(folder, backend, seed, **changes)
    file = folder / json.loads((run / "run.json").read_text())["stages"]["evaluate"]["folder"] / "output/evaluation.json"
    found = json.loads(file.read_text())
    for split in found["splits"].values():
        own = split.pop("ppo_ptx") and split.pop("ppo")
        split[name] = own | {"gold": {"mean": gold, "low": gold - 0.1, "high": gold + 0.1, "n": 500}}
    file.write_text(json.dumps(found))


def test_policies_with_other_names_are_held_against_each_other_if_they_end_their_runs(tmp_path):
    for seed in (0, 1, 2):
        evaluated_as(tmp_path, "torch", seed, "ppo", 1.0 + 0.1 * seed, **{"choices.algorithm": "ppo"})
        evaluated_as(tmp_path, "torch", seed, "grpo", 1.5 + 0.1 * seed, **{"choices.algorithm": "grpo"})
    c = comparison_of(tmp_path)
    assert len(c.groups) == 2
    found = {v.policy: v for v in versus.against_baseline(c, versus.pairs(c, None)) if v.metric == "gold"}
    ((name, one),) = found.items()
    assert name in ("grpo against ppo", "ppo against grpo")
    assert abs(one.difference.mean) == pytest.approx(0.5) and one.seeds == [0, 1, 2]
    assert (one.difference.mean > 0) == name.startswith("grpo")


def test_a_model_that_groups_share_is_claimed_of_once(tmp_path):
    for kl in (0.1, 0.2):
        write_run(tmp_path, "torch", 0, shared=True, gold={**GOLD, "ppo": 1.0 + kl}, **{"algorithm.kl_coef": kl})
    files = sorted(tmp_path.glob("stages/evaluate*/output/evaluation.json"))
    first, second = (json.loads(file.read_text()) for file in files)
    files[1].write_text(json.dumps(second | {"reward_model": first["reward_model"]}))
    c = comparison_of(tmp_path)
    (claim,) = [claim for claim in claims.find(c) if claim.text.startswith("gold truth")]
    assert claim.where == "torch, kl_coef=0.1; torch, kl_coef=0.2"
    assert len([claim for claim in claims.find(c) if claim.text == "gold: sft < ppo"]) == 2


def test_noise_does_not_fill_an_axis_and_coinciding_curves_both_show(tmp_path):
    for backend in ("torch", "jax"):
        write_run(tmp_path, backend, 0)
    c = comparison_of(tmp_path)
    figure, (dots, curves, flat) = plots.panels(3, height=2.4)
    plots.policy_dots(dots, c, "heldout", "finished")  # all at 0.97, with intervals of 0.02
    low, high = dots.get_xlim()
    assert high - low >= 3 * 0.02 - 1e-9
    plots.draw_curves(curves, c, "objective/score", ["ppo"])
    wide, narrow = (line.get_linewidth() for line in curves.get_lines())
    assert wide > 2 * narrow
    flat.plot([0, 1], [10.0, 10.01])
    plots.not_too_near(flat, 0.05)
    low, high = flat.get_ylim()
    assert high - low == pytest.approx(0.05 * 10.01, rel=0.01) and low < 10 < 10.01 < high
