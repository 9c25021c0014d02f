"""Runs an experiment's stages in order: reuses finished ones, resumes unfinished ones, records everything. ``loop.py`` has the
training loop."""

from __future__ import annotations

import datetime
import logging
import resource
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.config.root import ConfigGroup
from lockstep.config.schema import differences
from lockstep.config.secrets import without_secrets
from lockstep.data.labels import (
    CANDIDATES,
    COMPARISONS,
    DEMONSTRATIONS,
    PROMPTS,
    comparison_line,
    demonstration_line,
    prompt_line,
)
from lockstep.data.mixture import TWINS
from lockstep.errors import Stopped, Waiting
from lockstep.interfaces import Backend, DataSource, Tracker
from lockstep.launchers import cores
from lockstep.reporting.console import Console
from lockstep.reporting.provenance import code_state
from lockstep.reporting.tracking import Silent
from lockstep.runs import identity
from lockstep.runs.assembly import Assembly
from lockstep.runs.attacks import AttackConfig, RedTeam, demonstrations
from lockstep.runs.attacks import kept as kept_attacks
from lockstep.runs.collection import CollectionConfig, Collector, kept, labelled, measures
from lockstep.runs.evaluation import EvaluationConfig, Evaluator, prompts_of
from lockstep.runs.experiment import Experiment
from lockstep.runs.interrupts import terminable
from lockstep.runs.loop import Loop
from lockstep.runs.measures import flatten
from lockstep.runs.stages import Stage
from lockstep.runs.store import NoRecords, Records, RunFolder, StageFolder, held
from lockstep.storage.files import dump, dump_line, finite, write_json, write_text
from lockstep.storage.records import HEALTH, STAGES, read_record
from lockstep.version import __version__

log = logging.getLogger("lockstep")


class Runner:
    """Runs an experiment's stages in order, each in the folder of its result."""

    def __init__(self, experiment: Experiment, console: Console, command: str):
        self.experiment, self.console = experiment, console
        self.folder = RunFolder(experiment.root, experiment.name)
        self.folder.record |= {
            "experiment": experiment.config["experiment_name"],
            "seed": experiment.seed,
            "backend": {"name": experiment.backend_name},
            "command": shlex.join(without_secrets(shlex.split(command))),
            "versions": {"lockstep": __version__, "python": sys.version.split()[0]},
            "code": code_state(),
            "started": _now(),
        }
        experiment.check()
        self.assembly = Assembly(experiment, {name: folder.output for name, folder in experiment.folders.items()})
        self.processes = self.assembly.processes
        self.folder.writes = self.processes.leads
        self.processes.agree("run", self.folder.name, *map(identity.digest, experiment.identities.values()))

    def run(self) -> Path:
        """Run all stages. Returns the run folder.

        Raises:
          Stopped: on Ctrl-C or a termination signal, with progress saved.
        """
        with held(self.folder.lock, self.processes), terminable():
            started = time.perf_counter()
            self.processes.share(self._begin)
            status = "failed"
            try:
                self.processes.share(lambda: self.console.plan(self.experiment.name, self._plan()))
                for stage in self.experiment.stages.values():
                    self._stage(stage)
                status = "done"
            except (Stopped, KeyboardInterrupt) as error:
                status = _ended_by(error)
                raise
            finally:
                self.folder.write(status=status, finished=_now(), seconds=round(time.perf_counter() - started, 1))
        return self.folder.path

    def _begin(self) -> None:
        self.experiment.check()  # again: another process may have started it since
        self.folder.write_config(self.experiment.config)
        self._tell_what_starts_anew()
        write_json(self.folder.path / "stages.json", self.experiment.identities)
        self.folder.write()

    def _tell_what_starts_anew(self) -> None:
        """Warn about stages that this run had started and that now start over in another folder, because something changed."""
        file = self.folder.path / "stages.json"
        before: dict[str, ConfigGroup] = read_record(file, STAGES) if file.exists() else {}
        stages: dict[str, list[str]] = {}
        for name, content in self.experiment.identities.items():
            old = StageFolder.of(self.experiment.root, name, self.experiment.backend_name, before.get(name, {}))
            if old.path != self.experiment.folders[name].path and (old.path / "stage.json").exists():
                reason = "; ".join(identity.what_changed(before[name], content))
                state = "done" if old.done else "unfinished"
                stages.setdefault(reason, []).append(f"{name} (its earlier folder {old.path.name} is {state})")
        for reason, names in stages.items():
            log.warning("Starting over: %s. Changed since: %s.", ", ".join(names), reason)

    def _plan(self) -> list[tuple[str, str, str]]:
        """(stage, state, arithmetic) of each stage, for the reader and as a check, before any model is loaded."""
        lines = []
        for stage in self.experiment.stages.values():
            if self.experiment.folders[stage.name].done:
                lines.append((stage.name, "done", str(self.experiment.folders[stage.name].path)))
            else:
                lines.append((stage.name, "to do", self._arithmetic(stage)))
                stage.rehearse(self.assembly.data)
        return lines

    def _arithmetic(self, stage: Stage) -> str:
        if missing := [name for name in self.experiment.collected(stage) if not self.experiment.folders[name].done]:
            return known_once(stage, missing, self.assembly.data)
        return stage.arithmetic(self.assembly.data_of(stage))

    def _stage(self, stage: Stage) -> None:
        folder = self.experiment.folders[stage.name]
        facts = {
            "kind": stage.kind,
            "algorithm": stage.group.get("name", stage.produces),
            "identity": folder.path.name,
            "produces": stage.produces,
        }
        with held(folder.lock, self.processes):
            reused = self.processes.share(lambda: self._is_done(stage, folder, facts))
            if not reused:
                started = time.perf_counter()
                try:
                    kinds = {"train": self._train, "evaluate": self._evaluate, "collect": self._collect, "attack": self._attack}
                    result = kinds[stage.kind](stage, folder)
                except BaseException as error:
                    self.folder.stage(stage.name, folder, status=_ended_by(error))
                    raise
                memory = peak_memory(self.assembly.backend)
                seconds = time.perf_counter() - started + result.pop("earlier", 0.0)
                done = {"seconds": round(seconds, 1), "memory": memory, **result}
                self.processes.share(lambda: folder.finish(done))
            result = self.processes.share(folder.result)
        kept = {"data": result.get("data", {}), "health": result.get("health", [])}
        self.folder.stage(stage.name, folder, status="done", seconds=result["seconds"], **kept, **facts)
        self.console.stage_done(stage.name, result, reused=reused)

    def _is_done(self, stage: Stage, folder: StageFolder, facts: ConfigGroup) -> bool:
        """Return True if the stage is complete; otherwise record it as running."""
        if folder.intact if stage.name in self._read() else folder.done:
            folder.remove_checkpoints()  # left over if the process was killed just before this
            return True
        if (folder.path / "done.json").exists():
            log.warning("%s starts over: it was done, but files of %s are missing or changed", stage.name, folder.output)
            (folder.path / "done.json").unlink()
        self.folder.stage(stage.name, folder, status="running", **facts)
        write_json(folder.path / "stage.json", self.experiment.identities[stage.name])
        self.folder.write(backend={"name": self.experiment.backend_name, **self.assembly.backend.describe()})
        return False

    def _read(self) -> set[str]:
        """The stages whose output is an input of an unfinished stage."""
        to_do = [stage for name, stage in self.experiment.stages.items() if not self.experiment.folders[name].done]
        return {source for stage in to_do for source, _ in stage.inputs}

    # ---------------------------------------------------------------------------------------------- the kinds of stage

    def _train(self, stage: Stage, folder: StageFolder) -> ConfigGroup:
        algorithm, engine = self.assembly.algorithm(stage), self.assembly.engine(stage)

        def restore(checkpoint: Path) -> None:
            algorithm.learner.restore(checkpoint)
            if engine is not None:
                engine.restore(checkpoint)

        first, state = folder.restore(restore, self.processes) or (0, {})
        if state:
            algorithm.load_state(state["algorithm"])
            log.info("%s resumes at step %d of %d", stage.name, first, algorithm.total_steps)
            if changes := differences(state["machine"], self._machine()):
                log.warning("no longer bit for bit from here on, because this changed: %s", "; ".join(changes))
        # The records are truncated to the checkpoint before the tracker starts, because it reads from them what it missed.
        given = folder.path, state.get("positions"), state.get("seconds", 0.0)
        records = Records(*given) if self.processes.leads else NoRecords()
        with self._tracked(stage, folder, resume=bool(state)) as tracker:
            loop = Loop(
                stage.name, algorithm, folder, records, tracker, self.console, self.processes, self._machine(),
                samples_every=self.experiment.config["samples_every"],
                checkpoint_every=self.experiment.config["checkpoint_every"],
                engine=engine,
            )  # fmt: skip
            metrics = loop.run(first, state.get("metrics", {}))
            with folder.write_output(self.processes) as output:
                self.assembly.save(stage, algorithm, output)
            tracker.artifact(algorithm.produces, folder.output)
        return {
            "earlier": state.get("seconds", 0.0),  # spent on the steps up to the checkpoint, if it was interrupted
            "steps": algorithm.total_steps,
            "data": {what: fit.counts() for what, fit in self.assembly.fits[stage.name].items()},
            "metrics": {k: finite(v) for k, v in metrics.items()},
            "health": list(records.rows("health", HEALTH)),
        }

    def _machine(self) -> dict[str, str]:
        """What bit-equality depends on besides configuration and code: library versions, device, number of cores."""
        return {**self.assembly.backend.describe(), "cores": str(cores())}

    def _evaluate(self, stage: Stage, folder: StageFolder) -> ConfigGroup:
        config: EvaluationConfig = stage.config
        assembly = self.assembly
        reward_model = assembly.reward_model(stage)
        environment = assembly.environment(stage)
        judges = {name: judge for name, group in config.judges.items() if (judge := assembly.reward_model(stage, group))}
        evaluator = Evaluator(
            config, assembly.data_of(stage), assembly.tokenizer, reward_model, stage.seed, environment, judges, stage.follows,
            labelers=assembly.training_labelers(stage), engine=assembly.engine(stage),
        )  # fmt: skip
        with (
            self._tracked(stage, folder, resume=False) as tracker,
            self.console.progress(stage.name, 0, len(config.policies) + 2) as progress,
        ):
            done = iter(range(len(config.policies) + 3))
            result = evaluator.run(assembly.policy, config.policies, lambda what: progress(next(done), {}, what))
            samples, data = result.pop("samples"), {what: fit.counts() for what, fit in evaluator.fits.items()}
            self._write(folder, {"evaluation.json": dump(result), "samples.jsonl": "".join(map(dump_line, samples))})
            tracker.table("samples", samples, 0)
            tracker.log(flatten(result), 0)
            tracker.artifact("evaluation", folder.output)
        return {"steps": 0, "data": data, "metrics": {}, "evaluation": result}

    def _collect(self, stage: Stage, folder: StageFolder) -> ConfigGroup:
        """Collect candidates, and turn their labels into comparisons. The candidates are kept in the stage's folder, so that
        people can take their time.

        Raises:
          Waiting: people have not finished labelling.
        """
        config: CollectionConfig = stage.config
        assembly, experiment = self.assembly, self.experiment
        scorer = assembly.reward_model(stage)
        collector = Collector(
            config, assembly.data_of(stage), assembly.tokenizer, scorer, stage.seed, experiment.seed, stage.round,
            engine=assembly.engine(stage),
        )  # fmt: skip
        policies = {name: experiment.folders[name].path.name if name in experiment.folders else name for name in stage.policies}
        with self.console.progress(stage.name, 0, len(policies) + 1) as progress:
            done = iter(range(len(policies)))
            tell = lambda what: progress(next(done), {}, what)  # noqa: E731
            collect = lambda: collector.collect(assembly.policy, policies, tell)  # noqa: E731
            candidates = kept(folder.path / CANDIDATES, collect, self.processes)
            progress(len(policies), {}, "labels")
            labeler = assembly.labeler(stage)
            received = self.processes.share(lambda: labeler.received(folder.path))
            try:
                labels = labeler.label(candidates, stage.seed, folder.path)
            except Waiting as waiting:
                raise Waiting(
                    f"{stage.name} waits for people: {waiting} Type: lockstep serve {shlex.quote(str(self.folder.path))} "
                    "and close the round there; then run this command again."
                ) from None
        comparisons = labelled(candidates, labels, config.heldout_groups)
        metrics = measures(candidates, labels, assembly.data, policies) | {
            "heldout_labels": float(len(labels) - len(comparisons))
        }
        with self._tracked(stage, folder, resume=False) as tracker:
            self._write(folder, {COMPARISONS: "".join(map(comparison_line, comparisons))})
            tracker.log(metrics, 0)
            tracker.artifact(stage.produces, folder.output)
        data = {what: fit.counts() for what, fit in collector.fits.items()}
        return {"steps": 0, "data": data, "metrics": metrics, "received": received}

    def _attack(self, stage: Stage, folder: StageFolder) -> ConfigGroup:
        config: AttackConfig = stage.config
        assembly = self.assembly
        judge = assembly.reward_model(stage)
        assert judge is not None
        team = RedTeam(
            config, assembly.data, assembly.tokenizer, assembly.attacker(stage), judge, stage.seed, self.experiment.seed,
            stage.round,
            engine=assembly.engine(stage),
        )  # fmt: skip
        with self.console.progress(stage.name, 0, len(stage.policies) + 1) as progress:
            done = iter(range(len(stage.policies) + 1))
            attacks = team.run(assembly.policy, stage.policies, lambda what: progress(next(done), {}, what))
        with self._tracked(stage, folder, resume=False) as tracker:
            prompts = "".join(prompt_line(prompt, **facts) for prompt, facts in kept_attacks(attacks, config))
            imitated = "".join(map(demonstration_line, demonstrations(attacks, config)))
            self._write(folder, {PROMPTS: prompts, DEMONSTRATIONS: imitated})
            tracker.log(team.measures, 0)
            tracker.artifact(stage.produces, folder.output)
        data = {what: fit.counts() for what, fit in team.fits.items()}
        return {"steps": 0, "data": data, "metrics": team.measures}

    def _write(self, folder: StageFolder, files: Mapping[str, str]) -> None:
        """Write the stage's output."""
        with folder.write_output(self.processes) as output:
            for name, text in files.items() if self.processes.leads else ():
                write_text(output / name, text)

    def _tracked(self, stage: Stage, folder: StageFolder, resume: bool) -> Tracked:
        cls, config = self.experiment.tracker if self.processes.leads else (Silent, Silent.Config())
        return Tracked(
            cls(config),
            folder=folder.path,
            run=self.experiment.name,
            stage=stage.name,
            identity=folder.path.name,
            config={
                **self.experiment.identities[stage.name],
                "produces": stage.produces,
                "choices": self.experiment.config["choices"] or {},
                "code_state": code_state(),
            },
            resume=resume,
        )


class Tracked:
    """Finishes a tracker however the stage ends, so that its last values are not lost."""

    def __init__(self, tracker: Tracker, **start: Any):
        self.tracker, self.start = tracker, start

    def __enter__(self) -> Tracker:
        self.tracker.start(**self.start)
        return self.tracker

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.tracker.finish(failed=kind is not None)


def known_once(stage: Stage, missing: Sequence[str], data: DataSource) -> str:
    """A text in place of the arithmetic of a stage whose data come from stages that are not done.

    Raises:
      LockstepError: a component does not work here, or the data lack a split.
    """
    stage.check()
    if stage.kind == "evaluate":
        for split in stage.config.splits:
            if split.removesuffix(TWINS) not in stage.attacked:
                prompts_of(data, split)
    return f"known once {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} done"


def _ended_by(error: BaseException) -> str:
    """The status of a run or stage that this error ended."""
    waits, stopped = isinstance(error, Waiting), isinstance(error, (Stopped, KeyboardInterrupt))
    return "waiting" if waits else "stopped" if stopped else "failed"


def peak_memory(backend: Backend) -> int:
    """Peak memory in bytes: of the accelerator or, if the backend has none, of this process."""
    accelerator = backend.peak_memory_bytes()
    if accelerator is not None:
        return accelerator
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux kilobytes


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
