"""JAX on a device: precision, memory, and the cache of compiled programs. The part of the backend that models need."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax

from lockstep.config.mesh import MeshConfig
from lockstep.config.schema import setting
from lockstep.errors import ConfigError, listing
from lockstep.interfaces import Backend
from lockstep.launchers import place
from lockstep.storage.files import expanded
from lockstep_jax import mesh


class JaxDevice(Backend):
    """`JaxBackend` without its learner, because learners import the models, which import this file."""

    @dataclass(frozen=True)
    class Config:
        device: str = setting("auto", "cpu, gpu or tpu; auto: the first accelerator, else the CPU.")
        precision: Literal["float32", "bfloat16"] = setting("float32", "Matmul inputs; weights and Adam stay in float32.")
        gradient_checkpointing: bool | None = setting(
            None,
            "Recompute each layer's inner activations for the gradient (remat; Chen et al. 2016): saves memory, adds a forward "
            "pass. Otherwise matmul inputs and results are kept, and only the operations between them are recomputed. Null: "
            "true for networks of more than `lockstep_jax.decoder.SHALLOW` layers.",
        )
        compilation_cache: str | None = setting("~/.cache/lockstep/jax", "Where compiled programs are kept; null: nowhere.")
        mesh: MeshConfig = setting(MeshConfig(), "How to shard models and rows over several devices.")

    name = "jax"

    def __init__(self, config: Config):
        self.config = config
        _one_heap()  # before the device starts threads, each of which would get its own heap
        if (here := place()).count > 1:
            self.processes = mesh.Group(here)
        devices = devices_of(config)
        self.device, self.mesh = devices[0], mesh.made(config.mesh, devices)
        self.processes.any(False)  # on CPUs they have 30 seconds to meet for the first time, and are all here now
        self.trunks: dict[str, Any] = {}
        """Frozen parameters that adapters share, with their architecture, by checkpoint path."""
        _keep_compiled_programs(config.compilation_cache)
        jax.config.update("jax_default_matmul_precision", matmuls(config.precision, self.device.platform))

    def describe(self) -> dict[str, str]:
        facts = {"jax": jax.__version__, "device": self.device.device_kind, "precision": self.config.precision}
        return facts if self.mesh is None else facts | {"mesh": mesh.described(self.mesh)}

    def peak_memory_bytes(self) -> int | None:
        devices = [self.device] if self.mesh is None else self.mesh.devices.flat
        statistics = [] if self.device.platform == "cpu" else [device.memory_stats() for device in devices]
        return max((each["peak_bytes_in_use"] for each in statistics if each), default=None)

    def put(self, tree: Any) -> Any:
        """Copy host arrays to the device. They are never views of host memory, because learners donate their buffers to XLA."""
        if self.mesh is not None:
            return mesh.put(self.mesh, tree)

        def one(array: Any) -> jax.Array:
            whole = array[tuple(slice(None) for _ in array.shape)]
            return jax.device_put(whole, self.device, may_alias=False).block_until_ready()  # else all host arrays exist at once

        return jax.tree.map(one, tree)


def matmuls(precision: str, platform: str) -> str | None:
    """The matmul precision to set in JAX; None for its default. By default, accelerators multiply float32 in TF32 or bfloat16,
    which is not what the user asked for."""
    return "highest" if precision == "float32" and platform != "cpu" else None


def devices_of(config: JaxDevice.Config) -> list[jax.Device]:
    name, count = config.device, config.mesh.least // place().count
    if count > 1:
        with contextlib.suppress(RuntimeError):  # raised if JAX has its devices already
            jax.config.update("jax_num_cpu_devices", count)  # one CPU stands in for that many devices
    kind = None if name == "auto" else name
    try:
        # A process without a launcher is alone, even if it has met others before (`World.alone` of the conformance kit).
        return jax.devices(kind) if place().count > 1 else jax.local_devices(backend=kind)
    except RuntimeError as error:
        here = {"cpu"} | {device.platform for device in jax.devices()}
        raise ConfigError(
            f"backend.device='{name}' is not usable here: {error}. Set it to auto or to one of: {listing(here)}."
        ) from error


def _keep_compiled_programs(folder: str | None) -> None:
    """Keep every compiled program in ``folder``. By default JAX keeps only slow compilations, and many small programs add up to a
    long wait."""
    jax.config.update("jax_compilation_cache_dir", str(expanded(folder)) if folder else None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next call, except blocks of a GiB or more (mallopt(3); glibc before 2.35 refuses). XLA
    takes scratch space from malloc at every call of a program. By default glibc requests each large block from the system, which
    then maps and clears its pages one by one: a fifth of the time of a small network's step."""
    if _mallopt(MMAP_THRESHOLD, 2**30):
        _mallopt(TRIM_THRESHOLD, 2**30)


def _one_heap() -> None:
    """Give all threads one heap, so that they reuse each other's freed memory. Call it early: a thread keeps the heap it starts
    with."""
    _mallopt(ARENA_MAX, 1)


TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
"""From glibc's malloc.h."""


def _mallopt(option: int, value: int) -> bool:
    return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).mallopt(option, value))


class Program:
    """`jax.jit` of a function, with compiler options that depend on the platform. They are asked for at the first call: a module
    that asked for them when it is imported would give JAX its devices before the processes have met."""

    def __init__(self, function: Callable[..., Any], options: Callable[[], dict[str, Any] | None], **how: Any):
        functools.update_wrapper(self, function)
        self.function, self.options, self.how = function, options, how

    @functools.cached_property
    def jitted(self) -> Any:
        return jax.jit(self.function, compiler_options=self.options(), **self.how)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.jitted(*given, **named)

    def lower(self, *given: Any, **named: Any) -> Any:
        return self.jitted.lower(*given, **named)


def compiled(options: Callable[[], dict[str, Any] | None], **how: Any) -> Callable[[Callable[..., Any]], Program]:
    """Make a function a `Program` with these options; ``how`` is for `jax.jit`."""
    return lambda function: Program(function, options, **how)


@functools.cache
def scheduling() -> dict[str, Any] | None:
    """Compiler options for programs with gradients. By default, XLA on CPUs orders operations for concurrency, which costs
    memory: with two networks it holds the activations of both. Their matmuls use all cores anyway."""
    return _options("cpu", {"xla_cpu_enable_concurrency_optimized_scheduler": False})


@functools.cache
def decoding() -> dict[str, Any] | None:
    """Compiler options for programs that draw tokens. By default, XLA on GPUs merges matmuls of one input by joining their
    weights, again for each token: a quarter of the time of a network with 1.5 billion parameters."""
    return _options("gpu", {"xla_gpu_dot_merger_threshold_mb": 0})


def _options(platform: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """The options; None on other platforms, or if this version of XLA does not have them."""
    if jax.default_backend() != platform:
        return None
    try:
        jax.jit(lambda x: x, compiler_options=options)(0)
    except jax.errors.JaxRuntimeError:
        return None
    return options
