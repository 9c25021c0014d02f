"""The budget of type errors: what it allows, and what it says. mypy itself runs in `make lint`."""

from __future__ import annotations

import json

from typing_budget import BUDGET, ROOT, is_strict, problems, strict_modules

STRICT = ["lockstep.types", "lockstep.learning.*"]


def test_a_file_at_its_budget_is_fine():
    assert problems({"plugins/a/b.py": ["plugins/a/b.py:1: wrong"]}, {"plugins/a/b.py": 1}, STRICT) == []


def test_an_error_beyond_the_budget_names_the_file_and_its_errors():
    first, *errors = problems({"plugins/a/b.py": ["one", "two"]}, {"plugins/a/b.py": 1}, STRICT)
    assert first == "plugins/a/b.py has 2 type errors; its budget is 1. Fix the new ones:"
    assert errors == ["one", "two"]


def test_a_file_without_a_budget_may_have_no_error():
    assert problems({"plugins/a/new.py": ["one"]}, {}, STRICT)[0].startswith(
        "plugins/a/new.py has 1 type errors; its budget is 0."
    )


def test_fixed_errors_lower_the_budget():
    (line,) = problems({}, {"plugins/a/b.py": 2}, STRICT)
    assert line.endswith("has 0 type errors; its budget is 2. Lower it: python tests/typing_budget.py --write")


def test_a_strict_module_has_no_budget():
    (line,) = problems({"framework/lockstep/types.py": ["one"]}, {"framework/lockstep/types.py": 1}, STRICT)
    assert line == "framework/lockstep/types.py is checked strictly and cannot have a budget."


def test_patterns_of_modules_match_files():
    assert is_strict("framework/lockstep/types.py", STRICT)
    assert is_strict("framework/lockstep/learning/numerics.py", STRICT)
    assert is_strict("framework/lockstep/learning/__init__.py", STRICT)
    assert not is_strict("framework/lockstep/learning_more.py", STRICT)
    assert not is_strict("framework/lockstep/runs/types.py", STRICT)


def test_the_budget_names_files_that_exist_and_none_that_is_strict():
    budget = json.loads(BUDGET.read_text())
    assert not [file for file in budget if not (ROOT / file).is_file()]
    assert not [file for file in budget if is_strict(file, strict_modules())]
