"""Named warnings while a stage trains: what the metrics say is going wrong, what it usually means, what to try.

`Health.watch` takes each step's metrics and returns its findings. They depend only on the metrics so far, so a resumed stage
replays ``metrics.jsonl`` and continues as if it had never stopped. Rules read only logged metrics, so they work for any
algorithm that uses the names in docs/metrics.md.

The thresholds should be silent on every run worth keeping. Rules cite sources that describe the failure. Few sources give a
number, so most numbers are ours; the rules say so. A warning never stops a run. A loss or gradient that is not finite does
(`diverged`).

Left out: anything that needs more than the metrics, such as reading the responses.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

START, RECENT, REARM = 5, 200, 20
"""Steps averaged for a stage's start; steps remembered; steps without its cause before a warning may repeat."""


class History:
    """The first `START` and the last `RECENT` values of every metric."""

    def __init__(self) -> None:
        self.start: dict[str, list[float]] = {}
        self.recent: dict[str, deque[float]] = {}
        self.now: Mapping[str, float] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        self.now = metrics
        for name, value in metrics.items():
            self.recent.setdefault(name, deque(maxlen=RECENT)).append(value)
            if len(start := self.start.setdefault(name, [])) < START:
                start.append(value)

    def values(self, name: str, least: int) -> np.ndarray | None:
        """The remembered values of a metric logged in this step, oldest first; None if there are fewer than ``least``."""
        found = self.recent.get(name, ()) if name in self.now else ()
        return np.asarray(found) if len(found) >= least else None

    def mean(self, name: str, steps: int) -> float:
        """The mean of the last ``steps`` values. NaN if there are fewer: every comparison with NaN is false."""
        values = self.values(name, steps)
        return float(values[-steps:].mean()) if values is not None else math.nan

    def initial(self, name: str) -> float:
        """The mean of the first `START` values; NaN if there are none."""
        return float(np.mean(self.start.get(name, math.nan)))


# -------------------------------------------------------------------------------------------------------------- rules
# Each returns the evidence as a sentence, or None.

UPDATED = ("loss", "policy/loss", "value/loss", "grad_norm/")
DECISIVE = (*UPDATED, "objective/score", "objective/kl", "objective/entropy")


def diverged(metrics: Mapping[str, float | None]) -> list[str]:
    """Return this step's losses and gradient norms that are not finite. Their update has already spoilt the parameters."""
    return [n for n, value in metrics.items() if n.startswith(UPDATED) and (value is None or not math.isfinite(value))]


def are_not_finite(names: Sequence[str]) -> str:
    """A sentence that names the first three."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'} not finite."


def not_finite(history: History) -> str | None:
    """A loss, score, KL, entropy or gradient norm is NaN or infinite. Held-out measures do not count: they are NaN if nothing
    is held out. Neither does explained variance: it is NaN if all returns are equal."""
    bad = [n for n, value in history.now.items() if n.startswith(DECISIVE) and not math.isfinite(value)]
    return f"{', '.join(bad)} is not a finite number." if bad else None


def loss_diverging(history: History) -> str | None:
    """Supervised stages: the mean loss of 5 steps is over 1.5 times its lowest among the remembered steps, plus 0.5 nats.
    The numbers are ours."""
    losses = history.values("loss", 2 * 5)
    if losses is None or "objective/score" in history.now:
        return None
    losses = losses[np.isfinite(losses)]
    if len(losses) < 2 * 5:
        return None
    means = moving_mean(losses, 5)
    if not means[-1] > 1.5 * means.min() + 0.5:
        return None
    return f"loss, mean of 5 steps, has risen from {means.min():.3g} to {means[-1]:.3g}."


def gradient_explosion(history: History) -> str | None:
    """The median norm of the last 3 steps is over 10 times that of the 20 steps before. Medians, so that one bad batch does
    not count. The factor is ours."""
    for name in history.now:
        if name.startswith("grad_norm/") and (norms := history.values(name, 23)) is not None:
            before, now = np.median(norms[-23:-3]), np.median(norms[-3:])
            if now > 10 * before > 0:
                return f"{name} has risen from {before:.3g} to {now:.3g} within a few steps."
    return None


MOST_KL, MOST_KL_PER_TOKEN = 50.0, 1.0


def kl_running_away(history: History) -> str | None:
    """KL to the reference, mean of 5 steps, is over 50 nats per response or over 1 nat per token. At 1 nat the policy's tokens
    are e times as likely as under the reference. lm-human-preferences steers its KL to 6 to 10 nats. The true score's gain and
    loss both go with √KL (Bai et al. 2022, section 4.3; Gao et al. 2022). The bounds are ours."""
    kl, length = history.mean("objective/kl", 5), history.mean("objective/length", 5)
    if kl > MOST_KL or kl > MOST_KL_PER_TOKEN * length:
        return f"objective/kl, mean of 5 steps, is {kl:.3g} nats per response of {length:.3g} tokens."
    return None


def entropy_collapse(history: History) -> str | None:
    """Entropy per token, mean of 5 steps, is below a fifth of its start. Policies stop improving once their entropy is spent
    (Cui et al. 2025, 'The entropy mechanism of reinforcement learning for reasoning language models'); the fifth is ours."""
    entropy = history.mean("objective/entropy", 5)
    initial = history.initial("objective/entropy")
    return f"objective/entropy has fallen from {initial:.3g} to {entropy:.3g} nats per token." if entropy < initial / 5 else None


def score_against_gold(history: History) -> str | None:
    """Since its best 10 steps, the gold score has fallen while the reward model's score has risen, each by more than four
    standard errors of the difference of two 10-step means: over-optimisation (Gao et al. 2022)."""
    score, gold = history.values("objective/score", 30), history.values("objective/gold", 30)
    if score is None or gold is None:
        return None
    scores, golds = moving_mean(score, 10), moving_mean(gold, 10)
    best = int(np.argmax(golds[:-10]))
    if golds[best] - golds[-1] > 4 * standard_error(gold) and scores[-1] - scores[best] > 4 * standard_error(score):
        change = lambda x: f"from {x[best]:.3g} to {x[-1]:.3g}"  # noqa: E731
        return f"objective/score has risen {change(scores)} while objective/gold has fallen {change(golds)}."
    return None


def score_by_length(history: History) -> str | None:
    """Without a gold score: the score has risen since the start by more than four standard errors, and responses are now at
    least 1.5 times or at most half as long. Reward models pay for length (Singhal et al. 2023, 'A long way to go'). The factors
    are ours."""
    score, length = history.values("objective/score", 20), history.mean("objective/length", 10)
    if score is None or math.isnan(length) or "objective/gold" in history.now:
        return None
    rise, before = score[-10:].mean() - history.initial("objective/score"), history.initial("objective/length")
    if rise > 4 * standard_error(score) and not 0.5 < length / before < 1.5:
        return f"objective/score has risen by {rise:.3g} while objective/length went from {before:.3g} to {length:.3g} tokens."
    return None


def clip_fraction_high(history: History) -> str | None:
    """The mean of 5 steps is over 0.3. Clipped tokens teach nothing (Schulman et al. 2017, equation 7). The bound is ours."""
    fraction = history.mean("policy/clip_fraction", 5)
    return f"policy/clip_fraction, mean of 5 steps, is {fraction:.2g}." if fraction > 0.3 else None


def values_uninformative(history: History) -> str | None:
    """After 30 steps, explained variance, mean of 10 steps, is below 0: the mean return would be a better guess."""
    explained = history.values("value/explained_variance", 30)
    if explained is None or not (mean := explained[-10:].mean()) < 0:
        return None
    return f"value/explained_variance, mean of 10 steps, is {mean:.2g}."


def sampler_mismatch(history: History) -> str | None:
    """The mean absolute difference between the sampler's and the trainer's log-probabilities, mean of 3 steps, is over 0.02
    nats. bfloat16 causes less (docs/metrics.md); float32 stays below 1e-4. For the effect on training see Yao et al.
    2025, 'Your efficient RL framework secretly brings you off-policy RL training'."""
    if history.now.get("sampler/steps_behind"):
        return None  # the sampler's policy is then an older one
    mismatch = history.mean("sampler/mismatch_mean", 3)
    return f"sampler/mismatch_mean is {mismatch:.2g} nats per token." if mismatch > 0.02 else None


def responses_cut_off(history: History) -> str | None:
    """Fewer than one response in twenty ended by itself in the last 3 steps."""
    finished = history.mean("objective/finished", 3)
    if finished < 0.05:
        length = history.mean("objective/length", 3)
        return f"{1 - finished:.0%} of the responses of 3 steps have no stop token; objective/length is {length:.3g}."
    return None


def cutting_off_pays(history: History) -> str | None:
    """Over 5 steps the mean reward is above the mean score, by a twentieth of it or 0.05, and some responses do not end: only
    what replaces the score of these can raise it, since the KL penalty lowers rewards."""
    reward, score, finished = (history.mean(f"objective/{name}", 5) for name in ("reward", "score", "finished"))
    if finished < 1 and reward > score + 0.05 * max(1, abs(score)):
        return f"objective/reward is {reward:.3g} where objective/score is {score:.3g}, and {1 - finished:.0%} do not end."
    return None


def identical_scores(history: History) -> str | None:
    """Within each of the last 3 batches, all scores were equal, up to rounding."""
    spread, score = history.values("objective/score_std", 3), history.now.get("objective/score")
    if spread is None or score is None or not (spread[-3:] <= 1e-6 * max(1, abs(score))).all():
        return None
    return f"all scores of a batch are equal ({score:.4g}), for 3 steps now."


@dataclass(frozen=True)
class Rule:
    check: Callable[[History], str | None]
    meaning: str
    advice: str

    @property
    def name(self) -> str:
        return self.check.__name__


NOT_FINITE = Rule(
    not_finite,
    "The numbers have overflowed; nothing learned from here on can be trusted.",
    "a lower learning rate, a longer warm-up, max_grad_norm=1, precision=float32, another look at the data.",
)

RULES = (
    NOT_FINITE,
    Rule(
        loss_diverging,
        "The learning rate is too high, or the kind of data has changed.",
        "a lower learning rate, a longer warm-up, max_grad_norm=1, another look at the data.",
    ),
    Rule(
        gradient_explosion,
        "The next updates may break the model, or one kind of batch differs from the rest.",
        "a lower learning rate, max_grad_norm, a longer warm-up; in PPO look at objective/kl too.",
    ),
    Rule(
        kl_running_away,
        "The policy has left the text that the reward model was trained on; its scores mean little there.",
        "a larger kl_coef, or kl_target; a lower learning rate; fewer iterations.",
    ),
    Rule(
        entropy_collapse,
        "The policy repeats the same answers and no longer explores.",
        "a larger kl_coef, a lower learning rate, fewer epochs per batch, temperature 1.",
    ),
    Rule(
        score_against_gold,
        "Over-optimisation: the policy exploits what the reward model gets wrong.",
        "an earlier checkpoint, a larger kl_coef, a reward model trained on more data, or fresh comparisons of these responses.",
    ),
    Rule(
        score_by_length,
        "Often the reward model pays for length itself; the responses may be no better.",
        "read samples.jsonl; a larger kl_coef; comparisons in which length is balanced.",
    ),
    Rule(
        clip_fraction_high,
        "The updates of one batch go too far; the clipped tokens teach nothing.",
        "a lower learning rate, fewer epochs or minibatches per batch, a larger batch.",
    ),
    Rule(
        values_uninformative,
        "The value function guesses worse than a constant, so it adds noise to the advantages.",
        "a larger value_coef or value learning rate, value_network=separate unless it is, whiten_rewards where scores are large.",
    ),
    Rule(
        sampler_mismatch,
        "The sampler draws from a different distribution than the trainer computes: check precision, cache, mask, position and "
        "temperature.",
        "precision=float32 to see whether it goes away; if so, correction.kind=truncate, else `lockstep check` on the policy.",
    ),
    Rule(
        responses_cut_off,
        "The policy has not learned to stop, or the limit is too short: the scores are for fragments.",
        "a larger lengths.response, an unfinished_score below all others, demonstrations that end with the stop token.",
    ),
    Rule(
        cutting_off_pays,
        "Responses without a stop token get more than their scores, so the policy learns not to stop.",
        "an unfinished_score below the scores of finished responses, or null, which keeps each response's own.",
    ),
    Rule(
        identical_scores,
        "There is nothing to learn from: the reward is a constant, or all responses are alike.",
        "look at samples.jsonl; if they differ, look at the reward model, else see entropy_collapse.",
    ),
)


@dataclass(frozen=True)
class Finding:
    name: str
    step: int
    message: str


@dataclass
class Health:
    """Watches one stage. A warning is reported once, and again only after its cause has been gone for `REARM` steps."""

    history: History = field(default_factory=History)
    last: dict[str, int] = field(default_factory=dict)  # the last step at which each rule applied

    def watch(self, step: int, metrics: Mapping[str, float | None]) -> list[Finding]:
        """Return the new findings at this step. A metric of None was not finite."""
        self.history.add({name: math.nan if value is None else value for name, value in metrics.items()})
        findings = []
        for rule in RULES:
            if evidence := rule.check(self.history):
                if step - self.last.get(rule.name, -math.inf) > REARM:
                    findings.append(Finding(rule.name, step, f"{evidence} {rule.meaning} Try: {rule.advice}"))
                self.last[rule.name] = step
        return findings

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replay the steps of ``metrics.jsonl``; their findings were already reported."""
        for row in rows:
            self.watch(row["step"], {name: value for name, value in row.items() if name not in ("step", "seconds")})


# -------------------------------------------------------------------------------------------------------- arithmetic


def moving_mean(values: np.ndarray, steps: int) -> np.ndarray:
    """[N - steps + 1]: the mean of every ``steps`` consecutive values."""
    return np.convolve(values, np.full(steps, 1 / steps), mode="valid")


def standard_error(values: np.ndarray, steps: int = 10) -> float:
    """The standard error of the difference of two means of ``steps`` independent values. The variance of one value is estimated
    from neighbours, Var(x_t+1 - x_t) / 2, so that a slow trend does not count (von Neumann 1941)."""
    return float(np.sqrt(np.mean(np.diff(values) ** 2) / 2 * 2 / steps))
