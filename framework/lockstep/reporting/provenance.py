"""Which code a run used: plugin versions, and the commits of the git checkouts involved.

Diffs, remotes and command lines are left out on purpose: they may contain secrets. This record does not decide whether a stage
is retrained; `lockstep.runs.identity.code_digests` does, from the files themselves.

A checkout may be a stranger's, and its git configuration may name programs: file watchers, hooks, filters, transports. Reading
its state runs none of them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from lockstep.registry import GROUP

GIT_SECONDS = 10
ELSEWHERE = {
    "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_NAMESPACE", "GIT_PREFIX",
}  # fmt: skip
"""Variables, set for example by git's hooks, that point git at a checkout other than the one around a folder."""
INSTALLED = {"site-packages", "dist-packages"}
"""Folders of installed packages. A checkout around one (with a virtual environment inside it) does not contain their code."""


def code_state() -> dict[str, Any]:
    """Return ``working_folder``, the git state of the folder that the program was started in (None outside a checkout), and
    ``plugins``: for each distribution that registers plugins, its ``version`` and, if it runs from a checkout, its git state.
    """
    plugins: dict[str, dict[str, Any]] = {}
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
        if entry.dist is not None and entry.dist.name not in plugins:
            plugins[entry.dist.name] = {"version": entry.dist.version, **(_package_state(entry.module) or {})}
    return {"working_folder": git_state(Path.cwd()), "plugins": plugins}


@functools.cache
def git_state(folder: Path) -> dict[str, Any] | None:
    """Return ``commit``, ``branch`` (None if the head is detached) and ``dirty`` (True if tracked files were changed). Return
    None if there is no checkout, no commit or no git, or if git fails or cannot be run safely."""
    what = ["status", "--porcelain=v2", "--branch", "--untracked-files=no", "--ignore-submodules=dirty"]
    try:
        lines = _git(folder, *_harmless(folder), *what).splitlines()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    facts = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# branch."))
    if facts["branch.oid"] == "(initial)":
        return None
    branch = None if facts["branch.head"] == "(detached)" else facts["branch.head"]
    return {"commit": facts["branch.oid"], "branch": branch, "dirty": any(not line.startswith("#") for line in lines)}


def _harmless(folder: Path) -> list[str]:
    """Return options that keep git from running any program named in the checkout's own configuration.

    Raises:
      ValueError: a filter's name contains "=", so no option can disable it.
    """
    words = _git(folder, "config", "--includes", "--show-scope", "--name-only", "--null", "--list").split("\0")
    own = {name for scope, name in zip(words[::2], words[1::2], strict=False) if scope in ("local", "worktree")}
    filters = sorted({name.rpartition(".")[0] for name in own if name.startswith("filter.")})
    if any("=" in name for name in filters):
        raise ValueError("git would read the name of such a filter up to its first =")
    nothing = [f"{name}.{setting}" for name in filters for setting in ("clean=", "smudge=", "process=", "required=false")]
    return [w for setting in ("core.fsmonitor=false", f"core.hooksPath={os.devnull}", *nothing) for w in ("-c", setting)]


def _git(folder: Path, *arguments: str) -> str:
    """Return git's output for a command in ``folder``. Only absolute folders of the PATH are searched for git. It uses the
    checkout around ``folder``, even if the environment names another, and fetches nothing.

    Raises:
      OSError, subprocess.SubprocessError: there is no git, or it fails.
    """
    places = [place for place in os.environ.get("PATH", os.defpath).split(os.pathsep) if os.path.isabs(place)]
    if (program := shutil.which("git", path=os.pathsep.join(places))) is None:
        raise FileNotFoundError("git")
    environment = {name: value for name, value in os.environ.items() if name not in ELSEWHERE} | {"GIT_ALLOW_PROTOCOL": ""}
    done = subprocess.run(
        [program, "--no-optional-locks", *arguments],
        cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace",
        timeout=GIT_SECONDS, check=True,
    )  # fmt: skip
    return done.stdout


def _package_state(module: str) -> dict[str, Any] | None:
    """The git state of a module's top-level package, without importing it."""
    spec = importlib.util.find_spec(module.partition(".")[0])
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).resolve().parent
    return None if INSTALLED & set(folder.parts) else git_state(folder)
