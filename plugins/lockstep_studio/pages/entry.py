"""The way in: invitations, signing in, instructions and consent; the home page, and a person's own work."""

from __future__ import annotations

from starlette.responses import Response

from lockstep_studio.pages.visit import Forbidden, Visit, get, post
from lockstep_studio.security import LEAST_PASSWORD, MOST_PASSWORD
from lockstep_studio.settings import MODES, TASK_MODES
from lockstep_studio.store import people, tasks
from lockstep_studio.store.people import Refused

MOST_NAME = 60


async def home(visit: Visit) -> Response:
    """Show whether tasks are left, not how many: the number would not fall after a gold item, which would reveal the item."""
    progress = tasks.progress(visit.reader, visit.me)
    modes = [
        {"mode": mode, "title": title, "done": progress.get(mode, (0, 0))[0],
         "left": progress.get(mode, (0, 0))[1] > 0 if mode in TASK_MODES else None}
        for mode, title in MODES.items() if mode in visit.group.modes
    ]  # fmt: skip
    return visit.show("home.html", {"modes_here": modes, "group": visit.me.group, "pseudonym": visit.me.pseudonym})


async def invitation(visit: Visit) -> Response:
    """Show the invitation. Only accepting it uses it up, so a preview of the link does not. Its token cannot be guessed, so
    attempts are not counted."""
    found = people.invitation(visit.reader, visit.path("token"), visit.now)
    return visit.show("join.html", {"role": found["role"], "group": found["grp"], "least_password": LEAST_PASSWORD})


async def accept(visit: Visit) -> Response:
    people.invitation(visit.reader, visit.path("token"), visit.now)
    name, password = (
        visit.text("name", required=False, most=MOST_NAME),
        visit.text("password", required=False, most=MOST_PASSWORD),
    )
    if bool(name) != bool(password):
        raise Refused("To sign in again later, give both a name and a password. Or give neither, and keep this browser.", 400)
    if password and len(password) < LEAST_PASSWORD:
        raise Refused(f"The password is too short. It needs {LEAST_PASSWORD} characters.", 400)
    hashed = await visit.studio.passwords.hash(password) if password else None
    now, token = visit.studio.clock(), visit.path("token")  # the hash may have waited for others
    visit.person, session = await visit.studio.database.do(people.accept, token, name or None, hashed, now, visit.session)
    visit.sign_in(session)
    return visit.go("/operator" if visit.me.operates else "/instructions", pseudonym=visit.me.pseudonym)


async def sign_in_form(visit: Visit) -> Response:
    return visit.show("sign_in.html", {})


async def sign_in(visit: Visit) -> Response:
    """Sign in. The attempt counts as a failure before it is checked, and is taken back if it was right, so that many attempts at
    once cannot exceed the limit."""
    name, password = visit.text("name", most=MOST_NAME), visit.text("password", most=MOST_PASSWORD)
    database = visit.studio.database
    attempts = await database.do(people.attempt, _limits(visit, name), visit.now)
    found = people.password_of(visit.reader, name)
    if not await visit.studio.passwords.check(found[1] if found else None, password) or found is None:
        raise Refused("The name or the password is wrong.", 401)
    visit.sign_in(await database.do(people.sign_in, found[0], visit.studio.clock(), visit.session, attempts))
    return visit.go("/")


def _limits(visit: Visit, name: str) -> dict[str, int]:
    """{who: the most failures}. What was typed as a name may be a password, so only a keyed hash of it is stored."""
    most = visit.studio.settings.limits.failures
    who = visit.studio.keys.hidden(f"name {name}")
    return {f"{who} from {visit.address}": most, who: 10 * most, f"address {visit.address}": 10 * most}


async def sign_out(visit: Visit) -> Response:
    await visit.studio.database.do(people.sign_out, visit.me.session)
    visit.person = None
    visit.sign_in(people.new_token())
    return visit.go("/sign-in")


async def sign_out_everywhere(visit: Visit) -> Response:
    await visit.studio.database.do(people.sign_out_everywhere, visit.me.id)
    visit.person = None
    visit.sign_in(people.new_token())
    return visit.go("/sign-in")


async def instructions(visit: Visit) -> Response:
    agreed = people.has_agreed(visit.reader, visit.me, visit.group.version)
    group = visit.group
    data = {"instructions": group.instructions, "consent": group.consent, "version": group.version, "agreed": agreed}
    return visit.show("instructions.html", data)


async def agree(visit: Visit) -> Response:
    if visit.text("version") != visit.group.version:
        raise Refused("The instructions changed meanwhile. Reload the page and read them again.")
    await visit.studio.database.do(people.agree, visit.me, visit.group.version, visit.now)
    return visit.go("/")


async def own_work(visit: Visit) -> Response:
    """What is stored of the visitor: pseudonym, group and name, and how many labels and conversations."""
    count = lambda sql: visit.reader.execute(sql, (visit.me.id,)).fetchone()[0]  # noqa: E731
    data = {
        "pseudonym": visit.me.pseudonym, "group": visit.me.group, "name": visit.me.name,
        "labels": count("SELECT count(*) FROM labels WHERE person = ? AND content IS NOT NULL"),
        "conversations": count("SELECT count(*) FROM conversations WHERE person = ?"),
    }  # fmt: skip
    return visit.show("own_work.html", data)


async def remove(visit: Visit) -> Response:
    if visit.me.operates:
        raise Forbidden("An operator has no work of their own to remove.")
    if visit.text("sure", required=False) != "yes":
        raise Refused("Nothing was removed: check the box to say that you are sure.", 400)
    removed = await visit.studio.remove(visit.me.id)
    visit.person = None
    visit.sign_in(people.new_token())
    return visit.show("removed.html", removed)


routes = [
    get("/", home),
    get("/join/{token}", invitation, "anyone"),
    post("/join/{token}", accept, "anyone"),
    get("/sign-in", sign_in_form, "anyone"),
    post("/sign-in", sign_in, "anyone"),
    post("/sign-out", sign_out, "person"),
    get("/instructions", instructions, "person"),
    post("/instructions", agree, "person"),
    get("/me", own_work, "person"),
    post("/me/remove", remove, "person"),
    post("/me/sign-out-everywhere", sign_out_everywhere, "person"),
]
