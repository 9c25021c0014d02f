"""Several processes that act as one. Trained weights are sharded among them (FSDP2), and so are rows. Every process has all of
each [batch, time] array.

Each process runs the networks on its own rows. Their outputs, [B] or [B, T], are gathered, and every process computes the loss of
all rows. The gradient of the loss with respect to the gathered outputs is the same everywhere. Each process takes its own rows of
it, and FSDP sums the gradients that the networks compute from them. So every loss sees the whole minibatch.

    data x fsdp             trained weights are sharded along fsdp and replicated along data (HSDP)
    data x fsdp x tensor    the layers' matmuls are also sharded along tensor, among processes that have the same rows

Not supported: sharding a row of tokens. FSDP is imported where it is used, because the import takes 0.7 s, which a single process
can save.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lockstep.errors import ConfigError, LockstepError
from lockstep.launchers import Place, meeting_place
from lockstep.processes import SILENCE, Processes
from lockstep.storage.weights import as_float32

T = TypeVar("T")
N = TypeVar("N", bound=nn.Module)
COLLECTIVE = datetime.timedelta(minutes=10)
"""A process that waits this long for the others' tensors raises."""
MESSAGE = datetime.timedelta(days=7)
"""The same limit for messages: process 0 may have to wait for a server, a lock or a slow disk. It ends earlier if one stops
responding (`Pulse`)."""
BEATS = 10
"""Signs of life in the time that a process may be silent."""


class Group(Processes):
    """The processes of torch.distributed. Messages always go through gloo, even if tensors go through NCCL."""

    def __init__(self, where: Place, device: torch.device):
        meeting_place(where)  # checks the variables that torch reads
        self.pulse = _joined(where, "nccl" if device.type == "cuda" else "gloo")
        self.rank, self.count = where.rank, where.count
        self.messages = dist.new_group(backend="gloo", timeout=MESSAGE)

    def gather(self, own: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(np.ascontiguousarray(own).copy())
        found = given.new_empty(self.count * len(given), *given.shape[1:])
        self.pulse.wait(dist.all_gather_single(found, given, group=self.messages, async_op=True))
        return found.numpy()


@functools.cache
def _joined(where: Place, kind: str) -> Pulse:
    """Join the other processes, once."""
    store, *_ = next(dist.rendezvous("env://", where.rank, where.count))
    dist.init_process_group(kind, store=store, rank=where.rank, world_size=where.count, timeout=COLLECTIVE)
    pulse = Pulse(dist.PrefixStore("lockstep/pulse", store), where)
    pulse.start()
    return pulse


class Pulse(threading.Thread):
    """Says every few seconds that this process lives, and hears it of the others: they all write counts into the store where they
    met. `jax.distributed` has such a thread; torch has none."""

    def __init__(self, store: dist.Store, where: Place):
        super().__init__(name="pulse", daemon=True)
        self.store, self.where, self.every = store, where, SILENCE / BEATS
        self.heard = {rank: b"" for rank in range(where.count) if rank != where.rank}
        """{other process: its last count}"""

    def run(self) -> None:
        with contextlib.suppress(RuntimeError):  # process 0, which keeps the store, is gone
            for count in itertools.count():
                self.store.set(str(self.where.rank), str(count))
                for rank in self.heard:
                    if self.store.check([str(rank)]):
                        self.heard[rank] = self.store.get(str(rank))
                time.sleep(self.every)

    def wait(self, work: dist.Work) -> None:
        """Wait for a collective for as long as all processes live.

        Raises:
          LockstepError: one of them has stopped responding.
        """
        before, silent = dict(self.heard), dict.fromkeys(self.heard, 0)
        while True:
            with contextlib.suppress(RuntimeError):
                work.wait(datetime.timedelta(seconds=self.every))
            if work.is_completed():
                work.wait()  # raises what it came to
                return
            # Counted here, not measured: if all processes are suspended together, none of them was silent.
            silent = {rank: silent[rank] + 1 if count == before[rank] else 0 for rank, count in self.heard.items()}
            before = dict(self.heard)
            if stopped := [rank for rank, times in silent.items() if times >= BEATS]:
                raise LockstepError(
                    f"Process {stopped[0]} of {self.where.count} has not responded for {SILENCE:.0f} seconds: it was suspended, "
                    "or its host is gone or has no memory left. The same command resumes the run."
                )


class Mesh:
    """How models and rows are sharded among the processes."""

    def __init__(self, group: Group, device: torch.device, data: int, fsdp: int, tensor: int):
        self.group = group
        sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
        self.sizes = {name: size for name, size in sizes.items() if name == "fsdp" or size > 1}
        devices = init_device_mesh(device.type, tuple(self.sizes.values()), mesh_dim_names=tuple(self.sizes))
        self.tensor = TensorAxis(devices["tensor"]) if tensor > 1 else None
        names = tuple(name for name in self.sizes if name != "tensor")
        self.devices = devices if self.tensor is None else devices[names]
        self.copies = tensor
        """Processes with the same rows."""
        self.row_parts, self.row_part = group.count // tensor, group.rank // tensor

    def __str__(self) -> str:
        return " x ".join(f"{name}={size}" for name, size in self.sizes.items())

    def own(self, rows: int) -> np.ndarray:
        """The indices of this process's rows. Every process has the same number; if the rows do not divide evenly, the last ones
        are copies of row 0."""
        each = -(-rows // self.row_parts)
        index = np.arange(self.row_part * each, (self.row_part + 1) * each)
        return np.where(index < rows, index, 0)

    def gather(self, own: Tensor, rows: int) -> Tensor:
        """Gather every process's [own rows, ...] into [rows, ...]. Differentiable."""
        return _Gather.apply(own, self)[:rows]

    def gather_on_host(self, own: np.ndarray, rows: int) -> np.ndarray:
        """`gather` for host arrays."""
        return self.once(self.group.gather(own))[:rows]

    def once(self, gathered: Any) -> Any:
        """Of an array gathered from all processes, keep one process's rows for each part of the rows."""
        each = gathered.reshape(self.row_parts, self.copies, -1, *gathered.shape[1:])[:, 0]
        return each.reshape(-1, *gathered.shape[1:])

    def divide_matmuls(self, network: Any) -> None:
        """Shard the layers' trained matmuls, if the mesh has an axis for it.

        Raises:
          ConfigError: they cannot be sharded this way.
        """
        if self.tensor is not None:
            network.divide_matmuls(self.tensor)

    def divide(self, network: Any, head: nn.Module | None) -> Root:
        """Shard the trained weights: each layer on its own, then the rest. Frozen weights stay as they are, because models may
        share them.

        Raises:
          ConfigError: the network's matmuls cannot be sharded along this mesh.
        """
        from torch.distributed.fsdp import fully_shard

        self.divide_matmuls(network)
        layers = network.layers()
        root = Root(network, head)
        frozen = {p for p in network.parameters() if not p.requires_grad}
        for part in [*([] if frozen else layers), root]:
            # Even the root is resharded after each use: else its weights stay whole after a pass without gradients.
            divided = fully_shard(part, mesh=self.devices, reshard_after_forward=True, ignored_params=frozen)
            divided.set_gradient_divide_factor(1.0)  # a loss already divides by what it counts
            divided.set_force_sum_reduction_for_comms(True)
        return root


class Root(nn.Module):
    """Network and head as FSDP's root. Call everything that reads their weights through it: a layer that is called before its
    root would become a root itself."""

    def __init__(self, network: nn.Module, head: nn.Module | None):
        super().__init__()
        self.network, self.head = network, head

    def forward(self, call: Callable[..., Any], *given: Any) -> Any:
        return call(*given)

    def whole(self, call: Callable[[], T]) -> T:
        """Run ``call`` and return its result. Meanwhile every process has all weights and reads them without communication."""
        from torch.distributed.fsdp import FSDPModule

        parts = [module for module in self.modules() if isinstance(module, FSDPModule)]

        def inside() -> T:
            for part in parts:
                part.unshard()
                part.set_reshard_after_forward(False, recurse=False)
            try:
                with as_own(self):
                    return call()
            finally:
                for part in parts:
                    part.set_reshard_after_forward(True, recurse=False)
                    part.reshard()

        return self(inside)


class _Gather(torch.autograd.Function):
    """[own rows, ...] -> [all rows, ...]. The gradient is the same on every process, so each takes its own rows of it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, mesh: Mesh) -> Tensor:
        ctx.start, ctx.rows = mesh.row_part * len(own), len(own)
        found = own.new_empty(mesh.group.count * len(own), *own.shape[1:])
        dist.all_gather_single(found, own.contiguous())
        return mesh.once(found)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0][ctx.start : ctx.start + ctx.rows].contiguous(), None


class TensorAxis:
    """Processes that a layer's matmuls are sharded among (Shoeybi et al. 2019, section 3): the matmuls at its start by their
    outputs, those at its end by their inputs. ``copied`` goes before the former, ``summed`` after the latter."""

    def __init__(self, devices: DeviceMesh):
        self.devices, self.size, self.group = devices, devices.size(), devices.get_group()
        # Its warnings would say how a tensor that is sharded twice is gathered, and that there are faster ways.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

    def __deepcopy__(self, memo: Any) -> TensorAxis:
        return self  # networks are copied, processes are not

    def copied(self, x: Tensor) -> Tensor:
        """x itself; its gradient is summed over the processes."""
        return _Copied.apply(x, self)

    def product(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """x weightᵀ in float32, to be summed over the processes. ``dtype``: of the matmul's inputs."""
        x, weight = x.to(dtype), weight.to(dtype)
        return _Product.apply(x, weight) if dtype != torch.float32 else x @ weight.T

    def summed(self, part: Tensor) -> Tensor:
        """The sum of all processes' parts; each part's gradient is that of the sum."""
        return _Summed.apply(part, self)

    def add(self, x: Tensor) -> None:
        """Add the other processes' x to this one, in place."""
        dist.all_reduce(x, group=self.group)

    def divide(self, layer: nn.Linear, axis: int) -> None:
        """Keep this process's shard of a layer without bias: its outputs (0) or its inputs (1). The weight must be filled
        afterwards.

        Raises:
          ConfigError: the outputs or inputs do not divide evenly among the processes.
        """
        if layer.weight.shape[axis] % self.size:
            size = layer.weight.shape[axis]
            raise ConfigError(f"backend.mesh.tensor={self.size} does not divide a matmul of {size} columns evenly.")
        part = layer.weight.detach().chunk(self.size, axis)[0].contiguous()
        layer.weight = nn.Parameter(self.placed(part, axis))

    def placed(self, part: Tensor, axis: int) -> Tensor:
        """This process's part of a weight, as a shard."""
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(part, self.devices, [Shard(axis)], run_check=False)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: TensorAxis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        slope = slopes[0].to(torch.float32, copy=True)
        ctx.axis.add(slope)
        return slope.to(slopes[0].dtype), None


class _Product(torch.autograd.Function):
    """x weightᵀ of [..., inputs] and [outputs, inputs], in float32. Partial sums that are each rounded to bfloat16 add up to a
    larger error than rounding the whole sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        rows = x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            if x.device.type == "cuda":
                found = torch.mm(rows, weight.T, out_dtype=torch.float32)
            else:  # other devices have no such kernel
                found = rows.float() @ weight.float().T
        return found.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors  # each only if the other one is trained
        of_x = None if weight is None else slopes[0].to(weight.dtype) @ weight
        of_weight = None if x is None else slopes[0].to(x.dtype).flatten(0, -2).T @ x.flatten(0, -2)
        return of_x, of_weight


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: TensorAxis) -> Tensor:
        found = x.clone()
        axis.add(found)
        return found

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0], None


def shell(network: N, device: torch.device | str) -> N:
    """A copy that shares the frozen weights; its trained weights must be filled afterwards. FSDP does not copy what it has
    sharded, so models keep a shell on the device 'meta', where it takes no memory. On a CPU, a shell takes memory only where it
    is written to, and FSDP writes only to this process's shards."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device=device)) if p.requires_grad else p for p in network.parameters()}
    return copy.deepcopy(network, empty)


@contextlib.contextmanager
def as_own(network: nn.Module) -> Iterator[None]:
    """Meanwhile the weights that are sharded are parameters of this process's shards alone. Autocast casts a parameter once; the
    shard of a DTensor it would cast at each read, for each token."""
    weights = _divided_weights(network)
    for module, name, weight in weights:
        module.register_parameter(name, nn.Parameter(local(weight.detach())))
    try:
        yield
    finally:
        for module, name, weight in weights:
            module.register_parameter(name, weight)


def keep_own(network: nn.Module) -> None:
    """Freeze the network's weights, and replace those that are sharded by this process's shards, which nothing will gather."""
    for module, name, weight in _divided_weights(network.requires_grad_(False)):
        module.register_parameter(name, nn.Parameter(local(weight.detach()), requires_grad=False))


def _divided_weights(network: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(module, name, weight) of every weight that is sharded."""
    found = [(module, *named) for module in network.modules() for named in module.named_parameters(recurse=False)]
    return [(module, name, weight) for module, name, weight in found if divided(weight)]


def divided(tensor: Tensor) -> bool:
    """True if the tensor is sharded (a DTensor)."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """This process's shard of a tensor, or the tensor itself if it is not sharded. Differentiable."""
    return tensor.to_local() if divided(tensor) else tensor


def full(tensor: Any) -> Tensor:
    """The whole of a tensor that may be sharded. Collective."""
    return tensor.full_tensor() if divided(tensor) else tensor


def divided_alike(tensors: Iterable[Any]) -> list[list[Any]]:
    """The tensors, grouped by the mesh that they are sharded over: torch's operations on lists take one mesh."""
    found: dict[Any, list[Any]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device_mesh if divided(tensor) else None, []).append(tensor)
    return list(found.values())


def on_host(tensor: Any) -> np.ndarray:
    """The whole of a tensor that may be sharded, as float32 on the host, maybe as a view. Collective."""
    return full(tensor.detach()).float().cpu().numpy()


def fill(tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Copy host arrays, or this process's parts of them, into the tensors of the same names, which may be sharded."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            part = _own_part(tensor) if divided(tensor) else ...
            local(tensor).copy_(torch.from_numpy(as_float32(np.ascontiguousarray(arrays[name][part]))))


def _own_part(tensor: Any) -> tuple[slice, ...]:
    """Where this process's shard of a tensor lies in the whole. The tensor axis divides first; FSDP divides the rows of what
    remains."""
    found, mesh = [slice(0, size) for size in tensor.shape], tensor.device_mesh
    for name in ("tensor", "fsdp"):
        if name in mesh.mesh_dim_names:
            number = mesh.mesh_dim_names.index(name)
            axis = tensor.placements[number].dim
            begin, end = found[axis].start, found[axis].stop
            each = -(-(end - begin) // mesh.size(number))
            first = min(begin + mesh.get_local_rank(number) * each, end)
            found[axis] = slice(first, min(first + each, end))
    return tuple(found)
