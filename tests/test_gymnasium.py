"""Gymnasium's environments as data and environment, played with the real package."""

import string
import textwrap
import warnings

import numpy as np
import pytest
from omegaconf import OmegaConf

from listings import ROOT
from lockstep.checking.conformance import conform, subject
from lockstep.config.compose import compose
from lockstep.config.schema import parse
from lockstep.errors import ConfigError, DataError, EnvironmentFailed, MissingData
from lockstep.interfaces import Episode, Reply
from lockstep.registry import registry
from lockstep.runs.experiment import Experiment
from lockstep.types import Message, Prompt
from lockstep_gymnasium import plugin
from lockstep_gymnasium.games import Beginnings, Game, numbers, uncolored

gymnasium = pytest.importorskip("gymnasium")

if ("environment", "gymnasium", None) not in registry().components:
    registry().add(plugin, "lockstep-rlhf (gymnasium)")

LAKE = {"id": "FrozenLake-v1", "settings": {"render_mode": "ansi", "is_slippery": False}}
WORDS = {"left": 0, "down": 1, "right": 2, "up": 3}


class Guess(gymnasium.Env):
    """A number from 1 to 100, and after each guess whether it is higher or lower."""

    observation_space = action_space = gymnasium.spaces.Text(100, charset=string.printable)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.number = int(self.np_random.integers(1, 101))
        return f"A number near {self.number // 10}0.\n", {}

    def step(self, action):
        right = action == str(self.number)
        said = "Yes" if right else "Higher" if action.isdigit() and int(action) < self.number else "Lower"
        return said, np.float32(right) - 0.25, right, False, {}


gymnasium.register("Guess-v0", Guess)


def lake(**changes) -> Game:
    return Game(parse(Game.Config, LAKE | {"actions": WORDS} | changes, "environment"))


def data(**changes) -> Beginnings:
    return Beginnings(parse(Beginnings.Config, LAKE | {"instructions": "Cross the lake."} | changes, "data"))


def say(environment: Game, episode: Episode, text: str) -> Reply:
    episode.messages.append(Message("assistant", text))
    reply = environment.reply(episode)
    episode.messages += reply.messages
    return reply


def test_a_prompt_is_the_instructions_and_what_a_seed_begins_with():
    source = data(prompts=3, heldout_prompts=2)
    train, heldout = list(source.prompts("train")), list(source.prompts("heldout"))
    assert train[0].messages == (Message("user", "Cross the lake.\n\n[red S]FFF\nFHFH\nFFFH\nHFFG"),)
    assert [p.truth["seed"] for p in train] == [0, 2, 4] and [p.truth["seed"] for p in heldout] == [1, 3]
    assert [p.truth["seed"] for p in data(prompts=9, seed=1).prompts("train")[:2]] == [2, 4]
    with pytest.raises(DataError, match="No split 'tran'. Did you mean 'train'"):
        source.prompts("tran")
    for nothing in (source.demonstrations, source.comparisons, source.texts):
        with pytest.raises(MissingData):
            nothing("train")


def test_the_lake_is_crossed_and_the_goal_is_worth_a_point():
    environment, episode = lake(), Episode(data().prompts("train")[0], 0)
    said = ["I go right", "RIGHT!", "Not left, down", "down", "down"]
    replies = [say(environment, episode, text) for text in said]
    assert replies[2] == Reply.says("  (Down)\nSFFF\nFH[red F]H\nFFFH\nHFFG")
    assert {(reply.reward, reply.done) for reply in replies} == {(0.0, False)}
    assert say(environment, episode, "right") == Reply.ends(1.0)
    environment.close(episode)


def test_a_hole_and_the_time_limit_end_the_episode():
    environment, episode = lake(), Episode(data().prompts("train")[0], 0)
    assert not say(environment, episode, "down").done and say(environment, episode, "right") == Reply.ends(0.0)
    short, episode = lake(settings=LAKE["settings"] | {"max_episode_steps": 1}), Episode(data().prompts("train")[0], 0)
    assert say(short, episode, "left") == Reply.ends(0.0)


@pytest.mark.parametrize("text", ["", "I jump", "downright", "2", "\N{LATIN SMALL LETTER LONG S}outh"])
def test_a_turn_without_an_action_takes_no_step_and_is_told_the_words(text):
    environment, episode = lake(actions=WORDS | {"south": 1}, invalid_reward=-0.5), Episode(data().prompts("train")[0], 0)
    assert say(environment, episode, text) == Reply.says(
        "No action was taken. Say one of: down, left, right, south, up.", reward=-0.5
    )
    assert "[red F]FF" in say(environment, episode, "right").messages[0].content.replace("S", "", 1)


def test_an_environment_of_text_takes_and_gives_it_as_it_is():
    source = data(id="Guess-v0", settings={})
    environment = lake(id="Guess-v0", settings={}, actions={})
    prompt = source.prompts("train")[3]
    number = int(np.random.default_rng(6).integers(1, 101))
    assert prompt.messages[0].content == f"Cross the lake.\n\nA number near {number // 10}0."
    episode = Episode(prompt, 0)
    assert say(environment, episode, "0") == Reply.says("Higher", reward=-0.25)
    assert say(environment, episode, "none") == Reply.says("Lower", reward=-0.25)
    assert say(environment, episode, str(number)) == Reply.ends(0.75)


def test_numbers_are_short_and_colours_have_names():
    assert numbers(np.array([0.12345, -2.0], np.float32)) == "[ 0.123, -2.   ]"
    assert numbers(np.int64(7)) == "7" and numbers((1, {"a": 2, "b": "x"})) == "1, a: 2\nb: x"
    assert len(numbers(np.zeros((210, 160, 3)))) < 1000
    assert uncolored("\n\x1b[34;1m\x1b[43mR\x1b[0m\x1b[0m|G\n") == "[blue [yellow R]]|G"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"id": "FrozenLak-v1"}, "environment.id='FrozenLak-v1' cannot be made: NameNotFound.*Did you mean: `FrozenLake`"),
        ({"settings": {"map": 3}}, "cannot be made: TypeError.*See environment.settings too."),
        ({"actions": {}}, r"'FrozenLake-v1' takes actions of Discrete\(4\). Name them: environment.actions="),
        ({"actions": {"left": 0, "jump": 4}}, r"environment.actions.jump=4 is no action of 'FrozenLake-v1': Discrete\(4\)."),
        ({"id": "CartPole-v1", "settings": {}, "actions": {"left": -1}}, "environment.actions.left=-1 is no action"),
        ({"id": "Guess-v0", "settings": {}}, "'Guess-v0' takes the policy's turn as it is. Remove environment.actions."),
        ({"actions": {"left": 0, "Left": 1}}, "needs words that differ"),
        ({"actions": {" ": 0}}, "needs words that differ"),
    ],
)
def test_what_cannot_be_played_is_an_error_before_a_run(changes, says):
    with pytest.raises(ConfigError, match=says), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Game.check(lake(**changes).config)


def test_what_can_be_played_is_none():
    for environment in (lake(), lake(id="Guess-v0", settings={}, actions={})):
        Game.check(environment.config)
    Beginnings.check(data().config)
    with pytest.raises(ConfigError, match="data.id='Nothing-v0' cannot be made"):
        Beginnings.check(data(id="Nothing-v0").config)


@pytest.mark.parametrize(
    "prompt, says",
    [
        (Prompt.of("Cross the lake."), "the prompt has no seed"),
        (Prompt.of("Cross the lake.", seed="0"), "the prompt has no seed"),
        (
            Prompt.of("Cross the lake.\n\n[red S]FFF\nFFFF", seed=0),
            "with the seed 0 begins with .*must name the same environment",
        ),
    ],
)
def test_a_prompt_of_another_environment_is_a_failure(prompt, says):
    with pytest.raises(EnvironmentFailed, match=says):
        say(lake(), Episode(prompt, 0), "left")


@pytest.mark.parametrize(
    "settings",
    [
        ["id=FrozenLake-v1", "settings.render_mode=ansi", "actions={w1: 2, w2: 1, nan: 3, '7': 0}"],  # slippery
        ["id=Guess-v0"],
    ],
    ids=["lake", "guess"],
)
def test_it_conforms(settings):
    overrides = ["backend.threads=1", *(f"environment.{setting}" for setting in settings)]
    found = list(conform("environment", subject("environment", "gymnasium", "torch", overrides=overrides)))
    assert found and [(o.check.name, o.detail) for o in found if o.status != "passed"] == []


def test_the_experiment_of_the_page_can_be_run(tmp_path, monkeypatch):
    section = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8").split("\n## Gymnasium\n")[1].split("\n## ")[0]
    text = textwrap.dedent(section.split("```yaml\n")[1].split("```")[0])
    assert OmegaConf.create(text).experiment_name == "lake"
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "lake.yaml").write_text(text)
    monkeypatch.setitem(registry().conf, "mine", tmp_path)
    environment = Experiment(compose(["experiment=lake", "policy.path=a/b"])).stages["rl"].environment
    environment.component.check(environment.config)
    assert environment.config.actions == WORDS and environment.config.invalid_reward < 0
