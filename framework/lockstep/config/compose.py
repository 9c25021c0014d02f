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
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lockstep.config.root import KEYS
from lockstep.errors import ConfigError, RegistryError, did_you_mean, listing
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
      ConfigError: Hydra or OmegaConf reject it; the message gives the nearest name that exists.
    """
    return resolved(partial(overrides))


def partial(overrides: Sequence[str]) -> DictConfig:
    """Like `compose`, but interpolations and missing values stay unresolved."""
    try:
        return _compose(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(str(error), overrides)) from error


def resolved(config: DictConfig) -> dict[str, Any]:
    """
    Raises:
      ConfigError: a root key is unknown, a value is missing, or an interpolation leads nowhere.
    """
    _refuse_unread(config)
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"Missing: {error.full_key}. Set it on the command line: {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(str(error), [])) from error


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
    for key in (key for key in config if key not in KEYS):
        if key not in _read({k: v for k, v in OmegaConf.to_container(config, resolve=False).items() if k != key}):
            raise ConfigError(
                f"Unknown key {key}.{did_you_mean(str(key), KEYS)} Known: {listing(KEYS)}. A key of your own must be read by "
                f"another key, as ${{{key}}}."
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


def _explain(message: str, overrides: Sequence[str]) -> str:
    """Hydra's message in one line, or what was probably meant."""
    if found := re.search(r"Could not override '([^']+)'", message):
        *path, key = found[1].split(".")
        rest = [o for o in overrides if not re.match(rf"[+~]*{re.escape(found[1])}(=|$)", o)]
        with contextlib.suppress(HydraException, OmegaConfBaseException):
            group = OmegaConf.select(_compose(rest), ".".join(path)) if path else _compose(rest)
            if isinstance(group, DictConfig):
                where, keys = ".".join(path) or "the configuration", [str(k) for k in group]
                return f"No key '{found[1]}'.{did_you_mean(key, keys)} Keys of {where}: {listing(keys)}."
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", message):
        group, name = found[1], found[2]
        choices = {p.stem for folder in conf_folders().values() for p in (folder / group).glob("*.yaml")}
        return f"No {group} named '{name}'.{did_you_mean(name, choices)} There are: {listing(choices)}."
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line for line in lines if line and "HYDRA_FULL_ERROR" not in line)
