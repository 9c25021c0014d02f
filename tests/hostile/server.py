"""What a reward server may answer, byte for byte, and what the reward model `endpoint` makes of it."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import socket
import threading
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import strategies as st

from hostile.clear import SECRET, only_clear_errors
from hostile.values import NUMBERS, damaged, damages, values
from lockstep.config.schema import parse
from lockstep.interfaces import Responses
from lockstep.types import Prompt
from lockstep_rlhf.reward_models.endpoint import Endpoint

BLANKS = b" " * (1 << 20)
TWO = Responses([Prompt.of("Hi"), Prompt.of("Bye")], ["a", "bb"], None, None)
VARIABLE = "LOCKSTEP_HOSTILE_TOKEN"


class Server:
    """Answers every connection with ``answer``, if ``endless`` with blanks after it, and closes it."""

    def __init__(self) -> None:
        self.answer, self.endless = b"", False
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/score"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self.socket.accept()
            with connection:
                try:
                    connection.settimeout(5.0)
                    self._read(connection)
                    connection.sendall(self.answer)
                    for _ in range((4 << 30) // len(BLANKS) * self.endless):
                        connection.sendall(BLANKS)
                except OSError:  # the client has gone
                    continue

    def _read(self, connection: socket.socket) -> None:
        """The whole request: to close a connection with unread bytes breaks it off."""
        length = 0
        with connection.makefile("rb") as request:
            for line in itertools.takewhile(bytes.strip, request):
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            request.read(length)


@functools.cache
def server() -> Server:
    return Server()


_scores = st.lists(st.floats(-9, 9) | st.none() | st.integers() | st.sampled_from(NUMBERS), min_size=2, max_size=2)
_bodies = st.one_of(
    st.builds(lambda found: json.dumps({"scores": found}).encode(), _scores),
    st.builds(lambda found: json.dumps({"scores": found}).encode(), values),
    st.builds(lambda found: json.dumps(found).encode(), values),
    st.builds(lambda found, damage: damaged(json.dumps({"scores": found}).encode(), damage), _scores, damages),
    st.sampled_from(
        (
            b"", SECRET.encode(), b'{"scores": ["%s", 1]}' % SECRET.encode(), b"\x1b[31m", b"[" * 100_000, b"1" * 10_000,
            b" " * 5_000_000, b'{"scores": [1' + b"0" * 5000 + b", 2]}",
        )
    ),
)  # fmt: skip
_statuses = st.sampled_from(
    (200,) * 6 + (100, 101, 199, 201, 204, 206, 301, 304, 307, 400, 401, 418, 429, 500, 503, 599, 999, 0, -1, "²", "")
)
_reasons = st.sampled_from(("OK", "", "x" * 300, SECRET, "\x1b[31m"))
_names = st.sampled_from(
    (
        "Content-Length", "Content-Type", "Transfer-Encoding", "Content-Encoding", "Retry-After", "Location", "Connection",
        "X", "",
    )
)  # fmt: skip
_contents = st.sampled_from(
    (
        "0", "5", "-1", "²", "1e9", "nan", "inf", "9" * 400, "3600", "chunked", "gzip", "deflate", "br", "close",
        "\x1b[31m", SECRET,
        "Fri, 31 Dec 9999", "Thu, 01 Jan 1970 00:00:00 GMT", "Mon, 99 Foo 0000", "http://127.0.0.1:1/", "file:///etc/passwd",
    )
)  # fmt: skip
ENDLESS = "endless"
Input = tuple[Any, str, list[tuple[str, str]], bytes, Any]
INPUTS: st.SearchStrategy[Input] = st.tuples(
    _statuses,
    _reasons,
    st.lists(st.tuples(_names, _contents), max_size=2),
    _bodies,
    st.sampled_from((None,) * 60 + (ENDLESS,)) | damages,
)


def answer(given: Input) -> bytes:
    status, reason, headers, body, damage = given
    given_length = {name for name, _ in headers} & {"Content-Length", "Transfer-Encoding"}
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers)]
    lines += [] if given_length or damage == ENDLESS else [f"Content-Length: {len(body)}"]
    whole = "\r\n".join(lines).encode("utf-8") + b"\r\n\r\n" + body
    return whole if damage in (None, ENDLESS) else damaged(whole, damage)


def check(given: Input) -> None:
    server().answer, server().endless = answer(given), given[-1] == ENDLESS
    for on_failure in ("raise", "drop"):
        keys = {"url": server().url + f"?key={SECRET}", "token_variable": VARIABLE, "timeout_seconds": 1.0, "retries": 0,
                "backoff_seconds": 0.0, "on_failure": on_failure}  # fmt: skip
        with mock.patch.dict(os.environ, {VARIABLE: SECRET}), only_clear_errors("127.0.0.1"):
            found = Endpoint(parse(Endpoint.Config, keys, "reward_model"), None).score(TWO)
            assert found.shape == (2,) and found.dtype == np.float32
            assert on_failure == "drop" or all(map(math.isfinite, found))
