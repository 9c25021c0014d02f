"""uvicorn's HTTP protocol with limits that apply before a request is complete: on the size of headers and body, on the time for
headers, and on the connections of one address. httptools has no such limits, so one machine could take up the memory or all
connections."""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import ClassVar, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEADERS = 64 * 1024
"""The most bytes of a request's headers."""
HEADER_SECONDS = 10.0
"""Seconds within which the headers have to be complete."""
OVERHEAD = 8
"""Bytes that may be sent per byte of a body: every byte may come as a chunk of its own."""


class Connections:
    """The open connections, counted by address. ``most`` is the limit per address; ``proxies`` have no limit."""

    def __init__(self, most: int, proxies: Sequence[str]):
        self.most, self.open = most, Counter[str]()
        self.trusted = [ipaddress.ip_network(each) for each in proxies]
        self._is_proxy = cache(self._trusts)

    def begin(self, host: str) -> bool:
        """Count a connection of the address, and return True if it is allowed. A refused one also counts until `end`."""
        self.open[host] += 1
        return self.open[host] <= self.most or self._is_proxy(host)

    def end(self, host: str) -> None:
        self.open[host] -= 1
        if not self.open[host]:
            del self.open[host]

    def _trusts(self, host: str) -> bool:
        try:
            return any(ipaddress.ip_address(host) in network for network in self.trusted)
        except ValueError:  # not an IP address, such as the path of a socket
            return False


class Limited(HttpToolsProtocol):
    """One connection. ``clock`` closes it if the headers are not complete in time, counted from the connection or the first byte,
    or if the rest of a body does not arrive in time after the request was answered. `limited` makes the class that a server
    takes."""

    addresses: ClassVar[Connections]
    most_body: ClassVar[int]
    host = ""
    part: Literal["between", "headers", "body"] = "between"
    seen = 0
    clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.host = self.client[0] if self.client else ""
        if not self.addresses.begin(self.host):
            transport.close()
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self.addresses.end(self.host)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.seen = 0 if self.part == "between" else self.seen + len(data)
        if self.seen > MOST_HEADERS + (OVERHEAD * self.most_body if self.part == "body" else 0):
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


def limited(most_body: int, connections: int, proxies: Sequence[str]) -> type[Limited]:
    """Make the protocol class for a server.

    Args:
      most_body: the most bytes of a request's body. The check here is rough; the application's is exact.
      connections: the most open connections of one address.
      proxies: addresses or networks whose connections are not limited.
    """
    return type("Limited", (Limited,), {"addresses": Connections(connections, proxies), "most_body": most_body})
