"""`lockstep serve` as a process: its first words, its errors, and kills while people vote."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from lockstep_studio.serve import _tell, is_loopback
from lockstep_studio.store.database import FILE, connect
from lockstep_studio.studio import Studio
from studio_server import Machine
from test_studio_pages import waiting_run
from test_studio_store import candidates, settings

SETTINGS = "groups: {training: {modes: [compare], checks_share: 0, overlap_share: 0}}\nlimits: {requests_per_minute: 100000}\n"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command(tmp_path: Path, run: Path, port: int, *more: str) -> list[str]:
    (tmp_path / "studio.yaml").write_text(SETTINGS)
    start = [sys.executable, "-m", "lockstep", "serve", str(run), "--folder", str(tmp_path / "studio"), "--port", str(port)]
    return [*start, "--settings", str(tmp_path / "studio.yaml"), *more]


@contextlib.contextmanager
def process(arguments: list[str], port: int):
    """The running server, once it answers. Its output is in ``said``."""
    started = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/")
    until = time.time() + 120
    while time.time() < until and started.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                break
        time.sleep(0.1)
    try:
        yield started
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGTERM)
        started.wait(30)


def invited(said: str) -> str:
    return re.search(r"/join/([\w-]+)", said)[1]


def test_the_first_start_prints_one_link_for_the_operator_and_later_ones_none(tmp_path):
    run, _ = waiting_run(tmp_path, candidates(3))
    port = free_port()
    with process(command(tmp_path, run, port), port) as server:
        boss = Machine(f"http://127.0.0.1:{port}")
        first = server.stdout.readline() + server.stdout.readline()
        token = invited(first)
        assert "3 tasks, 0 policies" in first
        boss.get(f"/join/{token}")
        assert boss.post(f"/join/{token}")["next"] == "/operator"
        again = Machine(f"http://127.0.0.1:{port}")
        assert again.get(f"/join/{token}")["status"] == 404
        link = boss.post("/operator/invite", group="training", uses=2, hours=1)["link"]
        assert link.startswith(f"http://127.0.0.1:{port}/join/")
    with process(command(tmp_path, run, port), port) as server:
        assert boss.get("/operator")["sources"][0]["rows"] == 3
    assert "/join/" not in server.stdout.read()
    assert oct((tmp_path / "studio" / FILE).stat().st_mode)[-3:] == "600"


def test_new_tasks_appear_while_the_studio_serves(tmp_path):
    run, file = waiting_run(tmp_path, candidates(3))
    rows = file.read_text()
    file.unlink()
    port = free_port()
    with process(command(tmp_path, run, port), port) as server:
        token = invited(server.stdout.readline() + server.stdout.readline())
        boss = Machine(f"http://127.0.0.1:{port}")
        boss.get(f"/join/{token}")
        boss.post(f"/join/{token}")
        assert boss.get("/operator")["sources"] == []
        file.write_text(rows)
        until = time.time() + 30
        while not (found := boss.get("/operator")["sources"]) and time.time() < until:
            time.sleep(0.3)
        assert found[0]["wanted"] == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--settings", "/nowhere.yaml"], "The settings /nowhere.yaml cannot be read"),
        (["--backend", "tensorflow"], "No backend named 'tensorflow'"),
        (["--port", "99999"], "Cannot listen on 127.0.0.1, port 99999"),
        (["--host", "203.0.113.7"], "Choose another --host or --port"),
    ],
)
def test_what_cannot_work_is_one_clear_error(tmp_path, more, message):
    run, _ = waiting_run(tmp_path, candidates(1))
    done = subprocess.run(command(tmp_path, run, free_port(), *more), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and message in " ".join(done.stdout.split()) and "Traceback" not in done.stdout + done.stderr


def test_a_run_that_is_not_there_is_named(tmp_path):
    done = subprocess.run(command(tmp_path, Path("/nowhere"), 1), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "There is no run /nowhere." in done.stdout


def test_the_loopback_is_told_from_other_addresses():
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "10.0.0.1", "example.org")] == [
        True, True, True, False, False, False
    ]  # fmt: skip


def test_behind_https_the_operators_link_is_https_and_a_proxy_without_a_name_is_told(tmp_path):
    said: list[str] = []
    console = SimpleNamespace(say=said.append)
    for proxies in ([], ["127.0.0.1"]):
        studio = Studio(tmp_path / f"studio{len(proxies)}", settings(https=True, hosts=["studio.example.org"], proxies=proxies))
        _tell(console, studio, "127.0.0.1", 8000, False)
        studio.close()
    assert sum("https://studio.example.org/join/" in each for each in said) == 2
    assert sum("Name the proxy's address" in each for each in said) == 1


class Voter(threading.Thread):
    """Votes until it is told to stop, and repeats every request that a dead server did not answer."""

    def __init__(self, address: str, token: str, stop: threading.Event):
        super().__init__(daemon=True)
        self.machine, self.token, self.stop, self.stored = Machine(address), token, stop, []
        self.machine.client.timeout = 5
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.patient("get", f"/join/{self.token}")
            joined = self.patient("post", f"/join/{self.token}")
            if joined["status"] != 200:
                raise RuntimeError(joined)
            self.patient("get", "/instructions")
            self.patient("post", "/instructions", version="1")
            while not self.stop.is_set():
                task = self.patient("get", "/compare")
                if task["lease"] is None:  # everything is labelled
                    return
                saved = self.patient("post", f"/lease/{task['lease']}", choice=random.choice([0, 1, "tie"]), revision=0)
                assert saved["status"] == 200, saved
                self.stored.append(task["lease"])
        except Exception as error:
            self.error = None if self.stop.is_set() else error

    def patient(self, method: str, path: str, **fields):
        until = time.time() + 60
        while True:
            try:
                return getattr(self.machine, method)(path, **fields)
            except httpx.HTTPError:
                if time.time() > until or self.stop.is_set():
                    raise
                time.sleep(0.05)


def test_killed_again_and_again_no_vote_is_lost_or_doubled_and_no_task_given_twice(tmp_path):
    run, _ = waiting_run(tmp_path, candidates(3000))
    port, dice, stop = free_port(), random.Random(1), threading.Event()
    arguments, voters = command(tmp_path, run, port), []
    with process(arguments, port) as server:
        boss = Machine(f"http://127.0.0.1:{port}")
        token = invited(server.stdout.readline() + server.stdout.readline())
        boss.get(f"/join/{token}")
        boss.post(f"/join/{token}")
        link = boss.post("/operator/invite", group="training", uses=8, hours=1)["link"]
        voters = [Voter(f"http://127.0.0.1:{port}", link.rpartition("/")[2], stop) for _ in range(8)]
        for voter in voters:
            voter.start()
        while any(not voter.stored and voter.is_alive() for voter in voters):
            time.sleep(0.05)
        os.kill(server.pid, signal.SIGKILL)
    for _ in range(int(os.environ.get("LOCKSTEP_STUDIO_KILLS", "3"))):
        with process(arguments, port) as server:
            time.sleep(dice.uniform(0.1, 1.5))
            os.kill(server.pid, signal.SIGKILL)
    with process(arguments, port):
        time.sleep(0.5)
        stop.set()
        for voter in voters:
            voter.join(30)
        told = [lease for voter in voters for lease in voter.stored]
    database = connect(tmp_path / "studio" / FILE)
    stored = [row["token"] for row in database.execute("SELECT token FROM labels JOIN leases ON leases.id = lease")]
    given = Counter(row["task"] for row in database.execute("SELECT task FROM leases WHERE outcome IS NOT 'expired'"))
    assert [voter.error for voter in voters if voter.error] == []
    assert len(told) > 30 and set(told) <= set(stored)
    assert len(stored) == len(set(stored)) and len(stored) - len(told) <= len(voters)
    assert max(given.values()) == 1
