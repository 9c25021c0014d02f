"""Where configuration files are: in the installed packages, and in the current folder."""

from __future__ import annotations

import collections
from pathlib import Path

from lockstep.errors import RegistryError
from lockstep.registry import registry

CORE = "lockstep-rlhf (core)"
HERE = "./conf"
"""Stands for the current folder's configuration where a distribution's name is expected."""


def conf_folders() -> dict[str, Path]:
    """{distribution: folder}, the core's first and the current folder's last.

    Raises:
      RegistryError: two distributions have a file of the same name.
    """
    owners: dict[Path, list[str]] = collections.defaultdict(list)
    for distribution, folder in registry().conf.items():
        for file in folder.rglob("*.yaml"):
            owners[file.relative_to(folder)].append(distribution)
    for file, distributions in owners.items():
        if len(distributions) > 1:
            raise RegistryError(f"The configuration {file} comes from {' and from '.join(distributions)}. Rename one.")
    here = Path("conf")
    own = here.is_dir() and not any(folder.is_dir() and here.samefile(folder) for folder in registry().conf.values())
    return dict(registry().conf) | ({HERE: here.absolute()} if own else {})
