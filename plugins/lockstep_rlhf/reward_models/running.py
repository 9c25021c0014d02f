"""Run by `lockstep_rlhf.reward_models.code` as ``python -I running.py <memory in MB> <seconds>``: takes a name and a program from
stdin and becomes the program, under limits that nothing in it can raise. A file of that name says that its end was reached.

Where the system lets an ordinary user do so, the program also gets a network without interfaces and a process tree that ends with
it. It imports nothing of ours: the file is run by its path.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import sys

NEW_USER, NEW_IPC, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x08000000, 0x20000000, 0x40000000
"""Of Linux: CLONE_NEWUSER, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET."""
FILE = 16 * 2**20
"""Bytes of one file."""
FILES, PROCESSES = 64, 32
"""Open at a time; of the user where there is no process tree of its own, so that there none may start if more run."""


END = 3
"""The file descriptor that tells the name, read once the program has come to its end."""
RUN = f"""
__file__ = "program.py"
exec(compile(open(__file__, "rb").read(), __file__, "exec"))
__import__("builtins").open(__import__("os").read({END}, 100), "x").close()
"""
"""The program is the main module, and may have names of its own, such as ``open``."""
ENVIRONMENT = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
"""Else numpy starts a thread for each core, more than may run."""


def isolate() -> bool:
    """Whether the system gave the program a process tree of its own, and no network."""
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
