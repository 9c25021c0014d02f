"""The policies that a configuration names: `decoder` starts from scratch, `huggingface` from a checkpoint, `lora` trains
adapters on one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lockstep.config.schema import REQUIRED, setting
from lockstep.errors import CheckpointError
from lockstep.interfaces import ScalarModel
from lockstep.models import adapters
from lockstep.models.adapters import Adapter, LoRAConfig
from lockstep.models.architecture import (
    SCALAR_BIAS,
    SCALAR_HEAD,
    Architecture,
    SmallDecoderConfig,
    check_labels,
    check_parameters,
    from_hf,
    initial_parameters,
    linear_layers,
    parameter_shapes,
    trunk_shapes,
)
from lockstep.storage.files import read_json
from lockstep.storage.sources import fetch_folder
from lockstep.storage.weights import read_weights
from lockstep.text.tokenizer import Tokenizer, TokenizerConfig
from lockstep_jax.backend import JaxBackend
from lockstep_jax.decoder import Network, Tree
from lockstep_jax.model import LanguageModel, Scalar
from lockstep_jax.parameters import from_arrays


class Checkpoint(LanguageModel):
    """How both kinds of policy are read from a folder."""

    @classmethod
    def load(cls, folder: Path | str, backend: JaxBackend) -> Checkpoint:
        architecture, weights = _read(folder)
        check_parameters(architecture, weights, parameter_shapes(architecture))
        return cls.from_arrays(architecture, weights, backend, language_head=True)

    @classmethod
    def load_scalar(cls, folder: Path | str, backend: JaxBackend) -> ScalarModel:
        architecture, weights = _read(folder)
        weights.setdefault(SCALAR_BIAS, np.zeros(1, np.float32))  # transformers' classifiers have none
        check_labels(folder, len(weights.get(SCALAR_HEAD, [None])))
        d = architecture.hidden_size
        check_parameters(architecture, weights, trunk_shapes(architecture) | {SCALAR_HEAD: (1, d), SCALAR_BIAS: (1,)})
        return Scalar.from_arrays(architecture, weights, backend, language_head=False)


class Decoder(Checkpoint):
    """A small modern decoder with fresh weights, the same in every backend."""

    Config = SmallDecoderConfig

    @classmethod
    def create(cls, config: SmallDecoderConfig, backend: JaxBackend, tokenizer: Tokenizer, seed: int) -> Decoder:
        architecture = config.architecture(tokenizer.vocab_size)
        return cls.from_arrays(architecture, initial_parameters(architecture, seed), backend, language_head=True)


class HuggingFace(Checkpoint):
    """A checkpoint of Hugging Face of one of `lockstep.models.architecture.FAMILIES`, from a folder or the hub."""

    @dataclass(frozen=True)
    class Config:
        path: str = setting(REQUIRED, "A folder or a hub id.")
        tokenizer: TokenizerConfig = setting(TokenizerConfig(), "Null in it: the checkpoint's own.")

    @classmethod
    def create(cls, config: Config, backend: JaxBackend, tokenizer: Tokenizer, seed: int) -> HuggingFace:
        return cls.load(config.path, backend)


class LoRA(LanguageModel):
    """Low-rank adapters on a frozen checkpoint (Hu et al. 2021). All models of a run that adapt the same checkpoint share its
    weights: policy, reference, value network and reward model are adapters on one trunk."""

    Config = LoRAConfig

    @classmethod
    def create(cls, config: LoRAConfig, backend: JaxBackend, tokenizer: Tokenizer, seed: int) -> LoRA:
        architecture, trunk = _trunk(config.path, backend)
        adapter = config.adapter(linear_layers(architecture), conv1d=architecture.family == "gpt2")
        shapes = adapter.shapes(linear_layers(architecture))
        return cls(*_adapted(architecture, trunk, adapter, adapters.initial(shapes, seed), backend, language_head=True))

    @classmethod
    def load(cls, folder: Path | str, backend: JaxBackend) -> LoRA:
        return cls(*_load_adapter(folder, backend, scalar=False))

    @classmethod
    def load_scalar(cls, folder: Path | str, backend: JaxBackend) -> ScalarModel:
        return Scalar(*_load_adapter(folder, backend, scalar=True))


def _trunk(path: str, backend: JaxBackend) -> tuple[Architecture, Tree]:
    """The checkpoint that adapters share; read once."""
    if path not in backend.trunks:
        architecture, weights = _read(path)
        check_parameters(architecture, weights, parameter_shapes(architecture))
        backend.trunks[path] = architecture, backend.put(from_arrays(architecture, weights))
    return backend.trunks[path]


def _load_adapter(folder: Path | str, backend: JaxBackend, *, scalar: bool) -> tuple[Network, Tree, JaxBackend, Tree]:
    adapter, arrays = adapters.read(folder)
    architecture, trunk = _trunk(adapter.base, backend)
    shapes: dict[str, tuple[int, ...]] = {**adapter.shapes(linear_layers(architecture))}
    if scalar:
        arrays.setdefault(SCALAR_BIAS, np.zeros(1, np.float32))  # peft's classifiers have none
        shapes |= {SCALAR_HEAD: (1, architecture.hidden_size), SCALAR_BIAS: (1,)}
    adapters.check(folder, arrays, shapes)
    return _adapted(architecture, trunk, adapter, arrays, backend, language_head=not scalar)


def _adapted(
    architecture: Architecture, trunk: Tree, adapter: Adapter, arrays: dict[str, np.ndarray], backend: JaxBackend,
    *, language_head: bool,
) -> tuple[Network, Tree, JaxBackend, Tree]:  # fmt: skip
    """What a model is made of: the adapter is trained, the trunk is not."""
    c = backend.config
    network = Network(architecture, c.precision, c.gradient_checkpointing, language_head, SCALAR_HEAD in arrays, adapter)
    frozen = trunk if language_head else {name: part for name, part in trunk.items() if name != "lm_head"}
    return network, backend.put(from_arrays(architecture, arrays)), backend, frozen


def _read(path: Path | str) -> tuple[Architecture, dict[str, np.ndarray]]:
    """Architecture and float32 weights under the names of `lockstep.models.architecture`."""
    folder = fetch_folder(path)
    if (folder / adapters.ADAPTER_CONFIG).exists() and not (folder / "config.json").exists():
        raise CheckpointError(adapters.NOT_WHOLE.format(folder=path))
    architecture = from_hf(read_json(folder / "config.json"))
    return architecture, _strip(architecture, read_weights(folder))


BUFFERS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
"""Causal masks and rotary tables, which old versions of transformers saved among the weights."""

PREFIXES = {
    "gpt2": {"wte.": "transformer.wte.", "wpe.": "transformer.wpe.", "h.": "transformer.h.", "ln_f.": "transformer.ln_f."},
    "gpt_neox": {"lm_head.": "embed_out."},
    "gemma3_text": {"language_model.lm_head.": "lm_head.", "language_model.model.": "model.", "model.language_model.": "model."},
}
"""Other names under which files hold the same tensors: OpenAI's own GPT-2, newer versions of transformers, a Gemma that also
takes images."""

OTHERS = {"gemma3_text": ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")}
"""Parts of a larger model that are not its decoder."""


def _strip(architecture: Architecture, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights under their usual names, without what a checkpoint may hold beyond them: buffers, and a second copy of a tied
    embedding."""
    family = architecture.family
    named = {_renamed(name, PREFIXES.get(family, {})): array for name, array in weights.items()}
    return {
        name: array
        for name, array in named.items()
        if not BUFFERS.search(name)
        and not name.startswith(OTHERS.get(family, ()))
        and not (architecture.tied and name in ("lm_head.weight", "embed_out.weight"))
    }


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    old = next((old for old in prefixes if name.startswith(old)), "")
    return prefixes.get(old, "") + name.removeprefix(old)
