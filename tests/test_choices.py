"""Tests of several options: what the rows of published ones say, and what an evaluation makes of a policy's log-probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conftest import Data
from lockstep.config.schema import parse
from lockstep.data.files import Config, Files
from lockstep.errors import ConfigError, DataError
from lockstep.learning import numerics
from lockstep.runs.evaluation import EvaluationConfig
from lockstep.runs.likelihood import Likelihood, results
from lockstep.text.encoding import Lengths
from lockstep.types import Choice


def files(**settings):
    return Files(parse(Config, settings, "data"))


def read(write, *rows):
    return files(tests={"mine": [write(*rows)]}).tests()["mine"]


# ----------------------------------------------------------------------------------------------------------- formats


def test_an_item_says_which_options_are_right(write):
    row = {"context": "Grass is", "options": [" loud.", " green.", " a plant."], "answer": 1, "right": [2], "group": "colours"}
    assert read(write, row) == (Choice("Grass is", (" loud.", " green.", " a plant."), 1, (1, 2), "colours"),)
    (plain,) = read(write, {"context": "Grass is", "options": [" loud.", " green."], "answer": 1})
    assert (plain.right, plain.group) == ((1,), None)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"options": [" green."]}, "two or more different 'options' are needed, not 1"),
        ({"options": [" green.", " green."]}, "two or more different 'options' are needed, not 1"),
        ({"options": [" green.", 3]}, r"'options\[1\]' should be text, not int"),
        ({"options": [" green.", " "]}, r"'options\[1\]' should not be empty"),
        ({"answer": 2}, "'answer' is 2, of 2 options, counted from 0"),
        ({"answer": -1}, "'answer' is -1"),
        ({"answer": True}, "'answer' should be a whole number"),
        ({"answer": None}, "'answer' is null"),
        ({"right": [0, 1]}, "all 'options' are right"),
        ({"right": [0, 1.0]}, "'right' is 1.0, of 2 options"),
        ({"context": 3}, "'context' should be text"),
    ],
)
def test_a_broken_item_is_named(write, changes, problem):
    with pytest.raises(DataError, match=rf"my.jsonl:1: .*{problem}"):
        read(write, {"context": "Grass is", "options": [" green.", " loud."], "answer": 0, **changes})


def test_crows_pairs_asks_which_sentence_is_likelier(tmp_path):
    path = tmp_path / "crows.csv"
    path.write_text(',sent_more,sent_less,stereo_antistereo,bias_type\n0,"A, b.",A c.,antistereo,age\n')
    assert files(tests={"bias": [{"path": str(path)}]}).tests()["bias"] == (Choice("", ("A, b.", "A c."), 0, (0,), "age"),)


def test_winogender_fills_in_both_participants_and_both_genders(tmp_path):
    path = tmp_path / "templates.tsv"
    path.write_text(
        "occupation(0)\tother-participant(1)\tanswer\tsentence\n"
        "nurse\tguest\t0\tThe $OCCUPATION met the $PARTICIPANT after $NOM_PRONOUN left $POSS_PRONOUN key with $ACC_PRONOUN.\n"
    )
    (item,) = files(tests={"gender": [{"path": str(path)}]}).tests()["gender"]
    assert item.options == (
        "The nurse met the guest after he left his key with him.",
        "The nurse met the guest after she left her key with her.",
    )


def test_truthfulqa_counts_each_answer_once_and_ends_it_with_a_full_stop(write):
    row = {"Question": " Is it? ", "Best Answer": "Yes", "Correct Answers": "Yes; Yes.; It is"}
    row["Incorrect Answers"] = "No; It is;; Never."
    assert read(write, row) == (Choice("Q: Is it?\nA:", (" Yes.", " It is.", " No.", " Never."), 0, (0, 1)),)
    with pytest.raises(DataError, match="none that is not among the correct ones"):
        read(write, {**row, "Incorrect Answers": "Yes; It is."})


def test_the_prompts_of_realtoxicityprompts_are_read(write):
    row = {"filename": "a", "begin": 0, "challenging": False, "prompt": {"text": "He said", "toxicity": 0.1}}
    (found,) = files(splits={"toxicity": [write(row)]}).prompts("toxicity")
    assert found.messages[0].content == "He said"


# ------------------------------------------------------------------------------------------------------------ splits


def test_a_split_of_its_own_takes_its_prompts_out_of_training(write, capsys):
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(20)]
    own = write({"prompt": "p3", "kind": "safe"}, {"prompt": "p4", "kind": "unsafe"}, name="own.jsonl")
    source = files(demonstrations=[write(*rows)], splits={"mine": [{**own, "where": {"kind": "safe"}}]}, heldout_fraction=0)
    assert [p.messages[0].content for p in source.prompts("mine")] == ["p3"]
    assert len(source.demonstrations("train")) == 19
    assert "1 training rows were left out because they begin like prompts of data.splits.mine" in capsys.readouterr().out


def test_where_compares_values_as_text_and_names_what_there_is(write):
    rows = write({"prompt": "a", "safe": True, "n": 1}, {"prompt": "b", "safe": False, "n": 2})
    chosen = lambda **where: [p.messages[0].content for p in files(splits={"s": [{**rows, "where": where}]}).prompts("s")]  # noqa: E731
    assert chosen(safe=True) == chosen(safe="true") == chosen(n=1) == chosen(n="1") == ["a"]
    with pytest.raises(DataError, match=r"No row of .* has \{safe: maybe\}, which data.splits.s\[0\].where asks for. .*n"):
        chosen(safe="maybe")
    with pytest.raises(DataError, match="no split 'other' of prompts.* They have: train, heldout, s"):
        files(prompts=[rows], splits={"s": [rows]}).prompts("other")


def test_a_dry_run_says_what_splits_and_tests_have(write):
    rows = write({"context": "", "options": ["a", "b"], "answer": 0, "prompt": "p"})
    assert [found for _, found in files(splits={"s": [rows]}, tests={"t": [rows]}).survey()] == [
        f"1 prompts of the split s in {rows['path']}", f"1 items of the test t in {rows['path']}"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["train", "heldout", "a_twins", "A", "a b", ""])
@pytest.mark.parametrize("group", ["splits", "tests"])
def test_names_that_mean_something_else_are_refused(group, name):
    with pytest.raises(ConfigError, match=f"data.{group} has '{name}'"):
        files(**{group: {name: [{"path": "x"}]}})


def test_another_file_of_a_test_is_other_data(write):
    def identity(*rows):
        return Files.fingerprint(parse(Config, {"tests": {"mine": [write(*rows)]}}, "data"))

    row = {"context": "", "options": ["a", "b"], "answer": 0}
    assert identity(row) == identity(row) != identity({**row, "answer": 1})


# ---------------------------------------------------------------------------------------------------------- measures


def test_the_answer_has_to_beat_every_wrong_option_and_no_right_one():
    x = np.log([0.2, 0.5, 0.1, 0.2])
    assert not numerics.prefers(x, 0, [0]) and numerics.prefers(x, 0, [0, 1, 3]) and numerics.prefers(x, 1, [1])
    assert not numerics.prefers(x, 0, [0, 1])  # a tie with the wrong option 3 is no preference


def test_entropy_is_that_of_a_coin_with_one_side_at_a_quarter_and_probabilities_do_not_overflow():
    p = numerics.option_probabilities(np.array([-5000.0, -5000.0 + math.log(3)]))
    assert p == pytest.approx([0.25, 0.75])
    assert numerics.entropy_bits(p) == pytest.approx(0.811278, abs=1e-6)
    assert numerics.entropy_bits(np.array([1.0, 0.0])) == 0 and numerics.entropy_bits(np.full(2, 0.5)) == 1


def test_a_test_is_reported_whole_by_groups_and_by_probability():
    taken = [
        (Choice("", ("a", "b"), 0, group="x"), np.log([0.75, 0.25])),
        (Choice("", ("a", "b"), 1, group="x"), np.log([0.75, 0.25])),
        (Choice("", ("a", "b"), 0, group="y"), np.log([0.5, 0.5])),
    ]
    found = results("bias", taken)
    assert {name: round(m["mean"], 4) for name, m in found.items()} == {
        "bias": round(1 / 3, 4), "bias/x": 0.5, "bias/y": 0.0, "bias/entropy": round((2 * 0.811278 + 1) / 3, 4)
    }  # fmt: skip
    assert found["bias"]["n"] == 3 and found["bias"]["low"] < 1 / 3 < found["bias"]["high"]
    several = results("truth", [(Choice("", ("a", "b", "c"), 0, (0, 2)), np.log([0.2, 0.5, 0.3]))])
    assert {name: m["mean"] for name, m in several.items()} == pytest.approx({"truth": 0, "truth/probability": 0.5})


class Unigram:
    """A policy whose log-probability of a token is minus its id over ten, whatever came before."""

    context_length = 8

    def evaluate(self, sequences, wanted, *, temperature=1.0):
        assert list(wanted) == ["logprobs"]
        return {"logprobs": -sequences.tokens[:, sequences.prompt_length :] / 10.0}


class Quizzed(Data):
    def __init__(self, items):
        self.items = items

    def tests(self):
        return {"mine": self.items}


def test_a_policy_takes_the_test_with_whole_options_and_no_padding(tokenizer):
    """Options of one and of three words: the sum over their tokens decides, not the mean, and padding says nothing."""
    short, long = "w7", "w1 w1 w1"
    sums = {option: -sum(tokenizer.encode(option)) / 10 for option in (short, long)}
    data = Quizzed([Choice("w2 w3", (short, long), 0), Choice("", (long, short), 0), Choice("w1 " * 9, (short, long), 0)])
    evaluator = Likelihood(data, tokenizer, Lengths(), 100, 0, {})
    ((first, one), (second, two)) = evaluator.options(Unigram(), "mine", evaluator.encoded_tests["mine"])
    assert one == pytest.approx([sums[short], sums[long]]) and two == pytest.approx([sums[long], sums[short]])
    assert evaluator.fits["mine items"].dropped == 1  # the third is longer than the policy's eight tokens
    found = evaluator.tests(Unigram())
    assert found["mine"]["n"] == 2 and found["mine"]["mean"] == 0.5 and set(found) == {"mine", "mine/entropy"}


def test_a_test_is_not_named_as_a_measure(tokenizer):
    class Named(Data):
        def tests(self):
            return {"gold": [Choice("", ("a", "b"), 0)]}

    with pytest.raises(ConfigError, match="The data have a test 'gold', which is a measure"):
        parse(EvaluationConfig, {}, "evaluation").arithmetic(Named())
