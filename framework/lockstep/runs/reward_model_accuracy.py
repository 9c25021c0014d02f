"""A reward model against held-out comparisons: agreement with labelers and with the gold truth, and calibration."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import islice

import numpy as np

from lockstep.errors import MissingData
from lockstep.interfaces import DataSource, RewardModel
from lockstep.learning import numerics
from lockstep.learning.rollout import responses_of, scores_of
from lockstep.runs.measures import Measure, mean
from lockstep.text import encoding
from lockstep.text.encoding import Lengths
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Comparison

ScoredComparison = tuple[Comparison, np.ndarray]
"""A comparison, and the reward model's scores [K] of its completions."""


def measure_reward_model(
    reward_model: RewardModel, data: DataSource, tokenizer: Tokenizer, lengths: Lengths, most: int
) -> dict[str, Measure]:
    """Test a reward model on at most ``most`` held-out comparisons. Empty without any, or if it scores episodes only."""
    if reward_model.needs_environment:
        return {}
    comparisons = heldout_comparisons(data, tokenizer, lengths, most)
    scores = completion_scores(reward_model, comparisons, tokenizer, lengths) if comparisons else []
    scored = [(c, s) for c, s in zip(comparisons, scores, strict=True) if np.isfinite(s).all()]
    if not scored:
        return {}
    return accuracy(scored, training_labelers(data)) | calibration(scored) | accuracy_by_gold(scored, data)


def heldout_comparisons(data: DataSource, tokenizer: Tokenizer, lengths: Lengths, most: int) -> list[Comparison]:
    """The first held-out comparisons, without those whose prompt is too long."""
    try:
        found = list(islice(data.comparisons("heldout"), most))
    except MissingData:
        return []
    return [c for c in found if encoding.encode_prompt(tokenizer, c.prompt, lengths.prompt) is not None]


def completion_scores(
    reward_model: RewardModel, comparisons: Sequence[Comparison], tokenizer: Tokenizer, lengths: Lengths
) -> list[np.ndarray]:
    """The reward model's scores of each comparison's completions."""
    prompts = [c.prompt for c in comparisons for _ in c.completions]
    texts = [text for c in comparisons for text in c.completions]
    scores = scores_of(reward_model, responses_of(prompts, texts, tokenizer, lengths))
    return np.split(scores, np.cumsum([len(c.completions) for c in comparisons])[:-1])


def training_labelers(data: DataSource) -> frozenset[str | None]:
    """The labelers of the training comparisons, always including unnamed ones (None)."""
    try:
        return frozenset({c.labeler for c in data.comparisons("train")} | {None})
    except MissingData:
        return frozenset({None})


def accuracy(scored: Sequence[ScoredComparison], training: Collection[str | None]) -> dict[str, Measure]:
    """Agreement with labelers: those of the training comparisons, the others, and each group of labelers, unless it is one of
    these two."""
    new = [c.labeler not in training for c, _ in scored]
    splits = {"accuracy/training_labelers": [not n for n in new], "accuracy/heldout_labelers": new}
    for name in dict.fromkeys(c.group for c, _ in scored if c.group is not None):
        if (members := [c.group == name for c, _ in scored]) not in splits.values():
            splits[f"accuracy/group/{name}"] = members
    measures = {}
    for name, members in splits.items():
        shares = _present(numerics.agreement(s, _preference(c)) for (c, s), take in zip(scored, members, strict=True) if take)
        if shares.size:
            measures[name] = mean(shares)
    return measures


def calibration(scored: Sequence[ScoredComparison]) -> dict[str, Measure]:
    """Expected calibration error and Brier score of the preferred completion's margin, over all pairs."""
    pairs = [numerics.pair_margins(s, numerics.preferences([c.ranks], len(s))) for c, s in scored]
    margins = np.concatenate(pairs)
    found = {"ece": numerics.expected_calibration_error(margins), "brier": numerics.brier_score(margins)}
    return {name: {"mean": value, "n": len(margins)} for name, value in found.items()}


def accuracy_by_gold(scored: Sequence[ScoredComparison], data: DataSource) -> dict[str, Measure]:
    """Agreement of the reward model and of labelers with the gold scores; empty if the data do not know these."""
    golds = [[data.gold(c.prompt, text) for text in c.completions] for c, _ in scored]
    if any(found[0] is None for found in golds):
        return {}
    known = [np.array([gold["gold"] for gold in found if gold is not None]) for found in golds]
    ours = _present(numerics.agreement(s, gold) for (_, s), gold in zip(scored, known, strict=True))
    labelers = _present(numerics.agreement(_preference(c), gold) for (c, _), gold in zip(scored, known, strict=True))
    return {
        "accuracy/gold": mean(ours),
        "labeler_agreement/gold": mean(labelers),
        "accuracy_over_labeler/gold": mean(ours - labelers),  # over the same pairs, so the interval is narrower
    }


def _preference(comparison: Comparison) -> np.ndarray:
    """[K], higher for what the labeler ranked better."""
    return -np.asarray(comparison.ranks)


def _present(values: Iterable[float | None]) -> np.ndarray:
    return np.array([v for v in values if v is not None])
