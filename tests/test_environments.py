"""The environments that come with it: Python functions as tools, and the miniature's shop."""

import json
from dataclasses import replace
from typing import Literal

import pytest

from listings import python_listings
from lockstep.checking.conformance import conform, subject
from lockstep.config.compose import compose
from lockstep.errors import ConfigError
from lockstep.interfaces import Episode, Reply
from lockstep.learning.episodes import offered
from lockstep.runs.experiment import Experiment
from lockstep.types import Message, Prompt
from lockstep_miniature.dice import Dice
from lockstep_miniature.shop import Questions, Shop, draw
from lockstep_rlhf.environments.tools import Tools, schema


def add(a: int, b: float = 1.0, *, unit: Literal["m", "km"] = "m", note: str | None = None, rest=None) -> str:
    """Adds two numbers.

    Not for the policy.
    """
    return f"{a + b:g} {unit}"


def table(names: list[str]):
    return {name: len(name) for name in names}


def strange():
    return object()


def tools(*names, **settings) -> Tools:
    functions = tuple(f"{__name__}:{name}" for name in names or ("add", "table", "strange"))
    return Tools(Tools.Config(functions=functions, **settings))


def after(environment, text, prompt=None) -> Reply:
    return environment.reply(Episode(prompt or Prompt.of("Hi"), 0, [Message("assistant", text)]))


def call(name, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_a_function_is_described_by_its_name_docstring_and_annotations():
    assert schema("add", add) == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer"},
                    "b": {"type": "number"},
                    "unit": {"enum": ["m", "km"]},
                    "note": {"type": "string"},
                    "rest": {},
                },
                "required": ["a"],
            },
        },
    }
    assert schema("table", table)["function"]["parameters"]["properties"] == {"names": {"type": "array"}}


def test_calls_are_answered_in_order_and_a_turn_without_one_is_the_answer():
    text = f"Let me see. {call('add', a=2, b=3)} And {call('table', names=['ab'])}"
    assert after(tools(), text).messages == (Message("tool", "5 m"), Message("tool", '{"ab": 2}'))
    assert after(tools(), call("add", a=2).removesuffix("</tool_call>")).messages == (Message("tool", "3 m"),)
    assert after(tools(), "It is 5 m.") == Reply.ends()
    assert after(tools(call_begin="[", call_end="]"), '[{"name": "add", "arguments": {"a": 1}}]').messages[0].content == "2 m"


@pytest.mark.parametrize(
    "text, says",
    [
        ("<tool_call>{a</tool_call>", "error: the call is not JSON: Expecting property name"),
        ("<tool_call>" + "[" * 100_000, "error: the call is not JSON"),
        ("<tool_call>[1]</tool_call>", 'error: a call should be {"name": ..., "arguments": {...}}'),
        ('<tool_call>{"name": "add", "arguments": 3}', 'error: a call should be {"name"'),
        ('<tool_call>{"name": ["add"]}', "error: there is no tool ['add']. Tools: add, table, strange."),
        (call("subtract", a=1), "error: there is no tool 'subtract'."),
        (call("add"), "error: TypeError"),
        (call("add", a="x"), "error: TypeError"),
        (call("add", a=1, unit="m", c=3), "error: TypeError"),
    ],
)
def test_what_is_wrong_with_a_call_is_told_to_the_policy(text, says):
    (message,) = after(tools(), text).messages
    assert message.role == "tool" and message.content.startswith(says) and len(message.content) < 400
    assert not after(tools(), text).done


def test_a_result_that_is_no_json_is_shown_all_the_same():
    assert after(tools(), call("strange")).messages[0].content.startswith("<object object")


def test_only_the_policys_turn_is_read_for_calls():
    episode = Episode(Prompt.of(call("add", a=1)), 0, [Message("tool", call("add", a=1)), Message("assistant", "Done.")])
    assert tools().reply(episode) == Reply.ends()


def test_its_tools_are_offered_to_prompts_that_name_none():
    environment, own = tools("add"), Prompt.of("Hi")
    named = replace(own, tools=({"name": "mine"},))
    assert [prompt.tools for prompt in offered(environment, [own, named])] == [(schema("add", add),), named.tools]
    assert offered(None, [own]) == [own] and offered(Shop(Shop.Config()), [own]) == [own]


@pytest.mark.parametrize(
    "functions, says",
    [
        ((f"{__name__}:nothing",), "environment.functions='.*:nothing' cannot be imported"),
        ((f"{__name__}:pytest",), "is no function"),
        ((f"{__name__}:add", f"{__name__}:add"), "names two functions 'add'"),
        ((), "names no function"),
    ],
)
def test_functions_that_cannot_be_called_are_found_before_a_run(functions, says):
    with pytest.raises(ConfigError, match=says):
        Tools.check(Tools.Config(functions=functions))


def test_the_listing_of_the_page_is_an_environment(tmp_path, monkeypatch):
    (tmp_path / "sure.py").write_text(python_listings("docs/environments.md"))
    monkeypatch.syspath_prepend(tmp_path)
    subject_of = lambda name, like: subject("environment", name, "torch", like=like, overrides=["backend.threads=1"])  # noqa: E731
    found = list(conform("environment", subject_of("sure:Sure", "limits")))
    assert found and [(o.check.name, o.detail) for o in found if o.status != "passed"] == []
    assert sum(bool(line.strip()) for line in (tmp_path / "sure.py").read_text().splitlines()) <= 10


# -------------------------------------------------------------------------------------------------------------- the shop


def walk(question, said) -> list[Reply]:
    """The shop's replies to the turns of a policy."""
    shop, episode, replies = Shop(Shop.Config()), Episode(question.prompt(), 0), []
    for text in said:
        episode.messages.append(Message("assistant", text))
        replies.append(shop.reply(episode))
        episode.messages += replies[-1].messages
    return replies


def test_the_shop_counts_and_adds_and_the_answer_is_worth_a_point():
    questions = [draw(Dice(0, "test", i)) for i in range(60)]
    assert {len(question.steps) for question in questions} == {1, 2}
    for question in questions:
        steps = [step for step, _ in question.steps]
        replies = walk(question, [*steps, f"there are {question.answer} ."])
        assert [reply.messages[0].content for reply in replies[:-1]] == [found for _, found in question.steps]
        assert replies[-1] == Reply.ends(1.0)
        numbers = [int(word) for word in question.text.split() if word.isdigit()]
        assert int(question.answer) == (sum(numbers) if numbers else next(iter(question.stock.values())))


@pytest.mark.parametrize(
    "said", ["there are 7 or 8 .", "there are 8 .", "count", "count cup", "7 plus 19", "x plus 8", "", "plus"]
)
def test_what_is_no_step_is_an_answer_and_only_the_right_one_counts(said):
    question = replace(draw(Dice(0, "test", 0)), steps=(("count lamp", "7"),), stock={"lamp": 7}, text="how many lamp ?")
    assert walk(question, [said]) == [Reply.ends(0.0)]
    assert walk(question, ["there are 7 ."]) == [Reply.ends(1.0)]


def test_the_shops_demonstrations_are_single_turns_and_every_word_has_a_token():
    source = Questions(Questions.Config(demonstrations=50))
    tokenizer, unknown = source.tokenizer(), source.tokenizer().core.token_to_id("<unk>")
    for demonstration in source.demonstrations("train"):
        turns = [message.content for message in demonstration.prompt.messages]
        assert len(turns) % 2 == 1
        assert unknown not in tokenizer.encode(" ".join([*turns, demonstration.response]))
    assert source.gold(source.prompts("heldout")[0], "no")["gold"] == 0


# ---------------------------------------------------------------------------------------------------------- experiments


def test_an_environment_that_no_stage_uses_is_an_error():
    with pytest.raises(ConfigError, match="No stage uses environment=shop. Give a stage whose algorithm samples the line"):
        Experiment(compose(["experiment=shop", "~stages.rl", "~stages.evaluate"]))


def test_the_environments_rewards_without_one_are_an_error_before_anything_trains():
    with pytest.raises(
        ConfigError, match="stages.ppo: reward_model=environment scores episodes with an environment, .* Choose one"
    ):
        Experiment(compose(["reward_model=environment", "~stages.reward"]))


def test_an_algorithm_that_does_not_sample_takes_none():
    with pytest.raises(ConfigError, match=r"stages.sft \(sft\) takes no environment. Remove stages.sft.environment"):
        Experiment(compose(["experiment=shop", "+stages.sft.environment=${environment}"]))


def test_the_environment_decides_the_identity_of_the_stages_that_use_it():
    one, other = (Experiment(compose(["experiment=shop", f"environment.turns={n}"])).identities for n in (3, 4))
    assert one["sft"] == other["sft"] and one["rl"] != other["rl"] and one["evaluate"] != other["evaluate"]
    assert "lockstep_miniature" in one["rl"]["code"]
