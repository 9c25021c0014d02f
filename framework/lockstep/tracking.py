"""Trackers: where a stage's record goes beside its run folder.

`Wandb` keeps one Weights & Biases run per stage; `Silent` keeps nothing. A tracker is a convenience: the runner writes
the run folder itself, so a tracker that fails says so once and lets the training go on.

Left out: system files. W&B would store the command line and the uncommitted changes, and both may hold secrets.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lockstep.interfaces import Metrics, Tracker

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 30  # for wandb.init to reach the server, before the run is recorded offline
UPLOAD_SECONDS = 300  # for wandb.finish to upload; what is left then lies in the stage folder for `wandb sync`


class Silent(Tracker):
    """Keeps nothing. Registered as `none`."""

    @dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, config: Config):
        pass

    def start(self, *, folder: Path, run: str, stage: str, identity: str, config: Mapping[str, Any], resume: bool) -> None:
        pass

    def log(self, metrics: Metrics, step: int) -> None:
        pass

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        pass

    def artifact(self, name: str, kind: str, folder: Path) -> None:
        pass

    def finish(self, failed: bool = False) -> None:
        pass


class Wandb(Tracker):
    """One W&B run per stage: the group is the run's name, the job type the stage, the id the stage's identity.

    So a stage that resumes goes on in its own W&B run, and each step stands there once: W&B's steps are the stage's.
    What a killed process could not hand over is taken from the stage folder; steps that the server has already are not
    sent again. Offline there is no server to ask: the new log holds everything from step 0 on and replaces the earlier
    ones of the stage, so that one folder is left to `wandb sync`.
    """

    @dataclass(frozen=True)
    class Config:
        project: str
        entity: str | None
        mode: Literal["auto", "online", "offline", "disabled"]
        tags: tuple[str, ...]

    def __init__(self, config: Config):
        self.config = config
        self._run: Any = None  # wandb.Run while a stage is on
        self._first = 0  # the first step that W&B does not have
        self._warned = False

    def start(self, *, folder: Path, run: str, stage: str, identity: str, config: Mapping[str, Any], resume: bool) -> None:
        arguments = dict(
            project=self.config.project,
            entity=self.config.entity,
            tags=self.config.tags,
            group=run,
            job_type=stage,
            id=identity,
            name=f"{run}/{stage}",
            dir=folder,
            config=without_secrets(config),
            # A stage that starts afresh replaces a W&B run of its identity: same configuration, same numbers.
            resume="allow" if resume else None,
            reinit="create_new",
        )
        with self._surviving("start"):
            folder.mkdir(parents=True, exist_ok=True)  # else W&B writes to a temporary folder
            self._run = self._open(arguments)
            self._run.define_metric("step", hidden=True)
            self._run.define_metric("*", step_metric="step")
            self._first = self._run.starting_step
            if self._run.settings.mode == "offline":
                _remove_logs(folder, identity, Path(self._run.settings.sync_dir))
            if resume:
                self._replay(folder)

    def _replay(self, folder: Path) -> None:
        """Log again what the stage folder holds of the steps before the checkpoint."""
        samples = {step: list(rows) for step, rows in itertools.groupby(_rows(folder / "samples.jsonl"), lambda r: r["step"])}
        for row in _rows(folder / "metrics.jsonl"):
            step = row["step"]
            values = {name: float("nan") if v is None else v for name, v in row.items() if name not in ("step", "seconds")}
            self.log(values, step)
            self.table("samples", [{k: v for k, v in r.items() if k != "step"} for r in samples.get(step, [])], step)

    def log(self, metrics: Metrics, step: int) -> None:
        with self._surviving("log metrics"):
            if self._run and step >= self._first:
                self._run.log({**metrics, "step": step}, step=step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        with self._surviving("log a table"):
            if self._run and rows and step >= self._first:
                import wandb

                columns = list(dict.fromkeys(key for row in rows for key in row))
                data = [[row.get(column) for column in columns] for row in rows]
                table = wandb.Table(columns=columns, data=data, allow_mixed_types=True)
                self._run.log({name: table, "step": step}, step=step)

    def artifact(self, name: str, kind: str, folder: Path) -> None:
        with self._surviving("log an artifact"):
            if self._run:
                import wandb

                artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name), type=kind)
                # A finished folder does not change, so W&B need not copy gigabytes of weights to its own cache.
                artifact.add_dir(str(folder), policy="immutable", skip_cache=True)
                self._run.log_artifact(artifact)

    def finish(self, failed: bool = False) -> None:
        """Blocks until everything is written: W&B's own exit hook comes too late for the last values of a crash."""
        run, self._run = self._run, None
        with self._surviving("finish"):
            if run:
                run.finish(exit_code=1 if failed else 0)

    def _open(self, arguments: Mapping[str, Any]) -> Any:
        """The W&B run: in the configured mode or, where the server cannot be had, offline."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read on import: no crash reports to W&B
        import wandb  # takes 0.6 s, so only a run that uses it pays

        quiet = wandb.Settings(silent=True)
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            x_disable_meta=True,
            x_save_requirements=False,
            init_timeout=CONNECT_SECONDS,
            finish_timeout=UPLOAD_SECONDS,
        )
        default = wandb.setup(quiet).settings.mode  # WANDB_MODE and the like; 'online' if nobody said anything
        mode = self.config.mode if self.config.mode != "auto" else default
        try:
            if self.config.mode == "auto" and mode == "online" and not wandb.login(prompt=False, verify=False):
                mode = "offline"
            return wandb.init(**arguments, mode=mode, settings=settings)
        except Exception as error:
            if mode != "online":
                raise
            self._warn(f"W&B cannot be reached, so the stage is recorded offline in {arguments['dir']}: {error}")
            wandb.teardown()  # its service still holds the id; no other stage is on in this process
            wandb.setup(quiet)
            return wandb.init(**arguments, mode="offline", settings=settings)

    @contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._warn(f"W&B could not {what}: {error!r}. The run goes on; its folder holds every record.")

    def _warn(self, message: str) -> None:
        if not self._warned:
            logger.warning(message)
        self._warned = True


def _remove_logs(folder: Path, identity: str, kept: Path) -> None:
    """The offline logs of this run's earlier processes."""
    for log in folder.glob(f"wandb/offline-run-*-{identity}"):
        if log.resolve() != kept.resolve():
            shutil.rmtree(log, ignore_errors=True)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if file.exists():
        with open(file, encoding="utf-8") as lines:
            yield from map(json.loads, lines)


# ---------------------------------------------------------------------------------------------------------- secrets

_SECRET_WORDS = {"key", "token", "secret", "password", "passwd", "credential", "credentials", "authorization", "bearer"}
_TEXT_TOKENS = {"eos", "pad", "bos", "unk", "stop", "sep", "cls", "mask", "special"}
_PASSWORD_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")


def without_secrets(config: Any) -> Any:
    """``config`` without the keys that look like credentials, and without the user part of URLs.

    A key looks like a credential if its last word is 'key', 'token', 'password' and so on; `eos_token` is text.
    """
    if isinstance(config, Mapping):
        return {key: without_secrets(value) for key, value in config.items() if not _is_secret(str(key))}
    if isinstance(config, (list, tuple)):
        return [without_secrets(value) for value in config]
    if isinstance(config, str):
        return _PASSWORD_IN_URL.sub("", config)
    return config


def _is_secret(key: str) -> bool:
    words = re.sub(r"([a-z])([A-Z])", r"\1_\2", key).lower().replace("-", "_").split("_")
    if words[-1].startswith("apikey"):
        return True
    return words[-1] in _SECRET_WORDS and not (words[-1] == "token" and words[0] in _TEXT_TOKENS)
