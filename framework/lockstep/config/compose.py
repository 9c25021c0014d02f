"""Hydra: where configuration is found, and how a run's configuration is composed.

Every manifest's ``conf`` folder is on the search path, the core's first. The current folder's ``conf`` comes last, so your own
experiments and presets need no package. Two packages with the same file are refused, because one would silently shadow the
other. A file in the current folder that differs from a package's file of the same name is refused when it is chosen; until then
it may belong to another program.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lockstep.config.folders import CORE, HERE, conf_folders
from lockstep.config.overrides import override, read, shell
from lockstep.config.root import GROUPS, KEYS, completed
from lockstep.errors import ConfigError, LockstepError, did_you_mean, listing, short
from lockstep.registry import KINDS, registry


class LockstepSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for distribution, folder in conf_folders().items():
            if distribution == HERE:  # first what packages register in Python, such as launchers, which Hydra puts last
                search_path.append("schema", "structured://")
            if distribution != CORE:  # the core's is the primary folder already
                search_path.append(distribution, f"file://{folder}")


Plugins.instance().register(LockstepSearchPath)
ConfigStore.instance().store(
    group="hydra/launcher",
    name="processes",
    node={"_target_": "hydra_plugins.lockstep_launcher.ProcessLauncher", "parallel": 1},
)


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """Compose one run's configuration, resolved.

    Raises:
      ConfigError: Hydra or OmegaConf reject it; the message gives the nearest name that exists, or the override to type instead.
    """
    _refuse_doubtful(read(overrides))
    try:
        composed = _compose(overrides, return_hydra_config=True)
    except LockstepError:
        raise
    except Exception as error:  # Hydra's and OmegaConf's own, and a few of Python's
        raise ConfigError(_explain(error, overrides)) from error
    choices = _chosen(composed.hydra.runtime.choices)
    _refuse_unnamed(composed, choices)
    return resolved(composed) | {"choices": choices}


def resolved(config: DictConfig) -> dict[str, Any]:
    """The resolved values, with defaults for absent root keys, and without stages that are null.

    Raises:
      ConfigError: a root key is unknown or has the wrong type, a value is missing, or an interpolation leads nowhere.
    """
    config = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    _refuse_unread(config)
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = short(error.full_key)
        raise ConfigError(f"Missing: {key}. Set it on the command line: {key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, [])) from error
    return completed(_without_null_stages(values))


def _without_null_stages(group: dict[str, Any]) -> dict[str, Any]:
    """A file that extends an experiment leaves out a stage, or one of its rounds, by null, as ``~stages.NAME`` does."""
    if not isinstance(stages := group.get("stages"), dict):
        return group
    kept = {name: _without_null_stages(each) if isinstance(each, dict) else each for name, each in stages.items()}
    return group | {"stages": {name: each for name, each in kept.items() if each is not None}}


def _chosen(choices: Mapping[str, Any]) -> dict[str, str]:
    """{root key: name of its file}, from Hydra's {'algorithm@sft': 'sft', ...}."""
    places = {key: key.partition("@") for key in choices}
    return {at or of: str(choices[key]) for key, (of, _, at) in places.items() if GROUPS.get(at or of) == of and choices[key]}


def default(kind: str) -> str:
    """The name that the core's configuration chooses for a group."""
    choices = OmegaConf.load(conf_folders()[CORE] / "config.yaml").defaults
    return next(choice[kind] for choice in choices if isinstance(choice, DictConfig) and kind in choice)


def group(kind: str, name: str) -> dict[str, Any]:
    """The configuration file ``kind/name.yaml`` with its defaults, from anywhere on the search path; '???' where a value is
    missing. Empty if there is no such file."""
    if not any((folder / kind / f"{name}.yaml").is_file() for folder in conf_folders().values()):
        return {}
    composed = _compose([f"+{kind}={name}"], None)
    return OmegaConf.to_container(composed[kind], resolve=True, throw_on_missing=False)


def _refuse_doubtful(given: Sequence[Override]) -> None:
    """Raise ConfigError if a chosen file is in the current folder and, with other content, in a package."""
    folders = conf_folders()
    if (here := folders.pop(HERE, None)) is None:
        return
    for each in given:
        mine = {file.stem: file for file in (here / each.key_or_group).glob("*.yaml")}
        if not isinstance(name := each.value(), str) or name not in mine:
            continue
        file = f"{each.key_or_group}/{name}.yaml"
        for distribution, folder in folders.items():
            if (folder / file).is_file() and (folder / file).read_bytes() != mine[name].read_bytes():
                raise ConfigError(f"{short(each.input_line)} is {HERE}/{file} and a file of {distribution}. Rename yours.")


def _refuse_unnamed(config: DictConfig, choices: Mapping[str, str]) -> None:
    """Raise ConfigError if a file has one component's name but names another, as when only its ``defaults`` set ``name``."""
    registered = {(component.kind, component.name): component for component in registry()}
    for key, file in choices.items():
        kind = GROUPS[key]
        if (kind, file) not in registered or OmegaConf.select(config, f"{key}.name") == file:
            continue
        if (name := group(kind, file).get("name")) != file:
            raise ConfigError(
                f"{kind}={file}: the file {kind}/{file}.yaml names {kind} '{name}', and {registered[kind, file].distribution} "
                f"registers '{file}'. Write in the file, after its defaults: name: {file}"
            )


def _refuse_unread(config: DictConfig) -> None:
    """Raise ConfigError for a root key that is not one of Lockstep's and that no other key reads."""
    if "experiment" in config:
        raise ConfigError("An experiment file changes the root of the configuration. Its first line must be: # @package _global_")
    for key in (key for key in config if key not in KEYS):
        if key not in _read({k: v for k, v in OmegaConf.to_container(config, resolve=False).items() if k != key}):
            raise ConfigError(
                f"Unknown key {short(str(key))}.{did_you_mean(str(key), KEYS)} Known: {listing(KEYS)}. A key of your own must be "
                f"read by another key, as ${{{short(str(key))}}}."
            )


def _read(values: Any) -> set[str]:
    """All words in interpolations, which include the root keys that they read."""
    if isinstance(values, str):
        return set(re.findall(r"\w+", " ".join(re.findall(r"\$\{.+\}", values))))
    parts = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    return set().union(*map(_read, parts))


def _compose(overrides: Sequence[str], primary: str | None = "config", **how: bool) -> DictConfig:
    with hydra.initialize_config_dir(str(conf_folders()[CORE]), version_base="1.3"):
        return hydra.compose(primary, overrides=list(overrides), **how)


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's or OmegaConf's message in one line, or a message that says what was probably meant."""
    message, given = str(error), read(overrides)
    if told := _about_a_group(message, given):
        return told
    if found := re.search(r"Could not (?:override|delete from config\.) '([^']+)'", message):
        missing = re.search(r"full_key: (\S+)", str(error.__cause__))
        *path, key = (missing[1] if missing else found[1]).split(".")
        rest = [o.input_line for o in given if o.key_or_group != found[1]]
        chosen = [o.input_line for o in given if "." not in o.key_or_group]  # if other keys are wrong, too
        for others in (rest, chosen):
            with contextlib.suppress(HydraException, OmegaConfBaseException):
                config = _compose(others)
                if another := _read_from(config, path, key):
                    return another
                found_group = OmegaConf.select(config, ".".join(path)) if path else config
                if isinstance(found_group, DictConfig):
                    return _no_key(path, key, found_group)
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", message):
        return no_file(found[1], found[2])
    for each in given:
        is_text = isinstance(each.value(), (str, QuotedString))
        if message.startswith("Config group override must be a string") and not is_text and _choices(each.key_or_group):
            return f"{short(each.input_line)}: a group is chosen by the name of one of its files. {_there_are(each.key_or_group)}"
        if message.startswith("Ambiguous value") and each.is_sweep_override():
            key, text = each.get_key_element(), short(each.input_line.partition("=")[2])
            return (
                f"{short(each.input_line)} gives several values, and only a sweep takes them: add -m. For a list, type: "
                f"{shell(f'{key}=[{text}]')}. For the text, type: {override(key, text)}"
            )
    if found := re.search(r"Interpolation key '([^']+)' not found\s+full_key: (\S+)", message):
        return f"{short(found[2])} reads ${{{short(found[1])}}}, and the configuration has no {short(found[1])}."
    if isinstance(error, UnicodeDecodeError):
        return f"{listing(str(file) for file in _files() if not _is_utf8(file))} is not UTF-8: {error.reason}."
    told = " ".join(": ".join(str(each).strip() for each in (error, error.__cause__) if each is not None).split())
    told = re.sub(r" (object_type=\w+|Set the environment variable HYDRA_FULL_ERROR\S* .*)", "", told)
    told = re.sub(r" full_key: (\S+)", r" (at \1)", told)
    return re.sub(r"\S{200,}", lambda found: short(found[0]), told)


def _about_a_group(message: str, given: Sequence[Override]) -> str | None:
    """What to type instead of an override that chooses a group's file in a way that Hydra rejects."""
    removed = [each.key_or_group for each in given if each.is_delete()]
    if message.startswith("Error resolving interpolation '${experiment}/") and removed:
        kind = "experiment" if "experiment" in removed else "algorithm"
        return f"~{kind}: a run has one, and leaves out what it need not do: ~stages.NAME. Or choose another. {_there_are(kind)}"
    if not message.startswith(("Multiple values for", "Could not override", "force-add")):
        return None
    for each in given:
        kind, place = each.key_or_group, each.package or each.key_or_group
        if not _choices(kind) or (each.package and f"{kind}@{place}" not in message):
            continue
        places = [kind, *(f"{kind}@{key}" for key, of in GROUPS.items() if of == kind != key)]
        right = kind if place == kind else f"{kind}@{place}"
        if right in places and (each.package == kind or each.is_add() or each.is_force_add()):
            return f"{short(each.input_line)}: to choose another file of {kind}, type: {override(right, each.value())}"
        if kind in GROUPS and right not in places:
            return f"{short(each.input_line)}: no {kind} is chosen there. What can be chosen: {', '.join(places)}."
    return None


def _files() -> list[Path]:
    return [file for folder in conf_folders().values() for file in folder.rglob("*.yaml")]


def _is_utf8(file: Path) -> bool:
    try:
        file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _choices(group: str) -> set[str]:
    return {file.stem for folder in conf_folders().values() for file in (folder / group).glob("*.yaml")}


def _read_from(config: DictConfig, path: Sequence[str], key: str) -> str | None:
    """What to type instead of a key in a group that only refers to another group, as ``${lengths}``."""
    for end in range(1, len(path) + 1):
        node = OmegaConf.select(config, ".".join(path[: end - 1])) if end > 1 else config
        inner = node._get_node(path[end - 1]) if isinstance(node, DictConfig) else None
        if inner is not None and inner._is_interpolation() and (of := re.fullmatch(r"\$\{([\w.]+)\}", str(inner._value()))):
            there = ".".join([of[1], *path[end:], key])
            return f"{short('.'.join(path[:end]))} is ${{{of[1]}}}, for all that read it: type {short(there)}=..."
    return None


def _no_key(path: Sequence[str], key: str, values: DictConfig) -> str:
    """What to type instead of a key that a group does not have. It may belong to an inner group or to another of its files."""
    keys = [str(each) for each in values]
    name, near = short(".".join([*path, key])), did_you_mean(key, keys if path else [*keys, "experiment"])
    if len(path) == 1 and not near and (files := _with_key(path[0], key)):
        return (
            f"No key '{name}' in the chosen {path[0]}. It is a key of {listing(files)}: to choose a file and set its key, type: "
            f"{path[0]}={files[0]} {name}=..."
        )
    inside = [each for each in keys if OmegaConf.is_dict(inner := values._get_node(each)) and key in inner]
    if inside and not near:
        return f"No key '{name}'. It is a key of {listing(inside)}: type {'.'.join([*path, inside[0], key])}=..."
    return f"No key '{name}'.{near} Keys of {short('.'.join(path)) or 'the configuration'}: {listing(keys)}."


def _with_key(kind: str, key: str) -> list[str]:
    """The packages' files of a kind of component that have the key."""
    folders = registry().conf.values() if kind in KINDS else ()
    names = {file.stem for folder in folders for file in (folder / kind).glob("*.yaml")}
    return sorted(name for name in names if key in group(kind, name))


def no_file(group: str, name: str) -> str:
    """What to choose instead of a file that does not exist."""
    return f"No {short(group)} named '{short(name)}'.{did_you_mean(name, _choices(group))} {_there_are(group)}"


def _there_are(group: str) -> str:
    return f"There are: {listing(_choices(group))}."
