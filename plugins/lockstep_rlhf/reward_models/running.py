"""Runs a program under limits. `lockstep_rlhf.reward_models.code` starts it: ``python -I running.py <memory in MB> <seconds>``.

It reads a name and a program from stdin and becomes the program, under limits that the program cannot raise. A file of that name
shows that the program reached its end. Where the system lets an ordinary user do so, the program also gets a network without
interfaces and a process tree that ends with it. This file is run by its path, so it imports nothing of Lockstep.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import sys

NEW_USER, NEW_IPC, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x08000000, 0x20000000, 0x40000000
"""Linux's CLONE_NEWUSER, CLONE_NEWIPC, CLONE_NEWPID and CLONE_NEWNET."""
FILE = 16 * 2**20
"""The most bytes of one file."""
FILES, PROCESSES = 64, 32
"""The most open files and processes. Without a process tree of its own, all processes of the user count: if more run, the
program can start none."""


END = 3
"""The file descriptor from which the name is read once the program has reached its end."""
RUN = f"""
__file__ = "program.py"
exec(compile(open(__file__, "rb").read(), __file__, "exec"))
__import__("builtins").open(__import__("os").read({END}, 100), "x").close()
"""
"""Runs the program as the main module. The program may define names such as ``open``, so the last line gets its own."""
ENVIRONMENT = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
"""Otherwise numpy starts a thread for each core, more than the limit allows."""


def isolate() -> bool:
    """Give the program a process tree of its own and no network; return True if the system does so."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None)
    return unshare is not None and unshare(NEW_USER | NEW_IPC | NEW_PROCESSES | NEW_NETWORK) == 0


def limit(memory: int, seconds: float) -> None:
    limits = {
        "RLIMIT_AS": memory * 2**20, "RLIMIT_CPU": math.ceil(seconds), "RLIMIT_FSIZE": FILE, "RLIMIT_NOFILE": FILES,
        "RLIMIT_NPROC": PROCESSES, "RLIMIT_CORE": 0,
    }  # fmt: skip
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def main() -> None:
    memory, seconds = int(sys.argv[1]), float(sys.argv[2])
    name, _, program = sys.stdin.buffer.read().partition(b"\n")
    with open("program.py", "wb") as file:
        file.write(program)
    if isolate() and (child := os.fork()):  # the child is the first process of the new tree: all others end with it
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 255)
    limit(memory, seconds)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    told, tell = os.pipe()
    os.write(tell, name)
    os.close(tell)
    os.dup2(told, END)
    os.execve(sys.executable, [sys.executable, "-I", "-B", "-c", RUN], ENVIRONMENT)


if __name__ == "__main__":
    main()
