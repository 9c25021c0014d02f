"""An experiment: its configuration with every name resolved and every group checked, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.runs import store
from lockstep.config.root import check_root, component_config
from lockstep.config.schema import parse, setting
from lockstep.errors import ConfigError, did_you_mean, listing
from lockstep.runs.evaluation import EvaluationConfig
from lockstep.interfaces import Algorithm, DataSource, RewardModel
from lockstep.registry import registry

ConfigGroup = dict[str, Any]
NEW = "new"
INDECISIVE = ("folder", "name", "objective", "tracker", "checkpoint_every", "samples_every")
"""Keys that decide where results go and how often they are written, but not what they are."""


@dataclass(frozen=True)
class StageConfig:
    """A stage trains (``algorithm``) or evaluates (``evaluation``)."""

    algorithm: ConfigGroup | None = setting(None, "The group of the algorithm that trains.")
    policy: str | None = setting(None, "What it starts from: 'new' for the configured policy, or an earlier stage.")
    reward_model: ConfigGroup | None = setting(None, "The group that scores, where the algorithm or evaluation needs one.")
    changes: ConfigGroup | None = setting(None, "Keys of the algorithm that differ in this stage.")
    evaluation: ConfigGroup | None = setting(None, "The group of the evaluation.")
    seed_offset: int = setting(0, "Added to the run's seed, for stages that differ in nothing else.")


@dataclass(frozen=True)
class Stage:
    """One checked stage. ``config`` is an `EvaluationConfig` or the algorithm's own ``Config``."""

    name: str
    kind: str  # 'train' or 'evaluate'
    component: type[Algorithm] | None
    config: Any
    groups: ConfigGroup
    policy: str | None
    reward_model: ConfigGroup | None
    scorers: tuple[type[RewardModel], ...]
    seed: int

    @property
    def produces(self) -> str:
        return self.component.produces if self.component else "evaluation"

    def arithmetic(self, data: DataSource) -> str:
        """What one step consumes and how many there are, in one line."""
        if self.component:
            return self.component.arithmetic(self.config, data)
        return f"{', '.join(self.config.policies)} on {self.config.prompts} prompts of each split"

    @property
    def modules(self) -> list[str]:
        """Where the code is that makes it: of its classes, what they inherit from, and functions named module:function."""
        classes = [base for cls in (self.component, *self.scorers) if cls for base in cls.__mro__]
        values = [value for group in with_members(self.reward_model) for value in group.values()]
        named = [v.partition(":")[0] for v in values if isinstance(v, str) and re.fullmatch(r"[\w.]+:\w+", v)]
        return [*(cls.__module__ for cls in classes), *named]

    @property
    def inputs(self) -> list[tuple[str, str]]:
        """The stages (or folders, or hub ids) whose output it reads, and what that has to be."""
        policies = [self.policy] if self.policy not in (None, NEW) else []
        if isinstance(self.config, EvaluationConfig):
            policies += [*self.config.policies, self.config.baseline]
        sources = [(name, "policy") for name in policies]
        learned = [group for group in with_members(self.reward_model) if group.get("name") == "learned"]
        return sources + [(group["source"], "reward_model") for group in learned]


class Experiment:
    """The configuration with every name resolved and every group checked.

    Raises:
      LockstepError: the first thing that is wrong, before anything is loaded.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.groups: ConfigGroup = dict(config)
        self.seed: int = check_root(config).seed
        if config.get("evaluation") is not None:
            parse(EvaluationConfig, config["evaluation"], "evaluation")
        self.backend_name: str = config["backend"]["name"]
        self.backend = self._component("backend", config["backend"])
        self.data = self._component("data", config["data"])
        self.policy = self._component("policy", config["policy"])
        self.tracker = self._component("tracker", config["tracker"])
        self.stages: dict[str, Stage] = {}
        for name, group in config["stages"].items():
            self.stages[name] = self._stage(name, group)
        if not self.stages:
            raise ConfigError("The experiment has no stages. Choose one that has: experiment=instructgpt.")
        if (objective := config.get("objective")) and (stage := objective.partition("/")[0]) not in self.stages:
            raise ConfigError(
                f"objective={objective}: no stage '{stage}'.{did_you_mean(stage, self.stages)} It is stage/metric, as in "
                f"evaluate/heldout/ppo/gold. Stages: {listing(self.stages)}."
            )

    @property
    def name(self) -> str:
        return run_name(self.groups)

    def _component(self, kind: str, group: ConfigGroup) -> tuple[type, Any]:
        cls = registry().resolve(kind, group.get("name", "???"), self.backend_name if kind != "backend" else group["name"])
        return cls, component_config(cls, group, kind)

    def _stage(self, name: str, group: ConfigGroup) -> Stage:
        stage = parse(StageConfig, group, f"stages.{name}")
        if (stage.algorithm is None) == (stage.evaluation is None):
            raise ConfigError(f"stages.{name} needs either an algorithm or an evaluation.")
        seed = self.seed + stage.seed_offset
        if seed < 0:
            raise ConfigError(f"stages.{name}.seed_offset={stage.seed_offset} makes the seed {seed}. It must be at least 0.")
        scorers = tuple(self._component("reward_model", group)[0] for group in with_members(stage.reward_model))
        if stage.algorithm is None:
            trained = [s.name for s in self.stages.values() if s.produces == "policy"]
            evaluation = stage.evaluation | {"policies": stage.evaluation.get("policies") or trained}
            config: Any = parse(EvaluationConfig, evaluation, f"stages.{name}.evaluation")
            checked = Stage(name, "evaluate", None, config, evaluation, None, stage.reward_model, scorers, seed)
        else:
            merged = _merge(stage.algorithm, stage.changes or {}, f"stages.{name}.changes")
            cls = registry().resolve("algorithm", merged.get("name", "???"), self.backend_name)
            config = component_config(cls, merged, f"stages.{name}.algorithm")
            if cls.needs_reward_model and not stage.reward_model:
                raise ConfigError(f"stages.{name} ({merged['name']}) needs a reward_model.")
            if stage.policy is None:
                raise ConfigError(f"stages.{name} needs a policy to start from: '{NEW}' or an earlier stage.")
            checked = Stage(name, "train", cls, config, merged, stage.policy, stage.reward_model, scorers, seed)
        for source, kind in checked.inputs:
            if source in self.stages:
                made = self.stages[source].produces
                if made != kind:
                    raise ConfigError(f"stages.{name} needs a {kind} from the stage '{source}', which makes a {made}.")
            elif not Path(source).is_dir() and not (kind == "reward_model" and is_hub_id(source)):
                hub = " A public reward model is a folder or a hub id, owner/name." if kind == "reward_model" else ""
                raise ConfigError(
                    f"stages.{name} reads the stage '{source}', which does not come before it."
                    f"{did_you_mean(source, self.stages)} Before it: {listing(self.stages)}.{hub}"
                )
        return checked


def with_members(group: ConfigGroup | None) -> Iterator[ConfigGroup]:
    """A reward model's group and, of one that is made of others, the groups of its members."""
    if group:
        yield group
        for member in group.get("members") or ():
            yield from with_members(member)


def is_hub_id(source: str) -> bool:
    """owner/name, where ``owner`` is no folder here: then it would be a path that does not exist."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None and not Path(source).parent.is_dir()


def run_name(groups: Mapping[str, Any]) -> str:
    """Given, or made of what tells runs apart: the same configuration gives the same name, and so goes on."""
    digest = store.identity(decisive(groups))[:6]
    label = f"{groups['experiment_name']}-{groups['backend']['name']}-seed{groups['seed']}-{digest}"
    return groups["name"] or label


def decisive(groups: Mapping[str, Any]) -> ConfigGroup:
    """The part of a configuration that decides results."""
    return {key: value for key, value in groups.items() if key not in INDECISIVE}


def _merge(group: ConfigGroup, changes: ConfigGroup, where: str) -> ConfigGroup:
    """``group`` with ``changes`` laid over it; a change of a key that is not there is a mistake."""
    if unknown := [k for k in changes if k not in group]:
        raise ConfigError(f"Unknown key {where}.{unknown[0]}.{did_you_mean(unknown[0], group)} Known: {listing(group)}.")
    return {
        key: _merge(value, changes[key], f"{where}.{key}") if isinstance(value, dict) and isinstance(changes.get(key), dict)
        else changes.get(key, value)
        for key, value in group.items()
    }  # fmt: skip
