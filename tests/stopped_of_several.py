"""What one process of test_processes.py does: python stopped_of_several.py BACKEND. The last one is suspended, and the
others wait for its message."""

import importlib
import os
import signal
import sys
import time

from lockstep.config.schema import parse
from lockstep.registry import registry


def main(name: str) -> None:
    importlib.import_module(f"lockstep_{name}.mesh").SILENCE = 2.0
    cls = registry().resolve("backend", name, name)
    together = cls(parse(cls.Config, {"device": "cpu", "mesh": {"fsdp": -1}}, "backend")).processes
    time.sleep(4 if together.leads else 0)  # it is busy, not silent
    together.share(lambda: None)
    print("met", flush=True)
    if together.rank == together.count - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    together.share(lambda: None)


if __name__ == "__main__":
    main(sys.argv[1])
