"""Attacks on the studio: script, forged forms, fixed sessions, other people's work, large and strange input."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sqlite3
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import httpx
import pytest
import starlette.requests
from starlette.datastructures import URL

from lockstep.config.schema import parse
from lockstep.errors import CheckpointError, ConfigError
from lockstep_studio.pages import visit
from lockstep_studio.security import Keys, Rates, host_name
from lockstep_studio.settings import StudioConfig
from lockstep_studio.sources import add_file
from lockstep_studio.store import people
from studio_server import JSON, Browser, Echo, Machine, labeler, operator, serving
from test_studio_store import candidates, settings, write

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>"
EVERYTHING = ["compare", "rank", "chat", "arena", "attack", "write"]


@pytest.fixture
def studio(tmp_path):
    plan = settings(group={"modes": EVERYTHING}, limits={"body_kilobytes": 16, "text_characters": 2000, "failures": 3})
    with serving(tmp_path / "studio", plan) as (made, address):
        rows = candidates(8, completions=2, messages=[{"role": "user", "content": SCRIPT}])
        rows = [{**row, "completions": [SCRIPT, f"{SCRIPT} two"]} for row in rows]
        add_file(made.database, write(tmp_path / "stage", rows), "candidates", plan, made.clock())
        made.scan = lambda: 0
        made.policies = {"sft-torch-0": (tmp_path, None), "ppo-torch-1": (tmp_path, None)}
        made.address = address
        yield made


def invitation(studio, role="labeler", group="training", uses=1):
    return studio.database.now(people.invite, role, group, uses, 1.0, studio.clock())


# ----------------------------------------------------------------------------------------------------------- script


def test_script_in_prompts_answers_and_messages_is_shown_as_text(studio):
    client = labeler(studio, studio.address, kind=Browser)
    machine = labeler(studio, studio.address)
    machine.get("/chat")
    pages = [client.get(path) for path in ("/compare", "/write")]
    talk = client.post("/chat").url.path.rpartition("/")[2]
    client.get(f"/chat/{talk}")
    pages.append(client.post(f"/chat/{talk}/say", text=SCRIPT).text)
    message = re.search(r'action="/feedback/([\w-]+)"', pages[-1])[1]
    pages.append(client.post(f"/feedback/{message}", text='"><script>alert(1)</script>').text)
    client.get("/attack")
    pages.append(client.post("/attack", goal=SCRIPT, category="hate").text)
    for page in pages:
        assert "&lt;script&gt;" in page and "<script>alert" not in page and "<img src=x" not in page


def test_script_in_an_address_is_not_reflected(studio):
    client = labeler(studio, studio.address, kind=Browser)
    for path in ("/rank?place=<script>alert(1)</script>", "/lease/<script>alert(1)</script>", "/<script>alert(1)</script>",
                 "/join/<script>alert(1)</script>"):  # fmt: skip
        assert "<script>alert" not in client.get(path)


def test_characters_that_hide_or_reorder_text_are_spelled_out(studio, tmp_path):
    rows = [{**candidates(1)[0], "completions": ["good\u202edab", "ok\x1b[31m"], "id": "hidden"}]
    plan = studio.settings
    studio.database.now(lambda c: c.execute("UPDATE slots SET open = 0"))
    add_file(studio.database, write(tmp_path / "other", rows), "candidates", plan, studio.clock())
    page = labeler(studio, studio.address, kind=Browser).get("/compare")
    assert "\u202e" not in page and "\\u202e" in page and "\x1b" not in page


def test_every_answer_has_a_strict_content_security_policy(studio):
    client = httpx.Client(base_url=studio.address)
    for path in ("/sign-in", "/static/studio.js", "/nothing", "/health", "/compare"):
        policy = client.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
    assert client.get("/sign-in").headers["cache-control"] == "no-store"
    assert client.get("/sign-in").headers["referrer-policy"] == "no-referrer"


# ------------------------------------------------------------------------------------------------------ forged forms


POSTS = ["/sign-out", "/me/remove", "/instructions", "/chat", "/arena", "/attack", "/write/own", "/lease/x", "/lease/x/skip",
         "/operator/close", "/operator/invite", "/operator/person", "/operator/backup", "/sign-in", "/feedback/x"]  # fmt: skip


@pytest.mark.parametrize("path", POSTS)
def test_a_form_without_the_token_of_its_session_does_nothing(studio, path):
    client = operator(studio, studio.address) if "operator" in path else labeler(studio, studio.address)
    other = labeler(studio, studio.address)
    for token in ("", "0" * 64, other.csrf):
        response = client.client.post(path, json={"csrf": token, "sure": "yes", "name": "x", "act": "remove", "person": 1})
        assert response.status_code == 403, path
    assert studio.database.reader.execute("SELECT count(*) FROM people WHERE standing = 'removed'").fetchone()[0] == 0


@pytest.mark.parametrize(
    "header", [{"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}]
)
def test_a_form_from_another_site_is_refused_even_with_the_token(studio, header):
    client = labeler(studio, studio.address)
    response = client.client.post("/sign-out", json={"csrf": client.csrf}, headers=header)
    assert response.status_code == 403 and "another site" in response.json()["error"]


@pytest.mark.parametrize("path", ["/sign-out", "/me/remove", "/operator/close", "/lease/x", "/chat"])
def test_nothing_changes_by_get(studio, path):
    client = labeler(studio, studio.address)
    assert client.client.get(path).status_code in (403, 404, 405) or path == "/chat"
    assert client.get("/me")["status"] == 200


def test_another_host_name_is_refused_so_that_no_site_can_point_its_name_here(studio):
    for host in ("evil.example", "evil.example:8000", "", "localhost.evil.example"):
        assert httpx.get(f"{studio.address}/sign-in", headers={"host": host}).status_code in (400, 421)
    assert httpx.get(f"{studio.address}/sign-in", headers={"host": "LOCALHOST:1"}).status_code == 200


def test_host_names_are_read_without_their_port():
    assert [host_name(each) for each in ("a:1", "A", "[::1]:8", "127.0.0.1:80")] == ["a", "a", "::1", "127.0.0.1"]


# ---------------------------------------------------------------------------------------------------------- sessions


def test_a_session_that_somebody_planted_is_not_the_one_after_signing_in(studio):
    planted = httpx.Client(base_url=studio.address, headers=JSON)
    planted.get("/sign-in")
    cookie = planted.cookies[studio.cookie]
    victim = Machine(studio.address)
    victim.client.cookies.set(studio.cookie, cookie, domain="127.0.0.1")
    token = invitation(studio)
    victim.get(f"/join/{token}")
    victim.post(f"/join/{token}")
    assert victim.client.cookies.get(studio.cookie, domain="127.0.0.1") != cookie
    attacker = Machine(studio.address)
    attacker.client.cookies.set(studio.cookie, cookie)
    assert attacker.get("/me")["status"] == 401


def test_a_cookie_that_we_did_not_sign_is_nobodys(studio):
    client = labeler(studio, studio.address)
    value = client.client.cookies[studio.cookie]
    other = "A" if value[-5] != "A" else "B"  # not the last character, some of whose bits mean nothing
    for forged in (value[:-5] + other + value[-4:], value.partition(".")[0], "", "x.y", "\u00e9".encode().hex()):
        other = httpx.Client(base_url=studio.address, headers=JSON)
        other.cookies.set(studio.cookie, forged)
        assert other.get("/me").status_code == 401


def test_the_cookie_is_not_for_scripts_and_not_for_other_sites(studio):
    header = httpx.get(f"{studio.address}/sign-in").headers["set-cookie"].lower()
    assert "httponly" in header and "samesite=lax" in header and "secure" not in header


def test_behind_https_the_cookie_is_never_sent_without_it(tmp_path):
    with serving(tmp_path / "studio", settings(https=True)) as (_, address):
        headers = httpx.get(f"{address}/sign-in").headers
        assert "secure" in headers["set-cookie"].lower() and headers["set-cookie"].startswith("__Host-studio-")
        assert headers["strict-transport-security"] == "max-age=31536000"


def test_after_signing_out_the_old_cookie_is_worth_nothing(studio):
    client = labeler(studio, studio.address)
    stolen = client.client.cookies[studio.cookie]
    client.post("/sign-out")
    thief = Machine(studio.address)
    thief.client.cookies.set(studio.cookie, stolen)
    assert thief.get("/me")["status"] == 401


def test_a_password_lets_in_again_and_a_wrong_one_does_not_for_long(studio):
    token, client = invitation(studio), Machine(studio.address)
    client.get(f"/join/{token}")
    assert "10 characters" in client.post(f"/join/{token}", name="ada", password="short")["error"]
    pseudonym = client.post(f"/join/{token}", name="ada", password="correct horse")["pseudonym"]
    again = Machine(studio.address)
    again.get("/sign-in")
    assert again.post("/sign-in", name="ada", password="correct horse")["status"] == 200
    assert again.get("/me")["pseudonym"] == pseudonym
    guesser = Machine(studio.address)
    guesser.get("/sign-in")
    errors = [guesser.post("/sign-in", name="ada", password=f"guess {i}")["status"] for i in range(4)]
    assert errors == [401, 401, 401, 429]
    assert guesser.post("/sign-in", name="ada", password="correct horse")["status"] == 429
    stored = studio.database.reader.execute("SELECT password FROM people WHERE name = 'ada'").fetchone()[0]
    assert stored.startswith("$argon2id$")


def test_a_name_that_exists_and_one_that_does_not_are_refused_alike(studio):
    client = Machine(studio.address)
    client.get("/sign-in")
    assert client.post("/sign-in", name="nobody", password="something long")["error"] == "The name or the password is wrong."


def test_looking_at_an_invitation_does_not_use_it_up(studio):
    token = invitation(studio)
    for _ in range(3):
        assert httpx.get(f"{studio.address}/join/{token}").status_code == 200
    client = Machine(studio.address)
    client.get(f"/join/{token}")
    assert client.post(f"/join/{token}")["status"] == 200


def test_the_secret_key_is_for_its_owner_only_and_stays(tmp_path):
    keys = Keys(tmp_path)
    assert stat.S_IMODE((tmp_path / "secret.key").stat().st_mode) == 0o600
    assert Keys(tmp_path).unsign(keys.sign("token")) == "token"
    assert Keys(tmp_path).csrf("token") == keys.csrf("token")


# ---------------------------------------------------------------------------------------------------- other people's


def test_nobody_reads_or_changes_the_work_of_another(studio):
    mine, theirs = labeler(studio, studio.address), labeler(studio, studio.address)
    mine.get("/chat")
    talk = mine.post("/chat")["conversation"]
    message = mine.post(f"/chat/{talk}/say", text="my secret")["answers"][0]["message"]
    duel = mine.post("/arena")["conversation"]
    attack = mine.post("/attack", goal="g", category="hate")["conversation"]
    lease = mine.get("/compare")["lease"]
    own = theirs.post("/chat")["conversation"]
    for path in (f"/chat/{talk}", f"/arena/{duel}", f"/attack/{attack}", f"/lease/{lease}"):
        found = theirs.get(path)
        assert found["status"] == 404 and "my secret" not in json.dumps(found)
    for path, fields in {
        f"/chat/{talk}/say": {"text": "x"}, f"/chat/{talk}/again": {"message": message},
        f"/chat/{own}/again": {"message": message},
        f"/chat/{own}/branch": {"message": message}, f"/feedback/{message}": {"thumb": 1}, f"/arena/{duel}/vote": {"choice": 0},
        f"/attack/{attack}/finish": {"success": 4}, f"/lease/{lease}": {"choice": 0}, f"/lease/{lease}/skip": {},
        f"/lease/{lease}/judge": {"place": 0, "rating": 1},
    }.items():  # fmt: skip
        assert theirs.post(path, **fields)["status"] == 404, path


@pytest.mark.parametrize("path", ["/operator", "/operator/live", "/operator/audit.jsonl", "/operator/settings"])
def test_the_operators_pages_are_the_operators(studio, path):
    assert labeler(studio, studio.address).client.get(path).status_code == 403
    assert httpx.get(f"{studio.address}{path}", headers=JSON).status_code == 401


def test_a_labeler_does_nothing_that_is_the_operators(studio):
    client = labeler(studio, studio.address)
    for path in ("close", "invite", "check", "decide", "person", "scan", "backup"):
        assert client.post(f"/operator/{path}", name="x", group="operators", uses=1, hours=1)["status"] == 403


def test_before_the_instructions_are_agreed_to_there_is_no_task(studio):
    client = labeler(studio, studio.address, agreed=False)
    refused = client.get("/compare")
    assert refused["status"] == 403 and refused["next"] == "/instructions"
    assert studio.database.reader.execute("SELECT count(*) FROM leases").fetchone()[0] == 0


def test_a_mode_that_the_group_does_not_have_is_refused(tmp_path):
    with serving(tmp_path / "studio", settings(group={"modes": ["rank"]})) as (studio, address):
        studio.scan = lambda: 0
        client = labeler(studio, address)
        assert client.get("/compare")["status"] == 403 and client.get("/rank")["status"] == 200
        assert client.post("/arena")["status"] == 403


# ------------------------------------------------------------------------------------------------------ strange input


def test_sql_in_every_field_is_only_text(studio):
    evil = "'; DROP TABLE labels; --"
    client = labeler(studio, studio.address)
    client.get("/attack")
    client.post("/attack", goal=evil, category="hate")
    client.get(f"/lease/{evil}")
    client.post("/sign-in", name=evil, password=evil)
    client.post(f"/feedback/{evil}", thumb=1)
    operator(studio, studio.address).post("/operator/invite", group=evil, uses=1, hours=1)
    assert studio.database.reader.execute("SELECT goal FROM conversations").fetchone()[0] == evil
    assert studio.database.reader.execute("SELECT count(*) FROM labels").fetchone()[0] == 0


OUTSIDE = [
    "/static/../studio.py", "/static/%2e%2e/studio.py", "/static/..%2fsettings.py", "/static//etc/passwd",
    "/static/....//studio.py",
]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE)
def test_no_file_outside_of_static_is_served(studio, path):
    host, port = studio.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        response = b"".join(iter(lambda: connection.recv(65536), b""))
    assert response.startswith(b"HTTP/1.1 404") and b"import" not in response


def test_a_body_that_is_too_large_is_refused_with_or_without_its_length(studio):
    client = labeler(studio, studio.address)
    large = json.dumps({"csrf": client.csrf, "text": "x" * 20_000})
    assert client.client.post("/chat", content=large).status_code == 413
    assert client.client.post("/chat", content=iter([large.encode()])).status_code == 413


def test_a_text_that_is_too_long_says_how_long_it_may_be(studio):
    client = labeler(studio, studio.address)
    own = client.get("/write/own")
    refused = client.post("/write/own", prompt="x" * 2001, response="y", once=own["once"])
    assert refused["status"] == 413 and "prompt has 2001 characters. It may have 2000." in refused["error"]


@pytest.mark.parametrize(
    "body",
    [b"[1, 2]", b"{", b"\xff\xfe", b'{"csrf": {"a": 1}}', b"[" * 10_000, b'{"csrf": "\\ud800"}', b"null", b'{"csrf": null}'],
)
def test_a_body_that_is_no_object_is_refused(studio, body):
    client = labeler(studio, studio.address)
    response = client.client.post("/chat", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 403)


@pytest.mark.parametrize("text", ["\0", "a\0b", "\ud800"])
def test_text_that_no_file_can_hold_is_refused(studio, text):
    client = labeler(studio, studio.address)
    client.get("/chat")
    talk = client.post("/chat")["conversation"]
    response = client.client.post(
        f"/chat/{talk}/say", content=json.dumps({"csrf": client.csrf, "text": text}), headers={"content-type": "application/json"}
    )
    assert response.status_code == 400


def test_whoever_is_too_fast_has_to_wait(tmp_path):
    with serving(tmp_path / "studio", settings(limits={"requests_per_minute": 20})) as (studio, address):
        client = labeler(studio, address)
        statuses = [client.client.get("/me").status_code for _ in range(30)]
        assert statuses[0] == 200 and statuses[-1] == 429
        assert labeler(studio, address, agreed=False).get("/me")["status"] in (200, 429)


def test_a_bucket_refills_with_time():
    now = [0.0]
    rates = Rates(60, lambda: now[0])
    assert [rates.wait("a") for _ in range(60)] == [0.0] * 60 and rates.wait("a") == pytest.approx(1.0)
    assert rates.wait("b") == 0.0
    now[0] = 2.0
    assert [rates.wait("a") > 0 for _ in range(3)] == [False, False, True]


def test_answers_per_minute_are_limited(tmp_path):
    plan = settings(limits={"answers_per_minute": 2})
    with serving(tmp_path / "studio", plan) as (studio, address):
        studio.scan = lambda: 0
        studio.policies = {"sft": (tmp_path, None)}
        client = labeler(studio, address)
        client.get("/chat")
        talk = client.post("/chat")["conversation"]
        assert [client.post(f"/chat/{talk}/say", text="hi")["status"] for _ in range(3)] == [200, 200, 429]


def test_a_slow_sender_does_not_stop_the_others(studio):
    host, port = studio.address.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(50)]
    for connection in slow:
        connection.sendall(b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx")
    assert httpx.get(f"{studio.address}/sign-in", timeout=visit.BODY_SECONDS / 2).status_code == 200
    for connection in slow:
        connection.close()


def test_passwords_are_checked_beside_other_requests(studio):
    """A page comes while twelve checks are under way, each of which takes tens of milliseconds, or here as long as it must."""
    begun, done, check = threading.Event(), threading.Event(), studio.passwords._check
    studio.passwords._check = lambda *arguments: begun.set() or (done.wait(60) and check(*arguments))
    client = Machine(studio.address)
    client.get("/sign-in")
    threads = [
        threading.Thread(target=lambda i=i: httpx.post(
            f"{studio.address}/sign-in", json={"csrf": client.csrf, "name": f"n{i}", "password": "p" * 12},
            cookies=dict(client.client.cookies), headers=JSON, timeout=30,
        )) for i in range(12)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    assert httpx.get(f"{studio.address}/health", timeout=30).status_code == 200 and all(thread.is_alive() for thread in threads)
    done.set()
    for thread in threads:
        thread.join()


# --------------------------------------------------------------------------------------- other sites, addresses, proxies


def test_a_form_of_another_site_does_not_replace_the_visitors_cookie(studio):
    """Browsers send it without the cookie, and would take the one in the answer."""
    headers = {"origin": "https://evil.example", "sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}
    for path in ("/sign-in", "/sign-out", "/me/remove"):
        response = httpx.post(f"{studio.address}{path}", data={"x": "1"}, headers=headers)
        assert response.status_code == 403 and "set-cookie" not in response.headers


def test_another_site_loads_no_page_into_itself_and_sets_no_cookie(studio):
    client = labeler(studio, studio.address)
    for site, purpose in (("cross-site", "image"), ("cross-site", "iframe"), ("same-site", "script")):
        headers = {"sec-fetch-site": site, "sec-fetch-dest": purpose}
        response = httpx.get(f"{studio.address}/sign-in", headers=headers)
        assert response.status_code == 403 and "set-cookie" not in response.headers
        assert client.client.get("/me", headers=headers).status_code == 403
    link = {"sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}
    assert client.client.get("/me", headers=link).status_code == 200


def test_wrong_invitations_lock_nobody_out(studio):
    good = invitation(studio)
    for i in range(40):  # with failures=3, an address had 30
        assert httpx.get(f"{studio.address}/join/x{i}").status_code == 404
    client = Machine(studio.address)
    client.get(f"/join/{good}")
    assert client.post(f"/join/{good}", name="ada", password="correct horse")["status"] == 200
    again = Machine(studio.address)
    again.get("/sign-in")
    assert again.post("/sign-in", name="ada", password="correct horse")["status"] == 200


def test_a_good_invitation_is_let_in_however_fast_its_address_is(tmp_path):
    with serving(tmp_path / "studio", settings(limits={"requests_per_minute": 10})) as (studio, address):
        while httpx.get(f"{address}/sign-in").status_code == 200:
            pass
        client = Machine(address)
        token = invitation(studio)
        assert client.get(f"/join/{token}")["status"] == 200 and client.post(f"/join/{token}")["status"] == 200
        assert httpx.get(f"{address}/sign-in").status_code == 429


def test_a_proxy_is_believed_only_if_the_settings_name_it(tmp_path):
    for proxies, expected in (([], 429), (["127.0.0.0/8"], 200)):
        plan = settings(limits={"requests_per_minute": 10}, proxies=proxies)
        with serving(tmp_path / f"studio{expected}", plan) as (_, address):
            for i in range(12):
                response = httpx.get(f"{address}/sign-in", headers={"x-forwarded-for": f"198.51.100.{i}"})
            assert response.status_code == expected
    with pytest.raises(ConfigError, match="proxies: 'nginx' is no address"):
        settings(proxies=["nginx"])


def test_passwords_that_are_tried_at_once_are_no_more_than_the_limit(studio):
    token, client = invitation(studio), Machine(studio.address)
    client.get(f"/join/{token}")
    client.post(f"/join/{token}", name="ada", password="correct horse")
    guesser = Machine(studio.address)
    guesser.get("/sign-in")

    def guess(i):
        fields = {"csrf": guesser.csrf, "name": "ada", "password": f"guess number {i}"}
        return httpx.post(f"{studio.address}/sign-in", json=fields, cookies=dict(guesser.client.cookies), timeout=30).status_code

    with ThreadPoolExecutor(12) as pool:
        statuses = list(pool.map(guess, range(12)))
    assert statuses.count(401) == 3 and statuses.count(429) == 9


def test_one_address_does_not_lock_a_name_for_the_others_and_no_name_is_stored(tmp_path):
    plan = settings(limits={"failures": 3}, proxies=["127.0.0.1"])
    with serving(tmp_path / "studio", plan) as (studio, address):
        token, client = invitation(studio), Machine(address)
        client.get(f"/join/{token}")
        client.post(f"/join/{token}", name="ada", password="correct horse")
        guesser = Machine(address)
        guesser.client.headers["x-forwarded-for"] = "198.51.100.1"
        guesser.get("/sign-in")
        assert [guesser.post("/sign-in", name="ada", password=f"guess {i}")["status"] for i in range(4)][-1] == 429
        guesser.post("/sign-in", name="my password", password="by mistake")
        owner = Machine(address)
        owner.get("/sign-in")
        assert owner.post("/sign-in", name="ada", password="correct horse")["status"] == 200
        stored = [row["who"] for row in studio.database.reader.execute("SELECT who FROM failures")]
        assert stored and not any("ada" in who or "my password" in who for who in stored)


def test_failures_of_the_future_do_not_count():
    """The clock was set back."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.row_factory = sqlite3.Row
        connection.execute("CREATE TABLE failures (id INTEGER PRIMARY KEY, who TEXT NOT NULL, at REAL NOT NULL)")
        people.attempt(connection, {"ada": 1}, 5000.0)
        assert people.attempt(connection, {"ada": 1}, 1000.0)
        with pytest.raises(people.Refused):
            people.attempt(connection, {"ada": 1}, 1001.0)


# ------------------------------------------------------------------------------------------------- requests that take time


def held_back(studio, client, path, **fields):
    """A request of which the last bytes are missing; the function sends them and returns the status."""
    body = json.dumps({"csrf": client.csrf, **fields}).encode()
    cookies = "; ".join(f"{name}={value}" for name, value in client.client.cookies.items())
    host, port = studio.address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\nContent-Type: application/json\r\n"
        f"Cookie: {cookies}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        + body[:1]
    )
    time.sleep(0.2)

    def finish() -> int:
        with connection:
            connection.sendall(body[1:])
            return int(b"".join(iter(lambda: connection.recv(65536), b"")).split(b" ")[1])

    return finish


def test_rights_are_those_at_the_end_of_a_request(studio):
    client, boss = labeler(studio, studio.address), operator(studio, studio.address)
    lease = client.get("/compare")["lease"]
    vote = held_back(studio, client, f"/lease/{lease}", choice=0)
    own = held_back(studio, client, "/write/own", prompt="p", response="AFTERWARDS", once=client.get("/write/own")["once"])
    (person,) = boss.get("/operator")["people"]
    boss.post("/operator/person", person=person["id"], act="pause")
    assert vote() == 403
    boss.post("/operator/person", person=person["id"], act="remove")
    assert own() in (401, 403)
    assert studio.database.reader.execute("SELECT count(*) FROM labels").fetchone()[0] == 0


def test_an_invitation_that_expires_while_it_is_accepted_is_refused(studio):
    token, client = invitation(studio, "operator", people.OPERATORS), Machine(studio.address)
    client.get(f"/join/{token}")
    finish, real = held_back(studio, client, f"/join/{token}"), studio.clock
    studio.clock = lambda: real() + 30 * 86400
    assert finish() == 404


def test_what_is_stored_is_checked_with_the_standing_of_that_moment(studio):
    """Between the check of a request and the transaction somebody may be paused."""
    client = labeler(studio, studio.address)
    client.get("/chat")
    talk = client.post("/chat")["conversation"]
    answer = client.post(f"/chat/{talk}/say", text="hi")["answers"][0]["message"]
    lease, duel = client.get("/compare")["lease"], client.post("/arena")["conversation"]
    client.post(f"/arena/{duel}/say", text="hi")
    own = client.get("/write/own")["once"]
    studio.database.now(lambda connection: connection.execute("UPDATE people SET standing = 'paused'"))
    real = people.person_of
    people.person_of = lambda *arguments: replace(real(*arguments), standing="active")
    try:
        for path, fields in {
            f"/lease/{lease}": {"choice": 0}, "/chat": {}, f"/chat/{talk}/say": {"text": "more"}, "/arena": {},
            f"/arena/{duel}/vote": {"choice": 0}, "/attack": {"goal": "g", "category": "hate"},
            f"/feedback/{answer}": {"thumb": 1}, "/write/own": {"prompt": "p", "response": "r", "once": own},
        }.items():  # fmt: skip
            assert client.post(path, **fields)["status"] == 403, path
        assert client.get("/write")["status"] == 403
    finally:
        people.person_of = real


def test_a_body_that_does_not_arrive_is_refused(studio, monkeypatch):
    client = labeler(studio, studio.address)
    monkeypatch.setattr("lockstep_studio.pages.visit.BODY_SECONDS", 0.3)
    finish = held_back(studio, client, "/chat")
    time.sleep(2)
    assert finish() == 408


# ---------------------------------------------------------------------------------------------- before it is a request


def opened(studio, data: bytes) -> socket.socket:
    host, port = studio.address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(data)
    return connection


def is_closed(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def ends(connection: socket.socket) -> bool:
    """Whether the server closes, after whatever it has to say."""
    connection.settimeout(60)
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


@pytest.fixture
def patient(monkeypatch):
    """The server closes nothing because it takes long."""
    monkeypatch.setattr("lockstep_studio.protocol.HEADER_SECONDS", 600.0)
    monkeypatch.setattr("lockstep_studio.pages.visit.BODY_SECONDS", 600.0)


@pytest.mark.parametrize(
    ("beginning", "more"),
    [
        (b"", b"a: b\r\n" * 20_000),
        (b"x: ", b"a" * 120_000),
        (b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n", b"a: b\r\n" * 40_000),
        (b"Transfer-Encoding: chunked\r\n\r\n1;", b"a" * 240_000),
    ],
)
def test_headers_and_what_looks_like_them_are_bounded(studio, beginning, more, patient):
    connection = opened(studio, b"POST /chat HTTP/1.1\r\nHost: localhost\r\n" + beginning)
    with connection:
        with contextlib.suppress(OSError):
            for start in range(0, len(more), 10_000):
                connection.sendall(more[start : start + 10_000])
                time.sleep(0.005)
        assert ends(connection)
    assert httpx.get(f"{studio.address}/health").status_code == 200
    with opened(studio, b"") as other:
        assert not is_closed(other, 0.2)


def test_whoever_sends_no_headers_is_cut_off_and_who_is_answered_slowly_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr("lockstep_studio.protocol.HEADER_SECONDS", 1.0)
    slow = settings(chat={"allowed": ["policy"]})
    with serving(tmp_path / "studio", slow, opened=lambda policy: Echo(policy, 0.3)) as (studio, address):
        studio.address, studio.scan, studio.policies = address, lambda: 0, {"sft": (tmp_path, None)}
        idle = opened(studio, b"")
        half = opened(studio, b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        lines = opened(studio, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert lines.recv(65536).startswith(b"HTTP/1.1 200")
        lines.sendall(b"\r\n")
        assert is_closed(idle, 60) and is_closed(half, 60)
        assert is_closed(lines, 60)
        client = labeler(studio, address)
        client.get("/chat")
        talk = client.post("/chat")["conversation"]
        assert client.post(f"/chat/{talk}/say", text="one two three four")["answers"][0]["state"] == "done"


def test_a_large_body_in_one_piece_is_no_large_header(tmp_path):
    with serving(tmp_path / "studio", settings()) as (studio, address):
        client = labeler(studio, address)
        large = json.dumps({"csrf": client.csrf, "other": "x" * 200_000})
        client.client.headers["content-type"] = "application/json"
        for _ in range(2):
            assert client.client.post("/write/own", content=large).status_code == 400  # no prompt


def healthy(address: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{address}/health").status_code == 200
    return False


def test_one_address_has_so_many_connections_and_proxies_have_more(tmp_path, patient):
    for proxies, closed in (([], True), (["127.0.0.1"], False)):
        plan = settings(limits={"connections": 10}, proxies=proxies)
        with serving(tmp_path / f"studio{closed}", plan) as (studio, address):
            studio.address = address
            many = [opened(studio, b"") for _ in range(10)]
            with opened(studio, b"") as another:
                assert is_closed(another, 60 if closed else 1) == closed
            for connection in many:
                connection.close()
            until = time.monotonic() + 60
            while not healthy(address) and time.monotonic() < until:
                time.sleep(0.05)
            assert healthy(address)


# ------------------------------------------------------------------------------------------------------ hosts, names, keys


def test_a_host_header_has_no_say_in_the_mode(studio):
    for host in ("localhost:/x", "localhost:8000/x", "localhost:?", "localhost:#", "[::1]/x", "localhost:80:80", "a@localhost"):
        assert host_name(host) == "" and httpx.get(f"{studio.address}/sign-in", headers={"host": host}).status_code == 421


def test_the_mode_is_that_of_the_route_whatever_the_address_says(tmp_path):
    """Starlette 0.46 reads request.url from the Host header."""
    with serving(tmp_path / "studio", settings(group={"modes": ["rank"]})) as (studio, address):
        studio.scan = lambda: 0
        real = starlette.requests.HTTPConnection.url
        starlette.requests.HTTPConnection.url = property(lambda self: URL("http://localhost/x/arena"))
        try:
            assert labeler(studio, address).post("/arena")["status"] == 403
        finally:
            starlette.requests.HTTPConnection.url = real


def test_two_host_headers_are_refused(studio):
    with opened(
        studio, b"GET /sign-in HTTP/1.1\r\nHost: evil.example\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    ) as connection:
        assert connection.recv(65536).split(b" ")[1] in (b"400", b"421")


@pytest.mark.parametrize("origin", ["http://[", "http://]x"])
def test_an_origin_that_is_none_is_refused(studio, origin):
    client = labeler(studio, studio.address)
    assert client.client.post("/sign-out", json={"csrf": client.csrf}, headers={"origin": origin}).status_code == 403


def test_behind_https_invitations_are_https(tmp_path):
    with serving(tmp_path / "studio", settings(https=True, hosts=["studio.example.org"])) as (studio, address):
        client = operator(studio, address, SecureMachine)
        client.get("/operator")
        link = client.post("/operator/invite", group="training", uses=1, hours=1)["link"]
        assert link.startswith("https://127.0.0.1:")


class SecureMachine(Machine):
    """Sends secure cookies without HTTPS, as behind a proxy."""

    def _read(self, response):
        for name, value in response.cookies.items():
            self.client.headers["cookie"] = f"{name}={value}"
        self.client.cookies.clear()
        return super()._read(response)


@pytest.mark.parametrize("name", ["operators", "Operators", " operators "])
def test_no_group_of_labelers_is_named_like_the_operators(name):
    with pytest.raises(ConfigError, match="means the operators"):
        parse(StudioConfig, {"groups": {name: {}}}, "")


def test_members_of_a_group_that_is_gone_may_do_nothing_but_leave(tmp_path):
    def plan(*names):
        return parse(StudioConfig, {"groups": {name: {"modes": ["adjudicate"]} for name in names}}, "")

    with serving(tmp_path / "studio", plan("a", "b")) as (studio, address):
        cookies = dict(labeler(studio, address, "a").client.cookies)
    with serving(tmp_path / "studio", plan("b")) as (studio, address):
        studio.scan, studio.policies = lambda: 0, {"sft": (tmp_path, None)}
        client = Machine(address)
        client.client.cookies.update(cookies)
        assert client.get("/")["status"] == 403
        assert client.post("/chat")["status"] == 403 and client.post("/arena")["status"] == 403
        client.client.headers["accept"] = "text/html"
        page = client.client.get("/me")
        assert page.status_code == 200 and "Remove all my work" in page.text
        assert "not part of this studio" in client.client.get("/compare").text


def test_two_studios_on_one_host_do_not_take_each_others_cookies(tmp_path):
    with serving(tmp_path / "one", settings()) as (one, first), serving(tmp_path / "two", settings()) as (two, second):
        client = labeler(one, first).client
        client.get(f"{second}/sign-in")  # the same host, so the same jar
        assert one.cookie != two.cookie and {*client.cookies} == {one.cookie, two.cookie}
        assert client.get("/me").status_code == 200


def test_a_key_that_is_too_short_is_refused_and_a_half_made_one_is_made_again(tmp_path):
    (tmp_path / ".secret.key.part").write_bytes(b"half")
    Keys(tmp_path)
    assert len((tmp_path / "secret.key").read_bytes()) == 32 and not (tmp_path / ".secret.key.part").exists()
    (tmp_path / "secret.key").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has 0 bytes, too few for a key"):
        Keys(tmp_path)


# --------------------------------------------------------------------------------------------------- ends of sessions


def test_signing_in_again_ends_the_session_before(studio):
    token, client = invitation(studio), Machine(studio.address)
    client.get(f"/join/{token}")
    client.post(f"/join/{token}", name="ada", password="correct horse")
    before = client.client.cookies[studio.cookie]
    client.post("/sign-in", name="ada", password="correct horse")
    assert client.get("/me")["status"] == 200 and client.client.cookies[studio.cookie] != before
    thief = Machine(studio.address)
    thief.client.cookies.set(studio.cookie, before)
    assert thief.get("/me")["status"] == 401


def test_signing_out_everywhere_ends_all_sessions_of_one_person(studio):
    token, other = invitation(studio), labeler(studio, studio.address)
    machines = [Machine(studio.address) for _ in range(2)]
    machines[0].get(f"/join/{token}")
    machines[0].post(f"/join/{token}", name="ada", password="correct horse")
    machines[1].get("/sign-in")
    machines[1].post("/sign-in", name="ada", password="correct horse")
    machines[1].post("/me/sign-out-everywhere")
    assert [machine.get("/me")["status"] for machine in (*machines, other)] == [401, 401, 200]


def test_a_session_ends_after_half_a_year_however_it_is_used(studio):
    client, day, real = labeler(studio, studio.address), 86400, studio.clock
    for days in range(7, 190, 7):
        studio.clock = lambda days=days: real() + days * day
        status = client.get("/me")["status"]
        assert status == (200 if days < 180 else 401), days


def test_an_invitation_and_an_operator_can_be_revoked(studio):
    boss, second = operator(studio, studio.address), operator(studio, studio.address)
    boss.get("/operator")
    link = boss.post("/operator/invite", group="training", uses=5, hours=1)["link"]
    data = boss.get("/operator")
    assert [(each["group"], each["uses"]) for each in data["invitations"]] == [("training", 5)]
    assert link.rpartition("/")[2] not in json.dumps(data)
    assert boss.post("/operator/revoke", invitation=data["invitations"][0]["id"])["status"] == 200
    assert httpx.get(f"{studio.address}/join/{link.rpartition('/')[2]}").status_code == 404
    mine, theirs = (each["id"] for each in data["operators"])
    assert boss.post("/operator/revoke", operator=mine)["status"] == 400
    boss.post("/operator/revoke", operator=theirs)
    assert second.get("/operator")["status"] == 401 and boss.get("/operator")["status"] == 200
    assert labeler(studio, studio.address).post("/operator/revoke", operator=mine)["status"] == 403
