"""Types, checked once by mypy and held against a budget that only falls.

    python tests/typing_budget.py            # what `make lint` runs
    python tests/typing_budget.py --write    # after errors were fixed, or a file was renamed

`tests/typing_budget.json` has the number of errors that a file may still have; a file that is not in it may have none. The
modules that pyproject.toml checks strictly are never in it.
"""

from __future__ import annotations

import collections
import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUDGET = ROOT / "tests" / "typing_budget.json"
LOWER = "python tests/typing_budget.py --write"


def check() -> dict[str, list[str]]:
    """{file: its errors, one a line}, as mypy finds them with the settings of pyproject.toml."""
    done = subprocess.run([sys.executable, "-m", "mypy", "--output=json"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode > 1 or (done.returncode and not done.stdout):
        sys.exit(f"mypy did not run:\n{done.stdout}{done.stderr}")
    errors = collections.defaultdict(list)
    for found in map(json.loads, done.stdout.splitlines()):
        if found["severity"] == "error":
            errors[found["file"]].append(f"{found['file']}:{found['line']}: {found['message']} [{found['code']}]")
    return dict(errors)


def strict_modules() -> list[str]:
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    return next(group["module"] for group in overrides if group.get("disallow_untyped_defs"))


def is_strict(file: str, modules: list[str]) -> bool:
    """Whether ``file`` ('framework/lockstep/types.py') belongs to one of ``modules`` ('lockstep.types', 'lockstep.api.*')."""
    parts = Path(file).with_suffix("").parts[1:]
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return any(name == module or f"{name}.".startswith(module.removesuffix("*")) and module.endswith(".*") for module in modules)


def problems(errors: dict[str, list[str]], budget: dict[str, int], strict: list[str]) -> list[str]:
    """What to tell the author; empty if all is well."""
    lines = [f"{file} is checked strictly and cannot have a budget." for file in budget if is_strict(file, strict)]
    for file in sorted(errors.keys() | budget.keys()):
        count, allowed = len(errors.get(file, [])), budget.get(file, 0)
        if count > allowed:
            lines += [f"{file} has {count} type errors; its budget is {allowed}. Fix the new ones:", *errors[file]]
        elif count < allowed:
            lines.append(f"{file} has {count} type errors; its budget is {allowed}. Lower it: {LOWER}")
    return lines


def main() -> None:
    errors, strict = check(), strict_modules()
    if "--write" in sys.argv[1:]:
        counts = {file: len(found) for file, found in sorted(errors.items()) if not is_strict(file, strict)}
        BUDGET.write_text(json.dumps(counts, indent=2) + "\n")
    budget = json.loads(BUDGET.read_text())
    if lines := problems(errors, budget, strict):
        sys.exit("\n".join(lines))
    print(f"Types: {sum(budget.values())} errors in the budget, no others.")


if __name__ == "__main__":
    main()
