"""Plugins: found by entry point, resolved by (kind, name, backend).

A distribution announces one manifest per plugin package in its metadata:

    [project.entry-points."lockstep.plugins"]
    my_plugin = "my_plugin:plugin"

where ``plugin`` is a `Plugin`. The manifest is import-light: components are ``module:Object`` strings, imported on first
use. Built-in plugins are registered in the same way. Code without a package adds its `Plugin` with `Registry.add`, or the
configuration names ``module:Object`` in place of a registered name. Only such a name makes Python look in the current folder,
and only after all libraries (`use_current_folder`). Nothing else runs from that folder, and no file there shadows a library.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.errors import ConfigError, RegistryError, did_you_mean, listing, raised, short, told

log = logging.getLogger(__name__)

GROUP = "lockstep.plugins"
KINDS = ("backend", "policy", "reward_model", "environment", "engine", "labeler", "attacker", "algorithm", "data", "tracker")


@dataclass(frozen=True)
class Plugin:
    """A manifest.

    Args:
      components: {kind: {name: "module:Object"}}.
      backend: the backend these components are written for; None if they run on any. The exact (kind, name, backend)
        wins over the neutral (kind, name), so a fused kernel can replace an algorithm on one backend only.
      requires: modules the plugin needs; checked without importing them.
      install: the command that installs them, shown to the user.
      conf: the Hydra configuration folder to add to the search path; None for none.
      commands: {command: module}, further commands of `lockstep`; `lockstep.commands` says what such a module must have.
    """

    components: Mapping[str, Mapping[str, str]]
    backend: str | None = None
    requires: Sequence[str] = ()
    install: str = ""
    conf: Path | None = None
    commands: Mapping[str, str] = field(default_factory=dict)

    def missing(self) -> list[str]:
        """Required modules that are not installed; checked without importing any."""
        return [module for module in self.requires if not is_there(module)]

    def check_installed(self, who: str) -> None:
        """
        Raises:
          RegistryError: ``who`` needs a module that is not installed.
        """
        if missing := self.missing():
            raise RegistryError(f"{who} needs {listing(missing)}, not installed. Type: {self.install}")


@dataclass(frozen=True)
class Component:
    kind: str
    name: str
    backend: str | None
    target: str
    distribution: str
    plugin: Plugin | None

    def missing(self) -> list[str]:
        """Required modules that are not installed; checked without importing any."""
        return self.plugin.missing() if self.plugin else []

    def lacking(self) -> str:
        """'no: ...' if its module does not exist, else ''; checked without importing it."""
        module = self.target.partition(":")[0]
        return "" if is_there(module) else f"no: there is no module {module}"

    def load(self) -> type[Any]:
        """Import the class.

        Raises:
          RegistryError: it cannot be imported, or lacks a method of its kind; the message gives the reason and a command that may
            help.
        """
        where = f"{self.kind} '{self.name}' of {self.distribution}"
        if self.plugin:
            self.plugin.check_installed(f"The {where}")
        try:
            if self.plugin is None:
                use_current_folder()
            found = imported(self.target)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # it may even call sys.exit
            raise RegistryError(
                f"The {where} ({self.target}) cannot be imported: {raised(error)}{in_the_way(self.target)}"
            ) from error
        if isinstance(found, type):
            _check_names(found, f"The {where} ({self.target})")
        return found


def is_there(module: str) -> bool:
    """True if the module could be imported. Only its parent packages are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # from a parent package
        return False


@functools.cache
def _check_names(cls: type[Any], who: str) -> None:
    """
    Raises:
      RegistryError: the class lacks a method that its kind must have.
    """

    def public(of: type[Any]) -> set[str]:
        return {name for name, value in vars(of).items() if callable(value) and not name.startswith("_")}

    own, theirs = public(cls), {name for base in cls.__mro__[1:-1] for name in public(base)}
    near = {name: found[0] for name in own - theirs if (found := difflib.get_close_matches(name, theirs - own, 1, 0.85))}
    if lacking := sorted(getattr(cls, "__abstractmethods__", ())):
        meant = f" It has {listing(near)}." if near else ""
        raise RegistryError(f"{who} lacks {listing(lacking)}, which its kind must have.{meant}")
    for name, meant in near.items():
        log.warning("%s has a method '%s', which nothing calls. Did you mean '%s'?", who, name, meant)


def imported(target: str) -> Any:
    """Import and return the object that ``module:Object`` names. Raises whatever the import raises."""
    module, _, attribute = target.partition(":")
    return operator.attrgetter(attribute)(importlib.import_module(module))


def function_at(path: str, where: str) -> Callable[..., Any]:
    """The function that a configuration names as ``module:function``; ``where`` is its key.

    Raises:
      ConfigError: it cannot be imported, or is not a function.
    """
    use_current_folder()
    try:
        function = imported(path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's file may raise anything on import, or call sys.exit
        raise ConfigError(f"{where}='{path}' cannot be imported: {_why_not(path, error)}") from error
    if not callable(function):
        raise ConfigError(f"{where}='{path}' is no function: {told(function)}. Write it as module:function.")
    return function


def _why_not(path: str, error: BaseException) -> str:
    """Why the function at ``path`` cannot be imported, and what exists."""
    module, _, name = path.partition(":")
    if not module or not name:
        return f"{told(error)}.{in_the_way(path)} Write it as module:function."
    if not isinstance(error, AttributeError) or module not in sys.modules:
        return f"{raised(error)}.{in_the_way(path)}"
    there = [each for each, value in vars(sys.modules[module]).items() if inspect.isroutine(value) and not each.startswith("_")]
    missing = f"{module} has no attribute '{name}'.{did_you_mean(name, there)}"
    return f"{missing} Its functions: {listing(there)}.{in_the_way(path)}"


def use_current_folder() -> None:
    """Let Python find the modules that a configuration names in the current folder too, after all libraries."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)


def in_the_way(target: str) -> str:
    """' ./code.py is not used, ...' if a library has the name of a module in the current folder, else ''."""
    name = target.partition(":")[0].partition(".")[0]
    mine = next((path for path in (Path(f"{name}.py"), Path(name)) if path.exists()), None)
    used = getattr(sys.modules.get(name), "__file__", None)
    if mine is None or used is None or Path(used).resolve().is_relative_to(Path.cwd()):
        return ""
    return f" ./{mine} is not used, because a library has its name ({used}): rename it."


@dataclass
class Registry:
    components: dict[tuple[str, str, str | None], Component] = field(default_factory=dict)
    conf: dict[str, Path] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def add(self, plugin: Plugin, distribution: str) -> None:
        """Add a manifest's components.

        Raises:
          RegistryError: an unknown kind, or a (kind, name, backend) or command that is already taken; both owners are named.
        """
        for kind, entries in plugin.components.items():
            if kind not in KINDS:
                raise RegistryError(
                    f"{distribution} registers components of kind '{kind}'.{did_you_mean(kind, KINDS)} Kinds: {', '.join(KINDS)}."
                )
            for name, target in entries.items():
                key = (kind, name, plugin.backend)
                if key in self.components:
                    raise RegistryError(
                        f"Both {self.components[key].distribution} and {distribution} register the {kind} '{name}' for "
                        f"{plugin.backend or 'every backend'}. Rename one, or uninstall one."
                    )
                self.components[key] = Component(kind, name, plugin.backend, target, distribution, plugin)
        for name, module in plugin.commands.items():
            if name in self.commands:
                raise RegistryError(
                    f"{distribution} adds the command '{name}', as another plugin does ({self.commands[name]}). Uninstall one."
                )
            self.commands[name] = module
        if plugin.conf is not None:
            self.conf[distribution] = plugin.conf

    def resolve(self, kind: str, name: str, backend: str | None = None) -> type[Any]:
        """The class registered for exactly this backend, else the backend-neutral one, else the one ``name`` spells
        as ``module:Object``.

        Raises:
          RegistryError: nothing matches; the message gives the nearest name and all that exist.
        """
        return self.find(kind, name, backend).load()

    def find(self, kind: str, name: str, backend: str | None = None) -> Component:
        if ":" in name:
            return Component(kind, name, backend, name, "the configuration", None)
        for key in ((kind, name, backend), (kind, name, None)):
            if key in self.components:
                return self.components[key]
        backend = None if kind == "backend" else backend  # a backend belongs to itself
        here = {n for k, n, b in self.components if k == kind and (b in (backend, None) or kind == "backend")}
        elsewhere = sorted(b for k, n, b in self.components if k == kind and n == name and b)
        scope = f" for backend '{short(backend)}'" if backend else ""
        shown = short(name)
        article = "an" if kind[0] in "aeiou" else "a"
        raise RegistryError(
            f"No {kind} named '{shown}'{scope}.{did_you_mean(name, here)} Registered{scope}: {listing(here)}."
            + (f" '{shown}' exists for backend {listing(elsewhere)}." if elsewhere else "")
            + (f" {self._broken_hint()}" if self.broken else "")
            + f" To use a class of your own, register {article} {kind} plugin or write '{kind}.name=module:Class'."
        )

    def components_of(self, kind: str, backend: str) -> list[Component]:
        """The components of a kind that this backend can use and whose requirements are installed: one per name, the
        backend's own in preference to a neutral one."""
        found: dict[str, Component] = {}
        for component in self:
            usable = component.kind == kind and component.backend in (backend, None) and not component.missing()
            if usable and (component.name not in found or component.backend is not None):
                found[component.name] = component
        return list(found.values())

    def _broken_hint(self) -> str:
        return "Not loaded: " + "; ".join(f"{name}: {reason}" for name, reason in self.broken.items()) + "."

    def __iter__(self) -> Iterator[Component]:
        order = lambda key: (KINDS.index(key[0]), key[1], key[2] or "")  # noqa: E731
        return (self.components[key] for key in sorted(self.components, key=order))


@functools.cache
def registry() -> Registry:
    """The registry of this process, filled from the installed distributions. A manifest that cannot be imported is
    listed with the reason, and the others still work. A manifest that conflicts with another raises RegistryError."""
    found = Registry()
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: e.name):
        distribution = entry.dist.name if entry.dist else entry.value
        try:
            plugin = entry.load()
            if not isinstance(plugin, Plugin):
                raise TypeError(f"{entry.value} is a {type(plugin).__name__}, not a lockstep.registry.Plugin")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # it may even call sys.exit
            found.broken[f"{distribution} ({entry.name})"] = repr(error)
            continue
        found.add(plugin, f"{distribution} ({entry.name})")
    return found
