"""Measures with their 95% intervals, as an evaluation records them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lockstep.learning import numerics

Measure = dict[str, float]
"""``mean``, ``n`` and, where there is an interval, ``low`` and ``high``."""


def mean(x: np.ndarray) -> Measure:
    if not len(x):
        return {"mean": float("nan"), "n": 0}
    value, low, high = numerics.mean_interval(x)
    return {"mean": value, "low": low, "high": high, "n": len(x)}


def proportion(successes: float, n: int) -> Measure:
    if not n:
        return {"mean": float("nan"), "n": 0}
    value, low, high = numerics.proportion_interval(successes, n)
    return {"mean": value, "low": low, "high": high, "n": n}


def flatten(result: Mapping[str, Any]) -> dict[str, float]:
    """Flatten an evaluation to {'heldout/sft/gold': mean}, for trackers."""
    flat = {}
    for key, value in {**result.get("splits", {}), "reward_model": result.get("reward_model", {})}.items():
        for inner, measures in value.items():
            if "mean" in measures:
                flat[f"{key}/{inner}"] = measures["mean"]
            else:
                flat |= {f"{key}/{inner}/{name}": m["mean"] for name, m in measures.items()}
    return flat
