"""Hostile inputs end in a right result or a clear error: the same few hundred every time, from every area.

For others, and for longer: python benchmarks/fuzz.py --minutes 10
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st

from hostile import checkpoints, clear, configuration, rows, run_folder, server
from hostile.areas import AREAS, Area, alone, attempt
from hostile.clear import CHARACTERS, MEMORY, SECRET, only_clear_errors
from hostile.values import at, paths
from lockstep.config.schema import parse
from lockstep.data.conventions import CONVENTIONS
from lockstep.errors import DataError
from lockstep.registry import registry
from lockstep.storage.files import read_json
from lockstep_rlhf.reward_models.endpoint import Endpoint

ROOT = Path(__file__).parents[1]
SAME_EVERY_TIME = settings(derandomize=True, phases=(Phase.generate,), print_blob=False)  # to shrink may take minutes


@pytest.mark.parametrize("name", AREAS)
def test_hostile_input_ends_in_a_right_result_or_a_clear_error(name):
    attempt(AREAS[name], settings(SAME_EVERY_TIME, max_examples=AREAS[name].examples))


# -------------------------------------------------------------------------------------------------- without harm all is right


@pytest.mark.parametrize("name", configuration.BASES)
def test_the_configurations_to_edit_are_right(name):
    with alone():
        configuration.dry(configuration.resolved(configuration.made(name, ())))


def test_the_configurations_to_edit_have_every_component_of_this_repository():
    with alone():
        trees = [configuration.base(name) for name in configuration.BASES]
    found = {value for tree in trees for path in paths(tree) if path[-1] == "name" and isinstance(value := at(tree, path), str)}
    own = {component.name for component in registry() if component.target.startswith("lockstep")}  # not other tests' defects
    assert own - configuration.ELSEWHERE <= found


@pytest.mark.parametrize("number", range(len(rows.ROWS)))
def test_the_rows_to_edit_are_right(number, tmp_path):
    nouns = [noun for noun in CONVENTIONS if any(set(c.columns) <= set(rows.ROWS[number]) for c in CONVENTIONS[noun])]
    for form, write in rows.FORMS.items():
        if form == "csv" and not all(isinstance(value, str) for value in rows.ROWS[number].values()):
            continue
        (tmp_path / f"my.{form}").write_bytes(write([rows.ROWS[number]] * 3))
        for noun in nouns:
            rows.encode(noun, tmp_path / f"my.{form}", "raise")


def test_the_rows_to_edit_have_every_convention():
    columns = {convention.columns for of_noun in CONVENTIONS.values() for convention in of_noun}
    assert {c for c in columns if not any(set(c) <= set(row) for row in rows.ROWS)} == set()


@pytest.mark.parametrize("reader", run_folder.READERS)
def test_the_run_folder_to_harm_is_right(reader, tmp_path):
    with alone():
        run_folder.READERS[reader](run_folder.copy(tmp_path))


@pytest.mark.parametrize("source", checkpoints.SOURCES)
def test_the_checkpoints_to_harm_are_right(source):
    for kind in ("torch", "jax"):
        checkpoints.opened(checkpoints.SOURCES[source](), kind)
    checkpoints.text(checkpoints.SOURCES[source]())


def test_the_server_of_hostile_answers_can_answer_right():
    server.server().answer = server.answer((200, "OK", [], b'{"scores": [1.5, -2]}', None))
    keys = {"url": server.server().url, "retries": 0}
    assert Endpoint(parse(Endpoint.Config, keys, "reward_model"), None).score(server.TWO).tolist() == [1.5, -2.0]


# ------------------------------------------------------------------------------------------------------------ the property


def say(text):
    def raising():
        raise DataError(text)

    return raising


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (say(" "), "an empty DataError"),
        (say("my.jsonl " + "x" * CHARACTERS), "more than"),
        (say("it is wrong"), "names none of"),
        (say(f"my.jsonl: {SECRET}"), "the secret is shown"),
        (lambda: print("\x1b[31m"), "control characters"),
        (lambda: print(f"key={SECRET}"), "the secret is shown"),
        (lambda: all(True for _ in itertools.count()), "took more than"),
    ],
)
def test_an_unclear_error_a_secret_and_an_endless_call_fail_the_property(monkeypatch, call, message):
    monkeypatch.setattr(clear, "CPU_SECONDS", 0.2)
    with pytest.raises(AssertionError, match=message), only_clear_errors("my.jsonl"):
        call()


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyError])
def test_any_other_exception_fails_the_property(error):
    with pytest.raises(error), only_clear_errors():
        raise error


def test_too_much_memory_fails_the_property():
    with pytest.raises(MemoryError), only_clear_errors():
        np.empty(2 * MEMORY, np.uint8)


def test_a_clear_error_and_a_result_hold():
    with only_clear_errors("my.jsonl"):
        raise DataError("my.jsonl:3: a wrong type.")
    with only_clear_errors():
        pass


def test_a_hunt_counts_inputs_and_keeps_the_shortest_of_each_failure(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks/fuzz.py")
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    monkeypatch.setitem(AREAS, "numbers", Area(st.integers(0, 1000), lambda number: 1 / max(0, number - 100), 0))
    fuzz.hunt("numbers", 0, tmp_path / "report.json")
    found = read_json(tmp_path / "report.json")
    ((where, (count, shortest, shown)),) = found["failures"].items()
    assert where.startswith("ZeroDivisionError at tests/test_fuzz.py:") and "division by zero" in shown
    assert 0 < count < found["tried"] and len(shortest) <= 2
