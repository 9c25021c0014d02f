"""The areas, and how one is tried."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, given, settings
from hypothesis.internal.conjecture.providers import Constants
from hypothesis.strategies import SearchStrategy

from hostile import checkpoints, configuration, folders, rows, run_folder, server


@dataclass(frozen=True)
class Area:
    """``examples``: how many inputs the test suite tries; all areas together take about a minute."""

    inputs: SearchStrategy[Any]
    check: Callable[[Any], None]
    examples: int


AREAS = {
    "configuration values": Area(configuration.KEYS, configuration.check_keys, 150),
    "overrides": Area(configuration.OVERRIDES, configuration.check_overrides, 100),
    "rows of data": Area(rows.INPUTS, rows.check, 300),
    "run folders": Area(run_folder.INPUTS, run_folder.check, 60),
    "checkpoints": Area(checkpoints.INPUTS, checkpoints.check, 120),
    "answers of a reward server": Area(server.INPUTS, server.check, 300),
}


def attempt(area: Area, how: settings) -> None:
    """Give the area's inputs to its check. ``how`` says how many, and whether they are the same every time: then not even the
    constants count that Hypothesis finds in whatever code is imported."""
    how = settings(how, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    with alone(), mock.patch("hypothesis.internal.conjecture.providers._get_local_constants", Constants):
        how(given(area.inputs)(area.check))()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In a folder of its own, and offline: a path that does not exist may look like a hub id."""
    import datasets.config
    import huggingface_hub.constants

    with (
        contextlib.chdir(folders.WORK),
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True),
        mock.patch.dict(os.environ, {"HOME": str(folders.WORK)}),
    ):
        yield
