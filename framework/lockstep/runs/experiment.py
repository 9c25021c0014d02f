"""An experiment, composed once: every name is resolved and every group checked before anything is loaded. It knows what its
stages read and what identifies them, and is passed down unchanged.

    compose (config/compose.py)   overrides -> one plain dictionary, the configuration
    Experiment                    the configuration -> checked stages, their identities and folders
    Assembly                      a stage -> backend, tokenizer, models, algorithm, on first use
    Runner                        stages in order: reuse, resume, record
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lockstep.config.root import ConfigGroup, check_groups, completed, component_config
from lockstep.config.schema import parse
from lockstep.config.secrets import without_secrets
from lockstep.errors import CheckpointError, ConfigError, did_you_mean, listing, short
from lockstep.models.adapters import base_of
from lockstep.models.checkpoint import context_of
from lockstep.registry import registry
from lockstep.runs import identity
from lockstep.runs.attacks import AttackConfig
from lockstep.runs.collection import CollectionConfig
from lockstep.runs.components import Chosen, Components
from lockstep.runs.evaluation import EvaluationConfig
from lockstep.runs.kinds import checked_stage
from lockstep.runs.rounds import Scope, in_rounds
from lockstep.runs.stages import NEW, Stage
from lockstep.runs.store import RunFolder, StageFolder, decisive
from lockstep.storage.names import NOT_RUNS, checked_name, in_a_name, root_folder
from lockstep.storage.records import RUN, STAGES, read_record
from lockstep.text.encoding import Lengths
from lockstep.text.templates import template_text
from lockstep.text.tokenizer import TokenizerConfig

log = logging.getLogger("lockstep")


NAMELESS: Mapping[str, type[Any]] = {"evaluation": EvaluationConfig, "collection": CollectionConfig, "attack": AttackConfig}
"""{key: class} for groups of the root that choose no component."""


class Experiment:
    """``config`` with every name resolved and every group checked.

    Raises:
      LockstepError: something is wrong; the first error is raised before anything is loaded.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config = completed(config)
        check_groups(config)
        self.seed: int = config["seed"]
        for key, cls in NAMELESS.items():
            if config[key] is not None:
                parse(cls, config[key], key)
        self.backend_name: str = config["backend"]["name"]
        components = Components(self.backend_name)
        self.backend, self.data, self.policy, self.tracker = (
            (chosen.component, chosen.config)
            for chosen in (components.of(kind, config[kind]) for kind in ("backend", "data", "policy", "tracker"))
        )
        engine = components.if_any("engine", config["engine"])
        self.stages: dict[str, Stage] = {}
        for name, group, scope, number in _in_order(config["stages"]):
            if name in self.stages:
                raise ConfigError(f"Two stages are called '{short(name)}', one of them in rounds. Rename either.")
            if stage := checked_stage(
                name, group, scope, number, components=components, engine=engine, run_seed=self.seed, before=self.stages
            ):
                self._check_context(stage)
                self.stages[name] = stage
        if config["environment"] is not None and not any(stage.environment for stage in self.stages.values()):
            raise ConfigError(
                f"No stage uses environment={config['environment']['name']}. Give a stage whose algorithm samples the line "
                'environment: "${environment}", or set environment=null.'
            )
        if config["engine"] is not None and not any(stage.engine for stage in self.stages.values()):
            raise ConfigError(f"No stage samples, so none uses engine={config['engine']['name']}. Set engine=null.")
        if not self.stages:
            raise ConfigError("The experiment has no stages. Choose one that has: experiment=instructgpt.")
        if (objective := config["objective"]) is not None:
            self._check_objective(objective)

    @property
    def name(self) -> str:
        return run_name(self.config)

    @property
    def root(self) -> Path:
        """Where runs and stages are kept."""
        return root_folder(self.config["folder"])

    @property
    def tokenizer(self) -> TokenizerConfig:
        """The policy's; a path of None means the data source's tokenizer."""
        cls, config = self.policy
        return cls.tokenizer_config(config)

    @functools.cached_property
    def identities(self) -> dict[str, ConfigGroup]:
        """{stage: everything that decides its result}: configuration, inputs, data, code. The hash of this names its folder.
        Secrets are left out: another token for the same server gives the same stage."""
        found: dict[str, ConfigGroup] = {}
        source, config = self.data
        data = without_secrets(self.config["data"]) | {"fingerprint": source.fingerprint(config)}
        common = [base.__module__ for cls in (self.backend[0], self.policy[0], source) for base in cls.__mro__]
        template = self.tokenizer.chat_template
        is_file = template is not None and template.endswith(".jinja")
        tokenizer = dataclasses.replace(self.tokenizer, chat_template=template_text(template) if is_file else template)
        for stage in self.stages.values():
            found[stage.name] = {
                "stage": without_secrets(stage.group),
                "reward_model": without_secrets(stage.reward_model),
                "environment": without_secrets(_group(stage.environment)),
                "engine": without_secrets(identity.without_server(_group(stage.engine))),
                "labeler": without_secrets(_group(stage.labeler)),
                "attacker": without_secrets(_group(stage.attacker)),
                "mixes": {noun: list(sources.items()) for noun, sources in stage.mixes.items()},
                "round": stage.round if stage.kind in ("collect", "attack") else None,
                "follows": dict(stage.follows),
                "policy": without_secrets(self.config["policy"]) if stage.reads_new else None,
                "tokenizer": dataclasses.asdict(tokenizer),
                "inputs": {name: self._made(name, found[name]) for name, _ in stage.inputs if name in found},
                "folders": {path: identity.folder_digest(path) for path in self._outside(stage)},
                "backend": without_secrets(identity.decisive_backend(self.config["backend"])),
                "data": data,
                "seed": stage.seed,
                "run_seed": self.seed if stage.reads_new or stage.kind in ("collect", "attack") else None,
                "code": identity.code_digests([*common, *stage.modules]),
            }
        return found

    @functools.cached_property
    def folders(self) -> dict[str, StageFolder]:
        """{stage: the folder of its result}, whether it exists or not."""
        return {name: self._folder(name, content) for name, content in self.identities.items()}

    def collected(self, stage: Stage) -> list[str]:
        """The stages of this run whose labels or attacks this stage uses as data."""
        mixed = [source for sources in stage.mixes.values() for source in sources]
        return [source for source in (*mixed, *stage.attacked) if source in self.stages]

    def check(self) -> None:
        """Check what all stages share. `Stage.check` covers the rest.

        Raises:
          ConfigError: the place for results is not writable, or holds a run of this name with another configuration.
          LockstepError: the backend, data, policy or tracker does not work here.
        """
        self._check_place()
        for component, config in (self.backend, self.data, self.policy, self.tracker):
            component.check(config)

    def _check_place(self) -> None:
        place = next(path for path in [self.root, *self.root.absolute().parents] if path.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(f"folder={self.root}: nothing can be written to {place}. Choose another folder=...")
        run = RunFolder(self.root, self.name)
        if changes := run.config_changes(self.config):
            lines = "\n".join(f"  {change}" for change in changes)
            unfinished = run.unfinished()
            begun = f" (unfinished: {', '.join(unfinished)})" if unfinished else ""
            raise ConfigError(
                f"The run '{self.name}' already exists, with another configuration{begun}:\n{lines}\n"
                f"To start a separate run, choose another name=... To continue '{self.name}', use its earlier values, on the "
                f"left; all of them are in {run.config_file}. To replace it, remove {run.path}: stages are kept beside it, and "
                "reused where nothing has changed."
            )

    def _made(self, stage: str, content: ConfigGroup) -> str:
        """A stage's result, as it enters the identity of stages that read it: the folder's name and, if labels came into the
        folder from outside, their digest."""
        folder, labeler = self._folder(stage, content), self.stages[stage].labeler
        received = folder.result().get("received") if folder.done else labeler and labeler.component.received(folder.path)
        return f"{folder.path.name} {received}" if received else folder.path.name

    def _folder(self, stage: str, content: ConfigGroup) -> StageFolder:
        return StageFolder.of(self.root, stage, self.backend_name, content)

    def _outside(self, stage: Stage) -> list[str]:
        """Local files and folders that the stage reads, except those that stages of this run make."""
        policy, config = self.policy
        named = [*(name for name, _ in stage.inputs), *stage.files, *policy.inputs(config).files]
        there = {name for name in named if name not in self.stages and Path(name).exists()}
        bases = {base for name in there if (base := base_of(name)) is not None and Path(base).exists()}
        return sorted(there | bases)

    def _check_context(self, stage: Stage) -> None:
        """Check the stage's length limits.

        Raises:
          ConfigError: they exceed the context of a policy that it reads, if that is known.
        """
        lengths = getattr(stage.config, "lengths", None)
        contexts = [self._context(policy) for policy in stage.policies_read]
        if isinstance(lengths, Lengths) and (known := [context for context in contexts if context is not None]):
            try:
                lengths.check(min(known))
            except ConfigError as error:
                raise ConfigError(f"stages.{stage.name}: {error}") from None

    def _context(self, policy: str) -> int | None:
        """The context length of a policy: 'new', an earlier stage or a folder. None if it is unknown."""
        while policy in self.stages and (before := self.stages[policy].policy) is not None:
            policy = before
        cls: Any
        cls, config = self.policy
        return cls.context(config) if policy == NEW else context_of(policy)

    def _check_objective(self, objective: str) -> None:
        stage, _, metric = objective.partition("/")
        if stage not in self.stages or not metric:
            known = stage in self.stages
            wrong = "it has no metric." if known else f"no stage '{short(stage)}'.{did_you_mean(stage, self.stages)}"
            raise ConfigError(
                f"objective={short(objective)}: {wrong} It is stage/metric, as in "
                f"evaluate/heldout/ppo/gold. Stages: {listing(self.stages)}."
            )


def _group(chosen: Chosen | None) -> ConfigGroup | None:
    return None if chosen is None else chosen.group


def _in_order(stages: Mapping[str, ConfigGroup]) -> Iterator[tuple[str, ConfigGroup, Scope, int]]:
    """(name, group, scope, round) of each stage; repeating stages appear once per round."""
    scope = Scope()
    for name, group in stages.items():
        if "repeat" not in group:
            yield name, group, scope, 1
            continue
        *inside, (_, _, after, _) = in_rounds(name, group)
        yield from ((stage, each, scope | inner, number) for stage, each, inner, number in inside)
        scope |= after


def run_name(config: Mapping[str, Any]) -> str:
    """The given name, or one made from the keys that differ between runs. The same configuration gets the same name, and so
    resumes.

    Raises:
      ConfigError: the name cannot name a folder, or holds a secret, such as the value of an environment variable.
    """
    digest = identity.digest(without_secrets(decisive(config)))[:6]
    label = f"{config['experiment_name']}-{in_a_name(config['backend']['name'])}-seed{config['seed']}-{digest}"
    name = label if config["name"] is None else config["name"]
    if without_secrets([name, label]) != [name, label]:
        raise ConfigError(
            "The run's name holds a secret, and would be the name of a folder. Set name=... or experiment_name=... to another."
        )
    return checked_name("The run name", name, NOT_RUNS)


def finished(config: Mapping[str, Any]) -> Path | None:
    """The folder of the run that this configuration describes, if all its stages are done and neither code nor data have
    changed since. Imports neither torch nor JAX."""
    root = root_folder(config["folder"])
    run = RunFolder(root, run_name(config))
    try:
        record, contents = read_record(run.path / "run.json", RUN), read_record(run.path / "stages.json", STAGES)
    except CheckpointError:
        return None
    if record["status"] != "done" or not run.config_file.exists() or run.config_changes(config):
        return None
    template = (config["policy"].get("tokenizer") or {}).get("chat_template")
    if template and template.endswith(".jinja"):
        text = template_text(template)
        if any(content["tokenizer"]["chat_template"] != text for content in contents.values()):
            return None
    source = registry().resolve("data", config["data"]["name"])
    fingerprint = source.fingerprint(component_config(source, config["data"], "data"))
    for stage, content in contents.items():
        folder = StageFolder.of(root, stage, config["backend"]["name"], content)
        if not folder.done or not _up_to_date(content, fingerprint):
            return None
    return run.path


def _up_to_date(content: ConfigGroup, fingerprint: str | None) -> bool:
    """True if the code, data and folders of a stage are unchanged."""
    return (
        content["code"] == identity.code_digests(content["code"])
        and content["data"]["fingerprint"] == fingerprint
        and all(Path(path).exists() and identity.folder_digest(path) == digest for path, digest in content["folders"].items())
    )
