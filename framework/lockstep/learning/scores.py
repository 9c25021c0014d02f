"""Checks and converts scores that third-party code returns."""

from __future__ import annotations

import decimal
import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from lockstep.errors import RewardError, told


def scores_of(found: Any, count: int) -> np.ndarray:
    """Convert a list of numbers, an array or a tensor on any device to float64 [count]; None becomes NaN.

    Raises:
      RewardError: it is something else, or has another length. Text and booleans are refused even if they would convert.
    """
    values = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise RewardError(f"it gave {told(found)}; a list of numbers is needed, one for each response")
    if len(values) != count:
        raise RewardError(f"it gave {len(values)} scores for {count} responses; one number each is needed")
    return np.array([_number(value) for value in values], np.float64)


def _number(value: Any) -> float:
    value = value.item() if hasattr(value, "item") else value
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, decimal.Decimal)):
        hint = "; say 1.0 or 0.0 instead" if isinstance(value, bool) else ""
        raise RewardError(f"it gave the score {told(value)}, which is not a number{hint}")
    try:
        return float(value)
    except OverflowError as error:
        raise RewardError(f"it gave a score that is too large: {error}") from None
