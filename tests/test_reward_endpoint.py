"""The reward model `endpoint` against servers on loopback that answer, refuse, break off, hang and lie."""

from __future__ import annotations

import email.utils
import importlib.util
import json
import subprocess
import sys
import threading
import time
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
from lockstep_rlhf.reward_models.endpoint import Endpoint

EXAMPLE = Path(__file__).parent.parent / "docs" / "examples" / "reward_server.py"
THREE = Responses([Prompt.of("w1"), Prompt.of("w2"), Prompt.of("w3")], ["a", "bb", "ccc"], None, None)


class Server:
    """Answers each request with the next of ``answers`` and goes on with the last: (status, headers, body), or what a
    function of the request makes. ``asked`` are the requests: (headers, JSON)."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((dict(self.headers), body))
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
    hang = lambda body: time.sleep(0.5) or lengths(body)  # noqa: E731
    server, model = serve(hang, timeout_seconds=0.05, retries=1)
    with pytest.raises(RewardError, match="reward_model.timeout_seconds=0.05|no connection: TimeoutError"):
        model.score(THREE)
    assert len(server.asked) == 2


def test_a_server_that_drips_is_out_of_time_although_no_single_read_is(serve, monkeypatch):
    class Dripping:
        def read(self):
            time.sleep(0.5)

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

    _, model = serve(lengths, timeout_seconds=0.05, retries=0)
    monkeypatch.setattr(model.opener, "open", lambda *_, **__: Dripping())
    with pytest.raises(RewardError, match="no answer within reward_model.timeout_seconds=0.05"):
        model.score(THREE)


def test_no_server_is_an_error_after_all_attempts(serve):
    server, model = serve(lengths)
    server.server.server_close()
    with pytest.raises(RewardError, match="no connection: .*Connection"):
        model.score(THREE)
    assert len(server.waited) == 2


def test_an_answer_that_breaks_off_is_asked_for_again(serve):
    server, model = serve((200, {"Content-Length": "1000"}, b'{"scores": [1, 2'), lengths)
    assert model.score(THREE).tolist() == [1, 2, 3] and len(server.asked) == 2


WRONG = [
    (b'{"scores": [1, 2', "not JSON"),
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
    ],
)
def test_a_url_that_cannot_be_meant_is_told_before_anything_runs(url, message):
    with pytest.raises(ConfigError, match=message) as caught:
        ask(url)
    assert "s3cr3t" not in str(caught.value)


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
            model.ask([], ["an answer to nothing"])
        assert not caught.value.again
    finally:
        server.shutdown()
        server.server_close()
