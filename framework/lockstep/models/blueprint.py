"""A network without its weights: enough to compute how much memory and arithmetic it needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lockstep.models.architecture import Architecture, linear_layers, parameter_shapes, trunk_shapes


@dataclass(frozen=True)
class Adapter:
    """Args:
    base: the folder or hub id of the frozen checkpoint.
    targets: the linear layers to adapt: every layer whose name is one of these or ends in ``.`` and one of these.
    conv1d: the base stores the weights of these layers as [inputs, outputs], as GPT-2 does.
    """

    base: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    conv1d: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def shapes(self, layers: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """{name: shape} of the adapter's tensors on a checkpoint whose linear layers are {name: (inputs, outputs)}."""
        adapted = {name: sizes for name, sizes in layers.items() if self.adapts(name)}
        low = {f"{name}.lora_A.weight": (self.rank, inputs) for name, (inputs, _) in adapted.items()}
        return low | {f"{name}.lora_B.weight": (outputs, self.rank) for name, (_, outputs) in adapted.items()}

    def adapts(self, layer: str) -> bool:
        return any(layer == target or layer.endswith(f".{target}") for target in self.targets)


@dataclass(frozen=True)
class Blueprint:
    """
    Args:
      adapter: trained in place of the network's own parameters, which are frozen and shared.
      teacher: a second network, which is frozen.
      beta: the β of `lockstep.learning.losses.divergence` between the network and its teacher.
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
        """Frozen parameters, shared by all models that adapt the same checkpoint."""
        return self.size if self.adapter else 0

    @property
    def multiplied(self) -> int:
        """Parameters of the trunk's linear layers, which each token is multiplied with."""
        return sum(map(math.prod, linear_layers(self.architecture).values()))
