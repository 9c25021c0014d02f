"""`lockstep compare` on run folders written here: what it reads, concludes and puts on the page."""

from __future__ import annotations

import csv
import io
import json
import re
import warnings
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import yaml

from lockstep.errors import DataError, LockstepError
from lockstep.learning import numerics
from lockstep.reporting.compare import claims, compare, figures, groups, print_summary, reading, tables
from lockstep.reporting.compare.reading import _estimates
from lockstep.reporting.compare.records import Estimate
from lockstep.reporting.console import Terminal
from run_folders import GOLD, HOSTILE, POLICIES, write_lines, write_run


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two backends times two seeds."""
    runs = tmp_path_factory.mktemp("runs")
    for backend in ("torch", "jax"):
        for seed in (0, 1):
            write_run(runs, backend, seed)
    return compare([runs], runs / "report")


@pytest.fixture(scope="module")
def page(report) -> str:
    return next(f for f in report.files if f.name == "report.html").read_text()


def comparison_of(*folders: Path) -> groups.RunComparison:
    return groups.group(reading.read(folders))


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_path_without_runs_says_what_to_type(tmp_path):
    with pytest.raises(LockstepError, match=r"No runs in .*lockstep compare runs/NAME"):
        compare([tmp_path], tmp_path / "report")
    deeper = tmp_path / "demo" / "first"
    deeper.mkdir(parents=True)
    (deeper / "run.json").write_text("{}")
    with pytest.raises(LockstepError, match=r"There are runs in \S+demo. Give the folder"):
        compare([tmp_path], tmp_path / "report")


def test_a_mistyped_path_suggests_the_nearest_folder(tmp_path):
    (tmp_path / "demo-torch").mkdir()
    with pytest.raises(DataError, match=r"Did you mean '.*demo-torch'\?"):
        reading.read([tmp_path / "demo-torhc"])


def test_a_run_folder_a_folder_of_runs_and_a_sweep_folder_are_all_understood(tmp_path):
    a, b = write_run(tmp_path, "torch", 0), write_run(tmp_path, "torch", 1)
    sweep = tmp_path / "sweeps" / "0123abcd"
    sweep.mkdir(parents=True)
    (sweep / "sweep.json").write_text(json.dumps({"jobs": [{"overrides": ["seed=1"], "run": b.name, "status": "done"}]}))
    names = {
        "run": [run.name for run in reading.read([a]).runs],
        "folder": [run.name for run in reading.read([tmp_path]).runs],
        "sweep": [run.name for run in reading.read([sweep]).runs],
        "twice": [run.name for run in reading.read([a, tmp_path]).runs],
    }
    assert names == {"run": [a.name], "folder": [a.name, b.name], "sweep": [b.name], "twice": [a.name, b.name]}


def test_unreadable_and_unfinished_runs_are_named_and_the_others_compared(tmp_path):
    write_run(tmp_path, "torch", 0)
    write_run(tmp_path, "torch", 1, evaluated=False, status="failed")
    broken = write_run(tmp_path, "jax", 0)
    (broken / "run.json").write_text('{"name": "demo')
    c = comparison_of(tmp_path)
    problems = " ".join(c.problems)
    assert "demo-torch-1 is not finished (failed in evaluate): compared as far as it got" in problems
    assert f"demo-jax-0 is left out: {broken / 'run.json'} cannot be read: " in problems
    assert [run.name for run in c.runs] == ["demo-torch-0", "demo-torch-1"]


def test_if_no_run_can_be_read_the_error_names_them(tmp_path):
    (write_run(tmp_path, "torch", 0) / "run.json").write_text("{}")
    with pytest.raises(DataError, match="demo-torch-0 is left out: .*run.json is not the record of a run: name is missing"):
        reading.read([tmp_path])


def test_steps_repeated_after_a_resume_count_once_and_a_torn_line_is_skipped(tmp_path):
    run = write_run(tmp_path, "torch", 0)
    file = next(tmp_path.glob("stages/sft-*/metrics.jsonl"))
    write_lines(file, [{"step": s, "loss": v} for s, v in ((0, 3.0), (1, 2.0), (2, 9.0), (1, 2.5), (2, 1.5))])
    with open(file, "a") as stream:
        stream.write('{"step": 3, "lo')
    series = reading.read([run]).runs[0].stages["sft"].metrics["loss"]
    assert (series.steps.tolist(), series.values.tolist()) == ([0, 1, 2], [3.0, 2.5, 1.5])


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    run = write_run(tmp_path, "torch", 0)
    file = next(tmp_path.glob("stages/evaluate-*/output/samples.jsonl"))
    rows = [{"policy": "ppo", "split": "heldout", "prompt": "a\u2028b", "response": "c\x85d\x1c", "gold": 1.0, "score": 1.0}] * 3
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert reading.read([run]).runs[0].samples == rows


# ------------------------------------------------------------------------------------------------------------ grouping


def test_runs_that_differ_only_by_seed_are_one_group(tmp_path):
    c = comparison_of(*(write_run(tmp_path, "torch", seed) for seed in (2, 0, 1)))
    assert [(g.label, [run.seed for run in g.runs]) for g in c.groups] == [("torch", [0, 1, 2])]


def test_groups_are_named_by_backend_and_differing_keys(tmp_path):
    runs = [write_run(tmp_path, b, 0, **{"ppo.kl_coef": k}) for b in ("torch", "jax") for k in (0.01, 0.05)]
    c = comparison_of(*runs)
    assert [g.label for g in c.groups] == ["torch, kl_coef=0.01", "torch, kl_coef=0.05", "jax, kl_coef=0.01", "jax, kl_coef=0.05"]
    assert c.differing["ppo.kl_coef"] == ["0.01", "0.05", "0.01", "0.05"]


def test_keys_that_follow_from_the_backend_do_not_name_groups_but_are_listed(tmp_path):
    runs = [write_run(tmp_path, "torch", 0, **{"backend.threads": 2}), write_run(tmp_path, "jax", 0, **{"backend.threads": 4})]
    c = comparison_of(*runs)
    assert [g.label for g in c.groups] == ["torch", "jax"]
    assert c.differing["backend.threads"] == ["2", "4"]


def test_groups_of_several_algorithms_are_named_by_their_files(tmp_path):
    """Keys that are the same in all runs of an algorithm are listed and no part of its name; those that are varied are."""

    def run(backend, name, **keys):
        changes = {"choices.algorithm": name, "choices.backend": backend, **keys}
        return write_run(tmp_path, backend, 0, **changes)

    methods = {"ppo": {"algorithm.clip": 0.2}, "grpo": {"algorithm.samples": 8, "algorithm.scale": "group"}}
    runs = [run(backend, name, **keys) for backend in ("torch", "jax") for name, keys in methods.items()]
    c = comparison_of(*runs)
    assert [g.label for g in c.groups] == ["torch, ppo", "torch, grpo", "jax, ppo", "jax, grpo"]
    assert c.differing["algorithm.samples"] == ["null", "8", "null", "8"]
    assert [g.label for g in groups.group(reading.read(runs), ["algorithm"]).groups] == ["ppo", "grpo"]
    runs.append(run("jax", "grpo", **{"algorithm.samples": 4, "algorithm.scale": "group"}))
    assert [g.label for g in comparison_of(*runs[-2:]).groups] == ["jax, samples=8", "jax, samples=4"]
    assert [g.label for g in comparison_of(*runs).groups][3:] == ["jax, grpo, samples=8", "jax, grpo, samples=4"]


def test_a_stages_copy_of_a_shared_key_is_not_listed_again(tmp_path):
    runs = [write_run(tmp_path, "torch", 0, **{"ppo.clip": c, "stages.ppo.clip": c}) for c in (0.1, 0.2)]
    assert list(comparison_of(*runs).differing) == ["ppo.clip"]


def test_different_experiments_are_named_by_experiment_alone(tmp_path):
    runs = [write_run(tmp_path, "torch", 0, **{"ppo.clip": c}) for c in (0.1, 0.2)]
    record = json.loads((runs[1] / "run.json").read_text())
    (runs[1] / "run.json").write_text(json.dumps(record | {"experiment": "demo"}))
    assert [g.label for g in comparison_of(*runs).groups] == ["torch, instructgpt", "torch, demo"]


def test_more_seeds_do_not_narrow_what_their_common_prompts_leave_open():
    run = Estimate(2.0, 2.0 - 0.196, 2.0 + 0.196)  # standard error 0.1, so 0.1 / √2 for two with prompts of their own
    both = groups.combine([run, run])
    assert (both.mean, both.high - both.mean) == pytest.approx((2.0, 1.96 * 0.1))
    both = groups.combine([run, run], own_prompts=True)
    assert (both.mean, both.high - both.mean) == pytest.approx((2.0, 1.96 * 0.1 / 2**0.5))


@pytest.mark.parametrize("own_prompts", [False, True])
def test_intervals_over_seeds_and_prompts_cover_the_truth(own_prompts):
    """Of 500 prompts (deviation 2.5) answered with noise (1.5) by policies of ten seeds (0.1); the truth is 0."""
    draw, covered = np.random.default_rng(0), 0
    for _ in range(300):
        hard = draw.normal(0, 2.5, (10 if own_prompts else 1, 500))
        gold = draw.normal(0, 0.1, (10, 1)) + hard + draw.normal(0, 1.5, (10, 500))
        runs = [Estimate(*numerics.mean_interval(row)) for row in gold]
        both = groups.combine(runs, own_prompts=own_prompts)
        covered += both.low <= 0 <= both.high
    assert 0.92 <= covered / 300 <= 0.995


@pytest.mark.parametrize(("worlds", "own"), [((1, 2, 2), False), ((1, 2, 3), True)])
def test_runs_have_prompts_of_their_own_if_no_two_have_the_same_data(tmp_path, worlds, own):
    for seed, world in enumerate(worlds):
        write_run(tmp_path, "torch", seed, **{"data.seed": world})
    assert groups.RunGroup("torch", {}, reading.read([tmp_path]).runs).own_prompts is own


def test_one_policy_evaluated_in_two_ways_has_two_results(tmp_path):
    """Grouped by backend, temperature is a task; runs of the same policy, evaluated alike, are one."""
    for i, temperature in enumerate((0.0, 1.0, 1.0)):
        write_run(tmp_path / str(i), "torch", 0, shared=True, **{"evaluation.temperature": temperature, "name": f"r{i}"})
    found = [run for i in range(3) for run in reading.read([tmp_path / str(i)]).runs]
    group = groups.RunGroup("torch", {}, found, [str(run.config["evaluation.temperature"]) for run in found])
    assert len(group.policy_estimates("heldout", "sft", "gold")) == 2
    assert set(group.scores("heldout", "sft", "gold")) == {"0.0", "1.0"}


def test_seeds_that_disagree_widen_the_interval():
    both = groups.combine([Estimate(1.0, 1.0, 1.0), Estimate(3.0, 3.0, 3.0)])  # s² = 2, so the mean's variance is 1
    assert (both.mean, both.low, both.high) == pytest.approx((2.0, 0.04, 3.96))
    both = groups.combine([Estimate(1.0, 0.9, 1.1), Estimate(3.0, 2.9, 3.1)], own_prompts=True)
    assert (both.mean, both.low, both.high) == pytest.approx((2.0, 0.04, 3.96))


def test_one_run_keeps_its_own_interval_even_if_it_is_lopsided():
    assert groups.combine([Estimate(0.98, 0.91, 0.995)]) == Estimate(0.98, 0.91, 0.995)
    assert groups.combine([]) is None


def test_a_curve_is_the_mean_of_the_seeds_over_their_common_steps(tmp_path):
    runs = [write_run(tmp_path, "torch", seed) for seed in (0, 1)]
    for seed, rows in enumerate(([(0, 1.0), (1, 2.0), (2, 7.0)], [(0, 3.0), (1, 6.0)])):
        write_lines(next(tmp_path.glob(f"stages/sft-demo-torch-{seed}/metrics.jsonl")), [{"step": s, "loss": v} for s, v in rows])
    curve = comparison_of(*runs).groups[0].curve("sft", "loss")
    assert [x.tolist() for x in (curve.steps, curve.mean, curve.low, curve.high)] == [[0, 1], [2, 4], [1, 2], [3, 6]]


def test_long_curves_are_averaged_in_equal_bins(tmp_path):
    run = write_run(tmp_path, "torch", 0)
    write_lines(next(tmp_path.glob("stages/sft-*/metrics.jsonl")), [{"step": s, "loss": float(s)} for s in range(6)])
    curve = comparison_of(run).groups[0].curve("sft", "loss", points=3)
    assert (curve.steps.tolist(), curve.mean.tolist()) == ([0.5, 2.5, 4.5], [0.5, 2.5, 4.5])


# -------------------------------------------------------------------------------------------------------------- claims


def verdicts(c: groups.RunComparison) -> dict[tuple[str, str], str]:
    return {(claim.text, claim.where): claim.verdict for claim in claims.find(c)}


def test_the_checklist_of_the_instructgpt_pipeline(report):
    found = verdicts(report.comparison)
    for backend in ("torch", "jax"):
        assert found["gold: pretrain < sft", backend] == "yes"
        assert found["ppo loses ability (alignment tax)", backend] == "yes"
        assert found["ppo_ptx keeps the ability of sft", backend] == "yes"
        assert found["gold truth: a single labeler < reward model", backend] == "yes"
    assert found["final gold (ppo_ptx) is the same on both backends", "jax and torch"] == "yes"


def test_a_policy_that_got_worse_is_a_no(tmp_path):
    c = comparison_of(write_run(tmp_path, "torch", 0, gold={**GOLD, "ppo": -1.0}))
    assert verdicts(c)["gold: sft < ppo", "torch"] == "no"


@pytest.mark.parametrize(("gain", "verdict"), [(0.02, "yes"), (0.005, "unclear"), (-0.02, "no")])
def test_the_reward_model_is_held_against_the_labelers_pair_by_pair(tmp_path, gain, verdict):
    folder = write_run(tmp_path, "torch", 0)
    file = next(tmp_path.glob("stages/evaluate*/output/evaluation.json"))
    evaluation = json.loads(file.read_text())
    estimate = lambda x, half: {"mean": x, "low": x - half, "high": x + half, "n": 100}  # noqa: E731
    overlapping = {"accuracy/gold": estimate(0.75, 0.02), "labeler_agreement/gold": estimate(0.74, 0.02)}
    evaluation["reward_model"] |= overlapping | {"accuracy_over_labeler/gold": estimate(gain, 0.01)}
    file.write_text(json.dumps(evaluation))
    found = {claim.text: claim for claim in claims.find(comparison_of(folder))}
    assert found["gold truth: a single labeler < reward model"].verdict == verdict


def test_if_nothing_beats_the_baseline_the_headline_says_so(tmp_path):
    c = comparison_of(write_run(tmp_path, "torch", 0, gold={**GOLD, "ppo": -1.0, "ppo_ptx": -1.0}))
    lowered = r"No policy is known to raise the gold score of sft: ppo(_ptx)? lowers it from 0\.\d\d to -\d\.\d\d on torch\."
    assert re.match(lowered, claims.headline(c))


def test_a_headline_claims_no_more_than_its_intervals(tmp_path):
    """The means are 0.1 apart, the intervals 0.32 wide."""
    for seed in (0, 1):
        c = comparison_of(write_run(tmp_path / str(seed), "torch", seed, gold={**GOLD, "ppo": 0.45, "ppo_ptx": 0.4}))
        undecided = (
            r"No policy is known to raise the gold score of sft: ppo(_ptx)? goes from 0\.\d\d to 0\.\d\d on torch, not apart\."
        )
        assert re.match(undecided, claims.headline(c))
        assert all(claim.verdict != "yes" for claim in claims.find(c) if claim.text.startswith("gold: sft < "))


@pytest.mark.parametrize(
    ("worse", "better", "verdict"),
    [((0, -1, 1), (3, 2, 4), "yes"), ((0, -1, 1), (1, 0, 2), "unclear"), ((1, 0, 2), (0, -1, 1), "no")],
)
def test_an_order_holds_only_if_the_intervals_are_apart(worse, better, verdict):
    assert claims.ordered("", "", Estimate(*worse), Estimate(*better)).verdict == verdict


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [((0, -1, 1), (0.5, -1, 2), "yes"), ((0, -1, 1), (1.5, 0.5, 2.5), "unclear"), ((0, -1, 1), (3, 2, 4), "no")],
)
def test_backends_agree_if_each_mean_is_in_the_others_interval(a, b, verdict):
    assert claims.agreement("", "", Estimate(*a), Estimate(*b)).verdict == verdict


def test_the_headline_says_what_was_gained_on_which_backend(tmp_path):
    for backend, ppo in (("torch", 1.6), ("jax", -0.9)):
        write_run(tmp_path, backend, 0, gold={**GOLD, "ppo": ppo, "ppo_ptx": -1.5})
    headline = claims.headline(comparison_of(tmp_path))
    gained = r"ppo raises the gold score of sft from 0\.\d+ to 1\.\d+ on torch; lowers it from 0\.\d+ to -0\.\d+ on jax\."
    assert re.match(gained, headline)
    assert headline.endswith("in 3 of 4 cases.")  # all but ppo


def test_runs_without_an_evaluation_are_compared_by_their_curves(tmp_path):
    report = compare([write_run(tmp_path, "torch", 0, evaluated=False)], tmp_path / "report")
    assert report.headline == "1 run, none of them evaluated yet."
    assert report.claims == [] and "Learning" in (tmp_path / "report" / "report.html").read_text()


def test_real_data_without_gold_is_judged_by_the_win_rate(tmp_path):
    run = write_run(tmp_path, "torch", 0)
    file = next(tmp_path.glob("stages/evaluate-*/output/evaluation.json"))
    content = json.loads(file.read_text())
    for policy in content["splits"]["heldout"].values():
        for metric in [m for m in policy if m in ("gold", "helpful", "truthful", "harmless", "ability") or m.endswith("/gold")]:
            del policy[metric]
    del content["splits"]["adversarial"], content["reward_model"]
    file.write_text(json.dumps(content))
    report = compare([run], tmp_path / "report")
    assert re.match(r"ppo(_ptx)? wins more than half against sft: 7\d\.\d% on torch\.", report.headline)
    assert ("ppo wins more than half against sft", "torch") in verdicts(report.comparison)
    assert "gold score" not in (tmp_path / "report" / "report.md").read_text()


def test_the_parts_of_a_gold_score_have_the_names_that_the_data_give_them(tmp_path):
    run = write_run(tmp_path, "torch", 0)
    file = next(tmp_path.glob("stages/evaluate-*/output/evaluation.json"))
    content = json.loads(file.read_text())
    for policies in content["splits"].values():
        for measures in policies.values():
            measures["unc{overed} $x^$"] = measures.pop("helpful")
            measures["turns"] = measures["length"]
    file.write_text(json.dumps(content))
    report = compare([run], tmp_path / "report")
    assert tables.gold_parts(report.comparison) == ["truthful", "harmless", "unc{overed} $x^$"]
    titles = [row[0] for row in report.tables["policies"].rows]
    assert {"gold score", "truthful", "harmless", "unc{overed} $x^$"} < set(titles) and "turns" not in titles
    assert (tmp_path / "report" / "figures" / "parts.png").exists()


# -------------------------------------------------------------------------------------------------------------- output


class Elements(HTMLParser):
    """What a page is made of, and everything in it that would load something."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if v and k in ("src", "href", "xlink:href") and not v.startswith("#")]


def test_the_page_needs_no_script_and_no_network(page):
    elements = Elements(page)
    assert elements.loads == [] and "@import" not in page and "@font-face" not in page
    assert "script" not in elements.tags and "link" not in elements.tags


def test_sample_text_is_escaped(page):
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; &#34;quotes&#34;" in page


EVIL = "[red]$x^$[/] :ok: <script>a</script> | [x](javascript:a) \x1b[2J\u202e\x07 <b>"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Two groups whose labels differ in such a name; it is also that of a stage, a policy, a split and a warning. Of the figures
    only two are drawn."""
    runs = tmp_path_factory.mktemp("hostile")
    for seed, value in enumerate(("_a", EVIL.replace("/", "|"))):
        folder = write_run(runs, "torch", seed, **{"ppo.kl_coef": value})
        record = json.loads((folder / "run.json").read_text())
        stages = record["stages"]
        stages[EVIL] = stages.pop("ppo_ptx") | {"health": [{"name": EVIL, "step": 3, "message": EVIL}]}
        stages["evaluate"] = stages.pop("evaluate")
        (folder / "run.json").write_text(json.dumps(record | {"command": EVIL, "experiment": EVIL, "status": EVIL}))
        output = runs / stages["evaluate"]["folder"] / "output"
        text = (output / "evaluation.json").read_text().replace('"ppo_ptx"', json.dumps(EVIL))
        (output / "evaluation.json").write_text(text.replace('"adversarial"', json.dumps(EVIL)))
        samples = (output / "samples.jsonl").read_text().replace('"ppo_ptx"', json.dumps(EVIL))
        (output / "samples.jsonl").write_text(
            samples + json.dumps({"policy": EVIL, "split": EVIL, "prompt": EVIL, "response": EVIL})
        )
    few = {"gold": figures.gold, "losses": figures.losses}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_makers", lambda found, metrics=(): few)
        patch.setattr(figures, "for_papers", lambda *_: [])
        return compare([runs], runs / "report")


def test_no_name_is_a_tag_a_link_or_markup_in_a_report(hostile):
    page, text = ((next(f for f in hostile.files if f.name == name)).read_text() for name in ("report.html", "report.md"))
    elements = Elements(page)
    assert "script" not in elements.tags and "b" not in elements.tags and elements.loads == []
    assert "&lt;script" in page and "&lt;script" in text
    assert not re.search(r"<script|<b>|\]\(javascript", text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page + text)
    rows = [row for row in text.splitlines() if row.startswith("|")]
    blocks = [block for block in map(str.splitlines, text.split("\n\n")) if block[0].startswith("|")]
    assert rows and all(len({len(re.findall(r"(?<!\\)\|", row)) for row in block}) == 1 for block in blocks)


def test_no_name_breaks_a_figure(hostile):
    page = next(f for f in hostile.files if f.name == "report.html").read_text()
    drawn = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawn) == 2 and all(ElementTree.fromstring(svg) is not None for svg in drawn)
    assert "$x^$" in page and " kl_coef=_a" in page


def test_no_name_steers_the_terminal_or_is_coloured(hostile):
    shown = terminal(hostile, 400)
    assert "[red]$x^$[/] :ok: <script>" in shown and r"\x1b[2J\u202e\x07" in shown
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)


def test_samples_stand_side_by_side_and_backends_that_answer_alike_share_a_row(page):
    assert page.count("It is Orvane.") == 4  # four prompts, once each: jax and torch sampled the same text
    assert '<div class="who cell first">jax, torch</div>' in page


def test_every_figure_is_on_the_page_and_follows_the_colour_scheme(page):
    drawn = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    names = [re.search(r'aria-label="(\w+)"', svg)[1] for svg in drawn]
    assert names == ["gold", "parts", "ability", "against", "frontier", "best_of", "curves", "reward_model", "losses", "cost"]
    for svg in drawn:
        ElementTree.fromstring(svg)
        assert "var(--ink)" in svg and "#333333" not in svg and "#dddddd" not in svg
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_the_markdown_report_has_the_same_numbers(report):
    text = next(f for f in report.files if f.name == "report.md").read_text()
    estimate = report.comparison.groups[0].policy("heldout", "ppo", "gold")
    assert f"{estimate.mean:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]" in text
    assert report.headline in text and "| gold: sft < ppo | yes |" in text
    widths = {block[0].count("|") - row.count("|") for block in map(str.splitlines, text.split("\n\n")) for row in block
              if row.startswith("|")}  # fmt: skip
    assert widths == {0}


def test_the_interval_of_a_share_ends_at_0_and_100_percent():
    assert claims.show(Estimate(0.875, 0.728, 1.022), claims.PERCENT) == "87.5% [72.8%, 100.0%]"
    assert claims.show(Estimate(0.02, -0.02, 0.06), claims.PERCENT) == "2.0% [0.0%, 6.0%]"
    assert claims.show(Estimate(0.02, -0.02, 0.06), claims.GAIN) == "+2.0% [-2.0%, +6.0%]"
    assert claims.show(Estimate(-0.17, -0.26, -0.08), claims.GAIN) == "-17.0% [-26.0%, -8.0%]"  # a difference may be below
    assert tables.REWARD_MODEL_METRICS["accuracy_over_labeler/gold"][1] == claims.GAIN


def test_the_metrics_file_is_tidy(report):
    with open(next(f for f in report.files if f.name == "metrics.csv"), newline="") as stream:
        rows = list(csv.DictReader(stream))
    columns = ["group", "task", "run", "backend", "seed", "stage", "step", "metric", "value", "low", "high"]
    assert list(rows[0]) == columns
    table = parquet.read_table(next(f for f in report.files if f.name == "metrics.parquet"))
    assert table.column_names == columns and table.num_rows == len(rows)
    assert table["value"].to_pylist() == [float(row["value"]) for row in rows]
    chosen = [r for r in rows if (r["run"], r["stage"], r["metric"]) == ("demo-jax-1", "ppo", "objective/kl")]
    assert [r["step"] for r in chosen] == [str(step) for step in range(120)]
    evaluated = [r for r in rows if r["metric"] == "heldout/sft/gold"]
    assert [f"{r['backend']} {r['seed']} {r['step']}" for r in evaluated] == ["jax 0 ", "jax 1 ", "torch 0 ", "torch 1 "]


def test_the_readme_figure_is_a_png(report):
    content = next(f for f in report.files if f.name == "report.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000


def terminal(report, width: int = 80) -> str:
    stream = io.StringIO()
    print_summary(report, Terminal(file=stream, width=width))
    return stream.getvalue()


def test_the_terminal_shows_headline_verdicts_and_where_the_files_are(report):
    text = terminal(report)
    assert "ppo raises the gold score of sft" in text
    assert re.search(r"ppo_ptx keeps the ability of sft +yes", text)
    assert all(f"wrote {file}" in text for file in report.files if file.parent.name != "figures")
    assert "figures (PNG and SVG)" in text
    assert "…" not in text  # two backends fit 80 columns


def test_a_sweep_of_many_groups_puts_them_in_rows(tmp_path):
    for kl in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2):
        write_run(tmp_path, "torch", 0, **{"ppo.kl_coef": kl})
    c = comparison_of(tmp_path)
    table = tables.policies(c)
    assert list(table.header) == ["", *POLICIES]
    assert table.rows[0][0] == "gold score" and table.rows[1][0] == "torch, kl_coef=0.0"
    assert re.fullmatch(r"-1\.\d\d ±0\.16", table.rows[1][1])
    assert re.match(r"ppo(_ptx)? raises the gold score of sft in 6 of 6 groups\.$", claims.headline(c))


def test_a_measure_of_nothing_is_left_out_instead_of_counting_as_the_best():
    """What could not be scored has a mean of NaN, which sorting would put last."""
    nothing, something = {"mean": float("nan"), "n": 0}, {"mean": 1.0, "low": 0.5, "high": 1.5, "n": 4}
    assert list(_estimates({"score": nothing, "gold": something})) == ["gold"]


# -------------------------------------------------------------------------------------------------------------- judges


def judged_run(runs, backend, seed, helped):
    """A run whose evaluation has a judge, and attacks as a split. ``helped`` is {policy: the judge's mean on the attacks}."""
    folder = write_run(runs, backend, seed)
    stages = json.loads((folder / "run.json").read_text())["stages"]
    file = runs / stages["evaluate"]["folder"] / "output/evaluation.json"
    found = json.loads(file.read_text())
    for policy, mean in helped.items():
        found["splits"]["heldout"][policy]["helped"] = {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 500}
        measure = {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "n": 68}
        found["splits"].setdefault("attacks_1", {})[policy] = {"helped": measure}
    file.write_text(json.dumps(found))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["evaluation"] = {"judges": {"helped": {"name": "pattern", "pattern": "x"}, "absent": {"name": "length"}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_judges_are_a_matrix_of_policies_and_splits(tmp_path):
    for seed, mean in enumerate((0.3, 0.5)):
        judged_run(tmp_path, "torch", seed, {"sft": mean, "ppo": 0.1})
    report = compare([tmp_path], tmp_path / "report")
    page = next(f for f in report.files if f.name == "report.html").read_text()
    assert 'aria-label="judges"' in page and '<section id="judges">' in page
    squares = next(svg for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL) if 'aria-label="judges"' in svg)
    assert re.findall(r">(\d\.\d\d)<", squares) == ["0.00", "0.40", "0.00", "0.10"]
    ElementTree.fromstring(squares)
    comparison = comparison_of(tmp_path)
    assert comparison.judges == ["helped"]
    table = tables.judges(comparison)
    cells = {row[0]: row[1:] for row in table.rows}
    assert table.header == ["", "heldout", "adversarial", "attacks_1"]
    assert [cell[:4] for cell in cells["sft"]] == ["0.00", "", "0.40"] and cells["ppo"][2].startswith("0.10")
    assert not re.search("absent", page.partition("Configuration")[0])


def test_many_splits_are_panels_in_rows_that_can_be_read(tmp_path):
    folder = write_run(tmp_path / "runs", "torch", 0)
    file = next((tmp_path / "runs").glob("stages/evaluate*/output/evaluation.json"))
    found = json.loads(file.read_text())
    found["splits"] |= {f"attacks_{i}": found["splits"]["heldout"] for i in range(6)}
    file.write_text(json.dumps(found))
    c = comparison_of(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, of axes that collapsed
        figure = figures.gold(c)
        figure.savefig(tmp_path / "gold.png")
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert len(shown) == 8 and min(ax.get_position().width for ax in shown) > 0.2
    assert all(ax.xaxis.get_tick_params().get("labelbottom", True) for ax in shown[-3:])  # nothing stands below these


def test_runs_without_judges_have_no_such_section(page):
    assert "judges" not in page and '<section id="tests">' not in page


# --------------------------------------------------------------------------------------------------------------- tests


def test_tests_that_the_data_name_are_a_table_with_their_groups(tmp_path):
    """Over two seeds, the mean: (0.6 + 0.7) / 2. A measure that merely looks like one stays out."""
    for seed, mean in enumerate((0.6, 0.7)):
        folder = write_run(tmp_path, "torch", seed)
        file = tmp_path / json.loads((folder / "run.json").read_text())["stages"]["evaluate"]["folder"] / "output/evaluation.json"
        found = json.loads(file.read_text())
        for name, value in {"bias": mean, "bias/age": 0.25, "bias/entropy": 0.9, "biased": 0.1}.items():
            measure = {"mean": value, "low": value - 0.05, "high": value + 0.05, "n": 68}
            found["splits"]["heldout"]["ppo"][name] = measure
        file.write_text(json.dumps(found))
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["data"] = {"name": "files", "tests": {"bias": [{"path": "x.csv"}], "absent": [{"path": "y.csv"}]}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))

    comparison = comparison_of(tmp_path)
    assert comparison.tests == ["bias", "bias/age", "bias/entropy"]
    shown = [row for row in tables.tests(comparison).rows if row[0] == "ppo"]
    assert [row[1][:5] for row in shown] == ["65.0%", "25.0%", "0.900"]
    report = compare([tmp_path], tmp_path / "report")
    assert '<section id="tests">' in next(f for f in report.files if f.name == "report.html").read_text()
