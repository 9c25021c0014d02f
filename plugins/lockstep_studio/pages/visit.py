"""One request: the visitor, the fields sent, the response. Every page goes through `page`, which checks the session, the origin,
the rate, the CSRF token of requests that change something, and the visitor's rights. Then the page's own function runs."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from lockstep.errors import LockstepError
from lockstep_studio.security import CSRF_FIELD, CSRF_HEADER, TooLarge, host_name
from lockstep_studio.settings import MODES, GroupConfig
from lockstep_studio.store import people
from lockstep_studio.store.database import Connection
from lockstep_studio.store.people import Person, Refused
from lockstep_studio.studio import Studio

Who = Literal["anyone", "person", "labeler", "operator"]
"""Who may use a page. A labeler has read the instructions and is neither screened out nor paused."""
EXTEND_AFTER = 24 * 3600.0
"""A session is extended at most once in this many seconds, to avoid a write with every visit."""
MOST_FIELDS = 200
BODY_SECONDS = 30.0
"""Seconds within which a request has to arrive; a slower one is refused."""


class Forbidden(Refused):
    def __init__(self, message: str):
        super().__init__(message, 403)


class ElsewhereFirst(Exception):
    """The visitor has to go to another page first."""

    def __init__(self, path: str, why: str, status: int = 403):
        super().__init__(why)
        self.path, self.status = path, status


@dataclass
class Visit:
    """A request. ``token`` is the cookie's. ``stranger``: there was no valid cookie. ``fresh``: the response sets the cookie."""

    request: Request
    studio: Studio
    token: str
    person: Person | None
    now: float
    fields: Mapping[str, list[Any]] = field(default_factory=dict)
    stranger: bool = False
    fresh: bool = False

    @property
    def me(self) -> Person:
        assert self.person is not None  # `page` has checked it
        return self.person

    @property
    def session(self) -> bytes | None:
        """The session now, which a new one would replace."""
        return None if self.person is None else self.person.session

    @property
    def reader(self) -> Connection:
        return self.studio.database.reader

    @property
    def group(self) -> GroupConfig:
        """The visitor's group.

        Raises:
          Forbidden: the group was removed from the settings.
        """
        found = self.studio.settings.groups.get(self.me.group)
        if found is None:
            raise Forbidden("Your group is not part of this studio any more. Ask the operator for a new invitation.")
        return found

    @property
    def address(self) -> str:
        return self.request.client.host if self.request.client else ""

    @property
    def at(self) -> str:
        """The path as the routes read it. A Host header cannot influence it."""
        return str(self.request.scope["path"])

    @property
    def by_machine(self) -> bool:
        return "application/json" in self.request.headers.get("accept", "")

    def path(self, name: str) -> str:
        return str(self.request.path_params[name])

    # ------------------------------------------------------------------------------------------------- what was sent

    def first(self, name: str) -> Any:
        """The first value sent under this name, of any type; '' if there is none."""
        return (self.fields.get(name) or [""])[0]

    def text(self, name: str, *, required: bool = True, most: int | None = None) -> str:
        """The text sent under this name, stripped.

        Raises:
          Refused: the text is missing or too long, or is not text.
        """
        value = self.first(name)
        most = most or self.studio.settings.limits.text_characters
        if not isinstance(value, str) or "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
            raise Refused(f"{name} should be text.", 400)
        value = value.replace("\r\n", "\n").strip()
        if required and not value:
            raise Refused(f"{name} is empty. Write something first.", 400)
        if len(value) > most:
            raise Refused(f"{name} has {len(value)} characters. It may have {most}.", 413)
        return value

    def integer(self, name: str, least: int, most: int) -> int:
        value = self.optional(name, least, most)
        if value is None:
            raise Refused(f"{name} is missing. Choose a number from {least} to {most}.", 400)
        return value

    def optional(self, name: str, least: int, most: int) -> int | None:
        """A whole number; None if nothing was given."""
        value = self.first(name)
        if value is None or value == "":
            return None
        try:
            number = int(value) if isinstance(value, str) and len(value) < 20 else value
        except ValueError:
            number = None
        if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
            raise Refused(f"{name} should be a whole number from {least} to {most}.", 400)
        return number

    def many(self, name: str) -> list[Any]:
        return list(self.fields.get(name, []))

    # ------------------------------------------------------------------------------------------------ how it is answered

    def show(self, template: str, data: Mapping[str, Any], status: int = 200) -> Response:
        """The page, or its data for a machine."""
        everything = {**data, "csrf": self.studio.keys.csrf(self.token)}
        if self.by_machine:
            return self._kept(JSONResponse(everything, status))
        around = {"me": self.person, "title": self.studio.settings.title, "modes": self._modes(), "path": self.at}
        return self._kept(HTMLResponse(self.studio.templates.get_template(template).render(**around, **everything), status))

    def go(self, path: str, **data: Any) -> Response:
        """The response after a change: a redirect to another page, or for a machine the data and the path of that page."""
        if self.by_machine:
            return self._kept(JSONResponse({**data, "next": path, "csrf": self.studio.keys.csrf(self.token)}))
        return self._kept(RedirectResponse(path, 303))

    def sign_in(self, session: str) -> None:
        """Give the visitor this session, and a new cookie."""
        self.token, self.fresh = session, True

    def _kept(self, response: Response) -> Response:
        if self.fresh:
            response.set_cookie(
                self.studio.cookie, self.studio.keys.sign(self.token), max_age=int(people.SESSION_SECONDS), httponly=True,
                samesite="lax", secure=self.studio.settings.https, path="/",
            )  # fmt: skip
        return response

    def _modes(self) -> list[dict[str, str]]:
        if self.person is None or self.person.operates:
            return []
        group = self.studio.settings.groups.get(self.person.group)
        return [{"mode": mode, "title": title} for mode, title in MODES.items() if group is not None and mode in group.modes]


Handler = Callable[[Visit], Awaitable[Response]]


def get(path: str, handler: Handler, who: Who = "labeler") -> Route:
    return Route(path, page(handler, who, changes=False), methods=["GET"])


def post(path: str, handler: Handler, who: Who = "labeler") -> Route:
    return Route(path, page(handler, who, changes=True), methods=["POST"])


def page(handler: Handler, who: Who, changes: bool) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        visit = _visit(request)
        try:
            _check_origin(request, changes)
            _check_rate(visit)
            if changes:
                fields = await _fields(request)
                visit = _visit(request)  # a slow body: the session may have changed
                visit.fields = fields
                _check_csrf(visit)
            _check_rights(visit, who)
            if visit.person is not None and visit.person.until(visit.now) - visit.person.expires > EXTEND_AFTER:
                await visit.studio.database.do(people.extend, visit.person.session, visit.now)
                visit.fresh = True
            return await handler(visit)
        except ElsewhereFirst as first:
            if visit.by_machine:
                return visit.show("error.html", {"error": str(first), "next": first.path}, first.status)
            return visit.go(first.path)
        except TooLarge:
            return visit.show("error.html", {"error": "That is too much at once."}, 413)
        except LockstepError as error:
            return visit.show("error.html", {"error": str(error)}, getattr(error, "status", 400))

    return endpoint


def _visit(request: Request) -> Visit:
    """The visit of a request. Opening a page sets a cookie if there is none. Sending a form does not: browsers send the forms of
    other sites without the cookie, and a new one would replace the visitor's."""
    studio: Studio = request.app.state.studio
    now = studio.clock()
    token = studio.keys.unsign(request.cookies.get(studio.cookie, ""))
    if token is None:
        opened = request.method == "GET" and not _is_embedded(request)
        return Visit(request, studio, people.new_token(), None, now, stranger=True, fresh=opened)
    return Visit(request, studio, token, people.person_of(studio.database.reader, token, now), now)


def _check_rate(visit: Visit) -> None:
    wait = visit.studio.rates.wait(_visitor(visit))
    if wait:
        raise Refused(f"That was too fast. Wait {wait:.0f} seconds.", 429)


def _visitor(visit: Visit) -> str:
    """The name under which requests are counted: that of the person, of the valid invitation, or else of the address."""
    if visit.person is not None:
        return str(visit.person.id)
    token = str(visit.request.path_params.get("token", ""))
    if visit.at.startswith("/join/") and people.is_good(visit.reader, token, visit.now):
        return f"with {people.digest(token).hex()}"
    return f"at {visit.address}"


def _check_origin(request: Request, changes: bool) -> None:
    """Refuse requests from other sites, which may only link here. Browsers say where a form comes from, and what a page is loaded
    for."""
    if _is_embedded(request) or changes and _is_foreign(request):
        raise Forbidden("This form came from another site." if changes else "Another site may not load this page into itself.")


def _is_embedded(request: Request) -> bool:
    site, purpose = (request.headers.get(f"sec-fetch-{name}") for name in ("site", "dest"))
    return site in ("cross-site", "same-site") and purpose not in (None, "document")


def _is_foreign(request: Request) -> bool:
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return True
    origin = request.headers.get("origin")
    if not origin or origin == "null":
        return False
    try:
        return urllib.parse.urlsplit(origin).hostname != host_name(request.headers.get("host", ""))
    except ValueError:
        return True


async def _fields(request: Request) -> dict[str, list[Any]]:
    """The fields sent, as JSON or as a form: {name: values}."""
    try:
        with anyio.fail_after(BODY_SECONDS):
            body = await request.body()
    except ClientDisconnect as error:
        raise Refused("The connection was closed.", 400) from error
    except TimeoutError as error:
        raise Refused("The request took too long to arrive. Send it again.", 408) from error
    try:
        if request.headers.get("content-type", "").startswith("application/json"):
            content = json.loads(body or b"{}")
            if not isinstance(content, dict) or len(content) > MOST_FIELDS:
                raise ValueError("no object")
            return {name: value if isinstance(value, list) else [value] for name, value in content.items()}
        return urllib.parse.parse_qs(body.decode(), keep_blank_values=True, max_num_fields=MOST_FIELDS, errors="strict")
    except (ValueError, RecursionError) as error:
        raise Refused("The request cannot be read. Send a form or a JSON object.", 400) from error


def _check_csrf(visit: Visit) -> None:
    given = visit.request.headers.get(CSRF_HEADER) or visit.first(CSRF_FIELD)
    if visit.stranger or not isinstance(given, str) or not visit.studio.keys.check_csrf(visit.token, given):
        raise Forbidden("This form is too old, or came from another site. Go back, reload the page and send it again.")


def _check_rights(visit: Visit, who: Who) -> None:
    person = visit.person
    if who == "anyone":
        return
    if person is None:
        raise ElsewhereFirst("/sign-in", "Sign in first, or open your invitation.", 401)
    if who == "operator" and not person.operates:
        raise Forbidden("This page is the operator's.")
    if who != "labeler":
        return
    if person.operates:
        raise ElsewhereFirst("/operator", "An operator does not label. Open an invitation in another browser.")
    if person.standing in people.NO_WORK:
        raise Forbidden(people.NO_WORK[person.standing])
    if not people.has_agreed(visit.reader, person, visit.group.version):
        raise ElsewhereFirst("/instructions", "Read the instructions and agree first.")
    mode = visit.at.split("/")[1]
    if mode in MODES and mode not in visit.group.modes:
        raise Forbidden(f"Your group does not do this: {MODES[mode]}.")
