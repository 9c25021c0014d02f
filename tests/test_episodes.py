"""Episodes of several turns: on a policy that says what it is told, so that every row is known beforehand, and on real ones."""

import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers

from conftest import Data, Scored, same
from lockstep.errors import ConfigError, EnvironmentFailed
from lockstep.interfaces import Context, Environment, Episode, Generated, Reply, Responses
from lockstep.learning import numerics
from lockstep.learning.episodes import EnvironmentConfig, EnvironmentReward, replies
from lockstep.learning.online import Clock
from lockstep.learning.randomness import token_seeds
from lockstep.learning.rollout import Sampler, concatenate, score
from lockstep.models.architecture import from_hf, initial_parameters, to_hf
from lockstep.registry import registry
from lockstep.runs.evaluation import EvaluationConfig, Evaluator
from lockstep.storage.files import write_json
from lockstep.storage.weights import write_tensors
from lockstep.text.encoding import Lengths
from lockstep.text.sequences import right_pad
from lockstep.text.stopping import Stops
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Message, Prompt
from lockstep_rlhf.reward_models.length import Length
from test_metrics_page import documented

LENGTHS = Lengths(prompt=6, response=12, multiple=1)
EOS, STOP, PAD = 34, 35, 36
PROMPTS, IDS = [Prompt.of("w1"), Prompt.of("w2 w3")], [[1], [2, 3]]


@pytest.fixture
def turns(tokenizer) -> Tokenizer:
    """Its template sets messages apart, marks the policy's turn with w30 and ends it with EOS, <stop>."""
    template = (
        "{% for m in messages %}{{ 'w30 ' + m.content + ' <stop> ' if m.role == 'assistant' else m.content + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'w30' }}{% endif %}"
    )
    return Tokenizer(tokenizer.core, eos_token="<stop>", pad_token="<pad>", chat_template=template)


class Says:
    """Writes the given rows, call by call, with log-probabilities -1, -2, ...; ``calls`` has the contexts and seeds."""

    context_length = 64

    def __init__(self, *calls):
        self.script, self.calls = iter(calls), []

    def generate(self, tokens, mask, seeds, *, temperature, stop_ids, pad_id):
        rows = next(self.script)
        rows = [*rows, *[rows[0]] * (len(seeds) - len(rows))]
        self.calls.append(([t[m].tolist() for t, m in zip(tokens, mask, strict=True)], seeds))
        written, real = right_pad([row[: seeds.shape[1]] for row in rows], pad_id, seeds.shape[1])
        return Generated(written, real, np.where(real, -1.0 - np.arange(seeds.shape[1]), 0).astype(np.float32))


@dataclass(frozen=True)
class Config(EnvironmentConfig):
    answers: tuple[str, ...] = ("w7",)


class Asks(Environment):
    """Replies with the first answer, then the second, ...; then ends with as many points as the policy's last turn has words."""

    Config = Config

    def __init__(self, config, resources=None):
        super().__init__(config)
        self.closed = []

    def reply(self, episode):
        if episode.turn <= len(self.config.answers):
            return Reply.says(self.config.answers[episode.turn - 1], reward=0.5)
        return Reply.ends(len(episode.text.split()))

    def close(self, episode):
        self.closed.append(episode)


def sampler(tokenizer, environment, strings=(), lengths=LENGTHS, **options):
    return Sampler(Stops(tokenizer, strings), lengths, 0.7, environment=environment, **options)


def seeds(rows=2, columns=12):
    return np.arange(rows * columns, dtype=np.uint32).reshape(rows, columns)


def test_what_is_trained_is_what_was_sampled_and_what_was_said_is_context(turns):
    policy = Says([[4, 5, STOP], [6, STOP]], [[8, STOP], [9, 10, STOP]])
    samples = sampler(turns, environment := Asks(Config())).sample(policy, PROMPTS, IDS, seeds())
    assert samples.sequences.responses.tolist() == [
        [4, 5, STOP, 7, 30, 8, STOP, *[PAD] * 5],
        [6, STOP, 7, 30, 9, 10, STOP, *[PAD] * 5],
    ]
    F, T = False, True
    assert samples.sequences.mask[:, :8].tolist() == [[T, T, T, F, F, T, T, F], [T, T, F, F, T, T, T, F]]
    assert samples.sequences.response_mask.sum(axis=1).tolist() == [7, 7]
    assert samples.logprobs[0, :8].tolist() == [-1, -2, -3, 0, 0, -1, -2, 0]
    assert samples.responses.rewards.tolist() == [0.5 + 1, 0.5 + 2] and samples.finished.tolist() == [True, True]
    assert samples.responses.texts == ["w8", "w9 w10"]
    assert [m.content for m in samples.responses.prompts[1].messages] == ["w2 w3", "w6", "w7"]
    assert samples.responses.sequences.tokens.tolist() == samples.sequences.tokens.tolist()
    assert len(environment.closed) == 2


def test_the_next_turn_reads_all_before_it_and_draws_from_the_seeds_of_its_columns(turns):
    policy = Says([[4, 5, STOP], [6, STOP]], [[8, STOP], [9, 10, STOP]])
    sampler(turns, Asks(Config())).sample(policy, PROMPTS, IDS, seeds())
    (first, _), (second, drawn) = policy.calls
    assert first == IDS
    assert second == [[1, 4, 5, STOP, 7, 30], [2, 3, 6, STOP, 7, 30]]
    assert drawn[:, :7].tolist() == [[5, 6, 7, 8, 9, 10, 11], [16, 17, 18, 19, 20, 21, 22]]


def test_an_episode_that_ends_leaves_the_others_alone(turns):
    class Ends(Asks):
        def reply(self, episode):
            return Reply.ends(3) if episode.text == "w6" else super().reply(episode)

    policy = Says([[4, STOP], [6, STOP]], [[8, STOP]])
    samples = sampler(turns, Ends(Config())).sample(policy, PROMPTS, IDS, seeds())
    assert policy.calls[1][0] == [[1, 4, STOP, 7, 30]]
    assert samples.sequences.mask.sum(axis=1).tolist() == [4, 2] and samples.responses.rewards.tolist() == [1.5, 3]
    assert numerics.turns(samples.sequences.mask).tolist() == [2, 1]


def test_the_turns_are_limited(turns):
    environment = Asks(Config(turns=2, answers=("w7", "w7", "w7")))
    samples = sampler(turns, environment).sample(Says([[4, STOP]] * 2, [[5, STOP]] * 2), PROMPTS, IDS, seeds())
    assert samples.responses.rewards.tolist() == [1, 1] and samples.finished.all()
    assert samples.responses.texts == ["w5", "w5"]


@pytest.mark.parametrize("turn_tokens", [None, 3])
def test_a_turn_without_end_is_the_last_and_is_not_finished(turns, turn_tokens):
    environment = Asks(Config(turn_tokens=turn_tokens))
    samples = sampler(turns, environment).sample(Says([[4] * 12, [5, STOP]], [[6, STOP]]), PROMPTS, IDS, seeds())
    length = turn_tokens or 12
    assert samples.sequences.mask.sum(axis=1).tolist() == [length, 4] and samples.finished.tolist() == [False, True]
    assert samples.responses.rewards.tolist() == [0, 1.5] and samples.responses.texts[0] == " ".join(["w4"] * length)


def test_a_turn_that_begins_near_the_limit_is_cut_there(turns):
    samples = sampler(turns, Asks(Config())).sample(Says([[4] * 8 + [STOP]], [[6, 6, STOP]]), PROMPTS[:1], IDS[:1], seeds(1))
    assert samples.sequences.responses[0].tolist() == [*[4] * 8, STOP, 7, 30, 6]
    assert not samples.finished[0] and samples.responses.texts == ["w6"]


def test_what_does_not_fit_is_taken_back(turns):
    environment = Asks(Config(answers=("w7 w7 w7",)))
    samples = sampler(turns, environment).sample(Says([[4] * 7 + [STOP]]), PROMPTS[:1], IDS[:1], seeds(1))
    assert samples.sequences.response_mask.sum() == samples.sequences.mask.sum() == 8 and not samples.finished[0]
    assert [m.content for m in samples.responses.prompts[0].messages] == ["w1"]


def test_a_long_message_is_cut_and_a_special_token_in_it_is_broken_up(turns, caplog):
    words = Tokenizer(turns.core, eos_token="<stop>", pad_token="<pad>", chat_template=turns.chat_template)
    assert words.broken_up("w1 <stop> <pad>") == "w1 < stop> < pad>"
    environment = Asks(Config(answers=("w7 w8 w9",), reply_tokens=2))
    samples = sampler(turns, environment).sample(Says([[4, STOP]], [[5, STOP]]), PROMPTS[:1], IDS[:1], seeds(1))
    assert samples.sequences.responses[0, :7].tolist() == [4, STOP, 7, 8, 30, 5, STOP]


def test_eos_is_written_where_the_template_has_it_and_something_else_ended_the_turn(turns):
    policy = Says([[4, 33]], [[5, STOP]])
    samples = sampler(turns, Asks(Config()), strings=["w33"]).sample(policy, PROMPTS[:1], IDS[:1], seeds(1))
    assert samples.sequences.responses[0, :7].tolist() == [4, 33, STOP, 7, 30, 5, STOP]
    assert samples.sequences.mask[0, :7].tolist() == [True, True, False, False, False, True, True]


def test_a_reward_model_reads_eos_in_place_of_the_string_that_ended_the_last_turn(turns):
    policy = Says([[4, STOP]], [[5, 33]])
    samples = sampler(turns, Asks(Config()), strings=["w33"]).sample(policy, PROMPTS[:1], IDS[:1], seeds(1))
    assert samples.sequences.responses[0, :6].tolist() == [4, STOP, 7, 30, 5, 33]
    assert samples.responses.sequences.responses[0, :6].tolist() == [4, STOP, 7, 30, 5, STOP]
    assert samples.responses.texts[0].split() == ["w5"]


def test_a_reward_model_reads_no_special_token_that_the_policy_spelled_in_the_last_turn():
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate([*"ab|<> ", "<a>", "<pad>"])}))
    core.pre_tokenizer, core.decoder = tokenizers.pre_tokenizers.Split("", "isolated"), tokenizers.decoders.Fuse()
    core.add_special_tokens(["<a>", "<pad>"])
    template = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '') }}{% endfor %}"
    letters = Tokenizer(core, eos_token="<a>", pad_token="<pad>", chat_template=template)
    ids = lambda text: [core.token_to_id(character) for character in text]  # noqa: E731
    policy = Says([[*ids("a"), letters.eos_id]], [ids("b<a>b|")])
    samples = sampler(letters, Asks(Config(answers=("b",))), strings=["|"]).sample(policy, [Prompt.of("a")], [[0]], seeds(1))
    read = samples.responses.sequences
    assert read.responses[0][read.response_mask[0]].tolist() == [0, letters.eos_id, 1, *ids("b< a>b"), letters.eos_id]


def test_a_template_that_rewrites_earlier_turns_is_an_error(tokenizer):
    template = "{% for m in messages %}{{ m.content + ' ' if loop.last or m.role == 'user' else '' }}{% endfor %}"
    forgets = Tokenizer(tokenizer.core, eos_token="<stop>", pad_token="<pad>", chat_template=template)
    with pytest.raises(ConfigError, match="writes an earlier assistant turn differently .* writes all turns alike"):
        sampler(forgets, Asks(Config())).sample(Says([[4, STOP]], [[5, STOP]]), PROMPTS[:1], IDS[:1], seeds(1))


def test_rows_do_not_depend_on_each_other(load, turns):
    """On real policies: the same episodes in one batch, in two, and in chunks."""
    environment = Asks(Config(answers=("w7 w8", "w9"), turn_tokens=4))
    drawn = token_seeds(0, "sampling", 0, 6, 24)
    lengths = Lengths(prompt=6, response=24, multiple=4)
    whole = sampler(turns, environment, lengths=lengths).sample(load(), PROMPTS, IDS, drawn)
    parts = [
        sampler(turns, environment, lengths=lengths).sample(load(), PROMPTS[i : i + 1], IDS[i : i + 1], drawn[3 * i : 3 * i + 3])
        for i in range(2)
    ]
    chunked = sampler(turns, environment, lengths=lengths, batch_size=4).sample(load(), PROMPTS, IDS, drawn)
    for other in (concatenate(parts), chunked):
        assert other.sequences.responses.tolist() == whole.sequences.responses.tolist()
        assert other.sequences.mask.tolist() == whole.sequences.mask.tolist()
        assert other.responses.texts == whole.responses.texts
        assert other.responses.rewards.tolist() == whole.responses.rewards.tolist()
    rows = np.array([4, 1])
    taken = whole.take(rows)
    assert taken.responses.rewards.tolist() == whole.responses.rewards[rows].tolist()


def test_episodes_fill_the_context_of_a_model_with_learned_positions(backend, turns, tmp_path):
    """Prompt and response together are as long as the context: a row near its end leaves no room for one that has many tokens
    left, which draws as it does alone."""
    pytest.importorskip("transformers")
    sizes = {"vocab_size": 37, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 30}
    architecture = from_hf({"model_type": "gpt2", **sizes})
    parameters = initial_parameters(architecture, 0)
    write_tensors(tmp_path / "model.safetensors", {name: x * (10 if x.ndim > 1 else 1) for name, x in parameters.items()})
    write_json(tmp_path / "config.json", to_hf(architecture))
    policy = registry().resolve("policy", "huggingface", backend.name).load(tmp_path, backend)
    environment, lengths = Asks(Config(answers=("w7 w8", "w9", "w7"))), Lengths(prompt=8, response=22, multiple=8)
    lengths.check(policy.context_length)
    prompts, ids, drawn = [Prompt.of("w1"), Prompt.of("w2")], [[1, 2, 3, 4, 5, 6, 7, 8], [9]], token_seeds(0, "s", 0, 16, 22)
    talk = sampler(turns, environment, ["w1", "w2"], lengths)
    whole = talk.sample(policy, prompts, ids, drawn)
    assert whole.sequences.response_mask.all(axis=1).any() and numerics.turns(whole.sequences.mask).max() > 1
    parts = concatenate(
        [talk.sample(policy, prompts[:1], ids[:1], drawn[:8]), talk.sample(policy, prompts[1:], ids[1:], drawn[8:])]
    )
    assert parts.sequences.responses.tolist() == whole.sequences.responses.tolist()
    assert parts.sequences.mask.tolist() == whole.sequences.mask.tolist()
    again = policy.evaluate(whole.sequences, ["logprobs"], temperature=0.7)["logprobs"]
    np.testing.assert_allclose(again[whole.sequences.mask], whole.logprobs[whole.sequences.mask], atol=2e-5)


def test_the_policy_is_evaluated_as_it_sampled(load, turns):
    """The log-probabilities of the sampler, turn by turn, are those of one pass over the episode: contexts, positions and masks
    agree."""
    environment = Asks(Config(answers=("w7 w8", "w9"), turns=3, turn_tokens=5))
    lengths = Lengths(prompt=6, response=30, multiple=4)
    samples = sampler(turns, environment, lengths=lengths).sample(load(), PROMPTS, IDS, token_seeds(3, "sampling", 0, 16, 30))
    assert numerics.turns(samples.sequences.mask).max() > 1
    again = load().evaluate(samples.sequences, ["logprobs"], temperature=0.7)["logprobs"]
    mask = samples.sequences.mask
    np.testing.assert_allclose(again[mask], samples.logprobs[mask], atol=2e-5)


def test_later_turns_read_what_is_new_and_compile_two_programs(load, turns, backend, monkeypatch):
    """One for the first turn and one for all others, for as many rows. Rows of several lengths, and a turn cut before its end."""
    policy, fed, generate = load(), [], type(load()).generate

    def counted(self, tokens, mask, seeds, *, past=None, **how):
        fed.append(tokens.shape[1] - (past.known if past else 0))
        return generate(self, tokens, mask, seeds, past=past, **how)

    monkeypatch.setattr(type(policy), "generate", counted)
    environment = Asks(Config(answers=("w7 w8", "w9", "w7", "w8 w9"), turns=5, turn_tokens=4))
    every_word_ends = [f"w{i}" for i in range(34)]  # so all rows go on
    talk = sampler(turns, environment, every_word_ends, lengths=Lengths(prompt=6, response=40, multiple=46))
    programs = _programs(backend)
    samples = talk.sample(policy, PROMPTS, IDS, token_seeds(1, "sampling", 0, 8, 40))
    assert fed == [6, 8, 8, 8, 8] and numerics.turns(samples.sequences.mask).min() == 5
    assert backend.name != "jax" or _programs(backend) <= programs + 2
    forced = policy.evaluate(samples.sequences, ["logprobs"], temperature=0.7)["logprobs"]
    np.testing.assert_allclose(forced[samples.sequences.mask], samples.logprobs[samples.sequences.mask], atol=2e-5)


def _programs(backend):
    if backend.name != "jax":
        return 0
    from lockstep_jax import generation

    return generation.generate.jitted._cache_size()


# --------------------------------------------------------------------------------------------------------------- replies


class Slow(Asks):
    """Takes its time over the prompts that say so, or fails."""

    def reply(self, episode):
        word = episode.prompt.messages[0].content
        if word == "slow":
            time.sleep(10)
        if word == "wrong":
            raise ValueError("no such word")
        if word == "exit":
            raise SystemExit
        return {"text": "w1", "points": Reply((), True), "nan": Reply((), float("nan")),
                "system": Reply((Message("system", "x"),))}.get(word, Reply.ends(episode.seed))  # fmt: skip


def episodes(*words):
    return [Episode(Prompt.of(word), number, [Message("assistant", "w")]) for number, word in enumerate(words)]


def test_replies_keep_their_places_and_come_at_the_same_time():
    here = threading.Barrier(3, timeout=60)

    class Meets(Asks):
        def reply(self, episode):
            here.wait()
            return Reply.ends(episode.seed)

    found = replies(Meets(Config(at_once=3)), episodes(*"abcdef"))
    assert [reply.reward for reply in found] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "word, says",
    [
        ("slow", "no reply within environment.timeout_seconds=2"),
        ("wrong", r"test_episodes.py:\d+: ValueError\('no such word'\)"),
        ("exit", r"test_episodes.py:\d+: SystemExit"),
        ("text", "it replied with 'w1'"),
        ("points", "it gave the reward True"),
        ("nan", "it gave the reward nan"),
        ("system", "with the role 'user' or 'tool'"),
    ],
)
def test_a_failure_stops_the_run_or_leaves_the_episode_out(word, says):
    with pytest.raises(EnvironmentFailed, match=f"The environment Slow failed: .*{says}"):
        replies(Slow(Config(timeout_seconds=2.0)), episodes("a", word, "c"))
    found = replies(Slow(Config(timeout_seconds=2.0, on_failure="drop")), episodes("a", word, "c"))
    assert [reply and reply.reward for reply in found] == [0, None, 2]


def test_a_failed_episode_has_no_score(turns):
    class Fails(Asks):
        def reply(self, episode):
            if episode.prompt.messages[0].content == "w1":
                raise ValueError
            return Reply.ends(4)

    samples = sampler(turns, Fails(Config(on_failure="drop"))).sample(Says([[4, STOP], [6, STOP]]), PROMPTS, IDS, seeds())
    np.testing.assert_array_equal(score(EnvironmentReward(), samples)[0], [np.nan, 4])
    np.testing.assert_array_equal(score(Scored(lambda r: [1, 1]), samples)[0], [np.nan, 1])


def test_without_a_reward_model_too_a_failed_episode_does_not_count(make, turns, load):
    class Fails(Asks):
        def reply(self, episode):
            if episode.prompt.messages[0].content.startswith("w1"):
                raise ValueError
            return Reply.ends(4)

    algorithm = make("distillation", teacher="other", batch_size=4)
    algorithm.sampler = sampler(turns, Fails(Config(on_failure="drop")))
    samples = algorithm.sampler.sample(Says([[4, STOP], [6, STOP]]), PROMPTS, IDS, seeds())
    algorithm.sampler = SimpleNamespace(sample=lambda *_: samples)
    _, scores, _ = algorithm.responses(0, 2, seeds(), Clock())
    np.testing.assert_array_equal(scores, [np.nan, 0])


def test_a_length_is_that_of_the_policys_tokens(turns):
    """A turn of three and one of two; two of two and three. What was said between them is not the policy's."""
    policy = Says([[4, 5, STOP], [6, STOP]], [[8, STOP], [9, 10, STOP]])
    samples = sampler(turns, Asks(Config())).sample(policy, PROMPTS, IDS, seeds())
    assert Length(Length.Config(), None).score(samples.responses).tolist() == [5, 5]
    assert Length(Length.Config(unit="words"), None).score(samples.responses).tolist() == [1, 2]


def test_a_mark_that_is_a_special_token_is_refused(turns):
    """The policy's text would not have it."""
    environment = Asks(Config())
    environment.marks = ("<stop>",)
    with pytest.raises(ConfigError, match="looks for '<stop>' in the policy's text, which has no special tokens"):
        sampler(turns, environment)


def test_the_environments_rewards_need_one():
    with pytest.raises(ConfigError, match="Set environment="):
        EnvironmentReward().score(Responses([], [], None, None))


# ------------------------------------------------------------------------------------------------------------ algorithms


@pytest.fixture
def build(make, turns, monkeypatch):
    """build('grpo', ...): an algorithm in conversation with `Asks`."""

    def built(name, environment, **changes):
        around = lambda *given, **more: Context(*given, environment=environment, **more)  # noqa: E731
        monkeypatch.setattr("conftest.Context", around)
        return make(name, tokenizer=turns, reward_model=EnvironmentReward(), **changes)

    return built


SHORT = {"lengths": {"prompt": 8, "response": 16, "multiple": 8}, "iterations": 3, "stop_strings": ["w1", "w5", "w9"]}
"""Half of what a policy of this world writes ends with one of these."""
OF_SEVERAL = {
    "ppo": {"value_network": "shared", "batch_size": 4},
    "policy_gradient": {"batch_size": 2, "samples": 3},
    "rejection_sampling": {"batch_size": 4, "samples": 2},
}
on_torch = pytest.mark.parametrize("backend", ["torch"], indirect=True)  # what is tested is numpy on the host


@on_torch
@pytest.mark.parametrize("name", OF_SEVERAL)
def test_every_algorithm_that_samples_trains_on_turns_and_not_on_what_was_said(build, name):
    algorithm = build(name, Asks(Config(answers=("w7 w8",), turn_tokens=6)), **SHORT, **OF_SEVERAL[name])
    terms, update = [], algorithm.learner.update
    algorithm.learner.update = lambda t, scale: terms.extend(t) or update(t, scale)
    metrics = algorithm.step(0)
    assert {name for name in metrics if name.startswith("environment/")} == documented("Environments") - {"turns"}
    assert metrics["environment/turns"] > 1 and np.isfinite(metrics["objective/score"])
    for term in terms:
        said = term.sequences.response_mask & ~term.sequences.mask
        assert said.any()
        for array in term.batch.values():
            assert array.shape != said.shape or not array[said].any()
    assert terms and len(algorithm.samples()) > 0


@on_torch
def test_an_evaluation_converses_too(load, turns):
    config = EvaluationConfig(
        policies=("sft",), splits=("heldout",), lengths=Lengths(8, 16, 8), stop_strings=tuple(SHORT["stop_strings"]), batch_size=5
    )
    environment = Asks(Config(answers=("w7 w8",), turn_tokens=6))
    evaluator = Evaluator(config, Data(), turns, EnvironmentReward(), 0, environment)
    result = evaluator.run(lambda name: load(), ["sft"], lambda what: None)
    measures = result["splits"]["heldout"]["sft"]
    assert 1 < measures["turns"]["mean"] <= 2 and measures["turns"]["n"] == Data.rows and "reward_model" in result
    answers = evaluator.answer(load(), *evaluator.prompts("heldout"))
    assert measures["score"]["mean"] == pytest.approx(answers.samples.responses.rewards.mean())
    assert measures["length"]["mean"] == answers.samples.sequences.mask.sum(axis=1).mean()
    prompts, ids = ([each[0], each[0], each[1]] for each in evaluator.prompts("heldout"))
    answers = evaluator.answer(load(), prompts, ids)
    first, second = (prompt.messages for prompt in answers.samples.responses.prompts[:2])
    assert first != second and answers.clusters.tolist() == [0, 0, 1]  # two conversations of one prompt
    several = evaluator.judged(load(), prompts[1:], ids[1:], token_seeds(0, "evaluation", 0, 4, 16))
    assert several.clusters.tolist() == [0, 0, 1, 1]


@on_torch
def test_a_restart_changes_nothing(build, tmp_path):
    again = lambda: build("policy_gradient", Asks(Config(turn_tokens=6)), **SHORT, **OF_SEVERAL["policy_gradient"])  # noqa: E731
    whole, begun, rest = again(), again(), again()
    for step in range(3):
        whole.step(step)
    begun.step(0)
    begun.learner.save(tmp_path)
    rest.learner.restore(tmp_path)
    rest.load_state(begun.state())
    for step in (1, 2):
        rest.step(step)
    same(rest.result().parameters(), whole.result().parameters())
