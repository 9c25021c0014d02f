"""Several processes that act as one. What is trained is divided among them (FSDP2), and so are rows; what is [batch, time] is
whole on every one.

A process runs the networks on its own rows. Their outputs, [B] or [B, T], are gathered, and every process computes the loss of
all rows. Its gradient with respect to the gathered outputs is the same everywhere; each process takes its own rows of it, and
FSDP sums what the networks make of them. So a loss sees the whole minibatch, whatever it is.

    data x fsdp     what is trained is divided among the processes of a row of the mesh, and equal in its columns (HSDP)

Left out: tensor parallelism, and anything that divides a row. FSDP is imported where it is used: it takes 0.7 s, which a process
alone need not spend.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lockstep.launchers import Place, meeting_place
from lockstep.processes import Processes
from lockstep.storage.weights import as_float32

T = TypeVar("T")
N = TypeVar("N", bound=nn.Module)
COLLECTIVE = datetime.timedelta(minutes=10)
"""After this, a process that waits for the others' tensors raises."""
MESSAGE = datetime.timedelta(days=7)
"""The same for messages: process 0 may have to wait for a server, a lock or a slow disk."""


class Group(Processes):
    """torch's processes. Messages go through gloo, whatever tensors go through."""

    def __init__(self, where: Place, device: torch.device):
        meeting_place(where)  # torch reads the same variables
        if not dist.is_initialized():
            kind = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(kind, rank=where.rank, world_size=where.count, timeout=COLLECTIVE)
        self.rank, self.count = where.rank, where.count
        self.messages = dist.new_group(backend="gloo", timeout=MESSAGE)

    def gather(self, own: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(np.ascontiguousarray(own).copy())
        found = given.new_empty(self.count * len(given), *given.shape[1:])
        dist.all_gather_single(found, given, group=self.messages)
        return found.numpy()


class Mesh:
    """How models and rows are divided among the processes."""

    def __init__(self, group: Group, device: torch.device, data: int, fsdp: int):
        self.group = group
        shape, names = ((fsdp,), ("fsdp",)) if data == 1 else ((data, fsdp), ("data", "fsdp"))
        self.names, self.devices = names, init_device_mesh(device.type, shape, mesh_dim_names=names)

    def __str__(self) -> str:
        return " x ".join(f"{name}={size}" for name, size in zip(self.names, self.devices.shape, strict=True))

    def own(self, rows: int) -> np.ndarray:
        """The indices of this process's rows: as many for each, the last ones copies of row 0 where that does not divide."""
        each = -(-rows // self.group.count)
        index = np.arange(self.group.rank * each, (self.group.rank + 1) * each)
        return np.where(index < rows, index, 0)

    def gather(self, own: Tensor, rows: int) -> Tensor:
        """All ``rows`` of what is [own rows, ...] here. Differentiable."""
        return _Gather.apply(own, self.group)[:rows]

    def divide(self, network: nn.Module, head: nn.Module | None, layers: Sequence[nn.Module]) -> Root:
        """Divide what is trained: a layer at a time, and the rest. Frozen weights stay whole, since models may share them."""
        from torch.distributed.fsdp import fully_shard

        root = Root(network, head)
        frozen = {p for p in network.parameters() if not p.requires_grad}
        for part in [*([] if frozen else layers), root]:
            # Even the root is divided again after each use: else its weights stay whole after a pass without gradients.
            divided = fully_shard(part, mesh=self.devices, reshard_after_forward=True, ignored_params=frozen)
            divided.set_gradient_divide_factor(1.0)  # a loss has divided by what it counts
            divided.set_force_sum_reduction_for_comms(True)
        return root


class Root(nn.Module):
    """Network and head as FSDP's root. Whatever reads their weights is called through it: a layer that is called before its root
    would become one itself."""

    def __init__(self, network: nn.Module, head: nn.Module | None):
        super().__init__()
        self.network, self.head = network, head

    def forward(self, call: Callable[..., Any], *given: Any) -> Any:
        return call(*given)

    def whole(self, call: Callable[[], T]) -> T:
        """What ``call`` returns; for its time, all weights are on every process, and are read without asking the others."""
        from torch.distributed.fsdp import FSDPModule

        parts = [module for module in self.modules() if isinstance(module, FSDPModule)]

        def inside() -> T:
            for part in parts:
                part.unshard()
                part.set_reshard_after_forward(False, recurse=False)
            try:
                return call()
            finally:
                for part in parts:
                    part.set_reshard_after_forward(True, recurse=False)
                    part.reshard()

        return self(inside)


class _Gather(torch.autograd.Function):
    """[own rows, ...] -> [all rows, ...]. The gradient is the same on every process, so its own rows are a part of it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Group) -> Tensor:
        ctx.start, ctx.rows = group.rank * len(own), len(own)
        found = own.new_empty(group.count * len(own), *own.shape[1:])
        dist.all_gather_single(found, own.contiguous())
        return found

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0][ctx.start : ctx.start + ctx.rows].contiguous(), None


def shell(network: N, device: torch.device | str) -> N:
    """A copy whose trained weights have yet to be filled; it shares the frozen ones. FSDP does not copy what it has divided, so
    models keep a shell on the device 'meta', where it takes no memory. On a CPU it takes some once it is written to: FSDP writes
    to the parts that are here."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device=device)) if p.requires_grad else p for p in network.parameters()}
    return copy.deepcopy(network, empty)


def divided(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh")


def full(tensor: Any) -> Tensor:
    """All of a tensor that may be divided: collective."""
    return tensor.full_tensor() if divided(tensor) else tensor


def on_host(tensor: Any) -> np.ndarray:
    """All of a tensor that may be divided, in float32, maybe as a view: collective."""
    return full(tensor.detach()).float().cpu().numpy()


def fill(tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Copy host arrays of the same names, or this process's parts of them, into tensors that may be divided."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            target, rows = (tensor.to_local(), _own_rows(tensor)) if divided(tensor) else (tensor, ...)
            target.copy_(torch.from_numpy(as_float32(arrays[name][rows])))


def _own_rows(tensor: Any) -> slice:
    """Those of a divided tensor that are here, as FSDP deals them out."""
    dimension = next(i for i, placement in enumerate(tensor.placements) if placement.is_shard())
    each = -(-len(tensor) // tensor.device_mesh.size(dimension))
    first = tensor.device_mesh.get_local_rank(dimension) * each
    return slice(first, first + each)
