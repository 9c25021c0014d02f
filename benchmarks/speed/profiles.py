"""Where a step's time goes on a card: its kernels by their total time, as text."""

from __future__ import annotations

import collections
import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHOWN = 30


def of_torch(step: Callable[[], Any]) -> str:
    import torch
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return ""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    kernels: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for event in found.events():
        if event.device_type.name == "CUDA":
            kernels[event.name] += event.device_time
            calls[event.name] += 1
    return table(kernels, calls)


def of_jax(step: Callable[[], Any]) -> str:
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step()
        path = next(Path(folder).rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    cards = {e["pid"] for e in events if e.get("name") == "process_name" and "GPU" in e["args"]["name"]}
    streams = {
        (e["pid"], e["tid"])
        for e in events
        if e.get("name") == "thread_name" and e["pid"] in cards and "Stream" in e["args"]["name"]
    }
    kernels: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams:
            kernels[event["name"]] += event["dur"]
            calls[event["name"]] += 1
    return table(kernels, calls)


def table(kernels: collections.Counter[str], calls: collections.Counter[str]) -> str:
    """Microseconds and calls by name."""
    total = sum(kernels.values())
    lines = [f"{total / 1e3:.1f} ms of kernels, {sum(calls.values())} calls"]
    lines += [
        f"{time / 1e3:9.2f} ms {time / total:6.1%} {calls[name]:6d}  {name[:150]}" for name, time in kernels.most_common(SHOWN)
    ]
    return "\n".join(lines) + "\n"


PROFILES = {"torch": of_torch, "jax": of_jax}
