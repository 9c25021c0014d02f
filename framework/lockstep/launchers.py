"""What the environment says about this process: its place among the processes of a launcher, and the cores it may use. Every
command imports this file first, so it imports nothing large.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from lockstep.errors import ConfigError, listing, told


@dataclass(frozen=True)
class Place:
    """This process is number ``rank`` of ``count``, and number ``local`` on its host."""

    rank: int = 0
    count: int = 1
    local: int = 0


LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
"""The variables that `lockstep run` and torchrun set, and those that srun sets."""
WORKER, HOSTS = "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"
"""The variables of a host in a TPU slice. On Kubernetes they are set in every container. Each host runs one process."""
TPU_PORT = "8476"
"""The port where JAX's processes meet on TPUs by default."""


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place that a launcher gave this process; without a launcher, it is alone. Slurm's variables count only inside srun,
    because sbatch sets some of them too.

    Raises:
      ConfigError: the variables are not numbers, or a TPU slice has no such host.
    """
    for names in LAUNCHERS:
        found = [environment[name] for name in names if name in environment]
        if len(found) < len(names) or names[0].startswith("SLURM") and "SLURM_STEP_ID" not in environment:
            continue
        if not all(each.isdecimal() for each in found):
            raise ConfigError(f"{listing(names)} must be numbers, and are {', '.join(map(told, found))}.")
        here = Place(*map(int, found))
        return here if here.count > 1 else Place()
    return _host_of_slice(environment)


def _host_of_slice(environment: Mapping[str, str]) -> Place:
    worker, hosts = environment.get(WORKER, ""), environment.get(HOSTS, "").split(",")
    if len(hosts) == 1:
        return Place()
    if not (worker.isdecimal() and int(worker) < len(hosts)):
        raise ConfigError(f"{WORKER}={told(worker)} should be a number below {len(hosts)}, as {HOSTS} names {len(hosts)} hosts.")
    return Place(int(worker), len(hosts))


def meeting_place(where: Place, environment: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """The host and port where processes that do not use torch find each other. The port is torch's own, `MASTER_PORT`. Under
    torchrun, which keeps that port for itself, it is the next one.

    Raises:
      ConfigError: the launcher did not set a host and a port.
    """
    if not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        if "," in (hosts := environment.get(HOSTS, "")):
            return hosts.partition(",")[0], TPU_PORT
        raise ConfigError(
            f"{where.count} processes were started, and do not know where to meet. Set MASTER_ADDR to the host of process 0 and "
            "MASTER_PORT to a free port there; docs/scale.md has the lines for Slurm."
        )
    port = environment["MASTER_PORT"]
    if not port.isdecimal():
        raise ConfigError(f"MASTER_PORT={told(port)} should be the number of a free port.")
    return environment["MASTER_ADDR"], str(int(port) + ("TORCHELASTIC_RUN_ID" in environment))


def cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
