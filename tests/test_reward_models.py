"""Sources of reward: Python functions and learned models."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers

from conftest import head, made_by_a_stage
from lockstep.errors import ConfigError, RewardError
from lockstep.interfaces import Responses
from lockstep.text.sequences import pack
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Prompt
from lockstep_rlhf.reward_models.function import Function

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
    assert len(calls) == failures + 1 and "attempt 1: it raised ConnectionError('busy')" in caplog.text


def test_a_function_that_keeps_failing_stops_the_run_with_its_reason(function):
    calls = []
    with pytest.raises(RewardError, match="it raised ZeroDivisionError"):
        function(lambda p, r: calls.append(1) or 1 / 0).score(RESPONSES)
    assert len(calls) == 3


def test_a_function_that_keeps_failing_can_drop_its_episodes_but_never_scores_zero(function):
    assert np.isnan(function(lambda p, r: 1 / 0, on_failure="drop").score(RESPONSES)).all()


def test_a_function_that_does_not_answer_in_time_has_failed(function):
    started = time.perf_counter()
    with pytest.raises(RewardError, match="no answer within reward_model.timeout_seconds=0.05"):
        function(lambda p, r: time.sleep(1), timeout_seconds=0.05, retries=1).score(RESPONSES)
    assert time.perf_counter() - started < 0.9


@pytest.mark.parametrize(
    ("answer", "message"),
    [([1], r"shape \(1,\) for 2 responses"), (3.0, r"shape \(\) for 2"), (["a", "b"], "not a list of numbers")],
)
def test_an_answer_of_the_wrong_shape_or_kind_is_a_failure(function, answer, message):
    with pytest.raises(RewardError, match=message):
        function(lambda p, r: answer).score(RESPONSES)


@pytest.mark.parametrize("hole", [None, float("nan"), float("inf"), float("-inf")])
def test_a_single_score_that_is_not_a_number_stops_the_run_or_drops_its_episode(function, hole):
    with pytest.raises(RewardError, match=r"for the response 'bb'. Return a finite number, or set reward_model.on_failure=drop"):
        function(lambda p, r: [0.5, hole]).score(RESPONSES)
    scores = function(lambda p, r: [0.5, hole], on_failure="drop").score(RESPONSES)
    assert scores[0] == 0.5 and np.isnan(scores[1])


@pytest.mark.parametrize("path", ["no_such_module:score", "math:no_such_function", "math"])
def test_a_function_that_cannot_be_imported_says_how_to_write_it(path):
    with pytest.raises(ConfigError, match=f"'{path}' cannot be imported: .* Write it as module:function"):
        Function(Function.Config(function=path, timeout_seconds=1.0, retries=0, on_failure="raise"), None)


def test_a_function_that_never_returns_does_not_keep_the_process_alive(tmp_path):
    (tmp_path / "hanging.py").write_text("import time\ndef score(prompts, responses):\n    time.sleep(4)\n")
    code = (
        "from lockstep.errors import RewardError\n"
        "from lockstep.interfaces import Responses\n"
        "from lockstep_rlhf.reward_models.function import Function\n"
        "config = Function.Config(function='hanging:score', timeout_seconds=0.05, retries=0, on_failure='raise')\n"
        "try: Function(config, None).score(Responses([], ['a'], None, None))\n"
        "except RewardError: print('given up')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "given up\n"
    process.wait(timeout=2)


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


def test_a_reward_model_with_another_tokenizer_reads_the_text_and_gives_no_value_network(foreign, tokenizer):
    model, seen = foreign
    model.score(answers(tokenizer, ["w1 w2"], [[4, 5, tokenizer.eos_id]]))
    assert seen[0].tokens[0][seen[0].attention_mask[0]].tolist() == [*tokenizer.encode("w1 w2 w4 w5"), tokenizer.eos_id]
    assert model.value_network() is None


def test_a_cut_response_looks_cut_to_a_reward_model_with_another_tokenizer(foreign, tokenizer):
    model, seen = foreign
    model.score(answers(tokenizer, ["w1 w2"], [[4, 5]]))
    assert tokenizer.eos_id not in seen[0].tokens[0][seen[0].attention_mask[0]]


def test_a_prompt_too_long_for_the_reward_model_is_not_scored_as_an_empty_one(foreign, tokenizer):
    model, seen = foreign
    scores = model.score(answers(tokenizer, ["w1 " * 9], [[4, 5, tokenizer.eos_id]]))
    assert np.isnan(scores[0])
