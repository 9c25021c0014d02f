"""Which code a run was made with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.metadata import version

import pytest

from lockstep.reporting import provenance
from lockstep.reporting.provenance import code_state, git_state

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
IDENTITY = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]


@pytest.fixture(autouse=True)
def not_remembered():
    git_state.cache_clear()
    yield
    git_state.cache_clear()


@pytest.fixture
def checkout(tmp_path):
    """One commit on the branch 'work', with a remote whose address holds a password."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "code.py").write_text("x = 1\n")
    git(folder, "init", "--quiet", "--initial-branch=work")
    git(folder, "remote", "add", "origin", "https://me:hunter2@example.org/code.git")
    git(folder, "add", "code.py")
    git(folder, "commit", "--quiet", "--message=first")
    return folder


def git(folder, *arguments):
    return subprocess.run(["git", *IDENTITY, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_a_checkout_has_commit_and_branch_and_says_whether_tracked_files_were_changed(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    (checkout / "runs").mkdir()
    (checkout / "runs" / "metrics.jsonl").write_text("results are not code")
    assert git_state(checkout) == {"commit": commit, "branch": "work", "dirty": False}
    git_state.cache_clear()
    (checkout / "code.py").write_text("api_key = 'hunter2'\n")
    assert git_state(checkout) == {"commit": commit, "branch": "work", "dirty": True}


def test_a_detached_head_has_no_branch(checkout):
    git(checkout, "checkout", "--quiet", "--detach")
    assert git_state(checkout)["branch"] is None


def test_no_checkout_no_commit_and_no_git_are_no_state(tmp_path, checkout, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert git_state(tmp_path / "empty") is None
    git(tmp_path / "empty", "init", "--quiet")
    git_state.cache_clear()
    assert git_state(tmp_path / "empty") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(checkout) is None


def test_the_state_names_the_plugins_with_their_versions_and_holds_no_secret(checkout, monkeypatch):
    (checkout / "code.py").write_text("api_key = 'hunter2'\n")
    monkeypatch.chdir(checkout)
    state = code_state()
    assert state["working_folder"]["dirty"] and "hunter2" not in json.dumps(state)
    assert state["plugins"]["lockstep-rlhf"]["version"] == version("lockstep-rlhf")


TRAPS = {
    "fsmonitor": '[core]\n\tfsmonitor = "{ran}; false"\n',
    "filter": '[filter "mine"]\n\tclean = {ran}\n\trequired = true\n',
    "process": '[filter "my.own"]\n\tprocess = {ran}\n[filter "mine"]\n\tclean = {ran}\n',
    "included": "[include]\n\tpath = trap\n",
    "equals": '[filter "a=b"]\n\tclean = {ran}\n',
    "hooks": "[core]\n\thooksPath = hooks\n",
    "pager": "[core]\n\tpager = {ran}\n[pager]\n\tstatus = true\n[status]\n\tsubmoduleSummary = true\n",
    "alias": "[alias]\n\tstatus = !{ran}\n\tconfig = !{ran}\n",
}


@pytest.mark.parametrize("trap", TRAPS)
def test_asking_for_the_state_of_a_checkout_runs_nothing_that_its_configuration_names(checkout, trap, tmp_path):
    script, mark = tmp_path / "script", tmp_path / "ran"
    script.write_text(f"#!/bin/sh\ntouch {mark}\ncat\n")
    script.chmod(0o755)
    folder = checkout / ".git"
    (folder / "trap").write_text(TRAPS["filter"].format(ran=script))
    (checkout / "hooks").mkdir()
    shutil.copy(script, checkout / "hooks" / "post-index-change")
    (checkout / ".gitattributes").write_text("*.py filter=mine\n")
    git(checkout, "add", ".gitattributes")
    git(checkout, "commit", "--quiet", "--message=second")
    with open(folder / "config", "a") as config:
        config.write(TRAPS[trap].format(ran=script))
    (folder / "info").mkdir(exist_ok=True)
    (folder / "info" / "attributes").write_text(
        "*.py filter=my.own\n" if trap == "process" else "*.py filter=a=b\n" * (trap == "equals")
    )
    os.utime(checkout / "code.py", (1, 1))  # git has to look at what is in it
    state = git_state(checkout)
    assert not mark.exists()
    assert (state is None) == (trap == "equals") and (state is None or state["branch"] == "work")


def test_the_environment_names_no_other_checkout_and_the_current_folder_no_other_git(checkout, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    git(tmp_path / "other", "init", "--quiet", "--initial-branch=another")
    expected = git_state(checkout)
    git_state.cache_clear()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    (checkout / "git").write_text("#!/bin/sh\nexit 1\n")
    (checkout / "git").chmod(0o755)
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("PATH", f".::{os.environ['PATH']}")
    assert git_state(checkout) == expected and expected["branch"] == "work"


def test_an_installed_package_is_not_taken_for_part_of_the_checkout_around_its_environment(checkout, monkeypatch):
    package = checkout / ".venv" / "lib" / "site-packages" / "my_plugin"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(package.parent)
    assert provenance._package_state("my_plugin.manifest") is None
    source = checkout / "my_other_plugin"
    source.mkdir()
    (source / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(checkout)
    assert provenance._package_state("my_other_plugin.manifest")["branch"] == "work"
