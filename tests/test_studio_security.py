"""Attacks on the studio: script, forged forms, fixed sessions, other people's work, large and strange input."""

from __future__ import annotations

import json
import re
import socket
import stat
import threading
import time

import httpx
import pytest

from lockstep_studio.security import Keys, Rates, host_name
from lockstep_studio.sources import add_file
from lockstep_studio.store import people
from studio_server import JSON, Browser, Machine, labeler, operator, serving
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
    cookie = planted.cookies["studio"]
    victim = Machine(studio.address)
    victim.client.cookies.set("studio", cookie, domain="127.0.0.1")
    token = invitation(studio)
    victim.get(f"/join/{token}")
    victim.post(f"/join/{token}")
    assert victim.client.cookies.get("studio", domain="127.0.0.1") != cookie
    attacker = Machine(studio.address)
    attacker.client.cookies.set("studio", cookie)
    assert attacker.get("/me")["status"] == 401


def test_a_cookie_that_we_did_not_sign_is_nobodys(studio):
    client = labeler(studio, studio.address)
    value = client.client.cookies["studio"]
    other = "A" if value[-5] != "A" else "B"  # not the last character, some of whose bits mean nothing
    for forged in (value[:-5] + other + value[-4:], value.partition(".")[0], "", "x.y", "\u00e9".encode().hex()):
        other = httpx.Client(base_url=studio.address, headers=JSON)
        other.cookies.set("studio", forged)
        assert other.get("/me").status_code == 401


def test_the_cookie_is_not_for_scripts_and_not_for_other_sites(studio):
    header = httpx.get(f"{studio.address}/sign-in").headers["set-cookie"].lower()
    assert "httponly" in header and "samesite=lax" in header and "secure" not in header


def test_behind_https_the_cookie_is_never_sent_without_it(tmp_path):
    with serving(tmp_path / "studio", settings(https=True)) as (_, address):
        assert "secure" in httpx.get(f"{address}/sign-in").headers["set-cookie"].lower()


def test_after_signing_out_the_old_cookie_is_worth_nothing(studio):
    client = labeler(studio, studio.address)
    stolen = client.client.cookies["studio"]
    client.post("/sign-out")
    thief = Machine(studio.address)
    thief.client.cookies.set("studio", stolen)
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
    began = time.perf_counter()
    assert httpx.get(f"{studio.address}/sign-in").status_code == 200
    assert time.perf_counter() - began < 2
    for connection in slow:
        connection.close()


def test_passwords_are_checked_beside_other_requests(studio):
    """Twelve checks, each tens of milliseconds; a page takes no longer for it."""
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
    waits = []
    for _ in range(5):
        began = time.perf_counter()
        httpx.get(f"{studio.address}/health")
        waits.append(time.perf_counter() - began)
    for thread in threads:
        thread.join()
    assert sorted(waits)[2] < 0.5
