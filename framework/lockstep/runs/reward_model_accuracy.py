"""A reward model against held-out comparisons: agreement with labelers and with the gold truth, calibration, and whether either
prefers what is longer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np

from lockstep.errors import MissingData, RewardError, Unreachable
from lockstep.interfaces import DataSource, RewardModel
from lockstep.learning import numerics
from lockstep.learning.rollout import responses_of, scores_of
from lockstep.learning.rows import MissingColumn
from lockstep.runs.components import Chosen
from lockstep.runs.measures import Measure, clusters_of, mean
from lockstep.text import encoding
from lockstep.text.encoding import Lengths
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Comparison, Demonstration, Goal, Prompt

ScoredComparison = tuple[Comparison, np.ndarray, np.ndarray]
"""A comparison, the reward model's scores [K] of its completions, and their lengths [K] in tokens."""


def measure_reward_model(
    reward_model: RewardModel,
    data: DataSource,
    tokenizer: Tokenizer,
    lengths: Lengths,
    most: int,
    training: Collection[str | None] | None,
) -> dict[str, Measure]:
    """Test a reward model on at most ``most`` held-out comparisons. Empty without any, or if it scores episodes only.

    ``training``: the labelers that it was trained on, None for unnamed ones; None if that is unknown, so that it may be any.
    """
    if reward_model.needs_environment:
        return {}
    comparisons = heldout_comparisons(data, tokenizer, lengths, most)
    with scoring_comparisons():
        scored = score_completions(reward_model, comparisons, tokenizer, lengths) if comparisons else []
    scored = [each for each in scored if np.isfinite(each[1]).all()]
    if not scored:
        return {}
    found = accuracy(scored, training) | calibration(scored)
    return found | accuracy_by_gold(scored, data) | preference_for_length(scored)


def rehearse_on_comparisons(scorer: Chosen, data: DataSource, most: int) -> None:
    """Rehearse a reward model on one of the first ``most`` held-out comparisons: on the one with the most columns, as others may
    lack some. Does nothing without any.

    Raises:
      LockstepError: it would fail on comparisons.
    """
    try:
        found = list(islice(data.comparisons("heldout"), most))
    except (MissingData, Unreachable):
        return
    if not found:
        return
    with scoring_comparisons():
        scorer.component.rehearse(scorer.config, Compared(data, max(found, key=lambda c: len(c.prompt.truth))))


@contextmanager
def scoring_comparisons() -> Iterator[None]:
    """
    Raises:
      RewardError: one that was raised within, with what held-out comparisons lack and how to do without them.
    """
    try:
        yield
    except MissingColumn as error:
        where = MissingColumn(error.asks, error.name, error.columns, "held-out comparison", "data.comparisons")
        raise RewardError(f"{where} Name it in data.heldout_comparisons too if that is set. {_WITHOUT}") from None
    except RewardError as error:
        raise RewardError(f"On held-out comparisons, {error} {_WITHOUT}") from error


_WITHOUT = "An evaluation scores held-out comparisons too; not with evaluation.comparisons=0."


@dataclass
class Compared(DataSource):
    """The data, but its only prompt is that of a comparison, answered by its first completion."""

    data: DataSource
    comparison: Comparison

    def texts(self, split: str) -> Sequence[str]:
        return self.data.texts(split)

    def goals(self, split: str) -> Sequence[Goal]:
        return self.data.goals(split)

    def comparisons(self, split: str) -> Sequence[Comparison]:
        return [self.comparison]

    def prompts(self, split: str) -> Sequence[Prompt]:
        return [self.comparison.prompt]

    def demonstrations(self, split: str) -> Sequence[Demonstration]:
        return [Demonstration(self.comparison.prompt, self.comparison.completions[0])]


def heldout_comparisons(data: DataSource, tokenizer: Tokenizer, lengths: Lengths, most: int) -> list[Comparison]:
    """The first held-out comparisons, without those whose prompt is too long."""
    try:
        found = list(islice(data.comparisons("heldout"), most))
    except MissingData:
        return []
    return [c for c in found if encoding.encode_prompt(tokenizer, c.prompt, lengths.prompt) is not None]


def score_completions(
    reward_model: RewardModel, comparisons: Sequence[Comparison], tokenizer: Tokenizer, lengths: Lengths
) -> list[ScoredComparison]:
    prompts = [c.prompt for c in comparisons for _ in c.completions]
    texts = [text for c in comparisons for text in c.completions]
    responses = responses_of(prompts, texts, tokenizer, lengths)
    ends = np.cumsum([len(c.completions) for c in comparisons])[:-1]
    scores = np.split(scores_of(reward_model, responses), ends)
    return list(zip(comparisons, scores, np.split(responses.sequences.mask.sum(axis=1), ends), strict=True))


def labelers_of(data: DataSource) -> frozenset[str | None]:
    """The labelers of the training comparisons."""
    try:
        return frozenset(c.labeler for c in data.comparisons("train"))
    except MissingData:
        return frozenset()


def accuracy(scored: Sequence[ScoredComparison], training: Collection[str | None] | None) -> dict[str, Measure]:
    """Agreement with labelers: those that it may have been trained on, the others, and each group of labelers, unless it is one
    of these two."""
    new = [training is not None and c.labeler not in training for c, _, _ in scored]
    splits = {"accuracy/training_labelers": [not n for n in new], "accuracy/heldout_labelers": new}
    for name in dict.fromkeys(c.group for c, _, _ in scored if c.group is not None):
        if (members := [c.group == name for c, _, _ in scored]) not in splits.values():
            splits[f"accuracy/group/{name}"] = members
    measures = {}
    for name, members in splits.items():
        chosen = [each for each, take in zip(scored, members, strict=True) if take]
        measures[name] = _mean((numerics.agreement(s, _preference(c)) for c, s, _ in chosen), chosen)
    return {name: measure for name, measure in measures.items() if measure["n"]}


def calibration(scored: Sequence[ScoredComparison]) -> dict[str, Measure]:
    """Expected calibration error and Brier score of the preferred completion's margin, over all pairs."""
    pairs = [numerics.pair_margins(s, numerics.preferences([c.ranks], len(s))) for c, s, _ in scored]
    margins = np.concatenate(pairs)
    found = {"ece": numerics.expected_calibration_error(margins), "brier": numerics.brier_score(margins)}
    return {name: {"mean": value, "n": len(margins)} for name, value in found.items()}


def accuracy_by_gold(scored: Sequence[ScoredComparison], data: DataSource) -> dict[str, Measure]:
    """Agreement of the reward model and of labelers with the gold scores; empty if the data do not know these."""
    golds = [[data.gold(c.prompt, text) for text in c.completions] for c, _, _ in scored]
    if any(found[0] is None for found in golds):
        return {}
    known = [np.array([gold["gold"] for gold in found if gold is not None]) for found in golds]
    ours = _values(numerics.agreement(s, gold) for (_, s, _), gold in zip(scored, known, strict=True))
    labelers = _values(numerics.agreement(_preference(c), gold) for (c, _, _), gold in zip(scored, known, strict=True))
    return {
        "accuracy/gold": _mean(ours, scored),
        "labeler_agreement/gold": _mean(labelers, scored),
        "accuracy_over_labeler/gold": _mean(ours - labelers, scored),  # over the same pairs, so the interval is narrower
    }


def preference_for_length(scored: Sequence[ScoredComparison]) -> dict[str, Measure]:
    """Of the pairs whose completions differ in length, the share in which labelers, and the reward model, prefer the longer."""
    found = {"labelers": [(_preference(c), n) for c, _, n in scored], "reward_model": [(s, n) for _, s, n in scored]}
    shares = {name: _mean((numerics.agreement(order, n) for order, n in each), scored) for name, each in found.items()}
    return {f"prefers_longer/{name}": share for name, share in shares.items() if share["n"]}


def _preference(comparison: Comparison) -> np.ndarray:
    """[K], higher for what the labeler ranked better."""
    return -np.asarray(comparison.ranks)


def _mean(values: Iterable[float | None], scored: Sequence[ScoredComparison]) -> Measure:
    """The mean of those that are known; comparisons of one prompt are not independent."""
    return mean(_values(values), clusters_of([c.prompt for c, _, _ in scored]))


def _values(values: Iterable[float | None]) -> np.ndarray:
    """float [N], NaN for None."""
    return np.array(list(values), float)
