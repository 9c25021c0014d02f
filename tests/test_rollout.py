"""Sampling on a policy that writes what its seeds say, so that every expected number is known beforehand."""

import numpy as np
import pytest

from conftest import Scored
from lockstep.errors import RewardError
from lockstep.interfaces import Generated
from lockstep.learning.randomness import token_seeds
from lockstep.learning.rollout import Sampler, score, scored_only
from lockstep.text.encoding import Lengths
from lockstep.text.sequences import right_pad
from lockstep.text.stopping import Stops
from lockstep.types import Prompt

LENGTHS = Lengths(prompt=6, response=4, multiple=1)
PROMPTS, IDS = [Prompt.of("w1"), Prompt.of("w2 w3")], [[1], [2, 3]]
STOP, PAD = 35, 36


class Writes:
    """Token t of a row is seeds[row, t] mod 30, as log-probability its negative; ``calls`` has the arrays it was given."""

    def __init__(self):
        self.calls = []

    def generate(self, tokens, mask, seeds, *, temperature, stop_ids, pad_id):
        self.calls.append((tokens, mask, seeds, temperature, list(stop_ids), pad_id))
        written = (seeds % 30).astype(np.int32)
        return Generated(written, np.ones(written.shape, bool), -written.astype(np.float32))


class Recites(Writes):
    """Writes the rows it was told."""

    def __init__(self, *rows):
        super().__init__()
        self.rows = rows

    def generate(self, tokens, mask, seeds, *, temperature, stop_ids, pad_id):
        written, real = right_pad(self.rows, pad_id, seeds.shape[1])
        return Generated(written, real, np.zeros(written.shape, np.float32))


@pytest.fixture
def sampler(tokenizer):
    """sampler(*stop strings, batch_size=None)."""
    return lambda *strings, batch_size=None: Sampler(Stops(tokenizer, strings), LENGTHS, 0.7, batch_size)


def test_the_samples_of_a_prompt_are_neighbours(sampler):
    seeds = np.arange(24, dtype=np.uint32).reshape(6, 4)
    samples = sampler().sample(Writes(), PROMPTS, IDS, seeds)
    assert [p.messages[0].content for p in samples.responses.prompts] == ["w1"] * 3 + ["w2 w3"] * 3
    assert samples.sequences.tokens[:, :2].tolist() == [[PAD, 1]] * 3 + [[2, 3]] * 3
    assert samples.sequences.prompt_mask.tolist() == [[False, True]] * 3 + [[True, True]] * 3
    assert samples.sequences.responses.tolist() == (seeds % 30).tolist()
    assert samples.responses.texts[1] == "w4 w5 w6 w7" and samples.logprobs[1].tolist() == [-4, -5, -6, -7]
    assert not samples.finished.any()


def test_seeds_that_do_not_divide_among_the_prompts_are_an_error(sampler):
    for rows in (1, 3):
        with pytest.raises(ValueError, match=f"{rows} rows of seeds do not divide evenly among 2 prompts"):
            sampler().sample(Writes(), PROMPTS, IDS, np.zeros((rows, 4), np.uint32))


def test_without_chunks_the_policy_is_called_once_with_the_whole_batch(sampler):
    policy, seeds = Writes(), token_seeds(0, "sampling", 0, 4, 4)
    sampler().sample(policy, PROMPTS, IDS, seeds)
    [(tokens, mask, given, temperature, stops, pad)] = policy.calls
    assert tokens.tolist() == [[PAD, 1], [PAD, 1], [2, 3], [2, 3]] and mask.sum(axis=1).tolist() == [1, 1, 2, 2]
    assert np.array_equal(given, seeds) and (temperature, stops, pad) == (0.7, [STOP], PAD)


@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, 100])
def test_chunks_have_one_shape_and_change_no_token(sampler, size):
    seeds, policy = token_seeds(0, "sampling", 0, 6, 4), Writes()
    whole = sampler().sample(Writes(), PROMPTS, IDS, seeds)
    cut = sampler(batch_size=size).sample(policy, PROMPTS, IDS, seeds)
    for name in ("tokens", "prompt_mask", "response_mask", "mask"):
        assert np.array_equal(getattr(cut.sequences, name), getattr(whole.sequences, name)), name
    assert np.array_equal(cut.logprobs, whole.logprobs) and cut.responses.texts == whole.responses.texts
    assert {call[0].shape for call in policy.calls} == {(min(size, 6), 2)}
    assert len(policy.calls) == -(-6 // size)


def test_chunks_change_no_token_of_a_real_policy(sampler, load):
    seeds = token_seeds(3, "sampling", 0, 6, 4)
    whole, cut = (sampler(batch_size=size).sample(load(), PROMPTS, IDS, seeds) for size in (None, 4))
    assert np.array_equal(whole.sequences.tokens, cut.sequences.tokens)
    assert len({tuple(row) for row in whole.sequences.responses.tolist()}) == 6


def test_what_a_stop_string_ends_is_trained_on_up_to_it_and_scored_without_it(sampler):
    policy = Recites([1, 2, 3, 7], [5, STOP], [4, 4, 4, 4], [2, 3])
    samples = sampler("w2 w3").sample(policy, PROMPTS, IDS, np.zeros((4, 4), np.uint32))
    assert samples.finished.tolist() == [True, True, False, True]
    assert samples.sequences.mask.sum(axis=1).tolist() == [3, 2, 4, 2]
    assert samples.sequences.responses[0].tolist() == [1, 2, 3, PAD]
    assert samples.responses.texts == ["w1 ", "w5", "w4 w4 w4 w4", ""]
    seen = []
    scores, details = score(Scored(lambda r: seen.append(r) or [1, 2, 3, 4]), samples)
    assert scores.tolist() == [1, 2, 3, 4] and details == {}
    assert seen[0].sequences.responses.tolist() == [[1, STOP, PAD, PAD], [5, STOP, PAD, PAD], [4, 4, 4, 4], [STOP, PAD, PAD, PAD]]
    assert np.array_equal(seen[0].sequences.tokens[:, :2], samples.sequences.tokens[:, :2])


def test_details_are_those_of_the_same_call(sampler):
    class Detailed(Scored):
        def details(self):
            return {"words": np.float32([4, 4])}

    samples = sampler().sample(Writes(), PROMPTS, IDS, np.zeros((2, 4), np.uint32))
    assert score(Detailed(), samples)[1]["words"].tolist() == [4, 4]


def test_a_failed_score_stays_nan_and_its_row_does_not_count(sampler):
    samples = sampler().sample(Writes(), PROMPTS, IDS, np.zeros((2, 4), np.uint32))
    scores, _ = score(Scored(lambda r: [np.nan, -1]), samples)
    assert np.isnan(scores[0]) and scores[1] == -1
    counted = scored_only(samples.sequences, scores)
    assert counted.mask.sum(axis=1).tolist() == [0, 4]
    assert counted.response_mask.all() and samples.sequences.mask.all()
    with pytest.raises(RewardError, match="scored none of the batch's episodes"):
        scored_only(samples.sequences, np.full(2, np.nan))


def test_an_environment_continues_a_context_and_leaves_gaps_in_the_mask(sampler):
    """Two turns by hand: what the policy said and what was answered become the context of the next call."""
    policy, seeds = Writes(), np.arange(8, dtype=np.uint32).reshape(2, 4)
    tokens, mask = np.int32([[PAD, 1], [2, 3]]), np.array([[False, True], [True, True]])
    first = sampler().generate(policy, tokens, mask, seeds)
    answer = np.full((2, 1), 33, np.int32)
    context = np.concatenate([tokens, first.tokens, answer], axis=1)
    seen = np.concatenate([mask, first.mask, np.ones((2, 1), bool)], axis=1)
    second = sampler().generate(policy, context, seen, seeds + np.uint32(10))
    assert policy.calls[1][0].tolist() == [[PAD, 1, 0, 1, 2, 3, 33], [2, 3, 4, 5, 6, 7, 33]]
    samples = sampler().finish(PROMPTS, context, seen, second)
    assert samples.sequences.prompt_length == 7 and samples.sequences.responses.tolist() == second.tokens.tolist()


@pytest.mark.parametrize("given", [np.zeros((2, 1)), np.zeros(1), ["1", "2"], None, 0.5], ids=str)
def test_scores_that_are_not_one_number_for_each_response_name_the_reward_model(sampler, given):
    class Careless(Scored):
        def score(self, responses):
            return given

    samples = sampler().sample(Writes(), PROMPTS, IDS, np.zeros((2, 4), np.uint32))
    with pytest.raises(RewardError, match="Careless.score gave .* for 2 responses: it must give an array of 2 numbers"):
        score(Careless(), samples)
