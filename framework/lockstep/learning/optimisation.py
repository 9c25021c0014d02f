"""Optimizer settings and learning-rate schedules: plain numbers on the host, the same for every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lockstep.config.schema import setting
from lockstep.errors import ConfigError


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019) on matrices.

    ``tf_style`` puts epsilon where TensorFlow 1 does, as lm-human-preferences did: eps / sqrt(1 - beta2^t) instead of
    eps beside the bias-corrected root. At a gradient of 1e-5 and beta2 = 0.999 the first step differs 16-fold (Huang et
    al. 2023); at 0.95, 2.7-fold.
    """

    learning_rate: float = setting(3e-4, "Peak step size, which the schedule scales; each algorithm sets its own.", above=0)
    betas: tuple[float, float] = setting((0.9, 0.95), "Decay of both moments, per step (InstructGPT's).", least=0, below=1)
    eps: float = setting(1e-8, "Added to the root of the second moment (Adam's paper).", above=0)
    tf_style: bool = setting(False, "Epsilon where TensorFlow 1 has it (lm-human-preferences).")
    weight_decay: float = setting(0.0, "Decay of matrices per step, times the learning rate. PyTorch's AdamW: 0.01.", least=0)
    max_grad_norm: float | None = setting(1.0, "L2 norm to which this model's gradient is clipped; null: not clipped.", above=0)
    ema_decay: float | None = setting(
        None, "Decay per step of a moving average of the weights (InstructGPT: 0.992); null: none is kept.", least=0, below=1
    )

    def __post_init__(self) -> None:
        if self.learning_rate * self.weight_decay >= 1:
            raise ConfigError(
                f"optimizer.weight_decay={self.weight_decay:g} takes away {self.learning_rate * self.weight_decay:g} of each "
                f"weight per step at learning_rate={self.learning_rate:g}; it must be less than all. Lower one of them."
            )

    def eps_at(self, step: int) -> float:
        """Epsilon of the PyTorch form m / (sqrt(v) + eps) at optimizer step ``step`` = 1, 2, ..."""
        return self.eps / math.sqrt(1 - self.betas[1] ** step) if self.tf_style else self.eps


@dataclass(frozen=True)
class ScheduleConfig:
    """A learning-rate schedule: a linear warm-up, then a decay.

    InstructGPT: SFT and RM have cosine to 0.1 without warm-up; PPO is constant after 10 iterations of warm-up from 0.1.
    lm-human-preferences and N+: linear to 0.
    """

    shape: Literal["constant", "linear", "cosine"] = setting("constant", "Shape of the decay after the warm-up.")
    warmup_steps: int = setting(0, "Steps (PPO: iterations) from `initial` to the peak, linear.", least=0)
    initial: float = setting(1.0, "Where the warm-up begins, as a fraction of the peak.", least=0, most=1)
    final: float = setting(1.0, "Where linear and cosine end, as a fraction of the peak.", least=0, most=1)


SHAPES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda progress, final: 1.0,
    "linear": lambda progress, final: 1 + (final - 1) * progress,
    "cosine": lambda progress, final: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)),
}


def lr_scale(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """The factor on the peak learning rate at ``step``, one of 0 .. total_steps - 1."""
    if step < schedule.warmup_steps:
        return schedule.initial + (1 - schedule.initial) * step / schedule.warmup_steps
    decaying = max(1, total_steps - schedule.warmup_steps)
    return SHAPES[schedule.shape]((step - schedule.warmup_steps) / decaying, schedule.final)
