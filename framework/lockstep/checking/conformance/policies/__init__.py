"""Probabilities, sampling, padding, heads and checkpoints. The subject is a `World` with the policy to check."""

from __future__ import annotations

import importlib

for _part in ("probabilities", "sampling", "heads", "weights"):  # in running order
    importlib.import_module(f"{__name__}.{_part}")
