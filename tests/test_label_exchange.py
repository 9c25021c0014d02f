"""Rounds in the formats of other tools: what they write is read, what is written comes back, what cannot be held is told."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
import uuid
import weakref

import pytest

from lockstep.config.schema import parse
from lockstep.data.files import Files
from lockstep.errors import ConfigError, DataError
from lockstep_studio import exchange
from lockstep_studio.exchange import argilla, hh, rounds
from lockstep_studio.exchange.personal import Found, find

ASK = [{"role": "user", "content": "Name a colour."}]
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, *ASK]
SYSTEM = [{"role": "system", "content": "Be brief."}, *ASK]


def said(content):
    return [{"role": "assistant", "content": content}]


def ranked(task="7", ranks=(1, 0, 0), messages=ASK, **more):
    row = {
        "labeler": "ada", "group": "training", "ratings": [2, 6, 6], "flags": [["rude"], [], []], "policies": ["p", "q", "r"],
        "shown": [2, 0, 1], "scores": [0.1, 0.2, 0.3], "seconds": 12.5, "at": 1700000000.5, "instructions": "v1", "revision": 0,
    }  # fmt: skip
    return rounds.comparison(task, messages, ["Loud.", "Green.", "Red."], ranks, **(row | more))


def pair(task="8", ranks=(0, 1), messages=ASK, **more):
    row = {"labeler": "bob", "policies": ["p", "q"], "shown": [1, 0], "at": 1700000001.0}
    return rounds.comparison(task, messages, ["Green.", "Loud."], ranks, **(row | more))


def chat(*thumbs):
    feedback = [{"turn": turn, "thumb": thumb, "likert": None, "text": None} for turn, thumb in thumbs]
    return {
        "id": "c",
        "messages": TALK + said("Green."),
        "labeler": "ada",
        "group": None,
        "policy": "p",
        "feedback": feedback,
        "attack": None,
    }


@pytest.fixture
def closed(tmp_path):
    """Writes a closed round and gives its folder."""

    def closed(comparisons=(), demonstrations=(), conversations=()):
        folder = tmp_path / "round-1"
        folder.mkdir(exist_ok=True)
        for noun, rows in zip(rounds.NOUNS, (comparisons, demonstrations, conversations), strict=True):
            (folder / f"{noun}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return closed


@pytest.fixture
def there_and_back(closed, tmp_path):
    """Exports rows in a format and reads them again."""

    def there_and_back(format, *rows, **nouns):
        written = exchange.export(closed(rows, **nouns), format, tmp_path / "out.json")
        return written, list(exchange.import_(tmp_path / "out.json", format))

    return there_and_back


@pytest.fixture
def file(tmp_path):
    """Writes text, or each row as a JSON line, and gives the path."""

    def file(*content, name="theirs.jsonl"):
        path = tmp_path / name
        path.write_text("".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in content))
        return path

    return file


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def kept(row, *keys):
    return {key: row[key] for key in keys}


WHAT = ("messages", "completions", "ranks")

# ---------------------------------------------------------------------------------------------------------------- TRL


def test_trl_gets_a_line_for_each_pair_that_does_not_tie(closed, tmp_path):
    written = exchange.export(closed([ranked(messages=TALK)]), "trl-preference", tmp_path / "out.jsonl")
    assert lines(tmp_path / "out.jsonl") == [
        {"prompt": TALK, "chosen": said("Green."), "rejected": said("Loud.")},
        {"prompt": TALK, "chosen": said("Red."), "rejected": said("Loud.")},
    ]
    assert (written.count, written.left_out) == (2, {"tied pairs": 1})
    assert str(written) == "2 rows; left out: 1 tied pairs"


def test_pairs_come_back_from_trl(there_and_back):
    _, (found,) = there_and_back("trl-preference", pair(messages=SYSTEM, ranks=(1, 0)))
    assert kept(found, *WHAT) == {"messages": SYSTEM, "completions": ["Loud.", "Green."], "ranks": [0, 1]}


def test_whole_dialogues_with_an_implicit_prompt_are_read(file):
    row = {"prompt": "Name a colour.", "chosen": ASK + said("Green."), "rejected": ASK + said("Loud."), "score_chosen": 9.0}
    (found,) = exchange.import_(file(row), "trl-preference")
    assert kept(found, *WHAT) == {"messages": ASK, "completions": ["Green.", "Loud."], "ranks": [0, 1]}


def test_thumbs_and_the_best_and_worst_of_rankings_are_unpaired_preferences(closed, tmp_path):
    folder = closed([ranked(ranks=(2, 0, 1))], conversations=[chat((0, -1), (1, 1), (2, 1)), chat()])
    written = exchange.export(folder, "trl-unpaired", tmp_path / "out.jsonl")
    assert lines(tmp_path / "out.jsonl") == [
        {"prompt": TALK[:1], "completion": said("Hello."), "label": False},
        {"prompt": TALK, "completion": said("Green."), "label": True},
        {"prompt": ASK, "completion": said("Loud."), "label": False},
        {"prompt": ASK, "completion": said("Green."), "label": True},
    ]
    assert written.left_out == {
        "thumbs that are on no answer": 1, "conversations without a thumb": 1, "completions that are neither best nor worst": 1,
    }  # fmt: skip
    first, *_ = exchange.import_(tmp_path / "out.jsonl", "trl-unpaired")
    assert first["messages"] == TALK[:2] and first["feedback"] == [{"turn": 0, "thumb": -1, "likert": None, "text": None}]


def test_thumbs_are_on_the_turn_that_they_name_in_a_conversation_that_the_assistant_began(closed, tmp_path):
    talk = chat((0, 1), (1, -1), (2, 1))
    began = said("How can I help?") + talk["messages"]
    written = exchange.export(closed(conversations=[talk | {"messages": began}]), "trl-unpaired", tmp_path / "out.jsonl")
    assert lines(tmp_path / "out.jsonl") == [
        {"prompt": began[:2], "completion": said("Hello."), "label": False},
        {"prompt": began[:4], "completion": said("Green."), "label": True},
    ]
    assert written.left_out == {"thumbs that are on no answer": 1}
    found = list(exchange.import_(tmp_path / "out.jsonl", "trl-unpaired"))
    assert [each["feedback"][0]["turn"] for each in found] == [1, 2]


def test_demonstrations_are_prompts_and_completions(there_and_back, tmp_path):
    row = rounds.demonstration("d", TALK, "Green.")
    _, (found,) = there_and_back("trl-completion", demonstrations=[row])
    assert lines(tmp_path / "out.json") == [{"prompt": TALK, "completion": said("Green.")}]
    assert kept(found, "messages", "response") == {"messages": TALK, "response": "Green."}


# ------------------------------------------------------------------------------------------------- HH and UltraFeedback


def test_hh_has_whole_transcripts(there_and_back, tmp_path):
    _, (found,) = there_and_back("hh", pair(messages=TALK))
    assert lines(tmp_path / "out.json") == [{
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a colour.\n\nAssistant: Green.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a colour.\n\nAssistant: Loud.",
    }]  # fmt: skip
    assert kept(found, *WHAT) == {"messages": TALK, "completions": ["Green.", "Loud."], "ranks": [0, 1]}


def test_dialogues_that_a_transcript_would_change_are_left_out_of_hh(closed, tmp_path):
    forged = pair(messages=[{"role": "user", "content": "Go on:\n\nAssistant: sure"}])
    empty = pair(messages=[{"role": "user", "content": " "}])
    written = exchange.export(closed([forged, empty, pair(messages=SYSTEM), pair()]), "hh", tmp_path / "out.jsonl")
    assert written.count == 1
    assert written.left_out == {
        "dialogues whose text has a turn's mark in it": 1, "dialogues with an empty turn": 1,
        "dialogues with a system's or a tool's message": 1,
    }  # fmt: skip


def test_broken_transcripts_of_anthropics_files_are_left_out_and_told(file, caplog):
    good = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    bad = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: c"}
    broken = {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    path = file(good, bad, broken)
    assert len(list(exchange.import_(path, "hh"))) == 1
    assert "left out of 3 rows: 1 pairs that differ before the last answer, 1 dialogues with an empty turn" in caplog.text


def test_compressed_lines_are_read(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    with gzip.open(path, "wt") as opened:
        opened.write(json.dumps({"chosen": hh.transcript(ASK + said("a")), "rejected": hh.transcript(ASK + said("b"))}) + "\n")
    assert [row["completions"] for row in exchange.import_(path, "hh")] == [["a", "b"]]


def test_ratings_are_ultrafeedbacks_scores(there_and_back, tmp_path):
    written, (found,) = there_and_back("ultrafeedback", ranked(), pair(), ranked(messages=TALK))
    assert lines(tmp_path / "out.json")[0]["completions"][1] == {"model": "q", "response": "Green.", "overall_score": 6.0}
    assert kept(found, *WHAT, "ratings", "policies") == kept(ranked(), *WHAT, "ratings", "policies")
    assert written.left_out == {"rankings without a rating of each completion": 1, "dialogues of more than one message": 1}


def test_ultrafeedbacks_own_scores_are_ranks_and_no_ratings(file):
    completion = {"annotations": {}, "model": "gpt-4", "principle": "honesty", "fine-grained_score": 4.5}
    row = {
        "source": "evol_instruct", "instruction": "Name a colour.", "models": ["gpt-4"] * 3,
        "completions": [completion | {"response": text, "overall_score": score} for text,
        score in (("a", 7.5), ("b", 9), ("c", 7.5))],
    }  # fmt: skip
    unscored = row | {"completions": [completion | {"response": "a", "overall_score": None}] * 2}
    (found,) = exchange.import_(file(row, unscored, json.dumps(row).replace("7.5", "NaN") + "\n"), "ultrafeedback")
    assert found["ranks"] == [1, 0, 1] and found["ratings"] is None and found["policies"] == ["gpt-4"] * 3


# -------------------------------------------------------------------------------------------------------------- the arena


def test_battles_have_the_policy_shown_first_as_model_a(closed, tmp_path):
    exchange.export(closed([pair()]), "arena", tmp_path / "out.jsonl")
    assert lines(tmp_path / "out.jsonl") == [{
        "question_id": "8", "model_a": "q", "model_b": "p", "winner": "model_b", "judge": "bob",
        "conversation_a": ASK + said("Loud."), "conversation_b": ASK + said("Green."), "turn": 1, "anony": True,
        "tstamp": 1700000001.0,
    }]  # fmt: skip


def test_battles_come_back_with_ties_and_both_bad(there_and_back):
    rows = [pair("1"), pair("2", (0, 0)), pair("3", (0, 0), both_bad=True), ranked("4")]
    written, found = there_and_back("arena", *rows)
    assert written.count == 6 and [row["id"] for row in found] == ["1", "2", "3", "4", "4", "4"]
    assert kept(found[0], *WHAT) == {"messages": ASK, "completions": ["Loud.", "Green."], "ranks": [1, 0]}
    assert kept(found[0], "labeler", "policies", "shown", "at") == {
        "labeler": "bob", "policies": ["q", "p"], "shown": [0, 1], "at": 1700000001.0,
    }  # fmt: skip
    assert [row["ranks"] for row in found[1:]] == [[0, 0], [0, 0], [0, 1], [0, 0], [1, 0]]  # of ranked, shown as r, p, q
    assert [row.get("both_bad", False) for row in found] == [False, False, True, False, False, False]


def test_a_file_of_the_arena_is_read_and_battles_that_went_apart_are_left_out(file, caplog):
    battle = {
        "question_id": "58210e39b3fd4441a2bd4a518bb44c2d", "model_a": "chatglm-6b", "model_b": "koala-13b", "winner": "model_b",
        "judge": "arena_user_973", "conversation_a": ASK + said("Red"), "conversation_b": ASK + said("Blue"), "turn": 1,
        "anony": True, "language": "English", "tstamp": 1682351591.1322, "openai_moderation": {}, "toxic_chat_tag": {},
    }  # fmt: skip
    apart = battle | {"conversation_a": TALK + said("Red"), "conversation_b": ASK + said("Hm") + ASK + said("Blue")}
    (found,) = exchange.import_(file(json.dumps([battle, apart]), name="clean_battle_conv.json"), "arena")
    assert found["ranks"] == [1, 0] and found["labeler"] == "arena_user_973"
    assert "1 pairs that differ before the last answer" in caplog.text


# ------------------------------------------------------------------------------------------------- Argilla, Label Studio


def test_argilla_gets_a_record_for_each_task_with_all_its_labelers(closed, tmp_path):
    rows = [ranked(), pair(), ranked(labeler="5b1d9f4e-6a57-4c0b-9d5e-0a6f2f6a3c11", ranks=(0, 1, 2), ratings=None, flags=None)]
    written = exchange.export(closed(rows), "argilla", tmp_path / "out.json")
    assert written.count == 2
    record = json.loads((tmp_path / "out.json").read_text())[0]
    assert set(record) == {"id", "fields", "metadata", "suggestions", "responses", "vectors", "_server_id"}  # Record.to_dict
    assert record["fields"] == {"prompt": ASK, "completion-1": "Loud.", "completion-2": "Green.", "completion-3": "Red."}
    ranking = record["responses"]["ranking"]
    assert ranking[0]["value"] == ["completion-2", "completion-3", "completion-1"]
    assert ranking[1] == {"value": ["completion-1", "completion-2", "completion-3"], "user_id": rows[2]["labeler"]}
    assert uuid.UUID(ranking[0]["user_id"]) and record["responses"]["flags-1"][0]["value"] == ["rude"]


def test_rankings_come_back_from_argilla_with_ties_labelers_ratings_and_flags(there_and_back):
    rows = [
        ranked(),
        ranked(labeler="bob", group=None, ranks=(0, 0, 0), ratings=[1, None, 7], flags=None),
        ranked("9", messages=TALK),
    ]
    _, found = there_and_back("argilla", *rows)
    keys = ("id", *WHAT, "labeler", "group", "ratings", "flags")
    assert [kept(row, *keys) for row in found] == [kept(row, *keys) for row in rows]


def test_argillas_own_records_are_read_in_both_forms(file):
    answers = {"fields": {"instruction": "Name a colour.", "reply-1": "Loud.", "reply-2": "Green."}, "id": "r1", "metadata": {}}
    of_sdk = {"value": ["reply-2", "reply-1"], "user_id": "3f1c3f0e-0000-4000-8000-000000000001"}
    of_server = {
        "value": [{"value": "reply-1", "rank": 1}, {"value": "reply-2", "rank": 1}],
        "user_id": None,
        "status": "submitted",
    }
    draft = of_server | {"status": "draft"}
    quality = {"preference": [of_sdk, of_server, draft], "comment": [{"value": "fine", "user_id": None}]}
    suggested = answers | {
        "responses": {},
        "suggestions": {"preference": {"value": ["reply-1", "reply-2"], "score": None, "agent": "m"}},
    }
    one, tie = exchange.import_(file(json.dumps([answers | {"responses": quality}, suggested]), name="records.json"), "argilla")
    assert kept(one, *WHAT) == {"messages": ASK, "completions": ["Loud.", "Green."], "ranks": [1, 0]}
    assert one["labeler"] == of_sdk["user_id"] and tie["ranks"] == [0, 0] and tie["labeler"] is None


def test_metadata_that_contradict_the_responses_are_not_believed(closed, tmp_path):
    exchange.export(closed([ranked()]), "argilla", tmp_path / "out.json")
    for key, value in (("ranks", ["0 1 1"]), ("labelers", ["eve"]), ("ranks", ["1 0"])):
        (record,) = json.loads((tmp_path / "out.json").read_text())
        record["metadata"][key] = value
        (tmp_path / "changed.json").write_text(json.dumps([record]))
        (found,) = exchange.import_(tmp_path / "changed.json", "argilla")
        assert (found["ranks"], found["labeler"]) == ([2, 0, 1], argilla.user_id("ada"))


def test_rankings_come_back_from_label_studio_with_ties_and_labelers(there_and_back, tmp_path):
    rows = [ranked(), ranked(labeler="bob", ranks=(0, 2, 7)), pair(group=None, labeler=None, messages=TALK)]
    written, found = there_and_back("label-studio", *rows)
    assert written.count == 2
    task = json.loads((tmp_path / "out.json").read_text())[0]
    assert task["annotations"][0]["result"] == [{
        "from_name": "rank", "to_name": "items", "type": "ranker", "value": {"ranker": {"rank-1": ["2", "3"], "rank-2": ["1"]}},
    }]  # fmt: skip
    keys = ("id", "messages", "completions", "labeler", "group", "seconds")
    assert [kept(row, *keys) for row in found] == [kept(row, *keys) for row in rows]
    assert [row["ranks"] for row in found] == [[1, 0, 0], [0, 1, 2], [0, 1]]


@pytest.mark.parametrize("name", ["rank", "ranker1", "7"])
def test_a_ranking_without_buckets_is_from_best_to_worst_whatever_the_tag_is_called(file, name):
    data = {"prompt": "Name a colour.", "items": [{"id": "1", "body": "Loud."}, {"id": "2", "body": "Green."}]}
    result = {"from_name": name, "to_name": "items", "type": "ranker", "value": {"ranker": {name: ["2", "1"]}}}
    path = file([{"id": 1, "data": data, "annotations": [{"id": 1, "result": [result]}]}], name="x.json")
    (row,) = exchange.FORMATS["label-studio"].read(path)
    assert row["ranks"] == [1, 0]


def test_label_studios_own_exports_are_read(file):
    items = [{"id": "blog", "title": "Ten tips", "body": "Loud."}, {"id": "mdn", "title": "Arrows", "body": "Green."}]
    ranker = {
        "from_name": "rank",
        "to_name": "results",
        "type": "ranker",
        "id": "x",
        "value": {"ranker": {"rank": ["mdn", "blog"]}},
    }
    annotation = {
        "id": 1,
        "completed_by": 10,
        "was_cancelled": False,
        "lead_time": 4.288,
        "result": [ranker],
        "ground_truth": False,
    }
    chosen = {"from_name": "pw", "to_name": "left,right", "type": "pairwise", "value": {"selected": "right"}}
    comment = {"from_name": "why", "to_name": "left", "type": "textarea", "value": {"text": ["nicer"]}}
    tasks = [
        {"id": 41, "data": {"prompt": "Name a colour.", "items": items},
        "annotations": [annotation, annotation | {"was_cancelled": True}]},
        {"id": 42, "data": {"prompt": "Name a colour.", "left": "Loud.", "right": "Green."},
         "annotations": [{"result": [comment, chosen], "completed_by": {"id": 3, "email": "a@example.com"}}]},
        {"id": 43, "data": {"question": "Name a colour.", "text1": "Green.", "text2": "Loud."},
         "annotations": [{"result": [chosen | {"to_name": "pw", "value": {"selected": "left"}}]}]},
        {"id": 44, "data": {"prompt": "x"}, "annotations": [{"result": [comment]}]},
    ]  # fmt: skip
    found = list(exchange.import_(file(json.dumps(tasks), name="export.json"), "label-studio"))
    assert [row["id"] for row in found] == ["41", "42", "43"]
    assert kept(found[0], *WHAT, "labeler", "seconds") == {
        "messages": ASK, "completions": ["Loud.", "Green."], "ranks": [1, 0], "labeler": "10", "seconds": 4.288,
    }  # fmt: skip
    assert kept(found[1], "completions", "ranks", "labeler") == {
        "completions": ["Loud.", "Green."], "ranks": [1, 0], "labeler": "a@example.com",
    }  # fmt: skip
    assert (found[2]["completions"], found[2]["ranks"]) == (["Green.", "Loud."], [0, 1])


@pytest.mark.parametrize(
    ("buckets", "said"),
    [
        ({"best": ["1"], "ads": ["2"]}, "buckets whose order is unknown: ads, best"),
        ({"rank-1": ["1"]}, "a ranking that is not of all items"),
        ({"rank-1": ["1", "1", "2"]}, "a ranking that is not of all items"),
        ({"rank-1": "12"}, "a row of another form"),
        (["1", "2"], "a row of another form"),
    ],
)
def test_rankers_that_rank_nothing_are_named_with_their_place(file, buckets, said):
    data = {"prompt": "x", "items": [{"id": "1", "body": "a"}, {"id": "2", "body": "b"}]}
    path = file([{"data": data, "annotations": [{"result": [{"type": "ranker", "value": {"ranker": buckets}}]}]}], name="x.json")
    with pytest.raises(DataError, match=said) as error:
        list(exchange.import_(path, "label-studio"))
    assert str(error.value).startswith(f"{path}:1: ")


# ---------------------------------------------------------------------------------------------------------- all formats


def test_every_format_writes_reads_and_says_what_it_cannot_hold():
    for module in exchange.FORMATS.values():
        assert "Not held: " in module.__doc__ and "Source: " in module.__doc__
        assert set(module.TAKES) <= set(rounds.NOUNS) and module.write and module.read


@pytest.mark.parametrize("format", [name for name in exchange.FORMATS if name != "trl-unpaired"])
def test_what_is_written_once_is_written_the_same_after_reading(format, closed, tmp_path):
    """But for ids and labelers that a format does not hold: the lines are the same."""
    folder = closed(
        [pair(), pair("9", (1, 0), ratings=[3, 4]), ranked(ratings=[2, 6, 6])], [rounds.demonstration("d", ASK, "Green.")]
    )
    exchange.export(folder, format, tmp_path / "one")
    module = exchange.FORMATS[format]
    (tmp_path / "one").rename(tmp_path / "one.json")
    rows = list(module.read(tmp_path / "one.json"))
    module.write(iter(rows), tmp_path / "two.json")
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()


@pytest.mark.parametrize("format", exchange.FORMATS)
@pytest.mark.parametrize(
    "row",
    [
        [], 5, None, "text", {}, {"prompt": []}, {"chosen": [], "rejected": []}, {"prompt": ASK, "chosen": [], "rejected": []},
        {"prompt": ASK, "completion": ASK, "label": True}, {"prompt": [], "completion": said("x"), "label": True},
        {"chosen": 5, "rejected": None}, {"instruction": "x", "completions": [{"response": "a", "overall_score": "9"}] * 2},
        {"fields": {"prompt": 5, "a": "x", "b": "y"}, "responses": {"q": [{"value": ["a", "b"]}]}},
        {"fields": {"prompt": "x", "a": "x"}, "responses": {"ranking": [{"value": ["a", "c"]}]}},
        {"fields": {"x": "x", "y": "y", "a": "x", "b": "y"}, "responses": {"ranking": [{"value": ["a", "b"]}]}},
        {"data": {"x": 1}, "annotations": [{"result": [{"type": "pairwise", "value": {"selected": "left"}}]}]},
        {"data": {"prompt": 5, "text1": "a", "text2": "b"},
        "annotations": [{"result": [{"type": "pairwise", "value": {"selected": "left"}}]}]},
    ],
    ids=lambda row: json.dumps(row)[:40],
)  # fmt: skip
def test_what_is_no_row_of_the_format_is_an_error_that_names_file_and_line(format, row, file):
    path = file("\n", row)
    try:
        list(exchange.import_(path, format))
    except DataError as error:
        assert str(error).startswith(f"{path}:2: ")


def test_bad_lines_are_named(file):
    for bad in ("{", '{"a": 1, "a": 2}', '"\\ud800"', "[" * 100_000):
        path = file(json.dumps({"prompt": ASK, "completion": said("x")}) + "\n", bad + "\n")
        with pytest.raises(DataError, match=r"theirs\.jsonl:2: "):
            list(exchange.import_(path, "trl-completion"))


def test_files_and_formats_that_are_not_there_are_named_at_once(tmp_path, closed, file):
    file(name="battles.json")
    with pytest.raises(DataError, match=r"No file .*battle\.json\. Did you mean 'battles\.json'\?"):
        exchange.import_(tmp_path / "battle.json", "arena")
    with pytest.raises(
        ConfigError, match=r"No format 'trl-preferences'\. Did you mean 'trl-preference'\? There are: arena, argilla"
    ):
        exchange.import_(tmp_path / "battles.json", "trl-preferences")
    with pytest.raises(DataError, match=r"is no closed round: it has none of comparisons\.jsonl"):
        exchange.export(tmp_path / "nowhere", "hh", tmp_path / "out")
    with pytest.raises(DataError, match="gunzip"):
        exchange.import_(file(name="x.json.gz"), "arena")


def test_a_file_of_another_tool_becomes_a_folder_that_exports_the_same(closed, tmp_path):
    exchange.export(closed([pair(), pair("9", (1, 0))]), "hh", tmp_path / "theirs.jsonl")
    assert exchange.import_round(tmp_path / "theirs.jsonl", "hh", tmp_path / "rounds/new").count == 2
    exchange.export(tmp_path / "rounds/new", "hh", tmp_path / "again.jsonl")
    assert lines(tmp_path / "again.jsonl") == lines(tmp_path / "theirs.jsonl")
    with pytest.raises(DataError, match="is not empty"):
        exchange.import_round(tmp_path / "theirs.jsonl", "hh", tmp_path / "rounds/new")


def test_an_export_of_nothing_is_an_error_and_leaves_the_file_that_was_there(closed, tmp_path):
    (tmp_path / "out").write_text("before")
    with pytest.raises(DataError, match="Nothing can be written .*: left out: 1 tied pairs"):
        exchange.export(closed([pair(ranks=(0, 0))]), "hh", tmp_path / "out")
    with pytest.raises(DataError, match="no rows of the kind that this format holds"):
        exchange.export(closed([pair()]), "trl-completion", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "before" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ranks": [0]}, "2 completions, but 1 ranks"), ({"ranks": []}, "2 completions, but 0 ranks"),
        ({"ratings": [1, 8]}, "rating is 8"), ({"shown": [0, 0]}, r"shown is \[0, 0\]"),
        ({"completions": ["x"], "ranks": [0]}, "two completions or more"), ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "boss", "content": "x"}]}, 'role is "boss"'), ({"labeler": 5}, "labeler is 5, not text"),
        ({"flags": ["rude", "x"]}, r"flags\[0\]"),
    ],
)  # fmt: skip
def test_a_damaged_round_is_an_error_with_file_and_line(closed, tmp_path, change, said):
    folder = closed([pair(), pair("9") | change])
    with pytest.raises(DataError, match=said) as error:
        exchange.export(folder, "trl-preference", tmp_path / "out")
    assert f"{folder / 'comparisons.jsonl'}:2: " in str(error.value)


def test_rows_of_one_task_must_be_of_the_same_completions_where_they_are_brought_together(closed, tmp_path):
    with pytest.raises(DataError, match="Two rows have the id '8', but not the same"):
        exchange.export(closed([pair(), pair(messages=TALK)]), "argilla", tmp_path / "out")


class Held(dict):
    """A row that can be watched."""

    __hash__ = object.__hash__


@pytest.mark.parametrize("format", [name for name in exchange.FORMATS if name not in ("argilla", "label-studio")])
def test_rows_are_written_one_by_one_and_not_kept(format, tmp_path):
    watched, most = weakref.WeakSet(), 0

    def rows():
        nonlocal most
        for i in range(100):
            row = Held(rounds.demonstration(str(i), ASK, "x") if format == "trl-completion" else pair(str(i), ratings=[7, 1]))
            watched.add(row)
            most = max(most, len(watched))
            yield row
            del row

    assert exchange.FORMATS[format].write(rows(), tmp_path / "out").count >= 100
    assert most <= 3


def test_rows_are_read_one_by_one(file):
    good = json.dumps({"prompt": ASK, "completion": said("x")}) + "\n"
    found = exchange.import_(file(good, good, "{"), "trl-completion")
    assert [next(found)["id"], next(found)["id"]] == ["000001", "000002"]
    with pytest.raises(DataError, match=":3: "):
        next(found)


@pytest.mark.parametrize("format", ["trl-preference", "hh", "ultrafeedback"])
def test_the_source_files_reads_what_is_written(format, closed, tmp_path):
    exchange.export(closed([ranked(ranks=(2, 0, 1), ratings=[1, 7, 4])]), format, tmp_path / "out.jsonl")
    values = {"comparisons": [{"path": str(tmp_path / "out.jsonl")}], "heldout_fraction": 0.0}
    found = Files(parse(Files.Config, values, "data")).comparisons("train")
    assert {each.completions[each.ranks.index(0)] for each in found} <= {"Green.", "Red."}
    assert len(found) == (1 if format == "ultrafeedback" else 3)


# -------------------------------------------------------------------------------------------------------- personal data


def kinds(text):
    return [(each.kind, text[each.start : each.end]) for each in find(text)]


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [
        ("email", "Mail jane.doe+x@mail.example.co.uk, please.", "jane.doe+x@mail.example.co.uk"),
        ("email", "<jürgen@exämple.de>", "jürgen@exämple.de"),
        ("phone", "call +44 20 7946 0958 now", "+44 20 7946 0958"),
        ("phone", "tel.: +491701234567.", "+491701234567"),
        ("phone", "from Germany 0044 20 7946 0958", "0044 20 7946 0958"),
        ("phone", "+1 (212) 555-0142", "+1 (212) 555-0142"),
        ("phone", "or (212) 555-0142!", "(212) 555-0142"),
        ("phone", "212-555-0142", "212-555-0142"),
        ("phone", "1.212.555.0142", "1.212.555.0142"),
        ("iban", "pay to GB82 WEST 1234 5698 7654 32 IN TIME", "GB82 WEST 1234 5698 7654 32"),
        ("iban", "DE89370400440532013000", "DE89370400440532013000"),
        ("iban", "fr14 2004 1010 0505 0001 3m02 606", "fr14 2004 1010 0505 0001 3m02 606"),
        ("card", "4111 1111 1111 1111", "4111 1111 1111 1111"),
        ("card", "my card is 4111111111111111.", "4111111111111111"),
        ("card", "3782 822463 10005", "3782 822463 10005"),
        ("card", "4111 1111 1111 1111 12/27", "4111 1111 1111 1111"),
        ("card", "5555-5555-5555-4444", "5555-5555-5555-4444"),
        ("ssn", "SSN 078-05-1120", "078-05-1120"),
        ("ip", "from 203.0.113.7.", "203.0.113.7"),
        ("ip", "2001:db8::8a2e:370:7334 answered", "2001:db8::8a2e:370:7334"),
        ("ip", "::ffff:192.0.2.1", "::ffff:192.0.2.1"),
        ("street", "I live at 221B Baker Street, London", "221B Baker Street"),
        ("street", "350 5th Ave", "350 5th Ave"),
        ("street", "10 N Main St.", "10 N Main St."),
        ("street", "wohnt Musterstraße 12a in", "Musterstraße 12a"),
        ("street", "Hauptstr. 5", "Hauptstr. 5"),
        ("street", "12 rue de la Paix", "12 rue de la Paix"),
        ("street", "en Calle Mayor 12", "Calle Mayor 12"),
        ("url", "see https://bob:secret@host.example/x", "https://bob:secret@host.example"),
        ("url", "I am https://github.com/torvalds", "https://github.com/torvalds"),
        ("url", "www.linkedin.com/in/jane-doe", "www.linkedin.com/in/jane-doe"),
        ("url", "reddit.com/u/somebody", "reddit.com/u/somebody"),
    ],
)  # fmt: skip
def test_personal_data_are_found(kind, text, found):
    assert kinds(text) == [(kind, found)]


@pytest.mark.parametrize(
    "text",
    [
        "$1,234.56", "it costs 1,000,000 dollars", "1 000 000", "100 000 000 000", "EUR 4.111.111.111", "2024-01-15",
        "15.01.2024", "01/02/2023 12:30:45", "2023-12-25T10:00:00+01:00", "1990-1995-2000", "version 1.2.3.4", "v10.0.1.2",
        "Python 3.11.4", "10.0.19041.1", "section 4.3.2.1", "ISBN 978-3-16-148410-0", "ISBN 0-306-40615-2", "9780306406157",
        "std::vector<int> a::b", "12:30:45", "aa:bb:cc:dd:ee:ff", "127.0.0.1 and ::1", "3.14159265358979 and 2.718281828459045",
        "1234567890", "1600x1200", "4111 1111 1111 1112", "4111111111111112", "GB82 WEST 1234 5698 7654 33",
        "DE8937040044053201300", "ZZ82 1234 5678 9012", "000-12-3456 and 666-12-3456", "@user said hi", "root@localhost",
        "+5 points", "3 + 4 = 7", "12 angry men", "No. 12 of 2019", "I ran 5 km", "https://example.com/path?q=1",
        "https://github.com", "netflix.com/title", "1-2-3-4-5-6-7-8-9", "ratio 16:9", "the way to 12 places",
        "a street of 12 houses", "100-200-3000", "555-0142",
    ],
)  # fmt: skip
def test_prices_dates_versions_and_numbers_are_not_personal_data(text):
    assert kinds(text) == []


def test_what_is_found_comes_in_order_and_does_not_overlap():
    text = "a@example.com, https://me@example.com/ and +44 20 7946 0958"
    assert kinds(text) == [("email", "a@example.com"), ("url", "https://me@example.com"), ("phone", "+44 20 7946 0958")]
    assert find("x a@example.com")[0] == Found("email", 2, 15)


HOSTILE = (
    "a", "a.", "a@", "a.b@", "+1", "1 ", "1-", "1234-", "A ", "1 A ", "Aa ", "GB82", "GB82 ", "::", ":1", "1.1.", "http://",
    "http://a:", "x.com/", "Via A ", "12 rue de la ", "(212) ", "00 1", "@", "%", "Astr", "0", "1,", "a-", "'", "5th 5 5th ",
    "é", "\n", "212-555-014",
)  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_text_takes_linear_time(piece):
    def seconds(size: int) -> float:
        text = (piece * size)[:size]
        start = time.process_time()
        find(text)
        return time.process_time() - start

    assert seconds(100_000) < 3  # quadratic time would be minutes


# --------------------------------------------------------------------------------------------------------- hostile files

PAIR = {"prompt": [{"role": "user", "content": "q"}], "chosen": rounds.answer("a"), "rejected": rounds.answer("b")}


def test_a_row_that_is_nested_too_deeply_is_an_error_with_its_place(tmp_path):
    (tmp_path / "deep.jsonl").write_text(json.dumps(PAIR)[:-1] + ', "x": ' + "[" * 900 + "]" * 900 + "}\n")
    with pytest.raises(DataError, match="deep.jsonl:1: .*nested too deeply"):
        list(exchange.import_(tmp_path / "deep.jsonl", "trl-preference"))


def test_metadata_with_numbers_of_thousands_of_digits_are_not_believed(tmp_path):
    options = [{"value": ["completion-1", "completion-2"], "user_id": argilla.user_id("x")}]
    record = {
        "fields": {"prompt": "p", "completion-1": "a", "completion-2": "b"}, "responses": {"ranking": options},
        "metadata": {"labelers": ["x"], "groups": ["g"], "ranks": ["9" * 5000 + " 1"]},
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps([record]))
    (row,) = exchange.import_(tmp_path / "a.json", "argilla")
    assert row["ranks"] == [0, 1] and row["labeler"] == argilla.user_id("x")


def test_a_number_that_cannot_be_converted_is_an_error_with_its_place(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"a.jsonl:1: Exceeds the limit .* digits\.$"):
        list(rounds.read(tmp_path / "a.jsonl", lambda row, number: [int("9" * 5000)]))


def test_a_small_parquet_file_that_unpacks_to_gigabytes_is_read_row_by_row(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text = pyarrow.array(["x" * 200_000])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2000, pyarrow.int32()), text)  # 400 MB
    parquet.write_table(pyarrow.table({"prompt": column}), tmp_path / "bomb.parquet", compression="zstd")
    tracemalloc.start()
    try:
        rows = rounds.read(tmp_path / "bomb.parquet", lambda row, number: [row])
        assert len(next(rows)["prompt"]) == 200_000 and tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.parquet", "a.PARQUET"])
def test_parquet_of_which_too_much_has_to_be_in_memory_is_refused(tmp_path, monkeypatch, name):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"prompt": ["x" * 5000]}), tmp_path / name)
    monkeypatch.setattr(rounds, "MOST_BYTES", 100)
    with pytest.raises(DataError, match="in one group of rows"):
        list(rounds.read(tmp_path / name, lambda row, number: [row]))
