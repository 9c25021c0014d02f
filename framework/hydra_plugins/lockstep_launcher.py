"""The launcher of sweeps. Hydra accepts launchers only from the namespace ``hydra_plugins``, so it lives here."""

from __future__ import annotations

import functools
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from lockstep import composition


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
        composition.FAILED += [overrides for overrides, code in zip(jobs, codes, strict=True) if code]
        ended = zip(jobs, codes, strict=True)
        return [JobReturn(overrides=o, status=JobStatus.COMPLETED, _return_value=code) for o, code in ended]


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
