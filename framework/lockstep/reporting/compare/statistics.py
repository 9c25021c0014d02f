"""Statistics for few seeds: interquartile means, probabilities of improvement, and their bootstrap intervals.

This follows Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (arXiv 2108.13264).
Scores come as *tasks*: {seed: score} of the runs of each. A task is a setting, such as a KL coefficient or a data set. The
paper's tasks are games, whose runs have nothing to do with each other. Here runs of one seed often share their first stages, so a
draw of seeds is one draw for all tasks; `complete` leaves the seeds that all tasks have. Tasks without a common seed are drawn on
their own, as the paper's are.
tests/fixtures/outsiders/rliable.json has the results of the authors' library, rliable, on stored scores.

All draws use a fixed seed: the same runs give the same report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lockstep.reporting.compare.records import Estimate

DRAWS = 10_000  # the ends of an interval then vary by about 1% of its width
Tasks = Sequence[Mapping[int, float]]


def complete(tasks: Tasks) -> Tasks:
    """The tasks with only the seeds that all of them have; unchanged if there is none."""
    seeds = common(tasks)
    return [{seed: score for seed, score in task.items() if seed in seeds} for task in tasks] if seeds else tasks


def common(tasks: Tasks) -> set[int]:
    """The seeds that all tasks have."""
    return set.intersection(*map(set, tasks)) if tasks else set()


def iqm(values: np.ndarray) -> np.ndarray:
    """The mean of the middle half of the last axis: floor(n/4) values are cut at each end (Agarwal et al., section 4.3;
    scipy's ``trim_mean``). With three values or fewer nothing is cut, so it is the mean."""
    values = np.sort(np.asarray(values, np.float64), axis=-1)
    cut = values.shape[-1] // 4
    return values[..., cut : values.shape[-1] - cut].mean(axis=-1)


def iqm_estimate(tasks: Tasks) -> Estimate:
    """The interquartile mean over all runs of all tasks, with its stratified bootstrap interval."""
    draws = [scores(task)[index] for task, index in zip(tasks, resample(tasks, _rng()), strict=True)]
    return _estimate(float(iqm(np.concatenate([scores(task) for task in tasks]))), iqm(np.concatenate(draws, axis=-1)), tasks)


def _wins(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[runs of x, runs of y]: 1 where x is higher, 0.5 at a tie, else 0."""
    x, y = np.asarray(x)[:, None], np.asarray(y)
    return (x > y) + 0.5 * (x == y)


def improvement_estimate(x: Tasks, y: Tasks) -> Estimate:
    """P(X > Y): the share of all pairs of a run of ``x`` and a run of ``y`` where x is higher, averaged over tasks; ties count
    half. In a task this is the Mann-Whitney statistic divided by n·m (Agarwal et al., section 4.3). Task t of ``x`` is task t of
    ``y``; each side is resampled."""
    wins = [_wins(scores(a), scores(b)) for a, b in zip(x, y, strict=True)]
    mean = np.mean([won.mean() for won in wins])
    rng = _rng()
    times = zip(*([_times_drawn(index) for index in resample(side, rng)] for side in (x, y)), strict=True)
    # In a draw, each pair counts as often as its runs are drawn. Sums of halves are exact in any order.
    drawn = [((a @ won) * b).sum(axis=1) / won.size for (a, b), won in zip(times, wins, strict=True)]
    return _estimate(float(mean), np.mean(drawn, axis=0), [*x, *y])


def scores(task: Mapping[int, float]) -> np.ndarray:
    """[runs], by seed."""
    return np.array([task[seed] for seed in sorted(task)], np.float64)


def resample(tasks: Tasks, rng: np.random.Generator, draws: int = DRAWS) -> list[np.ndarray]:
    """The stratified bootstrap: per task int64 [draws, runs], places in `scores` drawn with replacement; the same ones for tasks
    that have the same seeds."""
    of_seeds: dict[tuple[int, ...], np.ndarray] = {}
    for task in tasks:
        if (seeds := tuple(sorted(task))) not in of_seeds:
            of_seeds[seeds] = rng.integers(len(seeds), size=(draws, len(seeds)))
    return [of_seeds[tuple(sorted(task))] for task in tasks]


def _times_drawn(index: np.ndarray) -> np.ndarray:
    """float64 [draws, runs]: how often each draw of `resample` contains each run."""
    draws, runs = index.shape
    places = index + runs * np.arange(draws)[:, None]
    return np.bincount(places.reshape(-1), minlength=draws * runs).reshape(draws, runs).astype(np.float64)


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
