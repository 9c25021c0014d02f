"""Random numbers are functions of (seed, stream, step, row): reproducible, independent, of the right distribution."""

import collections
import math

import numpy as np
import pytest

from lockstep.errors import ConfigError
from lockstep.learning import randomness


def test_hash_is_the_finaliser_of_murmur3():
    # fmix32 of 0 and 1 as published with SMHasher's reference implementation.
    assert randomness.hash32(np.array([0, 1], np.uint32)).tolist() == [0, 0x514E28B7]
    some = [2, 0xDEADBEEF, 2**32 - 1]
    assert randomness.hash32(np.array(some, np.uint32)).tolist() == [hash32(x) for x in some]


def hash32(h):
    """The same in Python's own integers."""
    h = ((h ^ h >> 16) * 0x85EBCA6B) % 2**32
    h = ((h ^ h >> 13) * 0xC2B2AE35) % 2**32
    return h ^ h >> 16


def test_gumbel_noise_is_the_documented_function_of_seed_and_token():
    noise = randomness.hash_gumbel(np.array([7, 123456789], np.uint32), 5)
    assert noise.shape == (2, 5) and noise.dtype == np.float32
    for row, seed in enumerate((7, 123456789)):
        for token in range(5):
            u = ((hash32(hash32(token) ^ seed) >> 8) + 0.5) / 2**24
            assert noise[row, token] == pytest.approx(-math.log(-math.log1p(-u)), abs=2e-5)


def test_gumbel_noise_has_the_mean_and_variance_of_a_standard_gumbel():
    noise = randomness.hash_gumbel(randomness.token_seeds(0, "test", 0, 1000, 4), 50).astype(np.float64)
    assert noise.mean() == pytest.approx(0.577216, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_gumbel_noise_is_finite_for_every_possible_word():
    seed = np.array([hash32(3) ^ unhash(0xFFFFFFFF)], np.uint32)
    assert np.isfinite(randomness.hash_gumbel(seed, 5)).all()


def unhash(h):
    """The inverse of `hash32`, by modular inverses."""
    h ^= h >> 16
    h = h * pow(0xC2B2AE35, -1, 2**32) % 2**32
    h ^= (h >> 13) ^ (h >> 26)
    h = h * pow(0x85EBCA6B, -1, 2**32) % 2**32
    return h ^ h >> 16


def test_the_largest_logit_plus_noise_is_a_draw_from_the_softmax():
    probabilities = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    seeds = randomness.token_seeds(1, "test", 0, 20000, 1)[:, 0]
    draws = (np.log(probabilities) + randomness.hash_gumbel(seeds, 5)).argmax(-1)
    counts = np.bincount(draws, minlength=5)
    expected = 20000 * probabilities
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi² with 4 degrees of freedom: p > 0.001


def test_the_same_arguments_give_the_same_numbers_and_any_other_gives_others():
    base = randomness.token_seeds(0, "sampling", 3, 4, 5)
    np.testing.assert_array_equal(base, randomness.token_seeds(0, "sampling", 3, 4, 5))
    for other in ((1, "sampling", 3), (0, "evaluation", 3), (0, "sampling", 4)):
        assert not (base == randomness.token_seeds(*other, 4, 5)).any()


def test_rows_do_not_depend_on_how_many_there_are():
    many, few = randomness.token_seeds(0, "sampling", 3, 64, 24), randomness.token_seeds(0, "sampling", 3, 5, 24)
    np.testing.assert_array_equal(many[:5], few)
    assert len(np.unique(many)) == many.size


def test_consecutive_steps_do_not_share_numbers_however_many_are_drawn():
    first, second = (set(randomness.token_seeds(0, "sampling", step, 100, 100).ravel().tolist()) for step in (0, 1))
    assert len(first & second) < 5  # 10^4 x 10^4 / 2^32 = 0.02 chance meetings are expected


def test_every_pass_holds_each_example_once_in_an_order_of_its_own():
    passes = randomness.example_indices(0, "order", 10, 0, 30).reshape(3, 10)
    assert [sorted(p) for p in passes.tolist()] == [list(range(10))] * 3
    assert len({tuple(p) for p in passes.tolist()}) == 3


@pytest.mark.parametrize(("size", "count"), [(300, 300), (300, 200), (7, 5), (10, 3), (1, 1)])
def test_rounds_repeat_nothing_within_a_round_nor_before_all_has_been_used(size, count):
    rounds = [randomness.indices_of_round(0, "s", size, count, number) for number in range(1, 12)]
    assert all(len(set(each)) == count for each in rounds)
    used = collections.Counter()
    for each in rounds:
        used.update(each)
        assert max(used.values()) - min(used[i] for i in range(size)) <= 1
    first = randomness.example_indices(0, "s", size, 0, count)
    assert rounds[0] == first.tolist() and randomness.indices_of_round(0, "s", size, 0, 3) == []


def test_a_batch_is_the_same_whether_or_not_the_ones_before_it_were_drawn():
    whole = randomness.example_indices(0, "order", 7, 0, 40)
    for start in (0, 3, 12, 35):
        np.testing.assert_array_equal(randomness.example_indices(0, "order", 7, start, 5), whole[start : start + 5])


def test_a_permutation_differs_from_one_epoch_to_the_next():
    orders = {tuple(randomness.permutation(0, "minibatches", epoch, 8)) for epoch in range(50)}
    assert len(orders) > 45


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_that_would_wrap_around_are_refused(seed):
    with pytest.raises(ConfigError, match=f"^seed={seed} must be at least 0 and below"):
        randomness.generator(seed, "order")
    assert randomness.generator(2**64 - 1, "order").integers(2**32) != randomness.generator(0, "order").integers(2**32)
