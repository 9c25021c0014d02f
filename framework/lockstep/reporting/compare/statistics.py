"""Statistics for few seeds: interquartile means, probabilities of improvement, and their bootstrap intervals.

This follows Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (arXiv 2108.13264).
Scores come as *tasks*: one array per task, one entry per run. A task is a setting (a KL coefficient, a data set) whose runs
are independent of the other settings' runs, as the paper's games are. Tasks may have unequal numbers of runs.
tests/fixtures/outsiders/rliable.json has the results of the authors' library, rliable, on stored scores.

All draws use a fixed seed: the same runs give the same report.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lockstep.reporting.compare.records import Estimate

DRAWS = 10_000  # the ends of an interval then vary by about 1% of its width
Tasks = Sequence[np.ndarray]


def iqm(values: np.ndarray) -> np.ndarray:
    """The mean of the middle half of the last axis: floor(n/4) values are cut at each end (Agarwal et al., section 4.3;
    scipy's ``trim_mean``). With three values or fewer nothing is cut, so it is the mean."""
    values = np.sort(np.asarray(values, np.float64), axis=-1)
    cut = values.shape[-1] // 4
    return values[..., cut : values.shape[-1] - cut].mean(axis=-1)


def iqm_estimate(tasks: Tasks) -> Estimate:
    """The interquartile mean over all runs of all tasks, with its stratified bootstrap interval."""
    draws = np.concatenate(resample(tasks, _rng()), axis=-1)
    return _estimate(float(iqm(np.concatenate(tasks))), iqm(draws), tasks)


def improvement(x: np.ndarray, y: np.ndarray) -> float:
    """P(X > Y): the share of all pairs of a run of ``x`` and a run of ``y`` where x is higher; ties count half. This is the
    Mann-Whitney statistic divided by n·m (Agarwal et al., section 4.3)."""
    return float(_wins(x, y).mean())


def _wins(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[runs of x, runs of y]: 1 where x is higher, 0.5 at a tie, else 0."""
    x, y = np.asarray(x)[:, None], np.asarray(y)
    return (x > y) + 0.5 * (x == y)


def improvement_estimate(x: Tasks, y: Tasks) -> Estimate:
    """P(X > Y) averaged over tasks. Both sides are resampled within each task. Task t of ``x`` is task t of ``y``."""
    mean = np.mean([improvement(a, b) for a, b in zip(x, y, strict=True)])
    rng = _rng()
    times = zip([_times_drawn(task, rng) for task in x], [_times_drawn(task, rng) for task in y], strict=True)
    wins = [_wins(a, b) for a, b in zip(x, y, strict=True)]
    # In a draw, each pair counts as often as its runs are drawn. Sums of halves are exact in any order.
    drawn = [((a @ won) * b).sum(axis=1) / won.size for (a, b), won in zip(times, wins, strict=True)]
    return _estimate(float(mean), np.mean(drawn, axis=0), [*x, *y])


def resample(tasks: Tasks, rng: np.random.Generator, draws: int = DRAWS) -> list[np.ndarray]:
    """The stratified bootstrap: per task [draws, runs], drawn with replacement from its runs, independently of other tasks."""
    return [task[_drawn(len(task), rng, draws)] for task in map(np.asarray, tasks)]


def _times_drawn(task: np.ndarray, rng: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
    """float64 [draws, runs]: how often each draw of `resample` contains each run."""
    runs = len(task)
    places = _drawn(runs, rng, draws) + runs * np.arange(draws)[:, None]
    return np.bincount(places.reshape(-1), minlength=draws * runs).reshape(draws, runs).astype(np.float64)


def _drawn(runs: int, rng: np.random.Generator, draws: int) -> np.ndarray:
    """int64 [draws, runs]: indices of runs, drawn with replacement."""
    return rng.integers(runs, size=(draws, runs))


def band(curves: np.ndarray, draws: int = 1000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The interquartile mean of curves [runs, points], and the ends of its 95% bootstrap interval, point by point. Whole runs
    are drawn, so neighbouring points move together."""
    index = _rng().integers(len(curves), size=(draws, len(curves)))
    drawn = iqm(np.moveaxis(curves[index], 1, -1))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return iqm(curves.T), low, high


def _estimate(value: float, drawn: np.ndarray, tasks: Tasks) -> Estimate:
    """An estimate with the percentile interval (Efron 1979); no interval if a task has a single run, which shows no spread."""
    runs = sum(map(len, tasks))
    if min(map(len, tasks)) < 2:
        return Estimate(value, value, value, runs)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high), runs)


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)
