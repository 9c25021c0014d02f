"""Several reward models as one (Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization", arXiv
2310.02743). Scores on which the members disagree are unreliable, and a policy that seeks high scores finds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError
from lockstep.interfaces import Inputs, Resources, Responses, RewardModel, ScalarModel


class Ensemble(RewardModel):
    """Combines the scores r_1 .. r_K of K members, with mean μ and standard deviation σ (divisor K):

    | | | |
    |---|---|---|
    | mean | μ | |
    | worst | min r_k | worst-case optimisation (WCO) |
    | uncertainty_weighted | μ - coef · σ² | uncertainty-weighted optimisation (UWO) |
    | lower_bound | μ - coef · σ | a lower confidence bound, in the scores' own unit |

    A response has no score if any member could not score it. Normalise the members alike: with ``normalise: bias`` each scores
    demonstrations 0 on average. `details` has σ as ``disagreement``. A value network starts from the first member's network.
    """

    @dataclass(frozen=True)
    class Config:
        members: tuple[Mapping[str, Any], ...] = setting(
            tuple({"name": "learned", "source": f"reward_{i}", "micro_batch_size": 64, "chat_template": None} for i in range(3)),
            "Configurations of reward models, each with its name.",
        )
        combine: Literal["mean", "worst", "uncertainty_weighted", "lower_bound"] = setting("lower_bound", "See the table.")
        coef: float = setting(1.0, "For lower_bound and uncertainty_weighted; below 0 it would reward disagreement.", least=0)

        def __post_init__(self):
            if len(self.members) < 2:
                raise ConfigError(f"reward_model.members has {len(self.members)}: an ensemble needs two or more reward models.")

    @classmethod
    def inputs(cls, config: Config) -> Inputs:
        return Inputs(members=config.members)

    def __init__(self, config: Config, resources: Resources):
        self.config = config
        self.members = [resources.reward_model(group) for group in config.members]
        self.needs_environment = any(member.needs_environment for member in self.members)
        self._details: dict[str, np.ndarray] = {}

    def score(self, responses: Responses) -> np.ndarray:
        scores = np.stack([member.score(responses) for member in self.members]).astype(np.float64)
        self._details = {"disagreement": scores.std(axis=0).astype(np.float32)}
        return combine(scores, self.config.combine, self.config.coef).astype(np.float32)

    def details(self) -> dict[str, np.ndarray]:
        return self._details

    def value_network(self) -> ScalarModel | None:
        return self.members[0].value_network()


def combine(scores: np.ndarray, how: str, coef: float) -> np.ndarray:
    """[K, B] -> [B], NaN where any member's score is. Section 3.2 of Coste et al. 2023, and the bound in standard deviations."""
    mean = scores.mean(axis=0)
    if how == "worst":
        return scores.min(axis=0)
    if how == "uncertainty_weighted":
        return mean - coef * scores.var(axis=0)
    if how == "lower_bound":
        return mean - coef * scores.std(axis=0)
    return mean
