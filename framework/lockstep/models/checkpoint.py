"""Checkpoints: the configuration of policies that start from one, and the checks before one is opened, on every backend.

All that files can tell is checked before a model is built: config.json, the names and shapes of all tensors against it, and
NaN and Inf. Otherwise a library fills what is missing with random numbers, or allocates whatever config.json asks for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lockstep.config.overrides import override, shell
from lockstep.config.schema import REQUIRED, setting
from lockstep.errors import CheckpointError, listing, told
from lockstep.interfaces import Inputs
from lockstep.models.architecture import (
    SCALAR_BIAS,
    SCALAR_HEAD,
    Architecture,
    WrongValue,
    check_labels,
    check_shapes,
    family_of,
    from_hf,
    head_shapes,
    parameter_shapes,
    scalar_shapes,
    usual_names,
    usual_tensors,
)
from lockstep.models.blueprint import Blueprint
from lockstep.storage.files import read_object
from lockstep.storage.sources import fetch_folder
from lockstep.storage.weights import EXPONENTS, OnDisk, Stored, as_float32, check_stored_finite, read_weights, stored_weights
from lockstep.text.tokenizer import TokenizerConfig

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "n_embd", "n_layer", "n_head", "n_inner",
)  # fmt: skip
"""Keys of config.json that transformers builds modules from. A few families have a list, a number per layer."""


@dataclass(frozen=True)
class CheckpointConfig:
    """The keys that these policies share."""

    path: str = setting(REQUIRED, "The checkpoint: a folder, a GGUF file or a hub id.")
    tokenizer: TokenizerConfig = setting(TokenizerConfig(), "Keys that are null take the checkpoint's own.")

    def blueprint(self) -> Blueprint:
        """`read_blueprint` of the checkpoint, with what else is trained."""
        return read_blueprint(self.path)


class FromCheckpoint:
    """For a `lockstep.interfaces.Policy` whose ``Config`` has at least the keys of `CheckpointConfig`."""

    any_family: ClassVar[bool] = False
    """Whether it also opens families without a record in `lockstep.models.architecture`."""

    @classmethod
    def inputs(cls, config: Any) -> Inputs:
        return Inputs(files=tuple(path for path in (config.path, config.tokenizer.path) if path))

    @classmethod
    def tokenizer_config(cls, config: Any) -> TokenizerConfig:
        return dataclasses.replace(config.tokenizer, path=config.tokenizer.path or config.path)

    @classmethod
    def survey(cls, config: Any) -> int | None:
        return survey(config.path, any_family=cls.any_family)

    @classmethod
    def context(cls, config: Any) -> int | None:
        return context_of(config.path)

    @classmethod
    def blueprint(cls, config: Any, vocab_size: int) -> Blueprint:
        made: Blueprint = config.blueprint()
        return made


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the local disk. ``architecture`` is None for families without a record."""

    folder: Path
    config: dict[str, Any]
    architecture: Architecture | None
    stored: Mapping[str, Stored]

    @property
    def rows(self) -> int | None:
        """Of the embedding, as config.json says."""
        inner = self.config.get("text_config") or {}
        rows: int | None = self.config.get("vocab_size", inner.get("vocab_size"))
        return self.architecture.vocab_size if self.architecture else rows


def open_checkpoint(path: Path | str, *, scalar: bool = False, any_family: bool = False) -> Checkpoint:
    """The checkpoint in a folder, a GGUF file or a hub repository, checked.

    Args:
      scalar: it should hold a trunk with a scalar head, not a language model.
      any_family: also without a record in `lockstep.models.architecture`; its tensors are then checked less.

    Raises:
      CheckpointError: files are missing or damaged, do not fit each other, or hold NaN or Inf.
    """
    found = describe(path, scalar=scalar, any_family=any_family)
    check_stored_finite(found.stored, f"The checkpoint {found.folder}")
    return found


def not_whole(folder: Path | str) -> str:
    """For whoever gives an adapter where a whole checkpoint is needed."""
    return (
        f"{folder} holds an adapter, not a whole checkpoint. Merge it with its base: lockstep merge {shell(str(folder))} OUTPUT. "
        f"To continue training it, name it as a stage's policy: {override('stages.ppo.policy', str(folder))}."
    )


def check_files(path: Path | str) -> tuple[Path, dict[str, Any], dict[str, Stored]]:
    """The folder, config.json and tensors of any checkpoint of transformers, as far as they can be checked without its family.

    Raises:
      CheckpointError: files are missing or damaged, or a size in config.json cannot be that of the weights.
    """
    folder = fetch_folder(path)
    if is_adapter(folder):
        raise CheckpointError(not_whole(path))
    config, stored = read_config(folder), stored_weights(folder)
    _check_sizes(folder, config, stored)
    return folder, config, stored


def describe(path: Path | str, *, scalar: bool = False, any_family: bool = False) -> Checkpoint:
    """`open_checkpoint`, but only headers are read."""
    folder, config, stored = check_files(path)
    if scalar:
        if SCALAR_HEAD not in stored:
            raise CheckpointError(f"{folder} has no reward model: {SCALAR_HEAD} is missing.")
        check_labels(folder, sum(stored[SCALAR_HEAD].shape[:1]))
    try:
        architecture = from_hf(config)
    except CheckpointError as error:
        if isinstance(error, WrongValue) or not any_family:
            raise
        return Checkpoint(folder, config, None, stored)
    _check_tied(folder, architecture, stored)
    found = usual_tensors(architecture, stored)
    if whole := [f"{name} ({each.dtype})" for name, each in found.items() if each.dtype not in EXPONENTS]:
        raise CheckpointError(f"The weights in {folder} should be floating-point numbers, unlike {listing(whole[:3])}.")
    shapes = {name: each.shape for name, each in found.items()}
    if scalar:
        shapes = {SCALAR_BIAS: (1,)} | {n: shape for n, shape in shapes.items() if n not in head_shapes(architecture)}
    check_shapes(folder, shapes, scalar_shapes(architecture) if scalar else parameter_shapes(architecture))
    return Checkpoint(folder, config, architecture, stored)


def read_decoder(path: Path | str, *, scalar: bool = False) -> tuple[Architecture, dict[str, np.ndarray]]:
    """The architecture and the float32 weights under their usual names of a checkpoint that `open_checkpoint` opens."""
    architecture, weights = map_decoder(path, scalar=scalar)
    return architecture, {name: as_float32(array) for name, array in weights.items()}


def map_decoder(path: Path | str, *, scalar: bool = False) -> tuple[Architecture, Mapping[str, np.ndarray]]:
    """`read_decoder`, but each of the weights is `lockstep.storage.weights.mapped` when it is asked for."""
    checkpoint = open_checkpoint(path, scalar=scalar)
    architecture = from_hf(checkpoint.config)
    found = usual_tensors(architecture, checkpoint.stored)
    wanted = scalar_shapes(architecture) if scalar else parameter_shapes(architecture)
    more = {SCALAR_BIAS: np.zeros(1, np.float32)} if scalar and SCALAR_BIAS not in found else {}  # transformers has none
    return architecture, OnDisk({name: found[name] for name in wanted if name not in more}, more)


def read_blueprint(path: str) -> Blueprint:
    """Of the config.json of a checkpoint alone; weights need not be there.

    Raises:
      CheckpointError: there is none, or of a family without a record.
    """
    return Blueprint(from_hf(read_config(fetch_folder(path))))


def is_known(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a family with a record."""
    try:
        from_hf(config)
    except CheckpointError:
        return False
    return True


def is_adapter(folder: Path) -> bool:
    """Whether it holds an adapter, not a whole checkpoint."""
    return (folder / ADAPTER_CONFIG).exists()


def context_of(path: str) -> int | None:
    """The context of a checkpoint in a local folder; None elsewhere, or if its family has no record."""
    if not (Path(path) / CONFIG).is_file():
        return None
    try:
        return from_hf(read_config(Path(path))).context_length
    except CheckpointError:
        return None  # opening it says what is wrong


def read_config(folder: Path) -> dict[str, Any]:
    """config.json.

    Raises:
      CheckpointError: it is missing or damaged, or a size in it is not a number.
    """
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"{folder} has no {CONFIG}, so it is not a Hugging Face checkpoint.")
    config = read_object(folder / CONFIG)
    if not isinstance(config.get("text_config") or {}, dict):
        raise CheckpointError(f"{folder / CONFIG} should hold an object under text_config, not {config['text_config']!r}.")
    for key, value in _sizes(config):
        if not isinstance(value, list) and not (type(value) is int and value >= 1):
            raise CheckpointError(f"{folder / CONFIG} has {key}={told(value)}, which should be a whole number of at least 1.")
    return config


def _sizes(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    both = (config.get("text_config") or {}, config)
    return [(key, part[key]) for part in both for key in SIZES if part.get(key) is not None]


def _check_sizes(folder: Path, config: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
    """Raises CheckpointError for sizes that these weights cannot have, before anything of such a size is allocated."""
    numbers = sum(math.prod(each.shape) for each in stored.values())
    for key, value in _sizes(config):
        layers = key in ("num_hidden_layers", "n_layer")
        if isinstance(value, int) and value > (len(stored) if layers else numbers):
            held = f"{len(stored)} tensors" if layers else f"{numbers} numbers"
            raise CheckpointError(f"{folder / CONFIG} has {key}={value}, but the weights beside it are only {held}.")


def _check_tied(folder: Path, architecture: Architecture, stored: Mapping[str, Stored]) -> None:
    """Raises CheckpointError if config.json says that output and input embedding are one matrix, and the weights differ."""
    names, naming = usual_names(architecture, stored), family_of(architecture).naming
    head, embedding = (names.get(naming.rename(f"{module}.weight")) for module in ("lm_head", "model.embed_tokens"))
    if architecture.tied and head and embedding:
        one, other = (read_weights(folder, [name])[name] for name in (embedding, head))
        if not np.array_equal(one, other):
            raise CheckpointError(
                f"{folder / CONFIG} has tie_word_embeddings=true, but {head} differs from {embedding}. Set it to false to use "
                f"both, or remove {head}."
            )


def survey(path: str, *, any_family: bool) -> int | None:
    """For a dry run: the rows of a checkpoint's embedding; None if it is not a local folder.

    Raises:
      CheckpointError: files are missing or damaged, or do not fit each other.
    """
    return describe(path, any_family=any_family).rows if Path(path).is_dir() else None
