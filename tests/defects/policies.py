"""Policies that are wrong on purpose."""

from __future__ import annotations

from defects import defect
from lockstep_torch.policies import Decoder


@defect("policy", caught_by="forwards_agree")
class Noisy(Decoder):
    """Dropout left on."""

    def forward(self, block, outputs, temperature, dropout=None):
        found = super().forward(block, outputs, temperature, dropout)
        return {name: value + value.new_empty(value.shape).normal_(std=1e-3) for name, value in found.items()}
