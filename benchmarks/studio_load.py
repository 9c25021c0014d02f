"""200 simulated people at once on one studio, which is killed again and again.

    python benchmarks/studio_load.py runs/rounds/NAME --people 200 --minutes 5 --kills 20 --output benchmarks/human/load.md

Most people compare answers of the miniature, with pauses as people make them; every twentieth chats with the run's last policy,
so the generator is never idle. Then the database is held against what was acknowledged: every vote is there once, as it was sent,
and no task has more labels than were planned, nor two of one person. Times are those of the clients, while the server is up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from lockstep.data.labels import CANDIDATES, candidates_line
from lockstep.storage.files import write_json, write_text
from lockstep.types import Candidates
from lockstep_miniature.source import Config, Miniature

THINK = 2.0
"""Mean seconds that somebody reads before a vote."""
WAIT = 60.0
SETTINGS = """\
comparisons: compare
groups:
  training: {labels: 1, overlap: 2, overlap_share: 0.1, checks_share: 0, modes: [compare, chat]}
chat: {max_tokens: 20}
"""


@dataclass
class Server:
    """The studio's process, which somebody keeps killing."""

    command: list[str]
    address: str
    log: Path
    process: subprocess.Popen[bytes] | None = None
    starts: list[float] = field(default_factory=list)

    def start(self) -> None:
        began = time.perf_counter()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text()[-2000:])
            try:
                httpx.get(f"{self.address}/sign-in", timeout=2)
                break
            except httpx.HTTPError:
                time.sleep(0.05)
        self.starts.append(time.perf_counter() - began)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def kill_often(self, times: int, seconds: float) -> None:
        dice = random.Random(0)
        for _ in range(times):
            time.sleep(seconds / times * dice.uniform(0.5, 1.0))
            self.kill()
            self.start()


@dataclass
class Seen:
    """What the clients saw."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    refused: Counter[str] = field(default_factory=Counter)
    votes: dict[str, Any] = field(default_factory=dict)
    unreachable: int = 0
    answers: int = 0


class Person:
    def __init__(self, number: int, address: str, seen: Seen):
        self.dice, self.seen, self.csrf = random.Random(number), seen, ""
        self.client = httpx.AsyncClient(base_url=address, headers={"accept": "application/json"}, timeout=WAIT)

    async def call(self, kind: str, method: str, path: str, **fields: Any) -> tuple[int, Mapping[str, Any]]:
        """Tried again until the server answers, as a browser's user would."""
        while True:
            began = time.perf_counter()
            try:
                sent = {} if method == "GET" else {"json": {"csrf": self.csrf, **fields}}
                response = await self.client.request(method, path, **sent)
            except httpx.HTTPError:
                self.seen.unreachable += 1
                await asyncio.sleep(0.2 + self.dice.random() / 2)
                continue
            self.seen.seconds[kind].append(time.perf_counter() - began)
            data = response.json()
            self.csrf = data.get("csrf", self.csrf)
            if response.status_code >= 400:
                self.seen.refused[f"{kind} {response.status_code}: {data.get('error', '')[:80]}"] += 1
            return response.status_code, data

    async def join(self, invitation: str) -> None:
        await self.call("join", "GET", f"/join/{invitation}")
        status, _ = await self.call("join", "POST", f"/join/{invitation}")
        if status >= 400:  # it was killed after it had let this person in
            await self.call("join", "GET", "/")
        await self.call("join", "GET", "/instructions")
        await self.call("join", "POST", "/instructions", version="1")

    async def pause(self, mean: float) -> None:
        await asyncio.sleep(mean * self.dice.uniform(0.5, 1.5))

    async def compare(self, end: float) -> None:
        while time.monotonic() < end:
            _, task = await self.call("page", "GET", "/compare")
            if not (token := task.get("lease")):
                return
            await self.pause(THINK)
            choice = self.dice.choice([0, 1, "tie", "bad"])
            status, _ = await self.call("vote", "POST", f"/lease/{token}", choice=choice, revision=0)
            if status < 400:
                self.seen.votes[token] = choice

    async def chat(self, end: float) -> None:
        _, begun = await self.call("page", "GET", "/chat")
        while time.monotonic() < end:
            status, begun = await self.call("vote", "POST", "/chat")
            if status < 400:
                status, _ = await self.call("answer", "POST", f"/chat/{begun['conversation']}/say", text="what does wug eat ?")
                self.seen.answers += status < 400
            await self.pause(THINK / 2)


async def crowd(people: int, address: str, invitation: str, seconds: float, seen: Seen) -> None:
    end = time.monotonic() + seconds

    async def live(number: int) -> None:
        person = Person(number, address, seen)
        await person.pause(THINK)
        await person.join(invitation)
        await (person.chat(end) if number % 20 == 0 else person.compare(end))
        await person.client.aclose()

    await asyncio.gather(*(live(number) for number in range(people)))


def fake_run(folder: Path, tasks: int) -> Path:
    """A run that waits for labels of so many pairs."""
    stage = folder / "stages" / "labels_1-torch-000000000000"
    stage.mkdir(parents=True)
    comparisons = Miniature(Config(comparisons=tasks)).comparisons("train")
    pairs = (
        Candidates(f"{i:06d}", c.prompt, c.completions[:2], ("ppo_1-torch-1", "sft-torch-2")) for i, c in enumerate(comparisons)
    )
    write_text(stage / CANDIDATES, "".join(map(candidates_line, pairs)))
    record = {"folder": f"stages/{stage.name}", "status": "waiting", "kind": "collect", "produces": "comparisons"}
    run = folder / "load"
    run.mkdir()
    facts = {"name": "load", "experiment": "load", "seed": 0, "status": "waiting", "backend": {"name": "torch"}}
    write_json(run / "run.json", facts | {"stages": {"labels_1": record}})
    return run


def wrong(database: Path, votes: Mapping[str, Any]) -> dict[str, int]:
    """Broken promises, counted."""
    connection = sqlite3.connect(database)
    rows = connection.execute("SELECT token, shown, content, revision FROM labels JOIN leases ON leases.id = lease").fetchall()
    stored: dict[str, list[tuple[list[int], dict[str, Any], int]]] = {}
    for token, shown, content, revision in rows:
        stored.setdefault(token, []).append((json.loads(shown), json.loads(content), revision))
    count = lambda sql: int(connection.execute(f"SELECT count(*) FROM ({sql})").fetchone()[0])  # noqa: E731
    return {
        "acknowledged votes that are lost": sum(token not in stored for token in votes),
        "votes stored twice": sum(len(each) > 1 for each in stored.values()),
        "votes stored otherwise than sent": sum(
            not _same(choice, *stored[token][0][:2]) for token, choice in votes.items() if token in stored
        ),
        "tasks with more labels than wanted": count(
            "SELECT 1 FROM labels JOIN slots USING (task, grp, mode) WHERE revision = 0 "
            "GROUP BY task, grp, mode HAVING count(*) > wanted"
        ),
        "tasks labelled twice by one person": count(
            "SELECT 1 FROM labels WHERE revision = 0 GROUP BY task, person HAVING count(*) > 1"
        ),
        "tasks in more hands than wanted": count("SELECT 1 FROM slots WHERE taken > wanted"),
    }  # fmt: skip


def _same(choice: Any, shown: list[int], content: Mapping[str, Any]) -> bool:
    if choice in ("tie", "bad"):
        return len(set(content["ranks"])) == 1 and content["both_bad"] == (choice == "bad")
    return bool(content["ranks"][shown[choice]] == 0 and max(content["ranks"]) == 1)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", type=Path, help="whose last policy people chat with")
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--output", type=Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lockstep-load-") as name:
        folder = Path(name)
        run = fake_run(folder, int(a.people * a.minutes * 60 / THINK))
        write_text(folder / "studio.yaml", SETTINGS)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = Server(
            [sys.executable, "-m", "lockstep", "serve", str(run), str(a.run), "--folder", str(folder / "studio"),
             "--port", str(port), "--settings", str(folder / "studio.yaml")],
            f"http://127.0.0.1:{port}", folder / "log",
        )  # fmt: skip
        server.start()
        invited = re.search(r"/join/(\S+)", server.log.read_text().replace("\n", ""))
        assert invited is not None
        with httpx.Client(base_url=server.address, headers={"accept": "application/json"}, timeout=WAIT) as operator:
            operator.get(f"/join/{invited[1]}")
            csrf = operator.get(f"/join/{invited[1]}").json()["csrf"]
            csrf = operator.post(f"/join/{invited[1]}", json={"csrf": csrf}).json()["csrf"]
            asked = {"csrf": csrf, "group": "training", "uses": 10 * a.people, "hours": 1}
            link = operator.post("/operator/invite", json=asked).json()["link"]
        seen, seconds = Seen(), 60 * a.minutes
        killer = threading.Thread(target=server.kill_often, args=(a.kills, seconds)) if a.kills else None
        if killer:
            killer.start()
        asyncio.run(crowd(a.people, server.address, link.rpartition("/")[2], seconds, seen))
        if killer:
            killer.join()
        server.kill()
        found = wrong(folder / "studio" / "studio.sqlite3", seen.votes)
    rows = []
    for kind, values in seen.seconds.items():
        times = " | ".join(f"{1e3 * percentile(values, share):.0f} ms" for share in (0.5, 0.95, 0.99))
        rows.append(f"| {kind} | {len(values)} | {times} |")
    lines = [
        f"{a.people} people, {a.minutes:g} minutes, {a.kills} SIGKILLs; a restart took {max(server.starts):.1f} s at most.",
        f"{len(seen.votes)} votes acknowledged, {seen.answers} policy answers, {seen.unreachable} requests without a server.",
        *["", "| request | count | median | p95 | p99 |", "|---|---|---|---|---|", *rows, ""],
        *(f"- {what}: {count}" for what, count in found.items()),
        *(f"- refused, {count} times: {what}" for what, count in seen.refused.most_common(8)),
    ]
    print("\n".join(lines))
    if a.output:
        a.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(a.output, "\n".join(lines) + "\n")
    sys.exit(1 if any(found.values()) else 0)


if __name__ == "__main__":
    main()
