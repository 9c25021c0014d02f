"""`lockstep new-plugin`: packages that install, pass their own tests and conform as they are generated; and, edited as
docs/plugins.md does it, another algorithm, reward model, policy and backend."""

import difflib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.checking.scaffold import class_name, new_plugin, package
from lockstep.errors import ConfigError
from test_plugins import edited, install, lockstep, python, run, write

ROOT = Path(__file__).parents[1]
GENERATED = {
    "plain_reinforce": "algorithm", "brief": "reward_model", "riddle": "environment", "terse": "labeler",
    "urgent": "attacker", "distant": "engine", "unscaled": "policy", "exact": "backend",
}  # fmt: skip
EDITED = {"median": "algorithm", "polite": "reward_model", "cut": "policy", "strict": "backend"}


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> dict[str, Path]:
    """{name: the folder of its sources}: those of GENERATED as they are, those of EDITED with the guide's differences."""
    where = tmp_path_factory.mktemp("packages")
    folders = {name: new_plugin(name, kind, where) for name, kind in (GENERATED | EDITED).items()}
    for name, kind in EDITED.items():
        write(edited(package(name, kind), f"lockstep-{name}"), folders[name])
    return folders


@pytest.fixture(scope="module")
def site(packages, tmp_path_factory) -> Path:
    pytest.importorskip("hatchling")
    return install(tmp_path_factory.mktemp("site"), *packages.values())


def own_tests(site: Path, folders: list[Path], only: str) -> str:
    """Run the packages' own tests; the last lines of what pytest says."""
    options = ["-p", "no:cacheprovider", "--strict-markers", "-W", "error::pytest.PytestWarning"]
    done = python(site, "pytest", *options, "-k", only, *folders)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout[-300:]


# ------------------------------------------------------------------------------------------------------ as they are written


def test_generated_packages_pass_their_own_tests_on_torch(site, packages):
    """Of the algorithm's checks a few: those of the edited one are run in full."""
    pytest.importorskip("torch")
    quick = "masked or orders or one_finite or failures or forwards or take_no_step or describes"
    said = own_tests(
        site,
        [packages[name] for name in GENERATED],
        f"not conformance or episodes_are_apart or newest_weights or (torch-float32 and ({quick}))",
    )
    assert re.search(r"\d\d passed", said), said


def test_all_plugins_are_listed_and_usable(site):
    done = lockstep(site, "plugins")
    for name, kind in (GENERATED | EDITED).items():
        assert re.search(rf"{kind} +{name} .*lockstep-{name.replace('_', '-')} .*yes", done.stdout), done.stdout + done.stderr
    choices = " ".join(done.stdout.split())
    assert "algorithm=grpo" in choices and "experiment=demo" in choices and "algorithm=ppo," not in choices


@pytest.mark.parametrize("kind", GENERATED.values())
def test_generated_files_are_formatted_and_free_of_placeholders(kind, tmp_path):
    pytest.importorskip("ruff")
    folder = new_plugin("a_name", kind, tmp_path)
    for file in filter(Path.is_file, folder.rglob("*")):
        assert not re.search(r"\{\{|NAME", file.read_text()), file
    rules = ["--isolated", "--line-length", "130"]
    for command in (["check", "--select", "E,F,I,UP,B,SIM"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, *rules, "."], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# -------------------------------------------------------------------------------------------------------- as a person edits


def written_by_hand(name: str, kind: str) -> int:
    """Lines of the edited package that are not in the generated one."""
    before = package(name, kind)
    after = edited(before, f"lockstep-{name}")
    changed = [difflib.ndiff(before[path].splitlines(), after[path].splitlines()) for path in after]
    return sum(line.startswith("+ ") for lines in changed for line in lines)


def test_a_new_algorithm_takes_fewer_than_twenty_lines():
    assert 5 < written_by_hand("median", "algorithm") < 20


@pytest.mark.parametrize("name", ["polite", "cut", "strict"])
def test_the_guides_other_plugins_take_fewer_than_ten_lines(name):
    assert 0 < written_by_hand(name, EDITED[name]) < 10


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_the_new_algorithm_passes_its_own_tests_and_conforms(site, packages, backend):
    pytest.importorskip(backend)
    said = own_tests(site, [packages["median"]], f"not conformance or {backend}-float32")
    assert re.search(r"\d+ passed, \d+ skipped", said), said


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_the_new_algorithm_policy_and_reward_model_run_together_by_name(site, tmp_path, backend):
    pytest.importorskip(backend)
    names = ["algorithm=median", "policy=cut", f"backend={backend}"]
    done = run(site, tmp_path, *names, reward_model=["reward_model=polite"])
    assert done.returncode == 0, done.stdout + done.stderr
    (metrics,) = tmp_path.glob("stages/ppo-*/metrics.jsonl")
    assert metrics.read_text().count('"objective/score"') == 3


def test_the_guides_other_plugins_pass_their_own_tests_on_torch(site, packages):
    """With a few of the checks: the classes they inherit from have theirs in test_conformance.py."""
    pytest.importorskip("torch")
    quick = "one_finite or failures or round_trip or makes_the_same or take_no_step or describes"
    where = "torch-float32 or strict-float32"
    own_tests(site, [packages[name] for name in ("polite", "cut", "strict")], f"not conformance or (({where}) and ({quick}))")


# ------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("Best-of-N", "algorithm", r"'Best-of-N' cannot be the name .* Try: lockstep new-plugin best_of_n --kind algorithm"),
        ("class", "policy", r"'class' cannot be the name of a module. Use small letters, digits and single underscores."),
        ("ppo", "algorithm", r"The algorithm 'ppo' exists, from lockstep-rlhf \(rlhf\). Choose another name."),
        ("torch", "algorithm", r"A module lockstep_torch is already installed. Choose another name than 'torch'."),
        ("rollout", "algorithm", r"The class of 'rollout' would be Rollout, which means something else. Choose another name."),
        ("fine", "algoritm", r"There is no template of kind 'algoritm'. Did you mean 'algorithm'\? Kinds: backend, policy,"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path, name, kind, message):
    with pytest.raises(ConfigError, match=message):
        new_plugin(name, kind, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path):
    write({"lockstep-mine/README.md": "mine\n"}, tmp_path)
    with pytest.raises(ConfigError, match=r"lockstep-mine already exists and was not changed. Choose another name, or move"):
        new_plugin("mine", "algorithm", tmp_path)
    assert [path.name for path in (tmp_path / "lockstep-mine").iterdir()] == ["README.md"]


def test_it_says_what_to_type_next(tmp_path, capsys):
    new_plugin("best_of_n", "reward_model", tmp_path)
    said = capsys.readouterr().out
    for command in (
        "cd lockstep-best-of-n",
        "pip install -e",
        "python -m pytest",
        "lockstep check best_of_n --kind reward_model",
    ):
        assert command in said


def test_classes_are_named_after_their_components():
    assert [class_name(name) for name in ("median", "best_of_n", "v2_x")] == ["Median", "BestOfN", "V2X"]
