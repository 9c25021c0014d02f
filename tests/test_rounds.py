"""Rounds: stages that repeat, the names by which they find each other, labels of labelers inside and outside of the process."""

import json
import re
import shutil
import sys
import types
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from listings import python_listings, run_listings
from lockstep.checking.conformance import conform, subject
from lockstep.checking.parity.march import March
from lockstep.commands.run import run_config
from lockstep.config.compose import compose
from lockstep.data.labels import CANDIDATES, LABELS, candidates_in, comparisons_in, labels_in
from lockstep.data.mixture import Mixture
from lockstep.errors import ConfigError, DataError, MissingData, Waiting
from lockstep.interfaces import DataSource, Label
from lockstep.reporting.compare import compare
from lockstep.runs.assembly import Assembly
from lockstep.runs.collection import labelled, measures
from lockstep.runs.experiment import Experiment
from lockstep.runs.rounds import in_rounds
from lockstep.storage.files import dump_line, read_json, write_text
from lockstep.types import Candidates, Comparison, Prompt
from lockstep_miniature.labelers import GROUPS, utility
from lockstep_miniature.people import SimulatedLabelers
from lockstep_miniature.source import Config, Miniature
from lockstep_miniature.tasks import Task
from runs import DECODER, TINY

ROUNDS = [*TINY, *DECODER, "experiment=rounds", "collection.prompts=10", "algorithm.iterations=1", "evaluation.splits=[heldout]"]


def composed(folder, *overrides):
    return compose([*ROUNDS, f"folder={folder}", *overrides])


def run(folder, *overrides):
    return run_config(composed(folder, *overrides), "test")


def stage(run_folder, name):
    return run_folder.parent / read_json(run_folder / "run.json")["stages"][name]["folder"]


def expanded(repeat=3, first=None, stages=("labels", "reward", "ppo")):
    group = {"repeat": repeat, "first": {"ppo": "sft"} if first is None else first, "stages": {name: {} for name in stages}}
    return list(in_rounds("rounds", group))


# ------------------------------------------------------------------------------------------------------------- names


def test_stages_repeat_in_order_and_end_in_the_number_of_their_round():
    assert [(name, number) for name, _, _, number in expanded(2)][:-1] == [
        ("labels_1", 1), ("reward_1", 1), ("ppo_1", 1), ("labels_2", 2), ("reward_2", 2), ("ppo_2", 2),
    ]  # fmt: skip


def test_a_name_means_this_round_and_last_the_one_before():
    scopes = {name: scope for name, _, scope, _ in expanded(3)}
    assert scopes["labels_1"].one("last.ppo", "x") == "sft"
    assert scopes["labels_2"].one("last.ppo", "x") == "ppo_1"
    assert scopes["ppo_3"].one("reward", "x") == "reward_3"
    assert scopes["ppo_3"].one("last.reward", "x") == "reward_2"
    assert scopes["ppo_3"].one("pretrain", "x") == "pretrain"


def test_all_means_every_round_so_far_and_what_comes_later_in_a_round_is_not_there_yet():
    scopes = {name: scope for name, _, scope, _ in expanded(3)}
    assert scopes["reward_2"].all("all.labels") == ("labels_1", "labels_2")
    assert scopes["labels_2"].all("all.labels") == ("labels_1",)
    assert scopes["labels_1"].all("all.labels") == ()
    assert scopes["labels_2"].all("ppo") == ("ppo",)  # itself, so the experiment says that there is no such stage


def test_after_the_rounds_last_is_the_final_one():
    *_, (name, _, scope, _) = expanded(3)
    assert name == ""
    assert scope.one("last.ppo", "x") == scope.one("ppo", "x") == "ppo_3"
    assert scope.all("all.ppo") == ("ppo_1", "ppo_2", "ppo_3")


def test_the_first_round_says_what_last_means_there():
    scope = expanded(2, first={})[0][2]
    with pytest.raises(ConfigError, match=r"reads 'last.ppo', which means no stage in the first round. .* first: {ppo: sft}"):
        scope.one("last.ppo", "stages.labels_1")
    with pytest.raises(ConfigError, match=r"stages.rounds.first has 'pp', .* Did you mean 'ppo'\? Stages: labels, ppo, reward"):
        expanded(2, first={"pp": "sft"})


def test_a_name_of_several_stages_is_refused_where_one_is_needed(tmp_path):
    with pytest.raises(ConfigError, match=r"reads 'all.ppo', which means 3 stages \(ppo_1, ppo_2, ppo_3\). Name one of them."):
        Experiment(composed(tmp_path, "+stages.more={algorithm: ${sft}, policy: all.ppo}"))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["stages.rounds.repeat=0"], "stages.rounds.repeat=0 must be at least 1"),
        (["+stages.ppo_1=${stages.sft}"], "Two stages are called 'ppo_1', one of them in rounds"),
        (["stages.rounds.stages.labels.policies=[]"], r"collects responses of no policy. .*policies=\[sft\]"),
        (["+stages.rounds.stages.reward.shares=[1,2,3]"], "reward_1.shares=.* needs as many sources"),
        (["stages.rounds.stages.labels.labeler=null"], "labels_1 has no labeler. Choose who ranks: labeler=people"),
        (["collection.samples=2", "stages.rounds.stages.labels.policies=[sft,pretrain,last.ppo]"], "3 policies share"),
        (["stages.rounds.stages.reward.comparisons=[sft]"], "needs a comparisons from the stage 'sft', which makes a policy"),
        (["stages.rounds.stages.reward.comparisons=[labes]"], "reads the stage 'labes', .* Did you mean"),
        (["environment=shop", "+stages.rounds.stages.labels.environment=${environment}"], "labels_1 collects single responses"),
        (["+stages.sft.labeler={name: people}"], "has a labeler, which only a collection has"),
        (["+stages.evaluate.comparisons=[data]"], "trains nothing, so it takes no comparisons"),
        (["labeler=miniature", "labeler.groups=[warmm]"], "labeler.groups has 'warmm', which is none. Did you mean 'warm'"),
        (["labeler.overlap=7"], "labeler.overlap=7 needs as many labelers; labeler.groups has 6"),
        (["+stages.sft.collection=${collection}"], "needs one of algorithm, evaluation, collection and attack"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_is_loaded(tmp_path, overrides, text):
    with pytest.raises(ConfigError, match=text):
        Experiment(composed(tmp_path, *overrides))


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module", params=["torch", "jax"])
def finished(request, tmp_path_factory):
    return run(tmp_path_factory.mktemp("rounds"), f"backend={request.param}", "stages.rounds.repeat=2")


def test_every_round_is_stages_like_any_other(finished):
    record = read_json(finished / "run.json")
    assert list(record["stages"]) == [
        "pretrain",
        "sft",
        "labels_1",
        "reward_1",
        "ppo_1",
        "labels_2",
        "reward_2",
        "ppo_2",
        "evaluate",
    ]
    assert all(each["status"] == "done" for each in record["stages"].values())
    evaluation = read_json(stage(finished, "evaluate") / "output" / "evaluation.json")
    assert list(evaluation["splits"]["heldout"]) == ["pretrain", "sft", "ppo_1", "ppo_2"]


def test_a_round_samples_the_last_policy_beside_sft(finished):
    for name, last in (("labels_1", "sft"), ("labels_2", "ppo_1")):
        candidates = candidates_in(stage(finished, name) / CANDIDATES)
        wrote = {policy for each in candidates for policy in each.policies}
        assert wrote == {stage(finished, last).name, stage(finished, "sft").name}
        assert all(2 <= len(set(each.completions)) == len(each.completions) <= 4 for each in candidates)
        (seed,) = {each.seed for each in candidates}  # what they were sampled with
        assert isinstance(seed, int)


def test_labels_of_a_held_out_group_train_nothing():
    candidates = [Candidates(str(i), Prompt.of("hello"), ("a", "b")) for i in range(2)]
    given = [Label("0", (0, 1), "ann", "training"), Label("1", (1, 0), "bob", "heldout"), Label("0", (1, 0), "cid")]
    assert [each.labeler for each in labelled(candidates, given)] == ["ann", "cid", "bob"]
    assert [each.labeler for each in labelled(candidates, given, ["heldout"])] == ["ann", "cid"]
    with pytest.raises(DataError, match="All labels are of groups that are held out: heldout. Others have to label, too."):
        labelled(candidates, given[1:2], ["heldout"])


def test_no_round_repeats_a_prompt(finished):
    seen = [{each.prompt.messages for each in candidates_in(stage(finished, f"labels_{n}") / CANDIDATES)} for n in (1, 2)]
    ids = [{each.id for each in candidates_in(stage(finished, f"labels_{n}") / CANDIDATES)} for n in (1, 2)]
    assert not ids[0] & ids[1]
    prompts = {p.messages for p in Miniature(Config(prompts=60)).prompts("train")}
    assert seen[0] | seen[1] <= prompts
    assert not seen[0] & seen[1] or len(prompts) < 60  # the same question may be drawn twice in a small world


def test_the_reward_model_reads_all_labels_so_far(finished):
    config = read_config(finished)
    experiment = Experiment(config)
    assembly = Assembly(experiment, {name: folder.output for name, folder in experiment.folders.items()})
    read = assembly.data_of(experiment.stages["reward_2"]).comparisons("train")
    both = [c for n in (1, 2) for c in comparisons_in(stage(finished, f"labels_{n}") / "output")]
    own = list(assembly.data.comparisons("train"))
    assert sorted(map(str, read)) == sorted(map(str, [*own, *both]))
    assert assembly.data_of(experiment.stages["reward_1"]).comparisons("heldout")[0] == assembly.data.comparisons("heldout")[0]
    untied = [c for c in [*own, *both] if len(set(c.ranks)) > 1]
    assert read_json(stage(finished, "reward_2") / "done.json")["data"]["train comparisons"]["total"] == len(untied)


def read_config(finished):
    from lockstep.storage.records import read_configuration

    return read_configuration(finished)


def test_a_collection_reports_what_the_labels_say(finished):
    metrics = read_json(stage(finished, "labels_2") / "done.json")["metrics"]
    assert metrics["labels"] == metrics["prompts"] <= 10
    assert 0 <= metrics["agreement/gold"] <= 1
    assert metrics["win_rate/ppo_1"] + metrics["win_rate/sft"] == pytest.approx(1)


def test_a_gain_is_over_the_policy_of_the_round_before(finished):
    evaluation = read_json(stage(finished, "evaluate") / "output" / "evaluation.json")["splits"]["heldout"]
    for policy, before in (("ppo_1", "sft"), ("ppo_2", "ppo_1")):
        difference = evaluation[policy]["gold"]["mean"] - evaluation[before]["gold"]["mean"]
        assert evaluation[policy]["gain"]["mean"] == pytest.approx(difference, abs=1e-6)
    assert "gain" not in evaluation["sft"] and "gain" not in evaluation["pretrain"]


def test_compare_says_of_each_round_whether_it_gained(finished, tmp_path):
    report = compare([finished], tmp_path)
    said = {claim.text: claim.because for claim in report.claims}
    gain = read_json(stage(finished, "evaluate") / "output" / "evaluation.json")["splits"]["heldout"]["ppo_2"]["gain"]["mean"]
    assert said["ppo_2 is better than the policy of the round before"].startswith(f"{gain:+.2f}")
    assert any("gain over the round before" in row[0] for row in report.tables["policies"].rows)


def test_rounds_that_were_interrupted_give_the_same_labels(finished, tmp_path):
    """A stage that is started again collects the same candidates and gets the same labels."""
    folder = stage(finished, "labels_2")
    before = {file: (folder / file).read_bytes() for file in (CANDIDATES, "output/comparisons.jsonl")}
    again = tmp_path / "again"
    shutil.copytree(finished.parent, again)
    for leftover in ("done.json", CANDIDATES):
        (again / "stages" / folder.name / leftover).unlink()
    shutil.rmtree(again / "stages" / folder.name / "output")
    run_config(read_config(finished) | {"folder": str(again)}, "test")
    assert {file: (again / "stages" / folder.name / file).read_bytes() for file in before} == before


def test_parity_says_that_it_collects_nothing():
    with pytest.raises(ConfigError, match="reward_1 trains on what labels_1 collects. Compare an experiment without rounds"):
        March([*ROUNDS, "backend=torch,jax"])


def test_every_metric_of_rounds_is_on_the_page_of_metrics_and_no_other(finished):
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    section = page.split("\n## Rounds\n")[1].split("\n## ")[0]
    documented = {name for row in re.findall(r"^\| (`.+?) \|", section, re.M) for name in re.findall(r"`(.+?)`", row)}
    logged = {
        re.sub("^win_rate/.*", "win_rate/<stage>", name)
        for name in read_json(stage(finished, "labels_2") / "done.json")["metrics"]
    }
    assert documented - logged == {"agreement/labelers", "gain", "accuracy/group/<name>"} and logged <= documented


# ------------------------------------------------------------------------------------------------------------- people


def labels_of(folder, order=1):
    """Somebody labels everything: the first completion is best, or the last."""
    rows = []
    for each in candidates_in(folder / CANDIDATES):
        rows.append({"id": each.id, "ranks": list(range(len(each.completions)))[::order], "labeler": "ada", "group": "experts"})
    write_text(folder / LABELS, "".join(map(dump_line, rows)))


@pytest.fixture(scope="module")
def waiting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    with pytest.raises(
        Waiting, match=r"labels_1 waits for people: .* have no labels yet.*Type: lockstep serve .* run this command"
    ):
        run(folder, "labeler=people")
    (found,) = folder.glob("rounds-*")
    return found


def test_a_run_waits_for_people_and_continues_with_their_labels(waiting, tmp_path):
    folder = tmp_path / "people"
    shutil.copytree(waiting.parent, folder)
    found = folder / waiting.name
    record = read_json(found / "run.json")
    assert (record["status"], record["stages"]["labels_1"]["status"]) == ("waiting", "waiting")
    labels_of(stage(found, "labels_1"))
    with pytest.raises(Waiting, match="labels_2 waits for people"):
        run(folder, "labeler=people")
    read = comparisons_in(stage(found, "labels_1") / "output")
    assert {(c.labeler, c.group, c.ranks[0]) for c in read} == {("ada", "experts", 0)}


def test_other_labels_make_another_reward_model(waiting, tmp_path):
    found = []
    for order in (1, -1):
        folder = tmp_path / f"order{order}"
        shutil.copytree(waiting.parent, folder)
        labels_of(stage(folder / waiting.name, "labels_1"), order)
        with pytest.raises(Waiting):
            run(folder, "labeler=people")
        found.append(read_json(folder / waiting.name / "run.json")["stages"]["reward_1"]["folder"])
    assert found[0] != found[1]


def test_labels_are_frozen_once_they_were_read(waiting, tmp_path):
    folder = tmp_path / "people"
    shutil.copytree(waiting.parent, folder)
    found = folder / waiting.name
    labels_of(stage(found, "labels_1"))
    with pytest.raises(Waiting, match="labels_2"):
        run(folder, "labeler=people")
    before = read_json(found / "run.json")["stages"]
    labels_of(stage(found, "labels_1"), -1)
    with pytest.raises(Waiting, match="labels_2"):
        run(folder, "labeler=people")
    assert read_json(found / "run.json")["stages"]["reward_1"] == before["reward_1"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"id": "nobody", "ranks": [0, 1], "labeler": "ada"}, "line 1: its id 'nobody' is none of the 1 in candidates.jsonl"),
        ({"id": "a", "ranks": [0, 1, 2], "labeler": "ada"}, "it has 3 ranks for 2 completions"),
        ({"id": "a", "ranks": [0, 1]}, "labeler is missing"),
        ({"id": "a", "ranks": ["0", "1"], "labeler": "ada"}, r"ranks\[0\] is \"0\", not a whole number"),
        ("not json", "line 1: .* A row of labels.jsonl has id, ranks, labeler, group"),
    ],
)
def test_a_wrong_label_is_named_by_its_line(tmp_path, row, text):
    write_text(tmp_path / LABELS, row if isinstance(row, str) else json.dumps(row) + "\n")
    with pytest.raises(DataError, match=text):
        labels_in(tmp_path / LABELS, [Candidates("a", Prompt.of("x"), ("one", "two"))])


# ------------------------------------------------------------------------------------------------- simulated labelers


def some_candidates(count=200):
    world = Miniature(Config(seed=0))
    found = []
    for i in range(count):
        comparison = world.comparisons("train")[i]
        found.append(Candidates(str(i), comparison.prompt, comparison.completions))
    return world, found


def test_simulated_labelers_answer_alike_each_time_and_none_twice():
    world, candidates = some_candidates(50)
    labeler = SimulatedLabelers(SimulatedLabelers.Config(("training",), 3), world, None)
    labels = labeler.label(candidates, 5, None)
    assert labels == labeler.label(candidates, 5, None) != labeler.label(candidates, 6, None)
    for each in candidates:
        who = [label.labeler for label in labels if label.id == each.id]
        assert len(who) == len(set(who)) == 3
        assert set(who) <= set(GROUPS["training"])


def test_simulated_labelers_follow_the_tastes_of_their_group():
    """Communities agree on facts and differ in how they like to be talked to: of two true answers each prefers its own kind."""
    world, candidates = some_candidates()
    mean = {}
    for group in ("brief", "warm"):
        labels = SimulatedLabelers(SimulatedLabelers.Config((group,), 1), world, None).label(candidates, 0, None)
        assert {label.group for label in labels} == {group}
        longer = [
            label.ranks[i] < label.ranks[j]
            for each, label in zip(candidates, labels, strict=True)
            for i, j in combinations(range(len(label.ranks)), 2)
            if len(each.completions[i].split()) > len(each.completions[j].split()) and label.ranks[i] != label.ranks[j]
        ]
        mean[group] = np.mean(longer)
    assert mean["warm"] - mean["brief"] > 0.1


def test_a_simulated_label_is_the_order_of_noisy_utilities():
    """With many labels of one pair, the share that prefers the first is the logistic function of the difference of utilities over
    the noise: Gumbel noise makes Bradley-Terry (ties, of a width of 0.15, shift it by no more than a percent)."""
    world, candidates = some_candidates(1)
    pair = Candidates("x", candidates[0].prompt, candidates[0].completions[:2])
    labels = SimulatedLabelers(SimulatedLabelers.Config(("training",), 6), world, None)
    found = [label for seed in range(500) for label in labels.label([pair], seed, None) if label.labeler == "labeler-0"]
    task = Task.of(pair.prompt)
    first, second = (utility(GROUPS["training"]["labeler-0"], world.world, task, text) for text in pair.completions)
    expected = 1 / (1 + np.exp(-(first - second) / 2.0))
    share = np.mean([(label.ranks[0] < label.ranks[1]) + 0.5 * (label.ranks[0] == label.ranks[1]) for label in found])
    assert share == pytest.approx(expected, abs=3 * (expected * (1 - expected) / len(found)) ** 0.5 + 0.01)


def test_training_comparisons_may_be_by_another_group():
    warm = Miniature(Config(labelers=("warm",), heldout_labelers=("brief", "warm")))
    assert {warm.comparisons("train")[i].group for i in range(30)} == {"warm"}
    assert {warm.comparisons("heldout")[i].group for i in range(30)} == {"brief", "warm"}


def test_a_reward_model_can_be_the_labeler(tmp_path):
    """RLAIF: longer is better, says the reward model; so say the labels."""
    found = run(
        tmp_path, "labeler=scores", "labeler.reward_model={name: length, unit: characters}",
        "~stages.evaluate", "stages.rounds.repeat=1",
    )  # fmt: skip
    comparisons = comparisons_in(stage(found, "labels_1") / "output")
    assert {c.labeler for c in comparisons} == {"length"}
    for comparison in comparisons:
        lengths = [len(text) for text in comparison.completions]
        assert [sorted(set(lengths), reverse=True).index(length) for length in lengths] == sorted_places(comparison.ranks)


def sorted_places(ranks):
    """Ranks without gaps."""
    return [sorted(set(ranks)).index(rank) for rank in ranks]


def test_a_reward_model_is_trained_on_one_group_and_judged_by_each(tmp_path):
    found = run(
        tmp_path, "~stages.rounds", "data.labelers=[warm]", "data.heldout_labelers=[brief,warm]", "evaluation.comparisons=12",
        "+stages.reward={algorithm: ${reward}, policy: sft}", "~stages.evaluate",
        "+stages.judge={evaluation: ${evaluation}, reward_model: ${reward_model}}",
    )  # fmt: skip
    judged = read_json(stage(found, "judge") / "output" / "evaluation.json")["reward_model"]
    assert "accuracy/training_labelers" in judged and "accuracy/heldout_labelers" in judged


def test_labelers_are_unseen_if_no_comparison_of_theirs_was_trained_on(tmp_path, monkeypatch):
    """Wherever these came from: here each stage reads those of a labeler of its own. A reward model from elsewhere may have seen
    anybody's."""
    given = lambda stage: SimpleNamespace(comparisons=lambda split: [SimpleNamespace(labeler=f"{split} of {stage.name}")])  # noqa: E731
    monkeypatch.setattr(Assembly, "data_of", lambda self, stage: given(stage))
    assembly = Assembly(Experiment(composed(tmp_path)), {})
    evaluate = assembly.experiment.stages["evaluate"]
    (source,) = [name for name, kind in evaluate.inputs if kind == "reward_model"]
    assert assembly.training_labelers(evaluate) == {None, f"train of {source}"}
    elsewhere = Assembly(Experiment(composed(tmp_path, f"stages.evaluate.reward_model.source={tmp_path}")), {})
    assert elsewhere.training_labelers(elsewhere.experiment.stages["evaluate"]) is None


def test_the_labeler_in_the_docs_passes_the_kit():
    names = run_listings(python_listings("docs/rounds.md", "A labeler of your own"))
    module = types.ModuleType("tidy")
    module.Tidy = names["Tidy"]
    sys.modules["tidy"] = module
    try:
        found = list(conform("labeler", subject("labeler", "tidy:Tidy", "torch", overrides=["backend.threads=1"], like="people")))
    finally:
        del sys.modules["tidy"]
    assert [(o.check.name, o.status) for o in found if o.status != "passed"] == []


# ------------------------------------------------------------------------------------------------------------ mixtures


class Own(DataSource):
    def comparisons(self, split):
        return [Comparison(Prompt.of(f"{split} {i}"), ("a", "b"), (0, 1)) for i in range(3)]

    def prompts(self, split):
        return [Prompt.of(f"asked {split}")]

    def demonstrations(self, split):
        raise MissingData("none")

    texts = demonstrations


def labelled_folder(folder, name, count):
    folder = folder / name
    folder.mkdir()
    rows = [
        {"messages": [{"role": "user", "content": f"{name} {i}"}], "completions": ["a", "b"], "ranks": [1, 0]}
        for i in range(count)
    ]
    write_text(folder / "comparisons.jsonl", "".join(map(dump_line, rows)))
    return folder


def test_without_shares_every_row_of_every_source_is_there_once(tmp_path):
    first, second = labelled_folder(tmp_path, "one", 4), labelled_folder(tmp_path, "two", 2)
    mixture = Mixture(
        Own(),
        {"comparisons": {"data": None, "one": first, "two": second}},
        {"comparisons": dict.fromkeys(["data", "one", "two"])},
    )
    texts = [c.prompt.messages[0].content for c in mixture.comparisons("train")]
    assert sorted(texts) == sorted(
        [f"train {i}" for i in range(3)] + [f"one {i}" for i in range(4)] + [f"two {i}" for i in range(2)]
    )
    assert [c.prompt.messages[0].content for c in mixture.comparisons("heldout")] == ["heldout 0", "heldout 1", "heldout 2"]


def test_with_shares_each_source_has_its_own_and_none_loses_a_row(tmp_path):
    one = labelled_folder(tmp_path, "one", 4)
    mixture = Mixture(Own(), {"comparisons": {"data": None, "one": one}}, {"comparisons": {"data": 3.0, "one": 1.0}})
    texts = [c.prompt.messages[0].content for c in mixture.comparisons("train")]
    assert (sum(t.startswith("train") for t in texts), sum(t.startswith("one") for t in texts)) == (12, 4)


def test_what_the_data_hold_out_is_not_trained_on_through_a_folder(tmp_path, caplog):
    """Nor what goes on from it; held-out prompts of every kind count."""
    said = lambda *texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]  # noqa: E731
    dialogues = [said("new"), said("heldout 1"), said("asked heldout", "yes", "and ?"), said("other", "yes", "heldout 1")]
    rows = [{"messages": messages, "completions": ["a", "b"], "ranks": [1, 0]} for messages in dialogues]
    (tmp_path / "from").mkdir()
    write_text(tmp_path / "from" / "comparisons.jsonl", "".join(map(dump_line, rows)))
    mixture = Mixture(Own(), {"comparisons": {"from": tmp_path / "from"}}, {"comparisons": {"from": None}})
    assert sorted(c.prompt.messages[0].content for c in mixture.comparisons("train")) == ["new", "other"]
    assert "2 comparisons were left out, because the data hold their prompts out" in caplog.text


def test_a_folder_without_comparisons_is_no_source_of_them(tmp_path):
    with pytest.raises(MissingData, match="has no comparisons.jsonl, so it is no source of comparisons"):
        comparisons_in(tmp_path)


def test_a_share_of_several_rounds_is_theirs_together(tmp_path):
    mix = ["stages.rounds.stages.reward.comparisons=[data,all.labels]", "+stages.rounds.stages.reward.shares=[1,3]"]
    stages = Experiment(composed(tmp_path, *mix)).stages
    assert stages["reward_1"].mixes == {"comparisons": {"data": 1.0, "labels_1": 3.0}}
    assert stages["reward_2"].mixes == {"comparisons": {"data": 1.0, "labels_1": 1.5, "labels_2": 1.5}}


def test_a_round_that_is_named_twice_has_both_shares(tmp_path):
    mix = ["stages.rounds.stages.reward.comparisons=[labels,all.labels]", "+stages.rounds.stages.reward.shares=[9,1]"]
    stages = Experiment(composed(tmp_path, *mix)).stages
    assert stages["reward_2"].mixes == {"comparisons": {"labels_2": 9.5, "labels_1": 0.5}}


# ------------------------------------------------------------------------------------------------------------ measures


class NoGold:
    def gold(self, prompt, response):
        return None


def test_win_rates_ties_and_agreement_of_labels_by_hand():
    """Two policies, completions p q p: ranks 0 1 2 and 0 0 1. Pairs of different policies are (0, 1) and (1, 2). In the first
    label p wins one and loses one; in the second one pair is tied and p loses the other: p has 1 + 0 + 0.5 + 0 of 4 wins."""
    candidates = [Candidates("a", Prompt.of("x"), ("1", "2", "3"), ("P", "Q", "P"))]
    labels = [Label("a", (0, 1, 2), "ada"), Label("a", (0, 0, 1), "bob")]
    found = measures(candidates, labels, NoGold(), {"ppo": "P", "sft": "Q"})
    assert found["win_rate/ppo"] == pytest.approx(1.5 / 4)
    assert found["win_rate/sft"] == pytest.approx(2.5 / 4)
    assert found["ties"] == pytest.approx(1 / 6)
    # bob's two pairs are all as ada's; of ada's three, two are as bob's and one is tied by him
    assert found["agreement/labelers"] == pytest.approx((1 + 2.5 / 3) / 2)
    assert (found["labels"], found["labelers"], found["prompts"]) == (2, 2, 1)
