"""The folders are the architecture: which part may import which, and what enters a stage's identity."""

from __future__ import annotations

import ast
import codecs
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lockstep.runs import identity

ROOT = Path(__file__).parents[1]
SOURCES = ("framework", "plugins")

FLOORS = (
    "errors", "types", "version", "launchers", "processes", "registry", "interfaces", "builtin", "storage", "config", "text",
    "learning", "models", "data", "reporting", "runs", "planning", "checking", "api", "commands",
)  # fmt: skip
"""Of the core, the lowest first: each imports only from itself and from those before it."""
FRONT_DOORS = ("__init__", "__main__", "cli")
"""Files of the core that import from any floor, and that no floor imports."""


def modules() -> dict[str, Path]:
    """{dotted name: file} of the core and of every plugin in the repository."""
    found = {}
    for source in SOURCES:
        for file in sorted((ROOT / source).rglob("*.py")):
            parts = file.relative_to(ROOT / source).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def packages(file: Path) -> set[str]:
    """The top-level packages that a file imports, wherever in the file it does."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def imports(file: Path, known: dict[str, Path]) -> dict[str, bool]:
    """{module: whether the import is for type checkers only} of a file's imports of ours, wherever in the file they are."""
    tree, found = ast.parse(file.read_text()), {}
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name for name in inner if name in known]
            names += [node.module] if len(names) < len(inner) else []  # something that the package itself defines
        else:
            continue
        for name in names:
            if name in known:
                found[name] = found.get(name, True) and id(node) in for_types
    return found


def graph() -> dict[str, dict[str, bool]]:
    known = modules()
    return {name: imports(file, known) for name, file in known.items()}


def circle(edges: dict[str, list[str]]) -> list[str]:
    """Some circle, from a module back to itself; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in edges[name]:
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in edges if (found := visit(name, []))), [])


def floor(module: str) -> str | None:
    """The floor of a module of the core; None for a front door and for other packages."""
    package, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    return None if package != "lockstep" or name in ("", *FRONT_DOORS) else name


def test_each_floor_of_the_core_imports_only_from_the_floors_below():
    wrong = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other, for_types in others.items()
        if floor(module) and not for_types
        if other.startswith("lockstep.") and FLOORS.index(floor(other) or FLOORS[-1]) > FLOORS.index(floor(module))
    ]
    assert wrong == []


def test_every_folder_of_the_core_has_its_floor():
    assert {floor(module) for module in modules()} - {None} <= set(FLOORS)


def test_no_two_files_import_each_other_lazily_or_for_types_included():
    assert circle({module: list(others) for module, others in graph().items()}) == []


def test_the_core_imports_neither_a_plugin_nor_torch_nor_jax():
    plugins = {path.name for path in (ROOT / "plugins").iterdir()}
    for module, file in modules().items():
        if module.split(".")[0] == "lockstep":
            assert not packages(file) & {*plugins, "torch", "jax", "flax", "optax"}, module


@pytest.mark.parametrize("plugin", ["lockstep_torch", "lockstep_jax"])
def test_a_backends_page_lists_its_files_in_an_order_in_which_each_imports_from_earlier_ones(plugin):
    known, folder = modules(), ROOT / "plugins" / plugin
    page = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    listed = re.findall(r"^ *([a-z_]+)\.py ", page, re.MULTILINE)
    assert sorted(listed) == sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")
    for number, name in enumerate(listed):
        ours = [other.removeprefix(f"{plugin}.") for other in imports(folder / f"{name}.py", known) if other.startswith(plugin)]
        assert set(ours) <= set(listed[:number]), name


def test_a_circle_is_found():
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []


# ---------------------------------------------------------------------------------------------------- files are UTF-8


def in_the_locales_encoding(tree: ast.AST) -> list[int]:
    """The lines that open text, or read a program's output as text, without saying in which encoding."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name, given = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
        modes = [
            a.value for a in [*node.args, *(k.value for k in node.keywords if k.arg == "mode")] if isinstance(a, ast.Constant)
        ]
        binary = any(isinstance(mode, str) and "b" in mode and len(mode) < 4 for mode in modes)
        if (
            name == "open" and not binary
            or name.endswith(".read_text") and not node.args
            or name.endswith(".write_text") and len(node.args) < 2
            or name.startswith("subprocess.") and given & {"text", "universal_newlines"}
        ):  # fmt: skip
            found.append(node.lineno)
    return found


def test_no_file_is_read_or_written_in_the_encoding_of_the_locale():
    files = [file for folder in SOURCES for file in (ROOT / folder).rglob("*.py")]
    found = {file: in_the_locales_encoding(ast.parse(file.read_text(encoding="utf-8"))) for file in files}
    assert {str(file.relative_to(ROOT)): lines for file, lines in found.items() if lines} == {}


def test_an_encoding_that_is_left_to_the_locale_is_found():
    code = "open(a)\nopen(a, 'rb')\nopen(a, encoding=b)\np.read_text()\np.write_text(a)\nsubprocess.run(a, text=True)"
    assert in_the_locales_encoding(ast.parse(code)) == [1, 4, 5, 6]


IN_ASCII = """
import sys
from pathlib import Path
from lockstep.storage.files import read_json, write_json, write_text
from lockstep.storage.records import read_rows

folder, tent = Path(sys.argv[1]), chr(0x26FA)
write_json(folder / "a.json", {"text": tent})
write_text(folder / "a.jsonl", '{"text": "%s"}\\n' % tent)
assert read_json(folder / "a.json") == {"text": tent}
assert list(read_rows(folder / "a.jsonl")) == [{"text": tent}]
print(sys.stdout.encoding)
"""


def test_records_are_utf8_in_a_locale_that_is_not(tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", IN_ASCII, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env={**os.environ, **ascii_only})
    assert done.returncode == 0, done.stderr
    assert codecs.lookup(done.stdout.strip()).name == "ascii"


# ------------------------------------------------------------------------------------- what enters a stage's identity


@pytest.fixture
def core(tmp_path, monkeypatch):
    """A copy of the core's source that can be edited; code_digests looks there."""
    copy = tmp_path / "lockstep"
    shutil.copytree(ROOT / "framework" / "lockstep", copy)
    find = importlib.util.find_spec

    def find_spec(name: str):  # a spec of its own: the module's is shared by the whole process
        return SimpleNamespace(submodule_search_locations=[str(copy)]) if name == "lockstep" else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return copy


def first_file(folder: Path) -> Path:
    return next(file for file in sorted(folder.rglob("*.py")) if file.name != "__init__.py")


@pytest.mark.parametrize("folder", sorted(identity.NOT_RESULTS & {f.name for f in (ROOT / "framework/lockstep").iterdir()}))
def test_a_comment_in_what_shows_or_checks_results_changes_no_identity(core, folder):
    before = identity.code_digests([])
    file = first_file(core / folder)
    file.write_text(file.read_text() + "# a comment\n")
    assert identity.code_digests([]) == before


@pytest.mark.parametrize("folder", ["learning", "text", "models", "data", "config", "storage", "runs"])
def test_a_comment_in_what_decides_results_changes_every_identity(core, folder):
    before = identity.code_digests([])
    file = first_file(core / folder)
    file.write_text(file.read_text() + "# a comment\n")
    assert identity.code_digests([]) != before
