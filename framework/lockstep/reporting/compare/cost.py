"""What runs cost: seconds, tokens per second, episodes and memory of each stage."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from lockstep.reporting.compare.groups import BACKEND, RunComparison, RunGroup
from lockstep.reporting.compare.records import Run, StageRecord

SPEED = "perf/tokens_per_second"
PARTS = "perf/seconds_"


def seconds(g: RunGroup, stage: str) -> float | None:
    """Mean over runs of the time that the stage took in the run that made it; runs that reused it spent none."""
    return _mean([s.seconds for s in g.stages(stage)])


def speed(g: RunGroup, stage: str) -> float | None:
    """Tokens per second: the mean over runs of the median over steps, which excludes compilation."""
    return _mean([_median(s, SPEED) for s in g.stages(stage)])


def part(g: RunGroup, stage: str, name: str) -> float | None:
    """Seconds per step spent on ``name``: generate, score, evaluate or train. Averaged like `speed`."""
    return _mean([_median(s, PARTS + name) for s in g.stages(stage)])


def parts(c: RunComparison) -> list[str]:
    """The parts of a step, in the order the runs list them."""
    metrics = (metric for run in c.runs for stage in run.stages.values() for metric in stage.metrics)
    return list(dict.fromkeys(metric.removeprefix(PARTS) for metric in metrics if metric.startswith(PARTS)))


def episodes(g: RunGroup, stage: str) -> float | None:
    """Responses drawn in training: completed iterations × prompts × samples per prompt. None for other stages."""
    return _mean([_episodes(run, stage) for run in g.runs])


def memory(g: RunGroup, stage: str) -> float | None:
    """Peak GiB of any run: the accelerator's memory or, without one, the process's memory up to the end of the stage."""
    found = [s.memory for s in g.stages(stage) if s.memory]
    return max(found) / 2**30 if found else None


def by_backend(c: RunComparison) -> list[RunGroup]:
    """All runs of a backend as one group, for numbers that a KL coefficient does not change."""
    backends = dict.fromkeys(g.backend for g in c.groups)
    members = {name: [run for g in c.groups if g.backend == name for run in g.runs] for name in backends}
    return [RunGroup(name, {BACKEND: name}, runs, [""] * len(runs)) for name, runs in members.items()]


def stages_made(runs: Iterable[Run]) -> dict[Hashable, float]:
    """The seconds of each stage; a stage that several runs share counts once."""
    return {s.identity or (run.name, s.name): s.seconds or 0.0 for run in runs for s in run.stages.values()}


def in_all(c: RunComparison) -> str:
    """A sentence: the compute time of all stages, and what sharing them has saved."""
    made = stages_made(c.runs)
    stages = list(itertools.chain.from_iterable(run.stages.values() for run in c.runs))
    spent, alone = sum(made.values()), sum(s.seconds or 0.0 for s in stages)
    if not spent:
        return ""
    text = f"{len(made)} stages took {duration(spent)} of compute."
    if len(made) < len(stages):
        text += f" The runs list {len(stages)}; without sharing they would have taken {duration(alone)}."
    return text


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _episodes(run: Run, stage: str) -> float | None:
    found = run.stages.get(stage)
    series = found and found.metrics.get("objective/score")
    size, samples = (
        run.config.get(f"stages.{stage}.changes.{key}", run.config.get(f"stages.{stage}.algorithm.{key}"))
        for key in ("batch_size", "samples")
    )
    return len(series.steps) * size * (samples or 1) if series and size else None


def _median(stage: StageRecord, metric: str) -> float | None:
    series = stage.metrics.get(metric)
    return float(np.median(series.values)) if series else None


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None
