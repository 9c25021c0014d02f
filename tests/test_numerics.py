"""Host numerics against numbers worked by hand, explicit loops, exact enumeration and the literature's own fixtures."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize

from lockstep.learning import numerics
from lockstep.text.stopping import ends_with_stop

T, F = True, False


def f32(*rows):
    return np.array(rows, np.float32)


def mask(*rows):
    return np.array(rows, bool)


# --------------------------------------------------------------------------------------------------- masked statistics


def test_masked_mean_weighs_tokens_not_rows():
    assert numerics.masked_mean(f32([1, 2, 3], [10, 99, 99]), mask([T, T, T], [T, F, F])) == 4.0
    assert math.isnan(numerics.masked_mean(f32([1.0]), mask([F])))


def test_whitening_is_worked_by_hand():
    out = numerics.whiten(f32([1, 2], [3, np.nan]), mask([T, T], [T, F]))
    np.testing.assert_allclose(out, [[-math.sqrt(1.5), 0], [math.sqrt(1.5), 0]], rtol=1e-6)
    assert out.dtype == np.float32


def test_whitened_entries_have_masked_mean_zero_and_biased_variance_one():
    rng = np.random.default_rng(0)
    x, counts = rng.normal(3, 7, (9, 11)).astype(np.float32), rng.random((9, 11)) < 0.6
    x[~counts] = np.nan
    out = numerics.whiten(x, counts)
    picked = [float(out[i, j]) for i in range(9) for j in range(11) if counts[i, j]]
    assert sum(picked) / len(picked) == pytest.approx(0, abs=1e-6)
    assert sum(v * v for v in picked) / len(picked) == pytest.approx(1, abs=1e-5)
    assert (out[~counts] == 0).all()


def test_whitening_what_does_not_vary_gives_zero_not_nan():
    np.testing.assert_array_equal(numerics.whiten(f32([2, 2]), mask([T, T])), [[0, 0]])


def test_scaling_to_unit_variance_keeps_the_mean():
    out = numerics.scale_to_unit_variance(f32([1, 2, 3, np.inf]), mask([T, T, T, F]))
    np.testing.assert_allclose(out, [[2 - math.sqrt(1.5), 2, 2 + math.sqrt(1.5), 0]], rtol=1e-6)


def test_explained_variance_is_one_for_the_truth_zero_for_a_constant_negative_for_worse():
    returns, counts = f32([1, 2, 3, np.nan]), mask([T, T, T, F])
    assert numerics.explained_variance(returns, returns, counts) == 1
    assert numerics.explained_variance(f32([7, 7, 7, 7]), returns, counts) == 0
    assert numerics.explained_variance(f32([3, 2, 1, 0]), returns, counts) == pytest.approx(-3)
    assert math.isnan(numerics.explained_variance(returns, f32([5, 5, 5, 5]), counts))


# ----------------------------------------------------------------------------------------------------------------- KL


def test_k1_and_k3_of_one_half_against_one_quarter():
    logprobs, reference = np.log(f32([0.5, 0.25, 1])), np.log(f32([0.25, 0.5, 1]))
    counts = mask([T, T, T])
    ln2 = 0.69314718
    np.testing.assert_allclose(numerics.k1(logprobs, reference, counts), [[ln2, -ln2, 0]], rtol=1e-6)
    np.testing.assert_allclose(numerics.k3(logprobs, reference, counts), [[ln2 - 0.5, 1 - ln2, 0]], rtol=1e-6)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_kl_of_masked_tokens_is_zero_whatever_they_hold(garbage):
    logprobs, counts = f32([-1, garbage]), mask([T, F])
    assert numerics.k1(logprobs, f32([-2, 0]), counts).tolist() == [[1, 0]]
    assert numerics.k3(logprobs, f32([-1, 0]), counts).tolist() == [[0, 0]]


def test_k1_and_k3_are_unbiased_by_enumeration():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    exact = 0.5 * math.log(2.5) + 0.3 * math.log(1.5) + 0.2 * math.log(1 / 3)
    logp, logq, counts = np.log(p)[None], np.log(q)[None], mask([T, T, T])
    assert (p * numerics.k1(logp, logq, counts)[0]).sum() == pytest.approx(exact, rel=1e-6)
    assert (p * numerics.k3(logp, logq, counts)[0]).sum() == pytest.approx(exact, rel=1e-6)
    assert numerics.k1(logp, logq, counts).min() < 0 <= numerics.k3(logp, logq, counts).min()


def test_policy_gradient_with_k1_in_the_reward_is_the_exact_gradient_of_the_kl():
    """Three tokens, two steps, every sequence enumerated: Σ_y π(y) Σ_t ∇log π(y_t | y_<t) A_t against finite differences."""
    rng = np.random.default_rng(3)
    states = [(), (0,), (1,), (2,)]
    theta, reference = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    sequences = list(itertools.product(range(3), repeat=2))

    def logprob(table, sequence, t):
        row = table[states.index(sequence[:t])]
        return row[sequence[t]] - math.log(sum(math.exp(v) for v in row))

    def kl(table):
        total = 0.0
        for y in sequences:
            log_pi = logprob(table, y, 0) + logprob(table, y, 1)
            total += math.exp(log_pi) * (log_pi - logprob(reference, y, 0) - logprob(reference, y, 1))
        return total

    logprobs = np.array([[logprob(theta, y, t) for t in (0, 1)] for y in sequences])
    ref = np.array([[logprob(reference, y, t) for t in (0, 1)] for y in sequences])
    counts = np.ones((9, 2), bool)
    rewards = numerics.token_rewards(np.zeros(9), numerics.k1(logprobs, ref, counts), counts, kl_coef=1.0)
    advantages, _ = numerics.gae(rewards, np.zeros((9, 2)), counts, gamma=1.0, lam=1.0)
    gradient = np.zeros_like(theta)
    for y, row, advantage in zip(sequences, logprobs, advantages, strict=True):
        for t in (0, 1):
            state = states.index(y[:t])
            probabilities = np.exp(theta[state]) / np.exp(theta[state]).sum()
            gradient[state] += math.exp(row.sum()) * advantage[t] * (np.eye(3)[y[t]] - probabilities)
    for i, j in np.ndindex(4, 3):
        step = np.zeros_like(theta)
        step[i, j] = 1e-5
        assert -gradient[i, j] == pytest.approx((kl(theta + step) - kl(theta - step)) / 2e-5, abs=1e-6)


@pytest.mark.parametrize(("kl", "coef"), [(0, 0.148464), (6, 0.15), (7.2, 0.151536), (100, 0.151536), (6.6, 0.150768)])
def test_adaptive_kl_coefficient_of_lm_human_preferences(kl, coef):
    controller = numerics.AdaptiveKL(0.15, target=6.0, horizon=10000.0)
    controller.update(kl, 512)
    assert controller.coef == pytest.approx(coef, abs=1e-9)


def test_fixed_kl_coefficient_never_moves():
    controller = numerics.FixedKL(0.02)
    controller.update(1e6, 512)
    assert controller.coef == 0.02


# ------------------------------------------------------------------------------------------------------------ rewards


def test_finished_means_that_the_last_counted_token_is_a_configured_stop_token():
    responses = np.array([[5, 9, 0, 0], [9, 5, 0, 0], [5, 8, 0, 0], [5, 5, 5, 9], [9, 9, 9, 9]])
    counts = mask([T, T, F, F], [T, T, F, F], [T, T, F, F], [T, T, T, T], [F, F, F, F])
    assert ends_with_stop(responses, counts, [9]).tolist() == [T, F, F, T, F]
    assert ends_with_stop(responses, counts, [8]).tolist() == [F, F, T, F, F]
    assert ends_with_stop(responses, counts, [8, 9]).tolist() == [T, F, T, T, F]


def test_the_score_of_an_unfinished_response_is_replaced_not_reduced():
    scores, finished = np.array([2.0, 2.0, -5.0]), mask([T, F, F])[0]
    assert numerics.replace_unfinished(scores, finished, -1.0).tolist() == [2, -1, -1]
    assert numerics.replace_unfinished(scores, finished, None).tolist() == [2, 2, -5]


def test_the_score_lands_once_on_the_last_counted_token():
    kl = f32([1, 2, np.nan], [1, 2, 4], [1, np.nan, 3], [np.nan, np.nan, np.nan])
    counts = mask([T, T, F], [T, T, T], [T, F, T], [F, F, F])
    rewards = numerics.token_rewards(np.array([10.0, 20, 30, np.nan]), kl, counts, kl_coef=0.5)
    np.testing.assert_allclose(rewards, [[-0.5, 9, 0], [-0.5, -1, 18], [-0.5, 0, 28.5], [0, 0, 0]])


def test_a_score_of_073_survives_integer_inputs():
    rewards = numerics.token_rewards(np.array([0.73]), np.zeros((1, 3), np.int32), mask([T, T, F]), 0.1)
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [[0, pytest.approx(0.73), 0]]


# ---------------------------------------------------------------------------------------------------------------- GAE


def brute_force_advantage(rewards, values, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l} over the tokens of one response, summed forwards."""
    n = len(rewards)
    deltas = [rewards[t] + (gamma * values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


def test_gae_is_worked_by_hand():
    # γ = 1, λ = 1/2: δ = (0 + 2 - 1, 0 + 3 - 2, 4 - 3) = (1, 1, 1), A = (1.75, 1.5, 1), R = A + V.
    advantages, returns = numerics.gae(f32([0, 0, 4]), f32([1, 2, 3]), mask([T, T, T]), gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[1.75, 1.5, 1]]
    assert returns.tolist() == [[2.75, 3.5, 4]]


@pytest.mark.parametrize(("gamma", "lam"), [(1, 0.95), (0.9, 0.8), (1, 0), (0.7, 1)])
def test_gae_is_the_brute_force_sum_over_counted_tokens(gamma, lam):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 8, 7))
    counts = rng.random((8, 7)) < 0.6  # gaps inside rows, too
    counts[0], counts[1], counts[2] = True, False, [T, F, F, F, F, F, F]
    rewards[~counts] = values[~counts] = np.nan
    advantages, returns = numerics.gae(rewards, values, counts, gamma=gamma, lam=lam)
    for row in range(8):
        columns = [t for t in range(7) if counts[row, t]]
        expected = brute_force_advantage(rewards[row, columns], values[row, columns], gamma, lam)
        np.testing.assert_allclose(advantages[row, columns], expected, atol=1e-6)
        np.testing.assert_allclose(returns[row, columns], expected + values[row, columns], atol=1e-6)
    assert (advantages[~counts] == 0).all() and (returns[~counts] == 0).all()


def test_gae_with_lambda_one_gives_monte_carlo_returns_whatever_the_values():
    values = np.random.default_rng(0).normal(size=(1, 4))
    _, returns = numerics.gae(f32([1, 2, 4, 100]), values, mask([T, T, T, F]), gamma=1.0, lam=1.0)
    np.testing.assert_allclose(returns, [[7, 6, 4, 0]], atol=1e-6)
    _, discounted = numerics.gae(f32([1, 2, 4, 100]), values, mask([T, T, T, F]), gamma=0.5, lam=1.0)
    np.testing.assert_allclose(discounted, [[3, 4, 4, 0]], atol=1e-6)


def test_gae_with_lambda_zero_gives_the_temporal_difference():
    advantages, _ = numerics.gae(f32([1, 2, 4]), f32([10, 20, 40]), mask([T, T, T]), gamma=0.5, lam=0.0)
    assert advantages.tolist() == [[1, 2, -36]]


def test_gae_of_a_single_token_is_reward_minus_value():
    advantages, returns = numerics.gae(f32([0.73, 9]), f32([0.5, 9]), mask([T, F]), gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantages, [[0.23, 0]], atol=1e-6)
    np.testing.assert_allclose(returns, [[0.73, 0]], atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ ranking


def test_a_pair_weighs_one_and_three_completions_a_third_each():
    assert numerics.preferences([(1, 0)], 2).tolist() == [[0, 0], [1, 0]]
    third = pytest.approx(1 / 3)
    assert numerics.preferences([(2, 0, 1)], 3).tolist() == [[0, 0, 0], [third, 0, third], [third, 0, 0]]


def test_prompts_weigh_alike_and_never_mix_and_padding_rows_weigh_nothing():
    weights = numerics.preferences([(0, 1), (3, 2, 1, 0)], 8)
    assert weights[0, 1] == 0.5
    assert weights[2:6, 2:6].sum() == pytest.approx(0.5)
    assert weights.sum() == pytest.approx(1)
    assert weights[:2, 2:].sum() == weights[2:, :2].sum() == weights[6:].sum() == weights[:, 6:].sum() == 0


def test_ties_are_dropped():
    weights = numerics.preferences([(0, 1, 1)], 3)
    assert weights[1, 2] == weights[2, 1] == 0
    assert weights[0].tolist() == [0, pytest.approx(1 / 3), pytest.approx(1 / 3)]


def test_preferences_follow_a_permutation_of_the_completions():
    ranks, order = (2, 0, 1, 1), [3, 1, 0, 2]
    permuted = numerics.preferences([[ranks[i] for i in order]], 4)
    np.testing.assert_array_equal(permuted, numerics.preferences([ranks], 4)[np.ix_(order, order)])


def test_margins_accuracy_and_brier_score_of_three_completions():
    scores = np.array([0.0, 2.0, 2.0])
    margins = numerics.pair_margins(scores, numerics.preferences([(2, 0, 1)], 3))  # pairs (1, 0), (1, 2), (2, 0)
    assert margins.tolist() == [2, 0, 2]
    assert numerics.ranking_accuracy(margins) == pytest.approx(2.5 / 3)
    assert numerics.brier_score(np.zeros(4)) == 0.25
    assert numerics.brier_score(np.array([math.log(3)])) == pytest.approx(1 / 16)


def test_calibration_error_of_a_model_that_is_75_percent_sure_and_always_or_half_the_time_right():
    sure = math.log(3)
    assert numerics.expected_calibration_error(np.array([sure] * 4)) == pytest.approx(0.25)
    assert numerics.expected_calibration_error(np.array([sure, -sure])) == pytest.approx(0.25)
    assert numerics.expected_calibration_error(np.array([sure, sure, sure, -sure])) == pytest.approx(0)
    assert numerics.expected_calibration_error(np.array([1e4, 1e4])) == pytest.approx(0)


def test_sigmoid_is_quiet_at_the_extremes():
    with np.errstate(all="raise"):
        np.testing.assert_allclose(numerics.sigmoid(np.array([-1e4, 0, math.log(3), 1e4])), [0, 0.5, 0.75, 1])


# ---------------------------------------------------------------------------------------------------------- best of n


def best(scores, n, values=None):
    return float(numerics.best_of(f32(*scores), n) @ np.asarray(scores if values is None else values, float))


def test_the_best_of_n_is_estimated_for_every_n_from_the_same_samples():
    assert [best([3, 1, 2], n) for n in (1, 2, 3)] == pytest.approx([2, 8 / 3, 3], abs=1e-9)
    assert best([0, 1, 1], 2, [5, 2, 4]) == pytest.approx(3, abs=1e-9)  # ties share their mean gold
    rng = np.random.default_rng(0)
    scores, gold = rng.integers(0, 4, 7).astype(float), rng.normal(size=7)
    for n in range(1, 8):  # over all subsets, each of whose best are equally likely
        means = [np.mean(gold[[i for i in s if scores[i] == max(scores[list(s)])]]) for s in itertools.combinations(range(7), n)]
        assert best(scores, n, gold) == pytest.approx(np.mean(means), abs=1e-12)
    many = numerics.best_of(rng.normal(size=4096), 1000)  # no factorial overflows
    assert many.sum() == pytest.approx(1) and np.isfinite(many).all()


def test_the_best_of_n_of_right_and_wrong_is_pass_at_n():
    assert best([0, 1, 0, 1], 2) == pytest.approx(5 / 6, abs=1e-9)  # 1 - (1 - 2 / 4)^2 = 0.75 is biased
    for c, n in itertools.product(range(6), range(1, 6)):
        expected = 1 - math.comb(5 - c, n) / math.comb(5, n)
        assert best([1.0] * c + [0.0] * (5 - c), n) == pytest.approx(expected, abs=1e-12)


def test_kl_of_the_best_of_n_is_bounded_and_lower_where_scores_repeat():
    assert [numerics.best_of_kl_bound(n) for n in (1, 2, 4, 16)] == pytest.approx([0, 0.193147, 0.636294, 1.835089], abs=1e-6)
    assert numerics.best_of_kl(f32(0, 1, 0, 1), 2) == pytest.approx(0.130812, abs=1e-6)  # a fair coin
    for n in (1, 2, 7, 64):
        assert numerics.best_of_kl(np.random.default_rng(0).normal(size=64), n) == pytest.approx(numerics.best_of_kl_bound(n))
        assert numerics.best_of_kl(f32(*[3] * 64), n) == pytest.approx(0, abs=1e-12)


def test_kl_of_the_best_of_n_is_that_of_the_enumerated_distribution():
    """Three responses of probability 0.2, 0.3, 0.5, of which the first two score alike; the best is drawn among equals."""
    p, score = np.array([0.2, 0.3, 0.5]), np.array([1.0, 1.0, 0.0])
    for n in (2, 3, 5):
        chosen = np.zeros(3)
        for draw in itertools.product(range(3), repeat=n):
            top = [y for y in draw if score[y] == max(score[list(draw)])]
            for y in top:
                chosen[y] += np.prod(p[list(draw)]) / len(top)
        expected = float(np.sum(chosen * np.log(chosen / p)))
        assert numerics.best_of_kl(np.repeat(score, [2, 3, 5]), n) == pytest.approx(expected, abs=1e-12)
        assert expected < numerics.best_of_kl_bound(n)


def test_samples_are_split_into_powers_of_two_and_all():
    assert [numerics.best_of_sizes(n) for n in (0, 1, 2, 6, 8)] == [[], [1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


# ---------------------------------------------------------------------------------------------------------- intervals


def test_mean_interval_is_the_textbook_one():
    mean, low, high = numerics.mean_interval(np.array([1.0, 2, 3, 4, 5]))  # s = sqrt(2.5), s / sqrt(5) = sqrt(0.5)
    assert (mean, low, high) == pytest.approx((3, 3 - 1.96 * math.sqrt(0.5), 3 + 1.96 * math.sqrt(0.5)))
    assert numerics.mean_interval(np.array([7.0])) == (7, 7, 7)


@pytest.mark.parametrize(("successes", "low", "high"), [(0, 0.0, 0.2775), (5, 0.2366, 0.7634), (10, 0.7225, 1.0)])
def test_proportion_interval_is_wilsons(successes, low, high):
    x = np.arange(10) < successes
    assert numerics.proportion_interval(x) == pytest.approx((successes / 10, low, high), abs=1e-4)
    assert numerics.proportion_interval(x, np.arange(10)) == numerics.proportion_interval(x)
    twice = numerics.proportion_interval(np.repeat(x, 2), np.repeat(np.arange(10), 2))  # the second of each adds nothing
    assert twice == pytest.approx(numerics.proportion_interval(x), rel=0.03)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_clusters_of_the_same_mix_are_as_good_as_independent_rows(size):
    x = np.tile(np.arange(size) == 0, 10)
    assert numerics.proportion_interval(x, np.repeat(np.arange(10), size)) == numerics.proportion_interval(x)
    _, low, high = numerics.proportion_interval(x, np.zeros(10 * size))
    assert high - low > 0.7  # one cluster is one observation
    low, high = numerics.proportion_interval(np.ones(10 * size), np.repeat(np.arange(10), size))[1:]
    assert (low, high) == numerics.proportion_interval(np.ones(10))[1:]


def test_rows_of_one_cluster_are_no_more_evidence_than_one_row():
    """By hand: clusters of 2, 2 and 1 rows around the mean 3 sum to -3, 1 and 2: 3 / 2 (9 + 1 + 4) = 21, / 5². And by drawing."""
    x, clusters = np.array([1.0, 2, 3, 4, 5]), np.array([7, 7, 0, 0, 3])
    assert numerics.clustered_error(x, clusters) == pytest.approx(math.sqrt(21) / 5)
    assert numerics.mean_interval(x, clusters)[2] == pytest.approx(3 + 1.96 * math.sqrt(21) / 5)
    assert numerics.clustered_error(x, np.zeros(5)) == 0
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 6, 200)
    own = np.repeat(np.arange(200), sizes)
    covered = 0
    for _ in range(400):
        rows = draw.normal(size=200)[own] + 0.5 * draw.normal(size=len(own))
        _, low, high = numerics.mean_interval(rows, own)
        covered += low <= 0 <= high
    assert 0.91 < covered / 400 < 0.98


def test_overoptimisation_recovers_its_two_coefficients():
    """Gains of 0.5, 0 and -1.5 at d = 1, 2, 3 are d (1 - d / 2); a line through zero has Σ d gain / Σ d² = -4 / 14."""
    kl, gain = np.array([1.0, 4.0, 9.0]), np.array([0.5, 0.0, -1.5])
    assert numerics.overoptimisation(kl, gain) == pytest.approx((1, 0.5))
    assert numerics.without_fall(kl, gain) == pytest.approx(-4 / 14)


# ----------------------------------------------------------------------------------------- win rates at equal length


def wins_of(seed, rows, a, b, longer=0.0):
    """Wins whose logit is a + b tanh(d / std d), and d."""
    rng = np.random.default_rng(seed)
    d = rng.normal(longer, 10, rows).round()
    return (rng.random(rows) < numerics.sigmoid(a + b * np.tanh(d / d.std()))).astype(float), d


def test_the_length_controlled_win_rate_maximises_firths_likelihood():
    wins, d = wins_of(0, 60, 0.4, 1.2, longer=6)
    wins[:5] = 0.5

    def loss(fit):
        total, information = 0.0, np.zeros((2, 2))
        for win, x in zip(wins, np.tanh(d / d.std()), strict=True):
            p = 1 / (1 + math.exp(-fit[0] - fit[1] * x))
            total += win * math.log(p) + (1 - win) * math.log(1 - p)
            information += p * (1 - p) * np.array([[1, x], [x, x * x]])
        return -total - 0.5 * math.log(np.linalg.det(information))

    best = optimize.minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13}).x
    assert numerics.length_controlled_win_rate(wins, d)[0] == pytest.approx(1 / (1 + math.exp(-best[0])), abs=1e-7)


def test_the_length_controlled_win_rate_of_a_few_pairs_is_the_best_fit_there_is():
    """Where Fisher scoring alone would go to and fro. Against a search over a grid, then downhill."""
    rng = np.random.default_rng(3)
    cases = [([1, 1], [1, -1]), ([0, 0, 0, 0], [-2, -2, 0, -3]), ([1, 0, 1, 1, 0.5], [40, -1, 1, 0, -1])]
    cases += [(rng.choice([0, 0.5, 1], n), rng.integers(-3, 4, n)) for n in rng.integers(3, 13, 25)]
    for wins, d in cases:
        wins, d = np.array(wins, float), np.array(d)
        if (found := numerics.length_controlled_win_rate(wins, d)) is None:
            assert d.min() > 0 or d.max() < 0
            continue
        x = np.stack([np.ones(len(d)), np.tanh(d / (d.std() or 1))], axis=1)[:, : 1 + bool(d.any())]

        def loss(fit, x=x, wins=wins):
            z = x @ fit
            p = numerics.sigmoid(z)
            return -(wins * z - np.logaddexp(0, z)).sum() - 0.5 * np.linalg.slogdet((x.T * (p * (1 - p))) @ x)[1]

        grid = itertools.product(np.linspace(-6, 6, 25), repeat=x.shape[1])
        start = min((np.array(point) for point in grid), key=loss)
        best = optimize.minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12}).x
        assert found[0] == pytest.approx(numerics.sigmoid(best[0]), abs=1e-5), (wins, d)


def test_who_wins_by_being_longer_does_not_win_at_equal_length():
    wins, d = wins_of(1, 4000, 0.0, 2.5, longer=8)
    assert wins.mean() > 0.68
    rate, low, high = numerics.length_controlled_win_rate(wins, d)
    assert low < 0.5 < high and abs(rate - 0.5) < 0.03


def test_the_interval_of_the_length_controlled_win_rate_covers_the_truth_19_times_in_20():
    found = [numerics.length_controlled_win_rate(*wins_of(seed, 80, 0.6, 1.0, longer=5)) for seed in range(600)]
    assert 0.93 < np.mean([low <= numerics.sigmoid(0.6) <= high for _, low, high in found]) < 0.97


@pytest.mark.parametrize("wins", [[1, 1, 0, 0.5], [1, 1, 1, 1]])
def test_without_a_difference_in_length_it_is_the_win_rate_with_half_a_win_and_half_a_loss_more(wins):
    rate, low, high = numerics.length_controlled_win_rate(np.array(wins, float), np.zeros(4))
    assert rate == pytest.approx((sum(wins) + 0.5) / 5) and low < rate < high < 1


def test_a_length_controlled_win_rate_is_that_of_the_other_side_turned_round():
    wins, d = wins_of(2, 50, -0.3, 0.7, longer=-4)
    rate, low, high = numerics.length_controlled_win_rate(wins, d)
    assert numerics.length_controlled_win_rate(1 - wins, -d) == pytest.approx((1 - rate, 1 - high, 1 - low))


def test_always_longer_or_always_shorter_says_nothing_about_equal_length():
    for d in ([4, 4, 4], [100, 101, 102], [-1, -9, -3]):
        assert numerics.length_controlled_win_rate(np.array([1.0, 0.0, 1.0]), np.array(d)) is None


def test_a_policy_that_always_wins_when_it_is_longer_has_a_finite_interval():
    d = np.array([-5.0, -3, -2, 4, 6, 9])
    rate, low, high = numerics.length_controlled_win_rate((d > 0).astype(float), d)
    assert 0 < low < 0.2 and 0.3 < rate < 0.7 and 0.8 < high < 1
