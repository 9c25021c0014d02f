"""What stands between the network and the pages: host names, sizes, rates, sessions, CSRF tokens, passwords, headers.

A visitor has one cookie, a signed random token. Until someone signs in it only ties CSRF tokens to the browser. Signing in issues
a new one, so a token that somebody planted is worth nothing. Forms carry a CSRF token, a keyed hash of the cookie's.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

import anyio
import argon2
import itsdangerous

COOKIE = "studio"
CSRF_FIELD, CSRF_HEADER = "csrf", "x-csrf-token"
KEY_FILE = "secret.key"
LEAST_PASSWORD, MOST_PASSWORD = 10, 200

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",  # addresses of invitations are secrets
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


class Keys:
    """The studio's secret: signs cookies and makes CSRF tokens."""

    def __init__(self, folder: Path):
        secret = _secret(folder / KEY_FILE)
        self._signer = itsdangerous.Signer(secret, salt="cookie", digest_method=hashlib.sha256)
        self._secret = hashlib.sha256(b"csrf" + secret).digest()

    def sign(self, token: str) -> str:
        return self._signer.sign(token).decode()

    def unsign(self, cookie: str) -> str | None:
        """The token in a cookie that we signed; None for any other."""
        try:
            return self._signer.unsign(cookie).decode()
        except (itsdangerous.BadSignature, UnicodeError):
            return None

    def csrf(self, token: str) -> str:
        return hmac.new(self._secret, token.encode(), hashlib.sha256).hexdigest()

    def check_csrf(self, token: str, given: str) -> bool:
        return hmac.compare_digest(self.csrf(token).encode(), given.encode(errors="replace"))


def _secret(file: Path) -> bytes:
    """The key in a file that only its owner reads; made on first use."""
    try:
        number = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return file.read_bytes()
    with os.fdopen(number, "wb") as opened:
        opened.write(secret := secrets.token_bytes(32))
        opened.flush()
        os.fsync(opened.fileno())
    return secret


class Passwords:
    """Argon2id hashes, with the least costs that OWASP's password storage cheat sheet recommends. Made and checked on one thread
    at a time, so that many sign-ins leave room for the pages."""

    def __init__(self) -> None:
        self._hasher = argon2.PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)
        self._nobodys = self._hasher.hash(secrets.token_hex())
        self._room: anyio.CapacityLimiter | None = None

    async def hash(self, password: str) -> str:
        return await anyio.to_thread.run_sync(self._hasher.hash, password, limiter=self._limiter())

    async def check(self, stored: str | None, password: str) -> bool:
        """Takes as long for a name that does not exist, so that nobody learns which do."""
        return await anyio.to_thread.run_sync(self._check, stored, password, limiter=self._limiter())

    def _check(self, stored: str | None, password: str) -> bool:
        try:
            return self._hasher.verify(stored or self._nobodys, password) and stored is not None
        except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
            return False

    def _limiter(self) -> anyio.CapacityLimiter:
        if self._room is None:  # it belongs to the event loop
            self._room = anyio.CapacityLimiter(1)
        return self._room


class Rates:
    """Requests per minute of each visitor, as a bucket that refills; the visitors seen longest ago are forgotten."""

    MOST = 20_000

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self.most, self.per_second, self._clock = per_minute, per_minute / 60, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, visitor: str) -> float:
        """0 if the request is fine, else seconds until one is."""
        now = self._clock()
        left, then = self._buckets.get(visitor, (self.most, now))
        left = min(self.most, left + (now - then) * self.per_second)
        fine = left >= 1
        self._buckets[visitor] = (left - fine, now)
        self._buckets.move_to_end(visitor)
        if len(self._buckets) > self.MOST:
            self._buckets.popitem(last=False)
        return 0.0 if fine else (1 - left) / self.per_second


class Guard:
    """Around the application: refuses other hosts and bodies that are too large, and adds the headers to every answer."""

    def __init__(self, application: Application, hosts: Iterable[str], most_bytes: int):
        self.application, self.hosts, self.most_bytes = application, {host.lower() for host in hosts}, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.application(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if host_name(headers.get("host", "")) not in self.hosts:
            await _refuse(send, 421, "This host name is not served here. Name it in 'hosts' of studio.yaml.")
        elif not headers.get("content-length", "0").isdigit() or int(headers.get("content-length", "0")) > self.most_bytes:
            await _refuse(send, 413, f"A request may have {self.most_bytes} bytes.")
        else:
            await self.application(scope, _bounded(receive, self.most_bytes), _with_headers(send))


class TooLarge(Exception):
    """A body without a length grew beyond the limit."""


def host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host.partition("]")[0].removeprefix("[").lower()
    return host.partition(":")[0].lower()


def _bounded(receive: Receive, most: int) -> Receive:
    seen = 0

    async def bounded() -> MutableMapping[str, Any]:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise TooLarge
        return message

    return bounded


def _with_headers(send: Send) -> Send:
    async def with_headers(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            given = {name for name, _ in message["headers"]}
            added = HEADERS | ({} if b"cache-control" in given else {"cache-control": "no-store"})
            message["headers"] = [*message["headers"], *((name.encode(), value.encode()) for name, value in added.items())]
        await send(message)

    return with_headers


async def _refuse(send: Send, status: int, why: str) -> None:
    content = why.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(content)).encode())]
    await _with_headers(send)({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
