"""The launcher of sweeps. Hydra accepts launchers only from the namespace ``hydra_plugins``, so it lives here."""

from __future__ import annotations

import os
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig


class ProcessLauncher(Launcher):
    """Runs each job of a sweep in its own process, ``parallel`` at a time, each with an equal share of the CPU cores: jobs share
    no device state, do not compete for cores, and do not stop each other when they fail."""

    def __init__(self, parallel: int):
        self.parallel = parallel

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.loader, self.config = hydra_context.config_loader, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from lockstep.commands.run.sweeps import run_job  # it imports Hydra's configuration, which is looking for launchers now

        setup_globals()
        configs = [self.loader.load_sweep_config(self.config, list(overrides)) for overrides in job_overrides]
        free: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
        for share in core_shares(self.parallel):
            free.put(share)
        shared = list(self.config.hydra.overrides.task)

        def run(config: DictConfig) -> JobReturn:
            cores = free.get()
            overrides = list(config.hydra.overrides.task)
            label = f"{' '.join(varied(overrides, shared))} | "
            try:
                value = run_job(overrides, config, Path(config.hydra.sweep.dir), cores, label)
                return JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=value)
            finally:
                free.put(cores)

        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(run, configs))


def varied(overrides: Sequence[str], shared: Sequence[str]) -> list[str]:
    """A job's overrides that not all jobs share. Hydra has written the job's anew, and escaped the braces of ${seed}."""
    from lockstep.config.overrides import read

    common = [f"{o.get_key_element()}={o.get_value_element_as_str()}" for o in read(shared) if not o.is_sweep_override()]
    return [each.replace(r"\{", "{").replace(r"\}", "}") for each in overrides if each not in common]


def core_shares(parallel: int) -> list[set[int]]:
    """The CPU cores of this process, dealt out evenly; with too few cores, every job gets all."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [set(cores[i::parallel] or cores) for i in range(parallel)]
