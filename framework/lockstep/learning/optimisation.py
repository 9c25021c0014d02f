"""Optimizer settings and learning-rate schedules: plain numbers on the host, the same for every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lockstep.errors import ConfigError


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019) on matrices.

    ``tf_style`` puts epsilon where TensorFlow 1 has it, as lm-human-preferences did: eps / sqrt(1 - beta2^t) instead of
    eps beside the bias-corrected root. At a gradient of 1e-5 and beta2 = 0.999 the first step differs 16-fold (Huang et
    al. 2023); at 0.95, 2.7-fold.
    ``ema_decay`` keeps a moving average of the weights (InstructGPT: 0.992); null keeps none.
    ``max_grad_norm`` clips this model's gradient by its global norm; null does not clip.
    """

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    tf_style: bool
    weight_decay: float
    max_grad_norm: float | None
    ema_decay: float | None

    def eps_at(self, step: int) -> float:
        """Epsilon of the PyTorch form m / (sqrt(v) + eps) at optimizer step ``step`` = 1, 2, ..."""
        return self.eps / math.sqrt(1 - self.betas[1] ** step) if self.tf_style else self.eps


@dataclass(frozen=True)
class ScheduleConfig:
    """``shape``: constant, linear (to ``final``) or cosine (to ``final``), after ``warmup_steps`` from ``initial``.

    ``initial`` and ``final`` are fractions of the peak. InstructGPT: SFT and RM cosine to 0.1 without warm-up; PPO
    constant after 10 iterations from 0.1. lm-human-preferences and N+: linear to 0.
    """

    shape: str
    warmup_steps: int
    initial: float
    final: float

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(f"schedule.shape='{self.shape}' is not one of {', '.join(SHAPES)}.")


SHAPES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda progress, final: 1.0,
    "linear": lambda progress, final: 1 + (final - 1) * progress,
    "cosine": lambda progress, final: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)),
}


def lr_scale(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """The factor on the peak learning rate for step 0 .. total_steps - 1."""
    if step < schedule.warmup_steps:
        return schedule.initial + (1 - schedule.initial) * step / schedule.warmup_steps
    decaying = max(1, total_steps - schedule.warmup_steps)
    return SHAPES[schedule.shape]((step - schedule.warmup_steps) / decaying, schedule.final)
