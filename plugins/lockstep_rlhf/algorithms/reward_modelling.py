"""A reward model from human rankings of K completions.

InstructGPT (Ouyang et al. 2022), section 3.5 and equation 1: all C(K, 2) pairs of one prompt are one batch element, each with
weight 1 / C(K, 2), with one forward pass per completion. Shuffling the pairs instead overfits in one epoch. The head starts from
N(0, 1 / (d + 1)) (Ziegler et al. 2019). After training the score is shifted so that demonstrations average 0 (InstructGPT;
``normalise: bias``), or also scaled to unit variance (lm-human-preferences; ``gain_and_bias``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import DataError, MissingData
from lockstep.interfaces import Array, Context, DataSource, Metrics, ScalarModel, Term, Traits
from lockstep.learning import losses, numerics
from lockstep.learning.offline import Offline
from lockstep.learning.optimisation import OptimizerConfig, ScheduleConfig
from lockstep.models.architecture import scalar_head
from lockstep.text import encoding
from lockstep.text.encoding import Example, Lengths
from lockstep.text.sequences import Sequences, chunks, in_chunks, round_up
from lockstep.types import Comparison

NORMALISED_ON = 512  # demonstrations

Ranked = tuple[list[Example], tuple[int, ...]]


@dataclass(frozen=True)
class RankingLoss:
    """L = -Σ_ij W_ij log σ(s_i - s_j), with W of `lockstep.learning.numerics.preferences`."""

    outputs: ClassVar[tuple[str, ...]] = ("scores",)

    def __call__(self, xp: Any, outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        scores, weights = outputs["scores"], batch["preferences"]
        margins = scores[:, None] - scores[None, :]
        right = xp.astype(margins > 0, scores.dtype) + 0.5 * xp.astype(margins == 0, scores.dtype)
        loss = losses.weighted_sum(xp, losses.ranking_loss(xp, scores), weights)
        return loss, {"accuracy": losses.weighted_sum(xp, right, weights)}


class RewardModelling(Offline):
    produces = "reward_model"

    @dataclass(frozen=True)
    class Config:
        epochs: float = setting(1.0, "Passes over the comparisons. One: InstructGPT overfitted with more.", above=0)
        batch_size: int = setting(32, "Prompts per optimizer step, each with all its completions (InstructGPT: 64).", least=1)
        micro_batch_size: int | None = setting(None, "Prompts per forward and backward pass; null: the whole batch.", least=1)
        lengths: Lengths = setting(Lengths(), "Limits in tokens.")
        normalise: Literal["none", "bias", "gain_and_bias"] = setting(
            "bias", "bias: demonstrations average 0 (InstructGPT, N+); gain_and_bias: and have standard deviation 1."
        )
        heldout_examples: int = setting(128, "Comparisons measured before and after.", least=0)
        optimizer: OptimizerConfig = setting(OptimizerConfig(1e-3), "Adam, for the miniature (InstructGPT: 9e-6).")
        schedule: ScheduleConfig = setting(ScheduleConfig("cosine", 0, 1.0, 0.1), "InstructGPT's.")

    def __init__(self, config: Config, context: Context):
        super().__init__(config, context)
        self.examples = encoded_comparisons(context, "train", config.lengths)
        self.heldout = encoded_comparisons(context, "heldout", config.lengths, config.heldout_examples)
        self.most = max(len(ranks) for _, ranks in self.examples)
        self.model: ScalarModel = context.policy.scalar_model(scalar_head(context.policy.hidden_size, context.seed))
        self.learner = context.backend.learner({"reward_model": self.model}, {"reward_model": config.optimizer})
        self.total_steps = self.steps(config, len(self.examples))

    def terms(self, batch: Sequence[Ranked]) -> list[Term]:
        """Micro-batches of whole comparisons, so that no pair is split. Rows are padded to one of a few counts."""
        terms = []
        for part in chunks(len(batch), self.config.micro_batch_size):
            comparisons = batch[part]
            rows = self.block([row for rows, _ in comparisons for row in rows])
            most = (part.stop - part.start) * self.most
            rows = rows.pad_rows(min(round_up(rows.rows, max(2, most // 4)), most))
            share = len(comparisons) / len(batch)
            weights = share * numerics.preferences([ranks for _, ranks in comparisons], rows.rows)
            terms.append(Term(RankingLoss(), rows, {"preferences": weights}))
        return terms

    def block(self, examples: Sequence[Example]) -> Sequences:
        return encoding.block(examples, self.tokenizer, self.config.lengths)

    def logged(self, metrics: Metrics, terms: Sequence[Term]) -> Metrics:
        weight = float(sum(term.batch["preferences"].sum() for term in terms))  # below 1 if there are ties
        return metrics | {"loss": metrics["loss"] / weight, "accuracy": metrics["accuracy"] / weight}

    @property
    def trained(self) -> ScalarModel:
        return self.model

    def finish(self) -> Metrics:
        """Measure held-out accuracy and calibration of the raw score, then normalise it on the demonstrations."""
        self.model = self.learner.averaged("reward_model")
        metrics = super().finish()
        return metrics if self.config.normalise == "none" else metrics | self.normalise()

    def scores(self, model: ScalarModel, examples: Sequence[Example]) -> np.ndarray:
        size = (self.config.micro_batch_size or self.config.batch_size) * self.most
        evaluate = lambda part: model.evaluate(part, ["scores"])  # noqa: E731
        return in_chunks(evaluate, self.block(examples), size)["scores"]

    def measure(self, model: ScalarModel) -> Metrics:
        """Loss, pairwise accuracy, Brier score and expected calibration error."""
        if not self.heldout:
            return {}
        scores = self.scores(model, [row for rows, _ in self.heldout for row in rows])
        preferred = numerics.preferences([ranks for _, ranks in self.heldout], len(scores))
        margins = numerics.pair_margins(scores, preferred)
        return {
            "loss": float(np.average(np.logaddexp(0, -margins), weights=preferred[np.nonzero(preferred)])),
            "accuracy": numerics.ranking_accuracy(margins),
            "brier": numerics.brier_score(margins),
            "ece": numerics.expected_calibration_error(margins),
        }

    def normalise(self) -> Metrics:
        """Fold mean 0 (and standard deviation 1) over demonstrations into the head. Without demonstrations, the best completion
        of each comparison stands in."""
        try:
            demonstrations = self.context.data.demonstrations("train")[:NORMALISED_ON]
            fit = self.context.fit("train demonstrations")
            examples = encoding.encode_demonstrations(self.tokenizer, demonstrations, self.config.lengths, fit)
        except MissingData:
            examples = [rows[int(np.argmin(ranks))] for rows, ranks in self.examples[:NORMALISED_ON]]
        scores = self.scores(self.model, examples).astype(np.float64)
        if self.config.normalise == "gain_and_bias" and scores.std() == 0:
            raise DataError(f"All {len(scores)} demonstrations score {scores[0]:g}: no gain gives them variance 1.")
        gain = 1 / scores.std() if self.config.normalise == "gain_and_bias" else 1.0
        self.model.rescale(gain, -gain * scores.mean())
        return {"demonstrations/score_mean": float(scores.mean()), "demonstrations/score_std": float(scores.std())}

    @classmethod
    def traits(cls, config: Config) -> Traits:
        return Traits(data="comparisons")

    @classmethod
    def arithmetic(cls, config: Config, data: DataSource) -> str:
        comparisons, size = untied(data.comparisons("train")), config.batch_size
        completions = np.array([len(c.ranks) for c in comparisons])
        pairs = completions * (completions - 1) / 2
        return (
            f"{len(comparisons)} prompts x {config.epochs:g} epochs / {size} per step = "
            f"{cls.steps(config, len(comparisons))} steps; {completions.mean():.1f} completions and "
            f"{pairs.mean():.1f} pairs per prompt; micro-batches of {min(config.micro_batch_size or size, size)}"
        )

    def result(self) -> ScalarModel:
        """The model after `finish`: averaged if configured, and normalised."""
        return self.model


def encoded_comparisons(context: Context, split: str, lengths: Lengths, limit: int | None = None) -> list[Ranked]:
    """The first ``limit`` comparisons of a split with at least two completions that are not tied; empty if a split for evaluation
    has no comparisons.

    Raises:
      MissingData: the data have no comparisons to train on.
    """
    try:
        comparisons = context.data.comparisons(split)
    except MissingData:
        if split == "train":
            raise
        return []
    fit = context.fit(f"{split} comparisons")
    return encoding.encode_comparisons(context.tokenizer, untied(comparisons)[:limit], lengths, fit)


def untied(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons that prefer at least one completion to another.

    Raises:
      DataError: all comparisons are ties.
    """
    useful = [c for c in comparisons if len(set(c.ranks)) > 1]
    if comparisons and not useful:
        raise DataError(f"All {len(comparisons)} comparisons are ties: there is nothing to learn a reward from.")
    return useful
