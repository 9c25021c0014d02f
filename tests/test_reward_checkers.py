"""Rewards that need no model: answers, forms, lengths, programs, and sums of rewards."""

from __future__ import annotations

import math
import sys
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import Data, Scored
from lockstep.config.schema import parse
from lockstep.errors import ConfigError, RewardError
from lockstep.interfaces import Responses
from lockstep.text.sequences import pack
from lockstep.types import Prompt
from lockstep_rlhf.reward_models import code as running
from lockstep_rlhf.reward_models.answer import Answer, number
from lockstep_rlhf.reward_models.code import Code, joined, program
from lockstep_rlhf.reward_models.length import Length
from lockstep_rlhf.reward_models.mathematics import Mathematics
from lockstep_rlhf.reward_models.pattern import Pattern
from lockstep_rlhf.reward_models.sum import Sum


def model(cls, **keys):
    return cls(parse(cls.Config, keys, "reward_model"), None)


def responses(*rows, column="answer"):
    """Of (gold, text) pairs."""
    prompts = [Prompt.of("w1", **{column: gold}) for gold, _ in rows]
    return Responses(prompts, [text for _, text in rows], None, None)


def nan(scores):
    """The scores, with None for NaN."""
    return [None if math.isnan(score) else score for score in scores.tolist()]


# --------------------------------------------------------------------------------------------------------------- answers


def test_an_answer_is_right_if_it_is_the_rows_own():
    answer = model(Answer)
    found = answer.score(responses(("green", " green\n"), ("green", "Green"), (4, "4"), (2.5, "2.5"), ("", ""), ("a", "")))
    assert found.dtype == np.float32 and nan(found) == [1, 0, 1, 1, None, 0]
    assert answer.details()["no_gold"].tolist() == [0, 0, 0, 0, 1, 0]
    assert answer.details()["no_answer"].tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("compare", ["exact", "number"])
@pytest.mark.parametrize("gold", [None, True, ["4"], {"answer": 4}, " "])
def test_a_gold_answer_that_cannot_be_read_is_no_score_and_is_counted(compare, gold, caplog):
    answer = model(Answer, compare=compare)
    assert nan(answer.score(responses((gold, "4"), ("4", "4")))) == [None, 1]
    assert "responses that were not scored: 1 no_gold" in caplog.text


def test_the_last_match_of_the_expression_is_the_answer():
    last = model(Answer, extract=r"answer: (\d+)")
    assert last.score(responses(("4", "answer: 3, no, answer: 4"), ("3", "answer: 3, no, answer: 4"))).tolist() == [1, 0]
    assert model(Answer, extract=r"\d+").score(responses(("42", "of 7 and 42"), ("42", "none"))).tolist() == [1, 0]
    assert model(Answer, extract=r"(?:is|are) (\w+)?").score(responses(("4", "it is 4, they are ."))).tolist() == [0]


def test_an_expression_that_never_ends_is_no_score(caplog):
    answer = model(Answer, extract=r"\A(a|aa)+\Z", timeout_seconds=0.5)
    assert nan(answer.score(responses(("a", "a" * 100 + "b"), ("a", "a")))) == [None, 1]
    assert answer.details()["failed"].tolist() == [1, 0] and "1 failed" in caplog.text


@pytest.mark.parametrize("extract", ["(", "[a-", "(a)(b)"])
def test_an_expression_that_cannot_be_meant_is_refused(extract):
    with pytest.raises(ConfigError, match="reward_model.extract(=.* is no regular expression|  ?has 2 groups)"):
        model(Answer, extract=extract)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1000", 1000), ("1,000", 1000), ("1,000,000.50", Fraction(2000001, 2)), ("1e3", 1000), ("+1.5E-1", Fraction(3, 20)),
        (" .5 ", Fraction(1, 2)), ("4.", 4), ("3/4", Fraction(3, 4)), ("-1,000 / 2e2", -5), ("\N{MINUS SIGN}2", -2), ("007", 7),
        (0.1, Fraction(1, 10)), (3, 3), ("0.1", Fraction(1, 10)), (10**30, 10**30),
    ],
)  # fmt: skip
def test_numbers_are_read_exactly(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "5%", "$5", "5 cm", "1,00", "1,0000", "1.000,5", "1 000", "1/0", "1/2/3", "1 1/2", "nan", "inf", "0x10", "1_000",
        "\u0664", "1e1000", "1e999999999", "9" * 5000, "", "-", "1e", "four", True, None, [1], math.nan, math.inf,
    ],
    ids=lambda text: str(text)[:12],
)  # fmt: skip
def test_what_is_no_bare_number_is_none(text):
    assert number(text) is None


def test_numbers_are_equal_by_value_and_not_by_spelling():
    rows = [("1000", "1,000"), (1000, "1e3"), ("0.5", "1/2"), (0.1, "0.10000000000000000001"), ("50%", "50"), ("5", "5%")]
    assert nan(model(Answer, compare="number").score(responses(*rows))) == [1, 1, 1, 0, None, 0]


def test_a_column_that_no_prompt_has_is_an_error_and_a_rehearsal_finds_it():
    with pytest.raises(
        RewardError, match="reward_model=answer needs the column 'gold', which no prompt has. Columns there: answer"
    ):
        model(Answer, column="gold").score(responses(("4", "4")))
    with pytest.raises(RewardError, match="reward_model=answer needs the column 'answer'.*Columns there: none"):
        Answer.rehearse(Answer.Config(), Data())


def test_mathematics_without_its_package_says_what_to_type(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package math-verify. Type: pip install 'lockstep-rlhf\[verify\]'"):
        Answer.check(parse(Answer.Config, {"compare": "math"}, "reward_model"))


@pytest.fixture(scope="module")
def mathematics():
    pytest.importorskip("math_verify")
    return Mathematics(20.0)


MATHEMATICS = [
    ("1/2", "$0.5$", True),
    ("\\frac{1}{2}", "so it is \\boxed{\\frac12}", True),
    ("x+1", "$1+x$", True),
    ("42", "first 41, then 42", True),
    ("42", "first 42, then 41", False),
    ("42", "\\boxed{41, 42}", False),  # several answers are not one of them, whichever
    ("42", "\\boxed{42} or \\boxed{41}", False),
    ("$1<x<2$", "$(1,2)$", True),
    ("$(1,2)$", "$1<x<2$", False),  # not symmetric: a set was asked for
    ("10", "10 cm", True),
    ("42", "I do not know.", "no_answer"),
    ("42", "\\boxed{", "no_answer"),
    ("42", "", "no_answer"),
    ("?!", "42", "no_gold"),
    ("\\frac{1", "42", "no_gold"),
    ("", "42", "no_gold"),
    (None, "42", "no_gold"),
]


@pytest.mark.parametrize(("gold", "answer", "expected"), MATHEMATICS)
def test_mathematics_compares_the_gold_answer_with_the_response(mathematics, gold, answer, expected):
    assert mathematics.compare(gold, answer) == expected


def test_mathematics_works_from_a_thread(mathematics):
    found = []
    thread = threading.Thread(target=lambda: found.append(mathematics.compare("1/2", "0.5")))
    thread.start()
    thread.join()
    assert found == [True]


def test_a_comparison_that_hangs_is_killed_and_the_next_one_answered(mathematics, monkeypatch):
    assert mathematics.compare("4", "4") is True
    first = mathematics.child
    monkeypatch.setattr(mathematics, "seconds", 0.3)
    started = time.perf_counter()
    assert mathematics.compare("1", "$10^{10^{10^{10}}} - 10^{10^{10^{10}}-1}$ $\\sum_{i=1}^{10^{99}} \\sin(i!)$") is not True
    assert mathematics.compare("1", "$" + "+".join(f"\\sqrt{{{p}}}" for p in range(2, 400)) + "$") == "failed"
    assert time.perf_counter() - started < 20 and first.poll() is not None
    monkeypatch.setattr(mathematics, "seconds", 20.0)
    assert mathematics.compare("4", "4") is True


def test_scores_by_mathematics_keep_failures_and_wrong_answers_apart(mathematics):
    answer = model(Answer, compare="math")
    answer.compare = mathematics.compare
    assert nan(answer.score(responses(("1/2", "0.5"), ("1/2", "none"), ("?!", "1")))) == [1, 0, None]
    answer.compare = lambda gold, text: "failed"
    assert nan(answer.score(responses(("1", "1")))) == [None] and answer.details()["failed"].tolist() == [1]


# ------------------------------------------------------------------------------------------------------- forms and lengths


def test_a_form_is_found_anywhere_unless_it_says_where():
    texts = responses((0, "<think>a\nb</think> c"), (0, "<think>a"), (0, ""))
    assert model(Pattern, pattern=r"(?s)\A<think>.*</think>").score(texts).tolist() == [1, 0, 0]
    assert model(Pattern, pattern="a").score(texts).tolist() == [1, 1, 0]


def test_a_form_that_takes_forever_is_no_score_and_no_hang(caplog):
    form = model(Pattern, pattern=r"\A(a|aa)+\Z", timeout_seconds=0.5)
    started = time.perf_counter()
    assert nan(form.score(responses((0, "a" * 100 + "b"), (0, "aa")))) == [None, 1]
    assert time.perf_counter() - started < 20 and form.details()["out_of_time"].tolist() == [1, 0]
    assert "out of time on 1 responses, which were not scored" in caplog.text


@pytest.mark.parametrize("pattern", ["(", "*a", "(?P<a>.)(?P<a", "a{2,1}"])
def test_a_form_that_is_no_expression_is_refused(pattern):
    with pytest.raises(ConfigError, match="is no regular expression"):
        model(Pattern, pattern=pattern)


def test_lengths_are_of_words_characters_or_the_policys_tokens():
    texts = Responses([Prompt.of("w1")] * 2, ["one two  three", ""], pack([[1], [1]], [[4, 5, 6, 7], [4]], 0), None)
    assert model(Length, unit="words").score(texts).tolist() == [3, 0]
    assert model(Length, unit="characters").score(texts).tolist() == [14, 0]
    assert model(Length).score(texts).tolist() == [4, 1] and model(Length).score(texts).dtype == np.float32
    assert model(Length, target=4).score(texts).tolist() == [0, -0.75]
    assert model(Length, unit="words", target=2).score(texts).tolist() == [-0.5, -1]


# ---------------------------------------------------------------------------------------------------------------- sums


def weighted(weights, **parts):
    """The sum of models that are given, each (scores, details, value network)."""

    class Part(Scored):
        def __init__(self, scores, details=None, network=None):
            super().__init__(lambda _: scores, network)
            self.found = details or {}

        def details(self):
            return self.found

    models = {name: Part(*part) for name, part in parts.items()}
    groups = {name: {"name": name} for name in parts}
    resources = SimpleNamespace(reward_model=lambda group: models[group["name"]])
    return Sum(parse(Sum.Config, {"parts": groups, "weights": weights}, "reward_model"), resources)


TWO = responses((0, "a"), (0, "b"))


def test_a_sum_is_weighted_and_shows_its_parts_as_they_are():
    whole = weighted({"right": 1.0, "long": -0.5}, right=([1, 0],), long=([4, 2], {"cut": np.array([0, 1], np.float32)}))
    scores = whole.score(TWO)
    assert scores.dtype == np.float32 and scores.tolist() == [1 - 2, -1]
    assert {name: found.tolist() for name, found in whole.details().items()} == {
        "right": [1, 0], "long": [4, 2], "long/cut": [0, 1],
    }  # fmt: skip


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_what_one_part_cannot_score_the_sum_cannot(weight):
    scores = weighted({"right": 1.0, "long": weight}, right=([1, 0],), long=([math.nan, 2],)).score(TWO)
    assert nan(scores) == [None, 2 * weight]


def test_the_value_network_is_that_of_the_first_part_that_has_one():
    first, second = (SimpleNamespace(copy=lambda name=name: name) for name in ("first", "second"))
    parts = {"a": ([1, 1],), "b": ([1, 1], {}, first), "c": ([1, 1], {}, second)}
    assert weighted(dict.fromkeys(parts, 1.0), **parts).value_network() == "first"
    assert weighted({"a": 1.0}, a=([1, 1],)).value_network() is None


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        ({}, {}, "reward_model.parts is empty"),
        ({"a": {}, "b": {}}, {"a": 1.0}, "reward_model.weights lacks b: every part needs a weight"),
        ({"long": {}}, {"long": 1.0, "lang": 1.0}, "reward_model.weights has lang, which is no part. Did you mean 'long'?"),
        ({"a/b": {}}, {"a/b": 1.0}, "reward_model.parts has a/b: use letters"),
        ({"a": {}}, {"a": math.nan}, "reward_model.weights.a=nan must be a finite number"),
    ],
)
def test_parts_and_weights_that_do_not_fit_are_refused(parts, weights, message):
    with pytest.raises(ConfigError, match=message):
        parse(Sum.Config, {"parts": parts, "weights": weights}, "reward_model")


def test_the_parts_of_a_sum_are_declared_so_that_they_are_checked_and_rehearsed():
    config = parse(Sum.Config, {"parts": {"a": {"name": "code"}}, "weights": {"a": 1.0}}, "reward_model")
    assert Sum.inputs(config).members == ({"name": "code"},)


# ------------------------------------------------------------------------------------------------------------- programs


@pytest.fixture(scope="module")
def code():
    return Code(parse(Code.Config, {"allow": True, "timeout_seconds": 30.0, "memory_mb": 256}, "reward_model"), None)


def test_programs_are_not_run_unless_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(running.subprocess, "Popen", lambda *_, **__: pytest.fail("it ran something"))
    for refuse in (lambda: Code.check(Code.Config()), lambda: model(Code)):
        with pytest.raises(ConfigError, match="they can read what you can. .* set reward_model.allow=true"):
            refuse()


ADD = "def add(a, b):\n    return a + b"


def test_a_program_is_right_if_it_passes_the_rows_tests(code):
    tests = "assert add(1, 2) == 3"
    rows = [
        (tests, f"Here it is:\n```python\n{ADD}\n```\nDone."),
        ([tests, "assert add('a', 'b') == 'ab'"], ADD),
        ("assert add(1, 2) == 4", ADD),
        (tests, "```\nadd = 1\n```\nbetter:\n```python\n" + ADD),
        (tests, "I cannot do that."),
        (None, ADD),
        (" ", ADD),
    ]
    assert nan(code.score(responses(*rows, column="tests"))) == [1, 1, 0, 1, 0, None, None]


PROGRAMS = {
    "leaves before its tests": "import os\nos._exit(0)",
    "exits before its tests": "raise SystemExit(0)",
    "reads what is not there": "input()",
    "takes all memory": "bytearray(10**9)",
    "fills the disk": "open('a', 'wb').write(bytes(20 * 2**20))",
    "opens too many files": "a = [open(__file__) for _ in range(100)]",
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2**40, 2**40))",
    "sees the environment": "import os\nassert 'HOME' in os.environ or 'PATH' in os.environ",
    "looks for how its end is told": "import os, re\n"
    "for file in [__file__, *os.listdir('.'), '/proc/self/cmdline', '/proc/self/environ']:\n"
    "    for name in re.findall(r'done-\\w+', open(file, errors='replace').read()):\n"
    "        open(name, 'w').close()\n"
    "os._exit(0)",
    "sees the folder of the run": "import os\nassert os.listdir('.') != ['program.py']",
}


MAIN = """
import dataclasses, pickle, sys
def open(account): return f"{account} is open"
@dataclasses.dataclass
class Point:
    x: "int"
if __name__ == "__main__":
    found = pickle.loads(pickle.dumps(Point(1)))
"""


def test_a_program_is_the_main_module_and_may_have_any_names(code):
    assert code.passes(MAIN, "assert found == Point(1) and open('it') == 'it is open'") == 1.0
    assert code.passes("x = 1", "assert 'os' not in globals()") == 1.0
    assert code.passes("def f(x):\n    return x", "import inspect\nassert 'return x' in inspect.getsource(f)") == 1.0


@pytest.mark.parametrize("what", PROGRAMS)
def test_a_program_does_not_pass_that(code, what):
    assert code.passes(PROGRAMS[what], "assert True") == 0.0


def test_a_program_that_does_not_end_is_killed_with_all_that_it_started(tmp_path):
    code = model(Code, allow=True, timeout_seconds=0.7)
    beat = f"open({str(tmp_path / 'beat')!r}, 'a').write('x')"
    left = f"import os, time\nif os.fork() == 0:\n    while True:\n        {beat}\n        time.sleep(0.02)\n"
    assert code.score(responses(("pass", left + "while True: pass"), column="tests")).tolist() == [0]
    assert code.details()["out_of_time"].tolist() == [1]
    assert model(Code, allow=True, timeout_seconds=30.0).passes(left, "pass") == 1.0  # it may end before what it started
    size = (tmp_path / "beat").stat().st_size
    time.sleep(0.2)
    assert (tmp_path / "beat").stat().st_size == size > 0


def test_a_machine_on_which_nothing_runs_is_an_error_and_not_a_score(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RewardError, match="Not even an empty program passes its tests"):
        model(Code, allow=True)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("x = 1", "x = 1"),
        ("a\n```python\nx = 1\n```\nb", "x = 1\n"),
        ("```\nx = 1\n```\n```py\ny = 2\n```", "y = 2\n"),
        ("```\nx = 1\n```\nthen\n```python\ny = 2", "y = 2"),
        ("  ```\nx = 1\n  ```", "x = 1\n"),
        ("in line ```x``` stays", "in line ```x``` stays"),
    ],
)
def test_the_program_is_the_last_block(response, expected):
    assert program(response) == expected


def test_tests_are_text_or_lines():
    assert joined(["a", "b"]) == "a\nb" and joined("a") == "a"
    assert [joined(value) for value in (None, "", [], [1], {"a": 1}, 3)] == [None] * 6
