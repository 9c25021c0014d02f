"""The command line as a process: what it runs, what it says when its surroundings are odd, and how it ends."""

import concurrent.futures
import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lockstep import cli, registry
from lockstep.commands import plugins
from lockstep.commands.run import sweeps
from lockstep.config.compose import compose
from lockstep.errors import ConfigError, RegistryError
from lockstep.reporting.console import Console
from lockstep.runs import identity
from lockstep.runs.experiment import Experiment
from lockstep.runs.interrupts import GracefulStop, terminable
from lockstep.runs.runner import Runner
from lockstep.storage.files import read_json
from runs import DECODER, TINY
from test_sweeps import ALONE

LOCKSTEP = [sys.executable, "-P", "-c", "from lockstep.cli import main; main()"]
"""As the installed script starts: its own folder is first on the path, not the current one."""


# ---------------------------------------------------------------------------------------------------- the current folder


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A current folder full of code that leaves a file 'ran' if it runs."""
    monkeypatch.chdir(tmp_path)
    code = f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__ + ' ')\n"
    for name in (
        "json",
        "yaml",
        "rich",
        "omegaconf",
        "hydra",
        "numpy",
        "pandas",
        "difflib",
        "argparse",
        "matplotlib",
        "sitecustomize",
    ):
        (tmp_path / f"{name}.py").write_text(code)
    for package in ("hydra_plugins", "lockstep_torch"):  # a namespace whose every module Hydra imports; a plugin of ours
        (tmp_path / package).mkdir()
        (tmp_path / package / "mine.py").write_text(code)
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lockstep.plugins]\nmine = json:plugin\n")
    return tmp_path


def test_no_file_of_the_current_folder_stands_in_for_a_library_or_is_taken_for_a_plugin(trap):
    commands = [["cache", "folder=runs"], ["compare", "nothing"], ["plugins"], ["run", "--config"]]
    code = "import sys\nfrom lockstep.cli import main\n"
    for command in commands:
        code += f"sys.argv = {['lockstep', *command]!r}\ntry: main()\nexcept SystemExit: pass\n"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert "0 stages in runs/stages" in done.stdout and "No folder 'nothing'" in done.stdout and "experiment_name" in done.stdout
    module = subprocess.run([sys.executable, "-m", "lockstep", "plugins"], capture_output=True, text=True)
    assert module.returncode == 0 and "torch" in module.stdout, module.stdout + module.stderr
    assert not (trap / "ran").exists(), (trap / "ran").read_text()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder that is not on the path yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    return tmp_path


def test_code_of_ones_own_in_the_current_folder_is_found_when_the_configuration_names_it(here):
    (here / "my_own_module.py").write_text("class Mine: pass\ndef scores(prompts, responses): return []\n")
    digests = identity.code_digests(["my_own_module"])
    assert "my_own_module" in digests and sys.path[-1] == str(here)
    assert registry.Registry().resolve("algorithm", "my_own_module:Mine").__name__ == "Mine"
    assert registry.function_at("my_own_module:scores", "key")([], []) == []


def test_what_such_code_imports_from_beside_it_decides_results_too(here):
    (here / "my_rewards.py").write_text("import json, numpy\nfrom my_helper import weight\nimport my_parts.first as first\n")
    (here / "my_parts").mkdir()
    for file in ("my_helper.py", "my_unread.py", "my_parts/__init__.py", "my_parts/first.py"):
        (here / file).write_text("weight = 1\n")
    before = identity.code_digests(["my_rewards"])
    assert before.keys() == {"lockstep", "my_rewards", "my_helper", "my_parts"}
    (here / "my_helper.py").write_text("weight = -1\n")
    after = identity.code_digests(["my_rewards"])
    assert [name for name in before if before[name] != after[name]] == ["my_helper"]


def test_a_module_of_ones_own_with_the_name_of_a_library_says_that_it_is_in_the_way(here):
    (here / "colorsys.py").write_text("def scores(prompts, responses): return []\n")
    for call, error in (
        (lambda name: registry.function_at(name, "key"), ConfigError),
        (lambda name: registry.Registry().resolve("algorithm", name), RegistryError),
    ):
        with pytest.raises(
            error, match=r"no attribute 'scores'.* \./colorsys.py is not used, because a library has its name .*: rename"
        ):
            call("colorsys:scores")


@pytest.mark.parametrize("ending", ["sys.exit()", "sys.exit(3)", "raise GeneratorExit", "1 / 0", "raise SystemExit('bye')"])
def test_a_module_of_ones_own_that_exits_when_imported_is_an_error(here, ending, request):
    name = f"exits_{abs(hash(ending))}"
    (here / f"{name}.py").write_text(f"import sys\n{ending}\n")
    with pytest.raises(ConfigError, match=f"key='{name}:f' cannot be imported: "):
        registry.function_at(f"{name}:f", "key")
    with pytest.raises(RegistryError, match=f"{name}:F\\) cannot be imported: "):
        registry.Registry().resolve("algorithm", f"{name}:F")


# ------------------------------------------------------------------------------------------------------- odd surroundings


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lockstep", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize("command", [["plugins"], ["run", "--config"], ["--help"]], ids=" ".join)
def test_a_closed_pipe_ends_no_command_with_an_error(command):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*LOCKSTEP, *command], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_work_continues_when_nobody_reads_what_it_prints(tmp_path):
    code = (
        "import sys; from pathlib import Path; from lockstep.reporting.console import Console, tell\n"
        "console = Console()\nfor i in range(3): console.say('x'); tell('y'); console.out.print('z')\n"
        "Path(sys.argv[1]).write_text('done')"
    )
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", code, str(tmp_path / "end")]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr, (tmp_path / "end").read_text()) == (0, "", "done")


def test_closed_output_is_no_error():
    closed = f"exec {sys.executable} -P -m lockstep plugins >&- 2>&-"
    assert subprocess.run(["sh", "-c", closed]).returncode == 0


def test_a_broken_pipe_of_something_else_is_not_taken_for_the_outputs(monkeypatch):
    def broken(*_):
        raise BrokenPipeError(errno.EPIPE, "the server has gone")

    monkeypatch.setattr(plugins, "run", broken)
    monkeypatch.setattr(sys, "argv", ["lockstep", "plugins"])
    with pytest.raises(BrokenPipeError, match="the server has gone"):
        cli.main()


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.EACCES])
def test_a_place_that_cannot_be_written_is_named_without_a_traceback(monkeypatch, capsys, number):
    def fails(*_):
        raise OSError(number, os.strerror(number), "the/place")

    monkeypatch.setattr(plugins, "run", fails)
    assert run_main(monkeypatch, "plugins") == 1
    assert "'the/place'. Choose another place for it, or another name." in capsys.readouterr().out


def test_a_removed_current_folder_is_named(monkeypatch, capsys):
    def gone():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", gone)
    assert run_main(monkeypatch, "plugins") == 1
    assert "ConfigError: The current folder has been removed." in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------- SIGTERM


def test_only_ctrl_c_insists(caplog):
    with GracefulStop() as stop:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.asked and caplog.text.count("stopping after this step") == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_sigterm_interrupts_once_and_then_is_as_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # while the first is being recorded
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminable(), GracefulStop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.asked and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def hang_up():
    """A closed terminal ends this process, even if it was started by `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("where", "number"), [("_plan", signal.SIGTERM), ("_train", signal.SIGTERM), ("_train", signal.SIGHUP)])
def test_sigterm_outside_training_leaves_a_stopped_run_and_stage(tmp_path, monkeypatch, hang_up, where, number):
    def terminated(self, *_):
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(Runner, where, terminated)
    experiment = Experiment(compose([*TINY, *DECODER, f"folder={tmp_path}", *ALONE]))
    with pytest.raises(KeyboardInterrupt):
        Runner(experiment, Console(), "test").run()
    record = read_json(tmp_path / experiment.name / "run.json")
    assert record["status"] == "stopped" and "finished" in record
    assert [stage["status"] for stage in record["stages"].values()] == (["stopped"] if where == "_train" else [])


def test_sigterm_stops_the_jobs_of_a_sweep_and_starts_no_other(tmp_path, monkeypatch):
    """Each job is a script that waits for SIGTERM, as a `lockstep run` that saves and stops."""
    script = tmp_path / "job"
    ends = """trap 'printf "saved \\377\\n"; exit 130' TERM"""
    script.write_text(f"#!/bin/sh\n{ends}\ntouch {tmp_path}/begun\nwhile :; do sleep 0.02; done\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    sweeps._stopping.clear()
    found = []

    def terminate():
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    with pytest.raises(KeyboardInterrupt), terminable(sweeps._stop_jobs), concurrent.futures.ThreadPoolExecutor(1) as pool:
        list(pool.map(lambda job: found.append(sweeps._run([job], None, "")), ["seed=0", "seed=1"]))
    assert found[0] == ("stopped", "saved \ufffd")  # what is not UTF-8 stops no sweep
    assert found[1:] in ([], [("stopped", "the sweep was stopped before this job began")])
    sweeps._stopping.clear()


def test_a_user_without_a_home_has_one_until_the_command_ends(tmp_path):
    code = (
        "import os, pwd, sys\n"
        "def nobody(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = nobody\n"
        "from lockstep import cli\n"
        "from lockstep.commands import plugins\n"
        "from lockstep.storage.files import expanded\n"
        "plugins.run = lambda *_: (expanded('~/cache').mkdir(parents=True), print(os.environ['HOME']))\n"
        "sys.argv = ['lockstep', 'plugins']\n"
        "cli.main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HOME"} | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(str(tmp_path)), done.stdout + done.stderr
    assert f"There is no home folder (HOME is not set): {done.stdout.strip()} is used" in done.stderr
    assert list(tmp_path.iterdir()) == []
