"""`labeler=people`: labels from ``labels.jsonl`` beside a stage's candidates. `lockstep serve` writes it; any other tool may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.data.labels import LABELS, labels_in
from lockstep.errors import Waiting
from lockstep.interfaces import DataSource, Label, Labeler, Resources
from lockstep.storage.files import checksum
from lockstep.types import Candidates


class People(Labeler):
    """Waits for a file of labels: the run stops. Rerun the same command to resume once the file is there. Once read, the labels
    are the stage's result, whatever happens to the file later."""

    @dataclass(frozen=True)
    class Config:
        """No settings."""

    def __init__(self, config: Any, data: DataSource, resources: Resources):
        pass

    @classmethod
    def received(cls, folder: Path) -> str | None:
        return checksum(folder / LABELS) if (folder / LABELS).is_file() else None

    def label(self, candidates: Sequence[Candidates], seed: int, folder: Path) -> Sequence[Label]:
        if not (folder / LABELS).is_file():
            raise Waiting(f"{len(candidates)} prompts have no labels yet; they belong into {folder / LABELS}.")
        return labels_in(folder / LABELS, candidates)
