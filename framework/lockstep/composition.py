"""Hydra: where configuration is found, how one run's is composed, how a sweep's jobs are started.

Every manifest's ``conf`` folder is on the search path, the core's first. Two folders that hold the same file would shadow
each other silently; that is refused.
"""

from __future__ import annotations

import collections
import logging
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.errors import ConfigCompositionException, HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lockstep.errors import ConfigError, RegistryError
from lockstep.registry import registry

log = logging.getLogger("lockstep")


class LockstepSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for distribution, folder in conf_folders().items():
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


class ProcessLauncher(Launcher):
    """Each job of a sweep in a process of its own, ``parallel`` at a time: no device state is shared, and a job that
    fails does not stop the others."""

    def __init__(self, parallel: int):
        self.parallel = parallel

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        jobs = [list(filter_overrides(overrides)) for overrides in job_overrides]
        with ThreadPoolExecutor(self.parallel) as pool:
            codes = list(pool.map(self._run, range(initial_job_idx, initial_job_idx + len(jobs)), jobs))
        failed = [overrides for overrides, code in zip(jobs, codes, strict=True) if code]
        if failed:
            lines = "\n".join(f"  lockstep run {' '.join(overrides)}" for overrides in failed)
            log.error("%d of %d jobs failed; to see one again:\n%s", len(failed), len(jobs), lines)
        return [self._returned(o, c) for o, c in zip(jobs, codes, strict=True)]

    def _run(self, number: int, overrides: list[str]) -> int:
        log.info("job %d: lockstep run %s", number, " ".join(overrides))
        return subprocess.run([sys.executable, "-m", "lockstep", "run", *overrides], check=False).returncode

    def _returned(self, overrides: list[str], code: int) -> JobReturn:
        status = JobStatus.FAILED if code else JobStatus.COMPLETED
        result: Any = ConfigError(f"lockstep run {' '.join(overrides)} ended with exit code {code}.") if code else None
        return JobReturn(overrides=overrides, status=status, _return_value=result)


Plugins.instance().register(LockstepSearchPath)
Plugins.instance().register(ProcessLauncher)
ConfigStore.instance().store(
    group="hydra/launcher",
    name="processes",
    node={"_target_": "lockstep.composition.ProcessLauncher", "parallel": 1},
)


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """One run's configuration, resolved.

    Raises:
      ConfigError: what Hydra or OmegaConf say is wrong.
    """
    try:
        with hydra.initialize_config_dir(str(conf_folders()["lockstep-rlhf (core)"]), version_base="1.3"):
            config = hydra.compose("config", overrides=list(overrides))
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, ConfigCompositionException, OmegaConfBaseException) as error:
        raise ConfigError(_in_one_line(error)) from error


def sweep(arguments: Sequence[str]) -> None:
    """``lockstep run -m ...``: Hydra's sweeper composes the jobs, `ProcessLauncher` (or the one you name) starts them."""
    sys.argv = ["lockstep run", *arguments]
    main = hydra.main(config_path=str(conf_folders()["lockstep-rlhf (core)"]), config_name="config", version_base="1.3")
    main(_job)()


def _job(config: DictConfig) -> None:
    """A job under a launcher of Hydra's that runs in this process."""
    from lockstep.cli import run_config

    run_config(OmegaConf.to_container(config, resolve=True, throw_on_missing=True), "a sweep")


def _in_one_line(error: Exception) -> str:
    """Hydra's messages end in several lines on its own options."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    return " ".join(lines)
