"""The shape of several devices that act as one."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from lockstep.config.schema import setting
from lockstep.errors import ConfigError

MOST = 2**20


@dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each axis; one may be -1, for all that are left. The mesh changes results by rounding only, so
    it is not part of a stage's identity."""

    data: int = setting(1, "Copies of the parameters; rows are divided among them.", least=-1, most=MOST)
    fsdp: int = setting(1, "Shards of parameters, gradients and moments; rows are divided among them too.", least=-1, most=MOST)
    tensor: int = setting(1, "Shards of each layer's matmuls (Shoeybi et al. 2019).", least=-1, most=MOST)

    def __post_init__(self) -> None:
        if 0 in self._given or self._given.count(-1) > 1:
            raise ConfigError(f"backend.mesh={self}: an axis is a number from 1; one may be -1, for all devices that are left.")

    @property
    def _given(self) -> tuple[int, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def least(self) -> int:
        """The fewest devices that the mesh needs."""
        return math.prod(size for size in self._given if size > 0)

    def sizes(self, devices: int | None) -> dict[str, int]:
        """{axis: size} on that many devices; None means as many as the mesh names.

        Raises:
          ConfigError: the mesh does not fit that number of devices, or needs it for an axis of -1.
        """
        if -1 in self._given and devices is None:
            raise ConfigError(f"backend.mesh={self}: there is no accelerator to count. Say how many: backend.mesh.fsdp=2.")
        if devices is not None and (self.least > devices or (-1 in self._given and devices % self.least)):
            raise ConfigError(f"backend.mesh={self} does not fit the {devices} devices here: its numbers are multiplied.")
        left = (devices or self.least) // self.least
        return {field.name: left if getattr(self, field.name) == -1 else getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        return "{" + ", ".join(f"{f.name}: {getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != 1) + "}"
