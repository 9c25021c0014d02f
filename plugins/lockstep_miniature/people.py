"""`labeler=miniature`: the simulated labelers of ``labelers.py`` rank policies' responses."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.config.schema import setting
from lockstep.errors import ConfigError, DataError, did_you_mean, listing, short
from lockstep.interfaces import DataSource, Label, Labeler, Resources
from lockstep.types import Candidates
from lockstep_miniature.dice import Dice
from lockstep_miniature.labelers import GROUPS, group_of, members, rank
from lockstep_miniature.source import Config as MiniatureConfig
from lockstep_miniature.source import Miniature
from lockstep_miniature.tasks import Task


class SimulatedLabelers(Labeler):
    """Has the responses to each prompt ranked by ``overlap`` different labelers drawn from the groups."""

    @dataclass(frozen=True)
    class Config:
        groups: tuple[str, ...] = setting(("training",), "Groups of labelers: training, heldout, brief, warm, impartial.")
        overlap: int = setting(1, "Labelers per prompt.", least=1)

        def __post_init__(self) -> None:
            if wrong := [group for group in self.groups if group not in GROUPS]:
                raise ConfigError(
                    f"labeler.groups has '{short(wrong[0])}', which is none.{did_you_mean(wrong[0], GROUPS)} "
                    f"All: {listing(GROUPS)}."
                )
            if self.overlap > (there := len(members(self.groups))):
                raise ConfigError(f"labeler.overlap={self.overlap} needs as many labelers; labeler.groups has {there}.")

    @classmethod
    def examples(cls, config: Any) -> tuple[DataSource, Sequence[Candidates]]:
        data = Miniature(MiniatureConfig())
        comparisons = [data.comparisons("train")[i] for i in range(8)]
        return data, [Candidates(f"{i:03d}", each.prompt, each.completions) for i, each in enumerate(comparisons)]

    def __init__(self, config: Any, data: DataSource, resources: Resources):
        if not isinstance(data, Miniature):
            raise ConfigError(
                f"labeler=miniature judges by the miniature's truth, and the data are {type(data).__name__}. "
                "Set labeler=people, or labeler=scores for a reward model."
            )
        self.config, self.world = config, data.world

    def label(self, candidates: Sequence[Candidates], seed: int, folder: Path) -> Sequence[Label]:
        labelers = members(self.config.groups)
        labels = []
        for each in candidates:
            number = int.from_bytes(hashlib.sha256(each.id.encode()).digest()[:6])
            dice, task = Dice(seed, "labels", number), Task.of(each.prompt)
            if task is None:
                raise DataError("labeler=miniature judges prompts of the miniature, and was given others.")
            for name in dice.sample(list(labelers), self.config.overlap):
                ranks = rank(labelers[name], self.world, task, each.completions, dice)
                labels.append(Label(each.id, ranks, name, group_of(name)))
        return labels
