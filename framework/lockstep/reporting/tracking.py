"""Trackers: where a stage's record goes besides its run folder.

`Wandb` keeps one Weights & Biases run per stage; `Silent` keeps nothing. A tracker is a convenience: the runner writes
the run folder itself, so a failing tracker warns once and training continues.

Left out: system files. W&B would store the command line and uncommitted changes, and both may contain secrets. The
configuration records the commit and the plugins that made a stage (`lockstep.reporting.provenance`).
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lockstep.config.schema import setting
from lockstep.config.secrets import without_secrets
from lockstep.errors import ConfigError, told
from lockstep.interfaces import Metrics, Tracker
from lockstep.storage.records import HEALTH, METRICS, SAMPLES, Shape, read_rows

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 30  # for wandb.init to reach the server, before the run is recorded offline
UPLOAD_SECONDS = 300  # for wandb.finish to upload; the rest stays in the stage folder for `wandb sync`

SUMMARIES = {
    **dict.fromkeys(("loss", "heldout/loss", "heldout/brier", "heldout/ece", "objective/entropy"), "min,last"),
    **dict.fromkeys(("heldout/accuracy", "objective/score", "objective/gold", "objective/kl"), "max,last"),
    **dict.fromkeys(("grad_norm/policy", "grad_norm/value", "grad_norm/reward_model", "sampler/mismatch_max"), "max,last"),
    "perf/tokens_per_second": "mean,last",
}
"""What W&B's table of runs shows for these metrics, as ``loss.min`` and ``loss.last``. For others it shows the last value."""


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

    def alert(self, title: str, text: str, step: int) -> None:
        pass

    def artifact(self, kind: str, folder: Path) -> None:
        pass

    def finish(self, failed: bool = False) -> None:
        pass


class Surviving(Tracker):
    """A tracker that reports its first failure and never stops the run."""

    label: ClassVar[str]

    def __init__(self) -> None:
        self._warned = False

    @contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._warn(f"{self.label} could not {what}: {error!r}. The run continues; its folder holds every record.")

    def _warn(self, message: str) -> None:
        if not self._warned:
            logger.warning(message)
        self._warned = True

    def _replay(self, folder: Path) -> None:
        """Log the steps before the checkpoint again, from the stage folder."""
        samples, findings = by_step(folder / "samples.jsonl", SAMPLES), by_step(folder / "health.jsonl", HEALTH)
        for row in read_rows(folder / "metrics.jsonl", METRICS):
            step = row.pop("step")
            self.log({name: math.nan if v is None else v for name, v in row.items() if name != "seconds"}, step)
            for finding in findings.get(step, ()):
                self.alert(finding["name"], finding["message"], step)
            self.table("samples", samples.get(step, ()), step)


class Wandb(Surviving):
    """One W&B run per stage: the group is the run's name, the job type is the stage, the id is the stage's identity.

    A resumed stage therefore continues its own W&B run, and each step appears once: W&B's steps are the stage's. Steps that a
    killed process could not send come from the stage folder; steps that the server already has are not sent again. Offline
    there is no server to ask. The new log then holds everything from step 0 and replaces the stage's earlier logs, so that one
    folder is left for `wandb sync`.

    A stage's output is an artifact, for example 'sft-torch', with the hash of its identity as alias. A stage that reads it
    declares it as an input. Online, W&B draws the lineage. Offline, W&B refuses `use_artifact`, so only the run's configuration
    and the artifact's metadata name the inputs.
    """

    label = "W&B"

    @dataclass(frozen=True)
    class Config:
        project: str = setting("lockstep", "W&B project.")
        entity: str | None = setting(None, "W&B team or user; null: the API key's default.")
        mode: Literal["auto", "online", "offline", "disabled"] = setting("auto", "auto: online if there is an API key.")
        tags: tuple[str, ...] = setting((), "Tags of every W&B run.")

        def __post_init__(self) -> None:
            """Check W&B's own rules: a run that breaks them would not be recorded at all."""
            for key, name in (("project", self.project), ("entity", self.entity)):
                if name is not None and (not 0 < len(name) <= 128 or any(c in name for c in "/\\#?%:")):
                    team = re.fullmatch(r"([^/\\#?%:]{1,128})/([^/\\#?%:]{1,128})", name)
                    both = f" Type: tracker.entity={team[1]} tracker.project={team[2]}" if team else ""
                    raise ConfigError(
                        f"tracker.{key}={told(name)}: W&B takes 1 to 128 characters, and none of / \\ # ? % :{both}"
                    )
            for tag in self.tags:
                if not 0 < len(tag) <= 64:
                    raise ConfigError(f"tracker.tags: {tag!r} is no tag at W&B, which has 1 to 64 characters.")

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self._run: Any = None  # wandb.Run while a stage runs
        self._about: dict[str, Any] = {}  # the stage, for its artifact
        self._first = 0  # the first step that W&B does not have

    def start(self, *, folder: Path, run: str, stage: str, identity: str, config: Mapping[str, Any], resume: bool) -> None:
        own = dict(
            project=self.config.project,
            entity=self.config.entity,
            tags=self.config.tags,
            group=run,
            job_type=stage,
            id=identity,
            name=f"{run}/{stage}",
            dir=folder,
            config=config,
            # A stage that starts over replaces the W&B run with its identity: same configuration, same numbers.
            resume="allow" if resume else None,
            reinit="create_new",
        )
        arguments = without_secrets(own)  # a tag may be ${oc.env:...}
        with self._surviving("start"):
            folder.mkdir(parents=True, exist_ok=True)  # else W&B writes to a temporary folder
            self._run = self._open(arguments)
            self._define_metrics()
            self._about = {"identity": identity, "stage": stage, "run": run, "inputs": dict(config.get("inputs", {}))}
            self._first = self._run.starting_step
            if self._run.settings.mode == "offline":
                _remove_logs(folder, identity, Path(self._run.settings.sync_dir))
            elif self._run.settings.mode == "online":
                self._use_inputs()
            if resume:
                self._replay(folder)

    def _define_metrics(self) -> None:
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        for name, summary in SUMMARIES.items():
            self._run.define_metric(name, step_metric="step", summary=summary)

    def _use_inputs(self) -> None:
        """Declare the outputs of earlier stages as inputs, where W&B has them."""
        for identity in self._about["inputs"].values():
            name, alias = artifact_name(identity)
            try:
                self._run.use_artifact(f"{name}:{alias}")
            except Exception as error:  # W&B raises several kinds, for example if the input was made under another tracker
                logger.info("W&B shows no lineage from %s: %s", identity, error)

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

    def alert(self, title: str, text: str, step: int) -> None:
        with self._surviving("send an alert"):
            if self._run and step >= self._first:
                self._run.alert(title=title, text=f"{self._about['stage']}, step {step}: {text}", level="WARN")

    def artifact(self, kind: str, folder: Path) -> None:
        with self._surviving("log an artifact"):
            if self._run:
                import wandb

                name, alias = artifact_name(self._about["identity"])
                artifact = wandb.Artifact(name, type=kind, metadata=self._about)
                # A finished folder does not change, so W&B need not copy gigabytes of weights to its own cache.
                artifact.add_dir(str(folder), policy="immutable", skip_cache=True)
                self._run.log_artifact(artifact, aliases=["latest", alias])

    def finish(self, failed: bool = False) -> None:
        """Block until everything is written. W&B's own exit hook runs too late for the last values before a crash."""
        run, self._run = self._run, None
        with self._surviving("finish"):
            if run:
                run.finish(exit_code=1 if failed else 0)

    def _open(self, arguments: Mapping[str, Any]) -> Any:
        """Open the W&B run in the configured mode or, if the server cannot be reached, offline."""
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
        default = wandb.setup(quiet).settings.mode  # WANDB_MODE and the like; 'online' by default
        mode = self.config.mode if self.config.mode != "auto" else default
        try:
            if self.config.mode == "auto" and mode == "online" and not wandb.login(prompt=False, verify=False):
                mode = "offline"
            return wandb.init(**arguments, mode=mode, settings=settings)
        except Exception as error:
            if mode != "online":
                raise
            self._warn(f"W&B cannot be reached, so the stage is recorded offline in {arguments['dir']}: {error}")
            wandb.teardown()  # its service still holds the id; no other stage runs in this process
            wandb.setup(quiet)
            return wandb.init(**arguments, mode="offline", settings=settings)


def by_step(file: Path, shape: Shape) -> dict[int, list[dict[str, Any]]]:
    """The rows of samples.jsonl or health.jsonl by step, each without its step."""
    groups = itertools.groupby(read_rows(file, shape), lambda row: row.pop("step"))
    return {step: list(group) for step, group in groups}


def artifact_name(identity: str) -> tuple[str, str]:
    """Split a stage's identity into a W&B collection and this artifact's alias in it: ('sft-torch', '0123456789ab')."""
    name, _, digest = identity.rpartition("-")
    return re.sub(r"[^\w.-]", "-", name), digest


def _remove_logs(folder: Path, identity: str, kept: Path) -> None:
    """Remove the offline logs of this run's earlier processes."""
    for log in folder.glob(f"wandb/offline-run-*-{identity}"):
        if log.resolve() != kept.resolve():
            shutil.rmtree(log, ignore_errors=True)
