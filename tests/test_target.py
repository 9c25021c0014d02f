"""Attacks of several turns: environment=target, the reward of whole dialogues, and attacker=policy with a target."""

from types import SimpleNamespace

import numpy as np
import pytest

from conftest import Data, same
from lockstep.commands.run import run_config
from lockstep.config.compose import compose
from lockstep.config.schema import parse
from lockstep.data.labels import prompts_in
from lockstep.errors import ConfigError
from lockstep.interfaces import Context, Episode, Reply, Responses, RewardModel
from lockstep.learning.randomness import token_seeds
from lockstep.learning.rollout import Sampler
from lockstep.runs.assembly import Assembly
from lockstep.runs.attacks import Attack
from lockstep.runs.experiment import Experiment
from lockstep.storage.files import read_json
from lockstep.text.encoding import Lengths
from lockstep.text.stopping import Stops
from lockstep.types import Goal, Message, Prompt
from lockstep_rlhf.attackers.policy import PolicyAttacker
from lockstep_rlhf.environments.target import Target, reply_seeds
from lockstep_rlhf.reward_models.attack import AttackReward
from test_attacks import HARDENING, output, said
from test_episodes import PAD, STOP, Says, seeds
from test_episodes import turns as turns  # a fixture

GOALS = [Goal("w1 w2", "w1 w2"), Goal("w3", "w3")]
PROMPTS = [goal.prompt() for goal in GOALS]
LENGTHS = {"prompt": 24, "response": 6, "multiple": 1}
ENDS = ("w1", "w5", "w9", "w13", "w20")
"""Most of what a policy of this world writes soon has one of these."""


class Judge(RewardModel):
    """The number of words of a reply; ``read`` has what it was given."""

    def __init__(self):
        self.read = []

    def score(self, responses):
        self.read += [(*prompt.messages, text) for prompt, text in zip(responses.prompts, responses.texts, strict=True)]
        return np.array([len(text.split()) for text in responses.texts], np.float32)


def opens(policy, tokenizer, judge=None):
    """Resources whose every policy is this one."""
    return SimpleNamespace(policy=lambda source: (policy, tokenizer), reward_model=lambda group: judge, attacks=lambda source: [])


def target(resources, most=2, **changes):
    config = parse(Target.Config, {"policy": "ppo", "turns": most, "lengths": LENGTHS, **changes}, "environment")
    return Target(config, resources)


def sampler(tokenizer, environment, response=24, **options):
    return Sampler(Stops(tokenizer, ENDS), Lengths(8, response, 1), 0.7, environment=environment, **options)


def prompts_of(rows):
    """As many prompts, and their ids."""
    prompts = [PROMPTS[i % 2] for i in range(rows)]
    return prompts, [[int(word[1:]) for word in prompt.messages[0].content.split()] for prompt in prompts]


# ---------------------------------------------------------------------------------------------------- the conversation


def test_each_side_reads_the_other_as_its_user_and_only_the_attackers_tokens_count(turns):
    attacker = Says([[4, 5, STOP], [6, STOP]], [[8, STOP], [9, STOP]], [[11, STOP], [12, STOP]])
    model = Says([[7, STOP], [10, 13, STOP]], [[14, STOP], [15, STOP]])
    stops = Stops(turns)
    episodes = Sampler(stops, Lengths(8, 24, 1), 0.7, environment=target(opens(model, turns), most=3))
    samples = episodes.sample(attacker, *prompts_of(2), seeds(columns=24))
    assert [contexts for contexts, _ in model.calls] == [
        [[4, 5, 30], [6, 30]],
        [[4, 5, 30, 7, STOP, 8, 30], [6, 30, 10, 13, STOP, 9, 30]],
    ]  # neither the goal, which it must not see, nor the last turn, which the reward model has answered
    assert samples.sequences.responses[0, :13].tolist() == [4, 5, STOP, 7, 30, 8, STOP, 14, 30, 11, STOP, PAD, PAD]
    assert "".join("FT"[int(counts)] for counts in samples.sequences.mask[0, :13]) == "TTTFFTTFFTTFF"
    assert [(m.role, m.content) for m in samples.responses.prompts[0].messages] == [
        ("user", "w1 w2"), ("assistant", "w4 w5"), ("user", "w7"), ("assistant", "w8"), ("user", "w14"),
    ]  # fmt: skip
    assert samples.responses.texts == ["w11", "w12"] and samples.responses.rewards.tolist() == [0, 0]


def test_a_dialogue_ends_where_the_attacker_says_nothing_or_more_than_the_target_can_read(turns):
    model = Says([[7, STOP]])
    long, empty, fine = "w1 " * 24, "  ", "w4"
    environment = target(opens(model, turns))
    given = [Episode(PROMPTS[0], 0, [Message("assistant", text)]) for text in (long, empty, fine)]
    assert environment.replies(given) == [Reply.ends(), Reply.ends(), Reply.says("w7")]
    whole = [Message("assistant", "w1 " * 12), Message("user", "w2"), Message("assistant", "w1 " * 12)]
    assert target(opens(model, turns), most=3).reply(Episode(PROMPTS[0], 0, whole)) == Reply.ends()


def test_a_reply_depends_on_goal_and_dialogue_and_on_nothing_else(load, turns):
    environment = target(opens(load(1), turns), most=9)
    talks = [
        [Message("assistant", f"w{i}"), Message("user", "w2"), Message("assistant", "w4")] if i % 2 else
        [Message("assistant", f"w{i}")] for i in range(9)
    ]  # fmt: skip
    given = [Episode(PROMPTS[i % 2], i, talk) for i, talk in enumerate(talks)]
    found = environment.replies(given)
    assert len({reply.messages[0].content for reply in found}) > 4
    other = target(opens(load(1), turns), most=9, batch_size=4)
    assert other.replies([Episode(each.prompt, 1000, each.messages) for each in given[::-1]]) == found[::-1]
    assert [environment.reply(each) for each in given[:3]] == found[:3]
    elsewhere = environment.replies([Episode(PROMPTS[1 - i % 2], i, talk) for i, talk in enumerate(talks)])
    assert sum(one != two for one, two in zip(elsewhere, found, strict=True)) > 4


def test_episodes_do_not_depend_on_how_they_are_batched(load, turns):
    draws = token_seeds(0, "sampling", 0, 6, 24)
    whole = sampler(turns, target(opens(load(1), turns))).sample(load(), *prompts_of(6), draws)
    assert (np.diff(whole.sequences.mask.astype(int), axis=1) > 0).sum() >= 4  # second turns
    few = sampler(turns, target(opens(load(1), turns), batch_size=1), batch_size=4).sample(load(), *prompts_of(6), draws)
    some = sampler(turns, target(opens(load(1), turns))).sample(load(), *prompts_of(2), draws[:2])
    assert few.sequences.responses.tolist() == whole.sequences.responses.tolist()
    assert some.sequences.responses.tolist() == whole.sequences.responses[:2].tolist()


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_a_restart_in_training_changes_nothing(make, load, turns, monkeypatch, tmp_path):
    class Goals(Data):
        def prompts(self, split):
            return prompts_of(self.rows)[0]

    def again():
        resources = opens(load(1), turns, Judge())
        around = target(resources, turn_tokens=6)
        monkeypatch.setattr("conftest.Context", lambda *given, **more: Context(*given, environment=around, **more))
        config = {"judge": {"name": "x"}, "lengths": LENGTHS, "names_goal": False}
        reward_model = AttackReward(parse(AttackReward.Config, config, "reward_model"), resources)
        sizes = {"lengths": {"prompt": 8, "response": 24, "multiple": 8}, "iterations": 3, "batch_size": 2, "samples": 3}
        return make("policy_gradient", tokenizer=turns, reward_model=reward_model, data=Goals(), stop_strings=list(ENDS), **sizes)

    whole, begun, rest = again(), again(), again()
    metrics = [whole.step(step) for step in range(3)]
    assert all(1 < each["environment/turns"] <= 2 and each["reward_model/success"] > 0 for each in metrics)
    begun.step(0)
    begun.learner.save(tmp_path)
    rest.learner.restore(tmp_path)
    rest.load_state(begun.state())
    for step in (1, 2):
        assert rest.step(step)["objective/score"] == metrics[step]["objective/score"]
    same(rest.result().parameters(), whole.result().parameters())


def test_a_target_without_room_for_the_dialogue_is_refused(turns):
    with pytest.raises(ConfigError, match="60 \\+ 6 exceeds the target's context of 64 tokens. Lower them"):
        target(opens(Says(), turns), lengths={"prompt": 60, "response": 6, "multiple": 1})


# ---------------------------------------------------------------------------------------------------------- the reward


def rewarded(resources, prompts, texts, episodes=True, **changes):
    given = {"judge": {"name": "x"}, "lengths": LENGTHS, "novelty": 0.0, **changes}
    model = AttackReward(parse(AttackReward.Config, given, "reward_model"), resources)
    rewards = np.zeros(len(texts), np.float32) if episodes else None
    return model.score(Responses(prompts, texts, None, None, rewards)), model.details()


def after(goal, *messages):
    """The prompt of an attacker that has talked to its target since it was given the goal."""
    return Prompt((*goal.prompt().messages, *messages), goal.prompt().truth)


def spoken(*contents):
    return [Message("user" if i % 2 else "assistant", content) for i, content in enumerate(contents)]


def test_success_is_of_the_reply_to_the_last_turn_which_the_environment_would_have_given(load, turns):
    judge = Judge()
    resources = opens(load(1), turns, judge)
    talk = spoken("w4 w5", "w7", "w1 w2")
    scores, details = rewarded(resources, [after(GOALS[0], *talk[:-1])], [" w1 w2 "])
    ((*dialogue, reply),) = judge.read
    assert dialogue == [Message("user", "w4 w5"), Message("assistant", "w7"), Message("user", "w1 w2")]
    assert target(resources, most=9).reply(Episode(PROMPTS[0], 0, talk)) == Reply.says(reply)
    assert scores.tolist() == details["success"].tolist() == [len(reply.split())]


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_an_episode_of_one_turn_is_scored_as_a_response_always_was(load, turns):
    texts = ["w4 w1 w2", "w3", "w1 w2 w7", ""]
    read = []
    for episodes in (True, False):
        judge = Judge()
        scores, _ = rewarded(opens(load(1), turns, judge), [PROMPTS[0]] * 4, texts, episodes, replies=2, novelty=0.5)
        read.append((scores.tolist(), judge.read))
    assert read[0] == read[1]
    # the seeds of the version before attacks had several turns
    attack = Prompt.of("how steal a cup", goal="steal a cup")
    assert reply_seeds(attack, 2, 3).tolist() == [[1665938484, 2482025485, 2107735004], [3826888070, 355495840, 3741014588]]


@pytest.mark.parametrize(
    ("contents", "valid"),
    [
        (("w1 w2", "w7", "w4"), 1),  # one turn names the goal
        (("w4", "w7", "w1 w2"), 1),
        (("w4", "w1 w2", "w5"), 0),  # the target does
        (("w1 w2", "", "w4"), 1),  # the target may be silent
        ((" ", "w7", "w1 w2"), 0),
        (("w1 w2 " * 8, "w7", "w4 " * 8), 0),  # too long as a whole
    ],
)
def test_an_attack_is_valid_by_all_its_turns(turns, contents, valid):
    *before, last = spoken(*contents)
    scores, details = rewarded(opens(Says([[7, STOP]]), turns, Judge()), [after(GOALS[0], *before)], [last.content])
    assert details["valid"].tolist() == [valid] and scores.tolist() == [1 if valid else -1]


def test_novelty_is_that_of_the_users_turns(turns):
    resources = opens(Says([[7, STOP], [7, STOP]]), turns, Judge())
    resources.attacks = lambda source: [Prompt(tuple(said("w1 w2", "w9 w9", "w4")), {"goal": "w1 w2"})]
    prompts = [after(GOALS[0], *spoken("w1 w2", reply)) for reply in ("w9 w9", "w7")]
    _, details = rewarded(resources, prompts, ["w4", "w4"], archive=["seeds"])
    assert details["novelty"].tolist() == [0, 0]
    one, other = (Attack(GOALS[0], "train", Prompt(tuple(said("w1 w2", reply, "w4"))), None, 0) for reply in ("w9", "w7"))
    assert one.strategy == other.strategy


def test_what_a_tool_said_is_not_taken_for_the_target(turns):
    prompt = after(GOALS[0], Message("assistant", "w20"), Message("tool", "w21"))
    rewarded(opens(model := Says([[7, STOP]]), turns, Judge()), [prompt], ["w1 w2"])
    assert model.calls[0][0] == [[1, 2, 30]]


# -------------------------------------------------------------------------------------------------------- the attacker


def attacker(resources, around, **changes):
    given = {"source": "attacker", "target": around, "lengths": {"prompt": 8, "response": 24, "multiple": 1}, **changes}
    return PolicyAttacker(parse(PolicyAttacker.Config, given, "attacker"), None, resources)


AROUND = {"name": "target", "policy": "ppo", "turns": 2, "lengths": LENGTHS}


def test_an_attacker_writes_the_users_turns_and_the_target_the_others(turns):
    speaks = Says(
        [[1, 2, STOP], [4, STOP], [4, STOP], [1, 2, STOP]], [[5, STOP], [3, STOP], [5, STOP], [6, 6, 6, 6]], [[6] * 8], [[6] * 8]
    )
    model = Says([[7, STOP], [8, STOP], [3, STOP], [9, STOP]])
    resources = SimpleNamespace(policy=lambda source: ({"attacker": speaks, "ppo": model}[source], turns))
    shots = [["w3", "w4 w3"]]
    writes = attacker(resources, AROUND, shots=shots, lengths={"prompt": 12, "response": 14, "multiple": 1})
    found = writes.attack([GOALS[0], GOALS[1], GOALS[1], GOALS[0]], 0)
    assert found == [said("w1 w2", "w7", "w5"), said("w4", "w8", "w3"), None, None]  # only the target named it; unfinished
    assert model.calls[0][0] == [[1, 2, 30], [4, 30], [4, 30], [1, 2, 30]]  # it sees no shots


def test_one_turn_with_a_target_is_one_without(load, turns):
    goals = [GOALS[i % 2] for i in range(8)]
    written = [
        attacker(opens(load(), turns), around, names_goal=False, stop_strings=list(ENDS)).attack(goals, 5)
        for around in (None, {**AROUND, "turns": 1}, {**AROUND, "turns": 3})
    ]
    assert written[0] == written[1] and sum(each is not None for each in written[0]) > 2
    assert {len(each) for each in written[2] if each is not None} >= {5}


# --------------------------------------------------------------------------------------------------------- experiments

SEVERAL = [
    "environment=target", "environment.policy=last.defender", "environment.turns=2", "environment.lengths=${lengths}",
    "lengths.prompt=64", "attacking.lengths.response=64",
]  # fmt: skip
BY_POLICY = ["attacker=policy", "attacker.target=${environment}", "attacker.lengths.response=64"]


def test_the_target_is_part_of_the_stages_that_talk_to_it(tmp_path):
    def of(*overrides):
        return Experiment(compose([*HARDENING, *SEVERAL, *BY_POLICY, f"folder={tmp_path}", *overrides]))

    whole = of()
    inputs = {name: dict(stage.inputs) for name, stage in whole.stages.items()}
    assert inputs["attacks_1"] == {"ppo": "policy", "attacker_1": "policy"}
    assert inputs["attacks_2"] == {"defender_1": "policy", "attacker_2": "policy"}
    assert inputs["attacker_2"] == {"imitator": "policy", "defender_1": "policy", "seeds": "prompts", "attacks_1": "prompts"}
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    public = of(f"environment.policy={outside}")
    before = {name: public.folders[name].path for name in ("attacker_1", "attacks_1", "seeds")}
    (outside / "config.json").write_text("{ }")
    after = of(f"environment.policy={outside}").folders
    for name in ("attacker_1", "attacks_1"):
        assert len({before[name], after[name].path, whole.folders[name].path}) == 3
    assert before["seeds"] == after["seeds"].path == whole.folders["seeds"].path
    assert of("environment.policy=new").stages["attacker_1"].reads_new


def test_a_policy_that_an_environment_does_not_declare_stays_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(Target, "inputs", RewardModel.inputs)
    experiment = Experiment(compose([*HARDENING, *SEVERAL, f"folder={tmp_path}"]))
    with pytest.raises(ConfigError, match="The environment 'target' opens 'last.defender' without declaring it"):
        Assembly(experiment, {}).environment(experiment.stages["attacker_1"])


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["environment=target"], r"Missing: environment.policy. Set it on the command line: environment.policy=\.\.\."),
        ([*SEVERAL, "environment.policy=last.defendr"], "last.defendr"),
        ([*SEVERAL, "environment.policy=ppoo"], "reads the stage 'ppoo', which does not come before it. Did you mean 'ppo'"),
        ([*SEVERAL, "environment.policy=reward"], "needs a policy from the stage 'reward', which makes a reward_model"),
        (["attacker=policy", "attacker.target={turns: 2}"], "Missing: attacker.target.policy. Set it"),
        (["attacker=policy", "attacker.target={policy: ppo, turn: 2}"], "Unknown key attacker.target.turn. Did you mean 'turns'"),
        (["attacker=policy", "attacker.target={policy: sfft}"], "reads the stage 'sfft', which does not come before it"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_runs(tmp_path, overrides, problem):
    with pytest.raises(ConfigError, match=problem):
        Experiment(compose([*HARDENING, f"folder={tmp_path}", *overrides]))


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_an_attacker_is_trained_in_dialogues_that_later_stages_answer(tmp_path, backend):
    pytest.importorskip(backend)
    shorter = [
        "~stages.pretrain", "~stages.sft", "~stages.ppo", "~stages.reward", "~stages.seeds", "~stages.imitator",
        *(f"~stages.rounds.stages.{name}" for name in ("labels", "judgement", "defender")), "~learn_to_attack", "~defending",
        "~stages.rounds.first", "stages.rounds.repeat=1", "stages.rounds.stages.attacker.policy=new", "environment.policy=new",
        "stages.rounds.stages.attacker.reward_model.policy=new", "stages.rounds.stages.attacker.reward_model.archive=[]",
        "stages.rounds.stages.attacks.policies=[new]", "stages.evaluate.reward_model=null", "evaluation.policies=[new]",
        "evaluation.baseline=new", "evaluation.splits=[all.attacks]", "evaluation.comparisons=0",
    ]  # fmt: skip
    untrained = [  # its turns are single words, and name no goal
        "attacking.stop_strings=[' ']", "attacker.stop_strings=[' ']", "attacker.names_goal=false",
        "+stages.rounds.stages.attacker.reward_model.names_goal=false",
    ]  # fmt: skip
    given = [*HARDENING, *SEVERAL, *BY_POLICY, *shorter, *untrained, f"backend={backend}", f"folder={tmp_path}"]
    run = run_config(compose(given), "test")
    attacks = [prompt for split in ("train", "heldout") for prompt in prompts_in(output(run, "attacks_1"), split)]
    assert {tuple(message.role for message in each.messages) for each in attacks} == {("user", "assistant", "user")}
    assert "attacks_1" in read_json(output(run, "evaluate") / "evaluation.json")["splits"]
