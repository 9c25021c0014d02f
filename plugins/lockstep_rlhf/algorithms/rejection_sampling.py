"""Rejection-sampling fine-tuning: RAFT (Dong et al. 2023, arXiv 2304.06767), best-of-k distilled, expert iteration.

One iteration (`RejectionSampling.step`):

    sample k responses to each prompt; reward of a response: its score - β KL
    keep the best of each prompt, if its reward is above the threshold
    for each inner epoch, for each minibatch: one optimizer step on the next-token loss of what was kept; none if nothing was

Every iteration samples new responses from the current policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lockstep.config.schema import setting
from lockstep.interfaces import Context, Metrics
from lockstep.learning.online import Clock, Online, OnlineConfig, Rollout
from lockstep_rlhf.algorithms.language_modelling import NextTokenLoss


class RejectionSampling(Online):
    @dataclass(frozen=True)
    class Config(OnlineConfig):
        batch_size: int = setting(16, "Prompts per iteration.", least=1)
        samples: int = setting(8, "k: responses per prompt, of which the best is kept (RAFT: 32).", least=2)
        kl_coef: float | None = setting(
            None, "β: cost per nat of KL, subtracted from scores; 0: KL is only measured; null: no reference.", least=0
        )
        threshold: float | None = setting(
            None, "The best is kept only if its reward is above this: 0.5, for rewards of 0 and 1; null: always.", least=-math.inf
        )

        @property
        def trained(self) -> int:
            """The rows of an inner pass: one per prompt."""
            return self.batch_size

    def __init__(self, config: Config, context: Context):
        super().__init__(config, context)
        self.loss = NextTokenLoss()

    def step(self, step: int) -> Metrics:
        clock = Clock()
        rollout = self.last = self.rollout(step, clock)
        rows, kept, metrics = self.best(rollout)
        best = rollout.sequences.take(rows)
        batch = {"mask": best.mask & kept[rows][:, None]}
        trained = self.train(step, best, batch)
        clock.lap("train")
        return metrics | trained | self.perf(rollout, clock)

    def best(self, rollout: Rollout) -> tuple[np.ndarray, np.ndarray, Metrics]:
        """The row of each prompt's best response (the first of equals); bool [B], True for rows that are kept; and metrics."""
        k, beta = self.config.samples, self.config.kl_coef or 0.0
        rewards = self.scores(rollout) - beta * rollout.kl.sum(axis=1)
        scores = np.where(rollout.counted, rewards, -np.inf)
        rows = np.argmax(scores.reshape(-1, k), axis=1) + np.arange(len(scores) // k) * k
        lowest = -np.inf if self.config.threshold is None else self.config.threshold
        kept = np.zeros(len(scores), bool)
        kept[rows] = scores[rows] > lowest
        scored = np.isfinite(scores[rows])
        tied = scored & ((scores.reshape(-1, k) == scores[rows][:, None]).sum(axis=1) > 1)
        metrics = self.objective(rollout) | {
            "best/score": float(rollout.scores[kept].mean()) if kept.any() else float("nan"),
            "best/kept": float(kept[rows].mean()),
            "best/tied": float(tied.mean()),
        }
        if self.config.kl_coef is not None:
            metrics |= {"objective/reward": float(rewards[rollout.counted].mean()), "kl_coef": beta}
        return rows, kept, metrics
