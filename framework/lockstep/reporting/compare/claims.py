"""What the numbers say: a headline and a checklist, computed from the evaluation alone.

"Apart" means that two 95% intervals do not overlap. That is stricter than a test of the difference at the 5% level, and
stricter still because all policies answer the same prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from lockstep.reporting.compare.groups import BACKEND, RunComparison, RunGroup
from lockstep.reporting.compare.records import Estimate

Verdict = Literal["yes", "unclear", "no"]
SCORE, PERCENT = ".2f", ".1%"  # how numbers are written


@dataclass(frozen=True)
class Claim:
    text: str
    where: str  # the group or groups that it is about
    verdict: Verdict
    because: str


def find(c: RunComparison) -> list[Claim]:
    """Every claim for which the runs have the numbers."""
    found = [claim for g in c.groups for claim in _within(c, g)]
    return [*found, *_between_backends(c)]


def _within(c: RunComparison, g: RunGroup) -> Iterator[Claim]:
    if c.split is None or c.baseline is None:
        yield from _reward_model(g)
        return
    before = c.policies[: c.policies.index(c.baseline)] if c.baseline in c.policies else []
    pairs = [(p, c.baseline) for p in before] + [(c.baseline, p) for p in c.after_baseline]
    metric = headline_metric(c)
    for worse, better in pairs if metric in ("gold", "score") else ():
        a, b = g.policy(c.split, worse, metric), g.policy(c.split, better, metric)
        if a and b:
            yield ordered(f"{metric}: {worse} < {better}", g.label, a, b)
    for policy in c.after_baseline:
        if gain := g.policy(c.split, policy, "gain"):
            yield above(f"{policy} is better than the policy of the round before", g.label, gain, 0.0, "+" + SCORE)
        if rate := g.policy(c.split, policy, "win_rate"):
            yield above(f"{policy} wins more than half against {c.baseline}", g.label, rate, 0.5)
        yield from _alignment_tax(c, g, policy)
    yield from _reward_model(g)


def _alignment_tax(c: RunComparison, g: RunGroup, policy: str) -> Iterator[Claim]:
    """PPO loses what pretraining taught, PPO-ptx keeps it: InstructGPT, section 4.2."""
    before, after = g.policy(c.split, c.baseline, "ability"), g.policy(c.split, policy, "ability")
    if not before or not after:
        return
    because = f"{show(before, PERCENT)} before, {show(after, PERCENT)} after"
    if _mixes_pretraining(g, policy):
        kept = after.mean >= before.low
        verdict: Verdict = "yes" if kept else "no" if after.high < before.low else "unclear"
        yield Claim(f"{policy} keeps the ability of {c.baseline}", g.label, verdict, because)
    else:
        lost = after.mean < before.mean
        verdict = "yes" if after.high < before.low else "unclear" if lost else "no"
        yield Claim(f"{policy} loses ability (alignment tax)", g.label, verdict, because)


def _mixes_pretraining(g: RunGroup, stage: str) -> bool:
    """Did the stage train with PPO-ptx? Its own ``changes`` win over the algorithm's configuration."""
    config = g.runs[0].config
    return bool(config.get(f"stages.{stage}.changes.ptx_coef", config.get(f"stages.{stage}.algorithm.ptx_coef")))


def _reward_model(g: RunGroup) -> Iterator[Claim]:
    labeler, model = g.reward_model("labeler_agreement/gold"), g.reward_model("accuracy/gold")
    text = "gold truth: a single labeler < reward model"
    if (gain := g.reward_model("accuracy_over_labeler/gold")) and labeler and model:
        because = f"{show(labeler, PERCENT)} and {show(model, PERCENT)}; pair by pair {show(gain, '+.1%')}"
        verdict: Verdict = "yes" if gain.low > 0 else "unclear" if gain.mean > 0 else "no"
        yield Claim(text, g.label, verdict, because)
    elif labeler and model:
        yield ordered(text, g.label, labeler, model, PERCENT)
    if unseen := g.reward_model("accuracy/heldout_labelers"):
        yield above("reward model predicts labelers it has not seen", g.label, unseen, 0.5)


def _between_backends(c: RunComparison) -> Iterator[Claim]:
    metric = headline_metric(c)
    if c.split is None or metric is None:
        return
    final = c.policies[-1]
    for a, b in same_but_for_backend(c):
        x, y = a.policy(c.split, final, metric), b.policy(c.split, final, metric)
        if x and y:
            yield agreement(f"final {metric} ({final}) is the same on both backends", _both(a, b), x, y)


def _both(a: RunGroup, b: RunGroup) -> str:
    """Where: 'kl_coef=0.1', or 'jax and torch' if the labels have nothing else in common."""
    rest = a.label.partition(", ")[2]
    return rest if rest and rest == b.label.partition(", ")[2] else f"{a.label} and {b.label}"


def same_but_for_backend(c: RunComparison) -> list[tuple[RunGroup, RunGroup]]:
    return [(a, b) for a, b in combinations(c.groups, 2) if _but_for_backend(a) == _but_for_backend(b) and a.backend != b.backend]


def _but_for_backend(g: RunGroup) -> dict[str, str]:
    return {key: value for key, value in g.settings.items() if key != BACKEND}


def by_text(found: Sequence[Claim]) -> list[tuple[str, list[Claim]]]:
    """The claims of all groups by their text, in order of first appearance."""
    texts = dict.fromkeys(claim.text for claim in found)
    return [(text, [claim for claim in found if claim.text == text]) for text in texts]


# ------------------------------------------------------------------------------------------------------------ verdicts


def ordered(text: str, where: str, worse: Estimate, better: Estimate, form: str = SCORE) -> Claim:
    """Is ``worse`` below ``better``, and are their intervals apart?"""
    because = f"{show(worse, form)} and {show(better, form)}"
    if better.mean <= worse.mean:
        return Claim(text, where, "no", because)
    apart = worse.high < better.low
    return Claim(text, where, "yes" if apart else "unclear", f"{because}, intervals {'apart' if apart else 'overlap'}")


def above(text: str, where: str, estimate: Estimate, threshold: float, form: str = PERCENT) -> Claim:
    verdict: Verdict = "yes" if estimate.low > threshold else "unclear" if estimate.mean > threshold else "no"
    return Claim(text, where, verdict, show(estimate, form))


def agreement(text: str, where: str, a: Estimate, b: Estimate) -> Claim:
    """Does each mean lie in the other's interval?"""
    inside = a.low <= b.mean <= a.high and b.low <= a.mean <= b.high
    overlap = a.low <= b.high and b.low <= a.high
    verdict: Verdict = "yes" if inside else "unclear" if overlap else "no"
    how = "each within the other's interval" if inside else "intervals overlap" if overlap else "intervals apart"
    return Claim(text, where, verdict, f"{show(a)} and {show(b)}, {how}")


def show(e: Estimate | None, form: str = SCORE) -> str:
    """'1.41 [1.30, 1.52]', without the interval if it has no width; '' for None."""
    if e is None:
        return ""
    return f"{e.mean:{form}}" if e.low == e.high else f"{e.mean:{form}} [{e.low:{form}}, {e.high:{form}}]"


# ------------------------------------------------------------------------------------------------------------ headline


def headline_metric(c: RunComparison) -> str | None:
    """The most trustworthy measure that the runs have."""
    return next((m for m in ("gold", "win_rate", "score") if c.split and c.has(m, c.split)), None)


def headline(c: RunComparison) -> str:
    """One or two sentences: what training gained, where, and whether the backends agree."""
    metric = headline_metric(c)
    if metric is None or c.split is None:
        count = len(c.runs)
        return f"{count} run{'s' if count != 1 else ''}, none of them evaluated yet."
    best, groups = _best_policy(c, metric), list(c.groups)
    if len(groups) > 3:  # too many to name: the best one
        groups = [max(groups, key=lambda g: _mean(g.policy(c.split, best, metric)))]
    start = c.baseline if metric != "win_rate" and c.baseline != best else None
    return " ".join(filter(None, [_gain(c, groups, metric, start, best), _agreement_sentence(c, metric)]))


def _best_policy(c: RunComparison, metric: str) -> str:
    """The policy with the highest mean in any group."""
    return max(c.policies, key=lambda policy: max(_mean(g.policy(c.split, policy, metric)) for g in c.groups))


def _beaten(c: RunComparison, metric: str) -> bool:
    """Does a policy after the baseline have a higher mean than the baseline, in any group?"""
    return any(
        _mean(g.policy(c.split, p, metric)) > _mean(g.policy(c.split, c.baseline, metric))
        for g in c.groups
        for p in c.after_baseline
    )


def _mean(e: Estimate | None) -> float:
    return e.mean if e else float("-inf")


def _gain(c: RunComparison, groups: Sequence[RunGroup], metric: str, start: str | None, best: str) -> str:
    form = PERCENT if metric == "win_rate" else SCORE
    pairs = [(g, g.policy(c.split, start, metric) if start else None, g.policy(c.split, best, metric)) for g in groups]
    pairs = [(g, a, b) for g, a, b in pairs if b and (a or not start)]
    subject = {"gold": "the gold score", "score": "the reward model's score"}.get(metric, "")
    which = "" if len(groups) == len(c.groups) else f" (the best of {len(c.groups)})"
    if start:
        texts = [f"from {a.mean:{form}} to {b.mean:{form}} on {g.label}" for g, a, b in pairs]
        rise = all(b.mean > a.mean for _, a, b in pairs)
        return f"{best} {'raises' if rise else 'moves'} {subject} of {start} {_and(texts)}{which}."
    texts = [f"{b.mean:{form}} on {g.label}" for g, _, b in pairs]
    if metric == "win_rate":
        return f"Against {c.baseline}, {best} wins {_and(texts)}{which}."
    if best == c.baseline and c.after_baseline and not _beaten(c, metric):
        return f"No policy is better than {best}, which reaches {_and(texts)}{which}."
    return f"{best} reaches {_and(texts)}{which}."


def _agreement_sentence(c: RunComparison, metric: str) -> str:
    pairs = same_but_for_backend(c)
    found = [
        agreement("", "", x, y).verdict
        for a, b in pairs
        for p in c.policies
        if (x := a.policy(c.split, p, metric)) and (y := b.policy(c.split, p, metric))
    ]
    if not found:
        return ""
    same = sum(v == "yes" for v in found)
    if same == len(found):
        return "The backends agree: for every policy, each mean lies within the other's interval."
    return f"The backends agree within each other's interval in {same} of {len(found)} cases."


def _and(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
