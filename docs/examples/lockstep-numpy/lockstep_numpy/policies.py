"""The policy that configurations name: `decoder`, which starts from scratch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lockstep.errors import CheckpointError
from lockstep.interfaces import ScalarModel
from lockstep.models.architecture import Architecture, SmallDecoderConfig, initial_parameters, is_small_decoder
from lockstep.models.checkpoint import read_decoder
from lockstep.text.tokenizer import Tokenizer
from lockstep_numpy.backend import NumpyBackend
from lockstep_numpy.model import LanguageModel, Scalar


class Decoder(LanguageModel):
    """A small modern decoder with fresh weights, the same in every backend."""

    Config = SmallDecoderConfig

    @classmethod
    def create(cls, config: SmallDecoderConfig, backend: NumpyBackend, tokenizer: Tokenizer, seed: int) -> Decoder:
        architecture = config.architecture(tokenizer.vocab_size)
        return cls(architecture, initial_parameters(architecture, seed))

    @classmethod
    def load(cls, folder: Path, backend: NumpyBackend) -> Decoder:
        return cls(*_read(folder, scalar=False))

    @classmethod
    def load_scalar(cls, folder: Path, backend: NumpyBackend) -> ScalarModel:
        return Scalar(*_read(folder, scalar=True))


def _read(folder: Path, *, scalar: bool) -> tuple[Architecture, dict[str, np.ndarray]]:
    found, weights = read_decoder(folder, scalar=scalar)
    if not is_small_decoder(found):
        raise CheckpointError(f"{folder} holds a {found.family} model that is not a small decoder: backend=numpy opens no other.")
    return found, weights
