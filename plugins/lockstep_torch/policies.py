"""The policies of a configuration: `decoder` starts from scratch, `huggingface` from a checkpoint, `lora` trains adapters on
one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.errors import CheckpointError
from lockstep.interfaces import Classifier, ScalarModel
from lockstep.models import adapters
from lockstep.models.adapters import LoRAConfig
from lockstep.models.architecture import (
    BUFFERS,
    SCALAR_BIAS,
    SCALAR_HEAD,
    Architecture,
    SmallDecoderConfig,
    from_hf,
    initial_parameters,
    is_small_decoder,
    refuse_tensors,
)
from lockstep.models.blueprint import Blueprint
from lockstep.models.checkpoint import Checkpoint, CheckpointConfig, FromCheckpoint, is_adapter, open_checkpoint, read_decoder
from lockstep.storage.weights import read_weights
from lockstep.text.tokenizer import Tokenizer
from lockstep_torch.classifier import TextClassifier
from lockstep_torch.decoder import DecoderNetwork, Network, ScalarHead, load_arrays
from lockstep_torch.device import TorchDevice
from lockstep_torch.lora import adapted, linear_layers
from lockstep_torch.mesh import fill
from lockstep_torch.model import LanguageModel, Scalar
from lockstep_torch.transformers_network import TransformersNetwork, config_of, load


class Decoder(LanguageModel):
    """A small modern decoder with fresh weights, the same in every backend."""

    Config = SmallDecoderConfig

    @classmethod
    def blueprint(cls, config: SmallDecoderConfig, vocab_size: int) -> Blueprint:
        return Blueprint(config.architecture(vocab_size))

    @classmethod
    def create(cls, config: SmallDecoderConfig, backend: TorchDevice, tokenizer: Tokenizer, seed: int) -> Decoder:
        architecture = config.architecture(tokenizer.vocab_size)
        network = DecoderNetwork(architecture)
        load_arrays(network, initial_parameters(architecture, seed))
        return cls(network, None, backend)

    @classmethod
    def load(cls, folder: Path, backend: TorchDevice) -> Decoder:
        architecture, weights = _read(folder, scalar=False)
        network = DecoderNetwork(architecture)
        load_arrays(network, weights)
        return cls(network, None, backend)

    @classmethod
    def load_scalar(cls, folder: Path, backend: TorchDevice) -> ScalarModel:
        architecture, weights = _read(folder, scalar=True)
        head = ScalarHead(weights[SCALAR_HEAD][0], float(weights[SCALAR_BIAS][0]))
        network = DecoderNetwork(architecture)
        load_arrays(network.without_language_head(), weights)
        return Scalar(network, head, backend)


class HuggingFace(FromCheckpoint, LanguageModel):
    """Any causal language model of transformers, from a folder or the hub."""

    Config = CheckpointConfig
    any_family = True

    @classmethod
    def opens(cls, folder: Path) -> bool:
        return (folder / "config.json").exists() and not is_adapter(folder)

    @classmethod
    def create(cls, config: CheckpointConfig, backend: TorchDevice, tokenizer: Tokenizer, seed: int) -> HuggingFace:
        return cls.load(config.path, backend)

    @classmethod
    def load(cls, folder: Path | str, backend: TorchDevice) -> HuggingFace:
        from transformers import AutoModelForCausalLM

        return cls(_open(AutoModelForCausalLM, open_checkpoint(folder, any_family=True)), None, backend)

    @classmethod
    def load_scalar(cls, folder: Path | str, backend: TorchDevice) -> ScalarModel:
        from transformers import AutoModel

        checkpoint = open_checkpoint(folder, scalar=True, any_family=True)
        weights = read_weights(checkpoint.folder, [SCALAR_HEAD, SCALAR_BIAS])
        head = ScalarHead(weights[SCALAR_HEAD][0], float(weights[SCALAR_BIAS][0]) if SCALAR_BIAS in weights else 0.0)
        return Scalar(_open(AutoModel, checkpoint), head, backend)

    @classmethod
    def load_classifier(cls, folder: Path | str, backend: TorchDevice) -> Classifier:
        return TextClassifier.load(folder, backend)


class LoRA(FromCheckpoint, LanguageModel):
    """Low-rank adapters on a frozen checkpoint (Hu et al. 2021), by peft. All models of a run that adapt the same checkpoint
    share its weights: policy, reference, value network and reward model are adapters on one trunk."""

    Config = LoRAConfig
    any_family = True

    @classmethod
    def opens(cls, folder: Path) -> bool:
        return is_adapter(folder)

    @classmethod
    def create(cls, config: LoRAConfig, backend: TorchDevice, tokenizer: Tokenizer, seed: int) -> LoRA:
        trunk = _trunk(config.path, backend)
        layers = linear_layers(trunk)
        conv1d = any(type(layer).__name__ == "Conv1D" for layer in layers.values())
        policy = cls(adapted(trunk, config.adapter(layers, conv1d=conv1d)), None, backend)
        shapes = {name: tuple(tensor.shape) for name, tensor in policy.tensors().items()}
        return _with(policy, adapters.initial(shapes, seed), config.path)

    @classmethod
    def load(cls, folder: Path | str, backend: TorchDevice) -> LoRA:
        adapter, arrays = adapters.read(folder)
        return _with(cls(adapted(_trunk(adapter.base, backend), adapter), None, backend), arrays, folder)

    @classmethod
    def load_scalar(cls, folder: Path | str, backend: TorchDevice) -> ScalarModel:
        adapter, arrays = adapters.read(folder)
        network = adapted(_trunk(adapter.base, backend), adapter).without_language_head()
        head = ScalarHead(np.zeros(network.hidden_size, np.float32))
        return _with(Scalar(network, head, backend), {SCALAR_BIAS: np.zeros(1, np.float32)} | arrays, folder)


def _trunk(path: str, backend: TorchDevice) -> Network:
    """The checkpoint that adapters share; read once."""
    from transformers import AutoModelForCausalLM

    if path not in backend.trunks:
        backend.trunks[path] = _open(AutoModelForCausalLM, open_checkpoint(path, any_family=True)).to(backend.device)
    return backend.trunks[path]


def _with(model: Any, arrays: dict[str, np.ndarray], source: Path | str) -> Any:
    """The model with these values of its trained parameters.

    Raises:
      CheckpointError: they do not match its adapter.
    """
    tensors = model.tensors()
    adapters.check(source, arrays, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    with torch.no_grad():
        for name, tensor in tensors.items():
            fill(tensor, arrays[name])
    return model


def _open(auto: type, checkpoint: Checkpoint) -> Network:
    """Opens safetensors only, without code from the checkpoint, in float32 and without dropout. This package's decoder runs
    models of Llama's shape, because its generation loop is leaner; transformers' own modules run all others.

    Raises:
      CheckpointError: transformers cannot open it, or would fill tensors with random numbers.
    """
    hf, info = load(auto, checkpoint.folder)
    unused = set[str]()
    if checkpoint.architecture is None:  # else its names have been checked
        heads = () if hf.base_model is not hf else ("score.", "lm_head.")  # a trunk has none
        unused = {name for name in info["unexpected_keys"] if not name.startswith(heads) and not BUFFERS.search(name)}
    refuse_tensors(checkpoint.folder, missing=info["missing_keys"], unused=unused, other=info["mismatched_keys"])
    return _lean(hf) or TransformersNetwork(hf.eval())


def _lean(hf: Any) -> DecoderNetwork | None:
    """The same model as a `DecoderNetwork`, if it has that shape."""
    config = config_of(hf)
    try:
        architecture = from_hf(config)
    except CheckpointError:
        return None
    if not is_small_decoder(architecture):
        return None
    network = DecoderNetwork(architecture, config)
    if hf.get_output_embeddings() is None:
        network.without_language_head()
    prefix = "model." if hf.base_model is hf else ""  # a bare trunk does not say that it is one
    network.load_state_dict({prefix + name: tensor for name, tensor in hf.named_parameters()})
    return network


def _read(folder: Path, *, scalar: bool) -> tuple[Architecture, dict[str, np.ndarray]]:
    """Architecture and float32 weights of a small decoder."""
    architecture, weights = read_decoder(folder, scalar=scalar)
    if not is_small_decoder(architecture):
        raise CheckpointError(
            f"{folder} holds a {architecture.family} model that is not a small decoder. Open it with policy=huggingface."
        )
    return architecture, weights
