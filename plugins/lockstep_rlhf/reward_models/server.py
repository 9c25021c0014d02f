"""HTTP for reward models that ask a server: one POST, bounded in time and size, without a secret in any message. Retries are in
`lockstep_rlhf.reward_models.outside.patiently`."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import ipaddress
import logging
import os
import random
import re
import ssl
from dataclasses import dataclass
from typing import Literal

import httpx

from lockstep.config.schema import REQUIRED, setting
from lockstep.config.secrets import redact, remember
from lockstep.errors import ConfigError, short, told
from lockstep.text.visible import visible
from lockstep_rlhf.reward_models.outside import LONGEST_TIMEOUT, MOST_RETRIES, NoScores, OneAtATime

logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log every URL, with any secrets in it

LONGEST_PAUSE = 60.0
"""Seconds between two attempts, unless the server asks for more."""
LONGEST_WAIT = 600.0
"""Seconds that a server may ask to wait; a server that asks for more counts as down."""
LARGEST_ANSWER = 2**20
"""Bytes of an answer. Reading stops there, which bounds memory."""
SHOWN = 200
"""Characters of an answer shown in the error."""
GRACE = 5.0
"""Seconds that a request may take to close after its time is up."""

_BROKEN_OFF = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
"""TLS errors after which a retry may help. The others mean a bad certificate, or a server that does not speak TLS."""


@dataclass(frozen=True)
class ServerConfig:
    """The keys of every reward model that asks a server."""

    url: str = setting(REQUIRED, "http://127.0.0.1:8000/score. Part of a stage's identity: include the model's version.")
    token_variable: str | None = setting(None, "The NAME of an environment variable with a bearer token; null: none.")
    timeout_seconds: float = setting(
        60.0, "Limit of one request, from the first to the last byte.", above=0, most=LONGEST_TIMEOUT
    )
    retries: int = setting(5, "Further attempts after one that fails.", least=0, most=MOST_RETRIES)
    backoff_seconds: float = setting(
        1.0, "Pause before the first retry; doubled each time, with jitter.", least=0, most=LONGEST_PAUSE
    )
    on_failure: Literal["raise", "drop"] = setting(
        "raise", "Stop the run; or drop: leave the episodes out and report how many. A failure is never a score."
    )

    def __post_init__(self) -> None:
        check_url(self.url)


class Server:
    """A server that takes POSTs of JSON.

    ``token_variable`` names the environment variable with a bearer token: the token itself never appears in a configuration,
    log or error. Redirects are not followed: they would take the token elsewhere. The proxies of HTTP_PROXY, HTTPS_PROXY,
    ALL_PROXY and NO_PROXY are used, except to reach this machine. A compressed answer is refused: a small one could unpack to
    any size.

    Args:
      path: appended to the path of the configured URL.
    """

    def __init__(self, config: ServerConfig, path: str = ""):
        self.config = config
        url = httpx.URL(config.url)
        self.url = url.copy_with(path=url.path.rstrip("/") + path) if path else url
        self.name = f"{url.scheme}://{url.netloc.decode()}{self.url.path}"  # without the query, which may hold a key
        secret = token(config.token_variable)
        self.headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        self.headers |= {"Authorization": f"Bearer {secret}"} if secret else {}
        self.proxies = not _is_this_machine(url.host)
        try:  # loading certificates takes a second on a busy machine, and plain HTTP to this machine needs none
            plain = url.scheme == "http" and not self.proxies
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if plain else httpx.create_ssl_context()
        except OSError as error:
            raise ConfigError(f"SSL_CERT_FILE or SSL_CERT_DIR in the environment cannot be used: {error}") from error
        try:
            self._client()
        except (ValueError, ImportError, httpx.InvalidURL) as error:
            raise ConfigError(
                f"A proxy in the environment (HTTP_PROXY, ALL_PROXY, NO_PROXY, ...) cannot be used: {redact(str(error))}"
            ) from None

    def post(self, question: bytes, most: int = LARGEST_ANSWER, calls: OneAtATime | None = None) -> bytes:
        """Return the body of the answer, at most ``most`` bytes. Requests with the same ``calls`` never run at once.

        Raises:
          NoScores: there is no usable answer in time.
        """
        calls = calls or OneAtATime()
        answer: bytes = calls.within(self.config.timeout_seconds, lambda: asyncio.run(self._post(question, most)), GRACE)
        return answer

    def pause(self, attempt: int) -> float:
        """Seconds before the next attempt, with jitter, so that jobs that failed together do not retry together. Nothing else
        here is random, and the jitter changes no score."""
        doubled = self.config.backoff_seconds * 2.0 ** min(attempt, 30)
        return min(LONGEST_PAUSE, doubled) * random.uniform(0.5, 1.0)

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(verify=self.tls, trust_env=self.proxies, timeout=None, headers=self.headers)

    async def _post(self, question: bytes, most: int) -> bytes:
        """Return the body of the answer. The connection is always closed: unlike a thread, an asyncio task can be stopped."""
        try:
            async with (
                asyncio.timeout(self.config.timeout_seconds),
                self._client() as client,
                client.stream("POST", self.url, content=question) as answer,
            ):
                return await _read(answer, most)
        except TimeoutError:
            failure = NoScores(f"no answer within reward_model.timeout_seconds={self.config.timeout_seconds:g}")
        except (httpx.HTTPError, OSError) as error:
            cause = _cause(error)
            passing = not isinstance(cause, ssl.SSLError) or isinstance(cause, _BROKEN_OFF)
            again = passing and not isinstance(error, httpx.LocalProtocolError)
            failure = NoScores(f"no connection: {shown(redact(told(cause)))}", again=again)
        raise failure  # outside of the handler: a chained error might show what the server sent


async def _read(answer: httpx.Response, most: int) -> bytes:
    """Return the body of the answer.

    Raises:
      NoScores: the server refuses, or its answer is longer than ``most`` bytes or compressed.
    """
    packed = answer.headers.get("Content-Encoding", "identity")
    if packed.lower() not in ("", "identity"):
        raise NoScores(f"its answer is compressed, which was not asked for: {shown(redact(packed))}", again=False)
    body, whole = bytearray(), True
    async for piece in answer.aiter_raw():
        body += piece
        if len(body) > most:
            whole = False
            break
    if answer.is_success:
        if not whole:
            raise NoScores(f"its answer is longer than {most} bytes", again=False)
        return bytes(body)
    status, wait = answer.status_code, _retry_after(answer.headers.get("Retry-After"))
    again = (status == 429 or status >= 500) and wait <= LONGEST_WAIT
    asked = f", retry after {wait:g} seconds" if wait else ""
    said = shown(redact(body.decode(errors="replace"))) or "(nothing more)"
    raise NoScores(f"it answered {status} {shown(redact(answer.reason_phrase))}{asked}: {said}", again=again, wait=wait)


def shown(text: str) -> str:
    """A server's text as one line of bounded length."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."


def _cause(error: BaseException) -> BaseException:
    """The operating system's error from which the libraries' error arose; ``error`` itself if there is none."""
    found, behind = error, error.__cause__ or error.__context__
    while behind is not None:
        behind = behind.exceptions[0] if isinstance(behind, BaseExceptionGroup) else behind  # one for each address of a host
        found = behind if isinstance(behind, OSError) else found
        behind = behind.__cause__ or behind.__context__
    return found


def check_url(url: str) -> None:
    """
    Raises:
      ConfigError: no request can be sent to ``url``, or it holds credentials.
    """
    try:
        if re.search(r"\s", url):
            raise ValueError("it has a space or a line break; in a path, write %20")
        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError("it needs http:// or https:// and a host")
        if parsed.userinfo:
            raise ConfigError(
                f"reward_model.url of {parsed.host} holds credentials. Put the token in an environment variable and name it: "
                "reward_model.token_variable=REWARD_TOKEN."
            )
        if parsed.port is not None and not 0 < parsed.port < 65536:
            raise ValueError(f"there is no port {parsed.port}")
        host = parsed.raw_host.decode()
        if not re.fullmatch(r"[\w.-]+|[0-9a-f:.]+", host):
            raise ValueError(f"'{host}' is not the name of a host")
        host.encode("idna")  # as the resolver does it: refuses an empty label and one of more than 63 letters
    except (ValueError, httpx.InvalidURL) as error:
        raise ConfigError(
            f"reward_model.url='{short(redact(url))}' should look like http://127.0.0.1:8000/score: {short(redact(str(error)))}."
        ) from None


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def token(variable: str | None) -> str | None:
    if variable is None:
        return None
    secret = os.environ.get(variable, "").strip()
    if not secret:
        raise ConfigError(
            f"The environment variable {short(variable)} is not set. Put the reward server's token there, or set "
            "reward_model.token_variable=null."
        )
    if not secret.isascii() or not secret.isprintable():
        raise ConfigError(f"The token in the environment variable {variable} has characters that no HTTP header may have.")
    remember(secret)
    return secret


def _retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for, by a number or a date (RFC 9110, 10.2.3); 0 without a usable header."""
    if not value:
        return 0.0
    if re.fullmatch(r"[0-9]+", value.strip()):
        return float(value)
    try:
        then = email.utils.parsedate_to_datetime(value)
        then = then if then.tzinfo else then.replace(tzinfo=datetime.UTC)
        return max(0.0, (then - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (ValueError, TypeError, IndexError, OverflowError):  # whatever a bad date makes the standard library raise
        return 0.0
