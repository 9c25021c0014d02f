"""Gradients, Adam, micro-batches and restoring. The subject is a `World` with the backend to check and a policy on it."""

from __future__ import annotations

import importlib

for _part in ("gradients", "updates", "packing", "dropout", "description"):  # in running order
    importlib.import_module(f"{__name__}.{_part}")
