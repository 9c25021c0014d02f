"""The configuration of policies that start from a checkpoint, on every backend."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lockstep.config.schema import REQUIRED, setting
from lockstep.interfaces import Inputs
from lockstep.text.tokenizer import TokenizerConfig


@dataclass(frozen=True)
class CheckpointConfig:
    """The keys that these policies share."""

    path: str = setting(REQUIRED, "The checkpoint: a folder, a GGUF file or a hub id.")
    tokenizer: TokenizerConfig = setting(TokenizerConfig(), "Keys that are null take the checkpoint's own.")


class FromCheckpoint:
    """For a `lockstep.interfaces.Policy` whose ``Config`` has at least the keys of `CheckpointConfig`."""

    @classmethod
    def inputs(cls, config: Any) -> Inputs:
        return Inputs(files=tuple(path for path in (config.path, config.tokenizer.path) if path))

    @classmethod
    def tokenizer_config(cls, config: Any) -> TokenizerConfig:
        return dataclasses.replace(config.tokenizer, path=config.tokenizer.path or config.path)
