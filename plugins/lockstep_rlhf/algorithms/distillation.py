"""On-policy distillation: the student samples, and a teacher grades each sampled token by its own distribution.

One iteration (`Distillation.step`):

    sample responses; log-probabilities of student and teacher
    for each inner epoch, for each minibatch: one optimizer step on the mean over tokens of
        policy_gradient   -ρ A, A = log π_teacher - log π_old of the sampled token: the reverse KL, a token at a time, discount 0
        divergence        D_β(teacher, student) of the token's whole distribution, exact

The first loss is Thinking Machines' ("On-policy distillation", 2025). It needs only the teacher's log-probabilities of sampled
tokens. The advantage is a constant to the gradient: differentiating log π - log π_teacher of sampled tokens itself would give an
expected gradient of 0. Compared with MiniLLM (Gu et al. 2024, arXiv 2306.08543), the gradient keeps each token's own term and
leaves out its effect on later tokens. The second loss is GKD (Agarwal et al. 2024, arXiv 2306.13649) on the student's samples
alone; its β is that of `lockstep.learning.losses.divergence`. Neither loss differentiates the sampling.

The teacher reads the student's tokens, so both have the same vocabulary. No reward model is needed; if the stage has one, its
scores are logged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError
from lockstep.interfaces import Array, Context, Inputs, Metrics, Policy, Traits
from lockstep.learning import losses
from lockstep.learning.online import Clock, Corrected, CorrectedConfig, Rollout
from lockstep_rlhf.algorithms.policy_gradient import PolicyGradientLoss


@dataclass(frozen=True)
class DivergenceLoss:
    """coef Σ w_t D_t, with D of `lockstep.learning.losses.divergence`."""

    coef: float
    outputs: ClassVar[tuple[str, ...]] = ("divergence",)

    def __call__(self, xp: Any, outputs: Mapping[str, Array], batch: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        mean = losses.weighted_sum(xp, outputs["divergence"], batch["policy_weights"])
        return self.coef * mean, {"teacher/divergence": mean}


class Distillation(Corrected):
    needs_reward_model = False

    @dataclass(frozen=True)
    class Config(CorrectedConfig):
        teacher: str = setting("teacher", "The policy to learn from: a stage, or a folder or hub id.")
        loss: Literal["policy_gradient", "divergence"] = setting(
            "policy_gradient", "Reverse KL of the sampled tokens; or a divergence over the whole vocabulary."
        )
        beta: float = setting(1.0, "β of the divergence: 1 reverse KL, 0 forward KL, between them a JSD.", least=0, most=1)
        kl_coef: float = setting(1.0, "Cost per nat of divergence from the teacher.", above=0)
        unfinished_score: float | None = setting(None, "Must stay null: no scores are used.", least=-math.inf)

        def __post_init__(self):
            super().__post_init__()
            if self.loss == "policy_gradient" and self.beta != 1:
                raise ConfigError(
                    f"algorithm.beta={self.beta:g} needs the whole distribution: loss=policy_gradient is the reverse KL. Set "
                    "loss=divergence, or beta=1."
                )
            if self.unfinished_score is not None:
                raise ConfigError("algorithm.unfinished_score has no effect on distillation: it uses no scores. Set it to null.")

    @classmethod
    def inputs(cls, config: Config) -> Inputs:
        return Inputs(outputs={config.teacher: "policy"})

    def __init__(self, config: Config, context: Context):
        if context.resources is None:
            raise ConfigError("Distillation opens its teacher through Context.resources, and there are none.")
        self.teacher, tokenizer = context.resources.policy(config.teacher)
        if tokenizer.core.to_str() != context.tokenizer.core.to_str() or self.teacher.vocab_size < context.policy.vocab_size:
            raise ConfigError(
                f"The teacher '{config.teacher}' has another vocabulary than the policy, so it cannot read the policy's tokens. "
                "Choose a teacher with the same tokenizer, or train on its answers: algorithm=sft."
            )
        super().__init__(config, context)
        config.lengths.check(self.teacher.context_length)
        if config.loss == "divergence":
            self.loss, self.outputs = DivergenceLoss(config.kl_coef), (*self.outputs, "divergence")
        else:
            self.loss = PolicyGradientLoss("none", 0, 1, dual=None, sequence=False, kl=None, kl_coef=0.0)

    @classmethod
    def traits(cls, config: Config) -> Traits:
        return replace(super().traits(config), kl="none")

    def reference(self) -> Policy | None:
        return self.teacher if self.config.loss == "policy_gradient" else None

    def trained_policy(self) -> Policy:
        c = self.config
        return self.context.policy.toward(self.teacher, c.beta) if c.loss == "divergence" else super().trained_policy()

    # ------------------------------------------------------------------------------------------- the algorithm box

    def step(self, step: int) -> Metrics:
        clock = Clock()
        rollout = self.last = self.rollout(step, clock)
        metrics = self.objective(rollout)
        trained = self.train(step, rollout.sequences, self.prepare(rollout), rollout.forward)
        clock.lap("train")
        return metrics | trained | self.perf(rollout, clock)

    def prepare(self, rollout: Rollout) -> dict[str, np.ndarray]:
        """The arrays that the loss reads."""
        mask = rollout.sequences.mask
        batch = {"mask": mask, "correction": np.where(mask, self.correction(rollout), 0).astype(np.float32)}
        if self.config.loss == "divergence":
            return batch
        old = np.where(mask, rollout.old_logprobs, 0).astype(np.float32)
        return batch | {"old_logprobs": old, "advantages": -self.config.kl_coef * rollout.kl}

    def objective(self, rollout: Rollout) -> Metrics:
        """The metrics of the rollout. KL is to the teacher, so it is not named like KL to a reference."""
        renamed = {"objective/kl": "teacher/kl", "objective/k3": "teacher/k3"}
        return {renamed.get(name, name): value for name, value in super().objective(rollout).items()}
