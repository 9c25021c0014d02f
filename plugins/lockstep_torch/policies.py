"""The policies that a configuration can name: `decoder` starts from scratch, `huggingface` from a checkpoint, and `lora` trains
adapters on a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
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
    usual_tensors,
)
from lockstep.models.blueprint import Blueprint
from lockstep.models.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    FromCheckpoint,
    is_adapter,
    map_decoder,
    open_checkpoint,
    pad_id_of,
)
from lockstep.storage.weights import OnDisk, as_float32
from lockstep.text.tokenizer import Tokenizer
from lockstep_torch.classifier import TextClassifier
from lockstep_torch.decoder import DecoderNetwork
from lockstep_torch.device import TorchDevice
from lockstep_torch.lora import adapted, linear_layers
from lockstep_torch.mesh import fill, keep_own, shell
from lockstep_torch.model import LanguageModel, Scalar
from lockstep_torch.network import Network, ScalarHead
from lockstep_torch.transformers_network import TransformersNetwork, config_of, load, without_weights


class Decoder(LanguageModel):
    """A small modern decoder with fresh weights, the same in every backend."""

    Config = SmallDecoderConfig

    @classmethod
    def context(cls, config: SmallDecoderConfig) -> int:
        return config.context_length

    @classmethod
    def blueprint(cls, config: SmallDecoderConfig, vocab_size: int) -> Blueprint:
        return Blueprint(config.architecture(vocab_size))

    @classmethod
    def create(cls, config: SmallDecoderConfig, backend: TorchDevice, tokenizer: Tokenizer, seed: int) -> Decoder:
        architecture = config.architecture(tokenizer.vocab_size)
        return cls.filled(_decoder(architecture), None, backend, initial_parameters(architecture, seed))

    @classmethod
    def load(cls, folder: Path, backend: TorchDevice) -> Decoder:
        architecture, weights = _read(folder, scalar=False)
        return cls.filled(_decoder(architecture), None, backend, weights)

    @classmethod
    def load_scalar(cls, folder: Path, backend: TorchDevice) -> ScalarModel:
        architecture, weights = _read(folder, scalar=True)
        return Scalar.filled(_decoder(architecture).without_language_head(), _head(weights), backend, weights)


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

        network, weights = _open(AutoModelForCausalLM, open_checkpoint(folder, any_family=True))
        return cls.filled(network, None, backend, weights)

    @classmethod
    def load_scalar(cls, folder: Path | str, backend: TorchDevice) -> ScalarModel:
        from transformers import AutoModel

        checkpoint = open_checkpoint(folder, scalar=True, any_family=True)
        network, weights = _open(AutoModel, checkpoint)
        model: Scalar = Scalar.filled(network, _head(OnDisk(checkpoint.stored)), backend, weights)
        model.pad_id = pad_id_of(checkpoint.folder)
        return model

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
    """The checkpoint that adapters share. It is read once."""
    from transformers import AutoModelForCausalLM

    if path not in backend.trunks:
        network, weights = _open(AutoModelForCausalLM, open_checkpoint(path, any_family=True))
        if backend.mesh is None or backend.mesh.tensor is None:
            network = shell(network, backend.device)
        else:  # divided on the CPU, where weights take no memory before they are written
            network = shell(network, "cpu")
            network.divide_matmuls(backend.mesh.tensor)
            network.to(backend.device)
        fill({network.checkpoint_name(name): parameter for name, parameter in network.named_parameters()}, weights)
        keep_own(network)
        backend.trunks[path] = network
    return backend.trunks[path]


def _with(model: Any, arrays: dict[str, np.ndarray], source: Path | str) -> Any:
    """The model, with its trained parameters set to these values.

    Raises:
      CheckpointError: the values do not match its adapter.
    """
    tensors = model.tensors()
    adapters.check(source, arrays, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    fill(tensors, arrays)
    return model


def _open(auto: type, checkpoint: Checkpoint) -> tuple[Network, Mapping[str, np.ndarray]]:
    """The network in float32, without dropout and without memory for its weights; and the weights, from safetensors only, which
    are read where they are used. No code from the checkpoint is run. This package's decoder runs models of Llama's shape, because
    its generation loop is leaner; transformers' own modules run all others.

    Raises:
      CheckpointError: transformers cannot open the checkpoint, or would fill tensors with random numbers.
    """
    if checkpoint.architecture is None:
        return _read_by_transformers(auto, checkpoint)
    hf = without_weights(auto, checkpoint.folder)
    network = _lean(hf) or TransformersNetwork(hf.eval())
    found = usual_tensors(checkpoint.architecture, checkpoint.stored)
    stored = [found.get(network.checkpoint_name(name)) for name, _ in network.named_parameters()]
    shapes = [tuple(parameter.shape) for parameter in network.parameters()]
    if [each and each.shape for each in stored] != shapes:  # the checkpoint is of a larger model
        return _read_by_transformers(auto, checkpoint)
    return network, OnDisk(found)


def _read_by_transformers(auto: type, checkpoint: Checkpoint) -> tuple[Network, Mapping[str, np.ndarray]]:
    """`_open` through transformers, which alone knows how to read the files of families without a record. Reads all weights at
    once."""
    hf, info = load(auto, checkpoint.folder)
    unused = set[str]()
    if checkpoint.architecture is None:  # otherwise its names have been checked
        heads = () if hf.base_model is not hf else ("score.", "lm_head.")  # a trunk has no heads
        unused = {name for name in info["unexpected_keys"] if not name.startswith(heads) and not BUFFERS.search(name)}
    refuse_tensors(checkpoint.folder, missing=info["missing_keys"], unused=unused, other=info["mismatched_keys"])
    network = TransformersNetwork(hf.eval())
    if network.language_head() is not None:
        network.check_cache()
        network.find_logit_scale()
    weights = {network.checkpoint_name(name): parameter.detach().numpy() for name, parameter in network.named_parameters()}
    return shell(network, "meta"), weights


def _lean(hf: Any) -> DecoderNetwork | None:
    """The same model as a `DecoderNetwork`; None if it has another shape."""
    config = config_of(hf)
    try:
        architecture = from_hf(config)
    except CheckpointError:
        return None
    if not is_small_decoder(architecture):
        return None
    network = _decoder(architecture, config)
    return network if hf.get_output_embeddings() is not None else network.without_language_head()


def _decoder(architecture: Architecture, config: dict[str, Any] | None = None) -> DecoderNetwork:
    """A `DecoderNetwork` without memory for its weights."""
    with torch.device("meta"):
        return DecoderNetwork(architecture, config)


def _head(weights: Mapping[str, np.ndarray]) -> ScalarHead:
    """The scalar head in these weights. Its bias is 0 if they have none, as in transformers' classifiers."""
    bias = float(weights[SCALAR_BIAS][0]) if SCALAR_BIAS in weights else 0.0
    return ScalarHead(as_float32(weights[SCALAR_HEAD][0]), bias)


def _read(folder: Path, *, scalar: bool) -> tuple[Architecture, Mapping[str, np.ndarray]]:
    """Architecture and weights of a small decoder."""
    architecture, weights = map_decoder(folder, scalar=scalar)
    if not is_small_decoder(architecture):
        raise CheckpointError(
            f"{folder} holds a {architecture.family} model that is not a small decoder. Open it with policy=huggingface."
        )
    return architecture, weights
