"""Losses under every namespace that runs them: the same numbers, and gradients that are exactly zero where they must be."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lockstep.learning import losses
from lockstep_rlhf.algorithms.language_modelling import NextTokenLoss
from lockstep_rlhf.algorithms.ppo import PPOLoss
from lockstep_rlhf.algorithms.reward_modelling import RankingLoss

LN2 = 0.69314718


class Numpy:
    def __init__(self):
        import numpy

        self.xp, self.asarray = numpy, numpy.asarray


class Strict:
    def __init__(self):
        self.xp = pytest.importorskip("array_api_strict")
        self.asarray = self.xp.asarray


class Torch:
    def __init__(self):
        pytest.importorskip("torch")
        self.xp = pytest.importorskip("array_api_compat.torch")
        self.asarray = self.xp.asarray

    def gradient(self, function, x):
        x = self.asarray(x).clone().requires_grad_()
        function(x).backward()
        return x.grad.numpy()


class Jax:
    def __init__(self):
        self.jax = pytest.importorskip("jax")
        self.xp = self.jax.numpy
        self.asarray = self.xp.asarray

    def gradient(self, function, x):
        return np.asarray(self.jax.grad(function)(self.asarray(x)))


@pytest.fixture(params=[Numpy, Strict, Torch, Jax], ids=["numpy", "strict", "torch", "jax"])
def library(request):
    return request.param()


@pytest.fixture(params=[Torch, Jax], ids=["torch", "jax"])
def autodiff(request):
    return request.param()


def f32(*values):
    return np.array(values, np.float32)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss"),
    [(2, 1, -2), (2, 1.5, -2.4), (2, 0.5, -1), (-2, 1, 2), (-2, 1.5, 3), (-2, 0.5, 1.6), (0, 3, 0)],
)
def test_clipped_policy_loss_is_pessimistic(library, advantage, ratio, loss):
    out = losses.clipped_policy_loss(library.xp, library.asarray(f32(ratio)), library.asarray(f32(advantage)), low=0.2, high=0.2)
    assert float(out[0]) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "old", "returned", "loss"),
    [(1, 1, 3, 2), (2, 1, 3, 0.5 * 1.8**2), (2, 1, 1, 0.5), (0, 1, 3, 4.5), (1.1, 1, 1.1, 0), (0.9, 1, 1.9, 0.5)],
)
def test_clipped_value_loss_takes_the_worse_of_both(library, value, old, returned, loss):
    arrays = [library.asarray(f32(x)) for x in (value, old, returned)]
    out = losses.clipped_value_loss(library.xp, *arrays, clip_range=0.2)
    assert float(out[0]) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "x", "slope"),
    [
        (lambda xp, x: losses.clipped_policy_loss(xp, x, x * 0 - 2, low=0.0, high=0.2), 1, 2),
        (lambda xp, x: losses.clipped_policy_loss(xp, x, x * 0 + 2, low=0.0, high=0.2), 1, -2),
        (lambda xp, x: losses.clipped_policy_loss(xp, x, x * 0 + 2, low=0.5, high=0.5), 1.5, -2),
        (lambda xp, x: losses.log_ratio(xp, x, x * 0), 20, 1),
        (lambda xp, x: losses.log_ratio(xp, x, x * 0), 20.5, 0),
        (lambda xp, x: losses.clipped_value_loss(xp, x, x * 0 + 0.25, x * 0 + 1, clip_range=0.5), 0.75, -0.25),
        (lambda xp, x: losses.clipped_value_loss(xp, x, x * 0 + 0.25, x * 0 + 1, clip_range=0.5), 0.25, -0.75),
    ],
)
def test_on_the_edge_of_a_clip_every_library_has_the_unclipped_gradient(autodiff, loss, x, slope):
    found = autodiff.gradient(lambda x: autodiff.xp.sum(loss(autodiff.xp, x)), f32(x, x))
    assert found.tolist() == [slope, slope]


def test_clipped_value_loss_is_never_below_the_unclipped_one_and_equal_inside_the_range(library):
    rng = np.random.default_rng(0)
    values, old, returns = rng.normal(size=(3, 200)).astype(np.float32)
    out = losses.clipped_value_loss(library.xp, *map(library.asarray, (values, old, returns)), clip_range=0.2)
    unclipped = [0.5 * (v - r) ** 2 for v, r in zip(values.tolist(), returns.tolist(), strict=True)]
    inside = abs(values - old) < 0.2
    assert (np.asarray(out) >= np.array(unclipped) - 1e-6).all()
    np.testing.assert_allclose(np.asarray(out)[inside], np.array(unclipped)[inside], atol=1e-6)
    assert inside.any() and (np.asarray(out)[~inside] > np.array(unclipped)[~inside] + 1e-3).any()


def test_softplus_and_ranking_loss_are_finite_for_differences_of_1e4(library):
    out = losses.softplus(library.xp, library.asarray(f32(-1e4, 0, 1e4)))
    np.testing.assert_allclose(np.asarray(out), [0, LN2, 1e4], rtol=1e-6)
    pairs = losses.ranking_loss(library.xp, library.asarray(f32(1e4, 0)))
    np.testing.assert_allclose(np.asarray(pairs), [[LN2, 0], [1e4, LN2]], rtol=1e-6)


def test_ranking_loss_prefers_row_to_column(library):
    # -log σ(ln 3) = ln(4/3), -log σ(-ln 3) = ln 4
    out = losses.ranking_loss(library.xp, library.asarray(f32(math.log(3), 0)))
    np.testing.assert_allclose(np.asarray(out), [[LN2, math.log(4 / 3)], [math.log(4), LN2]], rtol=1e-6)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_weighted_sum_ignores_whatever_weighs_nothing(library, garbage):
    x, weights = library.asarray(f32(2, garbage, 4)), library.asarray(f32(0.25, 0, 0.5))
    assert float(losses.weighted_sum(library.xp, x, weights)) == 2.5


# ---------------------------------------------------------------------------------------------------------- gradients


def policy_gradient(autodiff, ratio, advantage):
    def loss(x):
        return autodiff.xp.sum(losses.clipped_policy_loss(autodiff.xp, x, autodiff.asarray(f32(advantage)), low=0.2, high=0.2))

    return float(autodiff.gradient(loss, f32(ratio))[0])


@pytest.mark.parametrize(("ratio", "advantage"), [(1.21, 1), (5, 3), (0.79, -1), (0.1, -3)])
def test_a_ratio_past_the_clip_on_the_good_side_gets_exactly_no_gradient(autodiff, ratio, advantage):
    assert policy_gradient(autodiff, ratio, advantage) == 0


@pytest.mark.parametrize(("ratio", "advantage"), [(1, 1), (1, -1), (1.1, 2), (0.5, 1), (5, -3), (0.9, -2)])
def test_elsewhere_the_gradient_of_the_policy_loss_is_minus_the_advantage(autodiff, ratio, advantage):
    assert policy_gradient(autodiff, ratio, advantage) == pytest.approx(-advantage)


def test_what_weighs_nothing_gets_exactly_no_gradient(autodiff):
    weights = autodiff.asarray(f32(0.25, 0, 0.5))
    gradient = autodiff.gradient(lambda x: losses.weighted_sum(autodiff.xp, x, weights), f32(2, np.nan, 4))
    assert gradient.tolist() == [0.25, 0, 0.5]


def test_gradient_of_the_ranking_loss_is_finite_for_differences_of_1e4(autodiff):
    weights = autodiff.asarray(np.array([[0, 0.5], [0.5, 0]], np.float32))
    loss = lambda s: losses.weighted_sum(autodiff.xp, losses.ranking_loss(autodiff.xp, s), weights)  # noqa: E731
    assert autodiff.gradient(loss, f32(1e4, 0)).tolist() == [0.5, -0.5]
    assert autodiff.gradient(loss, f32(0, 0)).tolist() == [0, 0]


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_masked_columns_of_the_ppo_loss_are_inert_and_get_exactly_no_gradient(autodiff, garbage):
    batch = {name: autodiff.asarray(array) for name, array in ppo_batch().items()}

    def loss(x):
        return PPOLoss(0.2, 0.2, 0.1)(autodiff.xp, {"logprobs": x, "values": 2 * x}, batch)[0]

    clean, dirty = f32([-1, -2, 0], [-3, 0, 0]), f32([-1, -2, garbage], [-3, garbage, garbage])
    expected, gradient = autodiff.gradient(loss, clean), autodiff.gradient(loss, dirty)
    np.testing.assert_array_equal(gradient, expected)
    assert (gradient[~ppo_batch()["mask"]] == 0).all() and (gradient[ppo_batch()["mask"]] != 0).all()


# ------------------------------------------------------------------------------------------------------- loss objects


def test_clip_fraction_counts_where_clipping_binds(library):
    # Moved by 2 towards the return: the clipped value is the worse one. The ratio of 1.5 at A > 0 binds, at A < 0 not.
    batch = ppo_batch() | {"advantages": f32([2, -1, 0], [3, 0, 0]), "old_values": f32([-5, -4, 0], [-6.1, 0, 0])}
    outputs = {"logprobs": f32([-1, -2, 77], [-3, 77, 77]), "values": f32([-2, -4, 77], [-6, 77, 77])}
    for sign, fraction in ((1, 0.5), (-1, 0.0)):
        arrays = batch | {"advantages": sign * batch["advantages"]}
        out, held = ({n: library.asarray(a) for n, a in d.items()} for d in (outputs, arrays))
        _, metrics = PPOLoss(0.2, 0.2, 0.1)(library.xp, out, held)
        assert float(metrics["policy/clip_fraction"]) == fraction
        assert float(metrics["value/clip_fraction"]) == 0.5


def ppo_batch():
    """Three counted tokens that weigh 1/2, 1/4, 1/4; the policy weights differ."""
    mask = np.array([[True, True, False], [True, False, False]])
    return {
        "mask": mask,
        "old_logprobs": f32([-1 - math.log(1.5), -2, 0], [-3, 0, 0]),
        "advantages": f32([2, -1, 0], [3, 0, 0]),
        "old_values": f32([0, -4, 0], [-6.1, 0, 0]),
        "returns": f32([1, -4, 0], [-5, 0, 0]),
        "weights": f32([0.5, 0.25, 0], [0.25, 0, 0]),
        "policy_weights": f32([0.5, 0.25, 0], [0.125, 0, 0]),
    }


def test_ppo_loss_is_worked_by_hand(library):
    # Ratios 1.5, 1, 1: policy losses -2.4, 1, -3. Values -2, -4, -6 against old 0, -4, -6.1 and returns 1, -4, -5:
    # value losses 4.5, 0, ½ max(1, 1).
    outputs = {"logprobs": f32([-1, -2, 77], [-3, 77, 77]), "values": f32([-2, -4, 77], [-6, 77, 77])}
    outputs, batch = ({n: library.asarray(a) for n, a in d.items()} for d in (outputs, ppo_batch()))
    loss, metrics = PPOLoss(0.2, 0.2, 0.1)(library.xp, outputs, batch)
    policy, value = -1.2 + 0.25 - 0.375, 2.25 + 0 + 0.125
    assert float(loss) == pytest.approx(policy + 0.1 * value, abs=1e-5)
    expected = {"policy/loss": policy, "value/loss": value, "policy/approx_kl": 0.25 * math.log(1.5) ** 2,
                "policy/clip_fraction": 0.5, "value/clip_fraction": 0}  # fmt: skip
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(expected, abs=1e-5)


def test_ranking_loss_object_is_the_mean_over_pairs(library):
    scores = f32(math.log(3), 0, math.log(3))
    preferences = np.array([[0, 0.5, 0], [0, 0, 0.5], [0, 0, 0]], np.float32)  # 0 > 1 with margin ln 3, 1 > 2 with -ln 3
    loss, metrics = RankingLoss()(library.xp, {"scores": library.asarray(scores)}, {"preferences": library.asarray(preferences)})
    assert float(loss) == pytest.approx((math.log(4 / 3) + math.log(4)) / 2, rel=1e-6)
    assert float(metrics["accuracy"]) == 0.5


def test_ranking_loss_does_not_change_when_all_scores_shift(library):
    preferences = library.asarray(np.triu(np.full((4, 4), 1 / 6, np.float32), 1))
    scores = f32(1, -2, 0.5, 3)
    values = [
        float(RankingLoss()(library.xp, {"scores": library.asarray(scores + np.float32(c))}, {"preferences": preferences})[0])
        for c in (0, 8)
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_next_token_loss_object_is_the_weighted_negative_log_likelihood(library):
    outputs = {"logprobs": library.asarray(f32([-1, -2, np.nan]))}
    loss, _ = NextTokenLoss()(library.xp, outputs, {"weights": library.asarray(f32([0.5, 0.25, 0]))})
    assert float(loss) == 1.0
