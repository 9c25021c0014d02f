"""Blocks of tokens: where padding goes, what counts, and that cutting rows changes nothing."""

import numpy as np
import pytest
import tokenizers

from lockstep.errors import DataError
from lockstep.text import encoding
from lockstep.text.encoding import Example, Lengths
from lockstep.text.sequences import chunks, in_chunks, join, left_pad, pack, right_pad, round_up
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Comparison, Demonstration, Fit, Message, Prompt

PAD = 99
T, F = True, False


def test_prompts_are_padded_left_and_responses_right():
    block = pack([[1], [2, 3]], [[4, 5, 6], [7]], PAD)
    assert block.tokens.tolist() == [[PAD, 1, 4, 5, 6], [2, 3, 7, PAD, PAD]]
    assert block.prompt_mask.tolist() == [[F, T], [T, T]]
    assert block.response_mask.tolist() == block.mask.tolist() == [[T, T, T], [T, F, F]]
    assert block.attention_mask.tolist() == [[F, T, T, T, T], [T, T, T, F, F]]
    assert block.responses.tolist() == [[4, 5, 6], [7, PAD, PAD]]
    assert block.tokens.dtype == np.int32 and block.mask.dtype == bool


def test_last_is_the_last_real_token_not_the_last_column():
    block = pack([[1], [2, 3], [4]], [[5, 6, 7], [8], []], PAD)
    assert block.last.tolist() == [4, 2, 1]
    assert block.tokens[np.arange(3), block.last].tolist() == [7, 8, 4]


def test_last_does_not_move_when_tokens_stop_counting():
    block = pack([[1]], [[5, 6, 7]], PAD)
    block.mask[:] = False
    assert block.last.tolist() == [3]


def test_columns_can_be_wider_than_any_row():
    block = pack([[1]], [[2]], PAD, prompt_columns=3, response_columns=2)
    assert block.tokens.tolist() == [[PAD, PAD, 1, 2, PAD]]
    assert block.last.tolist() == [3]


def test_a_prompt_needs_a_token():
    with pytest.raises(ValueError, match="start texts without a prompt with EOS"):
        left_pad([[]], PAD, 3)
    assert right_pad([[]], PAD, 2)[0].tolist() == [[PAD, PAD]]


def test_generated_responses_join_with_every_real_token_counting():
    block = join(np.array([[1]]), np.array([[T]]), np.array([[2, PAD]]), np.array([[T, F]]))
    block.mask[:] = False
    assert block.response_mask.tolist() == [[T, F]]


def test_padded_rows_repeat_the_first_and_do_not_count():
    block = pack([[1], [2]], [[3, 4], [5]], PAD)
    padded = block.pad_rows(4)
    assert padded.tokens[2:].tolist() == [block.tokens[0].tolist()] * 2
    assert padded.mask.tolist() == [[T, T], [T, F], [F, F], [F, F]]
    assert padded.response_mask[2:].tolist() == [[T, T]] * 2
    assert block.mask.all(axis=1).tolist() == [T, F]
    assert block.pad_rows(2) is block


def test_chunks_cover_every_row_once():
    assert list(chunks(5, 2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(chunks(5, None)) == [slice(0, 5)]
    assert list(chunks(4, 4)) == [slice(0, 4)]


@pytest.mark.parametrize("size", [None, 1, 2, 3, 5, 8])
def test_evaluation_in_chunks_has_one_shape_and_returns_the_rows_in_order(size):
    block = pack([[1]] * 5, [[i, i] for i in range(5)], PAD)
    shapes = set()

    def evaluate(part):
        shapes.add(part.rows)
        return {"first": part.responses[:, 0], "both": part.responses}

    out = in_chunks(evaluate, block, size)
    assert out["first"].tolist() == [0, 1, 2, 3, 4]
    assert out["both"].shape == (5, 2)
    assert shapes == {min(size or 5, 5)}


def test_lengths_are_bucketed_and_never_above_the_limit():
    assert [round_up(n, 8) for n in (0, 1, 8, 9)] == [8, 8, 8, 16]
    assert Lengths(20, 20, 8).columns(17, 20) == 20
    assert Lengths(20, 20, 8).columns(3, 20) == 8


# ----------------------------------------------------------------------------------------------------------- encoding

LENGTHS = Lengths(prompt=4, response=3, multiple=1)


def ids(tokenizer, *words):
    return [tokenizer.encode(w)[0] for w in words]


def test_a_response_ends_with_the_stop_token_and_a_cut_one_does_not(tokenizer):
    assert encoding.encode_response(tokenizer, "w1 w2", 3) == [*ids(tokenizer, "w1", "w2"), tokenizer.eos_id]
    assert encoding.encode_response(tokenizer, "w1 w2 w3", 3) == ids(tokenizer, "w1", "w2", "w3")
    assert encoding.encode_response(tokenizer, "", 3) == [tokenizer.eos_id]


def test_a_long_dialogue_loses_its_oldest_turns_and_starts_with_the_user(tokenizer):
    roles = ("user", "assistant", "user", "assistant", "user")
    turns = [Message(role, f"w{i} ") for i, role in enumerate(roles, 1)]
    encode = lambda messages, limit: encoding.encode_prompt(tokenizer, Prompt(tuple(messages)), limit)  # noqa: E731
    assert encode(turns, 5) == ids(tokenizer, "w1", "w2", "w3", "w4", "w5")
    assert encode(turns, 4) == ids(tokenizer, "w3", "w4", "w5")
    assert encode(turns, 2) == ids(tokenizer, "w5")
    system = [Message("system", "w9 "), *turns]
    assert encode(system, 4) == ids(tokenizer, "w9", "w3", "w4", "w5")
    assert encode(system, 1) is None


def test_prompts_that_do_not_fit_are_dropped_and_none_left_is_an_error(tokenizer, caplog):
    short, long = Prompt.of("w1 w2"), Prompt.of("w1 w2 w3 w4 w5")
    kept, encoded = encoding.encode_prompts(tokenizer, [long, short], LENGTHS, Fit("train prompts"))
    assert kept == [short] and encoded == [ids(tokenizer, "w1", "w2")]
    assert "train prompts: of 2, 1 dropped because their last prompt alone is longer than 4 tokens\n" in caplog.text
    with pytest.raises(DataError, match=r"All 1 prompts were dropped: their last prompts alone are longer than 4 tokens. Raise"):
        encoding.encode_prompts(tokenizer, [long], LENGTHS)


def test_cut_responses_are_reported(tokenizer, caplog):
    demonstrations = [Demonstration(Prompt.of("w1"), response) for response in ("w1 w2 w3", "w1")]
    encoding.encode_demonstrations(tokenizer, demonstrations, LENGTHS)
    assert "demonstrations: of 2, 1 responses cut to the limit, without EOS\n" in caplog.text


def test_one_line_says_what_the_limits_did_to_a_data_set_and_counts_are_kept(tokenizer, caplog):
    turns = tuple(Message(role, f"w{i} ") for i, role in enumerate(("user", "assistant", "user", "assistant", "user"), 1))
    prompts = [Prompt(turns), Prompt.of("w1 w2 w3 w4 w5"), Prompt.of("w1")]
    demonstrations = [Demonstration(prompt, "w1 w2 w3") for prompt in prompts]
    fit = Fit("train demonstrations")
    assert len(encoding.encode_demonstrations(tokenizer, demonstrations, LENGTHS, fit)) == 2
    assert fit.counts() == {"total": 3, "dropped": 1, "shortened": 1, "cut": 2, "alike": 0, "special": 0, "unknown": 0}
    assert [record.getMessage() for record in caplog.records] == [
        "train demonstrations: of 3, 1 dropped because their last prompt alone is longer than 4 tokens; "
        "1 lost their oldest turns; 2 responses cut to the limit, without EOS"
    ]
    whole = Fit()
    encoding.encode_demonstrations(tokenizer, demonstrations[2:], Lengths(9, 9, 1), whole)
    assert (
        whole.counts() == {"total": 1, "dropped": 0, "shortened": 0, "cut": 0, "alike": 0, "special": 0, "unknown": 0}
        and len(caplog.records) == 1
    )
    texts = Fit()
    encoding.encode_texts(tokenizer, ["w1 w2 w3 w4 w5", "w1 w2 w3 w4 w5 w1", ""], LENGTHS, texts)
    assert texts.counts() == {"total": 2, "dropped": 0, "shortened": 0, "cut": 1, "alike": 0, "special": 0, "unknown": 0}


def test_words_that_the_tokenizer_does_not_know_are_counted_and_the_first_is_named(caplog):
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "[UNK]": 1, "w1": 2, "w2": 3}, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(
        core, eos_token="<eos>", pad_token=None, chat_template="{% for m in messages %}{{ m.content }} {% endfor %}"
    )
    fit = Fit("train prompts")
    prompts = [Prompt.of(text) for text in ("w1", "w1 violet", "indigo w2", "w1 [UNK]")]
    encoding.encode_prompts(tokenizer, prompts, LENGTHS, fit)
    assert fit.unknown == 2
    assert caplog.records[0].getMessage() == (
        "train prompts: of 4, 2 have words that the tokenizer does not know, such as 'violet', which the model reads as its "
        "unknown token"
    )
    demonstrations, comparisons, texts = Fit(), Fit(), Fit()
    encoding.encode_demonstrations(
        tokenizer, [Demonstration(prompts[0], "mauve"), Demonstration(prompts[0], "w2")], LENGTHS, demonstrations
    )
    encoding.encode_comparisons(tokenizer, [Comparison(prompts[0], ("w1", "mauve"), (0, 1))], LENGTHS, comparisons)
    encoding.encode_texts(tokenizer, ["w1 w2", "w1 mauve"], LENGTHS, texts)
    assert (demonstrations.unknown, comparisons.unknown, texts.unknown) == (1, 1, 1)


def test_comparisons_keep_completions_and_ranks_together(tokenizer):
    comparison = Comparison(Prompt.of("w1"), ("w2", "w3 w4"), (1, 0))
    [(rows, ranks)] = encoding.encode_comparisons(tokenizer, [comparison], LENGTHS)
    assert [r.response[:-1] for r in rows] == [ids(tokenizer, "w2"), ids(tokenizer, "w3", "w4")]
    assert ranks == (1, 0)


def test_a_text_starts_from_the_stop_token_alone(tokenizer):
    [example] = encoding.encode_texts(tokenizer, ["w1 w2", ""], LENGTHS)
    assert example == Example([tokenizer.eos_id], [*ids(tokenizer, "w1", "w2"), tokenizer.eos_id])


def test_with_prompt_loss_every_token_but_the_first_counts(tokenizer):
    example = Example([1, 2, 3], [4, 5])
    block = encoding.block([example, Example([6], [7])], tokenizer, LENGTHS, prompt_loss=True)
    counted = [block.responses[row][block.mask[row]].tolist() for row in (0, 1)]
    assert counted == [[2, 3, 4, 5], [7]]
    assert block.tokens[:, 0].tolist() == [1, 6]
    plain = encoding.block([example], tokenizer, LENGTHS)
    assert plain.responses[plain.mask].tolist() == [4, 5]


def test_token_weights_are_one_over_the_tokens_of_the_whole_minibatch():
    micro_batch = np.array([[T, T, F]])  # of a minibatch with 4 tokens
    assert encoding.token_weights(micro_batch, 4).tolist() == [[0.25, 0.25, 0]]
    assert encoding.token_weights(np.zeros((1, 2), bool), 0).tolist() == [[0, 0]]


def test_rows_with_the_same_prompt_are_counted_where_they_are_neighbours():
    def found(prompts, columns=2):
        return pack([[p] * 2 for p in prompts], [[5]] * len(prompts), PAD, prompt_columns=columns)

    cases = {"aabb": 2, "aaaabb": 2, "aaabbb": 3, "aaaaaa": 6, "abab": 1, "aab": 1, "a": 1, "aabbccdd": 2}
    for letters, expected in cases.items():
        assert found([ord(letter) for letter in letters]).rows_per_prompt == expected, letters
    assert found([1, 1], 7).rows_per_prompt == 2


def test_a_short_prompt_is_not_worth_computing_once():
    """Half of 8 + 24 columns' prompts is an eighth of the columns; of 7 + 25, less."""
    for prompt, expected in ((8, 2), (7, 1)):
        assert pack([[1]] * 2, [[2]] * 2, PAD, prompt_columns=prompt, response_columns=32 - prompt).rows_per_prompt == expected


def test_prompts_of_equal_ids_and_other_padding_are_not_the_same():
    block = pack([[7, 7], [7, 7]], [[1], [2]], 7, prompt_columns=4)
    assert block.rows_per_prompt == 2
    block.prompt_mask[1, 1] = True  # a third 7, which was padding
    assert block.rows_per_prompt == 1
