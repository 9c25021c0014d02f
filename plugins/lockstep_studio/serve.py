"""lockstep serve RUN...: the studio, in which people chat with the policies of runs and label their answers.

The first start prints a link for the operator, who invites the others. Everything is kept in --folder. A kill loses nothing that
was acknowledged; rerun the same command to resume.
"""

from __future__ import annotations

import argparse
import ipaddress
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.errors import ConfigError
from lockstep.registry import Plugin
from lockstep.reporting.console import Console

if TYPE_CHECKING:
    import uvicorn

    from lockstep_studio.security import Application
    from lockstep_studio.settings import StudioConfig
    from lockstep_studio.studio import Studio

HELP = "a web app to chat, compare, rank and attack: lockstep serve runs/NAME"
OVERRIDES = False
INVITATION_HOURS = 24.0
WEB = Plugin(
    {},
    requires=("starlette", "uvicorn", "httptools", "argon2", "itsdangerous"),
    install="pip install 'lockstep-rlhf[studio]'",
)
"""Packages that the command needs. Reading closed rounds as data does not need them."""
SWITCH_SECONDS = 0.0005
"""How long one thread may keep the interpreter while others wait. With Python's default of 5 ms, a generating policy would hold
up all pages: a page could wait that long at each of its queries."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or checkpoints of policies")
    parser.add_argument("--folder", default="studio", help="where labels are kept (default: studio)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument("--backend", help="of the policies (default: each run's own)")
    parser.add_argument("--settings", help="a YAML file: groups, instructions, overlap, screening, limits")
    parser.add_argument("--operator", action="store_true", help="print a new link for an operator")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from lockstep.registry import registry
    from lockstep_studio.settings import read_settings

    WEB.check_installed("lockstep serve")
    from lockstep_studio.app import application
    from lockstep_studio.studio import Studio

    if arguments.backend:
        registry().find("backend", arguments.backend, arguments.backend)
    runs = [_run(name) for name in arguments.runs]
    settings = read_settings(None if arguments.settings is None else Path(arguments.settings))
    _check_address(arguments.host, arguments.port)
    studio = Studio(Path(arguments.folder), settings, runs, arguments.backend)
    try:
        _tell(Console(), studio, arguments.host, arguments.port, arguments.operator)
        serve(application(studio, [arguments.host]), arguments.host, arguments.port, settings)
    finally:
        studio.close()


def serve(application: Application, host: str, port: int, settings: StudioConfig) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    import uvicorn

    sys.setswitchinterval(SWITCH_SECONDS)
    uvicorn.Server(configuration(application, host, port, settings)).run()


def configuration(application: Application, host: str, port: int, settings: StudioConfig) -> uvicorn.Config:
    """The configuration of the server."""
    import uvicorn

    from lockstep_studio.protocol import limited

    limits = settings.limits
    return uvicorn.Config(
        application, host=host, port=port, access_log=False, server_header=False, log_level="warning",  # type: ignore[arg-type]
        timeout_graceful_shutdown=5, limit_concurrency=2000, proxy_headers=False, ws="none",
        http=limited(1024 * limits.body_kilobytes, limits.connections, settings.proxies),
    )  # fmt: skip


def _run(name: str) -> Path:
    """
    Raises:
      ConfigError: there is no such folder.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ConfigError(f"There is no run {name}. A run is a folder that `lockstep run` made, such as runs/NAME.")
    return path


def _check_address(host: str, port: int) -> None:
    """Refuse a taken address before a policy is loaded."""
    import socket

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"Cannot listen on {host}, port {port}: {error}. Choose another --host or --port.") from error


def _tell(console: Console, studio: Studio, host: str, port: int, again: bool) -> None:
    from lockstep_studio.store import people

    address, settings = f"http://{_shown(host)}:{port}", studio.settings
    public = f"https://{settings.hosts[0]}" if settings.https and settings.hosts else address
    reader, now = studio.database.reader, studio.clock()
    counts = reader.execute(
        "SELECT (SELECT count(*) FROM people WHERE role = 'operator' AND standing != 'removed'), (SELECT count(*) FROM tasks)"
    ).fetchone()
    console.say(f"The studio is at {address} ({counts[1]} tasks, {len(studio.policies)} policies, in {studio.folder}).")
    if studio.problem:
        console.say(studio.problem)
    if again or not counts[0]:
        token = studio.database.now(people.invite, "operator", people.OPERATORS, 1, INVITATION_HOURS, now)
        console.say(f"The operator's link, good once, for {INVITATION_HOURS:.0f} hours: {public}/join/{token}")
    if settings.https and not settings.proxies:
        console.say("Name the proxy's address in 'proxies': without it, all visitors share the limits of one address.")
    if not is_loopback(host) and not settings.https:
        console.say(
            "Others can reach this address, and it does not encrypt. Put a proxy with HTTPS before it and set https: true."
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
