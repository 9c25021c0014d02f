"""Intervals by rliable, the library of Agarwal et al. 2021, on stored scores, for tests/test_statistics.py.

rliable brings arch, statsmodels and seaborn, and its arch does not import beside pandas 3; so it has an environment of its own:

    python3 -m venv /tmp/rliable_env && /tmp/rliable_env/bin/pip install rliable==1.2.0 "pandas<3"
    /tmp/rliable_env/bin/python benchmarks/outsiders/rliable_intervals.py tests/fixtures/outsiders/rliable.json

Scores are [runs, tasks]. rliable draws from numpy's global generator whatever ``random_state`` it is given, so that one is
seeded here. 10,000 resamples; each case twice, so that the file says how far rliable is from itself.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rliable import library, metrics

REPS = 10_000
# runs of X, runs of Y, tasks; the first is what a sweep of three seeds has
SHAPES = {"three seeds, one task": (3, 3, 1), "three seeds, three tasks": (3, 3, 3), "ten and seven runs, five tasks": (10, 7, 5)}


def scores(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rounded to two digits, so that there are ties; one run of X is an outlier, which the IQM is there to withstand."""
    runs_x, runs_y, tasks = SHAPES[name]
    rng = np.random.default_rng(len(name))
    level = rng.normal(0, 1, tasks)
    x, y = level + 0.4 + rng.normal(0, 0.5, (runs_x, tasks)), level + rng.normal(0, 0.5, (runs_y, tasks))
    if runs_x > 3:
        x[0] += 5
    return x.round(2), y.round(2)


def intervals(x: np.ndarray, y: np.ndarray, seed: int) -> dict:
    np.random.seed(seed)
    iqm = lambda s: np.array([metrics.aggregate_iqm(s)])  # noqa: E731
    improved = lambda a, b: np.array([metrics.probability_of_improvement(a, b)])  # noqa: E731
    point, found = library.get_interval_estimates({"x": x, "y": y}, iqm, reps=REPS)
    better, range_ = library.get_interval_estimates({"x,y": (x, y)}, improved, reps=REPS)
    return {
        "iqm": {k: [float(point[k][0]), *found[k][:, 0].tolist()] for k in ("x", "y")},
        "improvement": [float(better["x,y"][0]), *range_["x,y"][:, 0].tolist()],
    }


def main(file: Path) -> None:
    cases = {}
    for name in SHAPES:
        x, y = scores(name)
        runs = {f"rliable, seed {seed}": intervals(x, y, seed) for seed in (0, 1)}
        cases[name] = {"x": x.tolist(), "y": y.tolist(), **runs}
    versions = {name: version(name) for name in ("rliable", "arch", "numpy", "scipy")}
    file.write_text(json.dumps({"versions": versions, "reps": REPS, "cases": cases}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
