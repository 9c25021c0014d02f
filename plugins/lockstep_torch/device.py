"""PyTorch on a device: precision and threads. The part of the backend that models need."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from lockstep.config.mesh import MeshConfig
from lockstep.config.schema import setting
from lockstep.errors import ConfigError
from lockstep.interfaces import Backend
from lockstep.launchers import place
from lockstep_torch import pieces
from lockstep_torch.mesh import Group, Mesh

log = logging.getLogger(__name__)


class TorchDevice(Backend):
    """`TorchBackend` without its learner, because learners import the models, which import this file."""

    @dataclass(frozen=True)
    class Config:
        device: str = setting("auto", "cpu, cuda, cuda:1, mps, ...; auto: the first accelerator, else the CPU.")
        precision: Literal["float32", "bfloat16"] = setting("float32", "Matmul inputs; weights and Adam stay in float32.")
        gradient_checkpointing: bool = setting(
            False,
            "Recompute each layer's inner activations for the gradient (Chen et al. 2016): saves memory, adds a forward pass.",
        )
        cuda_graphs: bool = setting(
            True,
            "On CUDA devices, decode with one launch per token instead of one per kernel. Only for networks that run in this "
            "project's own decoder, without a mesh.",
        )
        compile: bool = setting(
            False,
            "Fuse the operations between matmuls with torch.compile: log-probabilities in every network; norms, rotations and "
            "gates in those that run in this project's own decoder. Needs a C++ compiler, or Triton on CUDA devices, and takes "
            "a minute the first time. Not yet run on a GPU.",
        )
        threads: int | None = setting(None, "CPU threads; null: one per core.", least=1, most=4096)
        mesh: MeshConfig = setting(MeshConfig(), "How to shard models and rows over several devices.")

    name = "torch"

    def __init__(self, config: Config):
        here = place()
        self.config = config
        self.device = _device(config.device, here.local if here.count > 1 else None)
        self.mesh: Mesh | None = None
        if here.count > 1:
            self.processes = group = Group(here, self.device)
            self.mesh = Mesh(group, self.device, *axes(config.mesh, here.count))
        elif config.mesh != MeshConfig():
            log.warning("backend.mesh=%s: this is one process, and runs as one", config.mesh)
        self.trunks: dict[str, Any] = {}
        """Frozen networks that adapters share, by checkpoint path."""
        if config.compile:
            pieces.DEVICES.add(self.device.type)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.precision == "bfloat16" and self.device.type == "cpu" and (factor := _bfloat16_takes()) > 2:
            faster = "backend.precision=float32 is faster"
            log.warning("bfloat16 matmuls take %.0f times as long as float32 ones on this processor: %s", factor, faster)

    def describe(self) -> dict[str, str]:
        card = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        mesh = {} if self.mesh is None else {"mesh": str(self.mesh)}
        return {"torch": torch.__version__, "device": card, "precision": self.config.precision, **mesh}

    @classmethod
    def workers(cls, config: Config) -> int:
        if config.mesh == MeshConfig():
            return 1
        devices = torch.cuda.device_count() if _device(config.device, None).type == "cuda" else None
        return math.prod(axes(config.mesh, devices))

    def peak_memory_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def put(self, array: np.ndarray) -> torch.Tensor:
        """Move a host array to the device. Token ids become int64, which torch needs for indexing. uint32 seeds become int32 with
        the same bits, because torch cannot compute with uint32."""
        array = np.ascontiguousarray(array)
        if array.dtype == np.uint32:
            return torch.as_tensor(array.view(np.int32)).to(self.device)
        tensor = torch.as_tensor(array)
        return tensor.to(self.device, torch.int64 if tensor.dtype == torch.int32 else None)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """A context that runs matmuls in bfloat16 and the rest in float32; with precision=float32, it changes nothing."""
        if self.config.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def axes(config: MeshConfig, devices: int | None) -> tuple[int, int, int]:
    """The sizes of the axes data, fsdp and tensor.

    Raises:
      ConfigError: the mesh does not fit the devices, or its size is not the number of started processes.
    """
    sizes = config.sizes(devices)
    started = place().count
    if started > 1 and math.prod(sizes.values()) != started:
        has = math.prod(sizes.values())
        raise ConfigError(f"backend.mesh={config} is of {has} processes, and {started} were started. Type: backend.mesh.fsdp=-1")
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def _device(name: str, number: int | None) -> torch.device:
    """The torch device of this name. ``number``: this process's number on its host; None if it is the only process."""
    if number is not None and name in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        raise ConfigError(f"backend.device='{name}' is not usable here ({count} accelerators found): {error}") from error
    return torch.device(name)


def _bfloat16_takes() -> float:
    """The time of a bfloat16 matmul divided by that of a float32 one. Processors without bfloat16 instructions emulate them."""
    square = torch.ones(256, 256)

    def seconds(x: torch.Tensor) -> float:
        started = time.perf_counter()
        x @ x
        return time.perf_counter() - started

    return min(seconds(square.bfloat16()) for _ in range(3)) / min(seconds(square) for _ in range(3))
