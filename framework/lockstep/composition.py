"""Hydra: where configuration is found, how one run's is composed, how a sweep's jobs are started.

Every manifest's ``conf`` folder is on the search path, the core's first. Two folders that hold the same file would shadow
each other silently; that is refused.
"""

from __future__ import annotations

import collections
import functools
import os
import queue
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

from lockstep.errors import ConfigError, LockstepError, RegistryError
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


class ProcessLauncher(Launcher):
    """Each job of a sweep in a process of its own, ``parallel`` at a time with an equal share of the CPU cores each: no
    device state is shared, cores are not fought over, and a job that fails does not stop the others."""

    def __init__(self, parallel: int):
        self.parallel = parallel

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        jobs = [list(filter_overrides(overrides)) for overrides in job_overrides]
        free: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
        for share in core_shares(self.parallel):
            free.put(share)

        def run(overrides: list[str]) -> int:
            cores = free.get()
            try:
                return run_job(overrides, cores)
            finally:
                free.put(cores)

        with ThreadPoolExecutor(self.parallel) as pool:
            codes = list(pool.map(run, jobs))
        if failed := [overrides for overrides, code in zip(jobs, codes, strict=True) if code]:
            lines = "\n".join(f"  lockstep run {' '.join(overrides)}" for overrides in failed)
            raise SweepFailed(f"{len(failed)} of {len(jobs)} jobs failed; to run one again:\n{lines}")
        return [JobReturn(overrides=o, status=JobStatus.COMPLETED, _return_value=None) for o in jobs]


class SweepFailed(LockstepError):
    """Some jobs of a sweep failed; the others are done."""


def core_shares(parallel: int) -> list[set[int]]:
    """The CPU cores of this process, dealt out evenly; everybody gets all of them where there are too few."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [set(cores[i::parallel] or cores) for i in range(parallel)]


def run_job(overrides: list[str], cores: set[int]) -> int:
    """One ``lockstep run`` on these cores, its lines printed behind its overrides; the exit code."""
    label = " ".join(overrides[-3:])
    pin = functools.partial(os.sched_setaffinity, 0, cores) if cores else None
    command = [sys.executable, "-m", "lockstep", "run", *overrides]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=pin) as job:
        for line in job.stdout:
            print(f"{label} | {line}", end="", flush=True)
    return job.returncode


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
