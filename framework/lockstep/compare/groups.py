"""Runs grouped into what is compared: one group per backend and differing configuration, its seeds aggregated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lockstep.compare.records import Estimate, Reading, Run, Stage

# Keys that say which run it is or where it runs, not what it does.
NOT_COMPARED = {"seed", "name", "folder", "tracker", "checkpoint_every", "samples_every", "experiment_name"}


def combine(estimates: Sequence[Estimate]) -> Estimate | None:
    """The mean over seeds and its 95% interval.

    Var(mean) = max(s², mean SE²) / R for R seeds, s² the variance between them and SE each run's own standard error:
    the random-effects estimate of DerSimonian & Laird 1986 with equal weights. With few seeds s² is itself uncertain;
    the page therefore shows every seed as well.
    """
    if len(estimates) < 2:
        return estimates[0] if estimates else None
    means = np.array([e.mean for e in estimates])
    own = np.mean([e.standard_error**2 for e in estimates])
    half = 1.96 * np.sqrt(max(means.var(ddof=1), own) / len(means))
    mean = float(means.mean())
    return Estimate(mean, float(mean - half), float(mean + half), sum(e.n for e in estimates))


@dataclass(frozen=True)
class Curve:
    """One metric over steps: the mean over the group's seeds, with their smallest and largest value."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed."""

    label: str
    backend: str
    settings: Mapping[str, Any]  # what tells this group from others of its backend
    runs: Sequence[Run]

    def policy_estimates(self, split: str, policy: str, metric: str) -> list[Estimate]:
        """What each run found, in the order of the runs."""
        found = [run.evaluation.splits.get(split, {}).get(policy, {}).get(metric) for run in self.runs]
        return [e for e in found if e]

    def policy(self, split: str, policy: str, metric: str) -> Estimate | None:
        return combine(self.policy_estimates(split, policy, metric))

    def reward_model(self, metric: str) -> Estimate | None:
        return combine([e for run in self.runs if (e := run.evaluation.reward_model.get(metric))])

    def stages(self, name: str) -> list[Stage]:
        return [run.stages[name] for run in self.runs if name in run.stages]

    def curve(self, stage: str, metric: str, points: int = 60) -> Curve | None:
        """The curve over the steps that all seeds have, neighbouring steps averaged down to at most ``points``."""
        series = [s.metrics[metric] for s in self.stages(stage) if metric in s.metrics]
        if not series:
            return None
        steps = sorted(set.intersection(*(set(s.steps.tolist()) for s in series)))
        if not steps:
            return None
        values = np.array([s.values[np.isin(s.steps, steps)] for s in series], float)
        width = -(-len(steps) // points)
        bins = [slice(start, start + width) for start in range(0, len(steps), width)]
        values = np.array([[_mean(row[b]) for b in bins] for row in values])
        return Curve(
            steps=np.array([np.mean(steps[b]) for b in bins]),
            mean=values.mean(axis=0),
            low=values.min(axis=0),
            high=values.max(axis=0),
        )


def _mean(x: np.ndarray) -> float:
    finite = x[np.isfinite(x)]
    return float(finite.mean()) if len(finite) else float("nan")


@dataclass(frozen=True)
class Comparison:
    """The groups of all runs, and the names that occur in them, in the order in which the runs list them."""

    groups: Sequence[Group]
    differing: Mapping[str, Sequence[str]]  # configuration key -> its value in each group, as text
    problems: Sequence[str]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    @cached_property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(split for run in self.runs for split in run.evaluation.splits))

    @cached_property
    def split(self) -> str | None:
        """The split that conclusions are drawn from: the held-out one."""
        return "heldout" if "heldout" in self.splits else next(iter(self.splits), None)

    @cached_property
    def policies(self) -> list[str]:
        evaluations = [run.evaluation for run in self.runs]
        return list(dict.fromkeys(p for e in evaluations for split in e.splits.values() for p in split))

    @cached_property
    def baseline(self) -> str | None:
        return next((b for run in self.runs if (b := run.evaluation.baseline)), None)

    @cached_property
    def after_baseline(self) -> list[str]:
        """The policies that reinforcement learning made: those listed after the baseline."""
        return self.policies[self.policies.index(self.baseline) + 1 :] if self.baseline in self.policies else []

    @cached_property
    def stage_names(self) -> list[str]:
        return list(dict.fromkeys(name for run in self.runs for name in run.stages))

    def stages_with(self, metric: str) -> list[str]:
        return [n for n in self.stage_names if any(metric in s.metrics for g in self.groups for s in g.stages(n))]

    def has(self, metric: str, split: str | None = None) -> bool:
        """Did any policy get this metric?"""
        splits = [split] if split else self.splits
        return any(g.policy_estimates(s, p, metric) for g in self.groups for s in splits for p in self.policies)

    @cached_property
    def reward_model_metrics(self) -> list[str]:
        return list(dict.fromkeys(m for run in self.runs for m in run.evaluation.reward_model))


def group(reading: Reading) -> Comparison:
    """Group by experiment, backend and every differing key, the seed and what follows from the backend left out."""
    runs = reading.runs
    differing = _differing(runs)
    own = [key for key in differing if not _follows_from_backend(key, runs)]
    members: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        identity = (run.experiment, _backend(run), *(_text(run.config.get(key)) for key in own))
        members.setdefault(identity, []).append(run)
    groups = [_group(found, own, runs) for found in members.values()]
    return Comparison(
        groups=_distinct(groups),
        differing={key: [_text(g.runs[0].config.get(key)) for g in groups] for key in differing},
        problems=reading.problems,
    )


def _group(members: list[Run], keys: Sequence[str], everyone: Sequence[Run]) -> Group:
    """Labelled by as little as tells it apart: its experiment, and the keys that differ within the experiment."""
    first = members[0]
    relatives = [run for run in everyone if run.experiment == first.experiment]
    within = {key: first.config.get(key) for key in keys if key in _differing(relatives)}
    experiment = [first.experiment] if len(relatives) < len(everyone) else []
    return Group(
        label=", ".join([_backend(first), *experiment, *_described(within)]),
        backend=_backend(first),
        settings={"experiment": first.experiment, **{key: first.config.get(key) for key in keys}},
        runs=sorted(members, key=lambda run: run.seed),
    )


def _described(settings: Mapping[str, Any], most: int = 3) -> list[str]:
    """'kl_coef=0.02', once where several stages share it; names first, and the surplus only counted."""
    names_first = sorted(settings, key=lambda key: not key.endswith("name"))
    parts = list(dict.fromkeys(f"{key.rpartition('.')[2]}={_text(settings[key])}" for key in names_first))
    return [*parts[:most], *([f"{len(parts) - most} more"] if len(parts) > most else [])]


def _distinct(groups: Sequence[Group]) -> list[Group]:
    """Short labels may collide ('lr=1' of two stages); number those that do."""
    seen: dict[str, int] = {}
    result = []
    for g in groups:
        seen[g.label] = seen.get(g.label, 0) + 1
        label = g.label if seen[g.label] == 1 else f"{g.label} ({seen[g.label]})"
        result.append(Group(label, g.backend, g.settings, g.runs))
    return result


def _differing(runs: Sequence[Run]) -> list[str]:
    """The keys in which the runs differ. A stage's copy of a key that is also set once for all stages is left out."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key.partition(".")[0] not in NOT_COMPARED)
    values = {key: tuple(_text(run.config.get(key)) for run in runs) for key in keys}
    values = {key: found for key, found in values.items() if len(set(found)) > 1}
    shared = {(key.rpartition(".")[2], found) for key, found in values.items() if not key.startswith("stages.")}
    return [k for k, found in values.items() if not k.startswith("stages.") or (k.rpartition(".")[2], found) not in shared]


def _follows_from_backend(key: str, runs: Sequence[Run]) -> bool:
    """Is the key's value the same in all runs of a backend (its name, its options), so that the name says it all?"""
    values: dict[str, set[str]] = {}
    for run in runs:
        values.setdefault(_backend(run), set()).add(_text(run.config.get(key)))
    return len(values) > 1 and all(len(found) == 1 for found in values.values())


def _backend(run: Run) -> str:
    return str(run.backend.get("name", "?"))


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
