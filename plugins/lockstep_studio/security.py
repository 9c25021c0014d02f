"""Checks between the network and the pages: host names, sizes, rates, sessions, CSRF tokens, passwords, headers.

A visitor has one cookie, a signed random token. Until sign-in, it only ties CSRF tokens to the browser. Signing in issues a new
token, so a planted one is worth nothing. Forms carry a CSRF token, which is a keyed hash of the cookie's token.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import anyio
import argon2
import itsdangerous

from lockstep.errors import CheckpointError
from lockstep.storage.files import sync

CSRF_FIELD, CSRF_HEADER = "csrf", "x-csrf-token"
KEY_FILE = "secret.key"
KEY_BYTES = 32
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
    "referrer-policy": "no-referrer",  # the URLs of invitations are secret
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
HTTPS_ONLY = {"strict-transport-security": "max-age=31536000"}
"""Keeps a browser that has seen the studio behind HTTPS from using plain HTTP for a year."""


class Keys:
    """The studio's secret key, which signs cookies and forms and makes CSRF tokens. ``cookie`` is the cookie's name: all ports of
    a host share cookies, so each studio has a name of its own."""

    def __init__(self, folder: Path):
        secret = _secret(folder / KEY_FILE)
        self._signers = {use: itsdangerous.Signer(secret, salt=use, digest_method=hashlib.sha256) for use in ("cookie", "form")}
        self._secret = hashlib.sha256(b"csrf" + secret).digest()
        self.cookie = f"studio-{hashlib.sha256(secret).hexdigest()[:8]}"

    def sign(self, token: str, use: str = "cookie") -> str:
        return self._signers[use].sign(token).decode()

    def unsign(self, signed: str, use: str = "cookie") -> str | None:
        """The signed text; None unless this studio signed it for this use."""
        try:
            return self._signers[use].unsign(signed).decode()
        except (itsdangerous.BadSignature, UnicodeError):
            return None

    def hidden(self, text: str) -> str:
        """A keyed hash: the same for the same text, and useless to anyone who reads the database without the key."""
        return hmac.new(self._secret, f"hidden {text}".encode(errors="replace"), hashlib.sha256).hexdigest()

    def csrf(self, token: str) -> str:
        return hmac.new(self._secret, token.encode(), hashlib.sha256).hexdigest()

    def check_csrf(self, token: str, given: str) -> bool:
        return hmac.compare_digest(self.csrf(token).encode(), given.encode(errors="replace"))


def _secret(file: Path) -> bytes:
    """The key, from a file that only its owner can read. The file is made on first use, atomically.

    Raises:
      CheckpointError: the file is too short for a key.
    """
    if not file.exists():
        part = file.with_name(f".{file.name}.part")
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
            opened.write(secrets.token_bytes(KEY_BYTES))
        sync(part)
        os.replace(part, file)
        sync(file.parent)
    if len(secret := file.read_bytes()) < KEY_BYTES:
        raise CheckpointError(
            f"{file} has {len(secret)} bytes, too few for a key. Delete it: everybody then has to sign in again."
        )
    return secret


class Passwords:
    """Argon2id hashes, at the lowest costs that OWASP's password storage cheat sheet recommends. One thread at a time makes and
    checks hashes, so that many sign-ins leave room for the pages."""

    def __init__(self) -> None:
        self._hasher = argon2.PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)
        self._nobodys = self._hasher.hash(secrets.token_hex())
        self._room: anyio.CapacityLimiter | None = None

    async def hash(self, password: str) -> str:
        return await anyio.to_thread.run_sync(self._hasher.hash, password, limiter=self._limiter())

    async def check(self, stored: str | None, password: str) -> bool:
        """True if the password is right. Without a stored hash it takes as long, so that nobody learns which names exist."""
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
    """Limits the requests per minute of each visitor by a bucket that refills. The visitors seen longest ago are forgotten."""

    MOST = 20_000

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self.most, self.per_second, self._clock = per_minute, per_minute / 60, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, visitor: str) -> float:
        """Count a request: 0 if it is allowed, else the seconds until one is."""
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
    """Wraps the application: refuses other hosts and bodies that are too large, and adds the headers to every response."""

    def __init__(self, application: Application, hosts: Iterable[str], most_bytes: int, https: bool = False):
        self.application, self.hosts, self.most_bytes = application, {host.lower() for host in hosts}, most_bytes
        self.headers = {**HEADERS, **(HTTPS_ONLY if https else {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.application(scope, receive, send)
            return
        send = _with_headers(send, self.headers)
        hosts, lengths = ([value for key, value in scope["headers"] if key == name] for name in (b"host", b"content-length"))
        if len(hosts) != 1 or host_name(hosts[0].decode("latin-1")) not in self.hosts:
            await _refuse(send, 421, "This host name is not served here. Name it in 'hosts' of studio.yaml.")
        elif any(not length.isdigit() or int(length) > self.most_bytes for length in lengths):
            await _refuse(send, 413, f"A request may have {self.most_bytes} bytes.")
        else:
            await self.application(scope, _bounded(receive, self.most_bytes), send)


class TooLarge(Exception):
    """A body without a length grew beyond the limit."""


_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{0,5})?")


def host_name(host: str) -> str:
    """The name in a Host header, without the port; '' if the header is invalid."""
    found = _HOST.fullmatch(host)
    return (found[1] or found[2]).lower() if found else ""


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


def _with_headers(send: Send, headers: Mapping[str, str]) -> Send:
    async def with_headers(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            given = {name for name, _ in message["headers"]}
            added = {**headers, **({} if b"cache-control" in given else {"cache-control": "no-store"})}
            message["headers"] = [*message["headers"], *((name.encode(), value.encode()) for name, value in added.items())]
        await send(message)

    return with_headers


async def _refuse(send: Send, status: int, why: str) -> None:
    content = why.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
