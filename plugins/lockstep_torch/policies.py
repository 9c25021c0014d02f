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
    SCALAR_BIAS,
    SCALAR_HEAD,
    Architecture,
    SmallDecoderConfig,
    check_labels,
    check_parameters,
    from_hf,
    initial_parameters,
    is_small_decoder,
    parameter_shapes,
    trunk_shapes,
)
from lockstep.models.checkpoint import CheckpointConfig, FromCheckpoint
from lockstep.storage import gguf
from lockstep.storage.files import read_json
from lockstep.storage.hub import hub
from lockstep.storage.weights import read_weights
from lockstep.text.tokenizer import Tokenizer
from lockstep_torch.classifier import TextClassifier
from lockstep_torch.decoder import DecoderNetwork, Network, ScalarHead, load_arrays
from lockstep_torch.device import TorchDevice
from lockstep_torch.lora import adapted, linear_layers
from lockstep_torch.model import LanguageModel, Scalar
from lockstep_torch.transformers_network import TransformersNetwork, config_of


class Decoder(LanguageModel):
    """A small modern decoder with fresh weights, the same in every backend."""

    Config = SmallDecoderConfig

    @classmethod
    def create(cls, config: SmallDecoderConfig, backend: TorchDevice, tokenizer: Tokenizer, seed: int) -> Decoder:
        architecture = config.architecture(tokenizer.vocab_size)
        network = DecoderNetwork(architecture)
        load_arrays(network, initial_parameters(architecture, seed))
        return cls(network, None, backend)

    @classmethod
    def load(cls, folder: Path, backend: TorchDevice) -> Decoder:
        architecture, weights = _architecture(folder), read_weights(folder)
        check_parameters(architecture, weights, parameter_shapes(architecture))
        network = DecoderNetwork(architecture)
        load_arrays(network, weights)
        return cls(network, None, backend)

    @classmethod
    def load_scalar(cls, folder: Path, backend: TorchDevice) -> ScalarModel:
        architecture, weights = _architecture(folder), read_weights(folder)
        weights.setdefault(SCALAR_BIAS, np.zeros(1, np.float32))  # transformers' classifiers have none
        d = architecture.hidden_size
        check_parameters(architecture, weights, trunk_shapes(architecture) | {SCALAR_HEAD: (1, d), SCALAR_BIAS: (1,)})
        head = ScalarHead(weights[SCALAR_HEAD][0], float(weights[SCALAR_BIAS][0]))
        network = DecoderNetwork(architecture)
        load_arrays(network.without_language_head(), weights)
        return Scalar(network, head, backend)


class HuggingFace(FromCheckpoint, LanguageModel):
    """Any causal language model of transformers, from a folder or the hub."""

    Config = CheckpointConfig

    @classmethod
    def opens(cls, folder: Path) -> bool:
        return (folder / "config.json").exists() and not adapters.is_adapter(folder)

    @classmethod
    def create(cls, config: CheckpointConfig, backend: TorchDevice, tokenizer: Tokenizer, seed: int) -> HuggingFace:
        return cls.load(config.path, backend)

    @classmethod
    def load(cls, folder: Path | str, backend: TorchDevice) -> HuggingFace:
        from transformers import AutoModelForCausalLM

        return cls(_open(AutoModelForCausalLM, folder), None, backend)

    @classmethod
    def load_scalar(cls, folder: Path | str, backend: TorchDevice) -> ScalarModel:
        from transformers import AutoModel

        weights = read_weights(Path(folder), [SCALAR_HEAD, SCALAR_BIAS])
        if SCALAR_HEAD not in weights:
            raise CheckpointError(f"{folder} has no reward model: {SCALAR_HEAD} is missing.")
        check_labels(folder, len(weights[SCALAR_HEAD]))
        head = ScalarHead(weights[SCALAR_HEAD][0], float(weights[SCALAR_BIAS][0]) if SCALAR_BIAS in weights else 0.0)
        return Scalar(_open(AutoModel, folder), head, backend)

    @classmethod
    def load_classifier(cls, folder: Path | str, backend: TorchDevice) -> Classifier:
        return TextClassifier.load(folder, backend)


class LoRA(FromCheckpoint, LanguageModel):
    """Low-rank adapters on a frozen checkpoint (Hu et al. 2021), by peft. All models of a run that adapt the same checkpoint
    share its weights: policy, reference, value network and reward model are adapters on one trunk."""

    Config = LoRAConfig

    @classmethod
    def opens(cls, folder: Path) -> bool:
        return adapters.is_adapter(folder)

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
        backend.trunks[path] = _open(AutoModelForCausalLM, path).to(backend.device)
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
            tensor.copy_(torch.tensor(arrays[name]))
    return model


def _open(auto: type, folder: Path | str) -> Network:
    """Opens safetensors only, without code from the checkpoint, in float32 and without dropout. This package's decoder runs
    models of Llama's shape, because its generation loop is leaner; transformers' own modules run all others.

    Raises:
      CheckpointError: transformers cannot open it.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()  # its table of unexpected keys names a scalar head that is loaded elsewhere
    logging.disable_progress_bar()
    folder = gguf.as_folder(folder)
    with hub(folder) as why:
        try:
            hf = auto.from_pretrained(folder, dtype="float32", use_safetensors=True, trust_remote_code=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"'{folder}' cannot be opened as a checkpoint: {why(error)}") from error
    if getattr(hf, "_hf_peft_config_loaded", False):  # transformers opens adapters too, and freezes everything
        raise CheckpointError(adapters.NOT_WHOLE.format(folder=folder))
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


def _architecture(folder: Path) -> Architecture:
    architecture = from_hf(read_json(Path(folder) / "config.json"))
    if not is_small_decoder(architecture):
        raise CheckpointError(
            f"{folder} holds a {architecture.family} model that is not a small decoder. Open it with policy=huggingface."
        )
    return architecture
