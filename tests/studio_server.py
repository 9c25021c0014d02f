"""A studio that serves on a free port, with a policy that needs no model; and clients like browsers and machines."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from lockstep_studio.app import application
from lockstep_studio.generator import Piece, Request
from lockstep_studio.serve import configuration
from lockstep_studio.settings import StudioConfig
from lockstep_studio.store import people
from lockstep_studio.studio import Studio

JSON = {"accept": "application/json"}


class Echo:
    """Says its name and the seed, then repeats the last message, a word a step. 'forever' never ends; 'fail' breaks."""

    def __init__(self, policy: str, pause: float = 0.001):
        self.policy, self.pause, self.batches, self.steps = policy, pause, [], 0

    def speak(self, requests: Sequence[Request]) -> Iterator[Sequence[Piece]]:
        self.batches.append(len(requests))
        words = [[*request.messages[-1].content.split(), f"({request.seed % 1000})"] for request in requests]
        step = 0
        while True:
            time.sleep(self.pause)
            self.steps += 1
            if any("fail" in said for said in words):
                raise ArithmeticError("the policy broke")
            said = [each[step % len(each)] if "forever" in each else each[step] if step < len(each) else "" for each in words]
            over = ["forever" not in each and step >= len(each) - 1 for each in words]
            yield [Piece(f"{word} " if word else "", "done" if end else None) for word, end in zip(said, over, strict=True)]
            if all(over):
                return
            step += 1


@contextlib.contextmanager
def serving(folder: Path, settings: StudioConfig, runs: Sequence[Path] = (), opened: Any = Echo) -> Iterator[tuple[Studio, str]]:
    """A studio in this process, with its address."""
    studio = Studio(folder, settings, runs, opened=opened)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(configuration(application(studio), "127.0.0.1", port, settings))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield studio, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        studio.close()


class Machine:
    """A client that speaks JSON: keeps the cookie, and sends the CSRF token of the last answer."""

    def __init__(self, address: str):
        self.client, self.csrf = httpx.Client(base_url=address, headers=JSON, timeout=30), ""

    def get(self, path: str) -> dict[str, Any]:
        return self._read(self.client.get(path))

    def post(self, path: str, **fields: Any) -> dict[str, Any]:
        return self._read(self.client.post(path, json={"csrf": self.csrf, **fields}))

    def _read(self, response: httpx.Response) -> dict[str, Any]:
        data: dict[str, Any] = response.json()
        self.csrf = data.get("csrf", self.csrf)
        return {**data, "status": response.status_code}


class Browser:
    """A client that reads HTML and sends its forms."""

    def __init__(self, address: str):
        self.client, self.page = httpx.Client(base_url=address, follow_redirects=True, timeout=30), ""

    def get(self, path: str) -> str:
        self.page = self.client.get(path).text
        return self.page

    def post(self, path: str, **fields: Any) -> httpx.Response:
        token = re.search(r'name="csrf" value="([0-9a-f]+)"', self.page)
        response = self.client.post(path, data={"csrf": token[1] if token else "", **fields})
        self.page = response.text
        return response


def labeler(studio: Studio, address: str, group: str = "training", kind: type = Machine, *, agreed: bool = True) -> Any:
    """A client of a person of the group, who has agreed to the instructions."""
    return _joined(studio, address, "labeler", group, kind, agreed)


def operator(studio: Studio, address: str, kind: type = Machine) -> Any:
    return _joined(studio, address, "operator", people.OPERATORS, kind, False)


def _joined(studio: Studio, address: str, role: str, group: str, kind: type, agreed: bool) -> Any:
    token = studio.database.now(people.invite, role, group, 1, 1.0, studio.clock())
    client = kind(address)
    client.get(f"/join/{token}")
    client.post(f"/join/{token}")
    if agreed:
        client.get("/instructions")
        client.post("/instructions", version=studio.settings.groups[group].version)
    return client
