"""The application: all routes behind the guard, with the studio in its state."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import cast

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from lockstep_studio.pages import arena, attack, chat, entry, operator, tasks
from lockstep_studio.security import Application, Guard
from lockstep_studio.studio import HERE, Studio

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def application(studio: Studio, hosts: Sequence[str] = ()) -> Application:
    """Make the ASGI application. ``hosts``: names under which browsers may reach it, besides loopback and the settings' names."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        scanning = asyncio.create_task(studio.scan_forever())
        try:
            yield
        finally:
            scanning.cancel()

    routes = [
        *entry.routes, *tasks.routes, *chat.routes, *arena.routes, *attack.routes, *operator.routes,
        Route("/health", health), Mount("/static", _Static(directory=HERE / "static")),
    ]  # fmt: skip
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: _missing, 405: _missing, 500: _bug})
    app.state.studio = studio
    settings = studio.settings
    guard = Guard(app, [*LOOPBACK, *settings.hosts, *hosts], settings.limits.body_kilobytes * 1024, settings.https)
    return cast(Application, ProxyHeadersMiddleware(guard, list(settings.proxies))) if settings.proxies else guard  # type: ignore[arg-type]


class _Static(StaticFiles):
    """Files that browsers may cache for ten minutes."""

    async def get_response(self, path: str, scope: object) -> Response:  # type: ignore[override]
        response = await super().get_response(path, scope)  # type: ignore[arg-type]
        response.headers["cache-control"] = "public, max-age=600"
        return response


async def health(request: Request) -> Response:
    """The health check for monitoring: fails if the database does not answer."""
    request.app.state.studio.database.reader.execute("SELECT 1")
    return JSONResponse({"status": "ok"})


async def _missing(request: Request, error: Exception) -> Response:
    return PlainTextResponse("There is no such page. Go to /", getattr(error, "status_code", 404))


async def _bug(request: Request, error: Exception) -> Response:
    """The response to an unexpected error. The log has the traceback; the visitor sees no details."""
    return PlainTextResponse("Something went wrong here. Nothing that was saved is lost. Go back and try again.", 500)
