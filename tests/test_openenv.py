"""OpenEnv's servers as data and environment: a real one, and some that no one should meet."""

import json
import threading
import time
from contextlib import contextmanager

import pytest

from lockstep.checking.conformance import conform, subject
from lockstep.config.schema import parse
from lockstep.errors import ConfigError, EnvironmentFailed
from lockstep.interfaces import Episode, Reply
from lockstep.registry import registry
from lockstep.types import Message, Prompt
from lockstep_openenv import plugin
from lockstep_openenv.sessions import LARGEST_ANSWER, Beginnings, Remote

pytest.importorskip("websockets")
ROOM = 12
"""Sessions of the real server at the same time."""

if ("environment", "openenv", None) not in registry().components:
    registry().add(plugin, "lockstep-rlhf (openenv)")


def remote(url, **changes) -> Remote:
    return Remote(parse(Remote.Config, {"url": url, "observation": "text", "timeout_seconds": 5.0} | changes, "environment"))


def data(url, **changes) -> Beginnings:
    return Beginnings(parse(Beginnings.Config, {"url": url, "observation": "text", "instructions": "Guess."} | changes, "data"))


def say(environment: Remote, episode: Episode, text: str) -> Reply:
    episode.messages.append(Message("assistant", text))
    reply = environment.reply(episode)
    episode.messages += reply.messages
    return reply


# ------------------------------------------------------------------------------------------------------- the real server


@pytest.fixture(scope="module")
def url():
    """openenv-core's server, of a game: guess a number from 0 to 9, which is the seed's last digit."""
    core = pytest.importorskip("openenv.core.env_server")
    uvicorn = pytest.importorskip("uvicorn")

    class Guess(core.Action):
        message: str

    class Said(core.Observation):
        text: str

    class Game(core.Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True
        number = 0

        def reset(self, seed=None, episode_id=None, **kwargs):
            self.number = seed % 10
            return Said(text="odd" if seed % 2 else "even")

        def step(self, action, timeout_s=None, **kwargs):
            if action.message == "crash":
                raise ValueError("as asked")
            right = action.message == str(self.number)
            return Said(text="Yes" if right else "No", reward=right if right else -0.25, done=right)

        @property
        def state(self):
            return core.State()

    server = uvicorn.Server(
        uvicorn.Config(core.create_fastapi_app(Game, Guess, Said, max_concurrent_envs=ROOM), port=0, log_level="error")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def test_an_episode_is_a_session_with_the_servers_rewards(url):
    prompt = data(url).prompts("heldout")[3]
    assert prompt.messages[0].content == "Guess.\n\nodd" and prompt.truth == {"seed": 7}
    environment, episode = remote(url, action="message"), Episode(prompt, 0)
    assert say(environment, episode, "3") == Reply.says("No", reward=-0.25)
    assert say(environment, episode, "7") == Reply.ends(1.0)
    environment.close(episode)


def test_a_turn_may_be_the_whole_action_and_what_is_none_is_told_to_the_policy(url):
    environment, episode = remote(url, observation=None, invalid_reward=-1), Episode(Prompt.of('{"text": "even"}', seed=4), 0)
    assert say(environment, episode, '{"message": "3"}') == Reply.says('{"text": "No"}', reward=-0.25)
    for text, why in {
        "four": "it is not JSON: Expecting value",
        "[" * 100_000: "it is not JSON: ",
        "[4]": "it should be a JSON object",
        '{"massage": "4"}': "message: Field required",
        '{"message": 4}': "message: Input should be a valid string",
    }.items():
        reply = say(environment, episode, text)
        assert reply.messages[0].content.startswith(f"No action was taken: {why}") and reply.reward == -1 and not reply.done
    assert say(environment, episode, '{"message": "4"}') == Reply.ends(1.0)
    environment.close(episode)


def test_an_error_of_the_environment_is_a_failure(url):
    environment, episode = remote(url, action="message"), Episode(Prompt.of("odd", seed=1), 0)
    with pytest.raises(EnvironmentFailed, match="answered .*as asked"):
        say(environment, episode, "crash")
    environment.close(episode)
    for changes, prompt, says in [
        ({}, Prompt.of("even", seed=1), "seed 1 begins with 'odd', and the prompt says something else"),
        ({"observation": "txt"}, Prompt.of("odd", seed=1), "an observation has no 'txt'. It has: .*text."),
    ]:
        environment, episode = remote(url, **changes), Episode(prompt, 0)
        with pytest.raises(EnvironmentFailed, match=says):
            say(environment, episode, "1")
        environment.close(episode)


def test_a_server_without_room_for_another_episode_says_so(url):
    environment, episodes = remote(url, action="message"), [Episode(Prompt.of("odd", seed=1), 0) for _ in range(ROOM + 1)]
    for episode in episodes[:-1]:
        say(environment, episode, "2")
    with pytest.raises(EnvironmentFailed, match="answered .*CAPACITY_REACHED"):
        say(environment, episodes[-1], "2")
    for episode in episodes:
        environment.close(episode)


def test_it_conforms(url):
    settings = [f"environment.{key}" for key in (f"url={url}", "observation=text", "action=message")]
    overrides = ["backend.threads=1", *settings]
    found = list(conform("environment", subject("environment", "openenv", "torch", overrides=overrides)))
    assert found and [(o.check.name, o.detail) for o in found if o.status != "passed"] == []


# ---------------------------------------------------------------------------------------------------------- other servers


@contextmanager
def answering(*answers):
    """A server that sends these, one for each message, and then hangs up."""
    from websockets.sync.server import serve

    asked = []

    def talk(socket):
        for answer in answers:
            asked.append(json.loads(socket.recv()))
            socket.send(answer if isinstance(answer, str) else json.dumps(answer))

    with serve(talk, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}/", asked


def observed(text="odd", **more):
    return {"type": "observation", "data": {"observation": {"text": text}, "reward": None, "done": False} | more}


def test_what_is_sent_is_openenvs_protocol():
    with answering(observed(), observed("No", reward=0.5), observed("", reward=True, done=True)) as (url, asked):
        environment, episode = remote(url, action="message"), Episode(Prompt.of("odd", seed=1), 0)
        assert say(environment, episode, "é") == Reply.says("No", reward=0.5)
        assert say(environment, episode, "1") == Reply.ends(1.0)
        environment.close(episode)
    assert asked == [
        {"type": "reset", "data": {"seed": 1}},
        {"type": "step", "data": {"message": "é"}},
        {"type": "step", "data": {"message": "1"}},
    ]


@pytest.mark.parametrize(
    "answer, says",
    [
        ("no JSON", "gave no answer: JSONDecodeError"),
        ("[" * 100_000, "gave no answer: RecursionError"),
        ("x" * (LARGEST_ANSWER + 1), "gave no answer: ConnectionClosedError"),
        (observed(reward="1"), "answered {'data'"),
        (observed(done=None), "answered {'data'"),
        ({"type": "observation", "data": {"observation": "text"}}, "answered {'data'"),
        ({"type": "error", "data": {"code": "CAPACITY_REACHED", "message": "full"}}, "answered .*CAPACITY_REACHED"),
        ({"type": "error", "data": {"code": "VALIDATION_ERROR", "errors": []}}, "answered .*VALIDATION_ERROR"),
        ([], r"answered \[\]"),
    ],
)
def test_what_is_no_answer_is_a_failure_and_never_a_reward(answer, says):
    with answering(observed(), answer) as (url, _):
        environment, episode = remote(url, action="message"), Episode(Prompt.of("odd", seed=1), 0)
        with pytest.raises(EnvironmentFailed, match=says):
            say(environment, episode, "1")
        environment.close(episode)


def test_a_server_that_hangs_up_is_silent_or_not_there_is_a_failure():
    with answering(observed()) as (url, _), pytest.raises(EnvironmentFailed, match="gave no answer: ConnectionClosed"):
        say(remote(url, action="message"), Episode(Prompt.of("odd", seed=1), 0), "1")
    with pytest.raises(EnvironmentFailed, match=f"there is no connection to {url}: ConnectionRefusedError"):
        data(url).prompts("train")[0]


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "ftp://a", "http://a b", "http://a?token=1", "http://me:word@a"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="is no address of a server. Write it as http://127.0.0.1:8000."):
        remote(url)
