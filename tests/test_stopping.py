"""Stop strings: found wherever they begin, in the middle of a token or of a character, and what follows from them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from conftest import Data, Scored
from lockstep.config.schema import parse
from lockstep.errors import ConfigError
from lockstep.interfaces import Generated
from lockstep.runs.evaluation import EvaluationConfig, Evaluator
from lockstep.text.sequences import join, left_pad, right_pad
from lockstep.text.stopping import Stops
from lockstep.text.tokenizer import Tokenizer

EOS, TURN = "</s>", "<end_of_turn>"
TEXT = "Grass is green.\n\nHuman: Why? ⛺数\nThat is\nall."


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """Byte-level, with merges of ordinary words only: rare characters are several tokens."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[EOS, TURN], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(["Grass is green.", "\n\nHuman: Why?", "\nThat is", " all."] * 9, trainer)
    return Tokenizer(core, eos_token=EOS, pad_token="<pad>", chat_template=None)


def end(tokenizer, strings, *responses):
    """`Stops.end` of responses given as ids."""
    tokens, mask = right_pad(responses, tokenizer.pad_id, max(map(len, responses)) + 2)
    return Stops(tokenizer, strings).end(tokens, mask)


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As Llama 2's and Gemma's: words, and bytes for everything else, line breaks among it."""
    words = ["<unk>", EOS, "a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([EOS])
    return Tokenizer(core, eos_token=EOS, pad_token="<pad>", chat_template=None)


@pytest.mark.parametrize("after", [[0xF0, 0x9F, 0x98, 0x80], [0xF0, 0x9F], []])
def test_a_character_that_begins_after_a_stop_string_does_not_hide_it(byte_fallback, after):
    """The decoder shows the whole run of bytes, the line breaks too, as U+FFFD until the last character is complete."""
    byte = lambda value: byte_fallback.core.token_to_id(f"<0x{value:02X}>")  # noqa: E731
    a, b = (byte_fallback.core.token_to_id(word) for word in "ab")
    ended = end(byte_fallback, ["\n\n"], [a, byte(10), byte(10), *map(byte, after), b])
    assert ended.mask[0].sum() == 3
    assert ended.texts == ["a"] and ended.finished.tolist() == [True]


def test_of_overlapping_stop_strings_the_one_that_is_complete_first_cuts_the_text(bpe):
    ended = end(bpe, ["ab\ncd", "\nc"], bpe.encode("xab") + bpe.encode("\n") + bpe.encode("c") + bpe.encode("dyz"))
    assert ended.texts == ["xab"]
    assert bpe.decode(ended.tokens[0][ended.mask[0]]) == "xab\nc"


def by_hand(tokenizer, ids, string):
    """The first prefix of the ids whose text holds the string, one id at a time."""
    return next(n for n in range(1, len(ids) + 1) if string in tokenizer.decode(ids[:n]))


@pytest.mark.parametrize("string", ["\nHuman:", "reen", "Why", "is gr", "⛺", "⛺数", "数\nT", "?", "\n\nH", "all."])
def test_a_response_ends_with_the_token_that_completes_a_stop_string(bpe, string):
    ids = bpe.encode(TEXT)
    ended = end(bpe, [string], ids)
    kept = by_hand(bpe, ids, string)
    assert ended.mask[0].tolist() == [i < kept for i in range(len(ids) + 2)]
    assert ended.tokens[0].tolist() == ids[:kept] + [bpe.pad_id] * (len(ids) + 2 - kept)
    assert ended.texts == [TEXT[: TEXT.index(string)]]
    assert ended.finished.tolist() == ended.without_eos.tolist() == [True]


def test_a_stop_string_may_straddle_tokens_and_characters(bpe):
    tent = bpe.encode("⛺")
    assert len(tent) == 3 and len(bpe.encode("\nHuman:")) > 1
    ended = end(bpe, ["⛺"], bpe.encode("is") + tent[:2])
    assert not ended.finished[0] and ended.texts == ["is" + bpe.decode(tent[:2])]  # its last byte is missing
    ended = end(bpe, ["⛺"], bpe.encode("is") + tent + bpe.encode(" all."))
    assert ended.texts == ["is"] and ended.mask[0].sum() == len(bpe.encode("is")) + 3


def test_the_first_of_several_stop_strings_counts(bpe):
    ended = end(bpe, ["Why", "\n\nHuman", "green."], bpe.encode(TEXT))
    assert ended.texts == ["Grass is "]
    ended = end(bpe, ["\n\nHuman:", "\n\nHu"], bpe.encode(TEXT))
    assert ended.texts == ["Grass is green."]


def test_responses_without_a_stop_string_are_left_alone(bpe):
    ids = bpe.encode("Grass is green.")
    ended = end(bpe, ["\nHuman:"], ids, [*ids, bpe.eos_id], [bpe.eos_id])
    assert ended.finished.tolist() == [False, True, True] and not ended.without_eos.any()
    assert ended.texts == ["Grass is green.", "Grass is green.", ""]
    assert ended.mask.sum(axis=1).tolist() == [len(ids), len(ids) + 1, 1]


def test_generation_ends_at_every_token_that_holds_a_stop_string(bpe):
    assert Stops(bpe).ids == [bpe.eos_id]
    holding = [i for i in range(bpe.vocab_size) if "is" in bpe.decode([i])]
    assert {bpe.decode([i]) for i in holding} >= {"is", " is"}
    assert Stops(bpe, ["is"]).ids == [bpe.eos_id, *holding]
    assert Stops(bpe, ["\nHuman: Why? ⛺"]).ids == [bpe.eos_id]


def test_a_special_token_may_be_a_stop_string(bpe):
    turn = bpe.core.token_to_id(TURN)
    assert Stops(bpe, [TURN]).ids == [bpe.eos_id, turn]
    ended = end(bpe, [TURN], [*bpe.encode("all."), turn])
    assert ended.texts == ["all."] and ended.finished.tolist() == ended.without_eos.tolist() == [True]


@pytest.mark.parametrize(
    ("string", "message"),
    [
        ("", "stop_strings has ''. A stop string should be text of at least one character."),
        ("a\ufffd", "stop_strings has 'a\ufffd'. A stop string should be text of at least one character."),
        (
            f"{TURN}\n",
            f"stop_strings has '{TURN}\\n', which never occurs in text: '{TURN}' in it is a special token. Give '{TURN}' alone",
        ),
    ],
)
def test_a_string_that_text_never_holds_is_an_error(bpe, string, message):
    with pytest.raises(ConfigError) as error:
        Stops(bpe, [string])
    assert str(error.value).startswith(message)


def test_a_reward_model_reads_the_text_before_the_stop_string_and_eos(bpe):
    stops, plain = Stops(bpe, ["\n\nHuman:"]), [*bpe.encode("all."), bpe.eos_id]
    tokens, mask = right_pad([bpe.encode(TEXT), plain], bpe.pad_id, 40)
    prompts, prompt_mask = left_pad([[5], [6, 7]], bpe.pad_id, 2)
    ended = stops.end(tokens, mask)
    read = stops.as_read(join(prompts, prompt_mask, ended.tokens, ended.mask), ended)
    found = [row[counts].tolist() for row, counts in zip(read.responses, read.mask, strict=True)]
    assert found == [[*bpe.encode("Grass is green."), bpe.eos_id], plain]
    assert read.tokens[:, :2].tolist() == prompts.tolist() and read.tokens.shape == (2, 42)
    untouched = join(prompts[1:], prompt_mask[1:], tokens[1:], mask[1:])
    assert stops.as_read(untouched, stops.end(tokens[1:], mask[1:])) is untouched


def test_a_reward_model_reads_no_special_token_that_the_policy_spelled_before_a_stop_string(bpe):
    said = [*bpe.encode("all. <"), *bpe.encode("end_of_turn></"), *bpe.encode("s>\n\nHuman:")]
    assert bpe.decode(said) == f"all. {TURN}{EOS}\n\nHuman:"
    stops = Stops(bpe, ["\n\nHuman:"])
    tokens, mask = right_pad([said], bpe.pad_id, 60)
    ended = stops.end(tokens, mask)
    read = stops.as_read(join(*left_pad([[5]], bpe.pad_id, 1), ended.tokens, ended.mask), ended)
    assert read.responses[0][read.mask[0]].tolist() == [*bpe.encode("all. < end_of_turn>< /s>"), bpe.eos_id]


# ------------------------------------------------------------------------------------------------------------------ PPO


@pytest.fixture
def ppo(make):
    """PPO whose policy writes what it is told, in a vocabulary of words: w0 w1 w2 ... <eos> <stop> <pad>."""
    seen = []

    def build(*rows, stop_strings=("w3 w4",), **changes):
        score = Scored(lambda r: seen.append(r) or [5.0] * len(r.texts))
        algorithm = make("ppo", reward_model=score, batch_size=len(rows), value_network="shared", epochs=1,
                         stop_strings=list(stop_strings), **changes)  # fmt: skip

        def generate(tokens, mask, seeds, *, temperature, stop_ids, pad_id):
            written, real = right_pad(rows, pad_id, seeds.shape[1])
            return Generated(written, real, np.zeros(written.shape, np.float32))

        algorithm.policy.generate = generate
        return algorithm, seen

    return build


def test_ppo_trains_on_the_tokens_up_to_the_stop_string_and_on_none_after(ppo):
    algorithm, seen = ppo([1, 2, 3, 4, 7, 8, 9], [5, 6, 35], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16])
    rollout = algorithm.rollout(0, clock())
    assert rollout.sequences.mask.sum(axis=1).tolist() == [4, 3, 12]
    assert rollout.finished.tolist() == [True, True, False]
    assert seen[0].texts[:2] == ["w1 w2 ", "w5 w6"]
    read = [row[counts].tolist() for row, counts in zip(seen[0].sequences.responses, seen[0].sequences.mask, strict=True)]
    assert read[:2] == [[1, 2, 35], [5, 6, 35]]
    batch, metrics = algorithm.prepare(rollout)
    assert metrics["objective/finished"] == pytest.approx(2 / 3)
    assert metrics["objective/length"] == pytest.approx(19 / 3)
    [term] = algorithm.terms(rollout.sequences, batch, np.arange(3))
    other = rollout.sequences.tokens.copy()
    other[0, rollout.sequences.prompt_length + 4 :] = 20  # what the policy would have written after it
    changed = dataclasses.replace(term, sequences=dataclasses.replace(term.sequences, tokens=other))
    one, two = (algorithm.learner.gradients([t]) for t in (term, changed))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_stop_string_finishes_a_response_and_a_cut_one_gets_the_unfinished_score(ppo):
    row = [1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13, 14]
    for strings, total in ((["w3 w4"], 5.0), (["w3 w5"], -1.0)):
        algorithm, _ = ppo(row, stop_strings=strings, kl_coef=0.0, unfinished_score=-1.0)
        _, metrics = algorithm.prepare(algorithm.rollout(0, clock()))
        assert metrics["objective/reward"] == pytest.approx(total)


def test_evaluation_cuts_responses_as_ppo_does(tokenizer):
    class Writes:
        def generate(self, tokens, mask, seeds, *, temperature, stop_ids, pad_id):
            written, real = right_pad([[1, 2, 3, 4, 7], [3, 5, 6, 7]], pad_id, seeds.shape[1])
            return Generated(written, real, np.zeros(written.shape, np.float32))

    settings = {"lengths": {"prompt": 6, "response": 5, "multiple": 1}, "stop_strings": ["w3 w4"]}
    config = parse(EvaluationConfig, settings, "evaluation")
    seen = []
    reward_model = Scored(lambda r: seen.append(r) or [1.0, 2.0])
    evaluator = Evaluator(config, Data(), tokenizer, reward_model, 0)
    answers = evaluator.answer(Writes(), Data().prompts("heldout")[:2], [[1], [2]])
    samples = answers.samples
    assert samples.responses.texts == ["w1 w2 ", "w3 w5 w6 w7"] and samples.finished.tolist() == [True, False]
    assert samples.sequences.mask.sum(axis=1).tolist() == [4, 4]
    assert seen[0].sequences.responses[0].tolist() == [1, 2, 35, 36, 36]


def clock():
    from lockstep.learning.online import Clock

    return Clock()
