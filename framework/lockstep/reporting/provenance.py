"""Which code a run used: plugin versions, and the commit of every git checkout among them.

Left out on purpose: diffs, remotes and command lines, which may contain secrets. This does not decide whether a stage is
retrained: `lockstep.runs.store.code_digests` does, from the files themselves.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import subprocess
from pathlib import Path
from typing import Any

from lockstep.registry import GROUP

GIT_SECONDS = 10
INSTALLED = {"site-packages", "dist-packages"}
"""Folders of installed packages: a checkout around one (a virtual environment inside it) does not contain their code."""


def code_state() -> dict[str, Any]:
    """``working_folder``: the git state of the folder that the program was started in, None outside a checkout.
    ``plugins``: for each distribution that announces plugins, its ``version`` and, if it runs from a checkout, its git state.
    """
    plugins: dict[str, dict[str, Any]] = {}
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
        if entry.dist is not None and entry.dist.name not in plugins:
            plugins[entry.dist.name] = {"version": entry.dist.version, **(_package_state(entry.module) or {})}
    return {"working_folder": git_state(Path.cwd()), "plugins": plugins}


@functools.cache
def git_state(folder: Path) -> dict[str, Any] | None:
    """``commit``, ``branch`` (None if the head is detached) and ``dirty``: whether tracked files were changed. None if there
    is no checkout, no commit or no git."""
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.decode(errors="replace").splitlines()
    facts = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# branch."))
    if facts["branch.oid"] == "(initial)":
        return None
    branch = None if facts["branch.head"] == "(detached)" else facts["branch.head"]
    return {"commit": facts["branch.oid"], "branch": branch, "dirty": any(not line.startswith("#") for line in lines)}


def _package_state(module: str) -> dict[str, Any] | None:
    """The git state of a module's top-level package, without importing it."""
    spec = importlib.util.find_spec(module.partition(".")[0])
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).resolve().parent
    return None if INSTALLED & set(folder.parts) else git_state(folder)
