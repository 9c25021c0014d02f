"""Measures with their 95% intervals, as an evaluation records them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lockstep.learning import numerics
from lockstep.types import Message, Prompt

Measure = dict[str, float]
"""``mean``, ``n`` and, where there is an interval, ``low`` and ``high``."""


def mean(x: np.ndarray, clusters: np.ndarray | None = None) -> Measure:
    """The mean of the finite values. ``clusters``: int [N]; rows of one cluster, such as a prompt, are not independent."""
    return _measure(numerics.mean_interval, x, clusters)


def proportion(x: np.ndarray, clusters: np.ndarray | None = None) -> Measure:
    """The same for successes (1), failures (0) and ties (½)."""
    return _measure(numerics.proportion_interval, x, clusters)


def _measure(interval: Callable[..., tuple[float, float, float]], x: np.ndarray, clusters: np.ndarray | None) -> Measure:
    known = np.isfinite(x)
    if not known.any():
        return {"mean": float("nan"), "n": 0}
    value, low, high = interval(x[known], None if clusters is None else clusters[known])
    return {"mean": value, "low": low, "high": high, "n": int(known.sum())}


def clusters_of(prompts: Sequence[Prompt]) -> np.ndarray:
    """int [N]: equal for prompts of equal messages."""
    numbers: dict[tuple[Message, ...], int] = {}
    return np.array([numbers.setdefault(prompt.messages, len(numbers)) for prompt in prompts], int)


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
