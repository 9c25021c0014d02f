"""A vLLM server as the engine: weights are handed over in a folder; tokens go in and out by HTTP.

    POST /pause?mode=wait, /collective_rpc, /update_weight_version, /resume     hand weights over
    POST /inference/v1/generate, once for each row                              draw

Written against vLLM 0.32, whose answers say which weights drew each token. `docs/scale.md` has the command that starts it.
Prompts also carry the version as ``cache_salt``, so the prefix cache never returns keys and values computed by older weights.

The server's development endpoints, which take weights, ask for no password and load whatever they are given. Run the server on
this machine or in a private network.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx
import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError, EngineFailed, short, told
from lockstep.interfaces import Engine, Generated
from lockstep.learning.aside import Aside
from lockstep.learning.served import EngineConfig
from lockstep.text.sequences import right_pad
from lockstep.text.visible import visible

T = TypeVar("T")
log = logging.getLogger("lockstep")
logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log every request

MOST_AT_ONCE = 256
"""Concurrent requests; vLLM's own default for the number of sequences it runs at once."""
LARGEST_ANSWER, LARGEST_TOKEN = 2**16, 2**10
"""Byte limits: for an answer, and in addition for each of its tokens. Longer answers are not read, so memory is bounded."""
LOADING = "loading"
"""The version while weights are handed over. If the hand-over fails, every answer carries it and is refused."""
RESUME_SECONDS = 5.0
"""Time limit for resuming the server after a failed hand-over. The attempt also delays Ctrl-C."""
PROBE = -1234.5
"""The same as in `lockstep_vllm.processor`, which this environment cannot import."""
LOOK = "docs/scale.md, 'Rollouts by an engine', has the command that starts it."


@dataclass(frozen=True)
class ServerConfig:
    url: str = setting("http://127.0.0.1:8000", "Address of the server, which must be able to read the folder of runs.")
    timeout_seconds: float = setting(600.0, "Time limit for a batch of responses, and for a hand-over.", above=0, most=86400)
    remote: bool = setting(False, "Allow url to be another machine. Prompts and responses travel there as they are.")


class Server(Engine):
    @dataclass(frozen=True)
    class Config(EngineConfig):
        sampler: Literal["lockstep", "vllm"] = setting(
            "lockstep",
            "lockstep: the server runs lockstep_vllm.processor and draws what the backend would; vllm: vLLM's own sampler, with "
            "a seed for each row.",
        )
        server: ServerConfig = setting(ServerConfig(), "Where the server is.")

    def __init__(self, config: Config):
        super().__init__(config)
        self.url = config.server.url.rstrip("/")
        self.version = LOADING
        self.known = False
        """True once a probe has shown that the server samples as configured."""

    @classmethod
    def check(cls, config: Config) -> None:
        check_url(config.server)

    # ------------------------------------------------------------------------------------------------------------ weights

    def load(self, folder: Path, version: str) -> None:
        if not self.known:
            self._run(self._probe())
            self.known = True
        self.version = LOADING
        try:
            self._run(self._load(folder.absolute(), version))
        except BaseException:  # also timeouts and Ctrl-C
            with contextlib.suppress(EngineFailed):  # the server may be gone; the first error says why
                self._run(self._resume(), RESUME_SECONDS)
            raise
        self.version = version

    async def _load(self, folder: Path, version: str) -> None:
        async with self._client() as client:
            await self._post(client, "/pause?mode=wait", None)
            await self._post(client, "/update_weight_version", {"new_version": LOADING})
            await self._post(client, "/collective_rpc", self._reload(str(folder)))
            await self._post(client, "/update_weight_version", {"new_version": version})
            await self._post(client, "/resume", None)

    async def _resume(self) -> None:
        async with self._client() as client:
            await self._post(client, "/resume", None)

    def _reload(self, folder: str) -> dict[str, Any]:
        """The call for the workers: Lockstep's method if its sampler is configured, else vLLM's own."""
        if self.config.sampler == "lockstep":
            return {"method": "lockstep_load", "kwargs": {"folder": folder}}
        return {"method": "reload_weights", "kwargs": {"weights_path": folder}}

    async def _probe(self) -> None:
        """
        Raises:
          EngineFailed: the server does not sample as configured, or does not return its sampler's log-probabilities.
        """
        await self._resume()  # a run that was killed during a hand-over left the server paused
        async with self._client() as client:
            if self.config.sampler == "lockstep":
                asked = self._settings(np.zeros(1, np.uint32), 1.0, ())
                asked["extra_args"]["lockstep"]["probe"] = True
                _, logprobs, _ = await self._row(client, [0], asked)
                if logprobs != [PROBE]:
                    raise EngineFailed(
                        f"{self._who} does not draw from Lockstep's seeds. Start it with --logits-processors "
                        "lockstep_vllm.processor:Seeds --logprobs-mode processed_logits; or set engine.sampler=vllm, whose "
                        f"tokens differ from the backend's. {LOOK}"
                    )
                return
            for token in (0, 1):  # raw log-probabilities of both tokens cannot be 0
                asked = self._settings(np.zeros(1, np.uint32), 1.0, ()) | {"logit_bias": {token: 100.0}}
                _, logprobs, _ = await self._row(client, [0], asked)
                if len(logprobs) != 1 or not abs(logprobs[0]) < 1e-3:
                    raise EngineFailed(
                        f"{self._who} returns log-probabilities that differ from those it samples from. Start it with "
                        f"--logprobs-mode processed_logprobs. {LOOK}"
                    )
        log.warning(
            "engine.sampler=vllm: the server uses its own sampler, so the tokens do not follow from the run's seeds, differ from "
            "the backend's, and may differ when a run is repeated. sampler/mismatch_* shows the difference in log-probabilities, "
            "and algorithm.correction.kind=truncate weighs by it."
        )

    # ------------------------------------------------------------------------------------------------------------- tokens

    def generate(
        self,
        prompt_tokens: np.ndarray,
        prompt_mask: np.ndarray,
        seeds: np.ndarray,
        *,
        temperature: float,
        stop_ids: Sequence[int],
        pad_id: int,
    ) -> tuple[Generated, frozenset[str]]:
        prompts = [tokens[mask].tolist() for tokens, mask in zip(prompt_tokens, prompt_mask, strict=True)]
        rows = self._run(self._rows(prompts, seeds, temperature, stop_ids))
        width = seeds.shape[1]
        if (longest := max(len(ids) for ids, _, _ in rows)) > width:
            raise EngineFailed(f"{self._who} answered with {longest} tokens to a request for at most {width}. {RESTART}")
        tokens, mask = right_pad([ids for ids, _, _ in rows], pad_id, width)
        logprobs = np.zeros(mask.shape, np.float32)
        with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, which is refused
            logprobs[mask] = [number for _, numbers, _ in rows for number in numbers]
        return Generated(tokens, mask, logprobs), frozenset().union(*(versions for _, _, versions in rows))

    async def _rows(
        self, prompts: Sequence[list[int]], seeds: np.ndarray, temperature: float, stop_ids: Sequence[int]
    ) -> list[Row]:
        limit = asyncio.Semaphore(MOST_AT_ONCE)

        async def one(client: httpx.AsyncClient, prompt: list[int], seeds: np.ndarray) -> Row:
            async with limit:
                return await self._row(client, prompt, self._settings(seeds, temperature, stop_ids))

        async with self._client() as client, asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(client, *row)) for row in zip(prompts, seeds, strict=True)]
        return [task.result() for task in tasks]

    def _settings(self, seeds: np.ndarray, temperature: float, stop_ids: Sequence[int]) -> dict[str, Any]:
        """vLLM's sampling parameters for one row."""
        settings: dict[str, Any] = {
            "max_tokens": len(seeds), "stop_token_ids": list(map(int, stop_ids)), "ignore_eos": True, "detokenize": False,
            "logprobs": 0,
        }  # fmt: skip
        if self.config.sampler == "vllm":
            return settings | {"temperature": temperature, "seed": int(seeds[0])}
        return settings | {"temperature": 0.0, "extra_args": {"lockstep": {"seeds": seeds.tolist(), "temperature": temperature}}}

    async def _row(self, client: httpx.AsyncClient, prompt: list[int], settings: dict[str, Any]) -> Row:
        asked = {"token_ids": prompt, "cache_salt": self.version, "sampling_params": settings}
        most = LARGEST_ANSWER + LARGEST_TOKEN * settings["max_tokens"]
        answer = await self._post(client, "/inference/v1/generate", asked, most)
        try:
            return response(answer)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            wrong = shown(told(error))
        raise EngineFailed(f"{self._who} answered with what is no response: {wrong}. {RESTART}")

    # --------------------------------------------------------------------------------------------------------------- HTTP

    @property
    def _who(self) -> str:
        return f"The vLLM server at {self.url}"

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=MOST_AT_ONCE, max_keepalive_connections=MOST_AT_ONCE)
        plain = {"Accept-Encoding": "identity"}
        return httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=None, limits=limits, headers=plain)

    def _run(self, work: Coroutine[Any, Any, T], limit: float | None = None) -> T:
        """Run a coroutine within ``limit`` seconds (default: the configured limit). It runs in its own thread, because a
        notebook's thread already has a loop. Ctrl-C cancels its requests."""
        limit = limit or self.config.server.timeout_seconds
        loop = asyncio.new_event_loop()

        async def within() -> T:
            async with asyncio.timeout(limit):
                return await work

        def run() -> T:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                return runner.run(within())

        def cancel() -> None:
            for task in asyncio.all_tasks(loop):
                task.cancel()

        try:
            return Aside(run, "engine").result()
        except TimeoutError:
            failure: BaseException = EngineFailed(
                f"{self._who} did not answer within engine.server.timeout_seconds={limit:g}. Look at its log, or raise the "
                "limit, and rerun the same command to resume."
            )
        except BaseExceptionGroup as group:  # from rows that were requested at once
            failure = _first(group)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the coroutine itself raised this
                loop.call_soon_threadsafe(cancel)
            raise
        raise failure

    async def _post(self, client: httpx.AsyncClient, path: str, content: Any, most: int = LARGEST_ANSWER) -> bytes:
        try:
            async with client.stream("POST", path, json=content) as answer:
                body = bytearray()
                async for piece in answer.aiter_raw():
                    body += piece
                    if len(body) > most:
                        raise EngineFailed(f"{self._who} answered {path} with more than {most} bytes. {RESTART}")
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise EngineFailed(
                f"No connection to the vLLM server at {self.url}: {shown(told(error))}. If it is not running, start it, and "
                f"rerun the same command to resume. {LOOK}"
            ) from None
        if answer.is_success:
            return bytes(body)
        said = shown(body.decode(errors="replace")) or "(nothing more)"
        hint = HINTS.get((path.partition("?")[0], answer.status_code), "")
        raise EngineFailed(f"{self._who} answered {path} with {answer.status_code}: {said}. {hint}{RESTART} {LOOK}")


Row = tuple[list[int], list[float], frozenset[str]]
"""Token ids, their log-probabilities, and the versions of the weights that drew them."""
RESTART = "Look at its log, restart it, and rerun the same command to resume."
DEVELOPMENT = "It needs VLLM_SERVER_DEV_MODE=1 to take weights. "
RELOAD = (
    "It needs --worker-extension-cls lockstep_vllm.processor.Weights (with engine.sampler=lockstep), a checkpoint of the same "
    "architecture, and a view of the folder of runs. "
)
HINTS = {
    ("/resume", 404): DEVELOPMENT,
    ("/pause", 404): DEVELOPMENT,
    ("/collective_rpc", 500): RELOAD,
    ("/inference/v1/generate", 403): "It needs --enable-scale-out. ",
    ("/inference/v1/generate", 404): "It needs vLLM 0.32 or newer. ",
}


def response(answer: bytes) -> Row:
    """
    Raises:
      ValueError, KeyError, TypeError, OverflowError, RecursionError: the answer is not a valid response.
    """
    (choice,) = json.loads(answer)["choices"]
    ids, read = choice["token_ids"], choice["logprobs"]["content"]
    logprobs = [each["logprob"] for each in read]
    if ids != [each["token_id"] for each in read]:
        raise ValueError("its tokens and their log-probabilities do not match")
    if any(type(each) is not int or not 0 <= each < 2**31 for each in ids) or any(type(x) not in (int, float) for x in logprobs):
        raise ValueError("a token or a log-probability is no number")
    return ids, [float(x) for x in logprobs], drawn_by(choice["weight_versions"], len(ids))


def drawn_by(spans: list[dict[str, Any]], count: int) -> frozenset[str]:
    """The versions of the weights that drew ``count`` tokens. A span says which weights drew tokens [start, end).

    Raises:
      ValueError, KeyError, TypeError: the spans leave out a token, or overlap.
    """
    limits = sorted((span["start"], span["end"]) for span in spans)
    if [*(start for start, _ in limits), count] != [0, *(end for _, end in limits)]:
        raise ValueError("it does not say for each of its tokens which weights drew it")
    return frozenset(str(span["version"]) for span in spans)


def shown(text: str) -> str:
    """A server's text on one line, of bounded length."""
    return short(visible(" ".join(text.split())))


def check_url(server: ServerConfig) -> None:
    """
    Raises:
      ConfigError: it is not a valid address, or it is another machine's without ``remote``.
    """
    try:
        url = httpx.URL(server.url)
        if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.path.rstrip("/") or url.query:
            raise ValueError("it needs http:// or https://, a host and a port, and nothing else")
    except (ValueError, httpx.InvalidURL) as error:
        wrong = short(str(error))
        raise ConfigError(f"engine.server.url='{short(server.url)}' should look like http://127.0.0.1:8000: {wrong}.") from None
    if not server.remote and not _is_this_machine(url.host):
        raise ConfigError(
            f"engine.server.url={short(server.url)} is another machine. Prompts and responses would travel there as they are, "
            "and whoever reaches that port can load weights. If that network is yours alone, set engine.server.remote=true."
        )


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
