"""Preference losses against numbers from the papers and from hand calculation, and what the algorithm feeds them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conftest import CONSTANT, Data, configure
from lockstep.errors import ConfigError
from lockstep.learning import losses
from lockstep.types import Comparison
from lockstep_rlhf.algorithms.preference_losses import NOTHING, KTOLoss, PairLoss, PlackettLuceLoss, preference_arrays
from test_group_methods import Jax, Torch, f32

LN2 = math.log(2)


@pytest.fixture(params=[Torch, Jax], ids=["torch", "jax"])
def library(request):
    return request.param()


def run(
    library, logprobs, *, ref=0.0, lengths=None, k=2, real=None, ranks=None, kto=None, z=0.0, loss=PairLoss, beta=0.1, **options
):
    """The loss of rankings of K completions, and its derivative in the log-probabilities [R, T], rows in order of rank."""
    logprobs = np.asarray(logprobs, np.float32)
    rows, columns = logprobs.shape
    n = rows // k
    real = np.ones((n, k), bool) if real is None else np.asarray(real, bool)
    ranks = np.tile(np.arange(k), (n, 1)) if ranks is None else np.asarray(ranks)
    counts = real.sum(axis=1)
    pairs = real[:, :, None] & real[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    mask = real.reshape(-1, 1) & (np.arange(columns) < np.asarray(lengths or [columns] * rows)[:, None])
    batch = {
        "mask": mask, "ref": np.full(rows, ref, np.float32), "lengths": np.maximum(mask.sum(axis=1), 1).astype(np.float32),
        "real": real, "pairs": (pairs / (counts * (counts - 1) / 2)[:, None, None] / n).astype(np.float32),
        "best": np.zeros(rows, np.float32), "worst": np.zeros(rows, np.float32), "rankings": np.full(n, 1 / n, np.float32),
        "nll_weights": np.where(np.arange(rows)[:, None] % k == 0, mask / mask[::k].sum(), 0).astype(np.float32),
    }  # fmt: skip
    if kto is not None:
        batch |= {"sign": f32(*kto).reshape(-1), "kto": np.full(rows, 1 / rows, np.float32), "z": np.full(rows, z, np.float32)}
    arrays = {name: library.xp.asarray(array) for name, array in batch.items()}
    of = loss(beta=beta, **options)
    value, slopes = library.both(lambda x: of(library.xp, {"logprobs": x}, arrays)[0], logprobs)
    return float(value), slopes


def test_dpo_starts_at_log_two_and_pulls_both_ways(library):
    """At a tie too, on both libraries: max and |x| have other derivatives at 0."""
    loss, slopes = run(library, [[-1.0], [-1.0]], ref=-1.0)
    assert loss == pytest.approx(LN2, abs=1e-6)
    np.testing.assert_allclose(slopes, [[-0.05], [0.05]], atol=1e-7)
    assert run(library, [[0.0], [-10.0]])[0] == pytest.approx(0.313262, abs=1e-6)


@pytest.mark.parametrize(
    "of", [losses.softplus, lambda xp, x: losses.ranking_loss(xp, x)[0, 1]], ids=["softplus", "ranking_loss"]
)
def test_at_a_tie_the_derivative_is_a_half_on_both_libraries(library, of):
    x = f32(0) if of is losses.softplus else f32(3, 3)
    assert abs(library.both(lambda x: of(library.xp, x), x)[1][0]) == 0.5


def test_label_smoothing_and_its_unbiased_form(library):
    apart = [[0.0], [-10.0]]  # β h = 1
    assert run(library, apart, smoothing=0.1)[0] == pytest.approx(0.413262, abs=1e-6)
    assert run(library, apart, smoothing=0.1, kind="robust")[0] == pytest.approx(0.188262, abs=1e-6)
    for kind in ("dpo", "robust"):
        assert run(library, [[0.0], [0.0]], smoothing=0.1, kind=kind)[0] == pytest.approx(LN2, abs=1e-6)


def test_hinge_and_ipo(library):
    assert run(library, [[0.0], [0.0]], kind="hinge")[0] == pytest.approx(1, abs=1e-6)
    assert run(library, [[0.0], [-20.0]], kind="hinge")[0] == 0
    loss, slopes = run(library, [[0.0], [0.0]], kind="ipo", mean=True)
    assert loss == pytest.approx(25, abs=1e-5)
    np.testing.assert_allclose(slopes, [[-10], [10]], rtol=1e-5)
    assert run(library, [[0.0], [-5.0]], kind="ipo", mean=True)[0] == pytest.approx(0, abs=1e-5)


def test_simpo_reads_means_and_its_margin_is_gamma(library):
    same_means = [[-1.0, -1.0, 0.0], [-1.0, 0.0, 0.0]]
    loss, _ = run(library, same_means, lengths=[2, 1], kind="simpo", mean=True, beta=2.0, margin=1.0)
    assert loss == pytest.approx(1.313262, abs=1e-6)


def test_orpo_is_an_odds_ratio_beside_the_next_token_loss(library):
    rows = [[math.log(0.5)], [math.log(0.25)]]
    loss, _ = run(library, rows, kind="orpo", mean=True)
    assert loss == pytest.approx(0.1 * 0.287682, abs=1e-6)
    total, _ = run(library, rows, kind="orpo", mean=True, nll_coef=1.0)
    assert total == pytest.approx(0.721915, abs=1e-6)


@pytest.mark.parametrize("certain", [-1e-7, -1e-9, 0.0, -100.0])
def test_orpo_is_finite_for_a_completion_that_is_certain_or_hopeless(library, certain):
    loss, slopes = run(library, [[certain], [-1.0]], kind="orpo", mean=True)
    assert math.isfinite(loss) and np.isfinite(slopes).all()


def test_kto_judges_each_completion_by_itself(library):
    at_z, _ = run(library, [[0.0], [0.0]], loss=KTOLoss, kto=(1, -1))
    assert at_z == pytest.approx(0.5, abs=1e-6)
    good, _ = run(library, [[2.0], [2.0]], loss=KTOLoss, kto=(1, 1))
    bad, slopes = run(library, [[2.0], [2.0]], loss=KTOLoss, kto=(-1, -1))
    assert (good, bad) == pytest.approx((0.450166, 0.549834), abs=1e-6)
    assert (slopes > 0).all()
    assert run(library, [[2.0], [2.0]], loss=KTOLoss, kto=(1, -1), z=2.0)[0] == pytest.approx(0.5, abs=1e-6)


def test_plackett_luce_is_one_ranking(library):
    equal, _ = run(library, [[0.0]] * 3, k=3, loss=PlackettLuceLoss)
    assert equal == pytest.approx(math.log(6), abs=1e-6)
    apart, _ = run(library, [[20.0], [10.0], [0.0]], k=3, loss=PlackettLuceLoss)
    assert apart == pytest.approx(0.720868, abs=1e-6)
    two = [[0.3, -1.0], [-2.0, 0.1]]
    pair, slopes = run(library, two)
    ranking, same = run(library, two, loss=PlackettLuceLoss)
    assert ranking == pytest.approx(pair, abs=1e-6)
    np.testing.assert_allclose(same, slopes, atol=1e-7)


@pytest.mark.parametrize("loss", [PairLoss, PlackettLuceLoss])
def test_completions_that_are_not_there_are_inert(library, loss):
    """Rankings of three and of two in one block: the empty place changes nothing and gets no gradient, whatever is in it."""
    rows = [[-1.0, -2.0], [-1.5, -1.0], [-3.0, -0.5]]
    three, of_three = run(library, rows, k=3, loss=loss)
    two, of_two = run(library, rows[:2], k=2, loss=loss)
    for garbage in (0.0, math.nan, 1e30):
        both, slopes = run(library, [*rows, *rows[:2], [garbage] * 2], k=3, real=[[1, 1, 1], [1, 1, 0]], loss=loss)
        assert both == pytest.approx((three + two) / 2, rel=1e-6)
        np.testing.assert_allclose(slopes[:5], np.concatenate([of_three, of_two]) / 2, atol=1e-7)
        assert not slopes[5].any()
    assert NOTHING < -1e3


def test_ties_are_no_pairs(library):
    tied, slopes = run(library, [[0.0], [-1.0], [-2.0]], k=3, ranks=[[0, 0, 1]])
    first, second = (run(library, [[a], [-2.0]])[0] for a in (0.0, -1.0))
    assert tied == pytest.approx((first + second) / 3, abs=1e-6)


def test_what_is_logged_of_pairs_is_their_mean_though_ties_are_none(make):
    class Tied(Data):
        def comparisons(self, split):
            return [Comparison(p, ("w1", "w2 w3", "w4 w5", "w6"), (0, 1, 1, 2)) for p in self.prompts(split)]

    algorithm = make("preference_optimisation", data=Tied(), batch_size=4, heldout_examples=0, epochs=16.0, beta=1.0)
    first, *_, last = [algorithm.step(step) for step in range(algorithm.total_steps)]
    assert first["preference/loss"] == pytest.approx(LN2, rel=1e-5)  # the policy is still the reference
    assert first["loss"] == pytest.approx(5 / 6 * LN2, rel=1e-5)
    assert last["preference/accuracy"] == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("mean", [False, True])
def test_while_the_policy_is_the_reference_every_pair_is_a_tie(make, mean):
    """Not the sign of a rounding error: training compares two passes over blocks of other shapes."""
    changes = {"loss": "ipo" if mean else "dpo", "logprobs": "mean" if mean else "sum"}
    metrics = make("preference_optimisation", batch_size=5, schedule=CONSTANT, **changes).step(0)
    assert (metrics["heldout/accuracy"], metrics["heldout/margin"]) == (0.5, 0)
    assert metrics["preference/accuracy"] == pytest.approx(0.5, rel=1e-6)


def test_a_small_difference_is_none_of_rounding(library):
    """1e-4 nats on two tokens."""
    rows = library.xp.asarray(f32([-1.0, -2.0], [-1.0, -2.0001], [-3.0, -3.0], [-3.0, -3.0]))
    batch = {"mask": np.ones((4, 2), bool), "ref": np.zeros(4, np.float32), "lengths": f32(2, 2, 2, 2)}
    batch |= preference_arrays(np.tile([[0, 0.5], [0, 0]], (2, 1, 1)), np.ones((2, 2), bool), 2)
    arrays = {name: library.xp.asarray(array) for name, array in batch.items()}
    _, metrics = PairLoss(beta=0.1)(library.xp, {"logprobs": rows}, arrays)
    assert float(metrics["preference/accuracy"]) == pytest.approx(0.75)


def test_each_name_is_a_loss_of_its_own(library):
    rows = [[-1.0, -0.2], [-1.5, -2.0]]
    values = [run(library, rows, kind=kind, mean=mean, smoothing=0.1 if kind == "robust" else 0.0, margin=1.0)[0]
              for kind in ("dpo", "robust", "hinge", "ipo", "simpo", "orpo") for mean in (False, True)]  # fmt: skip
    assert len({round(value, 6) for value in values}) == len(values)


@pytest.mark.parametrize("backend", ["torch"], indirect=True)  # what is tested is numpy on the host
def test_the_reference_reads_only_what_is_trained_on(make):
    whole = make("preference_optimisation", epochs=1.0, batch_size=2, heldout_examples=0)
    part = make("preference_optimisation", epochs=0.5, batch_size=2, heldout_examples=0)
    read = [number for number, ranking in enumerate(part.examples) if not np.isnan(ranking.ref).any()]
    assert len(read) == 2 * part.total_steps < len(part.examples) == len(whole.examples)
    for number in read:
        np.testing.assert_allclose(part.examples[number].ref, whole.examples[number].ref, atol=1e-5)
    losses = [[algorithm.step(step)["preference/loss"] for step in range(part.total_steps)] for algorithm in (whole, part)]
    assert np.isfinite(losses[1]).all() and losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin": 0.5}, "algorithm.margin has no effect on loss=dpo. Set it to 1.375, or loss to simpo."),
        ({"loss": "ipo", "desirable": 2.0}, "algorithm.desirable has no effect on loss=ipo. Set it to 1, or loss to kto."),
        ({"loss": "hinge", "label_smoothing": 0.1}, "Set it to 0, or loss to dpo or robust."),
    ],
)
def test_settings_that_the_loss_does_not_read_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        configure("preference_optimisation", **changes)
