"""What the numbers say: a headline and a checklist, computed from the evaluation alone.

"Apart" means that two 95% intervals do not overlap. For one run that is stricter than a test of the difference at the 5% level,
and stricter still because all policies answer the same prompts. Over few seeds intervals are too narrow, so the headline also
requires Student's test to agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from lockstep.reporting.compare import decisions, versus
from lockstep.reporting.compare.groups import BACKEND, RunComparison, RunGroup
from lockstep.reporting.compare.records import Estimate

Verdict = Literal["yes", "unclear", "no"]
SCORE, PERCENT, GAIN = ".2f", ".1%", "+.1%"  # how numbers, shares and differences of shares are written


@dataclass(frozen=True)
class Claim:
    text: str
    where: str  # the group or groups that it is about
    verdict: Verdict
    because: str


def find(c: RunComparison) -> list[Claim]:
    """Every claim for which the runs have the numbers."""
    found = [claim for g in c.groups for claim in _within(c, g)]
    return [*_once(found), *_between_backends(c)]


def _once(found: Sequence[Claim]) -> list[Claim]:
    """Merge equal claims into one that names all groups: groups that share models have the same numbers."""
    alike: dict[tuple[str, Verdict, str], list[str]] = {}
    for claim in found:
        alike.setdefault((claim.text, claim.verdict, claim.because), []).append(claim.where)
    return [Claim(text, "; ".join(where), verdict, because) for (text, verdict, because), where in alike.items()]


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
        if rate := g.policy(c.split, policy, "length_controlled_win_rate"):
            yield above(f"{policy} wins more than half against {c.baseline} at equal length", g.label, rate, 0.5)
        yield from _alignment_tax(c, g, policy)
    yield from _reward_model(g)


def _alignment_tax(c: RunComparison, g: RunGroup, policy: str) -> Iterator[Claim]:
    """PPO loses what pretraining taught; PPO-ptx keeps it (InstructGPT, section 4.2)."""
    before, after = g.policy(c.split, c.baseline, "ability"), g.policy(c.split, policy, "ability")
    if not before or not after:
        return
    because = f"{show(before, PERCENT)} before, {show(after, PERCENT)} after"
    if _mixes_pretraining(g, policy):
        kept = after.mean >= before.low
        verdict = _verdict("yes" if kept else "no" if after.high < before.low else "unclear", before, after)
        yield Claim(f"{policy} keeps the ability of {c.baseline}", g.label, verdict, because)
    else:
        lost = after.mean < before.mean
        verdict = _verdict("yes" if after.high < before.low else "unclear" if lost else "no", before, after)
        yield Claim(f"{policy} loses ability (alignment tax)", g.label, verdict, because)


def _mixes_pretraining(g: RunGroup, stage: str) -> bool:
    """True if the stage trained with PPO-ptx. Its own ``changes`` win over the algorithm's configuration."""
    config = g.runs[0].config
    return bool(config.get(f"stages.{stage}.changes.ptx_coef", config.get(f"stages.{stage}.algorithm.ptx_coef")))


def _reward_model(g: RunGroup) -> Iterator[Claim]:
    labeler, model = g.reward_model("labeler_agreement/gold"), g.reward_model("accuracy/gold")
    text = "gold truth: a single labeler < reward model"
    if (gain := g.reward_model("accuracy_over_labeler/gold")) and labeler and model:
        because = f"{show(labeler, PERCENT)} and {show(model, PERCENT)}; pair by pair {show(gain, GAIN)}"
        verdict = _verdict("yes" if gain.low > 0 else "unclear" if gain.mean > 0 else "no", gain)
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
    """A label for both groups: 'kl_coef=0.1' if they share it, else both labels: 'jax and torch'."""
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


def _verdict(found: Verdict, *estimates: Estimate) -> Verdict:
    """``found``, or 'unclear' if one of the estimates has no interval."""
    return found if all(each.has_interval for each in estimates) else "unclear"


def ordered(text: str, where: str, worse: Estimate, better: Estimate, form: str = SCORE) -> Claim:
    """Claim that ``worse`` is below ``better``; unclear unless their intervals are apart."""
    because = f"{show(worse, form)} and {show(better, form)}"
    if not (worse.has_interval and better.has_interval):
        return Claim(text, where, "unclear", f"{because}, without intervals")
    if better.mean <= worse.mean:
        return Claim(text, where, "no", because)
    apart = worse.high < better.low
    return Claim(text, where, "yes" if apart else "unclear", f"{because}, intervals {'apart' if apart else 'overlap'}")


def above(text: str, where: str, estimate: Estimate, threshold: float, form: str = PERCENT) -> Claim:
    found: Verdict = "yes" if estimate.low > threshold else "unclear" if estimate.mean > threshold else "no"
    return Claim(text, where, _verdict(found, estimate), show(estimate, form))


def agreement(text: str, where: str, a: Estimate, b: Estimate) -> Claim:
    """Claim that each mean lies in the other's interval; unclear if only the intervals overlap."""
    if not (a.has_interval and b.has_interval):
        return Claim(text, where, "unclear", f"{show(a)} and {show(b)}, without intervals")
    inside = a.low <= b.mean <= a.high and b.low <= a.mean <= b.high
    overlap = a.low <= b.high and b.low <= a.high
    verdict: Verdict = "yes" if inside else "unclear" if overlap else "no"
    how = "each within the other's interval" if inside else "intervals overlap" if overlap else "intervals apart"
    return Claim(text, where, verdict, f"{show(a)} and {show(b)}, {how}")


def show(e: Estimate | None, form: str = SCORE) -> str:
    """'1.41 [1.30, 1.52]', without the interval if it has no width; '' for None. The interval of a share is cut off at 0 and
    100%, because over seeds it is a normal approximation."""
    if e is None:
        return ""
    low, high = (max(0.0, e.low), min(1.0, e.high)) if form == PERCENT else (e.low, e.high)
    return f"{e.mean:{form}}" if e.low == e.high else f"{e.mean:{form}} [{low:{form}}, {high:{form}}]"


# ------------------------------------------------------------------------------------------------------------ headline


def headline_metric(c: RunComparison) -> str | None:
    """The most trustworthy measure that the runs have."""
    return next((m for m in ("gold", "win_rate", "score") if c.split and c.has(m, c.split)), None)


MOST_NAMED = 3
"""The most groups that a headline names. If there are more, it only counts them."""


def headline(c: RunComparison) -> str:
    """One or two sentences that the claims below support: which policy is above the baseline with intervals apart, and where, or
    that none is; and whether the backends agree."""
    metric = headline_metric(c)
    if metric is None or c.split is None:
        count = len(c.runs)
        return f"{count} run{'s' if count != 1 else ''}, none of them evaluated yet."
    return " ".join(filter(None, [_gain(c, metric), _agreement_sentence(c, metric)]))


Found = Literal["raises", "lowers", "open"]


def _gain(c: RunComparison, metric: str) -> str:
    """The sentence about the policy that is above the baseline in most groups; of several such, about the highest."""
    ranked = {policy: found for policy in c.after_baseline if (found := _against(c, policy, metric))}
    if not ranked:
        return _alone(c, metric)
    best = max(ranked, key=lambda policy: (len(_groups_of(ranked[policy], "raises")), _highest(c, policy, metric)))
    found, named = ranked[best], len(ranked[best]) <= MOST_NAMED
    raises, lowers, open_ = (_groups_of(found, each) for each in ("raises", "lowers", "open"))
    up, known, down = _verbs(c, metric)
    where = lambda groups: _where(c, groups, best, metric) if named else f"in {len(groups)} of {len(found)} groups"  # noqa: E731
    if raises:
        rest = [f"; {down} {where(lowers)}" if lowers else "", f"; not decided {where(open_)}" if open_ else ""]
        return f"{best} {up} {where(raises)}{''.join(rest)}."
    goes = "wins" if metric == "win_rate" else "goes"
    undecided = ""
    if open_:
        undecided = f"{best} {goes} {where(open_)}, not apart" if named else f"{best} is not apart {where(open_)}"
    rest = [f"{best} {down} {where(lowers)}" if lowers else "", undecided]
    return f"No policy is known to {known}: {'; '.join(filter(None, rest))}."


def _verbs(c: RunComparison, metric: str) -> tuple[str, str, str]:
    """What a policy above the baseline does, the same after 'to', and what a policy below it does."""
    if metric == "win_rate":
        return f"wins more than half against {c.baseline}:", f"win more than half against {c.baseline}", "wins less than half:"
    what = f"{SUBJECTS[metric]} of {c.baseline}"
    return f"raises {what}", f"raise {what}", "lowers it"


HALF = Estimate(0.5, 0.5, 0.5)
SUBJECTS = {"gold": "the gold score", "score": "the reward model's score"}


def _against(c: RunComparison, policy: str, metric: str) -> list[tuple[RunGroup, Found]]:
    """For each group that has both: is the policy above the baseline (for win rates, one half) with intervals apart? With
    several seeds Student's test of the difference has to agree, because intervals over few seeds are too narrow."""
    found: list[tuple[RunGroup, Found]] = []
    for g in c.groups:
        before, after = g.policy(c.split or "", c.baseline or "", metric), g.policy(c.split or "", policy, metric)
        test = versus.gain_test(c, g, policy, metric)
        if metric == "win_rate":
            before = HALF
        if before and after:
            apart: Found = "raises" if after.low > before.high else "lowers" if after.high < before.low else "open"
            known = after.has_interval and (before is HALF or before.has_interval)
            found.append((g, apart if known and (test is None or test.p < decisions.LEVEL) else "open"))
    return found


def _groups_of(found: Sequence[tuple[RunGroup, Found]], what: Found) -> list[RunGroup]:
    return [g for g, each in found if each == what]


def _where(c: RunComparison, groups: Sequence[RunGroup], policy: str, metric: str) -> str:
    """'from 5.38 to 5.74 on torch and ...', or '63.0% on torch'."""
    form, texts = PERCENT if metric == "win_rate" else SCORE, []
    for g in groups:
        before, after = g.policy(c.split or "", c.baseline or "", metric), g.policy(c.split or "", policy, metric)
        start = f"from {before.mean:{form}} to " if before and metric != "win_rate" else ""
        texts.append(f"{start}{after.mean:{form}} on {g.label}" if after else g.label)
    return _and(texts)


def _alone(c: RunComparison, metric: str) -> str:
    """The sentence if no policy after the baseline can be compared: what the last policy reaches."""
    form = PERCENT if metric == "win_rate" else SCORE
    last = next(policy for policy in reversed(c.policies) if any(g.policy(c.split or "", policy, metric) for g in c.groups))
    found = [(g, each) for g in c.groups if (each := g.policy(c.split or "", last, metric))]
    if len(found) > MOST_NAMED:
        means = [each.mean for _, each in found]
        return f"{last} reaches {min(means):{form}} to {max(means):{form}} in {len(found)} groups."
    return f"{last} reaches {_and([f'{each.mean:{form}} on {g.label}' for g, each in found])}."


def _highest(c: RunComparison, policy: str, metric: str) -> float:
    return max(each.mean if (each := g.policy(c.split or "", policy, metric)) else float("-inf") for g in c.groups)


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
