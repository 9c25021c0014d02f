"""Groups against a baseline group: differences by seed and probabilities of improvement, with intervals over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.errors import ConfigError, did_you_mean, listing
from lockstep.reporting.compare import decisions, statistics
from lockstep.reporting.compare.decisions import Test
from lockstep.reporting.compare.groups import RunComparison, RunGroup, key_of
from lockstep.reporting.compare.records import Estimate

HIGHER_IS_BETTER = ("gold", "score", "win_rate", "ability")


@dataclass(frozen=True)
class Versus:
    """One policy's metric in a group, against the same in the baseline group.

    ``difference`` is the interquartile mean of group minus baseline, seed by seed, over the seeds that both have.
    ``improvement`` is the probability that a run of the group is above one of the baseline. Both compare within tasks.
    """

    group: RunGroup
    baseline: RunGroup
    policy: str  # 'grpo against ppo' where they have different names
    metric: str
    difference: Estimate | None
    improvement: Estimate
    test: Test | None  # of the mean difference
    seeds: Sequence[int]  # on both sides, in all tasks
    unpaired: Sequence[str]  # runs that only one side has, or that not all tasks have

    @property
    def names(self) -> tuple[str, str]:
        """The names of the group and its baseline. If only the backends differ, the baseline is named by its backend."""
        backend, _, rest = self.baseline.label.partition(", ")
        return self.group.label, backend if self.group.label.endswith(f", {rest}") else self.baseline.label


def over_seeds(g: RunGroup, split: str, policy: str, metric: str) -> Estimate | None:
    """The interquartile mean over the group's runs, with its interval over seeds."""
    tasks = statistics.complete(list(g.scores(split, policy, metric).values()))
    return statistics.iqm_estimate(tasks) if tasks else None


def against_baseline(c: RunComparison, pairs: Sequence[tuple[RunGroup, RunGroup]]) -> list[Versus]:
    """Compare every higher-is-better metric of every policy trained against a reward, on the main split. Where two groups have
    different last policies, as when one trains with PPO and the other with GRPO, compare those as well. One run against one run
    is left out: it says next to nothing about other seeds."""
    policies = c.after_baseline or c.policies[-1:]
    wanted = [(g, b, policy, policy, metric) for policy in policies for metric in HIGHER_IS_BETTER for g, b in pairs]
    ends = [(g, b, last(c, g), last(c, b)) for g, b in pairs]
    wanted += [(g, b, p, q, metric) for metric in HIGHER_IS_BETTER for g, b, p, q in ends if p and q and p != q]
    found = [versus(g, b, c.split, p, metric, q) for g, b, p, q, metric in wanted if c.split]
    return [v for v in found if v and v.improvement.n > 2]


def last(c: RunComparison, g: RunGroup) -> str | None:
    """The group's last evaluated policy after the baseline."""
    there = {policy for run in g.runs for policy in run.evaluation.splits.get(c.split or "", {})}
    return next((policy for policy in reversed(c.after_baseline) if policy in there), None)


def versus(g: RunGroup, baseline: RunGroup, split: str, policy: str, metric: str, other: str | None = None) -> Versus | None:
    """Compare two groups; None if they share no task. ``other``: the policy's name in the baseline group, if it differs."""
    other = other or policy
    x, y = g.scores(split, policy, metric), baseline.scores(split, other, metric)
    tasks = [task for task in x if task in y]
    if not tasks:
        return None
    paired = {task: {seed: x[task][seed] - y[task][seed] for seed in x[task] if seed in y[task]} for task in tasks}
    gains = statistics.complete([gain for gain in paired.values() if gain])
    counted = {seed for gain in gains for seed in gain}
    incomplete = [(task, seed) for task, gain in paired.items() for seed in gain if seed not in counted]
    return Versus(
        g, baseline, policy if policy == other else f"{policy} against {other}", metric,
        difference=statistics.iqm_estimate(gains) if gains else None,
        improvement=statistics.improvement_estimate(*(statistics.complete([side[task] for task in tasks]) for side in (x, y))),
        test=_test(gains),
        seeds=sorted(counted),
        unpaired=[*_only(x, y, g.label), *_only(y, x, baseline.label), *(f"seed {s} of {t}, not in all" for t, s in incomplete)],
    )  # fmt: skip


def _test(gains: statistics.Tasks) -> Test | None:
    """Of a seed's mean over the tasks; None if the tasks have no two seeds in common."""
    seeds = sorted(statistics.common(gains))
    return decisions.paired_test([float(np.mean([gain[seed] for gain in gains])) for seed in seeds])


def _only(here: Mapping[str, Mapping[int, float]], there: Mapping[str, Mapping[int, float]], label: str) -> list[str]:
    """Name the runs that ``here`` has and ``there`` lacks: 'seed 2 of torch'."""
    missing = [(task, seed) for task, seeds in here.items() for seed in seeds if seed not in there.get(task, {})]
    return [f"seed {seed} of {', '.join(filter(None, [label, task]))}" for task, seed in missing]


@dataclass(frozen=True)
class Gain:
    """What a policy gains over the baseline policy, in one group."""

    group: RunGroup
    policy: str
    metric: str
    test: Test


def gains(c: RunComparison, metric: str) -> list[Gain]:
    """The gains of every policy after the baseline, where at least two seeds have both."""
    tested = ((g, policy, gain_test(c, g, policy, metric)) for policy in c.after_baseline for g in c.groups)
    return [Gain(g, policy, metric, test) for g, policy, test in tested if test]


def gain_test(c: RunComparison, g: RunGroup, policy: str, metric: str) -> Test | None:
    """Test the gain of a policy over the baseline policy of its own run; of a win rate, over one half. Runs of one seed may share
    the baseline, so their mean counts once per seed."""
    tasks: dict[str, dict[int, float]] = {}
    for task, run in zip(g.tasks, g.runs, strict=True):
        found = run.evaluation.splits.get(c.split or "", {})
        after, before = (found.get(each, {}).get(metric) for each in (policy, c.baseline or ""))
        if after and (before or metric == "win_rate"):
            start = before.mean if before and metric != "win_rate" else 0.5
            tasks.setdefault(task, {})[run.seed] = after.mean - start
    return _test(list(tasks.values()))


def pairs(c: RunComparison, baseline: str | None) -> list[tuple[RunGroup, RunGroup]]:
    """Pair each group with the group that has the same settings, except for the baseline's values.

    Args:
      baseline: 'backend=torch', 'algorithm.kl_coef=0.1' or several separated by commas; or the label of a group to compare all
        others with; None: the first group.

    Raises:
      ConfigError: no group matches.
    """
    if baseline is None or baseline in [g.label for g in c.groups]:
        one = c.groups[0] if baseline is None else next(g for g in c.groups if g.label == baseline)
        return [(g, one) for g in c.groups if g is not one]
    wanted = _values(baseline, c)
    found = [(g, other) for g in c.groups for other in c.groups if _with(g, wanted) == dict(other.settings) and g is not other]
    if not found:
        raise ConfigError(f"--baseline {baseline}: no two groups differ in that alone. {_groups(c)}")
    return found


def _with(g: RunGroup, wanted: Mapping[str, str]) -> dict[str, str]:
    return {**g.settings, **wanted}


def _values(baseline: str, c: RunComparison) -> dict[str, str]:
    keys = list(c.groups[0].settings)
    wanted = {}
    for part in baseline.split(","):
        key, equals, value = part.strip().partition("=")
        key = key_of(key, keys)
        if not equals or key not in keys:
            nearest = did_you_mean(key, keys) if equals else did_you_mean(baseline, [g.label for g in c.groups])
            raise ConfigError(f"--baseline {baseline}: '{part}' is not a key=value of the groups.{nearest} {_groups(c)}")
        have = list(dict.fromkeys(g.settings[key] for g in c.groups))
        value = next((each for each in have if each == value or _number(each) == _number(value) is not None), value)
        if value not in have:
            raise ConfigError(f"--baseline {baseline}: no group has {part}. There are: {listing(have)}.")
        wanted[key] = value
    return wanted


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _groups(c: RunComparison) -> str:
    return f"Keys: {listing(c.groups[0].settings)}. Groups: {'; '.join(g.label for g in c.groups)}."
