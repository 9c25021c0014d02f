"""HTTP as uvicorn speaks it, with limits before a request is one: on headers, on the time for them, on the connections of one
address. httptools has none, so without them one machine could take the memory or all connections."""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEADERS = 64 * 1024
"""Bytes of a request's headers."""
HEADER_SECONDS = 10.0
"""After which they have to be complete."""
OVERHEAD = 8
"""How many times its body a request may have in bytes: every byte may come as a chunk of its own."""


def limited(most_body: int, connections: int, proxies: Sequence[str]) -> type[HttpToolsProtocol]:
    """The protocol for a server.

    Args:
      most_body: bytes of a request's body, which the application checks exactly.
      connections: of one address.
      proxies: addresses or networks without a limit of connections.
    """
    trusted = [ipaddress.ip_network(each) for each in proxies]
    open_now = Counter[str]()

    @cache
    def is_proxy(host: str) -> bool:
        try:
            return any(ipaddress.ip_address(host) in network for network in trusted)
        except ValueError:  # a path of a socket
            return False

    class Limited(HttpToolsProtocol):
        """``clock`` closes the connection unless the headers are complete in time, from the connection or the first byte on; or
        what is left of a body that was answered already."""

        host = ""
        part: Literal["between", "headers", "body"] = "between"
        seen = 0
        clock: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.host = self.client[0] if self.client else ""
            open_now[self.host] += 1
            if open_now[self.host] > connections and not is_proxy(self.host):
                transport.close()
            self._start_clock()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_clock()
            open_now[self.host] -= 1
            if not open_now[self.host]:
                del open_now[self.host]
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.seen = 0 if self.part == "between" else self.seen + len(data)
            if self.seen > MOST_HEADERS + (OVERHEAD * most_body if self.part == "body" else 0):
                self.transport.close()
            elif self.part != "body" and self._is_answered():
                self._start_clock()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.part, self.seen = "headers", 0

        def on_headers_complete(self) -> None:
            self.part = "body"
            self._stop_clock()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self.part = "between"
            self._stop_clock()
            super().on_message_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.part == "body" and self._is_answered():
                self._start_clock()

        def _is_answered(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _start_clock(self) -> None:
            if self.clock is None:
                self.clock = self.loop.call_later(HEADER_SECONDS, self._late)

        def _stop_clock(self) -> None:
            if self.clock is not None:
                self.clock.cancel()
                self.clock = None

        def _late(self) -> None:
            self.clock = None
            if self._is_answered():
                self.transport.close()

    return Limited
