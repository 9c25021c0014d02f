"""Groups the runs to compare and aggregates their seeds: one group per backend and differing configuration, or per value of
the keys that ``--by`` names. With ``--by``, settings that differ inside a group are its *tasks*: the group is judged over
them, as an algorithm is judged over games.

Intervals cover different things. For one run, they are over its prompts: how another set of prompts would have turned out.
For several runs, they are over seeds: how another training run would have turned out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.errors import ConfigError, did_you_mean, listing, short
from lockstep.reporting.compare import statistics
from lockstep.reporting.compare.decisions import FEW
from lockstep.reporting.compare.records import Estimate, Reading, Run, StageRecord

# Keys that say which run this is or where it runs, not what it does.
NOT_COMPARED = {"seed", "name", "folder", "tracker", "checkpoint_every", "samples_every", "experiment_name", "choices.tracker"}
BACKEND = "backend.name"
WHICH = "evaluation.policies"
CHOICES = "choices."  # followed by a config group: the name of the file chosen for it


def combine(estimates: Sequence[Estimate], *, own_prompts: bool = False) -> Estimate | None:
    """The mean over R seeds and its 95% interval, from the variance s² between seeds and each run's own standard error SE.

    All seeds answer the same prompts, and so share the error of having drawn these: Var(mean) = s² / R + mean SE², which counts
    the noise of single answers twice. With ``own_prompts``, runs are independent: Var(mean) = max(s², mean SE²) / R, the
    random-effects estimate of DerSimonian & Laird 1986 with equal weights. With few seeds s² is itself uncertain, so the page
    shows every seed as well.
    """
    if len(estimates) < 2:
        return estimates[0] if estimates else None
    means = np.array([e.mean for e in estimates])
    between, own = means.var(ddof=1), np.mean([e.standard_error**2 for e in estimates])
    half = 1.96 * np.sqrt(max(between, own) / len(means) if own_prompts else between / len(means) + own)
    mean = float(means.mean())
    return Estimate(mean, float(mean - half), float(mean + half), sum(e.n for e in estimates))


@dataclass(frozen=True)
class Curve:
    """One metric over steps: the interquartile mean over the group's runs (the mean, for three or fewer) and its 95%
    bootstrap interval over runs, point by point. For a single run the interval has no width."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class RunGroup:
    """Runs that are compared as one. Only their seeds and tasks differ."""

    label: str
    settings: Mapping[str, str]  # what tells this group from the others, as text
    runs: Sequence[Run]
    tasks: Sequence[str] = ("",)  # per run: its settings that differ inside the group, except the seed

    @property
    def backend(self) -> str:
        return ", ".join(dict.fromkeys(map(_backend, self.runs)))

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    @property
    def evaluated_seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs if run.evaluation.splits})

    def scores(self, split: str, policy: str, metric: str) -> dict[str, dict[int, float]]:
        """Return {task: {seed: mean over prompts}} for the runs that have the metric."""
        found: dict[str, dict[int, float]] = {}
        for task, run in self._evaluated(policy):
            if estimate := run.evaluation.splits.get(split, {}).get(policy, {}).get(metric):
                found.setdefault(task, {})[run.seed] = estimate.mean
        return found

    def policy_estimates(self, split: str, policy: str, metric: str) -> list[Estimate]:
        """The estimates of the runs that have the metric, in the order of the runs."""
        runs = [run for _, run in self._evaluated(policy)]
        found = [run.evaluation.splits.get(split, {}).get(policy, {}).get(metric) for run in runs]
        return [e for e in found if e]

    def policy(self, split: str, policy: str, metric: str) -> Estimate | None:
        return combine(self.policy_estimates(split, policy, metric), own_prompts=self.own_prompts)

    def task(self, policy: str, name: str) -> Estimate | None:
        """The policy's result on a public benchmark (`lockstep evaluate`)."""
        runs = [run for _, run in self._first_with(lambda run: _made_by(run, policy))]
        return combine([e for run in runs if (e := run.tasks.get(policy, {}).get(name))])

    def reward_model(self, metric: str) -> Estimate | None:
        rewards = lambda run: tuple(_made_by(run, s.name) for s in run.stages.values() if s.produces == "reward_model")  # noqa: E731
        runs = [run for _, run in self._first_with(lambda run: rewards(run) or run.name)]
        found = [e for run in runs if (e := run.evaluation.reward_model.get(metric))]
        return combine(found, own_prompts=self.own_prompts)

    def stages(self, name: str) -> list[StageRecord]:
        return [run.stages[name] for _, run in self._first_with(lambda run: _made_by(run, name)) if name in run.stages]

    @cached_property
    def own_prompts(self) -> bool:
        """True if no two runs have the same data."""
        return len({_settings(run, "data.", f"{CHOICES}data") for run in self.runs}) == len(self.runs)

    def _evaluated(self, policy: str) -> list[tuple[str, Run]]:
        """Return one (task, run) per distinct policy and way of evaluating it."""
        return self._first_with(lambda run: (_made_by(run, policy), self._how[run.folder]))

    @cached_property
    def _how(self) -> dict[Path, Hashable]:
        """How each run evaluates its policies, whichever these are."""
        return {run.folder: _settings(run, "evaluation.") - _settings(run, WHICH) for run in self.runs}

    def _first_with(self, made_by: Callable[[Run], Hashable]) -> list[tuple[str, Run]]:
        """Return one (task, run) per distinct product: runs that share a model are no additional evidence."""
        runs: dict[Hashable, tuple[str, Run]] = {}
        for task, run in zip(self.tasks, self.runs, strict=True):
            runs.setdefault(made_by(run), (task, run))
        return list(runs.values())

    def curve(self, stage: str, metric: str, points: int = 60) -> Curve | None:
        """The curve over the steps that all runs have. Neighbouring steps are averaged down to at most ``points``. Unfinished
        stages are left out if others finished."""
        asked = stage, metric, points
        if asked not in self._curves:
            self._curves[asked] = self._curve(*asked)
        return self._curves[asked]

    @cached_property
    def _curves(self) -> dict[tuple[str, str, int], Curve | None]:
        """Cache of curves: several figures draw the same ones."""
        return {}

    def _curve(self, stage: str, metric: str, points: int) -> Curve | None:
        stages = [s for s in self.stages(stage) if metric in s.metrics]
        stages = [s for s in stages if s.status == "done"] or stages
        series = [s.metrics[metric] for s in stages]
        if not series:
            return None
        steps = sorted(set.intersection(*(set(s.steps.tolist()) for s in series)))
        if not steps:
            return None
        values = np.array([s.values[np.isin(s.steps, steps)] for s in series], float)
        starts = np.arange(0, len(steps), -(-len(steps) // points))
        finite = np.isfinite(values)
        counts = np.add.reduceat(finite, starts, axis=1, dtype=int)
        sums = np.add.reduceat(np.where(finite, values, 0), starts, axis=1)
        means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
        places = np.add.reduceat(np.array(steps, float), starts) / np.diff([*starts, len(steps)])
        return Curve(places, *statistics.band(means))


def _settings(run: Run, *beginnings: str) -> frozenset[tuple[str, str]]:
    """The keys that begin like one of these, with their values."""
    return frozenset((key, str(value)) for key, value in run.config.items() if key.startswith(beginnings))


def _made_by(run: Run, stage: str) -> str:
    found = run.stages.get(stage)
    return (found and found.identity) or run.name


@dataclass(frozen=True)
class RunComparison:
    """The groups of all runs, and the names that occur in them, in the order the runs list them."""

    groups: Sequence[RunGroup]
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
        """The split to draw conclusions from: the held-out one if there is one, else the first."""
        return "heldout" if "heldout" in self.splits else next(iter(self.splits), None)

    @cached_property
    def policies(self) -> list[str]:
        evaluations = [run.evaluation for run in self.runs]
        return list(dict.fromkeys(p for e in evaluations for split in e.splits.values() for p in split))

    @cached_property
    def tasks(self) -> list[str]:
        """The public benchmarks for which some policy has a result."""
        return list(dict.fromkeys(name for run in self.runs for found in run.tasks.values() for name in found))

    @cached_property
    def baseline(self) -> str | None:
        return next((b for run in self.runs if (b := run.evaluation.baseline)), None)

    @cached_property
    def after_baseline(self) -> list[str]:
        """The policies trained by reinforcement learning: those listed after the baseline."""
        return self.policies[self.policies.index(self.baseline) + 1 :] if self.baseline in self.policies else []

    @cached_property
    def stage_names(self) -> list[str]:
        return list(dict.fromkeys(name for run in self.runs for name in run.stages))

    def stages_with(self, metric: str) -> list[str]:
        return [n for n in self.stage_names if any(metric in s.metrics for g in self.groups for s in g.stages(n))]

    def has(self, metric: str, split: str | None = None) -> bool:
        """True if any policy has this metric."""
        splits = [split] if split else self.splits
        return any(g.policy_estimates(s, p, metric) for g in self.groups for s in splits for p in self.policies)

    @cached_property
    def measured(self) -> list[str]:
        """All measures of policies."""
        splits = [found for run in self.runs for split in run.evaluation.splits.values() for found in split.values()]
        return list(dict.fromkeys(metric for found in splits for metric in found))

    @cached_property
    def best_of(self) -> list[int]:
        """The values of n for which best of n was measured, ascending."""
        return sorted(int(name.removeprefix("best_of_")) for m in self.measured if (name := m.removesuffix("/kl_bound")) != m)

    @cached_property
    def judges(self) -> list[str]:
        """The names of the evaluations' judges from which some policy has a score."""
        keys = [key.split(".") for run in self.runs for key in run.config]
        names = dict.fromkeys(parts[2] for parts in keys if parts[:2] == ["evaluation", "judges"] and len(parts) > 3)
        return [name for name in names if self.has(name)]

    @cached_property
    def tests(self) -> list[str]:
        """The metrics of the tests that the runs' data configure."""
        names = {key.split(".")[2] for run in self.runs for key in run.config if key.startswith("data.tests.")}
        return [metric for metric in self.measured if metric.partition("/")[0] in names]

    def check_metrics(self, names: Sequence[str]) -> None:
        """
        Raises:
          ConfigError: no policy and no stage has one of these metrics.
        """
        logged = {metric for run in self.runs for stage in run.stages.values() for metric in stage.metrics}
        known = sorted(logged.union(self.measured))
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"--metric {short(name)}: no run has it.{did_you_mean(name, known)} There are: {listing(known)}."
                )

    @cached_property
    def reward_model_metrics(self) -> list[str]:
        return list(dict.fromkeys(m for run in self.runs for m in run.evaluation.reward_model))


def group(reading: Reading, by: Sequence[str] | None = None) -> RunComparison:
    """Group by ``by``, configuration keys such as 'backend' or 'algorithm.kl_coef'. By default group by experiment, backend and
    every differing key, except the seed and keys that follow from the backend or from the file chosen for a config group.

    Raises:
      ConfigError: no run has such a key.
    """
    runs = reading.runs
    differing = _differing(runs)
    keys = _asked(by, runs) if by else _default_keys(differing, runs)
    members: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        members.setdefault(tuple(setting(run, key) for key in keys), []).append(run)
    problems = list(reading.problems)
    inside = _inside(keys, differing, runs) if by else []
    groups = []
    for found in members.values():
        tasks = _tasks(found, inside, problems)
        settings = {key: setting(found[0], key) for key in keys}
        label = _label(settings, runs if by else [run for run in runs if run.experiment == found[0].experiment], runs)
        groups.append(RunGroup(label, settings, list(tasks.values()), [task for task, _ in tasks]))
    groups = _distinct(groups)
    return RunComparison(
        groups=groups,
        differing={key: [_text_of_all(g, key) for g in groups] for key in differing},
        problems=[*problems, *_missing_seeds(groups), *_few_seeds(groups)],
    )


def _few_seeds(groups: Sequence[RunGroup]) -> Iterator[str]:
    few = [g for g in groups if 1 < len(g.evaluated_seeds) < FEW]
    if few:
        counts = sorted({len(g.evaluated_seeds) for g in few})
        yield (
            f"{' or '.join(map(str, counts))} seeds decide little ({'; '.join(g.label for g in few)}): intervals over so few are "
            f"too narrow. Use {FEW} or more; --power says how many a difference needs."
        )


def setting(run: Run, key: str) -> str:
    """The key's value in a run, as text."""
    return {"experiment": run.experiment, BACKEND: _backend(run)}.get(key) or _text(run.config.get(key))


def _default_keys(differing: Sequence[str], runs: Sequence[Run]) -> list[str]:
    return ["experiment", BACKEND, *_independent(differing, runs)]


def _asked(by: Sequence[str], runs: Sequence[Run]) -> list[str]:
    exist = {"experiment", "seed", *(key for run in runs for key in run.config)}
    keys = [key_of(key, exist) for key in by]
    for key in keys:
        if key not in exist:
            known = sorted({key for key in exist if not key.startswith(("stages.", CHOICES))})
            raise ConfigError(f"No run has a key '{key}' to group by.{did_you_mean(key, known)} Keys: {listing(known)}.")
    return keys


def _label(settings: Mapping[str, str], relatives: Sequence[Run], everyone: Sequence[Run]) -> str:
    """The shortest label that tells a group apart: its backend, its experiment if there are several, and the chosen files and
    other keys in which its ``relatives`` differ."""
    telling = [key for key in settings if key not in (BACKEND, "experiment")]
    telling = [key for key in telling if len({setting(run, key) for run in relatives}) > 1]
    experiments = {run.experiment for run in everyone}
    names = [settings[k] for k in (BACKEND, "experiment") if k in settings and (k == BACKEND or len(experiments) > 1)]
    names += [settings[key] for key in telling if key.startswith(CHOICES) and settings[key] != "null"]
    return ", ".join([*names, *_described({k: settings[k] for k in telling if not k.startswith(CHOICES)})]) or "all runs"


def _inside(keys: Sequence[str], differing: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """The differing keys that do not define groups. They define tasks."""
    return [key for key in ("experiment", BACKEND, *_independent(differing, runs)) if key not in keys]


def key_of(asked: str, exist: Collection[str]) -> str:
    """The key behind a short name: 'backend' means the backend's name, and 'algorithm' the name of its chosen file."""
    if asked == "backend":
        return BACKEND
    return f"{CHOICES}{asked}" if f"{CHOICES}{asked}" in exist else asked


def _tasks(members: Sequence[Run], inside: Sequence[str], problems: list[str]) -> dict[tuple[str, int], Run]:
    """Return {(task, seed): run}, ordered by seed. ``problems`` names runs that repeat a task and seed."""
    inside = [key for key in inside if len({setting(run, key) for run in members}) > 1]
    names = _short_names(inside)
    runs: dict[tuple[str, int], Run] = {}
    for run in sorted(members, key=lambda run: run.seed):
        place = ", ".join(f"{names[key]}={setting(run, key)}" for key in inside), run.seed
        if place in runs:
            problems.append(f"{run.name} is left out: {runs[place].name} has the same configuration and seed.")
        runs.setdefault(place, run)
    return runs


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """{key: its last part, or all of it if another key ends alike}."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def _missing_seeds(groups: Sequence[RunGroup]) -> list[str]:
    """A sentence for every group and task that lacks a seed that others have."""
    everyone = sorted({seed for g in groups for seed in g.seeds})
    problems = []
    for g in groups:
        for task in dict.fromkeys(g.tasks):
            have = {run.seed for t, run in zip(g.tasks, g.runs, strict=True) if t == task}
            if missing := [str(seed) for seed in everyone if seed not in have]:
                where = ", ".join(filter(None, [g.label, task]))
                problems.append(f"{where}: no run with seed {', '.join(missing)}, which others have.")
    return problems


def _text_of_all(g: RunGroup, key: str) -> str:
    """The key's value in the group, or its values if --by pools several."""
    return ", ".join(dict.fromkeys(setting(run, key) for run in g.runs))


def _described(settings: Mapping[str, str], most: int = 3) -> list[str]:
    """Texts such as 'kl_coef=0.02', once if several stages share it. Names come first; those beyond ``most`` are counted."""
    names_first = sorted(settings, key=lambda key: not key.endswith("name"))
    parts = list(dict.fromkeys(f"{key.rpartition('.')[2]}={settings[key]}" for key in names_first))
    return [*parts[:most], *([f"{len(parts) - most} more"] if len(parts) > most else [])]


def _distinct(groups: Sequence[RunGroup]) -> list[RunGroup]:
    """Number the labels that collide, as 'lr=1' of two stages may."""
    seen: dict[str, int] = {}
    result = []
    for g in groups:
        seen[g.label] = seen.get(g.label, 0) + 1
        label = g.label if seen[g.label] == 1 else f"{g.label} ({seen[g.label]})"
        result.append(RunGroup(label, g.settings, g.runs, g.tasks))
    return result


def _differing(runs: Sequence[Run]) -> list[str]:
    """The keys in which the runs differ. A stage's copy of a key that is also set once for all stages is left out."""
    keys = dict.fromkeys(key for run in runs for key in run.config if not {key, key.partition(".")[0]} & NOT_COMPARED)
    values = {key: tuple(_text(run.config.get(key)) for run in runs) for key in keys}
    values = {key: found for key, found in values.items() if len(set(found)) > 1}
    shared = {(key.rpartition(".")[2], found) for key, found in values.items() if not key.startswith("stages.")}
    return [k for k, found in values.items() if not k.startswith("stages.") or (k.rpartition(".")[2], found) not in shared]


def _independent(differing: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """The differing keys whose values follow neither from the backend nor from the file chosen for their config group."""
    own = [key for key in differing if key != BACKEND and not _follows(key, BACKEND, runs)]
    chosen = {key.removeprefix(CHOICES): key for key in own if key.startswith(CHOICES)}
    choices = [chosen.get(key.partition(".")[0]) for key in own]
    return [key for key, choice in zip(own, choices, strict=True) if choice is None or not _follows(key, choice, runs)]


def _follows(key: str, other: str, runs: Sequence[Run]) -> bool:
    """True if ``other``, the backend or a choice, differs between runs and determines the key's value."""
    values: dict[str, set[str]] = {}
    for run in runs:
        values.setdefault(setting(run, other), set()).add(_text(run.config.get(key)))
    return len(values) > 1 and all(len(found) == 1 for found in values.values())


def _backend(run: Run) -> str:
    return str(run.backend.get("name", "?"))


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
