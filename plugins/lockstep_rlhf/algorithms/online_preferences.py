"""Preference optimisation on the policy's own samples: online DPO and its relatives (Guo et al. 2024, arXiv 2402.04792).

One iteration (`OnlinePreferences.step`):

    sample k responses to each prompt; reward of a response: its score - kl_coef KL
    pairs of a prompt: the best response against the worst, or every response against every worse one; no pair of equals
    for each inner epoch, for each minibatch of prompts: one optimizer step on the mean over pairs of loss(h(y_w), h(y_l)),
        h(y) = log π(y | x) - log π_ref(y | x); none if the whole batch has no pair

The labels come from a reward model; Guo et al. ask a language model. The reference is the policy that the stage starts from. To
renew the reference (iterated DPO: Xu et al. 2023, arXiv 2312.16682), make each round a stage that starts from the result of the
previous one; ``docs/algorithms.md`` has the configuration. A resumed stage then finds the same reference again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from lockstep.config.schema import setting
from lockstep.interfaces import Context, ForwardPass, Metrics, Term, Traits
from lockstep.learning.online import Clock, Online, OnlineConfig, Rollout
from lockstep.text.sequences import Sequences, chunks
from lockstep_rlhf.algorithms.preference_losses import PairLoss, preference_arrays


class OnlinePreferences(Online):
    @dataclass(frozen=True)
    class Config(OnlineConfig):
        batch_size: int = setting(32, "Prompts per iteration.", least=1)
        samples: int = setting(2, "k: responses per prompt (Guo et al.: 2).", least=2)
        micro_batch_size: int | None = setting(None, "Prompts per forward and backward pass; null: the whole minibatch.", least=1)
        loss: Literal["dpo", "hinge", "ipo"] = setting("dpo", "See `PairLoss`.")
        beta: float = setting(0.1, "β: the smaller it is, the farther the policy may move from the reference.", above=0)
        logprobs: Literal["sum", "mean"] = setting("sum", "Sum or mean over a response's tokens.")
        pairs: Literal["best_worst", "all"] = setting("best_worst", "Which of a prompt's responses are compared.")
        kl_coef: float = setting(0.0, "Cost per nat of KL, subtracted from scores before responses are compared.", least=0)

        @property
        def trained(self) -> int:
            """The prompts of an iteration: minibatches consist of prompts."""
            return self.batch_size

        @property
        def compared(self) -> int:
            """The number of responses to a prompt that are trained on."""
            return 2 if self.pairs == "best_worst" else self.samples

    def __init__(self, config: Config, context: Context):
        super().__init__(config, context)
        self.loss = PairLoss(kind=config.loss, beta=config.beta, mean=config.logprobs == "mean")

    # ------------------------------------------------------------------------------------------- the algorithm box

    def step(self, step: int) -> Metrics:
        clock = Clock()
        rollout = self.last = self.rollout(step, clock)
        rows, batch, metrics = self.prepare(rollout)
        trained = self.train(step, rollout.sequences.take(rows), batch)
        clock.lap("train")
        return metrics | trained | self.perf(rollout, clock)

    def prepare(self, rollout: Rollout) -> tuple[np.ndarray, dict[str, np.ndarray], Metrics]:
        """The rows to compare (``compared`` neighbours per prompt), the arrays of the loss (prompts [N] first), and metrics."""
        c, k, mask = self.config, self.config.samples, rollout.sequences.mask
        rewards = self.scores(rollout) - c.kl_coef * rollout.kl.sum(axis=1)
        pairs = self.pairs(rewards.reshape(-1, k), rollout.counted.reshape(-1, k))
        used = np.any(pairs > 0, axis=1) | np.any(pairs > 0, axis=2)
        informative = np.any(used, axis=1)
        chosen = np.sort(np.argsort(~used, axis=1, kind="stable")[:, : c.compared], axis=1)
        rows = chosen + np.arange(len(chosen))[:, None] * k
        ref = np.where(mask, 0 if rollout.ref_logprobs is None else rollout.ref_logprobs, 0).sum(axis=1, dtype=np.float64)
        batch = {
            "pairs": pairs[np.arange(len(rows))[:, None, None], chosen[:, :, None], chosen[:, None, :]],
            "ref": ref.astype(np.float32)[rows],
            "lengths": np.maximum(mask.sum(axis=1), 1).astype(np.float32)[rows],
        }
        gaps = np.where(pairs > 0, rewards.reshape(-1, k, 1) - rewards.reshape(-1, 1, k), 0)
        metrics = self.objective(rollout) | {
            "pairs/share": float(informative.mean()),
            "pairs/gap": float(gaps.max(axis=(1, 2)).mean()),
        }
        return rows.reshape(-1), batch, metrics

    def pairs(self, rewards: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """float [N, K, K] from rewards [N, K]: the weight of preferring response i of a prompt to response j, relative to the
        prompt's other pairs; 0 between equal rewards and where a response does not count. Override this for a method of your own;
        it may use at most ``compared`` responses of a prompt."""
        better = counted[:, :, None] & counted[:, None, :] & (rewards[:, :, None] > rewards[:, None, :])
        if self.config.pairs == "all":
            return better.astype(np.float64)
        best = np.argmax(np.where(counted, rewards, -np.inf), axis=1)
        worst = np.argmin(np.where(counted, rewards, np.inf), axis=1)
        place = np.arange(rewards.shape[1])
        extremes = (place == best[:, None])[:, :, None] & (place == worst[:, None])[:, None, :]
        return (better & extremes).astype(np.float64)

    def counted(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """bool [N]: True for the prompts with pairs."""
        found: np.ndarray = np.any(batch["pairs"] > 0, axis=(1, 2))
        return found

    @classmethod
    def traits(cls, config: Config) -> Traits:
        return replace(super().traits(config), kl="loss")

    def terms(
        self, sequences: Sequences, batch: Mapping[str, np.ndarray], rows: np.ndarray, forward: ForwardPass | None = None
    ) -> list[Term]:
        """The minibatch of the prompts ``rows`` and their responses, as micro-batches. All prompts with pairs weigh the same."""
        k, terms = self.config.compared, []
        weights = batch["pairs"][rows]
        sums = weights.sum(axis=(1, 2), keepdims=True)
        prompts = max(1, int((sums > 0).sum()))
        weights = weights / np.where(sums > 0, sums, 1) / prompts
        for part in chunks(len(rows), self.config.micro_batch_size):
            here = rows[part]
            block = sequences.take((here[:, None] * k + np.arange(k)).reshape(-1))
            arrays: dict[str, Any] = {name: batch[name][here].reshape(-1) for name in ("ref", "lengths")} | {"mask": block.mask}
            arrays |= preference_arrays(weights[part], np.ones((len(here), k), bool), prompts)
            terms.append(Term(self.loss, block, arrays, self.config.temperature))
        return terms
