"""`lockstep run -m ...`: many runs from one command, whatever launcher starts them.

Hydra's sweeper composes the jobs (a grid, Optuna) and its launcher starts them (processes here, Slurm, Ray). Each job is a
`lockstep run` in its own process: jobs share no device state, and a crash takes down one job only. The overrides name the
sweep's folder, so the same command resumes the same sweep:

    <folder>/sweeps/<hash>/sweep.json   {"command", "started", "jobs": [{"overrides", "run", "status", "error", "objective"}]}

The file is rewritten whenever a job starts or ends, wherever it runs. ``status`` is running, done, failed or stopped.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import fcntl
import functools
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Glob, Override
from omegaconf import DictConfig

from lockstep.config.compose import compose, resolved
from lockstep.config.folders import CORE, conf_folders
from lockstep.config.overrides import hydra_value, read, shell
from lockstep.config.secrets import redact, without_secrets
from lockstep.errors import ConfigError, LockstepError, did_you_mean, listing
from lockstep.reporting.console import tell
from lockstep.runs import identity
from lockstep.runs.experiment import finished, run_name
from lockstep.runs.interrupts import terminable
from lockstep.runs.measures import flatten
from lockstep.storage.files import write_json, write_text
from lockstep.storage.names import root_folder
from lockstep.storage.records import DONE, RUN, SWEEP, read_record, stage_folders

NEEDS = {
    "hydra/sweeper=optuna": "hydra_optuna_sweeper",
    "hydra/sweeper=search": "hydra_optuna_sweeper",
    "hydra/launcher=slurm": "hydra_submitit_launcher",
    "hydra/launcher=slurm_local": "hydra_submitit_launcher",
    "hydra/launcher=submitit_local": "hydra_submitit_launcher",
    "hydra/launcher=submitit_slurm": "hydra_submitit_launcher",
    "hydra/launcher=ray": "hydra_ray_launcher",
    "hydra/launcher=ray_jobs": "hydra_ray_launcher",
}
"""Choices that need an extra package."""
LAST_LINES = 5


class SweepFailed(LockstepError):
    """Some jobs of a sweep failed or were stopped; the others are done."""


# ------------------------------------------------------------------------------------------------------- the sweep


def sweep(arguments: Sequence[str]) -> str:
    """Run all jobs that are not done yet. Returns the closing summary.

    Raises:
        ConfigError: the sweep cannot work; raised before any job starts.
        SweepFailed: some jobs failed or were stopped; raised after all have run.
    """
    _check_installed(arguments)
    _stopping.clear()
    record = SweepFolder(sweep_folder(arguments))
    record.begin(shlex.join(["lockstep", "run", *without_secrets(arguments)]))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray starts: no usage reports
    sys.argv = ["lockstep run", *arguments, f"hydra.sweep.dir={hydra_value(str(record.path))}"]

    @hydra.main(config_path=str(conf_folders()[CORE]), config_name="config", version_base="1.3")
    def job(config: DictConfig) -> float | None:
        return run_job(list(HydraConfig.get().overrides.task), config, Path(HydraConfig.get().sweep.dir))

    try:
        with terminable(_stop_jobs):
            job()
    except SystemExit:  # Hydra has printed the reason
        if not record.jobs("failed", "running"):
            raise
    return _outcome(record)


def _check_installed(arguments: Sequence[str]) -> None:
    for argument in arguments:
        if re.match(r"[+~]*hydra\.sweep\.(dir|subdir)\b", argument):
            raise ConfigError(f"{argument}: a sweep is kept in sweeps/<hash> of folder=..., to resume there. Leave this out.")
        module = NEEDS.get(argument)
        if module and importlib.util.find_spec(f"hydra_plugins.{module}") is None:
            package, extra = module.replace("_", "-"), "ray" if "ray" in module else "sweeps"
            raise ConfigError(f"{argument} needs {package}, which is not installed. Type: pip install 'lockstep-rlhf[{extra}]'")


def sweep_folder(arguments: Sequence[str]) -> Path:
    """The folder of the sweep's record: in the root folder that its jobs share, named by a hash of the arguments that decide the
    jobs."""
    decisive = [a for a in arguments if not re.match(r"-|hydra[/.]launcher", a)]
    overrides = read([a for a in arguments if not a.startswith("-")])
    _check_parallel(overrides)
    first = compose([line for o in overrides if not o.key_or_group.startswith("hydra") and (line := _first(o))])
    digest = identity.digest({"overrides": sorted(without_secrets(decisive))})[:8]
    return root_folder(first["folder"]).absolute() / "sweeps" / digest


def _first(override: Override) -> str | None:
    """The override with the first of its swept values, or with the start of an interval; None for a pattern of file names."""
    if not override.is_sweep_override():
        return override.input_line
    if isinstance(swept := override.value(), Glob):
        return None
    first = next(override.sweep_string_iterator(), None) if override.is_discrete_sweep() else swept.start
    if first is None:
        raise ConfigError(f"{override.input_line} gives no value, so there would be no job.")
    return f"{override.get_key_element()}={first}"


def _check_parallel(overrides: Sequence[Override]) -> None:
    for given in overrides:
        if given.key_or_group == "hydra.launcher.parallel":
            value = given.value()
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{given.input_line} must be at least 1: how many jobs run at a time.")


def _outcome(record: SweepFolder) -> str:
    jobs = record.jobs()
    lost = [job for job in jobs if job["status"] != "done"]
    done = f"{len(jobs) - len(lost)} of {len(jobs)} jobs are done. The sweep is in {record.path}."
    if lost:
        lines = "\n".join(f"  lockstep run {' '.join(map(shell, job['overrides']))}\n{_indented(_fate(job))}" for job in lost)
        stopped = sum(job["status"] == "stopped" for job in lost)
        fates = [f"{n} {fate}" for n, fate in ((len(lost) - stopped, "failed"), (stopped, "stopped")) if n]
        raise SweepFailed(f"Jobs: {', '.join(fates)}. To rerun one:\n{lines}\n{done} The same command runs the rest.")
    return f"{done} To compare them: lockstep compare {shell(str(record.path))}"


def _fate(job: Mapping[str, Any]) -> str:
    return job.get("error") or "it stopped reporting: its process or machine is gone"


def _indented(text: str) -> str:
    return "\n".join(f"      {line}" for line in text.splitlines())


# ------------------------------------------------------------------------------------------------------- its record


@dataclass(frozen=True)
class SweepFolder:
    """``sweep.json``, which several processes write, one at a time."""

    path: Path

    def begin(self, command: str) -> None:
        with self._changed() as record:
            record.setdefault("command", command)
            record.setdefault("started", datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    def note(self, overrides: list[str], **facts: Any) -> None:
        """Record these facts about the job with these overrides."""
        overrides = without_secrets(overrides)
        if error := facts.get("error"):
            facts["error"] = redact(error)
        with self._changed() as record:
            self._hide_secrets_of_hydra()
            job = next((job for job in record["jobs"] if job["overrides"] == overrides), None)
            if job is None:
                record["jobs"].append(job := {"overrides": overrides})
            job.update(facts)

    def _hide_secrets_of_hydra(self) -> None:
        """Remove secrets from the file in which Hydra, before the first job, writes the configuration that it composed."""
        file = self.path / "multirun.yaml"
        composed = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None
        if composed != (hidden := without_secrets(composed)):
            write_text(file, yaml.safe_dump(hidden, sort_keys=False))

    def jobs(self, *status: str) -> list[dict[str, Any]]:
        """All jobs, or those with these statuses."""
        jobs = read_record(self.path / "sweep.json", SWEEP)["jobs"]
        return [job for job in jobs if not status or job["status"] in status]

    @contextlib.contextmanager
    def _changed(self) -> Iterator[dict[str, Any]]:
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "sweep.json"
        with open(self.path / "lock", "a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            record = read_record(file, SWEEP) if file.exists() else {"jobs": []}
            yield record
            write_json(file, record)


# ------------------------------------------------------------------------------------------------------- a job


def run_job(
    overrides: list[str], config: DictConfig, folder: Path, cores: set[int] | None = None, label: str = ""
) -> float | None:
    """Run one job of the sweep in ``folder``, on these cores. The lines that it prints are shown after ``label``. Returns its
    objective, or None if there is none or the job failed. Errors are recorded, not raised, so that launchers and sweepers
    continue."""
    record, place = SweepFolder(folder), None
    try:
        groups = resolved(config)
        run = root_folder(groups["folder"]) / run_name(groups)
        place = os.path.relpath(run, folder.parents[1])
        record.note(overrides, run=place, status="running", error=None, objective=None)
        status, error = ("done", None) if _done_already(groups, label) else _run(overrides, cores, label)
        value = objective(run, groups["objective"]) if status == "done" and groups["objective"] else None
    except (LockstepError, OSError) as problem:
        status, error, value = "failed", f"{type(problem).__name__}: {problem}", None
    record.note(overrides, run=place, status=status, error=error, objective=value)
    return value


def _done_already(groups: Mapping[str, Any], label: str) -> bool:
    with contextlib.suppress(LockstepError):  # the job's own process reports errors
        if run := finished(groups):
            tell(f"{label}run {run.name} is already done\n")
            return True
    return False


_running: set[subprocess.Popen[str]] = set()
_stopping = threading.Event()


def _stop_jobs() -> None:
    """Ask every job to save its state and stop. No job starts after this."""
    _stopping.set()
    for job in list(_running):
        job.terminate()


def _run(overrides: list[str], cores: set[int] | None, label: str) -> tuple[str, str | None]:
    """(status, error) of a `lockstep run` in its own process."""
    if _stopping.is_set():
        return "stopped", "the sweep was stopped before this job began"
    pin = functools.partial(os.sched_setaffinity, 0, cores) if cores else None
    command = [sys.executable, "-P", "-m", "lockstep", "run", *overrides]
    pipes: dict[str, Any] = {
        "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace",
        "env": os.environ | {"PYTHONIOENCODING": "utf-8"},
    }  # fmt: skip
    lines: collections.deque[str] = collections.deque(maxlen=100)
    with subprocess.Popen(command, **pipes, preexec_fn=pin) as job:
        _running.add(job)
        if _stopping.is_set():
            job.terminate()
        for line in job.stdout:
            tell(f"{label}{line}")
            lines.append(line.rstrip())
    _running.discard(job)
    if job.returncode == 0:
        return "done", None
    killed = f"killed by {signal.Signals(-job.returncode).name}; its last lines:\n" if job.returncode < 0 else ""
    return "stopped" if job.returncode == 130 else "failed", killed + last_words([line for line in lines if line])


def last_words(lines: Sequence[str]) -> str:
    """The lines from the last one that starts like an error; without one, the last few."""
    errors = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception|Interrupt|Stopped|Stopped at once)\b", line)]
    return "\n".join(lines[errors[-1] :] if errors else lines[-LAST_LINES:]) or "it printed nothing"


# ------------------------------------------------------------------------------------------------------- objectives


def objective(run: Path, name: str) -> float | None:
    """The value of ``stage/metric`` of a finished run; None if it is not a number.

    Raises:
      ConfigError: the run has no such stage or metric.
    """
    stage, _, metric = name.partition("/")
    stages = stage_folders(run, read_record(run / "run.json", RUN))
    if stage not in stages:
        raise ConfigError(f"objective={name}: no stage '{stage}'.{did_you_mean(stage, stages)} Stages: {listing(stages)}.")
    result = read_record(stages[stage] / "done.json", DONE)
    known = result["metrics"] | flatten(result.get("evaluation", {}))
    if metric not in known:
        raise ConfigError(
            f"objective={name}: the stage {stage} has no final '{metric}'.{did_you_mean(metric, known)} It has: {listing(known)}."
        )
    return known[metric]


AGENT = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")
"""Environment variables in which the agent of a W&B sweep names the W&B run to its command."""


@contextlib.contextmanager
def agent() -> Iterator[Callable[[Mapping[str, Any], str, float | None], None]]:
    """Yield a function that reports the objective to W&B's agent, if one started this process. Until it is called, the agent's
    variables are hidden from the stages: each stage has its own W&B run, and would otherwise log its steps to the agent's."""
    told = {name: os.environ.pop(name) for name in AGENT if name in os.environ}

    def tell(config: Mapping[str, Any], name: str, value: float | None) -> None:
        if told and value is not None:
            os.environ.update(told)
            import wandb

            wandb.teardown()  # W&B reads the environment only once
            with wandb.init(group=run_name(config), job_type="objective", settings=wandb.Settings(silent=True)) as run:
                run.log({name: value})

    yield tell
