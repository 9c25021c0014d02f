"""Plugins as strangers bring them: a package of their own, found by entry point, with configuration of its own. The listings
are those of docs/plugins.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.checking.conformance import conform, subject
from runs import DECODER, PPO_ONLY, TINY

GUIDE = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()
FILES = {path: text for path, text in re.findall(r"`([\w./]+)`:\n\n```\w+\n(.*?)```", GUIDE, re.DOTALL)}
"""{path: text} of the listings that are whole files."""
SMALL = ["data.prompts=60", "data.texts=60", "algorithm.iterations=3", "algorithm.batch_size=8"]
FUNCTION = ["reward_model=function", "reward_model.function=reward_functions:shortness"]


def changes() -> dict[str, list[tuple[str, str]]]:
    """{path: [(old, new), ...]} of the listings that are differences to generated packages."""
    found: dict[str, list[tuple[str, str]]] = {}
    for listing in re.findall(r"```diff\n(.*?)```", GUIDE, re.DOTALL):
        for file in re.split(r"^--- ", listing, flags=re.MULTILINE)[1:]:
            path, *hunks = file.split("\n@@\n")
            lines = [[line for line in hunk.splitlines() if line] for hunk in hunks]
            side = lambda hunk, sign: "".join(f"{line[1:]}\n" for line in hunk if line[0] in (" ", sign))  # noqa: E731
            found[path] = [(side(hunk, "-"), side(hunk, "+")) for hunk in lines]
    return found


def edited(files: dict[str, str], distribution: str) -> dict[str, str]:
    """The files of a generated package with the guide's differences; each of them has one place where it fits."""
    files = dict(files)
    for path, hunks in changes().items():
        folder, _, file = path.partition("/")
        for old, new in hunks if folder == distribution else []:
            assert files[file].count(old) == 1, f"{path} has no single place for\n{old}"
            files[file] = files[file].replace(old, new)
    return files


def write(files: dict[str, str], folder: Path) -> Path:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def install(site: Path, *packages: Path) -> Path:
    """As pip puts them for a stranger: built as wheels, away from their sources."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", site, *packages], check=True)
    return site


def python(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(Path(__file__).parent)])  # with reward functions and defects to name
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, env=environment)


def lockstep(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return python(site, "lockstep", *arguments)


def run(site: Path, folder: Path, *overrides: str, reward_model: list[str] = FUNCTION) -> subprocess.CompletedProcess[str]:
    """`lockstep run` of one stage, three iterations on a policy that starts from scratch."""
    short = ["~stages.pretrain", "~stages.sft", "~stages.reward", *PPO_ONLY, "stages.ppo.policy=new", "tracker=none"]
    return lockstep(site, "run", *short, *DECODER, *SMALL, *reward_model, *overrides, f"folder={folder}")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The guide's package, by pip."""
    pytest.importorskip("hatchling")
    package = write(FILES, tmp_path_factory.mktemp("stranger"))
    return install(tmp_path_factory.mktemp("site"), package)


@pytest.fixture
def site(tmp_path) -> Path:
    """The same as pip would leave it, to be tampered with."""
    info = tmp_path / "stranger-1.0.dist-info"
    metadata = {
        "METADATA": "Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n",
        "entry_points.txt": "[lockstep.plugins]\nstranger = stranger:plugin\n",
    }
    write(metadata, info)
    return write(FILES, tmp_path)


def test_the_guides_listings_are_found():
    reinforce = {"stranger.py", "stranger_conf/algorithm/reinforce.yaml", "pyproject.toml", "test_reinforce.py"}
    assert set(FILES) == reinforce | {"spread.py", "weighted.py"}
    assert {path.partition("/")[0] for path in changes()} == {
        "lockstep-median", "lockstep-polite", "lockstep-cut", "lockstep-strict",
    }  # fmt: skip


def test_a_strangers_algorithm_is_listed_with_its_distribution(installed):
    done = lockstep(installed, "plugins")
    assert "stranger (stranger)" in done.stdout, done.stderr


def test_a_strangers_algorithm_runs_by_name_with_its_own_configuration(installed, tmp_path):
    pytest.importorskip("torch")
    done = run(installed, tmp_path, "algorithm=reinforce")
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = next(tmp_path.glob("stages/ppo-*/metrics.jsonl")).read_text()
    assert '"policy/loss"' in metrics and "policy/approx_kl" not in metrics


def test_a_strangers_algorithm_conforms_by_the_test_in_the_guide(installed, tmp_path):
    write({"test_reinforce.py": FILES["test_reinforce.py"]}, tmp_path)
    only = "masked"
    done = python(installed, "pytest", "-q", "-p", "no:cacheprovider", "--strict-markers", "-k", only, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


GUIDES = {
    "spread:Spread": ("grpo", ["equal_rewards_say_nothing", "the_better_response_has_the_higher_advantage"]),
    "weighted:Weighted": ("online_dpo", ["equal_scores_make_no_pairs", "the_better_response_is_preferred"]),
}


@pytest.mark.parametrize("name, backend", [("spread:Spread", "torch"), ("spread:Spread", "jax"), ("weighted:Weighted", "torch")])
def test_the_guides_methods_conform(name, backend, tmp_path, monkeypatch):
    """In at most fifteen lines: what every method of their kind must do, and what all algorithms that sample must."""
    pytest.importorskip(backend)
    file, (like, names) = f"{name.partition(':')[0]}.py", GUIDES[name]
    assert len(FILES[file].strip().splitlines()) <= 15
    write({file: FILES[file]}, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = [*names, "episodes_without_a_score_are_left_out"]
    found = conform(
        "algorithm", subject("algorithm", name, backend, precision="float32", like=like), only=lambda check: check.name in names
    )
    assert {o.check.name: (o.status, o.detail) for o in found} == dict.fromkeys(names, ("passed", ""))


def test_a_configuration_that_would_shadow_another_is_refused(site):
    (site / "stranger_conf" / "algorithm" / "ppo.yaml").write_text("name: ppo\n")
    done = lockstep(site, "run", "--config")
    assert done.returncode == 1
    assert "algorithm/ppo.yaml comes from lockstep-rlhf (core) and from stranger (stranger). Rename one." in done.stdout


def test_a_plugin_that_cannot_be_imported_is_listed_and_breaks_nothing(site):
    (site / "stranger.py").write_text("raise RuntimeError('no luck')\n")
    done = lockstep(site, "plugins")
    assert "stranger (stranger) cannot be loaded: RuntimeError('no luck')" in done.stdout
    assert "ppo" in done.stdout
    done = lockstep(site, "run", *TINY, *DECODER, "algorithm.name=reinforce")
    assert "Not loaded: stranger (stranger): RuntimeError('no luck')" in done.stdout


def test_two_plugins_of_one_name_are_refused_by_name(site):
    (site / "stranger.py").write_text(FILES["stranger.py"].replace('"reinforce":', '"ppo":'))
    done = lockstep(site, "plugins")
    assert done.returncode == 1
    assert "Both lockstep-rlhf (rlhf) and stranger (stranger) register the algorithm 'ppo' for every backend" in done.stdout
