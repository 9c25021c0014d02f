"""A policy from rankings, without a reward model: DPO and its relatives, as one algorithm with a choice of losses.

One step (`Offline.step` in `lockstep.learning.offline`):

    h(y) = log π(y | x) - log π_ref(y | x), the sum (or mean) over the tokens of a completion
    one optimizer step on the mean over pairs y_w > y_l of loss(h(y_w), h(y_l)) (+ nll_coef · next-token loss of the best)

K ranked completions make C(K, 2) pairs of weight 1 / C(K, 2), as in reward modelling, or count as one ranking (Plackett-Luce).
The reference is the initial policy. Its log-probabilities are computed once, before training, so only KTO keeps a second model.

``conf/algorithm`` has a file for each method: dpo, ipo, hinge, simpo, orpo, kto.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError, DataError
from lockstep.interfaces import Context, DataSource, Learner, Metrics, Model, Policy, Term, Traits
from lockstep.learning import numerics
from lockstep.learning.offline import Offline
from lockstep.learning.optimisation import OptimizerConfig, ScheduleConfig
from lockstep.learning.randomness import example_indices
from lockstep.text import encoding
from lockstep.text.encoding import Example, Lengths
from lockstep.text.sequences import chunks
from lockstep_rlhf.algorithms.preference_losses import KTOLoss, PairLoss, PlackettLuceLoss, PreferenceLoss, preference_arrays
from lockstep_rlhf.algorithms.reward_modelling import encoded_comparisons, untied

WITHOUT_REFERENCE = ("simpo", "orpo")
READ_BY = {"label_smoothing": ("dpo", "robust"), "margin": ("simpo",), "desirable": ("kto",), "undesirable": ("kto",)}
"""The losses that read a setting; with any other loss, a setting that differs from its default is an error."""


@dataclass(frozen=True)
class Ranking:
    """The encoded completions of a prompt, the best first, and their ranks. ``ref`` [K] are log π_ref, summed over tokens."""

    rows: list[Example]
    ranks: np.ndarray
    ref: np.ndarray


class PreferenceOptimisation(Offline):
    produces = "policy"

    @dataclass(frozen=True)
    class Config:
        loss: Literal["dpo", "robust", "hinge", "ipo", "simpo", "orpo", "kto"] = setting("dpo", "See `PairLoss` and `KTOLoss`.")
        beta: float = setting(0.1, "β: the smaller it is, the farther the policy may move from the reference.", above=0)
        logprobs: Literal["sum", "mean"] = setting(
            "sum", "Sum or mean over a completion's tokens (DPO: sum; IPO, SimPO, ORPO: mean)."
        )
        label_smoothing: float = setting(0.0, "ε: the share of wrong labels, for dpo and robust.", least=0, below=0.5)
        margin: float = setting(1.375, "SimPO's γ.", least=0)
        nll_coef: float = setting(0.0, "Weight of the next-token loss of the best completion (ORPO: 1).", least=0)
        desirable: float = setting(1.0, "Weight of the best completion (KTO).", least=0)
        undesirable: float = setting(1.0, "Weight of the other completions (KTO).", least=0)
        ranking: Literal["pairs", "plackett_luce"] = setting("pairs", "K completions count as C(K, 2) pairs, or as one ranking.")
        epochs: float = setting(1.0, "Passes over the comparisons.", above=0)
        batch_size: int = setting(32, "Prompts per optimizer step, each with all its completions (DPO: 64).", least=1)
        micro_batch_size: int | None = setting(None, "Prompts per forward and backward pass; null: the whole batch.", least=1)
        lengths: Lengths = setting(Lengths(), "Limits in tokens.")
        heldout_examples: int = setting(128, "Comparisons measured before and after.", least=0)
        optimizer: OptimizerConfig = setting(OptimizerConfig(1e-4), "Adam, for the miniature (DPO: RMSprop at 1e-6).")
        schedule: ScheduleConfig = setting(ScheduleConfig("constant", 10, 0.1, 1.0), "Schedule of the learning rate.")

        def __post_init__(self):
            if self.ranking == "plackett_luce" and self.loss != "dpo":
                raise ConfigError(
                    f"algorithm.ranking=plackett_luce is a form of loss=dpo, not of loss={self.loss}. Set ranking=pairs."
                )
            for field in fields(self):
                readers = READ_BY.get(field.name, (self.loss,))
                if self.loss not in readers and getattr(self, field.name) != field.default:
                    raise ConfigError(
                        f"algorithm.{field.name} has no effect on loss={self.loss}. Set it to {field.default:g}, or loss to "
                        f"{' or '.join(readers)}."
                    )
            if self.loss == "kto" and self.batch_size < 2:
                raise ConfigError(
                    "algorithm.loss=kto estimates KL from other prompts' completions. Set batch_size to at least 2."
                )

        @property
        def needs_reference(self) -> bool:
            return self.loss not in WITHOUT_REFERENCE

        def make_loss(self) -> PreferenceLoss:
            shared: dict[str, Any] = {"beta": self.beta, "mean": self.logprobs == "mean", "nll_coef": self.nll_coef}
            if self.loss == "kto":
                return KTOLoss(desirable=self.desirable, undesirable=self.undesirable, **shared)
            if self.ranking == "plackett_luce":
                return PlackettLuceLoss(**shared)
            return PairLoss(kind=self.loss, smoothing=self.label_smoothing, margin=self.margin, **shared)

    def __init__(self, config: Config, context: Context):
        super().__init__(config, context)
        keep = config.loss == "kto"  # z needs the reference on pairs that change with every batch
        self.reference = context.policy
        self.policy: Policy = context.policy.copy() if keep else context.policy
        self.examples, self.heldout = self.load("train"), self.load("heldout", config.heldout_examples)
        self.most = max(len(ranking.rows) for ranking in self.examples)
        self.learner: Learner = context.backend.learner({"policy": self.policy}, {"policy": config.optimizer})
        self.loss = config.make_loss()
        self.total_steps = self.steps(config, len(self.examples))

    def load(self, split: str, limit: int | None = None) -> list[Ranking]:
        """Comparisons with at least two completions that are not tied, with the reference's log-probabilities. With less than one
        epoch, training does not read all comparisons; the others have NaN there. `measure` takes rows in the same order, so its h
        is exactly 0 while the policy is the reference."""
        encoded = encoded_comparisons(self.context, split, self.config.lengths, limit)
        if self.config.ranking == "plackett_luce" and (tied := sum(len(set(ranks)) < len(ranks) for _, ranks in encoded)):
            raise DataError(
                f"{tied} of {len(encoded)} {split} comparisons have ties, which a Plackett-Luce ranking cannot express. Set "
                "algorithm.ranking=pairs."
            )
        orders = [np.argsort(ranks, kind="stable") for _, ranks in encoded]
        rows = [examples[i] for (examples, _), order in zip(encoded, orders, strict=True) for i in order]
        ref = np.zeros(len(rows), np.float32)
        if self.config.needs_reference and rows:
            read = self.read(len(encoded)) if split == "train" else np.ones(len(encoded), bool)
            of_rows = np.repeat(read, [len(order) for order in orders])
            ref[~of_rows] = np.nan
            ref[of_rows] = self.logprobs(self.policy, [row for row, needed in zip(rows, of_rows, strict=True) if needed])
        rankings, place = [], 0
        for (_, ranks), order in zip(encoded, orders, strict=True):
            here = slice(place, place + len(order))
            rankings.append(Ranking(rows[here], np.asarray(ranks)[order], ref[here]))
            place += len(order)
        return rankings

    def read(self, comparisons: int) -> np.ndarray:
        """bool [comparisons]: True for those that training reads."""
        found = np.zeros(comparisons, bool)
        drawn = self.steps(self.config, comparisons) * self.config.batch_size
        found[example_indices(self.context.seed, "order", comparisons, 0, drawn)] = True
        return found

    # ------------------------------------------------------------------------------------------- the loss of a batch

    def terms(self, rankings: Sequence[Ranking]) -> list[Term]:
        """Micro-batches of whole rankings. Each prompt has ``most`` rows, so that only one shape is compiled."""
        z = self.mismatch(rankings) if self.config.loss == "kto" else None
        n, winners = len(rankings), sum(len(ranking.rows[0].response) for ranking in rankings)
        size = self.config.micro_batch_size or n
        terms = []
        for part in chunks(n, size):
            here = rankings[part]
            padding = size - len(here)
            terms.append(self.term([*here, *[rankings[part.start]] * padding], len(here), n, winners, z))
        return terms

    def term(self, rankings: Sequence[Ranking], real: int, n: int, winners: int, z: float | None) -> Term:
        """One micro-batch, of which only the first ``real`` rankings count. The whole batch has ``n`` prompts and ``winners``
        tokens of best completions."""
        k = self.most
        filled = [row for ranking in rankings for row in [*ranking.rows, *[ranking.rows[0]] * (k - len(ranking.rows))]]
        there = np.array([[p < real and i < len(r.rows) for i in range(k)] for p, r in enumerate(rankings)])
        ranks = np.array([[r.ranks[i] if i < len(r.rows) else 0 for i in range(k)] for r in rankings])
        rows = encoding.block(filled, self.tokenizer, self.config.lengths)
        rows.mask[:] &= there.reshape(-1)[:, None]
        counts = there.sum(axis=1)
        both = there[:, :, None] & there[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
        batch: dict[str, np.ndarray] = {
            "mask": rows.mask,
            "ref": _flat([ranking.ref for ranking in rankings], k),
            "lengths": np.maximum(rows.response_mask.sum(axis=1), 1).astype(np.float32),
        }
        batch |= preference_arrays(both / np.maximum(counts * (counts - 1) / 2, 1)[:, None, None] / n, there, n)
        batch |= self.loss.arrays(ranks, there, n)
        if self.loss.nll_coef:
            batch["nll_weights"] = encoding.token_weights(rows.mask & (batch["best"] > 0)[:, None], winners)
        if z is not None:
            batch["z"] = np.full(len(filled), z, np.float32)
        return Term(self.loss, rows, batch)

    def logged(self, metrics: Metrics, terms: Sequence[Term]) -> Metrics:
        weight = float(sum(term.batch["pairs"].sum() for term in terms))  # below 1 if there are ties
        of_pairs = ["preference/accuracy", "preference/margin"]
        if isinstance(self.loss, PairLoss):
            of_pairs.append("preference/loss")
        return metrics | {name: metrics[name] / weight for name in of_pairs}

    def mismatch(self, rankings: Sequence[Ranking]) -> float:
        """KTO's z: max(0, mean of log π - log π_ref) over completions under the *next* prompt of the batch, an estimate of KL
        without a gradient."""
        following = [*rankings[1:], rankings[0]]
        pairs = zip(rankings, following, strict=True)
        rows = [Example(other.rows[0].prompt, row.response) for ranking, other in pairs for row in ranking.rows]
        own, ref = (self.logprobs(model, rows) for model in (self.policy, self.reference))
        h = own - ref
        if self.config.logprobs == "mean":
            h = h / np.array([len(row.response) for row in rows])
        return max(0.0, float(h.mean(dtype=np.float64)))

    # --------------------------------------------------------------------------------------------------- the rest

    def logprobs(self, model: Model, examples: Sequence[Example]) -> np.ndarray:
        """float32 [R]: log-probabilities of the responses, summed over tokens."""
        size, found = 2 * (self.config.micro_batch_size or self.config.batch_size), []
        for part in chunks(len(examples), size):
            rows = encoding.block(examples[part], self.tokenizer, self.config.lengths)
            out = model.evaluate(rows.pad_rows(size), ["logprobs"])["logprobs"][: rows.rows]
            found.append(np.where(rows.mask, out, 0).sum(axis=1, dtype=np.float64))
        return np.concatenate(found).astype(np.float32)

    def measure(self, policy: Model) -> Metrics:
        """Accuracy and margin of the implicit rewards β h on held-out comparisons."""
        if not self.heldout:
            return {}
        rows = [row for ranking in self.heldout for row in ranking.rows]
        h = self.logprobs(policy, rows) - np.concatenate([ranking.ref for ranking in self.heldout])
        if self.loss.mean:
            h = h / np.array([len(row.response) for row in rows])
        preferred = numerics.preferences([tuple(ranking.ranks) for ranking in self.heldout], len(rows))
        margins = numerics.pair_margins(self.config.beta * h, preferred)
        return {"accuracy": numerics.ranking_accuracy(margins), "margin": float(margins.mean())}

    @property
    def trained(self) -> Policy:
        return self.policy

    @classmethod
    def traits(cls, config: Config) -> Traits:
        return Traits(data="comparisons", kl="loss" if config.needs_reference else "none")

    @classmethod
    def arithmetic(cls, config: Config, data: DataSource) -> str:
        comparisons, size = untied(data.comparisons("train")), config.batch_size
        completions = np.array([len(c.ranks) for c in comparisons])
        return (
            f"{len(comparisons)} prompts x {config.epochs:g} epochs / {size} per step = "
            f"{cls.steps(config, len(comparisons))} steps; {completions.mean():.1f} completions per prompt; "
            f"micro-batches of {min(config.micro_batch_size or size, size)}"
        )

    def result(self) -> Model:
        return self.learner.averaged("policy")


def _flat(parts: Sequence[np.ndarray], k: int) -> np.ndarray:
    """[K_n] each -> float32 [N · k], padded with zeros."""
    out = np.zeros((len(parts), k), np.float32)
    for row, part in enumerate(parts):
        out[row, : len(part)] = part
    return out.reshape(-1)
