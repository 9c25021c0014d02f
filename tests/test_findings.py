"""Findings: what a claim measures, when it holds, and that criteria stand before the runs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest

from lockstep.commands.reproduce import reproduce, seeds
from lockstep.config.compose import compose
from lockstep.config.overrides import read
from lockstep.errors import ConfigError, DataError
from lockstep.reporting.compare.reading import read as read_runs
from lockstep.reporting.findings import criteria
from lockstep.reporting.findings.finding import finding, findings, parsed
from lockstep.reporting.findings.outcomes import Mean, Outcome, as_claimed, between_backends, outcomes, verdict
from lockstep.runs.experiment import Experiment
from run_folders import GOLD, write_lines, write_run
from runs import DECODER, PPO_ONLY, TINY

HEAD = "title: a\nsource: b\nhours: 1\nsweep: [seed=1]\nclaims:\n"


def claiming(value: str, bound: str = "above: 0"):
    text = f"{HEAD}  c: {{claim: it does, published: once, value: '{value}', {bound}}}"
    return parsed(text, "here")


def test_intervals_are_students():
    """Of four seeds, by hand: the mean is 2.5, the deviation 1.290994, t(3, 97.5%) is 3.182446."""
    found = Mean(dict(enumerate([1.0, 2.0, 3.0, 4.0])))
    assert found.mean == 2.5
    assert found.half == pytest.approx(3.182446 * 1.290994 / 2, rel=1e-6)
    assert str(found) == "2.5 ± 2.1, 4 seeds" and str(Mean({3: 1.5})) == "1.5, one seed"
    assert str(Mean({1: 2.28, 2: 2.28})) == "2.280 ± 0.000, 2 seeds" and str(Mean({1: 100.0, 2: 140.0})) == "120 ± 254, 2 seeds"


@pytest.mark.parametrize(
    ("seeds", "bound", "expected"),
    [
        ([1.0, 1.1, 0.9], "above: 0", "held"),
        ([1.0, 1.1, 0.9], "above: 2", "not held"),
        ([1.0, 1.1, 0.9], "above: 1", "not decided"),
        ([-1.0, -1.1, -0.9], "below: 0", "held"),
        ([1.0, 1.1, 0.9], "below: 0.5", "not held"),
        ([1.0], "above: 0", "not decided"),
        ([1.0, -3.0, 4.0], "above: 0", "not decided"),
        ([0.1, 0.1, 0.1], "above: 0", "not decided"),  # their deviation is 1e-17
        ([1.0, 1.0], "above: 0", "not decided"),  # two equal shares say nothing about a third
        ([1.0] * 5, "above: 0", "held"),
    ],
)
def test_a_claim_holds_by_its_whole_interval(seeds, bound, expected):
    claim = claiming("heldout/ppo/gold", bound).claims["c"]
    assert verdict(claim, Mean(dict(enumerate(seeds)))) == expected


def test_seeds_are_counted_by_the_claims_own_criterion():
    """Four of five may be as claimed and their mean be undecided."""
    found = Mean(dict(enumerate([0.3, 0.2, 0.4, -9.0, 0.1])))
    assert as_claimed(claiming("a/b").claims["c"], found) == "4 of 5"
    assert as_claimed(claiming("a/b", "above: 0.25").claims["c"], found) == "2 of 5"
    assert as_claimed(claiming("a/b", "below: 0").claims["c"], found) == "1 of 5"


def test_metrics_are_found_by_their_places_and_subtracted_seed_by_seed(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path, "torch", seed)
    runs = read_runs([tmp_path]).runs
    (found,), problems = outcomes(claiming("heldout/ppo/gold - heldout/sft/gold"), runs)
    policies = [run.evaluation.splits["heldout"] for run in sorted(runs, key=lambda run: run.seed)]
    assert list(found.found.seeds.values()) == [each["ppo"]["gold"].mean - each["sft"]["gold"].mean for each in policies]
    assert found.found.mean == pytest.approx(GOLD["ppo"] - GOLD["sft"], abs=0.2) and not problems
    last = runs[0].stages["ppo"].metrics["objective/kl"].values[-1]
    (of_stage,), _ = outcomes(claiming("ppo/objective/kl"), runs[:1])
    assert of_stage.found.mean == last and of_stage.verdict == "not decided"
    (of_model,), _ = outcomes(claiming("reward_model/accuracy/gold"), runs)
    assert 0 < of_model.found.mean < 1
    nothing, problems = outcomes(claiming("heldout/dpo/gold"), runs)
    assert not nothing and len(problems) == 3 and "has no heldout/dpo/gold" in problems[0]


def test_a_metric_is_averaged_over_the_steps_at_which_another_is_in_a_range(tmp_path):
    run = write_run(tmp_path, "torch", 0)
    rows = [(0.0, 5.0), (0.5, 6.0), (1.0, 7.0), (1.5, None), (2.0, 9.0), (2.5, 1.0)]
    logged = [{"step": i, "objective/kl": kl, **({"objective/gold": gold} if gold else {})} for i, (kl, gold) in enumerate(rows)]
    write_lines(tmp_path / "stages" / f"ppo-{run.name}" / "metrics.jsonl", logged)
    runs = read_runs([tmp_path]).runs

    def value(text):
        found, problems = outcomes(claiming(text), runs)
        return found[0].found.mean if found else problems[0].split(": ")[1]

    assert value("ppo/objective/gold(objective/kl=1..2)") == 8.0  # (7 + 9) / 2: the step without a gold score has none
    assert value("ppo/objective/gold(objective/kl=0..0.5) - ppo/objective/gold") == 5.5 - 1.0
    assert value("ppo/objective/kl( objective/gold = -1 .. 5.0 )[seed=0]") == (0.0 + 2.5) / 2
    assert value("ppo/objective/gold(objective/kl=3..4)") == f"no step of ppo in {run.name} has objective/kl=3..4"
    assert value("ppo/objective/gold(nothing=3..4)") == f"{run.name} has no ppo/nothing"
    assert value("heldout/ppo/gold(objective/kl=1..2)") == f"{run.name} has no heldout/ppo/gold that is logged by step"


def test_runs_of_one_seed_are_told_apart_by_their_settings(tmp_path):
    for kl_coef, gold in ((0.1, 1.0), (0.2, 3.0)):
        for seed in (0, 1):
            write_run(tmp_path, "torch", seed, gold=GOLD | {"ppo": gold}, **{"ppo.kl_coef": kl_coef})
    runs = read_runs([tmp_path]).runs
    value = "heldout/ppo/gold[ppo.kl_coef=0.2] - heldout/ppo/gold[ppo.kl_coef=0.1]"
    (found,), _ = outcomes(claiming(value), runs)
    assert found.found.mean == pytest.approx(2.0, abs=0.3)
    nothing, problems = outcomes(claiming("heldout/ppo/gold"), runs)
    assert not nothing and "2 runs, where there should be one" in problems[0]
    nothing, problems = outcomes(claiming("heldout/ppo/gold[ppo.kl_coef=7]"), runs)
    assert not nothing and "0 runs with ppo.kl_coef=7" in problems[0]


def test_backends_are_compared_over_the_seeds_that_both_have():
    one = Outcome("c", "torch", Mean({1: 2.0, 2: 3.0, 3: 9.0}), "held")
    other = Outcome("c", "jax", Mean({1: 1.0, 2: 4.0}), "not decided")
    (found,) = between_backends([one, other, Outcome("d", "jax", Mean({1: 1.0}), "held")])
    assert (found.name, found.backends, dict(found.found.seeds)) == ("c", ("torch", "jax"), {1: 1.0, 2: -1.0})
    assert found.verdicts == ("held", "not decided") and not found.apart
    always = Outcome("c", "jax", Mean({1: 1.0, 2: 2.01}), "held")
    assert between_backends([one, always])[0].apart


def test_nothing_is_decided_while_a_seed_of_the_sweep_is_missing(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path, "torch", seed)
    runs, claim = read_runs([tmp_path]).runs, claiming("heldout/ppo/gold - heldout/sft/gold")
    (whole,), problems = outcomes(claim, runs, {1, 2, 3})
    assert whole.verdict == "held" and not problems
    (part,), problems = outcomes(claim, runs, {1, 2, 3, 4})
    assert part.verdict == "not decided" and problems == ["c, torch, seed 4: 0 runs, where there should be one"]
    assert seeds(["experiment=demo", "seed=1,2", "backend=torch,jax"]) == {1, 2}
    assert seeds(["seed=1,2,3", "seed=7"]) == {7} and seeds(["seed=range(1,4)"]) == {1, 2, 3} and seeds([]) == set()


def test_the_last_value_of_a_stage_that_goes_on_is_not_its_end(tmp_path):
    for seed in (1, 2):
        run = write_run(tmp_path, "torch", seed)
    record = json.loads((run / "run.json").read_text())
    record["stages"]["ppo"]["status"] = "running"
    (run / "run.json").write_text(json.dumps(record))
    (found,), problems = outcomes(claiming("ppo/objective/kl"), read_runs([tmp_path]).runs, {1, 2})
    assert found.verdict == "not decided" and problems == [f"c, torch, seed 2: {run.name} has not finished ppo"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "  c: {claim: x, published: y, value: gold, above: 0}", "'gold' in the value 'gold' is no metric"),
        (HEAD + "  c: {claim: x, published: y, value: 'a/b - c/d[e]', above: 0}", r"'c/d\[e\]' in the value"),
        (HEAD + "  c: {claim: x, published: y, value: 'a/b - c/d(kl)', above: 0}", r"'\(kl\)' in the value .* is no range"),
        (HEAD + "  c: {claim: x, published: y, value: 'a/b(kl=2..1)', above: 0}", "is no range"),
        (HEAD + "  c: {claim: x, published: y, value: 'a/b(kl=1.2.3..4)', above: 0}", "is no range"),
        (HEAD + "  c: {claim: x, published: y, value: a/b}", "needs one of 'above' and 'below'"),
        (HEAD + "  c: {claim: x, published: y, value: a/b, above: 0, below: 1}", "needs one of"),
        (HEAD + "  c: {claim: x, value: a/b, above: 0}", r"Missing: here.claims.c.published"),
        ("title: [", "here is no YAML"),
        ("- a", "here must be a group of keys"),
    ],
)
def test_a_file_that_is_no_finding_says_why(text, message):
    with pytest.raises(ConfigError, match=message):
        parsed(text, "here")


def test_an_unknown_finding_names_the_nearest():
    with pytest.raises(ConfigError, match="no finding 'instructgtp'. Did you mean 'instructgpt'"):
        finding("instructgtp")


@pytest.mark.parametrize("name", findings())
def test_the_first_job_of_every_finding_composes(name, tmp_path):
    found, _ = finding(name)
    given = [o for o in read(list(found.sweep)) if not o.key_or_group.startswith("hydra")]
    first = [f"{o.get_key_element()}={next(o.sweep_string_iterator())}" if o.is_sweep_override() else o.input_line for o in given]
    config = compose(first)
    assert config["backend"]["name"] in ("torch", "jax")
    stages = Experiment(compose([*first, f"folder={tmp_path}"])).stages
    splits = {*config["evaluation"]["splits"], *stages, *(f"{stage}_twins" for stage in stages)}
    again = {f"{split}@{stage}" for split in splits for stage in stages}
    for claim in found.claims.values():
        for term in claim.terms:
            assert term.metric.partition("/")[0] in {*splits, *again, "reward_model"}, term


def test_criteria_that_are_younger_than_the_runs_or_were_changed_are_said_to_be(tmp_path):
    """The made-up runs began on 2026-11-23."""
    write_run(tmp_path, "torch", 0)
    runs, file = read_runs([tmp_path]).runs, tmp_path / "pages/c.yaml"
    text = f"{HEAD}  c: {{claim: it does, published: once, value: a/b, above: 0}}"
    criteria.write_down(file, text)
    assert "AFTER the first of these runs had begun, 2026-11-23 10:00:00 UTC" in criteria.how(
        file, parsed(text, ""), runs, ["x=1"]
    )
    file.write_text(f"# written down 2026-11-22T09:00:00+00:00\n{text}")
    said = criteria.how(file, parsed(text, ""), runs, [])
    assert (
        "written down 2026-11-22 09:00:00 UTC, and the first" in said and "CHANGED" not in said and "other settings" not in said
    )
    criteria.write_down(file, text.replace("above: 0", "above: 1"))  # keeps what there is
    assert "CHANGED" in criteria.how(file, parsed(text.replace("above: 0", "above: 1"), ""), runs, [])
    assert "CHANGED" not in criteria.how(file, parsed(text.replace("hours: 1", "hours: 2"), ""), runs, [])


def test_a_finding_of_ones_own_is_run_and_has_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/finding").mkdir(parents=True)
    stages = ["~stages.sft", "~stages.reward", "~stages.ppo"]
    sizes = [each for each in TINY if each.startswith(("data", "pretrain", "tracker"))]
    sweep = [*sizes, *DECODER, *PPO_ONLY, *stages, "backend=torch", "seed=1,2"]
    text = HEAD.replace("[seed=1]", json.dumps(sweep)) + (
        "  falls: {claim: '<b>it</b> | falls', published: always, value: pretrain/loss, below: 100}\n"
        "  rises: {claim: it rises, published: never, value: pretrain/loss, above: 100}\n"
    )
    (tmp_path / "conf/finding/own.yaml").write_text(text)
    with pytest.raises(DataError):
        reproduce("own", [], runs=False)
    command = [sys.executable, "-m", "lockstep", "reproduce", "own"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    shown = done.stdout
    assert done.returncode == 0, shown + done.stderr
    assert "torch: of 2 claims 1 held, 1 not held." in shown
    (output,) = (tmp_path / "runs/findings/pages").glob("own-*")
    html = (output / "page.html").read_text()
    assert "&lt;b&gt;it&lt;/b&gt; | falls" in html and "<b>it" not in html and "The criteria were written down" in html
    assert "it\\</b> \\| falls" in (output / "page.md").read_text() or "\\| falls" in (output / "page.md").read_text()
    rows = list(csv.DictReader((output / "outcomes.csv").open()))
    assert [(row["claim"], row["seed"]) for row in rows] == [("falls", "1"), ("falls", "2"), ("rises", "1"), ("rises", "2")]
    assert (output / "page.png").stat().st_size > 10_000
    report, again = reproduce("own", [], runs=False)
    assert again == output and [each.verdict for each in report.found] == ["held", "not held"]
