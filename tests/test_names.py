"""Names that become folders: one rule, wherever they are written or read."""

import pytest

from lockstep.commands.run import run_config, sweeps
from lockstep.config.compose import compose
from lockstep.errors import ConfigError, told
from lockstep.runs.experiment import Experiment, run_name
from lockstep.runs.store import StageFolder
from lockstep.storage.names import LONGEST, NOT_RUNS, RULE, checked_name, root_folder

GOOD = [
    "a", "0", "_", "run 1", "kl=0.1", "ppo+ptx", "a@b", "1e-3", "v1.5", "café", "cafe\u0301", "学习", "हिन्दी", "con", "new",
    "a" * LONGEST,
]  # fmt: skip
BAD = {
    "": "it is empty", "a/b": "it has '/'", "../x": "it has '/'", "/etc": "it has '/'", ".": "it begins with '.'",
    "..": "it begins", ".x": "it begins",
    "-x": "it begins with '-'", " x": "it begins with ' '", "=x": "it begins", "x.": "it ends with '.'",
    "x ": "it ends with ' '", "stages": "Lockstep", "Stages": "Lockstep", "sweeps": "Lockstep", "a" * (LONGEST + 1): "101 bytes",
    "é" * 51: "102 bytes", "a" * 255: "255 bytes", "a\nb": "'\\n'", "a\0": "'\\x00'", "a\x1b[31m": "'\\x1b'",
    "a\u2028b": "'\\u2028'",
    "a\u202eb": "'\\u202e'", "a\u200bb": "'\\u200b'", "a\ud800": "'\\ud800'", "C:": "':'", "C:\\runs": "':'", "a\\b": "'\\\\'",
    "wandb:x": "':'", "a*": "'*'", "a?": "'?'", "[x]": "'['", "{x}": "'{'", "$HOME": "'$'", "~": "'~'", "a|b": "'|'",
    "a#b": "'#'",
    "a%20b": "'%'", "a;b": "';'", "a,b": "','", "it's": "\"'\"", 'a"b': "'\"'",
}  # fmt: skip


@pytest.fixture(scope="module")
def config():
    return compose(["tracker=none"])


@pytest.mark.parametrize("name", GOOD)
def test_a_name_in_any_language_is_a_folder(name, tmp_path):
    assert checked_name("The run name", name, NOT_RUNS) == name
    (tmp_path / name).mkdir()


@pytest.mark.parametrize(("name", "why"), BAD.items())
def test_a_name_that_is_no_folder_or_another_one_is_refused_with_the_reason_and_the_rule(name, why):
    with pytest.raises(ConfigError) as caught:
        checked_name("The run name", name, NOT_RUNS)
    assert str(caught.value).startswith(f"The run name {told(name)} cannot be that of a folder: ")
    assert why in str(caught.value) and str(caught.value).endswith(RULE)


@pytest.mark.parametrize("name", ["a/b", "../x", ".", "stages", ""])
def test_a_run_with_such_a_name_writes_nothing(name, config, tmp_path):
    with pytest.raises(ConfigError, match="The run name"):
        run_config(config | {"name": name, "folder": str(tmp_path / "runs")}, "test")
    assert list(tmp_path.iterdir()) == []


def test_the_rule_holds_for_names_made_from_the_configuration_and_for_stages(config):
    with pytest.raises(ConfigError, match="The run name 'a/b-torch-seed0-"):
        run_name(config | {"experiment_name": "a/b"})
    for stage in ("a/b", "..", "new", "a:b"):
        with pytest.raises(ConfigError, match=f"The stage name '{stage}' cannot be that of a folder"):
            Experiment(config | {"stages": {stage: {}}})


def test_a_backend_that_is_named_as_module_and_class_gets_folders(config, tmp_path):
    assert "-my_module-Backend-seed0-" in run_name(config | {"backend": {"name": "my_module:Backend"}})
    assert StageFolder.of(tmp_path, "sft", "my_module:Backend", {}).path.name.startswith("sft-my_module-Backend-")


@pytest.mark.parametrize("folder", ["", " ", "a\nb", "a\0", "a\ud800", None, 5])
def test_a_folder_that_is_no_path_is_refused_by_runs_and_sweeps(folder, config):
    with pytest.raises(ConfigError, match="folder="):
        root_folder(folder)
    with pytest.raises(ConfigError, match="folder"):
        Experiment(config | {"folder": folder})


def test_an_empty_folder_is_no_sweep_in_the_current_one():
    with pytest.raises(ConfigError, match="folder='' is not a path"):
        sweeps.sweep_folder(["-m", "folder=''", "seed=0,1"])


@pytest.mark.parametrize("override", ["hydra.sweep.dir=elsewhere", "+hydra.sweep.subdir=x"])
def test_a_sweep_is_not_moved_by_hydras_own_key(override):
    with pytest.raises(ConfigError, match="a sweep is kept in sweeps/<hash> of folder="):
        sweeps.sweep(["-m", "seed=0,1", override])


def test_a_tilde_is_the_home_folder_and_without_one_an_error(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(root_folder("~/runs")) == "/home/somebody/runs"
    with pytest.raises(ConfigError, match="'~no-such-user/runs': .* Write the whole path, or set HOME."):
        root_folder("~no-such-user/runs")
