"""Groups of the configuration become components: the class that the registry has for a name, and its checked settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.config.root import ConfigGroup, component_config, component_name
from lockstep.registry import registry


@dataclass(frozen=True)
class Chosen:
    """A component with its settings, which were parsed from ``group``."""

    component: type[Any]
    config: Any
    group: ConfigGroup


@dataclass(frozen=True)
class Components:
    """Resolves groups on one backend."""

    backend: str

    def of(self, kind: str, group: ConfigGroup, where: str | None = None) -> Chosen:
        """
        Args:
          where: what errors call the group; by default its kind.

        Raises:
          RegistryError: no component of this kind and name runs on the backend.
          ConfigError: a setting is wrong.
        """
        name = component_name(group, where or kind)
        cls = registry().resolve(kind, name, self.backend if kind != "backend" else name)
        return Chosen(cls, component_config(cls, group, where or kind), group)

    def if_any(self, kind: str, group: ConfigGroup | None) -> Chosen | None:
        return None if group is None else self.of(kind, group)

    def scorers(self, group: Mapping[str, Any] | None) -> Iterator[Chosen]:
        """A reward model, and its members."""
        if group is not None:
            scorer = self.of("reward_model", dict(group))
            yield scorer
            yield from self.members(scorer)

    def members(self, chosen: Chosen) -> Iterator[Chosen]:
        """The reward models that a component combines, and their members."""
        for member in chosen.component.inputs(chosen.config).members:
            yield from self.scorers(member)
