"""Statistics over few seeds, against rliable's own results, by hand, and against every resample there is."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from lockstep.reporting.compare import statistics

RLIABLE = json.loads((Path(__file__).parent / "fixtures" / "outsiders" / "rliable.json").read_text())["cases"]


def tasks(case: dict, side: str) -> list[dict[int, float]]:
    """With seeds of their own, as the runs of different games have."""
    return apart(*np.array(case[side]).T)


def apart(*tasks):
    return [{100 * number + run: float(score) for run, score in enumerate(task)} for number, task in enumerate(tasks)]


def ends(estimate) -> list[float]:
    return [estimate.mean, estimate.low, estimate.high]


@pytest.mark.parametrize("name", RLIABLE)
def test_interquartile_means_and_their_intervals_are_those_of_rliable(name):
    case = RLIABLE[name]
    for side in ("x", "y"):
        theirs = np.array([case[f"rliable, seed {seed}"]["iqm"][side] for seed in (0, 1)])
        ours = ends(statistics.iqm_estimate(tasks(case, side)))
        width = theirs[0, 2] - theirs[0, 1]
        assert ours[0] == pytest.approx(theirs[0, 0], rel=1e-12)
        assert np.abs(ours - theirs.mean(axis=0)).max() < 0.02 * width  # two seeds of rliable are up to 0.02 apart too


@pytest.mark.parametrize("name", RLIABLE)
def test_probabilities_of_improvement_and_their_intervals_are_those_of_rliable(name):
    case = RLIABLE[name]
    theirs = np.array([case[f"rliable, seed {seed}"]["improvement"] for seed in (0, 1)])
    ours = ends(statistics.improvement_estimate(tasks(case, "x"), tasks(case, "y")))
    assert ours[0] == pytest.approx(theirs[0, 0], rel=1e-12)
    step = 1 / np.prod([*np.array(case["x"]).shape, len(case["y"])])  # probabilities come in whole steps
    assert np.abs(ours - theirs.mean(axis=0)).max() <= step


def test_a_quarter_is_cut_at_each_end_and_an_outlier_does_not_matter():
    assert statistics.iqm(np.array([1.0, 2, 3, 4, 5, 6, 7, 8])) == 4.5  # the mean of 3, 4, 5, 6
    assert statistics.iqm(np.array([1.0, 2, 3, 4, 5, 6, 7, 800])) == 4.5
    assert statistics.iqm(np.array([1.0, 2, 6])) == 3.0  # of three nothing is cut


def test_ties_count_a_half_in_the_probability_of_improvement():
    assert statistics.improvement_estimate(apart([1.0, 2.0]), apart([1.0, 0.0])).mean == 0.875  # half, yes, yes, yes


def test_the_interval_is_that_of_all_resamples():
    """Of two tasks of four and three runs there are 256 times 27 resamples, all equally likely."""
    x, y = np.array([0.0, 1.1, 5.3, 2.2]), np.array([2.0, 3.6, 3.7])
    every = [[*a, *b] for a in itertools.product(x, repeat=4) for b in itertools.product(y, repeat=3)]
    exact = np.percentile(statistics.iqm(np.array(every)), [2.5, 97.5])
    estimate = statistics.iqm_estimate(apart(x, y))
    assert (estimate.low, estimate.high) == pytest.approx(tuple(exact), abs=0.02 * (exact[1] - exact[0]))


def test_tasks_are_resampled_on_their_own():
    """Strata without any spread give an interval without any, however far apart they are."""
    estimate = statistics.iqm_estimate(apart(np.zeros(4), np.full(4, 10.0)))
    assert ends(estimate) == [5.0, 5.0, 5.0]


def test_tasks_of_the_same_seeds_are_drawn_together():
    """A seed that is high in all of four tasks, because its runs share a model, is one seed and not four."""
    of_a_seed = np.random.default_rng(5).normal(size=5)
    one, four = (statistics.iqm_estimate([dict(enumerate(of_a_seed))] * count) for count in (1, 4))
    alone = statistics.iqm_estimate(apart(*[of_a_seed] * 4))
    assert four.high - four.low > 0.9 * (one.high - one.low) > 1.6 * (alone.high - alone.low)
    shared = statistics.improvement_estimate([dict(enumerate(of_a_seed))] * 4, [dict(enumerate(of_a_seed))] * 4)
    single = statistics.improvement_estimate([dict(enumerate(of_a_seed))], [dict(enumerate(of_a_seed))])
    assert (shared.low, shared.high) == (single.low, single.high)


def test_one_run_in_a_task_gives_no_interval_but_a_mean():
    estimate = statistics.iqm_estimate(apart([1.0, 2.0], [6.0]))
    assert ends(estimate) == [3.0, 3.0, 3.0]


def test_a_band_holds_the_mean_of_three_curves_and_reaches_from_the_lowest_to_the_highest():
    curves = np.array([[0.0, 5.0], [1.0, 5.0], [5.0, 5.0]])
    middle, low, high = statistics.band(curves)
    assert middle.tolist() == [2.0, 5.0]
    assert (low.tolist(), high.tolist()) == ([0.0, 5.0], [5.0, 5.0])  # 1/27 of all resamples is one run three times


def test_the_same_runs_give_the_same_interval():
    runs = apart(np.random.default_rng(3).normal(size=6))
    assert statistics.iqm_estimate(runs) == statistics.iqm_estimate(runs)
