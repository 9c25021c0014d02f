"""The root of a configuration: the keys that it may have, and checks of its component groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.config.overrides import override
from lockstep.config.schema import REQUIRED, parse, setting
from lockstep.errors import ConfigError, RegistryError, listing, short, told
from lockstep.registry import KINDS, registry
from lockstep.storage.names import NOT_RUNS, checked_name, root_folder

ConfigGroup = dict[str, Any]


@dataclass(frozen=True)
class Root:
    """The keys of the root. Any other key is the user's own, such as an experiment's length limits or an algorithm for an extra
    stage. Another key must read it, as ``${lengths}``; an unread key counts as a misspelling
    (`lockstep.config.compose.resolved`)."""

    experiment_name: str = setting(REQUIRED, "The beginning of the run's name.")
    stages: Mapping[str, ConfigGroup] = setting(REQUIRED, "The stages by name, in the order they run.")
    backend: ConfigGroup = setting(REQUIRED, "A component group, like the others: `name` and the keys of its ``Config``.")
    data: ConfigGroup = setting(REQUIRED, "Where prompts, demonstrations, comparisons and texts come from.")
    policy: ConfigGroup = setting(REQUIRED, "What a stage with ``policy: new`` starts from.")
    tracker: ConfigGroup = setting(REQUIRED, "Where the record goes besides the run folder.")
    reward_model: ConfigGroup | None = setting(None, "Scores responses, if a stage names it.")
    environment: ConfigGroup | None = setting(None, "What policies converse with, if a stage names it; null: nothing.")
    engine: ConfigGroup | None = setting(None, "What draws the responses of all stages that sample; null: the policy's backend.")
    algorithm: ConfigGroup | None = setting(None, "The algorithm that experiments compare.")
    pretrain: ConfigGroup | None = setting(None, "The algorithm of the first stage.")
    sft: ConfigGroup | None = setting(None, "The algorithm of supervised fine-tuning.")
    reward: ConfigGroup | None = setting(None, "The algorithm that makes a reward model.")
    evaluation: ConfigGroup | None = setting(None, "What an evaluation measures; it has no `name`.")
    collection: ConfigGroup | None = setting(None, "What is sampled for labelers; it has no `name`.")
    labeler: ConfigGroup | None = setting(None, "Who ranks what is sampled, if a stage names it.")
    attack: ConfigGroup | None = setting(None, "Which attacks are written, and on which policies; it has no `name`.")
    attacker: ConfigGroup | None = setting(None, "Who writes attacks, if a stage names it.")
    choices: Mapping[str, str] | None = setting(None, "The file chosen for each group; it decides nothing by itself.")
    seed: int = setting(0, "Seeds all random numbers: initial weights, order, sampling.", least=0)
    folder: str = setting("runs", "Where stages and runs are kept.")
    objective: str | None = setting(None, "What a search maximises or minimises: stage/metric.")
    name: str | None = setting(None, "Name of the run's folder; null: made from the configuration.")
    checkpoint_every: int = setting(50, "Steps between checkpoints.", least=1)
    samples_every: int = setting(25, "Steps between rows of the samples table.", least=1)


KEYS = tuple(field.name for field in dataclasses.fields(Root))
GROUPS = {key: key for key in KINDS} | dict.fromkeys(("pretrain", "sft", "reward"), "algorithm")
"""{key of the root: kind of component}."""


def completed(config: Mapping[str, Any]) -> ConfigGroup:
    """``config`` with defaults for the root keys that it lacks.

    Raises:
      ConfigError: a key is missing or has the wrong type, or a component group has no name.
    """
    for kind in KINDS:
        if not isinstance(group := config.get(kind), Mapping) and not (group is None and kind in _MAY_BE_NULL):
            there = listing({component.name for component in registry() if component.kind == kind})
            raise ConfigError(f"{kind} must be a component group, not {told(group)}. Choose one by name, {kind}=NAME: {there}.")
    for key, kind in GROUPS.items():
        if isinstance(name := config.get(key), str):  # a group that is not chosen by its own key
            raise ConfigError(
                f"{key}={short(name)}: the file of {key} is chosen by {kind}@{key}. Type: {override(f'{kind}@{key}', name)}"
            )
    root = parse(Root, {key: value for key, value in config.items() if key in KEYS}, "")
    root_folder(root.folder)
    if root.name is not None:
        checked_name("The run name", root.name, NOT_RUNS)
    for stage in root.stages:
        checked_name("The stage name", stage, ("new",))
    for key in GROUPS:
        if (group := getattr(root, key)) is not None:
            component_name(group, key)
    absent = {field.name: getattr(root, field.name) for field in dataclasses.fields(Root) if field.name not in config}
    return dict(config) | absent


_MAY_BE_NULL = ("reward_model", "environment", "engine", "labeler", "attacker", "algorithm")


def check_groups(config: Mapping[str, Any]) -> None:
    """Check each component group of the root, whether a stage uses it or not. A component that is not installed or belongs to
    another backend is left to the stage that uses it.

    Raises:
      LockstepError: the first problem found.
    """
    for key, kind in GROUPS.items():
        if (group := config[key]) is not None:
            _check_group(kind, group, key, config["backend"]["name"])


def component_name(group: Any, where: str) -> str:
    """The name of a component group's component.

    Raises:
      ConfigError: the group has no name.
    """
    name = group.get("name") if isinstance(group, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where} is a component group, and needs a name: {where}.name={told(name)}.")
    return name


def _check_group(kind: str, group: ConfigGroup, where: str, backend: str | None) -> None:
    name = component_name(group, where)
    try:
        component = registry().find(kind, name, backend)
    except RegistryError:
        if any((c.kind, c.name) == (kind, name) for c in registry()):
            return
        raise
    if not component.missing():
        component_config(component.load(), group, where)


def component_config(cls: type[Any], group: ConfigGroup, where: str) -> Any:
    """A component's group as its ``Config``: every key but ``name``, which chose the component.

    Raises:
      ConfigError: an unknown key, a value that does not fit, or a class without ``Config``.
    """
    if not hasattr(cls, "Config"):
        raise ConfigError(
            f"{cls.__module__}:{cls.__qualname__} has no Config. Give it one: a frozen dataclass with its keys, or a ready one, "
            "as in Config = EnvironmentConfig."
        )
    return parse(cls.Config, {key: value for key, value in group.items() if key != "name"}, where)
