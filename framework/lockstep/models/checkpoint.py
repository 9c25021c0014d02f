"""Checkpoints: the configuration of policies that start from one, and the checks before opening one, on every backend.

Everything that can be checked in files is checked before a model is built: config.json, the names and shapes of all tensors
against it, and NaN and Inf. Otherwise a library fills missing tensors with random numbers, or allocates whatever config.json
asks for.
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
"""Sizes in config.json that transformers builds modules from. In a few families such a size is a list, one number per layer."""


@dataclass(frozen=True)
class CheckpointConfig:
    """The configuration keys of every policy that starts from a checkpoint."""

    path: str = setting(REQUIRED, "The checkpoint: a folder, a GGUF file or a hub id.")
    tokenizer: TokenizerConfig = setting(TokenizerConfig(), "Null keys take the checkpoint's own values.")

    def blueprint(self) -> Blueprint:
        """`read_blueprint` of the checkpoint. Subclasses add what else is trained, such as an adapter."""
        return read_blueprint(self.path)


class FromCheckpoint:
    """A mixin for a `lockstep.interfaces.Policy` whose ``Config`` has at least the keys of `CheckpointConfig`."""

    any_family: ClassVar[bool] = False
    """Whether the policy also opens families without a record in `lockstep.models.architecture`."""

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
        """The rows of the embedding according to config.json."""
        inner = self.config.get("text_config") or {}
        rows: int | None = self.config.get("vocab_size", inner.get("vocab_size"))
        return self.architecture.vocab_size if self.architecture else rows


def open_checkpoint(path: Path | str, *, scalar: bool = False, any_family: bool = False) -> Checkpoint:
    """Check and open the checkpoint in a folder, a GGUF file or a hub repository.

    Args:
      scalar: the checkpoint should hold a trunk with a scalar head, not a language model.
      any_family: also open a family without a record in `lockstep.models.architecture`; its tensors are then checked less.

    Raises:
      CheckpointError: files are missing or damaged, do not fit each other, or hold NaN or Inf.
    """
    found = describe(path, scalar=scalar, any_family=any_family)
    check_stored_finite(found.stored, f"The checkpoint {found.folder}")
    return found


def not_whole(folder: Path | str) -> str:
    """The error message for an adapter that is given where a whole checkpoint is needed."""
    return (
        f"{folder} holds an adapter, not a whole checkpoint. Merge it with its base: lockstep merge {shell(str(folder))} OUTPUT. "
        f"To continue training it, name it as a stage's policy: {override('stages.ppo.policy', str(folder))}."
    )


def check_files(path: Path | str) -> tuple[Path, dict[str, Any], dict[str, Stored]]:
    """The folder, config.json and tensors of any transformers checkpoint, checked as far as possible without its family.

    Raises:
      CheckpointError: files are missing or damaged, a size in config.json is too large for the weights, or the folder holds
        an adapter.
    """
    folder = fetch_folder(path)
    if is_adapter(folder):
        raise CheckpointError(not_whole(path))
    config, stored = read_config(folder), stored_weights(folder)
    _check_sizes(folder, config, stored)
    return folder, config, stored


def describe(path: Path | str, *, scalar: bool = False, any_family: bool = False) -> Checkpoint:
    """`open_checkpoint` without the check for NaN and Inf. It reads only headers, plus both matrices of a tied embedding that is
    stored twice."""
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
    """The architecture and the float32 weights, under their usual names, of a checkpoint that passes `open_checkpoint`."""
    architecture, weights = map_decoder(path, scalar=scalar)
    return architecture, {name: as_float32(array) for name, array in weights.items()}


def map_decoder(path: Path | str, *, scalar: bool = False) -> tuple[Architecture, Mapping[str, np.ndarray]]:
    """`read_decoder`, but each weight is `lockstep.storage.weights.mapped` when it is accessed."""
    checkpoint = open_checkpoint(path, scalar=scalar)
    architecture = from_hf(checkpoint.config)
    found = usual_tensors(architecture, checkpoint.stored)
    wanted = scalar_shapes(architecture) if scalar else parameter_shapes(architecture)
    more = {SCALAR_BIAS: np.zeros(1, np.float32)} if scalar and SCALAR_BIAS not in found else {}  # transformers has none
    return architecture, OnDisk({name: found[name] for name in wanted if name not in more}, more)


def read_blueprint(path: str) -> Blueprint:
    """The blueprint of a checkpoint from its config.json alone. The weights may be missing.

    Raises:
      CheckpointError: config.json is missing, damaged or not supported, or its family has no record.
    """
    return Blueprint(from_hf(read_config(fetch_folder(path))))


def is_known(config: dict[str, Any]) -> bool:
    """True if `from_hf` reads this config.json: its family has a record, and its values are supported."""
    try:
        from_hf(config)
    except CheckpointError:
        return False
    return True


def is_adapter(folder: Path) -> bool:
    """True if the folder holds an adapter, not a whole checkpoint."""
    return (folder / ADAPTER_CONFIG).exists()


def context_of(path: str) -> int | None:
    """The context length of a checkpoint in a local folder; None elsewhere, or if its config.json is not supported."""
    if not (Path(path) / CONFIG).is_file():
        return None
    try:
        return from_hf(read_config(Path(path))).context_length
    except CheckpointError:
        return None  # opening the checkpoint reports the error


def pad_id_of(path: Path | str) -> int | None:
    """The ``pad_token_id`` in a checkpoint's config.json."""
    config = read_config(fetch_folder(path))
    pad_id: int | None = (config.get("text_config") or config).get("pad_token_id")
    return pad_id


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
      CheckpointError: the file is missing or damaged, or a size in it is not a whole number of at least 1.
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
    """Raises CheckpointError for sizes too large for these weights, before anything of such a size is allocated."""
    numbers = sum(math.prod(each.shape) for each in stored.values())
    for key, value in _sizes(config):
        layers = key in ("num_hidden_layers", "n_layer")
        if isinstance(value, int) and value > (len(stored) if layers else numbers):
            held = f"{len(stored)} tensors" if layers else f"{numbers} numbers"
            raise CheckpointError(f"{folder / CONFIG} has {key}={value}, but the weights beside it are only {held}.")


def _check_tied(folder: Path, architecture: Architecture, stored: Mapping[str, Stored]) -> None:
    """Raises CheckpointError if config.json ties the output to the input embedding, but the stored matrices differ."""
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
    """The rows of a checkpoint's embedding, for a dry run; None if the path is not a local folder.

    Raises:
      CheckpointError: files are missing or damaged, or do not fit each other.
    """
    return describe(path, any_family=any_family).rows if Path(path).is_dir() else None
