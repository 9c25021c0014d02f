"""Starts a process for each device of one host, as for `lockstep run backend.mesh.fsdp=8`. Several hosts have launchers of their
own, torchrun and srun, which `lockstep.launchers.place` recognises.

Process 0 has the terminal. The output of the others is kept; the last lines of the first process to fail are shown. The first
failure ends all processes, since the others would wait forever for the failed one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from lockstep.launchers import cores, place
from lockstep.reporting.console import tell
from lockstep.runs.experiment import Experiment, finished
from lockstep.runs.interrupts import ENDS, handled

SECONDS_TO_END = 3.0
"""How long processes may take to end by themselves after the first one failed: their own messages are the best, and process 0
keeps records."""
SECONDS_TO_STOP = 10.0
"""The time between SIGTERM and SIGKILL."""
LAST_LINES = 30
STOPPED = 130
"""The exit code of a process that was asked to stop."""


def wanted(config: Mapping[str, Any]) -> int:
    """How many processes to start for a run; 1: none. The backend is asked if its ``mesh`` has more than one device. In that case
    the configuration is checked here first, so that an error in it is reported once, not by each process."""
    mesh = config["backend"].get("mesh") or {}
    if place().count > 1 or all(size == 1 for size in mesh.values()) or finished(config):
        return 1
    cls: Any
    cls, backend = Experiment(config).backend
    return cls.workers(backend)


def work(command: Sequence[str], count: int) -> int:
    """Run the command in ``count`` processes. Returns the exit code: 0, or that of the first process to fail (1 if it was
    killed)."""
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, count)]
        workers: list[subprocess.Popen[bytes]] = []
        stack.enter_context(handled(lambda number, frame: _send(workers, number), (signal.SIGINT, *ENDS)))
        try:
            workers.extend(_start(command, said))
            failed = _first_failure(workers)
            if failed is not None:
                _wait(workers, SECONDS_TO_END)
        finally:
            _end(workers)
        if failed is None:
            return 0
        code, lines = workers[failed].returncode, _last_lines(said[failed - 1]) if failed else []
        if code < 0 or lines and code != STOPPED:  # otherwise process 0 has printed the reason
            ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            tell("\n".join([f"Process {failed} of {count} {ending} first. The same command resumes the run.", *lines, ""]))
        return code if code > 0 else 1


def _start(command: Sequence[str], said: Sequence[IO[bytes]]) -> Iterator[subprocess.Popen[bytes]]:
    count = len(said) + 1
    common = {
        "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
        "PYTHONHASHSEED": "0",  # so that sets have the same order in all processes
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // count))),
    }  # fmt: skip
    for rank in range(count):
        output = None if rank == 0 else said[rank - 1]
        yield subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,  # otherwise a terminal sends Ctrl-C to them, too
        )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _send(workers: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for worker in workers:
        worker.send_signal(number)


def _first_failure(workers: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait, and return the rank of the first process to fail, or None once all are done."""
    while True:
        codes = [worker.poll() for worker in workers]
        # Killed processes first: the others may fail at the same moment, because they miss them.
        failed = sorted((rank for rank, code in enumerate(codes) if code), key=lambda rank: codes[rank] or 0)
        if failed:
            return failed[0]
        if None not in codes:
            return None
        time.sleep(0.05)


def _wait(workers: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(worker.poll() is None for worker in workers):
        time.sleep(0.05)


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    _send(workers, signal.SIGTERM)
    _wait(workers, SECONDS_TO_STOP)
    _send(workers, signal.SIGKILL)
    for worker in workers:
        worker.wait()


def _last_lines(said: IO[bytes]) -> list[str]:
    said.seek(0)
    return [f"  {line}" for line in said.read().decode(errors="replace").splitlines()[-LAST_LINES:]]
