"""Hydra: where configuration is found, how one run's is composed, how a sweep's jobs are started.

Every manifest's ``conf`` folder is on the search path, the core's first. Two folders that hold the same file would shadow
each other silently; that is refused.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lockstep.errors import ConfigError, RegistryError
from lockstep.registry import registry

CORE = "lockstep-rlhf (core)"


class LockstepSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for distribution, folder in conf_folders().items():
            if distribution != CORE:  # the core's is the primary folder already
                search_path.append(distribution, f"file://{folder}")


def conf_folders() -> dict[str, Path]:
    """{distribution: folder}, the core's first.

    Raises:
      RegistryError: two folders hold a file of the same name.
    """
    owners: dict[Path, list[str]] = collections.defaultdict(list)
    for distribution, folder in registry().conf.items():
        for file in folder.rglob("*.yaml"):
            owners[file.relative_to(folder)].append(distribution)
    for file, distributions in owners.items():
        if len(distributions) > 1:
            raise RegistryError(f"The configuration {file} comes from {' and from '.join(distributions)}. Rename one.")
    return dict(registry().conf)


Plugins.instance().register(LockstepSearchPath)
ConfigStore.instance().store(
    group="hydra/launcher",
    name="processes",
    node={"_target_": "hydra_plugins.lockstep_launcher.ProcessLauncher", "parallel": 1},
)


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """One run's configuration, resolved.

    Raises:
      ConfigError: what Hydra or OmegaConf say is wrong.
    """
    try:
        with hydra.initialize_config_dir(str(conf_folders()[CORE]), version_base="1.3"):
            config = hydra.compose("config", overrides=list(overrides))
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, ConfigCompositionException, OmegaConfBaseException) as error:
        raise ConfigError(_in_one_line(error)) from error


def sweep(arguments: Sequence[str]) -> None:
    """``lockstep run -m ...``: Hydra's sweeper composes the jobs, `ProcessLauncher` (or the one you name) starts them."""
    sys.argv = ["lockstep run", *arguments]
    main = hydra.main(config_path=str(conf_folders()[CORE]), config_name="config", version_base="1.3")
    main(_job)()


def _job(config: DictConfig) -> None:
    """A job under a launcher of Hydra's that runs in this process."""
    from lockstep.cli import run_config

    run_config(OmegaConf.to_container(config, resolve=True, throw_on_missing=True), "a sweep")


def _in_one_line(error: Exception) -> str:
    """Hydra's messages end in several lines on its own options."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    return " ".join(lines)
