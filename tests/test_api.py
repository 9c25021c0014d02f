"""The Python API: what a person in a notebook sees. The listings are those of README.md, docs/api.md and docs/examples."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lockstep
from conftest import BACKENDS
from listings import ROOT, python_listings, run_listings
from lockstep.api import items, sampling
from lockstep.api import results as results_module
from lockstep.api.sampling import Sampling
from lockstep.commands import chat
from lockstep.config.compose import compose
from lockstep.config.schema import parse
from lockstep.errors import CheckpointError, ConfigError, DataError, Diverged, MissingData, RegistryError, RewardError
from lockstep.interfaces import Generated, Policy
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Comparison, Demonstration, Message, Prompt, ToolCall
from lockstep_miniature.shop import Questions, Shop
from lockstep_miniature.source import Miniature
from reward_functions import shortness
from runs import DECODER, PPO_ONLY, TINY, tiny

SMALL = {"layers": 1, "hidden_size": 32, "heads": 2, "kv_heads": 2, "intermediate_size": 48, "context_length": 64}
QUESTION = "what does wug eat ?"
FEW = {"batch_size": 4, "value_network": "shared", "lengths": {"response": 6}}


@pytest.fixture(autouse=True)
def one_thread():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new(backend: str = "torch", **settings) -> lockstep.ChatPolicy:
    pytest.importorskip(backend)
    return lockstep.new_policy({"name": backend, **BACKENDS[backend]}, **{**SMALL, **settings})


@pytest.fixture
def policy():
    return new()


SHOP = Shop(Shop.Config(turn_tokens=4))


def test_a_policy_converses_with_an_environment_and_its_rewards_count(policy):
    prompts = Questions(Questions.Config(prompts=4)).prompts("train")
    limits = {"batch_size": 2, "samples": 2, "lengths": {"response": 20}, "iterations": 2}
    alone = lockstep.train(policy, "rloo", prompts=prompts, environment=SHOP, **limits).metrics
    assert alone["environment/reward"].tolist() == alone["objective/score"].tolist() and set(alone["environment/turns"]) == {1}
    scored = lockstep.train(policy, "rloo", prompts=prompts, environment=SHOP, reward=lengths, **limits).metrics
    assert scored["objective/score"].tolist() != alone["objective/score"].tolist()


def lengths(prompts, responses):
    return [len(response.split()) / 10 for response in responses]


# ------------------------------------------------------------------------------------------------------------ listings


def test_importing_lockstep_is_light_and_its_names_are_there():
    program = """
import sys, lockstep
def loaded(*heavy): return set(heavy) & set(sys.modules)
assert not (found := loaded("torch", "jax", "pandas", "hydra", "rich", "numpy")), found
assert set(lockstep.__all__) <= set(dir(lockstep))
for name in lockstep.__all__: getattr(lockstep, name)
assert not (found := loaded("torch", "jax", "pandas")), found
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_name_that_is_not_there_is_guessed():
    with pytest.raises(AttributeError, match="no attribute 'new_polcy'. Did you mean 'new_policy'?"):
        lockstep.new_polcy  # noqa: B018


def test_ten_lines_of_the_readme_improve_a_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_listings(python_listings("README.md", "Ten lines of Python"))
    reward, prompts = names["reward"], names["prompts"] * 20
    before, after = (
        np.mean(reward(prompts, names[name].respond(prompts, max_tokens=8, seed=5))) for name in ("policy", "better")
    )
    assert before < 0.5 and after > 0.75, (before, after)
    assert lockstep.load("my-policy", "torch").chat(QUESTION, max_tokens=8) == names["better"].chat(QUESTION, max_tokens=8)


def test_the_listings_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = lambda overrides: compose([*TINY, *DECODER, *overrides])  # noqa: E731
    monkeypatch.setattr(results_module, "compose", small)
    names = run_listings(python_listings("docs/api.md"))
    assert [m.role for m in names["conversation"].messages] == ["system", "user", "assistant"]
    assert names["another"] == names["conversation"].messages[-1].content
    metrics = names["run"].metrics
    assert metrics.loc["ppo", "objective/score"].notna().sum() == 3
    assert names["run"].status == "done"
    evaluation = names["run"].evaluation
    assert evaluation.loc[("heldout", "ppo", "gold"), "n"] == 6
    assert evaluation.loc[("reward_model", "", "accuracy/gold"), "mean"] <= 1
    table = names["table"]
    assert set(table.stage) == {"pretrain", "sft", "reward", "ppo", "ppo_ptx", "evaluate"}
    (value,) = table[(table.stage == "ppo") & (table.metric == "objective/score") & (table.step == 0)].value
    assert value == metrics.loc[("ppo", 0), "objective/score"]
    stage = names["run"].outputs("policy")["ppo"].parent  # a stage's own folder is a source too
    assert lockstep.load(stage).chat(QUESTION, seed=3) == names["run"].policy("ppo").chat(QUESTION, seed=3)
    assert list(names["run"].outputs("reward_model")) == ["reward"]
    with pytest.raises(CheckpointError, match="no stage 'stf' with a policy. Did you mean 'sft'?"):
        names["run"].policy("stf")
    with pytest.raises(CheckpointError, match="holds a reward model, not a policy"):
        lockstep.load("my-scorer")


def test_every_name_and_method_is_on_the_page():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    table = page.split("\n\n")[2]
    assert set(re.findall(r"^\| `lockstep\.(\w+)`", table, re.MULTILINE)) == set(lockstep.__all__)
    for cls in (lockstep.ChatPolicy, lockstep.Conversation, lockstep.Scorer, lockstep.Run):
        public = {name for name in vars(cls) if not name.startswith("_")} - set(getattr(cls, "__dataclass_fields__", ()))
        missing = {name for name in public - {"read", "system"} if f"`{name}`" not in table}
        assert not missing, (cls, missing)


def test_the_example_runs_and_its_notebook_is_the_same(tmp_path, monkeypatch):
    script = (ROOT / "docs" / "examples" / "first_steps.py").read_text(encoding="utf-8")
    written = run_listings((ROOT / "docs" / "examples" / "notebook.py").read_text(encoding="utf-8"))["written"]
    assert (ROOT / "docs" / "examples" / "first_steps.ipynb").read_text(encoding="utf-8") == written(script)
    monkeypatch.chdir(tmp_path)
    names = run_listings(script)
    assert names["tuned"].chat("what colour is jarl ?", temperature=0) == "jarl is gold ."
    plums = [sum("plums" in answer for answer in names["food"][when]) for when in ("before", "after")]
    assert plums[0] <= 6 and plums[1] == 8, plums


# ------------------------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_stream_is_the_text_of_chat_and_a_seed_decides_it(backend):
    policy = new(backend)
    texts = [policy.chat(QUESTION, max_tokens=10, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    pieces = list(policy.stream(QUESTION, max_tokens=10, seed=0))
    assert "".join(pieces) == texts[0] and len(pieces) > 3
    assert policy.respond([QUESTION], max_tokens=10, seed=1) == texts[2:]
    greedy = policy.chat(QUESTION, max_tokens=5, temperature=0)
    assert greedy == "".join(policy.stream(QUESTION, max_tokens=5, temperature=0, seed=7))


def test_both_backends_say_the_same():
    said = [new(backend).respond([QUESTION, "where does dax live ?"], max_tokens=10) for backend in ("torch", "jax")]
    assert said[0] == said[1]


@pytest.mark.parametrize("number", [2, 3])
def test_tokens_that_are_streamed_are_those_of_generate(backend, load, number):
    policy = load()
    tokens, seeds = np.arange(6, dtype=np.int32).reshape(2, 3), np.arange(22, dtype=np.uint32).reshape(2, 11)
    how = {"temperature": 0.9, "stop_ids": [number, 20 + number], "pad_id": 36}
    drawn = policy.generate(tokens, np.ones((2, 3), bool), seeds, **how)
    streamed = np.array(list(policy.stream(tokens, np.ones((2, 3), bool), seeds, **how)))
    np.testing.assert_array_equal(streamed.T, drawn.tokens[:, : drawn.mask.any(axis=0).sum()])
    default = np.array(list(Policy.stream(policy, tokens, np.ones((2, 3), bool), seeds, **how)))
    np.testing.assert_array_equal(default, streamed)


class Scripted:
    """Gives these tokens, whatever the prompt."""

    context_length = 1000

    def __init__(self, ids):
        self.ids = ids

    def stream(self, tokens, mask, seeds, **how):
        return iter(np.array(self.ids, np.int32)[:, None])

    def generate(self, tokens, mask, seeds, **how):
        ids = np.array([self.ids], np.int32)
        return Generated(ids, np.ones(ids.shape, bool), np.zeros(ids.shape, np.float32))


@pytest.fixture(scope="module")
def bytewise() -> Tokenizer:
    """A token for each byte, as byte-level BPE falls back to."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<eos>"])
    return Tokenizer(core, eos_token="<eos>", pad_token=None, chat_template=None)


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        ("aé🎉b", [], ["a", "é", "🎉", "b"]),
        ("ab\nHuman: x", ["\nHuman:"], ["a", "b"]),
        ("a\nHumb", ["\nHuman:"], ["a", "\nHumb"]),
        ("a\né", ["\n\n"], ["a", "\né"]),
    ],
)
def test_pieces_are_whole_characters_and_no_beginning_of_a_stop_string(bytewise, text, stop, pieces):
    scripted = Scripted(bytewise.encode(text) + [bytewise.eos_id])
    how = Sampling(len(scripted.ids), 1.0, stop, 0)
    assert list(sampling.stream(scripted, bytewise, [1], how)) == pieces
    assert sampling.respond(scripted, bytewise, [[1]], how) == ["".join(pieces)]


def test_a_response_cut_within_a_character_is_streamed_as_it_is_decoded(bytewise):
    scripted = Scripted(bytewise.encode("aé")[:-1])
    how = Sampling(2, 1.0, (), 0)
    assert (
        "".join(sampling.stream(scripted, bytewise, [1], how)) == sampling.respond(scripted, bytewise, [[1]], how)[0] == "a\ufffd"
    )


def test_a_long_dialogue_loses_its_oldest_turns(policy):
    long = [{"role": role, "content": "fish " * 12} for role in ("user", "assistant", "user", "assistant")]
    last = [{"role": "user", "content": QUESTION}]
    assert policy.chat([*long, *last], max_tokens=24) == policy.chat([*long[2:], *last], max_tokens=24)
    with pytest.raises(DataError, match="The prompt has more than 40 tokens: the context holds 64, of which max_tokens=24"):
        policy.chat("fish " * 60, max_tokens=24)
    with pytest.raises(ConfigError, match="max_tokens=64 leaves no room for a prompt in a context of 64 tokens"):
        policy.chat(QUESTION, max_tokens=64)
    for key, value in (
        ("max_tokens", 0), ("max_tokens", 1.5), ("temperature", math.nan), ("temperature", math.inf), ("temperature", 1e-40),
        ("temperature", "1"), ("seed", -1), ("seed", 1.5), ("stop", "eats"), ("stop", [1]),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"^{key}(\[0\])?=\S+ (must|should) be "):
            policy.chat(QUESTION, **{key: value})
    assert policy.chat(QUESTION, max_tokens=np.int64(3), seed=np.uint32(2)) == policy.chat(QUESTION, max_tokens=3, seed=2)


def test_a_conversation_keeps_what_was_said_and_what_was_interrupted(policy):
    conversation = policy.conversation(max_tokens=6)
    stream = conversation.say(QUESTION)
    first = next(stream)
    stream.close()
    assert conversation.messages == [Message("user", QUESTION), Message("assistant", first)]
    again = "".join(conversation.regenerate())
    assert conversation.messages == [Message("user", QUESTION), Message("assistant", again)]
    dialogue = [{"role": m.role, "content": m.content} for m in conversation.messages] + [{"role": "user", "content": "why ?"}]
    answer = "".join(conversation.say("why ?"))
    assert answer != policy.chat(dialogue, max_tokens=6)  # each turn draws anew ...
    assert answer == policy.tokenizer.decode(policy.tokenizer.encode(answer))
    with pytest.raises(DataError, match="Say something first"):
        list(policy.conversation().regenerate())


def test_keys_names_and_places_that_do_not_exist_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"Unknown key policy.layer. Did you mean 'layers'?"):
        new(layer=2)
    with pytest.raises(RegistryError, match="Did you mean 'torch'?"):
        lockstep.new_policy("torhc")
    with pytest.raises(CheckpointError, match="is not the folder of a run"):
        lockstep.Run(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder|cannot be opened"):
        lockstep.load(tmp_path / "nothing", "torch")
    with pytest.raises(DataError, match="Expected a list of texts, not one"):
        new().respond(QUESTION)
    with pytest.raises(CheckpointError, match="stage='sft' needs a run folder"):
        lockstep.load(tmp_path, stage="sft")


def test_a_public_checkpoint_that_pads_with_eos_is_opened(policy, tmp_path):
    policy.save(tmp_path)
    (tmp_path / "output.json").unlink()
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"<pad>"', '"<eos>"'))
    loaded = lockstep.load(tmp_path, "torch")
    assert (loaded.name, loaded.tokenizer.pad_token) == ("huggingface", "<|pad|>")
    assert loaded.chat(QUESTION, max_tokens=6) == policy.chat(QUESTION, max_tokens=6)


def test_adapters_on_a_checkpoint_are_a_new_policy(policy, tmp_path):
    base = policy.save(tmp_path / "base")
    adapter = lockstep.new_policy(policy.backend, policy="lora", path=str(base), rank=2)
    assert adapter.name == "lora" and adapter.tokenizer.core.to_str() == policy.tokenizer.core.to_str()
    assert adapter.chat(QUESTION, max_tokens=6) == policy.chat(QUESTION, max_tokens=6)
    learned = {"demonstrations": [(QUESTION, "wug eats plums .")], "epochs": 4, "batch_size": 1}
    tuned = lockstep.train(adapter, "sft", **learned, optimizer={"learning_rate": 0.05})
    again = lockstep.load(tuned.save(tmp_path / "adapter"), policy.backend)
    assert again.name == "lora" and set(again.policy.parameters()) == set(tuned.policy.parameters())
    assert again.chat(QUESTION, max_tokens=6) == tuned.chat(QUESTION, max_tokens=6) != policy.chat(QUESTION, max_tokens=6)


# ------------------------------------------------------------------------------------------------------------- training


def test_sft_teaches_an_answer_and_leaves_the_policy_alone(policy):
    before = policy.policy.parameters()
    settings = {"epochs": 60, "batch_size": 2, "optimizer": {"learning_rate": 0.01}}
    tuned = lockstep.train(
        policy, "sft", demonstrations=[(QUESTION, "wug eats plums ."), ("where does dax live ?", "in the lake .")], **settings
    )
    assert tuned.respond([QUESTION, "where does dax live ?"], temperature=0) == ["wug eats plums .", "in the lake ."]
    assert tuned.metrics.index.name == "step" and len(tuned.metrics) == 60
    assert tuned.metrics["loss"].iloc[59] < 0.5 < tuned.metrics["loss"].iloc[0]
    for name, array in policy.policy.parameters().items():
        np.testing.assert_array_equal(array, before[name])


def test_texts_and_comparisons_make_a_language_model_and_a_scorer(policy, tmp_path):
    trained = lockstep.train(policy, "pretrain", texts=["wug eats plums", "dax lives in the lake"], epochs=3, batch_size=2)
    assert isinstance(trained, lockstep.ChatPolicy) and "heldout/loss" not in trained.metrics
    pairs = [(QUESTION, "plums", "boat"), ("where does dax live ?", ["in the lake .", "forest", "plums"], [0, 1, 2])]
    scorer = lockstep.train(policy, "reward_modelling", comparisons=pairs, epochs=40, batch_size=2)
    assert isinstance(scorer, lockstep.Scorer)
    scores = scorer.score([QUESTION] * 2 + ["where does dax live ?"] * 3, ["plums", "boat", "in the lake .", "forest", "plums"])
    assert scores[0] > scores[1] and scores[2] > scores[3] > scores[4]
    again = lockstep.Scorer.load(scorer.save(tmp_path), policy.backend)
    np.testing.assert_array_equal(again.score([QUESTION], ["plums"]), scorer.score([QUESTION], ["plums"]))
    best = lockstep.train(policy, "ppo", prompts=[QUESTION], reward=scorer, iterations=1, batch_size=4)
    assert np.isfinite(best.metrics["objective/score"][0])
    with pytest.raises(DataError, match="Got 1 prompts for 2 responses"):
        scorer.score([QUESTION], ["plums", "bread"])


def test_ppo_gives_the_function_dialogues_and_texts(policy):
    seen = []

    def reward(prompts, responses):
        seen.append((prompts, responses))
        return lengths(prompts, responses)

    dialogue = [{"role": "system", "content": "you are kind ."}, {"role": "user", "content": QUESTION}]
    better = lockstep.train(policy, "ppo", prompts=[dialogue], reward=reward, iterations=2, **FEW)
    assert [(prompts, len(responses)) for prompts, responses in seen] == [([dialogue] * 4, 4)] * 2
    assert better.metrics["objective/score"].tolist() == pytest.approx([np.mean(lengths(None, texts)) for _, texts in seen])


def test_a_reward_function_sees_what_is_known_about_the_prompts(policy):
    seen = []

    def reward(prompts, responses, answer, level=None):
        seen.append((answer, level))
        return lengths(prompts, responses)

    prompts = [Prompt.of(QUESTION, answer="2"), {"prompt": QUESTION, "truth": {"answer": "2"}}]
    lockstep.train(policy, "ppo", prompts=prompts, reward=reward, iterations=1, **FEW)
    assert seen == [(["2"] * 4, None)]
    with pytest.raises(RewardError, match="parameter 'answer' has no default, so it needs the column 'answer'"):
        lockstep.train(policy, "ppo", prompts=[QUESTION], reward=reward, iterations=1, **FEW)


def test_jax_trains_as_torch_does():
    found = [
        lockstep.train(new(backend), "ppo", prompts=[QUESTION], reward=lengths, iterations=2, epochs=1, **FEW).metrics
        for backend in ("torch", "jax")
    ]
    for name in ("objective/score", "objective/length", "objective/entropy", "policy/loss", "value/loss"):
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=2e-3, atol=1e-5, err_msg=name)


def test_training_is_that_of_lockstep_run(tmp_path):
    stages = ["~stages.pretrain", "~stages.sft", "~stages.reward", *PPO_ONLY, "stages.ppo.policy=new"]
    settings = ["reward_model=function", "reward_model.function=reward_functions:shortness", "backend.threads=1"]
    run = lockstep.Run(tiny(tmp_path, *stages, *settings, "algorithm.ptx_ratio=8"))
    config = run.config
    source = Miniature(parse(Miniature.Config, {k: v for k, v in config["data"].items() if k != "name"}, "data"))
    shape = {key: config["policy"][key] for key in ("layers", "hidden_size", "heads", "kv_heads", "intermediate_size")}
    policy = lockstep.new_policy(config["backend"], **shape)
    trained = lockstep.train(
        policy, "ppo", prompts=source.prompts("train"), reward=shortness, iterations=3, batch_size=8, epochs=1
    )  # fmt: skip
    theirs = run.metrics.loc["ppo"]
    names = [name for name in trained.metrics if not name.startswith("perf/")]
    assert {"objective/score", "policy/loss", "grad_norm/policy", "sampler/mismatch_max"} <= set(names) <= set(theirs)
    for name in names:
        assert trained.metrics[name].tolist() == theirs[name].tolist(), name
    assert run.policy().chat(QUESTION) == trained.chat(QUESTION)


def test_ctrl_c_returns_what_there_is(policy):
    calls = []

    def reward(prompts, responses):
        calls.append(os.kill(os.getpid(), signal.SIGINT) if len(calls) == 1 else None)
        return lengths(prompts, responses)

    before = signal.getsignal(signal.SIGINT)
    better = lockstep.train(policy, "ppo", prompts=[QUESTION], reward=reward, iterations=9, **FEW)
    assert len(better.metrics) == len(calls) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_parameters_that_the_last_step_spoilt_are_an_error(policy, monkeypatch):
    """The last step's own loss and gradients are those from before its update."""
    from lockstep_torch.learner import TorchLearner

    update = TorchLearner.update

    def spoil(self, *given, **how):
        metrics = update(self, *given, **how)
        next(iter(self.models["policy"].tensors().values())).data.fill_(np.nan)
        return metrics

    monkeypatch.setattr(TorchLearner, "update", spoil)
    with pytest.raises(Diverged, match=r"stopped after step 1 of 1: policy\.\S+ is not finite"):
        lockstep.train(policy, "sft", demonstrations=[(QUESTION, "wug eats plums .")], batch_size=1, epochs=1)


def refuses(policy, error, message, algorithm="ppo", **given):
    given = {"prompts": [QUESTION], "reward": lengths, **FEW} | given if algorithm == "ppo" else given
    with pytest.raises(error, match=message):
        lockstep.train(policy, algorithm, **given)


def test_what_cannot_be_trained_is_refused_with_what_to_do(policy):
    def breaks(prompts, responses):
        raise ZeroDivisionError

    refuses(policy, ZeroDivisionError, None, reward=breaks)
    refuses(policy, RewardError, "it gave 3 scores for 4 responses", reward=lambda p, r: [1.0] * 3)
    refuses(policy, RewardError, "it gave 3 scores for 4 responses", reward=lambda p, r: r.pop() and [1.0] * len(r))
    refuses(policy, RewardError, "the score True, which is not a number; say 1.0 or 0.0", reward=lambda p, r: [True] * 4)
    refuses(policy, RewardError, "scored nan for the response", reward=lambda p, r: [0.0, 0.0, float("nan"), 0.0])
    refuses(policy, RewardError, "the score 'good', which is not a number", reward=lambda p, r: ["good"] * 4)
    refuses(policy, ConfigError, "ppo needs a reward. Pass reward=", reward=None)
    refuses(policy, ConfigError, "should be a function", reward="learned")
    refuses(policy, MissingData, "This training needs prompts. Pass prompts=", prompts=None)
    refuses(policy, ConfigError, "Unknown key ppo.bach_size. Did you mean 'batch_size'?", bach_size=4)
    refuses(policy, ConfigError, "Unknown key ppo.optimizer.lr", optimizer={"lr": 0.1})
    refuses(
        policy, ConfigError, "train has no argument 'prompt', and ppo no such setting. Did you mean 'prompts'?", prompt=["hi"]
    )
    refuses(policy, RegistryError, "No algorithm named 'pppo'", algorithm="pppo")
    refuses(
        policy, ConfigError, "sft takes no environment", algorithm="sft", demonstrations=[(QUESTION, "plums")], environment=SHOP
    )
    refuses(policy, ConfigError, "sft takes no reward", algorithm="sft", demonstrations=[(QUESTION, "plums")], reward=lengths)
    refuses(policy, MissingData, "This training needs demonstrations", algorithm="sft")
    refuses(policy, DataError, "prompts should be a list", prompts=QUESTION)
    refuses(policy, DataError, r"prompts\[1\] should be text, or a dialogue", prompts=[QUESTION, 3])
    refuses(policy, DataError, r"demonstrations\[0\]: an empty text", algorithm="sft", demonstrations=[(QUESTION, " ")])
    refuses(
        policy, DataError, "There are no comparisons", algorithm="reward_modelling", comparisons=[(QUESTION, "plums", "plums")]
    )


@pytest.mark.parametrize(
    ("algorithm", "data", "message"),
    [
        (
            "dpo",
            {"comparisons": [(QUESTION, "plums", "bread"), ("what is Rust ?", "A systems programming language", "no")]},
            "comparisons[1]: the tokenizer does not know 'Rust', 'A', 'systems', ... and would read the unknown token. Pass "
            "tokenizer= to new_policy, a folder or a hub id: its default is the miniature's",
        ),
        ("sft", {"demonstrations": [(QUESTION, "plums Rust")]}, "demonstrations[0]: the tokenizer does not know 'Rust'"),
        ("sft", {"demonstrations": [("what is Rust ?", "plums")]}, "demonstrations[0]: the tokenizer does not know 'Rust' and"),
        ("ppo", {"prompts": ["what is Rust ?"], "reward": lambda p, r: [0] * len(r)}, "prompts[0]: the tokenizer does not know"),
        ("pretrain", {"texts": ["plums", "Rust"]}, "texts[1]: the tokenizer does not know 'Rust' and would read"),
    ],
)
def test_words_that_the_tokenizer_does_not_know_are_no_training_data(policy, algorithm, data, message):
    with pytest.raises(DataError, match=re.escape(message)):
        lockstep.train(policy, algorithm, **data)


def test_nouns_and_rows_are_taken_as_they_are():
    from lockstep.api.items import read

    prompt = Prompt.of(QUESTION)
    demonstration, comparison = Demonstration(prompt, "plums"), Comparison(prompt, ("plums", "boat"), (0, 1))
    assert read("prompts", [prompt, QUESTION, [Message("user", QUESTION)], {"prompt": QUESTION}]) == [prompt] * 4
    same = [demonstration, (prompt, "plums"), (QUESTION, "plums"), {"instruction": QUESTION, "output": "plums"}]
    assert read("demonstrations", same) == [demonstration] * 4
    ranked = (QUESTION, ["plums", "boat"], [0, 1])
    assert read("comparisons", [comparison, (QUESTION, "plums", "boat"), ranked]) == [comparison] * 3
    assert read("texts", ["boat", {"text": "boat"}]) == ["boat", "boat"]


# ----------------------------------------------------------------------------------------------------------------- chat


def talk(folder: Path, said: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lockstep", "chat", str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, input=said, capture_output=True, text=True, env=environment)


def test_chat_answers_each_line_of_a_pipe(policy, tmp_path):
    policy.save(tmp_path)
    done = talk(
        tmp_path, f"{QUESTION}\n/reset\n\n{QUESTION}\n/qiut\n/quit\nwhere does dax live ?\n", "--max-tokens", "5", "--seed", "3"
    )
    assert done.returncode == 0, done.stderr
    first, reset, empty, second, wrong = done.stdout.splitlines()  # one line for each
    assert reset == empty == ""
    assert first == policy.chat(QUESTION, max_tokens=5, seed=3)
    assert second != first
    assert wrong.startswith("No command /qiut. Did you mean '/quit'?")


def test_what_a_prompt_has_besides_its_text_reaches_the_template():
    messages = (Message("user", "count"), Message("assistant", "", (ToolCall("count", {"thing": "lamp"}),)), Message("tool", "7"))
    prompt = Prompt(messages, {"answer": "7"}, ({"type": "function", "function": {"name": "count"}},))
    (found,) = items.read("demonstrations", [(prompt, "There are 7.")])
    assert found.prompt.messages == messages and found.prompt.tools == prompt.tools and found.prompt.truth == prompt.truth
    (pair,) = items.read("comparisons", [(prompt, "There are 7.", "No.")])
    assert pair.prompt == found.prompt
    (asked,) = items.read("prompts", [list(messages)])
    assert asked.messages == messages


def test_an_empty_answer_and_one_of_several_lines_are_a_line_each(capsys):
    for pieces in ([], ["two\n", "lines"], ["\x1b[2J"]):
        chat.write_line(iter(pieces))
    assert capsys.readouterr().out == "\ntwo\\nlines\n\\x1b[2J\n"


def test_no_prompts_have_no_responses(policy):
    assert policy.respond([]) == policy.complete([]) == []


class Line(chat.argparse.Namespace):
    stage = system = max_tokens = None
    backend, temperature, seed = "torch", 1.0, 0


def test_chat_takes_a_system_message_and_says_where_there_is_no_template(policy, tmp_path, monkeypatch, capsys):
    import io

    policy.save(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/system you are kind .\n{QUESTION}\n/regenerate\n"))
    chat.run(Line(source=str(tmp_path), max_tokens=5), [])
    system, first, second = capsys.readouterr().out.splitlines()
    assert system == ""
    dialogue = [{"role": "system", "content": "you are kind ."}, {"role": "user", "content": QUESTION}]
    assert first == policy.chat(dialogue, max_tokens=5) != second

    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(re.sub(r'"chat_template": ".*?(?<!\\)"', '"chat_template": null', settings.read_text()))
    monkeypatch.setattr(sys, "stdin", io.StringIO("wug eats\n"))
    chat.run(Line(source=str(tmp_path), max_tokens=5), [])
    found = capsys.readouterr()
    assert found.out == policy.complete(["wug eats"], max_tokens=5)[0] + "\n"
    assert found.err == "This policy has no chat template: it continues each line as plain text.\n"


def test_control_characters_do_not_reach_the_terminal(capsys):
    chat.write(piece for piece in ["a\x1b[2J", "\x9b1m\r", "[red]é\n\t🎉"])
    assert capsys.readouterr().out == "a\\x1b[2J\\x9b1m\\r[red]é\n\t🎉\n"


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(capsys, monkeypatch):
    def pieces():
        try:
            yield "once"
            os.kill(os.getpid(), signal.SIGINT)
            yield " upon"
            yield " a time"
        finally:
            closed.append(True)

    closed = []
    chat.write(pieces())
    assert capsys.readouterr().out == "once upon [stopped]\n" and closed
    typed = iter([KeyboardInterrupt, "hello", EOFError])

    def ask(prompt):
        found = next(typed)
        if isinstance(found, str):
            return found
        raise found

    monkeypatch.setattr("builtins.input", ask)
    assert list(chat.lines(terminal=True)) == ["hello"]
