"""`labeler=scores`: ranks responses by a reward model's scores. With a judge as the reward model, this is RLAIF, reinforcement
learning from AI feedback (Bai et al. 2022, "Constitutional AI", arXiv 2212.08073; Lee et al. 2023, arXiv 2309.00267)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.config.schema import REQUIRED, setting
from lockstep.errors import DataError
from lockstep.interfaces import DataSource, Inputs, Label, Labeler, Resources
from lockstep.learning import numerics
from lockstep.learning.rollout import responses_of, scores_of
from lockstep.text.encoding import Lengths
from lockstep.types import Candidates


class Scores(Labeler):
    """Ranks by score, highest first. Candidates are left out if any of their completions could not be scored."""

    @dataclass(frozen=True)
    class Config:
        reward_model: Mapping[str, Any] = setting(REQUIRED, "The configuration of a reward model, with its name.")
        tie: float = setting(0.0, "Neighbours in the ranking are tied if their scores differ by at most this.", least=0)
        lengths: Lengths = setting(Lengths(), "Limits in tokens.")

    @classmethod
    def inputs(cls, config: Config) -> Inputs:
        return Inputs(members=(config.reward_model,))

    def __init__(self, config: Config, data: DataSource, resources: Resources):
        self.config, self.tokenizer = config, resources.tokenizer
        self.reward_model = resources.reward_model(config.reward_model)

    def label(self, candidates: Sequence[Candidates], seed: int, folder: Path) -> Sequence[Label]:
        """
        Raises:
          DataError: none of the candidates could be scored.
        """
        prompts = [each.prompt for each in candidates for _ in each.completions]
        texts = [text for each in candidates for text in each.completions]
        scores = scores_of(self.reward_model, responses_of(prompts, texts, self.tokenizer, self.config.lengths))
        parts = np.split(scores, np.cumsum([len(each.completions) for each in candidates])[:-1])
        name = str(self.config.reward_model["name"])
        labels = [
            Label(each.id, numerics.ranks(part, self.config.tie), name)
            for each, part in zip(candidates, parts, strict=True) if np.isfinite(part).all()
        ]  # fmt: skip
        if not labels:
            raise DataError(
                f"The reward model '{name}' scored none of the {len(candidates)} candidates. Look at its warnings above."
            )
        return labels
