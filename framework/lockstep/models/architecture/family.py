"""A model family as one record: how its ``config.json`` is read and written, and how its tensors are named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lockstep.models.architecture.keys import HFConfig
from lockstep.models.architecture.naming import Naming
from lockstep.models.architecture.shape import Architecture


@dataclass(frozen=True)
class Family:
    """Args:
    model_type: its name, as under this key in config.json.
    read, write: convert its config.json to an `Architecture` and back; ``write`` omits the keys that `to_hf` adds for all.
    defaults: transformers' defaults for missing keys; many files on the hub leave keys out.
    causal, classifier: its classes in transformers.
    naming: its tensor names and layouts.
    aliases: {other prefix of its tensors in files or transformers' modules: its own prefix}.
    foreign: prefixes of tensors in such files that are not part of the decoder.
    text_model_of: the ``model_type`` of a larger model whose ``text_config`` is of this family.
    special, refused: its distinctive features and the switches that are refused, for the table in docs/models.md.
    """

    model_type: str
    read: Callable[[HFConfig], Architecture]
    write: Callable[[Architecture], dict[str, Any]]
    defaults: HFConfig
    causal: str
    classifier: str
    special: str
    refused: str
    naming: Naming = Naming()
    aliases: Mapping[str, str] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
    text_model_of: str | None = None

    def usual_name(self, name: str) -> str:
        """The usual name of a tensor whose name may use one of the ``aliases``."""
        alias = next((alias for alias in self.aliases if name.startswith(alias)), "")
        return self.aliases.get(alias, "") + name.removeprefix(alias)
