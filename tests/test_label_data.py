"""Closed rounds as a source of data: what each noun is made of, and who and what is held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lockstep.config.schema import parse
from lockstep.data.labels import comparisons_in
from lockstep.errors import ConfigError, DataError, MissingData
from lockstep.types import Comparison, Demonstration, Message, Prompt
from lockstep_studio.data import Human
from lockstep_studio.exchange import rounds
from lockstep_studio.science.rankings import by_pair

ROOT = Path(__file__).parents[1]
DEFAULTS = yaml.safe_load((ROOT / "conf/data/human.yaml").read_text())


def human(folder, **keys) -> Human:
    """The source as conf/data/human.yaml has it, but nothing held out unless asked for."""
    values = {**DEFAULTS, "folder": str(folder), "heldout_fraction": 0.0, **keys}
    assert values.pop("name") == "human"
    return Human(parse(Human.Config, values, "data"))


def ask(text):
    return [{"role": "user", "content": text}]


def comparison(task, text, labeler="ada", ranks=(1, 0), group="training", completions=("Loud.", "Green.")):
    return rounds.comparison(task, ask(text), completions, ranks, labeler=labeler, group=group)


def demonstration(task, text, labeler="ada", group="training"):
    return rounds.demonstration(task, ask(text), "Green.") | {"labeler": labeler, "group": group}


def conversation(text):
    messages = [{"role": "system", "content": "Be brief."}, *ask(text), {"role": "assistant", "content": "Hm."}, *ask("Why?")]
    return {"id": "c", "messages": messages, "labeler": "ada", "group": "training", "policy": "p", "feedback": [], "attack": None}


@pytest.fixture
def closed(tmp_path):
    """Writes a closed round and gives its folder."""

    def closed(comparisons=(), demonstrations=(), conversations=(), name="rounds/round-1"):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for noun, rows in zip(rounds.NOUNS, (comparisons, demonstrations, conversations), strict=True):
            (folder / f"{noun}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return closed


def many(count=200, labelers=10):
    names = [f"l{i}" for i in range(labelers)]
    return [
        comparison(str(i), f"Question {i}?", names[i % labelers], group="heldout" if i % labelers == 0 else "a")
        for i in range(count)
    ]


def texts(items):
    return {getattr(item, "prompt", item).messages[-1].content for item in items}


def test_a_round_is_comparisons_demonstrations_and_prompts(closed):
    source = human(closed([comparison("1", "A?")], [demonstration("2", "B?"), demonstration("3", "A?")], [conversation("C?")]))
    assert source.comparisons("train") == (Comparison(Prompt.of("A?"), ("Loud.", "Green."), (1, 0), "ada", "training"),)
    assert source.demonstrations("train")[0] == Demonstration(Prompt.of("B?"), "Green.")
    talk = Prompt((Message("system", "Be brief."), Message("user", "C?")))
    assert source.prompts("train") == (Prompt.of("A?"), Prompt.of("B?"), talk)


def test_a_folder_of_rounds_is_all_of_them_and_the_same_task_in_two_is_two(closed, tmp_path):
    closed([comparison("1", "A?")])
    closed([comparison("1", "B?"), comparison("1", "B?", ranks=(0, 1))], name="rounds/round-2")
    (tmp_path / "rounds" / "notes").mkdir()
    found = human(tmp_path / "rounds").comparisons("train")
    assert [(each.prompt.messages[0].content, each.ranks) for each in found] == [("A?", (1, 0)), ("B?", (0, 1))]  # revised


def test_where_a_task_was_adjudicated_only_the_adjudicator_counts(closed):
    votes = [comparison("1", "A?", "ada"), comparison("1", "A?", "bo") | {"ranks": [0, 1]}]
    rows = [*votes, comparison("1", "A?", "cy") | {"adjudicated": True}, comparison("2", "B?", "ada") | {"adjudicated": False}]
    folder = closed(rows)
    found = human(folder, heldout_fraction=0.0).comparisons("train")
    assert [(each.labeler, each.prompt) for each in found] == [("cy", Prompt.of("A?")), ("ada", Prompt.of("B?"))]
    assert comparisons_in(folder) == list(found)
    assert by_pair(rows) == by_pair(rows[:2] + rows[3:])


def test_tasks_of_one_id_with_other_words_are_two(closed):
    """As rounds over two runs had them."""
    rows = [comparison("0", "A?"), comparison("0", "B?"), comparison("0", "A?") | {"ranks": [0, 1]}]
    found = human(closed(rows), heldout_fraction=0.0).comparisons("train")
    assert [(each.prompt, each.ranks) for each in found] == [(Prompt.of("A?"), (0, 1)), (Prompt.of("B?"), (1, 0))]


def test_rankings_that_tell_nothing_are_left_out_and_told_once(closed, capsys):
    rows = [comparison("1", "A?"), comparison("2", "A?", ranks=(0, 0)), comparison("3", "A?", completions=("x", "x"))]
    source = human(closed(rows))
    assert len(source.comparisons("train")) == len(source.comparisons("train")) == 1
    assert capsys.readouterr().out.count("left out of") == 1


def test_no_prompt_is_on_both_sides_whatever_its_noun_or_round(closed, tmp_path):
    closed(
        many(),
        [demonstration(str(i), f"Question {i}?") for i in range(0, 200, 2)],
        [conversation(f"Question {i}?") for i in range(200)],
    )
    closed(many(400)[200:], name="rounds/round-2")
    both, first = human(tmp_path / "rounds", heldout_fraction=0.2), human(tmp_path / "rounds/round-1", heldout_fraction=0.2)
    sides = {
        split: texts(both.comparisons(split)) | texts(both.demonstrations(split)) | texts(both.prompts(split))
        for split in ("train", "heldout")
    }
    assert not sides["train"] & sides["heldout"] and len(sides["train"] | sides["heldout"]) == 400
    assert 50 < len(sides["heldout"]) < 110
    assert texts(first.comparisons("heldout")) <= texts(both.comparisons("heldout"))  # a further round moves nothing


def test_the_seed_decides_who_is_held_out(closed):
    folder = closed(many())
    one, other = (texts(human(folder, heldout_fraction=0.2, seed=seed).comparisons("heldout")) for seed in (0, 1))
    assert one != other


@pytest.mark.parametrize("keys", [{"heldout_labelers": 0.4}, {"heldout_groups": ["heldout"]}])
def test_no_labeler_is_on_both_sides_if_asked_and_rows_between_are_told(closed, capsys, keys):
    source = human(
        closed(many(), [demonstration(str(i), f"Question {i}?", f"l{i % 10}") for i in range(200)]), heldout_fraction=0.3, **keys
    )
    train, heldout = ({each.labeler for each in source.comparisons(split)} for split in ("train", "heldout"))
    assert train and heldout and not train & heldout
    assert not texts(source.comparisons("train")) & texts(source.comparisons("heldout"))
    kept = sum(len(source.comparisons(split)) for split in ("train", "heldout"))
    told = capsys.readouterr().out
    numbers = [int(word) for word in told.split("left out of", 1)[1].replace(":", " ").split() if word.isdecimal()]
    assert kept + sum(numbers) == 200
    assert "by training labelers on held-out prompts" in told and "by held-out labelers on training prompts" in told
    if "heldout_groups" in keys:
        assert heldout == {"l0"}


def test_a_group_is_held_out_whole(closed):
    rows = [
        comparison(str(i), f"Question {i}?", "ada" if i % 2 else "eve", group="heldout" if i % 2 else "a") for i in range(100)
    ]
    source = human(closed(rows), heldout_fraction=0.5, heldout_groups=["heldout"])
    assert {each.group for each in source.comparisons("heldout")} == {"heldout"}
    assert {each.group for each in source.comparisons("train")} == {"a"}


def test_the_fingerprint_follows_the_contents_of_all_rounds(closed, tmp_path):
    closed([comparison("1", "A?")])
    folder = tmp_path / "rounds"
    config = human(folder).config
    before = Human.fingerprint(config)
    (folder / "round-1" / "round.json").write_text("{}")
    assert Human.fingerprint(config) == before
    closed([comparison("1", "B?")], name="rounds/round-2")
    after = Human.fingerprint(config)
    (folder / "round-2" / "comparisons.jsonl").write_text("")
    assert len({before, after, Human.fingerprint(config)}) == 3


def test_what_a_round_lacks_is_an_error_that_says_what_to_type(closed):
    source = human(closed([comparison("1", "A?")]))
    with pytest.raises(MissingData, match=r"have no demonstrations\. They have: 1 comparisons\. .*'~stages\.sft'"):
        source.demonstrations("train")
    with pytest.raises(MissingData, match=r"'~stages\.pretrain'"):
        source.texts("train")
    with pytest.raises(MissingData, match=r"The heldout split of the comparisons in .* is empty.*data\.heldout_fraction=0,"):
        source.comparisons("heldout")
    with pytest.raises(MissingData, match="The heldout split of the prompts"):
        source.prompts("heldout")
    with pytest.raises(DataError, match=r"no split 'test'.*They have: heldout, train"):
        source.comparisons("test")
    with pytest.raises(ConfigError, match=r"data\.heldout_fraction=1\.0 must be at least 0 and below 1"):
        human("x", heldout_fraction=1.0)


def test_a_folder_that_is_no_round_and_damaged_rows_are_named(closed, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty is no closed round: it has none of comparisons\.jsonl"):
        human(tmp_path / "empty").prompts("train")
    folder = closed([comparison("1", "A?"), {**comparison("2", "A?"), "ranks": [0]}])
    with pytest.raises(DataError, match=r"comparisons\.jsonl:2: .*2 completions, but 1 ranks"):
        human(folder).comparisons("train")
    folder = closed([{**comparison("1", "A?"), "messages": [*ask("A?"), {"role": "assistant", "content": "x"}]}])
    with pytest.raises(DataError, match="the messages of '1' end with the assistant's turn"):
        human(folder).comparisons("train")


def test_a_dry_run_says_what_is_there(closed, tmp_path):
    closed([comparison("1", "A?")], [demonstration("2", "B?")])
    found = list(human(tmp_path / "rounds").survey())
    assert found == [("data.folder", f"1 comparisons, 1 demonstrations, 0 conversations in {tmp_path / 'rounds'}, rounds: 1")]
