"""Where models are opened from and saved to: folders, runs, backends, tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.config.compose import compose, group
from lockstep.config.root import component_config
from lockstep.errors import CheckpointError, ConfigError, did_you_mean, listing
from lockstep.interfaces import Backend, Policy
from lockstep.registry import registry
from lockstep.runs.assembly import opener
from lockstep.runs.store import check_output
from lockstep.storage.records import MADE_BY, OUTPUT, outputs, read_configuration, read_record
from lockstep.storage.sources import fetch_folder
from lockstep.text.tokenizer import PAD, Tokenizer, TokenizerConfig


def open_backend(backend: str | Mapping[str, Any] | Backend | None) -> Backend:
    """A backend by its name, by its configuration, or as it is; None takes the default of `conf/config.yaml`."""
    if isinstance(backend, Backend):
        return backend
    if backend is None:
        backend = dict(compose([])["backend"])
    given = {"name": backend} if isinstance(backend, str) else dict(backend)
    cls = registry().resolve("backend", given["name"], given["name"])
    keys = laid_over(group("backend", given["name"]), given)
    opened: Backend = cls(component_config(cls, keys, "backend"))
    return opened


def find(source: str | Path, kind: str, stage: str | None = None) -> tuple[Path, dict[str, Any] | None]:
    """The checkpoint folder that holds a result of this kind ('policy', 'reward_model'), and the run's backend if it is in a run.

    Raises:
      CheckpointError: the run or folder holds no such result, or does not exist.
    """
    folder, what = Path(source), kind.replace("_", " ")
    if (folder / "run.json").exists() and not (folder / "config.json").exists():  # a checkpoint may have a run.json of its own
        made = outputs(folder, kind)
        if not made or (stage and stage not in made):
            missing = f"no stage '{stage}' with a {what}.{did_you_mean(stage, made)}" if stage else f"no {what} yet."
            raise CheckpointError(f"The run {folder} has {missing} Stages with one: {listing(made)}.")
        result = made[stage or next(reversed(made))]
        check_output(result)
        return result, read_configuration(folder)["backend"]
    if stage is not None:
        raise CheckpointError(f"stage='{stage}' needs a run folder, but {source} has no run.json.")
    if (folder / "output" / MADE_BY).exists():  # a stage's folder
        folder = folder / "output"
    if (folder / MADE_BY).exists() and (made_as := read_record(folder / MADE_BY, OUTPUT)["kind"]) != kind:
        raise CheckpointError(f"{folder} holds a {made_as.replace('_', ' ')}, not a {what}.")
    if folder.exists():
        check_output(folder)
    return fetch_folder(folder if folder.exists() else source), None


def reader(folder: Path, backend: Backend) -> tuple[str, type[Policy]]:
    """The registered policy that reads a checkpoint: its name and its class."""
    name = opener(folder, backend.name)
    return name, registry().resolve("policy", name, backend.name)


def load_tokenizer(path: Path | str, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a checkpoint. Many public tokenizers pad with EOS; those get a pad token of their own. No model reads
    padding, because it is masked."""
    try:
        return Tokenizer.load(path, config)
    except ConfigError:
        if config.pad_token is not None:
            raise
        return Tokenizer.load(path, replace(config, pad_token=PAD))


def laid_over(keys: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``keys`` with ``changes`` on top; a group in both is merged key by key."""
    both = {
        key: laid_over(keys[key], value)
        for key, value in changes.items()
        if isinstance(value, Mapping) and isinstance(keys.get(key), Mapping)
    }
    return {**keys, **changes, **both}
