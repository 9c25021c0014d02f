"""The generator of the studio: batches, places in the queue, cancelling; and streams that a reader leaves."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest

from lockstep.errors import CheckpointError
from lockstep.types import Message
from lockstep_studio.generator import FAILED, Generator, PolicySpeaker, Request
from lockstep_studio.store.people import Refused
from studio_server import Echo, labeler, serving
from test_studio_store import settings


def request(text: str, policy: str = "sft", seed: int = 1, **changes) -> Request:
    return Request(
        **{"policy": policy, "messages": (Message("user", text),), "seed": seed, "temperature": 1.0, "max_tokens": 8, **changes}
    )


def running(check, opened=Echo, **options):
    """Run ``check(generator)`` on an event loop."""
    generator = Generator(opened, **options)
    try:
        return asyncio.run(asyncio.wait_for(check(generator), 20))
    finally:
        generator.close()


async def read(ticket) -> tuple[str, str]:
    async for piece in ticket.pieces():
        if piece.ended:
            return ticket.text, piece.ended
    raise AssertionError("no end")


class Gate(Echo):
    """An echo that waits until it is let go."""

    let = threading.Event()
    made: list[Gate] = []

    def __init__(self, policy):
        super().__init__(policy)
        Gate.made.append(self)

    def speak(self, requests):
        Gate.let.wait(10)
        yield from super().speak(requests)


@pytest.fixture
def gate():
    Gate.let.clear()
    Gate.made.clear()
    yield Gate.let
    Gate.let.set()


def test_requests_that_wait_together_are_drawn_together(gate):
    async def check(generator):
        first = generator.submit(request("zero"))
        await asyncio.sleep(0.1)  # it is being drawn
        tickets = [generator.submit(request(f"number {i}")) for i in range(5)]
        gate.set()
        found = await asyncio.gather(read(first), *map(read, tickets))
        assert [text.split(" (")[0] for text, _ in found[1:]] == [f"number {i}" for i in range(5)]

    running(check, Gate, batch=4)
    assert [speaker.batches for speaker in Gate.made] == [[1, 4, 1]]


def test_whoever_waits_is_told_how_many_are_ahead(gate):
    async def check(generator):
        generator.submit(request("zero", "a"))
        await asyncio.sleep(0.1)
        tickets = [generator.submit(request("x", policy)) for policy in ("b", "c", "d")]
        first = [await anext(ticket.pieces()) for ticket in tickets]
        assert [piece.ahead for piece in first] == [0, 1, 2]
        gate.set()
        places = [piece.ahead async for piece in tickets[2].pieces()]
        assert [place for place in places if place is not None] == [1, 0]

    running(check, Gate)


def test_a_long_answer_does_not_hold_up_a_short_one():
    async def check(generator):
        long = generator.submit(request("forever"))
        await asyncio.sleep(0.05)
        assert (await read(generator.submit(request("short"))))[1] == "done"
        long.cancel()
        assert (await read(long))[1] == "stopped"

    running(check)


def test_a_batch_that_nobody_reads_any_more_ends():
    speakers = []

    def opened(policy):
        speakers.append(Echo(policy))
        return speakers[-1]

    async def check(generator):
        tickets = [generator.submit(request("forever")) for _ in range(3)]
        await asyncio.sleep(0.1)
        for ticket in tickets:
            ticket.cancel()
        await asyncio.gather(*map(read, tickets))
        await asyncio.sleep(0.1)
        steps = speakers[0].steps
        await asyncio.sleep(0.1)
        assert speakers[0].steps == steps and generator.load == {"waiting": 0, "writing": 0}

    running(check, opened)


def test_one_reader_who_leaves_does_not_stop_the_others_of_the_batch(gate):
    async def check(generator):
        generator.submit(request("zero"))
        await asyncio.sleep(0.1)
        leaver, stayer = generator.submit(request("forever")), generator.submit(request("one two three four"))
        leaver.cancel()
        gate.set()
        assert (await read(stayer))[0].startswith("one two three four")

    running(check, Gate)


def test_a_policy_that_breaks_fails_its_own_answers_only():
    def opened(policy):
        if policy == "gone":
            raise CheckpointError("There is no such checkpoint.")
        return Echo(policy)

    async def check(generator):
        bad, gone = generator.submit(request("fail")), generator.submit(request("x", "gone"))
        assert (await read(bad))[1] == "failed"
        pieces = [piece async for piece in gone.pieces()]
        assert pieces[-1].reason == FAILED
        assert (await read(generator.submit(request("fine"))))[1] == "done"

    running(check, opened)


def test_a_full_queue_refuses_politely(gate):
    async def check(generator):
        for _ in range(3):
            generator.submit(request("x"))
            await asyncio.sleep(0.05)
        with pytest.raises(Refused, match="Too many people are waiting"):
            generator.submit(request("x"))
        gate.set()

    running(check, Gate, most=2)


def test_no_more_policies_are_kept_than_the_operator_allows():
    opened: list[str] = []

    def make(policy):
        opened.append(policy)
        return Echo(policy)

    async def check(generator):
        for policy in ("a", "b", "a", "c", "a", "b"):
            await read(generator.submit(request("x", policy)))

    running(check, make, loaded=2)
    assert opened == ["a", "b", "c", "b"]


# ------------------------------------------------------------------------------------------------------------ streams


@pytest.fixture
def studio(tmp_path):
    with serving(tmp_path / "studio", settings(), opened=lambda policy: Echo(policy, 0.01)) as (made, address):
        made.policies = {"sft": (tmp_path, None)}
        made.scan = lambda: 0
        made.address = address
        yield made


def began(studio):
    client = labeler(studio, studio.address)
    client.get("/chat")
    return client, client.post("/chat")["conversation"]


def say(client, talk, text, read):
    """Ask, and give the events to ``read`` as they come until it returns something."""
    headers = {"accept": "text/event-stream", "x-csrf-token": client.csrf}
    with client.client.stream("POST", f"/chat/{talk}/say", json={"text": text}, headers=headers) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: ") and (found := read(name, json.loads(line.removeprefix("data: ")))) is not None:
                return found
    return None


def test_an_answer_streams_word_by_word_and_is_stored_whole(studio):
    client, talk = began(studio)
    events = []
    say(client, talk, "one two three", lambda name, data: events.append((name, data)))
    assert [name for name, _ in events][:2] == ["start", "wait"] and events[-1][0] == "end"
    text = "".join(data["text"] for name, data in events if name in ("piece", "end"))
    assert sum(name == "piece" for name, _ in events) >= 3
    assert client.get(f"/chat/{talk}")["thread"][1]["text"] == text


def test_when_the_reader_leaves_the_policy_stops_and_what_came_is_kept(studio):
    client, talk = began(studio)
    said: list[str] = []

    def leave_after_five(name, data):
        said.extend([data["text"]] if name == "piece" else [])
        return True if len(said) == 5 else None

    assert say(client, talk, "forever", leave_after_five)
    until = time.time() + 60
    while studio.generator.load["writing"] and time.time() < until:
        time.sleep(0.05)
    assert studio.generator.load == {"waiting": 0, "writing": 0}
    while (answer := client.get(f"/chat/{talk}")["thread"][1])["state"] == "writing" and time.time() < until:
        time.sleep(0.05)
    assert answer["state"] == "stopped" and answer["text"].startswith("forever ")


def test_a_silent_stream_says_that_it_lives(studio, monkeypatch):
    monkeypatch.setattr("lockstep_studio.pages.talk.HEARTBEAT", 0.05)
    studio.generator._open = lambda policy: Echo(policy, 0.5)
    client, talk = began(studio)
    headers = {"accept": "text/event-stream", "x-csrf-token": client.csrf}
    with client.client.stream("POST", f"/chat/{talk}/say", json={"text": "hi"}, headers=headers) as response:
        assert sum(line == ": alive" for line in response.iter_lines()) >= 3


def test_what_was_being_written_when_the_server_died_is_marked_stopped(tmp_path):
    with serving(tmp_path / "studio", settings()) as (studio, address):
        studio.policies = {"sft": (tmp_path, None)}
        client = labeler(studio, address)
        client.get("/chat")
        client.post("/chat")
        studio.database.now(lambda c: c.execute(
            "INSERT INTO messages (token, conversation, role, content, state, at) VALUES ('t', 1, 'assistant', '', 'writing', 0)"
        ))  # fmt: skip
    with serving(tmp_path / "studio", settings()) as (studio, _):
        assert studio.database.reader.execute("SELECT state FROM messages").fetchone()[0] == "stopped"


def test_many_readers_share_a_policy(studio):
    clients = [began(studio) for _ in range(12)]
    found: list[str] = []

    def ask(client, talk, number):
        pieces: list[str] = []
        say(client, talk, f"number {number} please", lambda name, data: pieces.append(data.get("text", "")))
        found.append("".join(pieces).split(" (")[0])

    threads = [threading.Thread(target=ask, args=(*client, number)) for number, client in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == sorted(f"number {number} please" for number in range(12))


# -------------------------------------------------------------------------------------------------------- real policies


@pytest.fixture(scope="module", params=["torch", "jax"])
def chat_policy(request):
    pytest.importorskip(request.param)
    from lockstep.api.policies import new_policy

    return new_policy(request.param, layers=1, hidden_size=32, heads=2, kv_heads=2, intermediate_size=48)


def test_an_answer_is_that_of_the_python_api_whoever_shares_the_batch(chat_policy):
    texts = ["what colour is jarl ?", "what does wug eat ?", "where does dax live ?"]
    requests = [request(text, seed=seed, max_tokens=6 + seed) for seed, text in enumerate(texts)]
    answers = [""] * 3
    for pieces in PolicySpeaker(chat_policy).speak(requests):
        answers = [answer + piece.text for answer, piece in zip(answers, pieces, strict=True)]
    assert answers == [chat_policy.chat(text, seed=seed, max_tokens=6 + seed) for seed, text in enumerate(texts)]


def test_a_message_that_is_too_long_fails_alone(chat_policy):
    requests = [request("word " * 3000), request("what does wug eat ?")]
    ended: dict[int, list] = {0: [], 1: []}
    for pieces in PolicySpeaker(chat_policy).speak(requests):
        for number, piece in enumerate(pieces):
            if piece.ended:
                ended[number].append((piece.ended, piece.reason))
    assert ended == {0: [("failed", "The message is too long for this policy.")], 1: [("done", "")]}


def test_a_saved_policy_answers_in_the_studio(chat_policy, tmp_path):
    folder = chat_policy.save(tmp_path / "policy")
    with serving(tmp_path / "studio", settings(chat={"max_tokens": 6}), [folder], opened=None) as (studio, address):
        studio.backend = chat_policy.backend.name
        client = labeler(studio, address)
        assert client.get("/chat")["policies"] == ["policy"]
        talk = client.post("/chat")["conversation"]
        (answer,) = client.post(f"/chat/{talk}/say", text="what does wug eat ?")["answers"]
        seed = studio.database.reader.execute("SELECT seed FROM messages WHERE role = 'assistant'").fetchone()[0]
    assert answer["text"] == chat_policy.chat("what does wug eat ?", seed=seed, max_tokens=6)
