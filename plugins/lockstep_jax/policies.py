"""The policies that a configuration can name: `decoder` starts from scratch, `huggingface` from a checkpoint, and `lora` trains
adapters on a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lockstep.interfaces import ScalarModel
from lockstep.models import adapters
from lockstep.models.adapters import Adapter, LoRAConfig
from lockstep.models.architecture import (
    SCALAR_BIAS,
    SCALAR_HEAD,
    Architecture,
    SmallDecoderConfig,
    family_of,
    initial_parameters,
    linear_layers,
)
from lockstep.models.blueprint import Blueprint
from lockstep.models.checkpoint import CheckpointConfig, FromCheckpoint, is_adapter, map_decoder, pad_id_of
from lockstep.text.tokenizer import Tokenizer
from lockstep_jax.device import JaxDevice
from lockstep_jax.model import LanguageModel, Scalar
from lockstep_jax.network import NetworkSpec, Tree
from lockstep_jax.parameters import from_arrays


class Checkpoint(LanguageModel):
    """The base of `Decoder` and `HuggingFace`, which loads a checkpoint from a folder."""

    @classmethod
    def load(cls, folder: Path | str, backend: JaxDevice) -> Checkpoint:
        architecture, weights = map_decoder(folder)
        return cls.from_arrays(architecture, weights, backend, language_head=True)

    @classmethod
    def load_scalar(cls, folder: Path | str, backend: JaxDevice) -> ScalarModel:
        architecture, weights = map_decoder(folder, scalar=True)
        model: Scalar = Scalar.from_arrays(architecture, weights, backend, language_head=False)
        model.pad_id = pad_id_of(folder)
        return model


class Decoder(Checkpoint):
    """A small modern decoder with fresh weights, the same in every backend."""

    Config = SmallDecoderConfig

    @classmethod
    def context(cls, config: SmallDecoderConfig) -> int:
        return config.context_length

    @classmethod
    def blueprint(cls, config: SmallDecoderConfig, vocab_size: int) -> Blueprint:
        return Blueprint(config.architecture(vocab_size))

    @classmethod
    def create(cls, config: SmallDecoderConfig, backend: JaxDevice, tokenizer: Tokenizer, seed: int) -> Decoder:
        architecture = config.architecture(tokenizer.vocab_size)
        return cls.from_arrays(architecture, initial_parameters(architecture, seed), backend, language_head=True)


class HuggingFace(FromCheckpoint, Checkpoint):
    """A Hugging Face checkpoint of one of `lockstep.models.architecture.FAMILIES`, from a folder or the hub."""

    Config = CheckpointConfig

    @classmethod
    def opens(cls, folder: Path) -> bool:
        return (folder / "config.json").exists() and not is_adapter(folder)

    @classmethod
    def create(cls, config: CheckpointConfig, backend: JaxDevice, tokenizer: Tokenizer, seed: int) -> HuggingFace:
        return cls.load(config.path, backend)


class LoRA(FromCheckpoint, LanguageModel):
    """Low-rank adapters on a frozen checkpoint (Hu et al. 2021). All models of a run that adapt the same checkpoint share its
    weights: policy, reference, value network and reward model are adapters on one trunk."""

    Config = LoRAConfig

    @classmethod
    def opens(cls, folder: Path) -> bool:
        return is_adapter(folder)

    @classmethod
    def create(cls, config: LoRAConfig, backend: JaxDevice, tokenizer: Tokenizer, seed: int) -> LoRA:
        architecture, trunk = _trunk(config.path, backend)
        adapter = config.adapter(linear_layers(architecture), conv1d=family_of(architecture).naming.transposed)
        shapes = adapter.shapes(linear_layers(architecture))
        return cls(*_adapted(architecture, trunk, adapter, adapters.initial(shapes, seed), backend, language_head=True))

    @classmethod
    def load(cls, folder: Path | str, backend: JaxDevice) -> LoRA:
        return cls(*_load_adapter(folder, backend, scalar=False))

    @classmethod
    def load_scalar(cls, folder: Path | str, backend: JaxDevice) -> ScalarModel:
        return Scalar(*_load_adapter(folder, backend, scalar=True))


def _trunk(path: str, backend: JaxDevice) -> tuple[Architecture, Tree]:
    """The checkpoint that adapters share. It is read once."""
    if path not in backend.trunks:
        architecture, weights = map_decoder(path)
        backend.trunks[path] = architecture, backend.put(from_arrays(architecture, weights))
    return backend.trunks[path]


def _load_adapter(folder: Path | str, backend: JaxDevice, *, scalar: bool) -> tuple[NetworkSpec, Tree, JaxDevice, Tree]:
    adapter, arrays = adapters.read(folder)
    architecture, trunk = _trunk(adapter.base, backend)
    shapes: dict[str, tuple[int, ...]] = {**adapter.shapes(linear_layers(architecture))}
    if scalar:
        arrays.setdefault(SCALAR_BIAS, np.zeros(1, np.float32))  # peft's classifiers have no bias
        shapes |= {SCALAR_HEAD: (1, architecture.hidden_size), SCALAR_BIAS: (1,)}
    adapters.check(folder, arrays, shapes)
    return _adapted(architecture, trunk, adapter, arrays, backend, language_head=not scalar)


def _adapted(
    architecture: Architecture, trunk: Tree, adapter: Adapter, arrays: dict[str, np.ndarray], backend: JaxDevice,
    *, language_head: bool,
) -> tuple[NetworkSpec, Tree, JaxDevice, Tree]:  # fmt: skip
    """The constructor's arguments for a model with a trained adapter and a frozen trunk."""
    spec = NetworkSpec.on(backend, architecture, language_head=language_head, scalar_head=SCALAR_HEAD in arrays, adapter=adapter)
    frozen = trunk if language_head else {name: part for name, part in trunk.items() if name != "lm_head"}
    return spec, backend.put(from_arrays(architecture, arrays)), backend, frozen
