"""What one device of a kind has, as its maker says; of this machine's CPU, what it shows when asked."""

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
      bfloat16, float32: FLOP/s of dense matmuls, accumulated in float32; of float32 as the backends multiply it, exactly.
      bandwidth: bytes/s of its memory.
      link: bytes/s that it sends to devices it has links to.
      network: bytes/s that its host sends to other hosts; None: all devices have links.
      host: devices of a host.
    """

    memory: float
    bfloat16: float
    float32: float
    bandwidth: float
    link: float
    network: float | None = None
    host: int = 8


MACHINES = {  # datasheets of NVIDIA's SXM cards, in DGX hosts with a network card for each; Google Cloud's pages of TPUs
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
      kind: a name above, or one that contains it, as devices name themselves; 'cpu' is measured.

    Raises:
      ConfigError: it is unknown.
    """
    if kind == "cpu":
        return this_cpu()
    for name, known in MACHINES.items():
        if name in kind.lower().replace("lite", "e").replace(" ", ""):
            return known
    raise ConfigError(f"What a '{kind}' has is not known. Name a device with --machine: {listing(['cpu', *MACHINES])}.")


def share(one: Machine, devices: int) -> Machine:
    """Of one machine, what each of the ``devices`` has that it stands in for."""
    return dataclasses.replace(
        one,
        memory=one.memory / devices,
        bfloat16=one.bfloat16 / devices,
        float32=one.float32 / devices,
        bandwidth=one.bandwidth / devices,
    )


def this_cpu() -> Machine:
    """The best of a few short tries, all cores together."""
    import numpy as np  # every command reads this file

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
