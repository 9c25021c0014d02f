"""Sources of reward: Python functions and learned models."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import tokenizers

from conftest import WORDS, Data, head, made_by_a_stage
from lockstep.commands.run.dry_run import dry_run
from lockstep.config.compose import compose
from lockstep.config.schema import parse
from lockstep.errors import ConfigError, MissingData, RewardError
from lockstep.interfaces import Responses
from lockstep.reporting.console import Console
from lockstep.runs.experiment import Experiment
from lockstep.runs.reward_model_accuracy import measure_reward_model
from lockstep.text.encoding import Lengths
from lockstep.text.sequences import pack
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Comparison, Message, Prompt
from lockstep_rlhf.reward_models.function import Function
from runs import PPO_ONLY, tiny

# ------------------------------------------------------------------------------------------------------ reward functions


@pytest.fixture
def function(monkeypatch):
    """function(f, **settings): the reward model around a Python function that is called up to three times."""

    def build(f, **settings):
        monkeypatch.setitem(sys.modules, "my_rewards", SimpleNamespace(score=f))
        settings = {"timeout_seconds": 5.0, "retries": 2, "on_failure": "raise"} | settings
        return Function(Function.Config(function="my_rewards:score", **settings), None)

    return build


RESPONSES = Responses([Prompt.of("w1"), Prompt.of("w2")], ["a", "bb"], None, None)


def test_a_function_gets_dialogues_and_texts_and_gives_float32(function):
    seen = []
    scores = function(lambda p, r: seen.append((p, r)) or [0.73, 2]).score(RESPONSES)
    assert seen == [([[{"role": "user", "content": "w1"}], [{"role": "user", "content": "w2"}]], ["a", "bb"])]
    assert scores.dtype == np.float32 and scores.tolist() == [pytest.approx(0.73), 2]


@pytest.mark.parametrize("failures", [1, 2])
def test_a_function_that_fails_is_tried_again(function, failures, caplog):
    calls = []

    def flaky(prompts, responses):
        calls.append(1)
        if len(calls) <= failures:
            raise ConnectionError("busy")
        return [1, 2]

    assert function(flaky).score(RESPONSES).tolist() == [1, 2]
    assert len(calls) == failures + 1 and "ConnectionError('busy')" in caplog.text
    assert re.findall(r"attempt \d", caplog.text) == [f"attempt {i + 1}" for i in range(failures)]


def test_a_function_that_keeps_failing_stops_the_run_with_its_reason(function):
    calls = []
    with pytest.raises(RewardError, match=r"test_reward_models.py:\d+: ZeroDivisionError\('division by zero'\)"):
        function(lambda p, r: calls.append(1) or 1 / 0).score(RESPONSES)
    assert len(calls) == 3


def test_a_function_that_keeps_failing_can_drop_its_episodes_but_never_scores_zero(function):
    assert np.isnan(function(lambda p, r: 1 / 0, on_failure="drop").score(RESPONSES)).all()


def test_a_function_that_does_not_answer_in_time_has_failed(function):
    done = threading.Event()
    with pytest.raises(RewardError, match="no answer within reward_model.timeout_seconds=0.05"):
        function(lambda p, r: done.wait(), timeout_seconds=0.05, retries=1).score(RESPONSES)
    done.set()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1], "it gave 1 scores for 2 responses; one number each is needed"),
        ([1, 2, 3], "it gave 3 scores for 2 responses"),
        (3.0, "it gave 3.0; a list of numbers is needed, one for each response"),
        ("12", "it gave '12'; a list of numbers is needed"),
        (b"12", "it gave b'12'; a list of numbers is needed"),
        (None, "it gave None; a list of numbers is needed"),
        ({"a": 1, "b": 2}, "it gave {'a': 1, 'b': 2}; a list of numbers is needed"),
        ({1, 2}, "it gave {1, 2}; a list of numbers is needed"),
        ((x for x in (1, 2)), "it gave <generator .*>; a list of numbers is needed"),
        (["a", "b"], "it gave the score 'a', which is not a number"),
        (["1", "2"], "it gave the score '1', which is not a number"),
        ([True, False], "it gave the score True, which is not a number; say 1.0 or 0.0 instead"),
        (np.array([True, False]), "it gave the score True, which is not a number"),
        (np.array([1 + 0j, 2]), r"it gave the score \(1\+0j\), which is not a number"),
        (np.zeros((2, 1)), r"it gave the score \[0.0\], which is not a number"),
        ([[1], [2]], r"it gave the score \[1\], which is not a number"),
        ([10**400, 1], "it gave a score that is too large"),
        ("x" * 10**6, r"it gave 'xx+\.\.\.xx+'; a list"),
    ],
)
def test_an_answer_of_the_wrong_shape_or_kind_is_a_failure(function, answer, message):
    with pytest.raises(RewardError, match=message):
        function(lambda p, r: answer).score(RESPONSES)


@pytest.mark.parametrize(
    "answer",
    [
        (1, 2), range(1, 3), np.array([1, 2], np.float16), [np.float32(1), np.int64(2)], [Fraction(1), 2],
        pandas.Series([1.0, 2.0]), np.array([1, 2], object),
    ],
    ids=lambda answer: type(answer).__name__,
)  # fmt: skip
def test_numbers_count_in_whatever_list_they_come(function, answer):
    assert function(lambda p, r: answer).score(RESPONSES).tolist() == [1, 2]


def test_tensors_with_a_gradient_count_as_their_values(function):
    torch = pytest.importorskip("torch")
    for tensor in (torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1.0, 2.0], dtype=torch.bfloat16)):
        assert function(lambda p, r, t=tensor: t).score(RESPONSES).tolist() == [1, 2]
        assert function(lambda p, r, t=tensor: list(t)).score(RESPONSES).tolist() == [1, 2]


def test_a_function_that_empties_its_lists_changes_no_others(function):
    calls = []

    def greedy(prompts, responses):
        calls.append((len(prompts), len(responses), prompts[0][0]["content"]))
        prompts[0][0]["content"] = "changed"
        prompts.clear()
        scores = [1.0 for _ in iter(responses.pop, "a")]
        return [0.5, *scores] if len(calls) > 1 else []

    assert function(greedy).score(RESPONSES).tolist() == [0.5, 1]
    assert calls == [(2, 2, "w1")] * 2 and RESPONSES.texts == ["a", "bb"] and RESPONSES.prompts[0] == Prompt.of("w1")


@pytest.mark.parametrize("error", [SystemExit(3), SystemExit, GeneratorExit, KeyError, "quiet", "loud"], ids=repr)
def test_a_function_that_exits_or_cannot_say_what_is_wrong_has_failed_at_once(function, error):
    class Quiet(Exception):
        def __repr__(self):
            raise ValueError("no words")

        __str__ = __repr__

    error = {"quiet": Quiet(), "loud": ValueError("x" * 10**7)}.get(error, error)

    def fail(prompts, responses):
        raise error

    with pytest.raises(RewardError, match="py:[0-9]+: (SystemExit|GeneratorExit|KeyError|<Quiet instance|ValueError)") as caught:
        function(fail).score(RESPONSES)
    assert len(str(caught.value)) < 300
    assert np.isnan(function(fail, on_failure="drop").score(RESPONSES)).all()


def test_an_answer_that_cannot_be_read_is_a_failure(function):
    class Odd(list):
        def __repr__(self):
            raise ValueError("no words")

        __len__ = __repr__

    with pytest.raises(RewardError, match=r"test_reward_models.py:\d+: ValueError"):
        function(lambda p, r: Odd()).score(RESPONSES)


def test_a_call_that_is_out_of_time_is_never_joined_by_a_second_one(function):
    running, most = [], []

    def slow(prompts, responses):
        running.append(1)
        most.append(len(running))
        time.sleep(0.15)
        running.pop()
        return [1, 2]

    model = function(slow, timeout_seconds=0.05, retries=5)
    with pytest.raises(RewardError, match="no answer within reward_model.timeout_seconds=0.05"):
        model.score(RESPONSES)
    assert max(most) == 1 and len(most) < 6


@pytest.mark.parametrize("key", ["timeout_seconds", "retries"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 1e300, 10**30])
def test_times_and_retries_that_cannot_be_meant_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"reward_model.{key}="):
        parse(Function.Config, {"function": "math:sqrt", key: value}, "reward_model")


@pytest.mark.parametrize("hole", [None, float("nan"), float("inf"), float("-inf")])
def test_a_single_score_that_is_not_a_number_stops_the_run_or_drops_its_episode(function, hole):
    with pytest.raises(RewardError, match=r"for the response 'bb'. Return a finite number, or set reward_model.on_failure=drop"):
        function(lambda p, r: [0.5, hole]).score(RESPONSES)
    scores = function(lambda p, r: [0.5, hole], on_failure="drop").score(RESPONSES)
    assert scores[0] == 0.5 and np.isnan(scores[1])


def test_a_function_that_exits_on_import_or_is_none_says_how_to_write_it(tmp_path, monkeypatch):
    (tmp_path / "exits_on_import.py").write_text("import sys\nsys.exit()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="'exits_on_import:score' cannot be imported: .*exits_on_import.py:2: SystemExit"):
        Function(parse(Function.Config, {"function": "exits_on_import:score"}, "reward_model"), None)
    with pytest.raises(ConfigError, match="'math:pi' is no function: 3.14"):
        Function(parse(Function.Config, {"function": "math:pi"}, "reward_model"), None)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:score", r"ModuleNotFoundError\(.*\)\.$"),
        ("reward_functions:shortnes", r"reward_functions has no attribute 'shortnes'. Did you mean 'shortness'\? Its functions: "
         r"constant, misspelt, shortness, sometimes\.$"),
        ("math", r".*Write it as module:function\.$"),
        ("math:", r".*Write it as module:function\.$"),
    ],
)  # fmt: skip
def test_a_function_that_cannot_be_imported_says_what_exists_and_how_to_write_it(path, message):
    with pytest.raises(ConfigError, match=f"'{path}' cannot be imported: {message}"):
        Function(Function.Config(function=path, timeout_seconds=1.0, retries=0, on_failure="raise"), None)


def test_a_function_that_never_returns_does_not_keep_the_process_alive(tmp_path):
    (tmp_path / "hanging.py").write_text("import time\ndef score(prompts, responses):\n    time.sleep(600)\n")
    code = (
        "from lockstep.errors import RewardError\n"
        "from lockstep.interfaces import Responses\n"
        "from lockstep_rlhf.reward_models.function import Function\n"
        "config = Function.Config(function='hanging:score', timeout_seconds=0.05, retries=0, on_failure='raise')\n"
        "try: Function(config, None).score(Responses([], ['a'], None, None))\n"
        "except RewardError: print('given up')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "given up\n"
        process.wait(timeout=60)
    finally:
        process.kill()


# ------------------------------------------------------------------------------------------------- columns of the data

KNOWN = Responses([Prompt.of("w1", answer="a", tests=[1]), Prompt.of("w2", answer="b")], ["a", "bb"], None, None)


def test_a_function_gets_the_columns_that_it_has_parameters_for(function):
    assert function(lambda p, r, answer: [x == y and 1.0 or 0.0 for x, y in zip(r, answer, strict=True)]).score(KNOWN)[0] == 1
    seen = []
    function(lambda p, r, *, tests, other="default": seen.append((tests, other)) or [1, 2]).score(KNOWN)
    function(lambda p, r, **columns: seen.append(columns) or [1, 2]).score(KNOWN)
    function(lambda prompts, responses, **columns: seen.append(columns) or [1, 2]).score(RESPONSES)
    function(lambda *given, **columns: seen.append(sorted(columns)) or [1, 2]).score(KNOWN)
    assert seen == [([[1], None], "default"), {"answer": ["a", "b"], "tests": [[1], None]}, {}, ["answer", "tests"]]


def test_a_function_of_two_parameters_is_called_with_two_whatever_else_is_known(function):
    assert function(lambda p, r: [1, 2]).score(KNOWN).tolist() == [1, 2]
    assert function(lambda *given: [len(given), 2]).score(KNOWN).tolist() == [2, 2]


def test_a_column_named_like_the_first_parameters_is_not_passed_twice(function):
    odd = Responses([Prompt.of("w1", responses="x", answer="a")], ["a"], None, None)
    seen = []
    assert function(lambda prompts, responses, **rest: seen.append((responses, rest)) or [1]).score(odd).tolist() == [1]
    assert seen == [(["a"], {"answer": ["a"]})]


@pytest.mark.parametrize("on_failure", ["raise", "drop"])
def test_a_parameter_without_a_column_is_one_error_that_lists_those_there_are(function, on_failure):
    calls = []
    model = function(lambda p, r, anwser: calls.append(1), on_failure=on_failure)
    with pytest.raises(RewardError) as caught:
        model.score(KNOWN)
    assert str(caught.value) == (
        "The reward function's parameter 'anwser' has no default, so it needs the column 'anwser', which no prompt has. Did you "
        "mean 'answer'? Columns there: answer, tests. Name it in its source: "
        "data.prompts='[{path: my.jsonl, columns: [anwser]}]'."
    )
    assert calls == []


def test_a_function_that_changes_its_columns_changes_no_others(function):
    model = function(lambda p, r, tests: [float(len(tests.pop(0)) + len(tests)), tests.clear() or 2])
    for _ in range(2):
        assert model.score(KNOWN).tolist() == [2, 2]
    assert KNOWN.prompts[0].truth == {"answer": "a", "tests": [1]}


# ------------------------------------------------------------------------------------------------------------ rehearsal


class OnePrompt(Data):
    def prompts(self, split):
        return [Prompt.of("w1", answer="a")]


class NoPrompts(Data):
    def prompts(self, split):
        raise MissingData("none")


def rehearse(monkeypatch, f, data=None):
    monkeypatch.setitem(sys.modules, "my_rewards", SimpleNamespace(score=f))
    Function.rehearse(parse(Function.Config, {"function": "my_rewards:score", "retries": 0}, "reward_model"), data or OnePrompt())


def test_a_rehearsal_calls_the_function_once_on_two_responses_to_the_first_prompt(monkeypatch):
    seen = []
    rehearse(monkeypatch, lambda p, r, answer: seen.append((p, r, answer)) or [None, 1.0])
    ((prompts, texts, answer),) = seen
    assert prompts == [[{"role": "user", "content": "w1"}]] * 2 and answer == ["a", "a"]
    assert texts[0] == OnePrompt().demonstrations("train")[0].response != texts[1]
    rehearse(monkeypatch, lambda p, r: 1 / 0, NoPrompts())  # nothing to try it on


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda p, r, anwser: [1.0], "parameter 'anwser' has no default"),
        (lambda p, r: 1 / 0, r"reward function my_rewards:score, tried on the first prompt: .*py:\d+: ZeroDivisionError"),
        (lambda p, r: [True, False], "tried on the first prompt: it gave the score True, which is not a number"),
        (lambda p, r: [1.0], "tried on the first prompt: it gave 1 scores for 2 responses"),
        (
            lambda p, r: [math.nan, math.inf],
            "on the first prompt, scored nan and inf for two responses. Return finite numbers, or",
        ),
    ],
    ids=["misspelt", "crash", "no number", "too few", "not finite"],
)
def test_a_rehearsal_finds_what_would_fail_after_hours(monkeypatch, f, message):
    with pytest.raises(RewardError, match=message):
        rehearse(monkeypatch, f)


def test_an_error_names_the_line_of_ones_own_code_that_raised_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("line_by_line.py").write_text("import json\n\n\ndef score(prompts, responses):\n    return json.loads('no JSON')\n")
    Path("no_syntax.py").write_text("\ndef score(\n")
    Path("fails_late.py").write_text("import line_by_line\n\nline_by_line.score([], [])\n")
    failed = r"^reward function line_by_line:score: line_by_line.py:5: JSONDecodeError\('Expecting value"
    with pytest.raises(RewardError, match=failed):
        Function(parse(Function.Config, {"function": "line_by_line:score"}, "reward_model"), None).score(RESPONSES)
    for module, line in (("fails_late", r"line_by_line.py:5: JSONDecodeError"), ("no_syntax", r"no_syntax.py:2: SyntaxError")):
        with pytest.raises(ConfigError, match=f"'{module}:score' cannot be imported: {line}"):
            Function(parse(Function.Config, {"function": f"{module}:score"}, "reward_model"), None)


def test_a_rehearsal_tries_again_only_what_was_out_of_time(monkeypatch, caplog):
    calls = []
    config = {"function": "my_rewards:score", "retries": 2, "timeout_seconds": 0.2}

    def first(error):
        def score(prompts, responses):
            calls.append(1)
            if len(calls) == 1:
                error()
            return [1.0, 2.0]

        calls.clear()
        monkeypatch.setitem(sys.modules, "my_rewards", SimpleNamespace(score=score))
        Function.rehearse(parse(Function.Config, config, "reward_model"), OnePrompt())

    with pytest.raises(RewardError, match="ZeroDivisionError"):
        first(lambda: 1 / 0)
    assert len(calls) == 1 and not caplog.text
    first(lambda: time.sleep(0.3))
    assert len(calls) == 2 and "attempt 1: no answer within" in caplog.text


@pytest.mark.parametrize("members", [False, True])
def test_a_dry_run_rehearses_reward_models_and_their_members(monkeypatch, capsys, members):
    monkeypatch.setitem(sys.modules, "my_rewards", SimpleNamespace(score=lambda p, r, anwser: [1.0]))
    group = {"name": "function", "function": "my_rewards:score"}
    config = compose(["experiment=demo", "~stages.reward", "tracker=none"])
    config["reward_model"] = {"name": "ensemble", "members": [group, group]} if members else group
    for stage in config["stages"].values():
        stage |= {"reward_model": config["reward_model"]} if stage.get("reward_model") else {}
    with pytest.raises(RewardError, match="Columns there: answer, category, family, "):
        dry_run(Experiment(config), Console())


def test_a_run_rehearses_before_its_first_stage(tmp_path):
    with pytest.raises(RewardError, match="needs the column 'anwser'.* Did you mean 'answer'"):
        tiny(tmp_path, "reward_model=function", "reward_model.function=reward_functions:misspelt", "~stages.reward", *PPO_ONLY)
    assert not list(tmp_path.glob("stages/*"))


class Compared(OnePrompt):
    def __init__(self, *comparisons):
        self.found = [Comparison(prompt, ("w4", "w5"), (0, 1)) for prompt in comparisons]

    def comparisons(self, split):
        assert split == "heldout"
        return self.found


def evaluation(monkeypatch, f, *overrides):
    """An evaluation with the reward function, and a judge that needs a column of prompts."""
    monkeypatch.setitem(sys.modules, "my_rewards", SimpleNamespace(score=f, judge=lambda p, r, answer: [1.0] * len(r)))
    judges = "+evaluation.judges={second: {name: function, function: my_rewards:judge}}"
    given = ["experiment=demo", "~stages.reward", "reward_model=function", "reward_model.function=my_rewards:score", judges]
    return Experiment(compose([*given, *overrides])).stages["evaluate"]


def test_a_rehearsal_tries_the_held_out_comparisons_that_an_evaluation_scores(monkeypatch):
    lacking, known = Compared(Prompt.of("w2")), Compared(Prompt.of("w2"), Prompt.of("w3", answer="b"))
    needs = lambda p, r, answer: [1.0] * len(r)  # noqa: E731
    with pytest.raises(RewardError) as caught:
        evaluation(monkeypatch, needs).rehearse(lacking)
    assert str(caught.value) == (
        "The reward function's parameter 'answer' has no default, so it needs the column 'answer', which no held-out comparison "
        "has. Columns there: none. Name it in its source: data.comparisons='[{path: my.jsonl, columns: [answer]}]'. Name it in "
        "data.heldout_comparisons too if that is set. An evaluation scores held-out comparisons too; not with "
        "evaluation.comparisons=0."
    )
    evaluation(monkeypatch, needs, "evaluation.comparisons=0").rehearse(lacking)
    evaluation(monkeypatch, needs).rehearse(known)
    evaluation(monkeypatch, lambda p, r: [1.0] * len(r)).rehearse(lacking)
    with pytest.raises(RewardError, match="On held-out comparisons, reward function my_rewards:score, .* ValueError"):
        evaluation(monkeypatch, lambda p, r, answer: [float(a == "a" or int(a)) for a in answer]).rehearse(known)


def test_an_evaluation_of_comparisons_without_a_column_names_their_source(function, tokenizer):
    model, data = function(lambda p, r, answer: [1.0] * len(r)), Compared(Prompt.of("w2"))
    with pytest.raises(
        RewardError, match=r"no held-out comparison has\..* data.comparisons=.* not with evaluation.comparisons=0"
    ):
        measure_reward_model(model, data, tokenizer, Lengths(8, 8, 8), 4, None)


# ------------------------------------------------------------------------------------------------------ learned rewards


@pytest.fixture
def foreign(tokenizer):
    """A learned reward model that reads another tokenizer, and the rows it was given: they are recorded, all score 0."""
    core = tokenizers.Tokenizer.from_str(tokenizer.core.to_str())
    core.add_tokens(["another"])
    other = Tokenizer(core, eos_token="<stop>", pad_token="<pad>", chat_template=tokenizer.chat_template)
    seen = []
    model = SimpleNamespace(context_length=16, evaluate=lambda rows, names: seen.append(rows) or {"scores": np.zeros(rows.rows)})
    return made_by_a_stage(model, other, tokenizer), seen


def answers(tokenizer, prompts, responses):
    ids = [tokenizer.encode(p) for p in prompts]
    rows = pack(ids, responses, tokenizer.pad_id)
    return Responses([Prompt.of(p) for p in prompts], [tokenizer.decode(r) for r in responses], rows, tokenizer)


def test_a_reward_model_that_shares_the_policys_tokens_reads_them_as_they_are(learned, tokenizer, load):
    responses = answers(tokenizer, ["w1 w2", "w3"], [[4, 5, tokenizer.eos_id], [6]])
    expected = [
        float(load(1).scalar_model(head()).evaluate(responses.sequences.take([i]), ["scores"])["scores"][0]) for i in (0, 1)
    ]
    assert learned.score(responses) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("longest", "scored"), [(6, [True, True]), (5, [False, True]), (3, [False, False])])
def test_a_row_longer_than_the_reward_models_context_has_no_score(load, tokenizer, caplog, longest, scored):
    model = load(1).scalar_model(head())
    responses = answers(tokenizer, ["w1 w2 w3", "w1 w2"], [[4, 5, tokenizer.eos_id], [6, tokenizer.eos_id]])
    expected = np.where(scored, model.evaluate(responses.sequences, ["scores"])["scores"], np.nan)
    model.context_length = longest
    scores = made_by_a_stage(model, tokenizer, tokenizer).score(responses)
    assert scores == pytest.approx(expected, abs=1e-5, nan_ok=True)
    assert all(scored) or f"{2 - sum(scored)} responses are too long for the reward model and were not scored" in caplog.text


def test_a_reward_model_with_another_tokenizer_reads_the_text_and_gives_no_value_network(foreign, tokenizer):
    model, seen = foreign
    model.score(answers(tokenizer, ["w1 w2"], [[4, 5, tokenizer.eos_id]]))
    assert seen[0].tokens[0][seen[0].attention_mask[0]].tolist() == [*tokenizer.encode("w1 w2 w4 w5"), tokenizer.eos_id]
    assert model.value_network() is None


def test_a_cut_response_looks_cut_to_a_reward_model_with_another_tokenizer(foreign, tokenizer):
    model, seen = foreign
    model.score(answers(tokenizer, ["w1 w2"], [[4, 5]]))
    assert tokenizer.eos_id not in seen[0].tokens[0][seen[0].attention_mask[0]]


def test_what_fits_is_scored_whole_and_what_does_not_is_not_scored_in_part(foreign, tokenizer):
    """Of sixteen tokens, eleven of the prompt and four of the response; and fifteen and two."""
    model, seen = foreign
    prompts = ["w1 " * 10 + "w2", "w1 " * 14 + "w2"]
    scores = model.score(answers(tokenizer, prompts, [[4, 5, 6, tokenizer.eos_id], [7, tokenizer.eos_id]]))
    assert scores[0] == 0 and np.isnan(scores[1])
    assert seen[0].tokens[0][seen[0].attention_mask[0]].tolist() == [1] * 10 + [2, 4, 5, 6, tokenizer.eos_id]
    long = model.score(answers(tokenizer, ["w1"], [[4] * 15 + [tokenizer.eos_id]]))
    assert np.isnan(long[0])


def test_a_reward_model_trained_with_another_chat_template_reads_its_own(tokenizer):
    other = Tokenizer(tokenizer.core, eos_token="<stop>", pad_token="<pad>", chat_template=OTHER_TEMPLATE)
    seen = []
    model = SimpleNamespace(context_length=16, evaluate=lambda rows, names: seen.append(rows) or {"scores": np.zeros(rows.rows)})
    made_by_a_stage(model, other, tokenizer).score(answers(tokenizer, ["w1 w2"], [[4, 5, tokenizer.eos_id]]))
    expected = tokenizer.encode("w9 w1 w2 w10 w4 w5")
    assert seen[0].tokens[0][seen[0].attention_mask[0]].tolist() == [*expected, tokenizer.eos_id]


def test_special_tokens_that_the_policy_spelled_are_no_special_tokens_to_a_reward_model_with_another_tokenizer(tokenizer):
    """w0 stands for words that the other tokenizer does not know."""
    words = {word: i for i, word in enumerate([*WORDS, "<stop>", "<turn>", "<pad>"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<stop>", "<turn>", "<pad>"])
    template = "{% for m in messages %}{{ '<turn> ' + m.content + ' ' }}{% endfor %}{{ '<turn> ' }}"
    other = Tokenizer(core, eos_token="<stop>", pad_token="<pad>", chat_template=template)
    seen = []
    model = SimpleNamespace(context_length=32, evaluate=lambda rows, names: seen.append(rows) or {"scores": np.zeros(rows.rows)})
    turns = (Message("user", "w1"), Message("assistant", "w2 <turn>"), Message("user", "w3 <turn>"))
    rows = pack([[1]], [[4, tokenizer.eos_id]], tokenizer.pad_id)
    made_by_a_stage(model, other, tokenizer).score(Responses([Prompt(turns)], ["w4 <stop> <turn> w5"], rows, tokenizer))
    stop, turn = core.token_to_id("<stop>"), core.token_to_id("<turn>")
    prompt = [turn, 1, turn, 2, 0, 0, turn, 3, turn, turn]
    assert seen[0].tokens[0][seen[0].attention_mask[0]].tolist() == [*prompt, 4, 0, 0, 0, 0, 5, stop]


OTHER_TEMPLATE = (
    "{% for m in messages %}{{ 'w9 ' + m.content + ' ' if m.role == 'user' else m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w10 ' }}{% endif %}"
)


def test_a_prompt_too_long_for_the_reward_model_is_not_scored_as_an_empty_one(foreign, tokenizer):
    model, seen = foreign
    scores = model.score(answers(tokenizer, ["w1 " * 14], [[4, 5, tokenizer.eos_id]]))
    assert np.isnan(scores[0])
