"""What the documents name exists: files, `file: symbol`, dotted names, configuration keys. Resolved from the source text, so
nothing is imported."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")]
PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which is about what was
SOURCES = [path for folder in ("framework", "plugins", "tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")]
PACKAGES = {path.name: path for root in ("framework", "plugins") for path in (ROOT / root).glob("lockstep*")}
ELSEWHERE = {"stranger.py", "test_reinforce.py", "spread.py", "weighted.py"}  # files of the reader's own
GROUPS = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()} - {"hydra"} | {"sft", "reward", "pretrain"}


@functools.cache
def names(file: Path) -> frozenset[str]:
    """What a module defines or imports at its top ('PPO'), and what its classes do ('PPO.step', and 'step' for short)."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                new = [node.name]
            elif isinstance(node, ast.Assign):
                new = [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
            elif isinstance(node, ast.AnnAssign):
                new = [node.target.id] if isinstance(node.target, ast.Name) else []
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                new = [alias.asname or alias.name for alias in node.names]
            elif isinstance(node, ast.If):  # imports for type checkers, of names that are there at run time too
                visit(node.body, prefix)
                new = []
            else:
                new = []
            found.update(prefix + name for name in new)
            found.update(new if prefix else [])
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.If):  # under TYPE_CHECKING: names that a package imports when they are first asked for
                visit(node.body, prefix)

    visit(ast.parse(file.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


@functools.cache
def keys() -> frozenset[str]:
    """Every key of every configuration file."""
    found: set[str] = set()

    def visit(node: object) -> None:
        if isinstance(node, dict):
            found.update(map(str, node))
        for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            visit(value)

    for file in (ROOT / "conf").rglob("*.yaml"):
        visit(yaml.safe_load(file.read_text(encoding="utf-8")))
    return frozenset(found)


def files(name: str) -> list[Path]:
    """The files that ``name`` means: a path from the top or beside the pages, `<backend>` for both, or the end of a path."""
    if "<backend>" in name:
        both = [files(name.replace("<backend>", backend)) for backend in ("torch", "jax")]
        return [file for found in both for file in found] if all(both) else []
    if "/" in name:
        starts = [ROOT, ROOT / "docs", ROOT / "benchmarks", *(path.parent for path in PACKAGES.values()), *PACKAGES.values()]
        found = [start / name for start in starts if (start / name).exists()]
        return found or [path for path in SOURCES if path.as_posix().endswith(f"/{name}")]
    written = [*SOURCES, *ROOT.glob("*"), *(ROOT / "conf").rglob("*.yaml"), *(ROOT / "docs").rglob("*.md")]
    written += [ROOT / path.with_suffix("") for path in (ROOT / "framework").rglob("*.template")]
    return [path for path in written if path.name == name]


def missing(span: str) -> str | None:
    """What is wrong with a span of code in a document; None if nothing is, or if it names nothing of ours."""
    if match := re.fullmatch(r"([\w/<>-]+\.py)(?:: (.+))?", span):
        found = files(match[1])
        if not found:
            return None if match[1] in ELSEWHERE else "there is no such file"
        there = {name for file in found if file.exists() for name in names(file)}
        absent = [name for name in re.split(r", ", match[2] or "") if name and name not in there]
        return f"{match[1]} has no {', '.join(absent)}" if absent else None
    if re.fullmatch(r"(framework|plugins|conf|tests|benchmarks|docs)/[\w./<>*-]*", span):
        path = span.replace("<backend>", "torch")
        return None if list(ROOT.glob(path.rstrip("/"))) else "there is no such file or folder"
    if match := re.fullmatch(r"(lockstep(?:_\w+)?(?:\.\w+)+)(?:\(.*\))?", span):
        return missing_name(match[1])
    if match := re.fullmatch(r"([A-Z]\w+)\.([a-z_]\w*)", span):
        owners = [file for file in SOURCES if match[1] in names(file)]
        return None if any(span in names(file) for file in owners) else f"no class {match[1]} has {match[2]}"
    match = re.fullmatch(r"(\w+)((?:\.[a-z]\w*)+)(?:=.*|: .*)?", span)
    if match and match[1] in GROUPS:
        absent = [key for key in match[2].strip(".").split(".") if key not in keys()]
        return f"no configuration has {', '.join(absent)}" if absent else None
    return None


def missing_name(dotted: str) -> str | None:
    package, *rest = dotted.split(".")
    place = PACKAGES.get(package)
    if place is None:
        return f"there is no package {package}"
    while rest and ((place / rest[0]).is_dir() or (place / f"{rest[0]}.py").is_file()):
        place = place / rest[0] if (place / rest[0]).is_dir() else place / f"{rest[0]}.py"
        rest = rest[1:]
        if place.suffix:
            break
    file = place if place.suffix else place / "__init__.py"
    if rest and not (file.is_file() and ".".join(rest) in names(file)):
        return f"{file.relative_to(ROOT)} has no {'.'.join(rest)}"
    return None


def prose(text: str) -> str:
    """Without listings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.sub(r"^(?: {4}).*$", "", text, flags=re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_name_in_a_document_exists(page):
    text = prose(page.read_text(encoding="utf-8"))
    spans = re.findall(r"`([^`\n]+)`", text)
    spans += [f"{file}: {symbol}" for file, symbol in re.findall(r"`([\w/<>.-]+\.py)`, `([A-Za-z_][\w.]*)(?<!\.py)`", text)]
    wrong = {span: why for span in spans if (why := missing(span))}
    assert not wrong


def tree() -> list[Path]:
    """The paths that the README's tree of the code lists."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Reading the code")[2].partition("\n##")[0]
    found, folder = [], ROOT
    for line in re.findall(r"^ {4}(.+)$", section, re.M):
        entries = line.strip() and re.split(r" {2,}", line.strip())[0].split()
        if not line.startswith(" "):
            folder = ROOT / entries[0]
            found += [ROOT / entry for entry in entries]
        else:
            found += [folder / entry for entry in entries]
    return found


def test_the_tree_in_the_readme_names_what_exists():
    assert len(tree()) > 15
    assert not [path for path in tree() if not path.exists()]


def test_the_tree_in_the_readme_names_every_folder_of_the_core_and_every_plugin():
    core = ROOT / "framework" / "lockstep"
    folders = {path for path in [*core.iterdir(), *(ROOT / "plugins").iterdir()] if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(tree())


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [path for page in PAGES if f": {(path := page.relative_to(ROOT).as_posix())}\n" not in navigation]


@pytest.mark.parametrize(
    "span",
    [
        "numerics.py: no_such_function",
        "no_such_file.py",
        "plugins/lockstep_<backend>/no_such_file.py",
        "lockstep.learning.numerics.no_such_function",
        "lockstep.no_such_module",
        "Policy.no_such_method",
        "algorithm.no_such_key",
        "conf/no_such_folder",
    ],
)
def test_a_name_that_does_not_exist_is_found(span):
    assert missing(span)


@pytest.mark.parametrize(
    "span",
    ["numerics.py: gae", "ppo.py: PPO.__init__", "lockstep.learning.numerics.gae", "Policy.generate", "algorithm.kl_coef=0.1"],
)
def test_a_name_that_exists_is_not(span):
    assert missing(span) is None


def test_every_test_that_a_document_names_exists():
    """docs/errors.md says what holds each of its rows."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", text))
    there = {(file.name, name) for file in (ROOT / "tests").glob("test_*.py") for name in names(file)}
    assert len(named) > 100 and named - there == set()
