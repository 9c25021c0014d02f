"""The reward model `endpoint` against servers on loopback that answer, refuse, break off, hang and lie."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import gzip
import importlib.util
import itertools
import json
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lockstep.config.schema import parse
from lockstep.errors import ConfigError, RewardError
from lockstep.interfaces import Responses
from lockstep.types import Message, Prompt
from lockstep_rlhf.reward_models import endpoint as module
from lockstep_rlhf.reward_models import server as http
from lockstep_rlhf.reward_models.endpoint import Endpoint

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "reward_server.py"
THREE = Responses([Prompt.of("w1"), Prompt.of("w2"), Prompt.of("w3")], ["a", "bb", "ccc"], None, None)


class Server:
    """Answers each request with the next of ``answers`` and goes on with the last: (status, headers, body), or what a
    function of the request makes. ``asked`` are the requests, (headers, JSON); ``paths`` where they went."""

    def __init__(self, *answers):
        self.answers, self.asked, self.paths = list(answers), [], set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((dict(self.headers), body))
                outer.paths.add(self.path)
                answer = outer.answers[min(len(outer.asked), len(outer.answers)) - 1]
                status, headers, content = answer(body) if callable(answer) else answer
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


def scores(*values):
    return 200, {}, json.dumps({"scores": list(values)}).encode()


def lengths(body):
    return scores(*map(len, body["responses"]))


class Raw:
    """A server below HTTP: to each connection it sends the pieces, ``pause`` seconds apart, until there are no more or the client
    hangs up. ``sent`` counts bytes; ``closed`` is set once a client has hung up."""

    def __init__(self, pieces, pause=0.0):
        self.pieces, self.pause, self.sent, self.closed = pieces, pause, 0, threading.Event()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/score"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                try:
                    for piece in self.pieces():
                        connection.sendall(piece)
                        self.sent += len(piece)
                        time.sleep(self.pause)
                except OSError:
                    self.closed.set()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"


@pytest.fixture
def raw(monkeypatch):
    """raw(pieces, pause=0, **settings): such a server, and the reward model that asks it."""
    servers = []
    monkeypatch.setattr("lockstep_rlhf.reward_models.outside.time", SimpleNamespace(sleep=lambda seconds: None))

    def start(pieces, pause=0.0, **settings):
        servers.append(Raw(pieces, pause))
        return servers[-1], ask(servers[-1].url, **{"retries": 1, **settings})

    yield start
    for server in servers:
        server.socket.close()


@pytest.fixture
def serve(monkeypatch):
    """serve(answer, ...): a server, and the reward model that asks it; waits between attempts are recorded, not waited."""
    servers, waited = [], []
    monkeypatch.setattr("lockstep_rlhf.reward_models.outside.time", SimpleNamespace(sleep=waited.append))

    def start(*answers, **settings):
        server = Server(*answers)
        server.waited = waited
        servers.append(server)
        return server, ask(server.url, **settings)

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


def ask(url, **settings) -> Endpoint:
    values = {"token_variable": None, "batch_size": 64, "timeout_seconds": 5.0, "retries": 2, "backoff_seconds": 1.0}
    return Endpoint(parse(Endpoint.Config, {"url": url, "on_failure": "raise", **values, **settings}, "reward_model"), None)


def test_a_server_gets_dialogues_and_responses_and_its_numbers_come_back_as_float32(serve):
    server, model = serve(scores(0.73, -2, 0))
    prompt = Prompt((Message("system", "be kind"), Message("user", "w1")))
    found = model.score(Responses([prompt, *THREE.prompts[1:]], THREE.texts, None, None))
    assert server.asked[0][1] == {
        "prompts": [
            [{"role": "system", "content": "be kind"}, {"role": "user", "content": "w1"}],
            [{"role": "user", "content": "w2"}],
            [{"role": "user", "content": "w3"}],
        ],
        "responses": ["a", "bb", "ccc"],
    }
    assert found.dtype == np.float32 and found.tolist() == [pytest.approx(0.73), -2, 0]


def test_a_server_gets_the_columns_of_the_prompts_where_there_are_any(serve):
    server, model = serve(lengths, batch_size=1)
    model.score(Responses([Prompt.of("w1", answer=("a", 1)), Prompt.of("w2", tests=None)], ["a", "bb"], None, None))
    assert [body["columns"] for _, body in server.asked] == [
        {"answer": [["a", 1]], "tests": [None]},
        {"answer": [None], "tests": [None]},
    ]
    model.score(THREE)
    assert "columns" not in server.asked[-1][1]
    with pytest.raises(RewardError, match="The columns of the prompts are no JSON"):
        model.score(Responses([Prompt.of("w1", day=object())], ["a"], None, None))


def test_responses_are_asked_in_batches_and_keep_their_order(serve):
    server, model = serve(lengths, batch_size=2)
    assert model.score(THREE).tolist() == [1, 2, 3]
    assert [body["responses"] for _, body in server.asked] == [["a", "bb"], ["ccc"]]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_that_is_busy_or_broken_is_asked_again(serve, status):
    server, model = serve((status, {}, b"later"), lengths)
    assert model.score(THREE).tolist() == [1, 2, 3] and len(server.asked) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_not_asked_again_and_its_text_is_told(serve, status):
    server, model = serve((status, {}, b"no such thing"), lengths)
    with pytest.raises(RewardError, match=rf"127.0.0.1:\d+/score: it answered {status} .*: no such thing"):
        model.score(THREE)
    assert len(server.asked) == 1


def test_waits_double_with_jitter_and_end_at_a_minute(serve):
    server, model = serve((503, {}, b""), retries=8)
    with pytest.raises(RewardError, match="it answered 503"):
        model.score(THREE)
    assert len(server.asked) == 9 and len(server.waited) == 8
    for wait, full in zip(server.waited, [1, 2, 4, 8, 16, 32, 60, 60], strict=True):
        assert full / 2 <= wait <= full
    assert len({wait / full for wait, full in zip(server.waited, [1, 2, 4, 8, 16, 32, 60, 60], strict=True)}) > 1


def test_a_retry_after_in_seconds_or_as_a_date_is_waited_for(serve):
    date = email.utils.formatdate(time.time() + 120, usegmt=True)
    server, model = serve((503, {"Retry-After": "70"}, b""), (429, {"Retry-After": date}, b""), lengths)
    model.score(THREE)
    assert server.waited[0] == 70 and server.waited[1] == pytest.approx(120, abs=5)


def test_a_server_that_wants_to_be_left_alone_for_an_hour_is_a_failure(serve):
    server, model = serve((503, {"Retry-After": "3600"}, b"maintenance"), lengths)
    with pytest.raises(RewardError, match="retry after 3600 seconds: maintenance"):
        model.score(THREE)
    assert len(server.asked) == 1 and server.waited == []


def test_a_server_that_hangs_is_an_error_not_a_zero(serve):
    done = threading.Event()
    server, model = serve(lambda body: done.wait() and lengths(body), timeout_seconds=0.5, retries=1)
    with pytest.raises(RewardError, match="reward_model.timeout_seconds=0.5|no connection: TimeoutError"):
        model.score(THREE)
    done.set()
    assert len(server.asked) == 2


def test_no_server_is_an_error_after_all_attempts(serve):
    server, model = serve(lengths)
    server.server.server_close()
    with pytest.raises(RewardError, match="no connection: .*Connection"):
        model.score(THREE)
    assert len(server.waited) == 2


def test_an_answer_that_breaks_off_is_asked_for_again(serve):
    server, model = serve((200, {"Content-Length": "1000"}, b'{"scores": [1, 2'), lengths)
    assert model.score(THREE).tolist() == [1, 2, 3] and len(server.asked) == 2


# ------------------------------------------------------------------------------------------------------------ bounds


def test_an_endless_answer_is_cut_off_and_not_asked_for_again(raw):
    server, model = raw(lambda: itertools.chain([HEAD], itertools.repeat(b'{"scores": [' + 2**16 * b" ")))
    with pytest.raises(RewardError, match=f"its answer is longer than {2**20 + 3 * 2**10} bytes"):
        model.score(THREE)
    assert server.closed.wait(20) and server.sent < 50e6  # what the system's buffers hold


def test_an_endless_refusal_is_cut_off_and_told(raw):
    head = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    server, model = raw(lambda: itertools.chain([head], itertools.repeat(b"no! " * 2**14)))
    with pytest.raises(RewardError, match=r"it answered 400 Bad Request: no! no! .{0,200}\.\.\."):
        model.score(THREE)
    assert server.closed.wait(20)


@pytest.mark.parametrize(
    "pieces",
    [
        lambda: itertools.chain([HEAD], itertools.repeat(b" ")),
        lambda: itertools.chain([HEAD[:-2]], (b"X-%d: 1\r\n" % i for i in itertools.count())),
        lambda: itertools.chain([HEAD[:-2], b"X: "], itertools.repeat(b"1")),
        lambda: itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"),
        lambda: (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"[i:][:1] for i in itertools.count()),
        lambda: itertools.chain([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"], itertools.repeat(b"1\r\n \r\n")),
    ],
    ids=["body", "headers", "a header", "continue", "silence", "chunks"],
)
def test_a_server_that_drips_is_out_of_time_although_no_single_read_is_and_is_hung_up_on(raw, pieces):
    server, model = raw(pieces, 0.01, timeout_seconds=0.1)
    started = time.perf_counter()
    with pytest.raises(RewardError, match="no answer within reward_model.timeout_seconds=0.1"):
        model.score(THREE)
    assert server.closed.wait(20) and time.perf_counter() - started < 20
    assert model.calls._last.finished(20)


def test_endless_headers_are_an_error_before_memory_is_full(raw):
    server, model = raw(lambda: itertools.chain([HEAD[:-2]], itertools.repeat(b"X: " + 2**14 * b"1" + b"\r\n")))
    with pytest.raises(RewardError, match="no connection: RemoteProtocolError"):
        model.score(THREE)
    assert server.closed.wait(20)


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "deflate", "GZIP, gzip"])
def test_a_compressed_answer_is_not_unpacked(serve, encoding):
    bomb = gzip.compress(b'{"scores": [1, 2, 3]' + 10**6 * b" " + b"}")
    server, model = serve((200, {"Content-Encoding": encoding}, bomb))
    with pytest.raises(RewardError, match=f"its answer is compressed, which was not asked for: {encoding}"):
        model.score(THREE)
    assert len(server.asked) == 1 and server.asked[0][0]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("status", [b"banana", b"HTTP/1.1 999999 OK", b"HTTP/9 200 OK", b"\x00\xff\xfe", b"SSH-2.0-OpenSSH"])
def test_what_is_no_http_is_an_error(raw, status):
    _, model = raw(lambda: iter([status + b"\r\n\r\n"]))
    with pytest.raises(RewardError, match="no connection: RemoteProtocolError"):
        model.score(THREE)


def test_a_batch_may_have_as_many_scores_as_it_has_responses(serve):
    many = Responses([Prompt.of("w1")] * 3000, ["a"] * 3000, None, None)
    padded = lambda body: (200, {}, json.dumps({"scores": [1.0] * len(body["responses"]), "why": "x" * 10**6}).encode())  # noqa: E731
    assert serve(padded, batch_size=3000)[1].score(many).tolist() == [1.0] * 3000


@pytest.mark.parametrize("loop", [False, True])
def test_it_works_within_a_running_loop_as_in_a_notebook(serve, loop):
    _, model = serve(lengths)

    async def cell():
        return model.score(THREE)

    assert (asyncio.run(cell()) if loop else model.score(THREE)).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "value", ["²", "٣", "-1", "1e9", "nan", "inf", "soon", "Fri, 99 Foo 99999", "Mon, 1 Jan 2030 00:00 +99999999999"]
)
def test_a_retry_after_that_means_nothing_is_no_wait(serve, value):
    assert http._retry_after(value) == 0.0
    server, model = serve((503, {"Retry-After": value.encode().decode("latin-1")}, b""), lengths)
    assert model.score(THREE).tolist() == [1, 2, 3] and len(server.asked) == 2


def test_a_retry_after_of_thousands_of_digits_is_longer_than_we_wait(serve):
    server, model = serve((503, {"Retry-After": "9" * 5000}, b""), lengths)
    with pytest.raises(RewardError, match="it answered 503"):
        model.score(THREE)
    assert len(server.asked) == 1


def test_the_pause_after_a_thousand_attempts_is_still_a_minute():
    assert 30 <= ask("http://h/").pause(10**4) <= 60


@pytest.mark.parametrize("key", ["timeout_seconds", "retries", "backoff_seconds", "batch_size"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 1e300])
def test_times_and_counts_that_cannot_be_meant_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"reward_model.{key}="):
        ask("http://127.0.0.1:1/", **{key: value})


def test_a_proxy_is_used_for_other_machines_only(serve, monkeypatch):
    proxy, _ = serve(lengths)
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/score"))
    monkeypatch.delenv("NO_PROXY", raising=False)
    here, model = serve(lengths)
    assert model.score(THREE).tolist() == [1, 2, 3] and (len(here.asked), len(proxy.asked)) == (1, 0)
    assert ask("http://rewards.invalid/score").score(THREE).tolist() == [1, 2, 3] and len(proxy.asked) == 1
    monkeypatch.setenv("HTTP_PROXY", "gopher://me:hunter2@nowhere")
    with pytest.raises(ConfigError, match="A proxy in the environment .* cannot be used") as caught:
        ask("http://rewards.invalid/score")
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("HTTP_PROXY", "")
    monkeypatch.setenv("NO_PROXY", "[::1")
    with pytest.raises(ConfigError, match="NO_PROXY, ...\\) cannot be used: Invalid port"):
        ask("http://rewards.invalid/score")


def test_a_file_of_certificates_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file.pem")
    with pytest.raises(ConfigError, match="SSL_CERT_FILE or SSL_CERT_DIR in the environment cannot be used"):
        ask("https://rewards.invalid/score")


def test_a_server_that_speaks_no_tls_is_not_asked_again(serve):
    server, _ = serve(lengths)
    with pytest.raises(RewardError, match="no connection: SSLError"):
        ask(server.url.replace("http", "https")).score(THREE)
    assert server.waited == []


WRONG = [
    (b'{"scores": [1, 2', "not JSON"),
    (b"[" * 10**5, "not JSON"),
    (b'{"scores": [1, 2, ' + b"7" * 5000 + b"]}", "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b'{"scores": [1, 2, 3], "why": "\xe9"}', "not JSON in UTF-8"),
    (b"\x1b[2J", r"not JSON .* it said: \\x1b\[2J"),
    (b'{"scores": {"0": 1, "1": 2, "2": 3}}', 'should be {"scores": '),
    (b'{"scores": "abc"}', 'should be {"scores": '),
    (b'{"scores": [1, 2, {"score": 3}]}', "the score {'score': 3}, which is not a number"),
    (b"", "not JSON"),
    (b"[1, 2, 3]", 'should be {"scores": '),
    (b'{"score": [1, 2, 3]}', 'should be {"scores": '),
    (b'{"scores": 3}', 'should be {"scores": '),
    (b'{"scores": [1, 2]}', "2 scores for 3 responses"),
    (b'{"scores": [1, 2, 3, 4]}', "4 scores for 3 responses"),
    (b'{"scores": [1, 2, "3"]}', "the score '3', which is not a number"),
    (b'{"scores": [1, 2, [3]]}', r"the score \[3\], which is not a number"),
    (b'{"scores": [1, 2, true]}', "the score True, which is not a number"),
    (b'{"scores": [1, 2, 1' + 400 * b"0" + b"]}", "too large"),
]


@pytest.mark.parametrize(("body", "message"), WRONG)
def test_an_answer_of_the_wrong_form_stops_the_run_and_is_never_a_number(serve, body, message):
    server, model = serve((200, {}, body))
    with pytest.raises(RewardError, match=message):
        model.score(THREE)
    assert len(server.asked) == 1
    assert np.isnan(serve((200, {}, body), on_failure="drop")[1].score(THREE)).all()


def mutated(text, rng):
    """``text`` with a few bytes replaced, removed, doubled or inserted."""
    body = bytearray(text)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(body) + 1)
        piece = rng.choice(
            [b"", b"\x00", b"\xff", b'"', b"[", b"{", b"}", b"1e999", b"null", b"true", b":", b"\r\n", body[at : at + 9]]
        )
        body[at : at + rng.randint(0, 4)] = piece
    return bytes(body)


def test_no_body_is_anything_but_scores_or_a_clear_error():
    rng = random.Random(0)
    for _ in range(3000):
        body = mutated(b'{"scores": [0.5, -1, null], "why": ["a", {"b": [1.0]}]}', rng)
        with contextlib.suppress(RewardError):
            assert module.scores_in(body, 3).shape == (3,)


def test_no_answer_is_anything_but_scores_or_a_clear_error(raw):
    rng = random.Random(0)
    whole = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 29\r\n\r\n{"scores": [0.5, -1.25, 2.0]}'
    _, model = raw(lambda: iter([mutated(whole, rng)]), timeout_seconds=0.2, retries=0)
    for _ in range(100):
        with contextlib.suppress(RewardError):
            assert np.isfinite(model.score(THREE)).all()


@pytest.mark.parametrize("hole", [b"null", b"NaN", b"Infinity", b"-Infinity", b"1e39"])
def test_a_single_score_that_is_no_number_stops_the_run_or_drops_its_episode(serve, hole):
    answer = 200, {}, b'{"scores": [1, %s, 3]}' % hole
    with pytest.raises(RewardError, match="for the response 'bb'.*reward_model.on_failure=drop"):
        serve(answer)[1].score(THREE)
    found = serve(answer, on_failure="drop")[1].score(THREE)
    assert found[[0, 2]].tolist() == [1, 3] and np.isnan(found[1])


def test_a_failed_batch_drops_its_own_episodes_only(serve, caplog):
    server, model = serve(lengths, (400, {}, b"too odd"), batch_size=2, on_failure="drop")
    found = model.score(THREE)
    assert found[:2].tolist() == [1, 2] and np.isnan(found[2])
    assert "left out 1 episodes: it answered 400" in caplog.text


# ------------------------------------------------------------------------------------------------------------ secrets


def test_the_token_goes_into_the_header_and_nowhere_else(serve, monkeypatch, caplog):
    monkeypatch.setenv("MY_TOKEN", "s3cr3t-t0ken\n")
    echo = lambda body: (403, {}, b"token s3cr3t-t0ken is not welcome")  # noqa: E731
    server, model = serve((500, {}, b"s3cr3t-t0ken"), echo, token_variable="MY_TOKEN")
    with pytest.raises(RewardError, match=r"token \*\*\* is not welcome") as caught:
        model.score(THREE)
    assert server.asked[0][0]["Authorization"] == "Bearer s3cr3t-t0ken"
    said = "".join(map(repr, [caught.value, caught.value.__cause__, caught.value.__cause__.__context__, model.config]))
    assert "s3cr3t" not in said + caplog.text


TOKEN = "s3cr3t/t0ken+x=="
ECHOES = [
    (200, {}, TOKEN),
    (200, {}, f'{{"scores": ["{TOKEN}", 1, 2]}}'),
    (200, {}, f'{{"scores": "{TOKEN}"}}'),
    (200, {}, f'{{"scores": [["Bearer {TOKEN}"], 1, 2]}}'),
    (200, {}, f'{{"error": "Bearer {TOKEN}"}}'),
    (200, {}, '{"error": "' + TOKEN.replace("/", "\\/") + '"}'),
    (200, {}, "x" * 190 + TOKEN),
    (200, {}, TOKEN * 10**4),
    (200, {}, f'{{"scores": ["{"x" * 90}{TOKEN}{"x" * 300}", 1, 2]}}'),
    (200, {"Content-Encoding": TOKEN}, "x"),
    (400, {}, " " * 10**5 + TOKEN),
    (401, {}, f'{{"headers": {{"Authorization": "Bearer {TOKEN}"}}}}'),
    (403, {"X-Your-Token": TOKEN}, "https://example.org/login?next=" + urllib.parse.quote(TOKEN, safe="")),
    (302, {"Location": f"http://{TOKEN}.example.org/"}, TOKEN),
    (500, {}, TOKEN),
    (503, {"Retry-After": TOKEN}, TOKEN),
]


@pytest.mark.parametrize("answer", ECHOES, ids=range(len(ECHOES)))
def test_a_server_that_echoes_the_token_does_not_get_it_printed(serve, monkeypatch, caplog, answer):
    monkeypatch.setenv("MY_VARIABLE", TOKEN)
    status, headers, body = answer
    server, model = serve((status, headers, body.encode()), token_variable="MY_VARIABLE", retries=1)
    with pytest.raises(RewardError) as caught:
        model.score(THREE)
    assert server.asked[0][0]["Authorization"] == f"Bearer {TOKEN}"
    assert_hidden(caught.value, caplog)


@pytest.mark.parametrize(
    "head", ["HTTP/1.1 401 Bearer {0} is wrong", "HTTP/1.1 {0}", "{0}", "HTTP/1.1 200 OK\r\n{0}", "HTTP/1.1 200 OK\r\n{0} : x"]
)
def test_nor_does_one_that_echoes_it_outside_of_the_body(raw, monkeypatch, caplog, head):
    monkeypatch.setenv("MY_VARIABLE", TOKEN)
    _, model = raw(lambda: iter([head.format(TOKEN).encode() + b"\r\n\r\n"]), token_variable="MY_VARIABLE")
    with pytest.raises(RewardError) as caught:
        model.score(THREE)
    assert_hidden(caught.value, caplog)


def assert_hidden(error, caplog):
    said = caplog.text
    while error is not None:
        said += repr(error) + str(error)
        error = error.__cause__ or error.__context__
    assert not any(part in said for part in ("s3cr3t", "t0ken"))


def test_a_key_in_the_query_is_shown_in_no_message(serve, caplog):
    server, model = serve((500, {}, b"nothing works"), retries=1)
    model = ask(f"{server.url}?key=hunter2hunter2", retries=1)
    with pytest.raises(RewardError, match="nothing works") as caught:
        model.score(THREE)
    assert "hunter2" not in str(caught.value) + caplog.text + repr(caught.value.__cause__)


def test_a_missing_token_names_the_variable_and_an_impossible_one_is_not_shown(monkeypatch):
    monkeypatch.delenv("MY_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="MY_TOKEN is not set"):
        ask("http://127.0.0.1:1/", token_variable="MY_TOKEN")
    monkeypatch.setenv("MY_TOKEN", "s3cr3t\nX-Other: 1")
    with pytest.raises(ConfigError, match="MY_TOKEN has characters") as caught:
        ask("http://127.0.0.1:1/", token_variable="MY_TOKEN")
    assert "s3cr3t" not in str(caught.value)


def test_a_redirect_is_not_followed_so_that_the_token_stays_here(serve, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "s3cr3t")
    other, _ = serve(lengths)
    for status in (301, 302, 307, 308):
        _, model = serve((status, {"Location": other.url}, b""), token_variable="MY_TOKEN")
        with pytest.raises(RewardError, match=f"it answered {status}"):
            model.score(THREE)
    assert other.asked == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000", "should look like http://127.0.0.1:8000/score"),
        ("file:///etc/passwd", "should look like"),
        ("http://me:s3cr3t@host/score", "holds credentials"),
        ("http://s3cr3t@host/score", "holds credentials"),
        ("", "should look like"),
        ("http://", "should look like"),
        ("http:///score", "should look like"),
        ("htp://127.0.0.1/?key=s3cr3t", "should look like"),
        ("http//127.0.0.1:8000/score", "should look like"),
        (" http://127.0.0.1:8000/score", "has a space"),
        ("http://127.0.0.1:8000/my score", "has a space.* write %20"),
        ("http://127.0.0.1:8000/score\n", "has a space or a line break"),
        ("http://127.0.0.1:\u00b2/score", "should look like"),
        ("http://127.0.0.1:port/score", "should look like .*Invalid port"),
        ("http://127.0.0.1:99999/score", "there is no port 99999"),
        ("http://127.0.0.1:0/score", "there is no port 0"),
        ("http://127.0.0.1:-1/score", "there is no port -1"),
        ("http://[::1/score", "should look like"),
        ("http://[::g]/score", "should look like"),
        ("http://999.1.1.1/score", "should look like .*Invalid IPv4"),
        ("http://a..b/score", "should look like"),
        (f"http://{'a' * 64}.org/score", "should look like"),
        ("http://\u200b.org/score", "should look like"),
        ("http://<host>/score", "is not the name of a host"),
        ("http://{host}:8000/score", "is not the name of a host"),
        ("http://h/\x1b[31m", "should look like"),
        ("http://h/" + "x" * 10**5, "should look like"),
    ],
)
def test_a_url_that_cannot_be_meant_is_told_before_anything_runs(url, message):
    with pytest.raises(ConfigError, match=message) as caught:
        ask(url)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000/score", "HTTPS://Rewards.Example.ORG/v2/score?model=a%20b", "http://[::1]:8000/", "http://h", "http://h:/x",
        "http://b\u00fccher.example/score", "http://my_host.internal:65535/a/b;c=d?e=f#g", "http://10.0.0.1/\u00fc", "http://h./",
    ],
)  # fmt: skip
def test_a_url_that_can_be_meant_is_taken(url):
    assert ask(url).source.startswith("reward server http")


# ------------------------------------------------------------------------------------------------------------ example


def test_the_example_server_runs_and_scores_what_its_function_does(monkeypatch):
    process = subprocess.Popen([sys.executable, str(EXAMPLE), "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        url = process.stdout.readline().strip()
        responses = Responses(THREE.prompts, ["Green.", "I do not know", ""], None, None)
        assert ask(url).score(responses).tolist() == [pytest.approx(s) for s in (0.99, -0.04, 0.0)]
    finally:
        process.terminate()
        process.wait()


def test_the_example_server_refuses_what_it_does_not_understand():
    spec = importlib.util.spec_from_file_location("reward_server", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    server = ThreadingHTTPServer(("127.0.0.1", 0), example.RewardServer)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    example.RewardServer.log_message = lambda *_: None
    try:
        model = ask(f"http://127.0.0.1:{server.server_port}/score")
        with pytest.raises(module.NoScores, match="it answered 400 Bad Request") as caught:
            model.ask([], ["an answer to nothing"], {})
        assert not caught.value.again
    finally:
        server.shutdown()
        server.server_close()
