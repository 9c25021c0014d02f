"""What a device of each kind has, according to its maker; for this machine's CPU, as measured."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from lockstep.errors import ConfigError, listing

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """
    Args:
      memory: bytes.
      bfloat16, float32: FLOP/s of dense matmuls, accumulated in float32. The backends multiply float32 exactly.
      bandwidth: bytes/s of its memory.
      link: bytes/s that it sends to the devices it is linked to.
      network: bytes/s that its host sends to other hosts; None: all devices are linked.
      host: devices per host.
    """

    memory: float
    bfloat16: float
    float32: float
    bandwidth: float
    link: float
    network: float | None = None
    host: int = 8


MACHINES = {  # NVIDIA's datasheets of SXM cards, in DGX hosts with a network card for each; Google Cloud's TPU pages
    "a100": Machine(80e9, 312e12, 19.5e12, 2.0e12, 300e9, 8 * 25e9),
    "h100": Machine(80e9, 989e12, 67e12, 3.35e12, 450e9, 8 * 50e9),
    "h200": Machine(141e9, 989e12, 67e12, 4.8e12, 450e9, 8 * 50e9),
    "v5e": Machine(16 * GIB, 197e12, 197e12 / 6, 819e9, 200e9),  # float32 in six passes of bfloat16
    "v5p": Machine(95 * GIB, 459e12, 459e12 / 6, 2765e9, 600e9),
    "v6e": Machine(32 * GIB, 918e12, 918e12 / 6, 1640e9, 400e9),
}


def machine(kind: str) -> Machine:
    """
    Args:
      kind: a name in `MACHINES`, or a device's own name that contains one; 'cpu' is measured.

    Raises:
      ConfigError: the kind is unknown.
    """
    if kind == "cpu":
        return this_cpu()
    for name, known in MACHINES.items():
        if name in kind.lower().replace("lite", "e").replace(" ", ""):
            return known
    raise ConfigError(f"What a '{kind}' has is not known. Name a device with --machine: {listing(['cpu', *MACHINES])}.")


def share(one: Machine, devices: int) -> Machine:
    """What each device has if one machine stands in for ``devices`` of them."""
    return dataclasses.replace(
        one,
        memory=one.memory / devices,
        bfloat16=one.bfloat16 / devices,
        float32=one.float32 / devices,
        bandwidth=one.bandwidth / devices,
    )


def this_cpu() -> Machine:
    """This CPU, measured: the best of a few short tries, all cores together."""
    import numpy as np  # here, because every command imports this file

    size = 1024
    x = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    flops = 2 * size**3 / min(_seconds(lambda: x @ x) for _ in range(5))
    source, target = np.ones(2**25, np.float32), np.empty(2**25, np.float32)
    bandwidth = 2 * source.nbytes / min(_seconds(lambda: np.copyto(target, source)) for _ in range(3))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(memory, flops, flops, bandwidth, link=bandwidth)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
