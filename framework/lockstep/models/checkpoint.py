"""Policies that start from a checkpoint: what their configuration says, on every backend."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lockstep.interfaces import Inputs
from lockstep.text.tokenizer import TokenizerConfig


@dataclass(frozen=True)
class CheckpointConfig:
    """Args:
    path: of the checkpoint: a folder, a GGUF file or a hub id.
    tokenizer: a path of None is the checkpoint's own tokenizer.
    """

    tokenizer: TokenizerConfig
    path: str


class FromCheckpoint:
    """For a `lockstep.interfaces.Policy` whose ``Config`` has the keys of `CheckpointConfig`, and maybe more."""

    @classmethod
    def inputs(cls, config: Any) -> Inputs:
        return Inputs(files=tuple(path for path in (config.path, config.tokenizer.path) if path))

    @classmethod
    def tokenizer_config(cls, config: Any) -> TokenizerConfig:
        return dataclasses.replace(config.tokenizer, path=config.tokenizer.path or config.path)
