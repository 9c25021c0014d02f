"""Files as a source of data: every convention, every complaint, the held-out rule and the mixture."""

import collections
import csv
import datetime
import gzip
import io
import itertools
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml

from lockstep.api import items
from lockstep.config.schema import parse
from lockstep.data import columns, reading
from lockstep.data.files import Files
from lockstep.data.mixing import mix
from lockstep.errors import ConfigError, DataError, MissingData
from lockstep.types import Comparison, Demonstration, Message, Prompt, ToolCall

ROOT = Path(__file__).parents[1]
DEFAULTS = yaml.safe_load((ROOT / "conf/data/files.yaml").read_text())
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
COLOUR, GREEN = Prompt.of("Name a colour."), "Green."


def files(**keys) -> Files:
    """The source as conf/data/files.yaml has it, but nothing held out unless asked for."""
    values = {**DEFAULTS, "heldout_fraction": 0.0, **keys}
    del values["name"]
    return Files(parse(Files.Config, values, "data"))


def message(role, content):
    return {"role": role, "content": content}


def dialogue(*turns):
    """Messages of user and assistant in turn."""
    return [message(role, turn) for role, turn in zip(itertools.cycle((USER, ASSISTANT)), turns, strict=False)]


# --------------------------------------------------------------------------------------------------------- conventions


def demonstration(source) -> Demonstration:
    (only,) = files(demonstrations=[source]).demonstrations("train")
    return only


def comparison(source) -> Comparison:
    (only,) = files(comparisons=[source]).comparisons("train")
    return only


def prompt(source) -> Prompt:
    (only,) = files(prompts=[source]).prompts("train")
    return only


def items_of(noun, source):
    return (
        files(tests={"mine": [source]}).tests()["mine"] if noun == "tests" else getattr(files(**{noun: [source]}), noun)("train")
    )


def documented():
    """The rows of the table in docs/data.md: (nouns, example)."""
    for line in (ROOT / "docs/data.md").read_text().splitlines():
        if match := re.fullmatch(r"\| [^|]+ \| ([a-z, ]+) \| `(\{.*\})` \|", line):
            yield match[1].split(", "), json.loads(match[2])


def test_the_table_of_conventions_is_found():
    assert len(list(documented())) == 23


@pytest.mark.parametrize("nouns, row", list(documented()), ids=lambda value: "+".join(value))
def test_every_documented_row_gives_what_the_table_says(write, nouns, row):
    for noun in nouns:
        (item,) = items_of(noun, write(row))
        if not {"subreddit", "info", "query"}.isdisjoint(row):
            continue  # their prompts are written, not read: tests of their own below
        if noun == "demonstrations" and "instruction" not in row:
            assert item == Demonstration(COLOUR, GREEN)
        if noun == "comparisons" and len(item.completions) == 2:
            assert item.prompt == COLOUR
            assert dict(zip(item.completions, item.ranks, strict=True)) == {"Green.": 0, "Loud.": 1}


@pytest.mark.parametrize("nouns, row", list(documented()), ids=lambda value: "+".join(value))
def test_rows_serve_only_the_nouns_that_the_table_lists(write, nouns, row):
    for noun in {"demonstrations", "comparisons", "prompts", "texts", "goals", "tests"} - set(nouns):
        with pytest.raises(DataError, match=f"my.jsonl:1: no {noun} can be made from the columns"):
            items_of(noun, write(row))


def goals(*rows, **source):
    return files(goals=[{"path": rows[0], **source}] if source else [rows[0]]).goals("train")


def test_a_goal_has_its_own_words_how_it_is_asked_for_and_a_twin(write):
    row = {"goal": "open a safe", "twin": "open a jar", "ask": "Have it say how to open a safe.", "harm": "theft"}
    source = write(row)
    (found,) = files(goals=[{**source, "columns": ["harm"]}]).goals("train")
    assert (found.text, found.ask, found.twin.text) == ("open a safe", "Have it say how to open a safe.", "open a jar")
    assert found.truth == found.twin.truth == {"harm": "theft"}
    assert found.prompt().messages == (Message("user", found.ask),) and found.prompt().truth["goal"] == "open a safe"
    (plain,) = goals(write({"goal": "open a safe", "twin": ""}))
    assert (plain.ask, plain.twin) == ("open a safe", None)


def test_red_team_attempts_are_goals_and_prompts_but_no_demonstrations(write):
    said = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How?\n\nAssistant: Like this."
    source = write({"transcript": said, "task_description": "open a safe", "min_harmlessness_score_transcript": -3.2})
    (asked,) = files(prompts=[source]).prompts("train")
    assert [(m.role, m.content) for m in asked.messages] == [(USER, "Hi"), (ASSISTANT, "Hello"), (USER, "How?")]
    assert [goal.text for goal in goals(source)] == ["open a safe"]
    with pytest.raises(DataError, match="no demonstrations can be made"):
        demonstration(source)


def test_behaviours_that_need_a_context_are_left_out(write, capsys):
    source = write({"Behavior": "Explain it", "ContextString": ""}, {"Behavior": "Continue", "ContextString": "Dear sir"})
    assert [goal.text for goal in files(goals=[source]).goals("train")] == ["Explain it"]
    assert "1 of 2 rows" in (said := capsys.readouterr().out) and "1 goals with a context" in said


def test_earlier_answers_stay_in_the_prompt(write):
    found = demonstration(write({"messages": [message(SYSTEM, "Be brief."), *dialogue("Hi", "Hello", "Bye", "See you")]}))
    turns = ((SYSTEM, "Be brief."), (USER, "Hi"), (ASSISTANT, "Hello"), (USER, "Bye"))
    assert found == Demonstration(Prompt(tuple(Message(*turn) for turn in turns)), "See you", dialogue=True)


def test_only_a_whole_dialogue_teaches_the_earlier_answers_too(write):
    prompt, pair = dialogue("Hi", "Hello", "Bye"), {"chosen": dialogue("Hi", "Hello", "Bye", "See you")}
    assert demonstration(write({"conversations": dialogue("Hi", "Hello", "Bye", "See you")})).dialogue
    assert not demonstration(write({"prompt": prompt, "completion": "See you"})).dialogue
    assert not demonstration(write({**pair, "rejected": dialogue("Hi", "Hello", "Bye", "No")})).dialogue
    assert not demonstration(write({"messages": dialogue("Hi", "Hello")})).dialogue


def test_a_dialogue_that_waits_for_an_answer_is_a_prompt_as_it_is(write):
    assert len(prompt(write({"messages": dialogue("Hi", "Hello", "Bye")})).messages) == 3


def test_alpaca_puts_the_input_below_the_instruction_and_nothing_where_there_is_none(write):
    row = {"instruction": "Translate into French.", "input": "green", "output": "vert"}
    assert demonstration(write(row)).prompt == Prompt.of("Translate into French.\n\ngreen")
    assert demonstration(write({**row, "input": ""})).prompt == Prompt.of("Translate into French.")


def test_posts_become_the_prompt_of_stiennon_et_al_and_summaries_keep_their_space(write):
    """N+ set a space before a post's own summary, as the summaries of the comparisons have one."""
    post = {"id": "t3_1", "subreddit": "colours", "title": "Grass", "post": "I looked."}
    expected = Prompt.of("SUBREDDIT: r/colours\n\nTITLE: Grass\n\nPOST: I looked.\n\nTL;DR:")
    assert demonstration(write({**post, "summary": "It is green."})) == Demonstration(expected, " It is green.")
    summaries = [{"text": " Loud.", "policy": "a", "note": None}, {"text": " Green.", "policy": "b", "note": None}]
    row = {
        "info": {**post, "site": None, "article": None},
        "summaries": summaries,
        "choice": 1,
        "worker": "Ada",
        "split": "train",
    }
    assert comparison(write(row)) == Comparison(expected, (" Loud.", " Green."), (1, 0), "Ada")
    article = {name: None for name in post} | {"article": "News."}
    assert comparison(write({**row, "info": article, "choice": 0})).prompt == Prompt.of("Article:\nNews.\n\nTL;DR:\n")
    with pytest.raises(DataError, match="a choice out of range: 'choice' is 2, of 2 summaries"):
        comparison(write({**row, "choice": 2}))


def test_a_query_is_a_prompt_and_its_reference_ends_before_the_end_of_text(write):
    row = {"query": "POST: x\n\nTL;DR:", "reference_response": " Green.<|endoftext|>", "query_token": [1, 2]}
    assert demonstration(write(row)) == Demonstration(Prompt.of("POST: x\n\nTL;DR:"), " Green.")


def test_ultrafeedback_ranks_four_completions_by_their_overall_score(write):
    completions = [
        {"model": name, "response": text, "overall_score": score, "annotations": {"helpfulness": {"Rating": "3"}}}
        for name, text, score in [("a", "Loud.", 3.5), ("b", "Green.", 8), ("c", "Red.", 8.0), ("d", "Grass.", 5)]
    ]
    row = {"source": "evol", "instruction": "Name a colour.", "models": list("abcd"), "completions": completions}
    assert comparison(write(row)) == Comparison(COLOUR, ("Loud.", "Green.", "Red.", "Grass."), (2, 0, 0, 1))
    assert demonstration(write(row)) == Demonstration(COLOUR, GREEN)
    few = files(comparisons=[write(row, {**row, "completions": completions[:1]}, name="few.jsonl")])
    assert len(few.comparisons("train")) == 1
    with pytest.raises(DataError, match="no 'overall_score'"):
        comparison(write({**row, "completions": [{"response": "a"}, {"response": "b"}]}))


def test_hh_transcripts_are_split_at_the_last_answer(write):
    before = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: List two.\n\nAssistant:"
    found = comparison(write({"chosen": f"{before} One.\n\nTwo.", "rejected": f"{before} No. "}))
    turns = ((USER, "Hi"), (ASSISTANT, "Hello"), (USER, "List two."))
    assert found.prompt == Prompt(tuple(Message(*turn) for turn in turns))
    assert found.completions == ("One.\n\nTwo.", "No.")


def test_an_hh_prompt_beside_completions_is_a_dialogue_too(write):
    row = {"prompt": "\n\nHuman: Name a colour.\n\nAssistant:", "chosen": " Green.", "rejected": " Loud."}
    assert comparison(write(row)) == Comparison(COLOUR, ("Green.", "Loud."), (0, 1))


def test_whole_dialogues_beside_a_prompt_hold_their_own(write):
    chosen, rejected = dialogue("Name a colour.", "Green."), dialogue("Name a colour.", "Loud.")
    row = {"prompt": "Name a colour.", "chosen": chosen, "rejected": rejected}
    assert comparison(write(row)) == Comparison(COLOUR, ("Green.", "Loud."), (0, 1))


def test_completions_may_be_messages(write):
    answers = [[message(ASSISTANT, text)] for text in ("Green.", "Loud.")]
    row = {"prompt": dialogue("Name a colour."), "chosen": answers[0], "rejected": answers[1]}
    assert comparison(write(row)) == Comparison(COLOUR, ("Green.", "Loud."), (0, 1))


def test_plain_text_keeps_its_white_space(write):
    assert demonstration(write({"prompt": "Grass is", "completion": " green."})).response == " green."


@pytest.mark.parametrize(
    "column, numbers, ranks",
    [("ranks", [2, 1, 2], (1, 0, 1)), ("ranks", [0, 2, 1], (0, 2, 1)), ("scores", [0.5, -1, 9], (1, 2, 0))],
)
def test_ranks_count_from_the_best_and_scores_the_other_way(write, column, numbers, ranks):
    row = {"prompt": "Name a colour.", "completions": ["a", "b", "c"], column: numbers, "labeler": "Ada"}
    assert comparison(write(row)) == Comparison(COLOUR, ("a", "b", "c"), ranks, "Ada")


def test_the_best_completion_of_a_comparison_serves_as_demonstration(write):
    row = {"prompt": "Name a colour.", "completions": ["Loud.", "Green.", "Red."], "ranks": [2, 1, 1]}
    assert demonstration(write(row)) == Demonstration(COLOUR, "Green.")


def test_a_system_column_begins_the_dialogue_of_every_convention_unless_it_has_one(write):
    turns = dialogue("Name a colour.", "Green.")
    rows = [
        {"instruction": "Name a colour.", "output": "Green.", "system": "Be brief."},
        {"prompt": "Name a colour.", "completion": "Green.", "system_prompt": "Be brief."},
        {"conversations": turns, "system": "Be brief."},
        {"messages": [message(SYSTEM, "Be brief."), *turns], "system": "Be brief."},
    ]
    expected = Demonstration(Prompt((Message(SYSTEM, "Be brief."), Message(USER, "Name a colour."))), GREEN)
    assert [demonstration(write(row)) for row in rows] == [expected] * 4
    assert demonstration(write({**GOOD, "system": " "})) == Demonstration(COLOUR, GREEN)
    assert comparison(write({**PAIR, "system": "Be brief."})).prompt == expected.prompt
    with pytest.raises(DataError, match=r"my.jsonl:1: two system messages: they differ: 'Be brief.' and 'Be long.'"):
        demonstration(write({"messages": [message(SYSTEM, "Be brief."), *turns], "system": "Be long."}))


def test_alpacas_history_is_earlier_turns_of_a_whole_dialogue(write):
    row = {"instruction": "Bye", "input": "", "output": "See you", "system": "Be brief.", "history": [["Hi", "Hello"]]}
    turns = ((SYSTEM, "Be brief."), (USER, "Hi"), (ASSISTANT, "Hello"), (USER, "Bye"))
    assert demonstration(write(row)) == Demonstration(Prompt(tuple(Message(*turn) for turn in turns)), "See you", dialogue=True)
    assert not demonstration(write({**row, "history": []})).dialogue
    assert len(demonstration(write({**GOOD, "history": [["Hi", "Hello"]]})).prompt.messages) == 3
    for history, says in [
        ([["Hi", "Hello", "Bye"]], r"a malformed history: 'history\[0\]' should be a question and its answer"),
        ([["Hi", None]], r"a malformed history: 'history\[0\]' should be a question and its answer"),
        ("[]x", "a wrong type: 'history' should be a list of pairs"),
    ]:
        with pytest.raises(DataError, match=says):
            demonstration(write({**row, "history": history}))
    with pytest.raises(DataError, match="a history beside a dialogue"):
        demonstration(write({"messages": dialogue("Hi", "Hello", "Bye", "See you"), "history": [["Hi", "Hello"]]}))


def test_an_instruction_is_about_its_context_too(write):
    assert prompt(write({"instruction": "Translate.", "context": "green"})) == Prompt.of("Translate.\n\ngreen")


def test_answers_that_are_labelled_as_bad_are_no_demonstrations(write, tmp_path, capsys):
    for name in ("label", "kto_tag"):
        assert demonstration(write({**GOOD, name: True}, {**GOOD, "completion": "Loud.", name: False})).response == GREEN
        assert "left out: 1 answers that are labelled as bad." in capsys.readouterr().out
    (tmp_path / "a.csv").write_text("prompt,completion,label\nName a colour.,Green.,True\nName a colour.,Loud.,False\n")
    assert demonstration({"path": str(tmp_path / "a.csv")}).response == GREEN
    (tmp_path / "a.csv").write_text("prompt,completion,label\nName a colour.,Green., true\nName a colour.,Loud.,False \n")
    assert demonstration({"path": str(tmp_path / "a.csv")}).response == GREEN
    assert prompt(write({"prompt": "Name a colour.", "label": False})) == COLOUR
    with pytest.raises(DataError, match=r"a column 'label' that is not true or false: it is 0, .* add ignore: \[label\]"):
        demonstration(write({**GOOD, "label": 0}))
    assert demonstration({**write({**GOOD, "label": 0}), "ignore": ["label"]}).response == GREEN
    for number in ("0", "1", " 0.0", "-1"):
        (tmp_path / "a.csv").write_text(f"prompt,completion,label\nName a colour.,Green.,{number}\n")
        with pytest.raises(DataError, match=rf"a.csv:2: a column 'label' that is not true or false: it is '{number}', "):
            demonstration({"path": str(tmp_path / "a.csv")})
    (tmp_path / "a.csv").write_text("prompt,completion,label\nName a colour.,Green.,harmless\nName a colour.,Red.,\n")
    assert len(files(demonstrations=[{"path": str(tmp_path / "a.csv")}]).demonstrations("train")) == 2


NOT_READ = {
    "functions": {"prompt": "Hi", "completion": "Ho", "functions": [{"name": "search"}]},
    "images": {"messages": dialogue("Hi", "Ho"), "images": ["a.png"]},
    "chat_template_kwargs": {"messages": dialogue("Hi", "Ho"), "chat_template_kwargs": {"enable_thinking": False}},
    "function_call": {"messages": [message(USER, "Hi"), {**message(ASSISTANT, None), "function_call": {"name": "search"}}]},
    "reasoning_content": {"messages": [message(USER, "Hi"), {**message(ASSISTANT, "Ho"), "reasoning_content": "Hm"}]},
    "weight": {"messages": [message(USER, "Hi"), {**message(ASSISTANT, "Ho"), "weight": 0}]},
}


@pytest.mark.parametrize("name", NOT_READ)
def test_a_column_without_which_a_row_means_something_else_is_refused_unless_it_is_ignored(write, capsys, name):
    source = write(GOOD if name == "functions" else {"messages": dialogue("Hi", "Ho")}, NOT_READ[name])
    with pytest.raises(
        DataError, match=rf"my.jsonl:2: a column '{name}', which cannot be read: .*ignore: \[{name}\] to its source"
    ):
        files(demonstrations=[source]).demonstrations("train")
    assert len(files(demonstrations=[source], on_bad_row="skip").demonstrations("train")) == 1
    assert f"1 with a column '{name}', which cannot be read" in capsys.readouterr().out
    if name != "function_call":  # that message has no text
        assert demonstration({**write(NOT_READ[name]), "ignore": [name]}).response == "Ho"


@pytest.mark.parametrize("nothing", [None, "", [], "[]", {}, {"a": None}])
def test_a_column_that_says_nothing_is_no_obstacle(write, nothing):
    answer = {**message(ASSISTANT, "Ho"), "tool_calls": nothing, "function_call": nothing, "weight": 1}
    assert demonstration(write({"messages": [message(USER, "Hi"), answer], "tools": nothing, "images": nothing})).response == "Ho"


SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "green"}}}


@pytest.mark.parametrize("tools", [[SEARCH], json.dumps([SEARCH])])
@pytest.mark.parametrize(
    "call", [CALL, CALL["function"], {"name": "search", "arguments": '{"query": "green"}'}], ids=["openai", "bare", "json"]
)
def test_tools_their_calls_and_what_they_say_are_read(write, tools, call):
    turns = [message(USER, "Hi"), {**message(ASSISTANT, None), "tool_calls": [call]}, message("tool", "3 found")]
    calls = (ToolCall("search", {"query": "green"}),)
    asked = Prompt((Message(USER, "Hi"), Message(ASSISTANT, "", calls), Message("tool", "3 found")), {}, (SEARCH,))
    assert demonstration(write({"messages": [*turns, message(ASSISTANT, "Ho")], "tools": tools})) == Demonstration(
        asked, "Ho", True
    )
    assert prompt(write({"messages": turns, "tools": tools})) == asked
    begun = demonstration(write({"messages": turns[:2], "tools": tools}))
    assert begun == Demonstration(Prompt(asked.messages[:1], {}, (SEARCH,)), "", calls=calls)
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "?"}, {"from": "observation", "value": "3 found"}]
    assert prompt(write({"conversations": shared})).messages[2] == Message("tool", "3 found")


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "Hi", "completion": "Ho", "tools": "search"}, "'tools' should be a list of JSON schemas"),
        ({"prompt": "Hi", "completion": "Ho", "tools": ["search"]}, r"JSON schemas, not \['search'\]"),
        ({"messages": [message(USER, "Hi"), {**message(ASSISTANT, None), "tool_calls": [{"name": "search"}]}]},
         r"a malformed tool call: 'messages\[1\].tool_calls\[0\]' should have 'name' and 'arguments'"),
        ({"messages": [message(USER, "Hi"), {**message(ASSISTANT, None), "tool_calls": "search"}]}, "a malformed tool call"),
        ({"prompt": "Hi", "completion": [{**message(ASSISTANT, None), "tool_calls": [CALL]}]}, "a tool call that is compared"),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_read_are_refused(write, row, says):
    with pytest.raises(DataError, match=says):
        demonstration(write(row))


def test_tools_and_calls_have_the_same_keys_from_arrow_as_from_json(write, tmp_path, monkeypatch):
    """Arrow fills the keys that a group lacks with null. JSON has the nulls that somebody wrote."""
    datasets = pytest.importorskip("datasets")

    def row(**arguments):
        kinds = {name: {"type": "string", "enum": [value, None]} for name, value in arguments.items()}
        tool = {"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": kinds}}}
        call = {"type": "function", "function": {"name": "count", "arguments": arguments}}
        return {"messages": [message(USER, "Hi"), {**message(ASSISTANT, None), "tool_calls": [call]}], "tools": [tool]}

    rows = [row(thing="lamp"), row(thing="bed", city="Rome")]
    lamp, bed = expected = files(demonstrations=[write(*rows)]).demonstrations("train")
    assert (lamp.calls[0].arguments, bed.calls[0].arguments) == ({"thing": "lamp"}, {"thing": "bed", "city": "Rome"})
    _write_parquet(tmp_path / "a.parquet", rows)
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    for path in (tmp_path / "a.parquet", tmp_path / "saved", "some/where"):
        assert files(demonstrations=[{"path": str(path)}]).demonstrations("train") == expected
    assert items.read("demonstrations", data) == list(expected)
    null = row(thing="lamp", city=None)
    assert demonstration(write(null)).calls[0].arguments == {"thing": "lamp", "city": None}
    (given,) = items.read("demonstrations", [null])
    assert given.calls[0].arguments == {"thing": "lamp", "city": None}


def test_other_columns_that_are_not_read_are_named_once(write, capsys):
    source = write({**GOOD, "id": 1}, {**GOOD, "id": 2, "source": "web", "labeler": "Ada", "truth": {}, "system": ""})
    files(demonstrations=[source]).demonstrations("train")
    assert capsys.readouterr().out == f"data.demonstrations[0]: of {source['path']}, columns that are not read: id, source.\n"
    texts = write({"text": "a", "meta": {}}, name="texts.jsonl")
    files(texts=[texts]).texts("train")
    assert capsys.readouterr().out == f"data.texts[0]: of {texts['path']}, columns that are not read: meta.\n"


def test_columns_that_are_not_read_are_named_for_rows_in_python_too(caplog):
    assert items.read("demonstrations", [GOOD, {**GOOD, "id": 1, "labeler": "Ada"}]) == [Demonstration(COLOUR, GREEN)] * 2
    assert [record.getMessage() for record in caplog.records] == ["demonstrations: columns that are not read: id"]
    with pytest.raises(DataError, match=r"demonstrations\[0\]: a column 'functions', which cannot be read"):
        items.read("demonstrations", [NOT_READ["functions"]])
    with pytest.raises(DataError, match=r"prompts\[0\]: half a character"):
        items.read("prompts", ["Hi \ud83d"])


def test_a_text_that_only_begins_like_a_transcript_keeps_its_beginning(write):
    assert prompt(write({"prompt": "Human: a short history"})) == Prompt.of("Human: a short history")
    assert prompt(write({"text": "Human: a short history"})) == Prompt.of("Human: a short history")
    assert prompt(write({"prompt": "Human: Name a colour.\n\nAssistant:"})) == COLOUR
    assert prompt(write({"prompt": "\n\nHuman: Name a colour."})) == COLOUR


def test_truth_goes_with_the_prompt(write):
    assert prompt(write({"prompt": "1+1?", "truth": {"answer": "2"}})).truth == {"answer": "2"}


# ---------------------------------------------------------------------------------------------------- columns for rewards

KNOWN = {"answer": 2, "tests": ["assert f(1) == 2", None], "more": {"a": [1.5, True]}}


@pytest.mark.parametrize("row", [row for nouns, row in documented() if "prompts" in nouns], ids=lambda row: "+".join(row))
def test_named_columns_go_with_the_prompt_of_every_convention(write, row, capsys):
    source = {**write({**row, **KNOWN, "id": 7}), "columns": list(KNOWN)}
    assert prompt(source).truth == {**row.get("truth", {}), **KNOWN}
    left = capsys.readouterr().out.rpartition("columns that are not read: ")[2].rstrip(".\n").split(", ")
    assert "id" in left and not KNOWN.keys() & set(left)


def test_named_columns_reach_demonstrations_and_comparisons_and_may_be_named_for_every_source(write):
    loaded = files(
        demonstrations=[write({**GOOD, **KNOWN})],
        comparisons=[write({**PAIR, **KNOWN}, name="pairs.jsonl")],
        texts=[write({"text": "a"}, name="texts.jsonl")],
        every_source={"columns": ["answer"]},
    )
    assert loaded.demonstrations("train")[0].prompt.truth == loaded.comparisons("train")[0].prompt.truth == {"answer": 2}
    assert loaded.texts("train") == ("a",)


def test_a_named_column_wins_over_the_same_key_of_truth_and_null_is_a_value(write):
    row = {"prompt": "1+1?", "truth": {"answer": "3", "level": 1}}
    assert prompt({**write({**row, "answer": "2"}), "columns": ["answer"]}).truth == {"answer": "2", "level": 1}
    assert prompt({**write({**row, "answer": None}), "columns": ["answer"]}).truth == {"answer": None, "level": 1}


def test_a_row_without_a_named_column_is_a_bad_row(write, capsys):
    source = {**write({"prompt": "a", "answer": 1}, {"prompt": "b", "anwser": 2}), "columns": ["answer"]}
    with pytest.raises(DataError, match=r"my.jsonl:2: no column 'answer': its source names it .* has: anwser, prompt. Correct"):
        files(prompts=[source]).prompts("train")
    assert len(files(prompts=[source], on_bad_row="skip").prompts("train")) == 1
    assert "left out: 1 with no column 'answer'" in capsys.readouterr().out


def test_a_value_that_is_no_json_is_a_bad_row(tmp_path):
    _write_parquet(tmp_path / "a.parquet", [{"prompt": "Hi", "day": datetime.date(2026, 11, 28)}])
    with pytest.raises(DataError, match="a column 'day' that is no JSON value: datetime.date"):
        files(prompts=[{"path": str(tmp_path / "a.parquet"), "columns": ["day"]}]).prompts("train")


def test_columns_of_raw_texts_or_ones_that_are_ignored_are_refused(write):
    with pytest.raises(ConfigError, match=r"data.texts\[0\] has columns, but raw texts have no prompt"):
        files(texts=[{**write({"text": "a"}), "columns": ["answer"]}])
    with pytest.raises(ConfigError, match=r"data.prompts\[0\] both reads and ignores answer. Remove it from columns or"):
        files(prompts=[{**write({"prompt": "a"}), "columns": ["answer"], "ignore": ["answer"]}])


# ------------------------------------------------------------------------------------------------------------- formats


def _write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _write_csv(path, rows, delimiter=","):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def _zip(path, write, rows):
    write(path, rows)
    path.write_bytes(gzip.compress(path.read_bytes()))


def _lines(rows):
    return "\n\n".join(map(json.dumps, rows)).encode("utf-8-sig")


FORMATS = {
    "a.jsonl": lambda path, rows: path.write_bytes(_lines(rows)),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(_lines(rows))),
    "a.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "lines.json": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows))),
    "a.csv": _write_csv,
    "a.csv.gz": lambda path, rows: _zip(path, _write_csv, rows),
    "a.tsv": lambda path, rows: _write_csv(path, rows, "\t"),
    "a.tsv.gz": lambda path, rows: _zip(path, lambda file, rows: _write_csv(file, rows, "\t"), rows),
    "a.parquet": _write_parquet,
    "A.JSONL": lambda path, rows: path.write_bytes(_lines(rows)),
    "A.Jsonl.GZ": lambda path, rows: path.write_bytes(gzip.compress(_lines(rows))),
    "A.Parquet": _write_parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, name):
    rows = [{"prompt": f"Frage {i}\nmit ä", "completion": f"Antwort {i}"} for i in range(3)]
    FORMATS[name](tmp_path / name, rows)
    found = files(demonstrations=[{"path": str(tmp_path / name)}]).demonstrations("train")
    assert found == tuple(Demonstration(Prompt.of(row["prompt"]), row["completion"]) for row in rows)


def test_a_csv_row_that_is_too_long_or_too_short_is_named_by_its_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"Two\nlines",Yes\nHi\n')
    with pytest.raises(
        DataError, match=r"a.csv:4: a null: 'completion' is null \(in CSV: the row ends before it\)\. It should be"
    ):
        files(demonstrations=[{"path": str(path)}]).demonstrations("train")
    path.write_text("prompt\nHi,Hello\n")
    with pytest.raises(DataError, match="a.csv:2: more fields than the header has: 1 more. Text that has a comma needs quotes."):
        files(demonstrations=[{"path": str(path)}]).demonstrations("train")


def test_parquet_holds_messages(tmp_path):
    _write_parquet(tmp_path / "a.parquet", [{"messages": dialogue("Name a colour.", "Green.")}])
    assert demonstration({"path": str(tmp_path / "a.parquet")}) == Demonstration(COLOUR, GREEN)


def test_a_folder_has_its_splits_in_its_files(write, tmp_path):
    for name in ("train-00000-of-00002", "data/train-00001-of-00002", "test", "training", ".cache/train"):
        write({"text": name}, name=f"{name}.jsonl")
    source = {"path": str(tmp_path)}
    assert files(texts=[source]).texts("train") == ("data/train-00001-of-00002", "train-00000-of-00002")
    assert files(texts=[{**source, "split": "test"}]).texts("train") == ("test",)
    with pytest.raises(
        DataError, match=r"has no split 'dev'.* It has: data/train-00001-of-00002.jsonl, test.jsonl, .*one of them.$"
    ):
        files(texts=[{**source, "split": "dev"}]).texts("train")


def test_a_folder_names_the_files_of_a_split_that_it_does_not_read(write, tmp_path, caplog):
    for name in ("train-1.JSONL", "train-2.jsonl.zst", "train/notes.md", "train/.hidden.md", "test.docx", "README.md"):
        write({"text": name}, name=name)
    (tmp_path / "train-3.csv.gz").write_bytes(gzip.compress(b"text\nzipped\n"))
    assert files(texts=[{"path": str(tmp_path)}]).texts("train") == ("train-1.JSONL", "zipped")
    said = "split 'train': Files of the split that are not read: train-2.jsonl.zst, train/notes.md. Formats: .jsonl, "
    assert len(caplog.records) == 1 and f"{tmp_path}, {said}" in caplog.text
    with pytest.raises(
        DataError, match="It has: train-1.JSONL, train-3.csv.gz. .* that are not read: test.docx. Formats: .jsonl, "
    ):
        files(texts=[{"path": str(tmp_path), "split": "test"}]).texts("train")


def test_a_split_can_be_a_slice(write):
    source = write(*({"text": str(i)} for i in range(9)))
    assert files(texts=[{**source, "split": "train[2:4]"}]).texts("train") == ("2", "3")
    assert files(texts=[{**source, "split": "train[:1]"}]).texts("train") == ("0",)
    assert files(texts=[{**source, "split": f"train[7:{10**18 - 1}]"}]).texts("train") == ("7", "8")


def test_the_hub_is_asked_for_what_the_source_says(monkeypatch):
    asked = {}

    def load_dataset(path, **keys):
        asked.update(path=path, **keys)
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = {"path": "Anthropic/hh-rlhf/harmless-base", "split": "test[:1]", "revision": "main"}
    assert files(texts=[source]).texts("train") == ("a",)
    assert asked == {
        "path": "Anthropic/hh-rlhf", "data_dir": "harmless-base", "name": None, "split": "test", "revision": "main",
        "streaming": False,
    }  # fmt: skip


def test_a_hub_that_does_not_answer_leads_to_a_local_path(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub.")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("lockstep.storage.hub._answers", lambda minute: True)
    expected = "'some/where' is not a local file or folder, .* Couldn't reach the Hub. A local path works too"
    with pytest.raises(DataError, match=expected):
        files(texts=[{"path": "some/where"}]).texts("train")


def test_what_datasets_saved_to_disk_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {"train": [{"text": "a"}], "test": [{"text": "b"}]}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()}).save_to_disk(tmp_path / "both")
    source = {"path": str(tmp_path / "both")}
    found = files(texts=[source], heldout_texts=[{**source, "split": "test"}])
    assert (found.texts("train"), found.texts("heldout")) == (("a",), ("b",))
    with pytest.raises(DataError, match="has no split 'tset'. Did you mean 'test'?"):
        files(texts=[{**source, "split": "tset"}]).texts("train")


# -------------------------------------------------------------------------------------------------------------- errors

GOOD = {"prompt": "Name a colour.", "completion": "Green."}
PAIR = {"prompt": "Name a colour.", "chosen": "Green.", "rejected": "Loud."}
RANKED = {"prompt": "Name a colour.", "completions": ["a", "b", "c"], "ranks": [0, 1, 2]}
ALPACA = {"instruction": "Translate into French.", "input": "green", "output": "vert"}
MESSAGES = {"messages": dialogue("Name a colour.", "Green.")}


@pytest.mark.parametrize(
    "noun, good, bad, says",
    [
        ("demonstrations", GOOD, {"prompt": "Hi", "completion": None}, "a null: 'completion' is null (in CSV"),
        ("demonstrations", GOOD, {"prompt": "Hi"}, "a missing column: no 'completion'. The row has: prompt."),
        ("demonstrations", GOOD, {**GOOD, "prompt": 3}, "a wrong type: 'prompt' should be text or a list of messages, not int."),
        ("demonstrations", GOOD, {**GOOD, "completion": " "}, "an empty text: 'completion' should not be empty."),
        ("demonstrations", GOOD, {**GOOD, "completion": dialogue("Hi")}, "a malformed completion: 'completion' should be"),
        ("demonstrations", GOOD, {**GOOD, "prompt": dialogue("Hi", "Hello")}, "a prompt that is answered: the last message"),
        ("demonstrations", GOOD, '{"prompt": "Hi",', "a line that is not a JSON object: Expecting property name"),
        ("demonstrations", GOOD, "[1]", "a line that is not a JSON object: list."),
        ("demonstrations", MESSAGES, {"messages": [message("ape", "4")]}, "an unknown role: 'messages[0]' is by 'ape'. Roles:"),
        ("demonstrations", MESSAGES, {"messages": dialogue("")}, "an empty message: 'messages[0]' should have text in 'content'"),
        ("demonstrations", MESSAGES, {"messages": ["Hi"]}, "a malformed message: 'messages[0]' should have 'role' and"),
        ("demonstrations", MESSAGES, {"messages": []}, "an empty list: 'messages' should hold messages."),
        ("demonstrations", MESSAGES, {"messages": dialogue("Hi")}, "no response: the last message should be the assistant's."),
        ("demonstrations", ALPACA, {**ALPACA, "input": 3}, "a wrong type: 'input' should be text, not int."),
        ("comparisons", PAIR, {**PAIR, "chosen": None}, "a null: 'chosen' is null"),
        ("comparisons", PAIR, {**PAIR, "rejected": ""}, "an empty text: 'rejected' should not be empty."),
        ("comparisons", PAIR, {**PAIR, "rejected": 1}, "a wrong type: 'rejected' should be text or a list of one message"),
        ("comparisons", PAIR, {**PAIR, "prompt": None}, "text without a prompt: 'chosen' should be a transcript"),
        ("comparisons", RANKED, {**RANKED, "ranks": [0, 1]}, "ranks that do not fit the completions: two or more completions "),
        ("comparisons", RANKED, {**RANKED, "ranks": [0, 1, "2"]}, "a wrong type: 'ranks' should be numbers, not [0, 1, '2']."),
        ("comparisons", RANKED, {**RANKED, "completions": ["a", "", "c"]}, "an empty text: 'completions[1]' should not be"),
        ("prompts", {"prompt": "Hi"}, {"prompt": "Hi", "truth": 3}, "a wrong type: 'truth' should be a group of keys, not int."),
        ("texts", {"text": "a"}, {"text": ["a"]}, "a wrong type: 'text' should be text, not list."),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line(write, noun, good, bad, says):
    source = write(good, bad)
    with pytest.raises(DataError, match=re.escape(f"{source['path']}:2: {says}")) as error:
        getattr(files(**{noun: [source]}), noun)("train")
    assert str(error.value).endswith("Correct the row, or leave such rows out with data.on_bad_row=skip.")


DEEP, DIGITS = "[" * 100_000 + "]" * 100_000, "1" * 6000
BROKEN = {
    "half a character": '{"prompt": "Hi \\ud83d", "completion": "Ho"}',
    "bytes that are not UTF-8": '{"prompt": "Hi \udce9", "completion": "Ho"}',
    "JSON that is nested too deeply": f'{{"prompt": "Hi", "completion": "Ho", "more": {DEEP}}}',
    "a number that is too long": f'{{"prompt": "Hi", "completion": "Ho", "more": {DIGITS}}}',
    "a key that is there twice": '{"prompt": "Hi", "completion": "Ho", "completion": "No"}',
    "too long a text": json.dumps({"prompt": "Hi", "completion": "Ho" * 200}),
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("problem", BROKEN)
def test_a_row_that_breaks_the_reader_is_one_bad_row(tmp_path, capsys, monkeypatch, problem, name):
    if problem == "too long a text":
        monkeypatch.setattr(columns, "MOST_CHARACTERS", 300)
        monkeypatch.setattr(reading, "MOST_CHARACTERS", 300)
    rows = [json.dumps(GOOD), BROKEN[problem], json.dumps(GOOD)]
    text = "\n".join(rows) if name == "a.jsonl" else f"[{', '.join(rows)}]"
    (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    source = {"path": str(tmp_path / name)}
    with pytest.raises(DataError, match=f"{name}:2: {problem}: .* Correct the row, or leave such rows out with"):
        files(demonstrations=[source]).demonstrations("train")
    assert len(files(demonstrations=[source], on_bad_row="skip").demonstrations("train")) == 2
    assert f"2 of 3 rows of {source['path']} can be used; left out: 1 with {problem}." in capsys.readouterr().out


def test_a_whole_surrogate_pair_is_a_character(write):
    assert demonstration(write('{"prompt": "Hi \\ud83d\\ude00 \u2028 you", "completion": "Ho"}')).prompt == Prompt.of(
        "Hi 😀 \u2028 you"
    )


def test_no_more_of_a_line_is_read_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MOST_CHARACTERS", 10)
    file = io.StringIO("a" * 10 + "\n" + "b" * 95 + "\nc\n" + "d" * 50)
    found = list(reading._lines(file))
    assert [line if isinstance(line, str) else line.problem for line in found] == ["too long a text"] * 2 + [
        "c\n",
        "too long a text",
    ]


def test_a_broken_json_list_is_named(tmp_path):
    for text, says in [
        ('[{"text": "a"}', "its list does not end"),
        ('[{"text": "a"}] x', "after its list comes '] x'"),
        ('[{"text": "a"}, {"text": "b}, {"text": "c"}]', "row 2 is not JSON: "),
    ]:
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DataError, match=re.escape(f"a.json cannot be read as .json: {says}")):
            files(texts=[{"path": str(tmp_path / "a.json")}], on_bad_row="skip").texts("train")


def test_csv_fields_may_be_long_and_broken_quotes_swallow_no_rows(tmp_path):
    path, long = tmp_path / "a.csv", "Green " * 50_000
    path.write_text(f'prompt,completion\nHi,"{long}"\n')
    assert demonstration({"path": str(path)}).response == long
    for rows, says in [
        ('Hi,"Ho\nHi,Ho\n', "cannot be read as .csv: in the row that begins in line 3, unexpected end of data."),
        ('Hi,"say \\"Ho\\" now"\n', "cannot be read as .csv: in the row that begins in line 3, ',' expected after"),
    ]:
        path.write_text("prompt,completion\nHi,Ho\n" + rows)
        with pytest.raises(DataError, match=says):
            files(demonstrations=[{"path": str(path)}], on_bad_row="skip").demonstrations("train")
    path.write_text('prompt,"completion\nHi,Ho\n')
    with pytest.raises(DataError, match="a.csv cannot be read as .csv: unexpected end of data"):
        demonstration({"path": str(path)})
    path.write_text("prompt,completion,completion\nHi,Ho,No\n")
    with pytest.raises(DataError, match="its header has completion twice"):
        demonstration({"path": str(path)})
    path.write_bytes("prompt,completion\nHi,Ho\nCafé,Ho\n".encode("latin-1"))
    with pytest.raises(DataError, match="a.csv:3: bytes that are not UTF-8"):
        files(demonstrations=[{"path": str(path)}]).demonstrations("train")


def test_a_csv_row_with_a_comma_too_many_is_not_cut(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\nHi,Ho,\nHi, there,Ho\n")
    with pytest.raises(DataError, match="a.csv:3: more fields than the header has: 1 more."):
        files(demonstrations=[{"path": str(tmp_path / "a.csv")}]).demonstrations("train")


def test_truth_values_are_neither_ranks_nor_choices_and_large_numbers_are_scores(write):
    with pytest.raises(DataError, match=re.escape("'ranks' should be numbers, not [True, False].")):
        comparison(write({"prompt": "Hi", "completions": ["a", "b"], "ranks": [True, False]}))
    assert comparison(write(f'{{"prompt": "Hi", "completions": ["a", "b"], "scores": [1, {"1" * 400}]}}')).ranks == (1, 0)
    with pytest.raises(DataError, match="'choice' should be a whole number, not bool."):
        comparison(write({"info": {"article": "a"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": True}))
    with pytest.raises(DataError, match="'summaries' should hold groups with 'text'"):
        comparison(write({"info": {"article": "a"}, "summaries": ["a", "b"], "choice": 1}))


def test_bad_rows_can_be_skipped_and_are_counted_by_kind(write, capsys):
    source = write(GOOD, {"prompt": "Hi"}, {**GOOD, "completion": ""}, "{", {"prompt": "Ho"})
    source_of_skips = files(demonstrations=[source], on_bad_row="skip")
    for _ in range(2):
        assert source_of_skips.demonstrations("train") == (Demonstration(COLOUR, GREEN),)
    assert capsys.readouterr().out == (
        f"data.demonstrations[0]: 1 of 5 rows of {source['path']} can be used; left out: 2 with a missing column, "
        "1 with an empty text, 1 with a line that is not a JSON object.\n"
    )


def test_what_honest_data_has_is_left_out_and_counted(write, capsys):
    def hh(chosen, rejected, question="Hi"):
        return {"chosen": f"\n\nHuman: {question}{chosen}", "rejected": f"\n\nHuman: Hi{rejected}"}

    good = hh("\n\nAssistant: Hello", "\n\nAssistant: Go")
    rows = [
        good,
        hh("\n\nAssistant: Go", "\n\nAssistant: Go"),
        hh("\n\nAssistant: Hello", "\n\nAssistant: "),
        hh("\n\nAssistant: Hello", "\n\nAssistant: Go", question="Ho"),
        hh("\n\nAssistant: Hello\n\nHuman: Ho", "\n\nAssistant: Go"),
        hh("\n\nAssistant: Hello\n\nAssistant: Ho", "\n\nAssistant: Go"),
    ]
    assert comparison(write(*rows)) == Comparison(Prompt.of("Hi"), ("Hello", "Go"), (0, 1))
    out = capsys.readouterr().out
    assert "1 of 6 rows" in out
    for reason in (
        "1 ties",
        "1 transcripts with an empty turn",
        "1 pairs that differ before the last answer",
        "1 dialogues that do not end with the assistant",
        "1 dialogues whose last answer has nothing to answer",
    ):
        assert reason in out


def test_completions_that_all_rank_the_same_are_a_tie(write):
    tied = {**RANKED, "ranks": [1, 1, 1]}
    assert len(files(comparisons=[write(RANKED, tied)]).comparisons("train")) == 1


def test_unknown_columns_are_answered_with_the_known_ones(write):
    expected = (
        "no comparisons can be made from the columns better, worse. Columns that work: info + summaries + choice; "
        "prompt + chosen + rejected; chosen + rejected; instruction + completions; "
        "prompt + completions + ranks; prompt + completions + scores."
    )
    with pytest.raises(DataError, match=re.escape(expected)):
        files(comparisons=[write({"better": "a", "worse": "b"})]).comparisons("train")


def test_a_file_that_is_not_json_at_all_says_so(write):
    with pytest.raises(DataError, match="my.jsonl:1: a line that is not a JSON object: Expecting value"):
        files(texts=[write("hello", "world")]).texts("train")


LINES = '{"prompt": "Hi", "completion": "Ho"}\n'


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", "prompt,completion\nHi,Ho\n", "a.jsonl:1: a line that is not a JSON object: its first line is a header, "
         "as of .csv. Rename it to a.csv."),
        ("a.json", "prompt\tcompletion\nHi\tHo\n", "its first line is a header, as of .tsv. Rename it to a.tsv."),
        ("a.jsonl", "prompt;completion\nHi;Ho\n", "its first line is a header with semicolons. Save it as CSV with commas."),
        ("a.jsonl", f"[{LINES}]", "its first line begins with '[', as a JSON list does. Rename it to a.json."),
        ("a.JSONL", f"[\n{LINES}]", "its first line begins with '[', as a JSON list does. Rename it to a.json."),
        ("a.b.csv", LINES, "cannot be read as .csv: its first line begins with '{', as JSON lines do. Rename it to a.b.jsonl"),
        ("a.csv", '{"prompt":"Hi","completion":"Ho"}', "its first line begins with '{', as JSON lines do. Rename it to a.jsonl"),
        ("a.tsv", f"[{LINES}]", "its first line begins with '[', as a JSON list does. Rename it to a.json"),
        ("a.csv", "prompt;completion\nHi;Ho\n", "its first line is a header with semicolons. Save it as CSV with commas"),
        ("a.csv", '"my prompt"\tcompletion\nHi\tHo\n', "its first line is a header, as of .tsv. Rename it to a.tsv"),
        ("a.csv.gz", LINES, "its first line begins with '{', as JSON lines do. Rename it to a.jsonl.gz"),
    ],
)  # fmt: skip
def test_a_file_in_another_format_than_its_name_says_is_named_as_that(tmp_path, name, text, says):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    with pytest.raises(DataError, match=re.escape(says)):
        files(demonstrations=[{"path": str(path)}]).demonstrations("train")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "\ufeffprompt,completion\nHi,Ho\n"),
        ("a.csv", '"prompt","completion"\n"Hi","Ho"\n'),
        ("a.csv", "prompt,completion,more;less\nHi,Ho,\n"),
        ("a.json", LINES),
        ("a.jsonl", "\n" + LINES),
    ],
)
def test_a_file_that_is_what_its_name_says_is_read(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert files(demonstrations=[{"path": str(tmp_path / name)}]).demonstrations("train") == (
        Demonstration(Prompt.of("Hi"), "Ho"),
    )


def test_an_empty_file_is_named(write):
    with pytest.raises(DataError, match=r"my.jsonl has no rows in 'train': data.texts\[0\] needs at least one."):
        files(texts=[write()]).texts("train")


def test_a_source_without_one_usable_row_is_an_error(write):
    with pytest.raises(DataError, match=r"data.comparisons\[0\]: 0 of 1 rows of .* left out: 1 ties."):
        files(comparisons=[write({**PAIR, "rejected": "Green."})]).comparisons("train")


def test_a_missing_file_suggests_its_neighbour(write, tmp_path):
    write({"text": "a"}, name="pairs.jsonl")
    with pytest.raises(DataError, match="No file .*pears.jsonl. Did you mean 'pairs.jsonl'?.* there: pairs.jsonl."):
        files(texts=[{"path": str(tmp_path / "pears.jsonl")}]).texts("train")


def test_files_that_are_not_what_their_name_says_are_named(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    for name, content in (
        ("a.jsonl.gz", whole[: len(whole) // 2]),
        ("a.parquet", b"text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} cannot be read as "):
            files(texts=[{"path": str(tmp_path / name)}]).texts("train")
    (tmp_path / "a.docx").write_bytes(b"")
    with pytest.raises(DataError, match="a.docx has an unsupported format. Formats: .jsonl, "):
        files(texts=[{"path": str(tmp_path / "a.docx")}]).texts("train")


def test_a_file_has_no_test_split(write):
    with pytest.raises(DataError, match="is one file: its only split is 'train', not 'test'."):
        files(texts=[{**write({"text": "a"}), "split": "test"}]).texts("train")


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"texts": [{"split": "train"}]}, "Missing: data.texts[0].path."),
        ({"texts": [{"path": "a", "wieght": 1}]}, "Unknown key data.texts[0].wieght. Did you mean 'weight'?"),
        ({"texts": [{"path": "a", "split": "train[:10%]"}]}, "split 'train[:10%]' should look like train, test[:100]"),
        (
            {"texts": [{"path": "a", "split": f"train[:{10**19}]"}]},
            "test[:100] or train[500:1000]. A bound has at most 18 digits.",
        ),
        ({"texts": [{"path": "a", "split": f"train[{'9' * 5000}:]"}]}, "A bound has at most 18 digits."),
        ({"texts": [{"path": "a", "weight": 0}]}, "data.texts[0].weight=0.0 must be above 0, or null."),
        ({"texts": [{"path": "a", "weight": 1}, {"path": "b"}]}, "data.texts: give every source a weight, or none."),
        ({"heldout_texts": [{"path": "a", "weight": 1}]}, "data.heldout_texts has a weight, but every held-out row"),
        ({"heldout_fraction": 1.0}, "data.heldout_fraction=1.0 must be at least 0 and below 1."),
        ({"on_bad_row": "skipp"}, "data.on_bad_row='skipp' is not one of raise, skip. Did you mean 'skip'?"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_before_anything_is_read(keys, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        files(**keys)


@pytest.mark.parametrize("noun", ["demonstrations", "comparisons", "prompts", "texts", "goals"])
def test_a_noun_that_is_not_configured_says_which_key_to_set(noun):
    with pytest.raises(MissingData, match=re.escape(f"This run needs {noun}. Set data.{noun}='[{{path: my.jsonl}}]'.")):
        getattr(files(), noun)("train")


def test_a_split_that_does_not_exist_suggests_the_nearest(write):
    with pytest.raises(DataError, match="no split 'held-out' of texts. Did you mean 'heldout'?"):
        files(texts=[write({"text": "a"})]).texts("held-out")


# ------------------------------------------------------------------------------------------------------------ held out


def many(size=400, start=0):
    """Prompts of which each occurs twice, with two answers."""
    return [{"prompt": f"Question {start + i // 2}", "completion": f"Answer {i}"} for i in range(size)]


def beginnings(items):
    return {item.prompt.messages[0].content for item in items}


def test_train_and_heldout_share_no_prompt_and_lose_no_row(write):
    source = files(demonstrations=[write(*many())], heldout_fraction=0.25)
    train, heldout = source.demonstrations("train"), source.demonstrations("heldout")
    assert len(train) + len(heldout) == 400
    assert not beginnings(train) & beginnings(heldout)
    assert 50 < len(heldout) < 150  # 100 expected, standard deviation 12


def test_adding_and_sorting_rows_moves_no_other_row(write):
    first = files(demonstrations=[write(*many())], heldout_fraction=0.25).demonstrations("heldout")
    grown = many(300, start=1000) + many()[::-1]
    second = files(demonstrations=[write(*grown, name="grown.jsonl")], heldout_fraction=0.25).demonstrations("heldout")
    assert set(first) < set(second)
    assert beginnings(second) - beginnings(first) <= {f"Question {1000 + i}" for i in range(150)}


def test_a_larger_fraction_holds_out_what_a_smaller_one_does_and_another_seed_other_rows(write):
    source = write(*many())
    small, large, other = (
        set(files(demonstrations=[source], heldout_fraction=fraction, seed=seed).demonstrations("heldout"))
        for fraction, seed in ((0.1, 0), (0.3, 0), (0.1, 1))
    )
    assert small < large
    assert small != other


def test_a_prompt_is_on_the_same_side_as_every_noun_and_at_every_turn(write):
    later = [
        {
            "chosen": dialogue(f"Question {i}", "Well,", "And?", "a"),
            "rejected": dialogue(f"Question {i}", "Well,", "And?", "b"),
        }
        for i in range(200)
    ]
    source = files(
        demonstrations=[write(*many())],
        comparisons=[write(*later, name="later.jsonl")],
        prompts=[write(*many())],
        heldout_fraction=0.25,
    )
    heldout = beginnings(source.demonstrations("heldout"))
    assert beginnings(source.comparisons("heldout")) == heldout
    assert {p.messages[0].content for p in source.prompts("heldout")} == heldout


def test_training_rows_that_begin_as_heldout_ones_are_left_out(write, capsys):
    train, test = write(*many(20)), write(*many(10), name="test.jsonl")
    source = files(demonstrations=[train], heldout_demonstrations=[test])
    assert beginnings(source.demonstrations("train")) == {f"Question {i}" for i in range(5, 10)}
    assert len(source.demonstrations("heldout")) == 10
    assert "data.demonstrations: 10 training rows were left out because they begin like held-out ones." in capsys.readouterr().out


def test_a_source_without_rows_has_no_share():
    assert mix([[1, 2], []], [1, 3]) == (1, 2) and mix([[], []], [1, 1]) == () and mix([[1], [], [2]], [2, 1, 1]) == (1, 2, 1)


def test_what_one_kind_of_data_holds_out_no_other_kind_trains_on(write, capsys):
    train, test = many(20), many(10)
    pairs = [{"prompt": row["prompt"], "chosen": "yes", "rejected": "no"} for row in test]
    source = files(
        demonstrations=[write(*train)],
        prompts=[write(*train)],
        comparisons=[write(*pairs[5:], name="pairs.jsonl")],
        heldout_comparisons=[write(*pairs[:5], name="test.jsonl")],
        heldout_fraction=0.25,
    )
    held = beginnings(source.comparisons("heldout"))
    assert held and not held & beginnings(source.demonstrations("train"))
    assert not held & {p.messages[0].content for p in source.prompts("train")}
    assert "rows were left out because they begin like rows of data.heldout_comparisons" in capsys.readouterr().out


def test_what_a_fraction_of_prompts_holds_out_a_kind_with_its_own_held_out_rows_does_not_train_on(write, capsys):
    train = [{"prompt": row["prompt"], "chosen": "yes", "rejected": "no"} for row in many(200)]
    source = files(
        prompts=[write(*train)],
        comparisons=[write(*train)],
        heldout_comparisons=[write({"prompt": "Another", "chosen": "yes", "rejected": "no"}, name="test.jsonl")],
        heldout_fraction=0.25,
    )
    held = {p.messages[0].content for p in source.prompts("heldout")}
    assert len(held) > 10 and not held & beginnings(source.comparisons("train"))
    assert len(source.comparisons("heldout")) == 1
    assert "because data.heldout_fraction holds them out of data.prompts." in capsys.readouterr().out


def test_the_names_of_a_folders_files_are_part_of_what_the_data_are(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("train-1.jsonl", "train-2.jsonl"):
        (tmp_path / "mine" / name).write_text('{"text": "a"}\n')
    config = parse(Files.Config, {"texts": [{"path": str(tmp_path / "mine")}]}, "data")
    before = Files.fingerprint(config)
    (tmp_path / "mine" / "train-1.jsonl").rename(tmp_path / "mine" / "train-1.jsonl.off")
    assert Files.fingerprint(config) != before


def test_heldout_sources_do_without_training_ones(write):
    source = files(heldout_texts=[write({"text": "a"})])
    assert source.texts("heldout") == ("a",)
    with pytest.raises(MissingData, match="Set data.texts="):
        source.texts("train")


def test_nothing_held_out_says_how_to_hold_out(write):
    with pytest.raises(
        MissingData, match=re.escape("Set data.heldout_fraction=0.05 or data.heldout_texts='[{path: test.jsonl}]'.")
    ):
        files(texts=[write({"text": "a"})]).texts("heldout")


def test_a_split_that_is_left_empty_is_an_error(write):
    with pytest.raises(DataError, match="The heldout split of data.texts is empty: all rows are in the other one."):
        files(texts=[write({"text": "a"})], heldout_fraction=0.0001).texts("heldout")


# -------------------------------------------------------------------------------------------------------------- mixing


def test_weights_hold_in_every_stretch():
    weights = (1, 5, 2)
    mixture = mix(["a" * 70, "b" * 100, "c" * 90], weights)
    for start, length in itertools.product(range(0, len(mixture) - 80, 7), (8, 40, 80)):
        stretch = mixture[start : start + length]
        for name, weight in zip("abc", weights, strict=True):
            assert abs(stretch.count(name) - length * weight / 8) <= 3


def test_an_epoch_ends_when_every_row_was_there():
    parts = [[f"a{i}" for i in range(10)], [f"b{i}" for i in range(40)]]
    times = collections.Counter(mix(parts, (1, 1)))
    assert {times[row] for row in parts[0]} == {4}
    assert {times[row] for row in parts[1]} == {1}


def test_without_weights_every_row_is_there_once_and_sources_are_interleaved():
    mixture = mix([[("a", i) for i in range(10)], [("b", i) for i in range(30)], []])
    assert len(set(mixture)) == len(mixture) == 40
    assert [sum(row[0] == "a" for row in mixture[i : i + 8]) for i in range(0, 40, 8)] == [2] * 5


def test_one_source_keeps_its_order():
    assert mix([np.arange(5).tolist()]) == (0, 1, 2, 3, 4)
    assert mix([list("xyz")], [7]) == ("x", "y", "z")


def test_the_source_mixes_and_says_how_often_rows_return(write, capsys):
    few = {**write(*({"text": f"few {i}"} for i in range(10)), name="few.jsonl"), "weight": 3}
    more = {**write(*({"text": f"more {i}"} for i in range(20)), name="more.jsonl"), "weight": 1}
    texts = files(texts=[few, more]).texts("train")
    assert collections.Counter(text.split()[0] for text in texts) == {"few": 60, "more": 20}
    said = f"data.texts: one epoch is 80 rows, going through {few['path']} 6.0 times, {more['path']} 1.0 times.\n"
    assert capsys.readouterr().out == said


def test_heldout_rows_are_there_once_whatever_the_weights(write):
    few = {**write(*({"text": f"few {i}"} for i in range(50)), name="few.jsonl"), "weight": 3}
    more = {**write(*({"text": f"more {i}"} for i in range(50)), name="more.jsonl"), "weight": 1}
    heldout = files(texts=[few, more], heldout_fraction=0.3).texts("heldout")
    assert len(set(heldout)) == len(heldout)


# ------------------------------------------------------------------------------------------------------------ laziness


def test_a_file_is_read_when_asked_for_and_once(write):
    source = write({"text": "a"})
    lazy = files(texts=[source], prompts=[{"path": "nowhere.jsonl"}])
    assert lazy.texts("train") == ("a",)
    Path(source["path"]).unlink()
    assert lazy.texts("train") is lazy.texts("train")


def test_importing_the_source_imports_no_array_library_and_no_datasets():
    code = "import sys, lockstep.data.files; print([m for m in ('torch', 'jax', 'datasets', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
