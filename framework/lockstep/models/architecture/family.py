"""What a model family is: one record, which says how its ``config.json`` is read and written and how its tensors are named."""

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
    model_type: the key of its config.json that names it.
    read, write: its config.json to an `Architecture` and back; ``write`` without the keys that `to_hf` adds for all.
    defaults: what transformers' configuration class takes for keys that are left out, as many files on the hub do.
    causal, classifier: its classes in transformers.
    naming: its names and layouts of tensors.
    aliases: other names under which files or transformers' modules hold the same tensors, from their prefixes to its own.
    foreign: prefixes of tensors in such files that are not its decoder's.
    text_model_of: the ``model_type`` of a larger model whose ``text_config`` is of this family.
    special, refused: what distinguishes it and which switches are refused, for the table in docs/models.md.
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
        """Of a tensor that may go by one of the ``aliases``."""
        alias = next((alias for alias in self.aliases if name.startswith(alias)), "")
        return self.aliases.get(alias, "") + name.removeprefix(alias)
