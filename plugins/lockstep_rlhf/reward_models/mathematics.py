"""Comparison of mathematical answers by math-verify, in a child process.

math-verify limits time by a signal, which only the main thread can use, and some comparisons never end. So it runs in a child
process (``verifying.py``) without that limit. The process is killed if a comparison runs out of time.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from lockstep.errors import RewardError, short

START = 120.0
"""Seconds that the child process may take to import sympy."""
MOST_CHARACTERS = 10_000
"""Characters of a response or gold answer that are compared: the last ones of a longer text."""


class Mathematics:
    """Compares in a child process, started on first use and again after it had to be killed. ``seconds`` count from when the
    process has the question: waiting for an earlier comparison does not count."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.child: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def compare(self, gold: Any, answer: str) -> bool | str:
        """True if the answers are equal, False if not. 'no_gold' or 'no_answer' if the gold answer or the response's cannot be
        read as mathematics; 'failed' if the comparison fails or runs out of time.

        Raises:
          RewardError: the child process does not start.
        """
        if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
            return "no_gold"
        question = json.dumps([str(gold)[-MOST_CHARACTERS:], answer[-MOST_CHARACTERS:], self.seconds]).encode() + b"\n"
        with self.lock:
            child = self.child or self._start()
            try:
                child.stdin.write(question)  # type: ignore[union-attr]  # a pipe
                child.stdin.flush()  # type: ignore[union-attr]
                found = _line(child, self.seconds)
            except OSError:
                found = b""
            if not found:
                self._stop()
                return "failed"
        outcome: bool | str = json.loads(found)
        return outcome

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", str(Path(__file__).with_name("verifying.py"))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        pipe = subprocess.PIPE
        self.child = child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
        weakref.finalize(self, child.kill)
        if not _line(child, START):
            child.kill()
            _, said = child.communicate()
            self.child = None
            raise RewardError(f"math-verify does not start: {short(said.decode(errors='replace')[-200:]) or 'no answer'}")
        threading.Thread(target=child.stderr.read, daemon=True).start()  # type: ignore[union-attr]  # so that it never fills
        return child

    def _stop(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self.child = None


def _line(child: subprocess.Popen[bytes], seconds: float) -> bytes:
    """The next line of the child's output; empty if none comes within ``seconds``."""
    found, ends = b"", time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]  # a pipe
        while not found.endswith(b"\n"):
            if not selector.select(max(0.0, ends - time.monotonic())):
                return b""
            piece = os.read(child.stdout.fileno(), 4096)  # type: ignore[union-attr]
            if not piece:
                return b""
            found += piece
    return found
