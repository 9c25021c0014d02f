"""Files that survive: safetensors and JSON, written under a temporary name, flushed, then renamed; folders likewise. After
a kill or a power failure a file or folder is there whole or not at all.

No pickle anywhere. A folder of weights is Hugging Face's layout: ``config.json`` beside ``model.safetensors``, in one
file or in shards with an index.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lockstep.errors import CheckpointError

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises CheckpointError where the disk is full or not writable; whatever was at ``path`` before stays."""

    def write(temporary: Path) -> None:
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, temporary, metadata={"format": "pt"})

    _replace(path, write)


def write_json(path: Path, content: Any) -> None:
    _replace(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n"))


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        raise CheckpointError(
            f"Could not write {path}: {error}. {free / 1e6:.0f} MB are free there. Make room and run the same command "
            "again: it goes on from the last complete checkpoint."
        ) from error


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that flushes no folders
            raise
    finally:
        os.close(number)


def move_folder(temporary: Path, final: Path) -> None:
    """A folder that is complete gets its name, once all its files are on the disk. What had the name goes."""
    for path in [*sorted(temporary.rglob("*")), temporary]:
        sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    sync(final.parent)


def remove_leftovers(folder: Path) -> None:
    """What a process that was killed in the middle of writing left in ``folder``. Nobody else may be writing there."""
    for path in folder.glob(".*.part"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def read_tensors(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The named tensors of a safetensors file, or all; bfloat16 comes back as float32, everything else as it is.

    Raises:
      CheckpointError: not there, cut short or not a safetensors file.
    """
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            start = file.tell()
        data = np.memmap(path, mode="r", offset=start)
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if names is not None and name not in names:
            continue
        begin, end = entry["data_offsets"]
        if end > len(data):
            raise CheckpointError(f"{path} is cut short: '{name}' ends at byte {end} of {len(data)}.")
        tensor = np.frombuffer(data[begin:end].tobytes(), DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            tensor = (tensor.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = tensor
    return tensors


def fetch(path: Path | str) -> Path:
    """A folder, the folder made of a GGUF file, or a hub repository, downloaded into Hugging Face's cache without pickles and
    code.

    Raises:
      CheckpointError: none is there.
    """
    from lockstep import gguf  # which writes checkpoints itself

    path = gguf.as_folder(path)
    if Path(path).is_dir():
        return Path(path)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:
        raise CheckpointError(f"'{path}' is neither a folder nor a hub repository that answers: {error}") from error


def read_weights(folder: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The float32 weights of a Hugging Face folder, sharded or not: all, or those of these names that are there."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = read_json(index)["weight_map"]
        shards = sorted({shard for name, shard in places.items() if names is None or name in names})
    elif (folder / "model.safetensors").exists():
        shards = ["model.safetensors"]
    else:
        raise CheckpointError(
            f"{folder} has no model.safetensors. Open the checkpoint in transformers and save_pretrained() it again: "
            "pickled weights are not read."
        )
    weights = {name: t for shard in shards for name, t in read_tensors(folder / shard, names).items()}
    return {name: np.asarray(t, np.float32) for name, t in weights.items()}


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def write_text(path: Path, content: str) -> None:
    _replace(path, lambda temporary: temporary.write_text(content))


def dump_line(row: Any) -> str:
    """One line of JSONL; JSON knows no NaN or infinity, so they become null."""
    if isinstance(row, dict):
        row = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
    return json.dumps(row, ensure_ascii=False) + "\n"
