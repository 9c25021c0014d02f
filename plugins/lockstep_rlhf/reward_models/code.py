"""1 for responses whose program passes the row's tests."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError, RewardError, short
from lockstep.interfaces import DataSource, Resources, Responses, RewardModel
from lockstep.learning.rows import column, columns_of, first_row

log = logging.getLogger(__name__)

ALLOW = (
    "reward_model=code runs programs that a language model wrote, on this machine and as you. It limits time, memory, files "
    "and processes, but they can read what you can. Where that is acceptable, say in a container, set reward_model.allow=true."
)


class Code(RewardModel):
    """1.0 if the response's program, followed by the tests in the row's ``column``, runs to its end and exits with status 0; else
    0.0. The program is the last fenced block of the response, or the whole response if it has none.

    Each program runs in its own process, session and empty folder, without your environment variables and, where the system
    allows it, without a network (``running.py``). The whole session is killed when the program ends or after ``timeout_seconds``.
    This is not a security boundary: see ALLOW. A row without tests has no score (NaN). `details` has ``out_of_time``.
    """

    @dataclass(frozen=True)
    class Config:
        allow: bool = setting(False, "Whether to run programs that the policy writes. See docs/rewards.md.")
        column: str = setting("tests", "The column with the tests: Python text, or a list of lines.")
        timeout_seconds: float = setting(10.0, "Limit of one program, in wall-clock time and in CPU time.", above=0, most=3600)
        memory_mb: int = setting(1024, "Address space of one process, in MB.", least=64)
        processes: int = setting(2, "Programs that run at a time.", least=1, most=256)

    @classmethod
    def check(cls, config: Config) -> None:
        if not config.allow:
            raise ConfigError(ALLOW)

    @classmethod
    def rehearse(cls, config: Config, data: DataSource) -> None:
        if (row := first_row(data)) is not None:
            column(columns_of(row[:1]), config.column, "reward_model=code")

    def __init__(self, config: Config, resources: Resources):
        self.check(config)
        self.config = config
        self._details: dict[str, np.ndarray] = {}
        if self.passes("", "assert True") != 1.0:
            raise RewardError(
                f"Not even an empty program passes its tests within reward_model.timeout_seconds={config.timeout_seconds:g} and "
                f"reward_model.memory_mb={config.memory_mb}. Raise them."
            )
        if self.passes("", "import os\nassert os.getpid() == 1") != 1.0:
            log.warning(
                "reward_model=code: this system gives programs no namespaces of their own, so they have your network, and "
                "count among your processes. See docs/rewards.md"
            )

    def score(self, responses: Responses) -> np.ndarray:
        tests = column(columns_of(responses.prompts), self.config.column, "reward_model=code")
        rows = [(program(text), joined(each)) for text, each in zip(responses.texts, tests, strict=True)]
        with ThreadPoolExecutor(self.config.processes) as pool:
            found = list(pool.map(lambda row: None if row[1] is None else self.passes(*row), rows))
        self._details = {"out_of_time": np.array([each == OUT_OF_TIME for each in found], np.float32)}
        return np.array([np.nan if each is None else max(each, 0.0) for each in found], np.float32)

    def passes(self, code: str, tests: str) -> float:
        """Run the program with its tests: 1.0 if it passes, 0.0 if not, or `OUT_OF_TIME`."""
        c, done = self.config, f"done-{secrets.token_hex(16)}"  # no file that a program can read contains it
        with tempfile.TemporaryDirectory(prefix="lockstep-code-", ignore_cleanup_errors=True) as folder:
            text = f"{done}\n{code}\n\n{tests}\n"
            command = [
                sys.executable,
                "-I",
                str(Path(__file__).with_name("running.py")),
                str(c.memory_mb),
                str(c.timeout_seconds),
            ]
            silent: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, cwd=folder, env={}, start_new_session=True, close_fds=True, **silent
            )
            try:
                process.communicate(text.encode(errors="replace"), timeout=c.timeout_seconds)
            except subprocess.TimeoutExpired:
                return OUT_OF_TIME
            finally:
                end(process)
            return float(process.returncode == 0 and (Path(folder) / done).is_file())

    def details(self) -> dict[str, np.ndarray]:
        return self._details


OUT_OF_TIME = -1.0


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill the whole session, including processes that the program left behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    except OSError as error:
        raise RewardError(f"A program that the policy wrote cannot be stopped: {short(str(error))}") from error
    process.wait()


def program(response: str) -> str:
    """The last fenced block, up to the end of the response if it is not closed; the whole response if there is no block."""
    blocks = re.split(r"^[ \t]*```[^\n]*$\n?", response, flags=re.MULTILINE)
    if len(blocks) == 1:
        return response
    return blocks[-2] if len(blocks) % 2 else blocks[-1]


def joined(tests: Any) -> str | None:
    """The tests as one text; None if there are none."""
    if isinstance(tests, (list, tuple)) and all(isinstance(line, str) for line in tests):
        tests = "\n".join(tests)
    return tests if isinstance(tests, str) and tests.strip() else None
