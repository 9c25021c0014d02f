"""The policy that configurations name: `decoder`, which starts from scratch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lockstep.errors import CheckpointError
from lockstep.interfaces import ScalarModel
from lockstep.models.architecture import (
    SCALAR_BIAS,
    SCALAR_HEAD,
    Architecture,
    SmallDecoderConfig,
    check_parameters,
    from_hf,
    initial_parameters,
    is_small_decoder,
    parameter_shapes,
    trunk_shapes,
)
from lockstep.storage.files import read_json
from lockstep.storage.weights import read_weights
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
        architecture, weights = _architecture(folder), read_weights(folder)
        check_parameters(architecture, weights, parameter_shapes(architecture))
        return cls(architecture, weights)

    @classmethod
    def load_scalar(cls, folder: Path, backend: NumpyBackend) -> ScalarModel:
        architecture, weights = _architecture(folder), read_weights(folder)
        weights.setdefault(SCALAR_BIAS, np.zeros(1, np.float32))  # transformers' classifiers have none
        heads = {SCALAR_HEAD: (1, architecture.hidden_size), SCALAR_BIAS: (1,)}
        check_parameters(architecture, weights, trunk_shapes(architecture) | heads)
        return Scalar(architecture, weights)


def _architecture(folder: Path) -> Architecture:
    found = from_hf(read_json(Path(folder) / "config.json"))
    if not is_small_decoder(found):
        raise CheckpointError(f"{folder} holds a {found.family} model that is not a small decoder: backend=numpy opens no other.")
    return found
