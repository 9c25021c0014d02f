"""What is built and given away: the wheel and the sdist, and a run from the wheel alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from lockstep.checking.scaffold import TEMPLATES
from lockstep.version import __version__
from runs import DECODER, PPO_ONLY, TINY

ROOT = Path(__file__).parents[1]
PLUGINS = ("torch", "jax", "rlhf", "miniature", "tensorboard", "gymnasium", "openenv", "vllm")
PACKAGES = ["framework/lockstep", *(f"plugins/lockstep_{name}" for name in PLUGINS)]

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the repository")


def build(target: str, source: Path, folder: Path) -> Path:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", folder]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Made from the unpacked sdist, as an installer makes it where there is no wheel."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as files:
        files.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def packed(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as files:
        return set(files.namelist())


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """The wheel installed into an empty folder."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--target", folder]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, wheel], check=True)
    return folder


def elsewhere(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python in ``folder`` that has the test environment's dependencies and Lockstep from ``site`` alone.

    ``-S`` keeps the environment's .pth files, and with them the checkout, off the path; its packages are then added by hand.
    """
    dependencies = [path for path in sys.path if Path(path).name == "site-packages"]
    code = (
        f"import sys; sys.path[:0] = [{str(site)!r}, *{dependencies!r}]; import lockstep.cli as cli; "
        f"assert cli.__file__.startswith({str(site)!r}), cli.__file__; cli.main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-S", "-P", "-c", code, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_the_wheel_holds_all_that_is_not_python(packed):
    """Configuration, the templates of new plugins, the page of a report, and the marks of typed packages."""
    templates = {
        f"lockstep/checking/scaffold/templates/{file.relative_to(TEMPLATES).as_posix()}" for file in TEMPLATES.rglob("*.template")
    }
    conf = {f"lockstep/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "conf").rglob("*.yaml")}
    typed = {f"{Path(package).name}/py.typed" for package in PACKAGES}
    assert templates and conf
    pages = {f"lockstep/reporting/{name}" for name in ("page.css", "compare/page.html.jinja", "findings/page.html.jinja")}
    assert templates | conf | typed | pages <= packed


def test_the_wheel_holds_every_module_and_no_other(packed):
    sources = {
        file.relative_to(ROOT / root).as_posix() for root in ("framework", "plugins") for file in (ROOT / root).rglob("*.py")
    }
    assert {name for name in packed if name.endswith(".py")} == sources


def test_the_metadata_names_version_licence_and_entry_points(wheel):
    info = f"lockstep_rlhf-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as files:
        metadata = message_from_bytes(files.read(f"{info}/METADATA"))
        assert "Apache License" in files.read(f"{info}/licenses/LICENSE").decode()
        assert "lockstep = lockstep.cli:main" in files.read(f"{info}/entry_points.txt").decode()
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_citation_and_the_changelog_have_the_version_of_the_package():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_sdist_holds_what_builds_tests_and_documents_it(sdist):
    with tarfile.open(sdist) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    expected = {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "Makefile"}
    expected |= {"constraints.txt", "mkdocs.yml", "conf/config.yaml", "docs/ppo.md", "tests/conftest.py", "benchmarks/README.md"}
    assert expected <= names
    assert not [
        name for name in names if name.startswith((".venv", "runs/", "report/", "site/", "dist/")) or "__pycache__" in name
    ]


def test_a_wheel_alone_runs_the_miniature_from_any_folder(site, tmp_path):
    pytest.importorskip("torch")
    done = elsewhere(site, tmp_path, "run", *TINY, *DECODER, *PPO_ONLY, "folder=mine", "backend.threads=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.glob("mine/stages/ppo-torch-*/output/model.safetensors"))


# ------------------------------------------------------------------------------------------------------- dependencies

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = SETTINGS["optional-dependencies"]


def pins(file: str) -> dict[str, str]:
    return dict(
        (canonical(name), version)
        for name, _, version in (line.partition("==") for line in (ROOT / file).read_text().splitlines() if "==" in line)
    )


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def bounds(*extras: str) -> dict[str, str]:
    """{distribution: its lower bound} of what Lockstep requires, with these extras."""
    lines = [*SETTINGS["dependencies"], *(line for extra in extras for line in OPTIONAL[extra])]
    found = [re.match(r"([A-Za-z0-9._-]+)>=([0-9.]+)$", line) for line in lines]
    return {canonical(match[1]): match[2] for match in found if match}


def version(text: str) -> tuple[int, ...]:
    """Numeric parts, without zeros at the end: 3.1 is 3.1.0."""
    parts = [int(part) for part in re.findall(r"\d+", text)]
    return tuple(parts[: next((i for i in range(len(parts), 0, -1) if parts[i - 1]), 0)])


def test_the_lowest_versions_that_are_tested_are_the_bounds():
    lowest = pins("constraints-lowest.txt") | {"torch": pins("constraints.txt")["torch"]}
    claimed = bounds("torch", "jax", "gguf", "tensorboard")
    assert {name: version(lowest[name]) for name in claimed} == {name: version(bound) for name, bound in claimed.items()}
