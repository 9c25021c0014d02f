"""Hydra: where configuration is found and how a run's is composed.

Every manifest's ``conf`` folder is on the search path, the core's first. Two folders with the same file would silently
shadow each other, so that is refused.
"""

from __future__ import annotations

import collections
import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lockstep.config.overrides import override, read, shell
from lockstep.config.root import KEYS, completed
from lockstep.errors import ConfigError, LockstepError, RegistryError, did_you_mean, listing, short
from lockstep.registry import registry

CORE = "lockstep-rlhf (core)"


class LockstepSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for distribution, folder in conf_folders().items():
            if distribution != CORE:  # the core's is the primary folder already
                search_path.append(distribution, f"file://{folder}")


def conf_folders() -> dict[str, Path]:
    """{distribution: folder}, the core's first.

    Raises:
      RegistryError: two folders have a file of the same name.
    """
    owners: dict[Path, list[str]] = collections.defaultdict(list)
    for distribution, folder in registry().conf.items():
        for file in folder.rglob("*.yaml"):
            owners[file.relative_to(folder)].append(distribution)
    for file, distributions in owners.items():
        if len(distributions) > 1:
            raise RegistryError(f"The configuration {file} comes from {' and from '.join(distributions)}. Rename one.")
    return dict(registry().conf)


Plugins.instance().register(LockstepSearchPath)
ConfigStore.instance().store(
    group="hydra/launcher",
    name="processes",
    node={"_target_": "hydra_plugins.lockstep_launcher.ProcessLauncher", "parallel": 1},
)


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """One run's configuration, resolved.

    Raises:
      ConfigError: Hydra or OmegaConf reject it; the message gives the nearest name that exists, or the override to type instead.
    """
    read(overrides)
    try:
        composed = _compose(overrides)
    except LockstepError:
        raise
    except Exception as error:  # Hydra's and OmegaConf's own, and a few of Python's
        raise ConfigError(_explain(error, overrides)) from error
    return resolved(composed)


def resolved(config: DictConfig) -> dict[str, Any]:
    """The values, with defaults for keys of the root that are absent.

    Raises:
      ConfigError: a root key is unknown or has another type, a value is missing, or an interpolation leads nowhere.
    """
    _refuse_unread(config)
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = short(error.full_key)
        raise ConfigError(f"Missing: {key}. Set it on the command line: {key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, [])) from error
    return completed(values)


def default(kind: str) -> str:
    """The name that the core's configuration chooses for a group."""
    choices = OmegaConf.load(conf_folders()[CORE] / "config.yaml").defaults
    return next(choice[kind] for choice in choices if isinstance(choice, DictConfig) and kind in choice)


def group(kind: str, name: str) -> dict[str, Any]:
    """The configuration file ``kind/name.yaml`` with its defaults, from anywhere on the search path; '???' where a value is
    missing. Empty if there is no such file."""
    if not any((folder / kind / f"{name}.yaml").is_file() for folder in conf_folders().values()):
        return {}
    composed = _compose(["~experiment", f"{kind}={name}"])
    return OmegaConf.to_container(composed[kind], resolve=True, throw_on_missing=False)


def _refuse_unread(config: DictConfig) -> None:
    """Raises ConfigError for a root key that is not one of Lockstep's and that no other key reads."""
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


def _compose(overrides: Sequence[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(conf_folders()[CORE]), version_base="1.3"):
        return hydra.compose("config", overrides=list(overrides))


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's or OmegaConf's message in one line, or what was probably meant."""
    message, given = str(error), read(overrides)
    if found := re.search(r"Could not override '([^']+)'", message):
        missing = re.search(r"full_key: (\S+)", str(error.__cause__))
        *path, key = (missing[1] if missing else found[1]).split(".")
        rest = [o.input_line for o in given if o.key_or_group != found[1]]
        with contextlib.suppress(HydraException, OmegaConfBaseException):
            group = OmegaConf.select(_compose(rest), ".".join(path)) if path else _compose(rest)
            if isinstance(group, DictConfig):
                where, keys = short(".".join(path)) or "the configuration", [str(k) for k in group]
                return f"No key '{short('.'.join([*path, key]))}'.{did_you_mean(key, keys)} Keys of {where}: {listing(keys)}."
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", message):
        return (
            f"No {short(found[1])} named '{short(found[2])}'.{did_you_mean(found[2], _choices(found[1]))} {_there_are(found[1])}"
        )
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


def _there_are(group: str) -> str:
    return f"There are: {listing(_choices(group))}."
