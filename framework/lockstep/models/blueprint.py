"""A network without its weights: what it takes to say how much memory and arithmetic it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lockstep.models.architecture import Architecture, linear_layers, parameter_shapes, trunk_shapes

if TYPE_CHECKING:
    from lockstep.models.adapters import Adapter


@dataclass(frozen=True)
class Blueprint:
    """
    Args:
      adapter: trained in place of the network's own parameters, which are frozen and shared.
      teacher: beside it, frozen, with the weight ``beta`` of `lockstep.learning.losses.divergence`.
    """

    architecture: Architecture
    adapter: Adapter | None = None
    language_head: bool = True
    scalar_head: bool = False
    teacher: Blueprint | None = None
    beta: float = 1.0

    @property
    def size(self) -> int:
        """Parameters of the network, without an adapter or a scalar head."""
        a = self.architecture
        shapes = parameter_shapes(a) if self.language_head else trunk_shapes(a)
        return sum(map(math.prod, shapes.values()))

    @property
    def trained(self) -> int:
        """Parameters that training changes."""
        head = (self.architecture.hidden_size + 1) * self.scalar_head
        if self.adapter is None:
            return self.size + head
        return sum(map(math.prod, self.adapter.shapes(linear_layers(self.architecture)).values())) + head

    @property
    def frozen(self) -> int:
        """Parameters that are shared by all that adapt the same checkpoint."""
        return self.size if self.adapter else 0

    @property
    def multiplied(self) -> int:
        """Parameters of the trunk that each token is multiplied with: its linear layers'."""
        return sum(map(math.prod, linear_layers(self.architecture).values()))
