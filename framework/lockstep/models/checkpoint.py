"""Policies that start from a checkpoint: what their configuration says, on every backend."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lockstep.config.schema import REQUIRED, setting
from lockstep.interfaces import Inputs
from lockstep.text.tokenizer import TokenizerConfig


@dataclass(frozen=True)
class CheckpointConfig:
    """The keys that they share."""

    path: str = setting(REQUIRED, "The checkpoint: a folder, a GGUF file or a hub id.")
    tokenizer: TokenizerConfig = setting(TokenizerConfig(), "Null in it: the checkpoint's own.")


class FromCheckpoint:
    """For a `lockstep.interfaces.Policy` whose ``Config`` has the keys of `CheckpointConfig`, and maybe more."""

    @classmethod
    def inputs(cls, config: Any) -> Inputs:
        return Inputs(files=tuple(path for path in (config.path, config.tokenizer.path) if path))

    @classmethod
    def tokenizer_config(cls, config: Any) -> TokenizerConfig:
        return dataclasses.replace(config.tokenizer, path=config.tokenizer.path or config.path)
