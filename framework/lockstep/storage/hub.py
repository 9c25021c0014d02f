"""The Hugging Face hub, which may not be reachable. It is tried once, not for every file: left to themselves, its libraries
retry for half a minute per file, and for minutes per model."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS = 5.0
"""How long the hub may take to answer."""
REMEMBERED = 60.0
"""Seconds until the hub is tried again."""


@contextlib.contextmanager
def hub(source: Path | str) -> Iterator[Callable[[Exception], object]]:
    """A context for opening ``source``, a hub id or a local path. If the hub does not answer, its libraries (`huggingface_hub`,
    `datasets`, transformers) use only their caches until the end of the block.

    Yields ``why(error)``, the reason to report for an error of a library: the error itself, or that the hub does not answer.
    """
    from huggingface_hub import constants

    if Path(source).exists() or not constants.HF_HUB_OFFLINE and _answers(int(time.monotonic() / REMEMBERED)):
        yield lambda error: error
        return
    silent = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
    switches: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    for switch in switches:
        switch.HF_HUB_OFFLINE = True
    try:
        yield lambda error: f"{silent}, and the cache does not have it" if isinstance(error, OSError) else error
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value


@functools.lru_cache(maxsize=1)
def _answers(minute: int) -> bool:
    """True if the hub answers. A refusal counts too: then the problem is not the network."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # from whatever library the session uses
        return False
    return True
