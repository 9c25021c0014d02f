"""Weights in safetensors files; no pickle anywhere. A folder of weights is Hugging Face's layout: ``config.json`` beside
``model.safetensors``, in one file or in shards with an index.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lockstep.errors import CheckpointError
from lockstep.storage.files import read_json, replace

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises CheckpointError if the disk is full or not writable; whatever was at ``path`` before stays."""

    def write(temporary: Path) -> None:
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, temporary, metadata={"format": "pt"})

    replace(path, write)


def read_tensors(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The named tensors of a safetensors file, or all; bfloat16 comes back as float32, everything else unchanged.

    Raises:
      CheckpointError: the file is missing, truncated or not in safetensors format.
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
            raise CheckpointError(f"{path} is truncated: '{name}' ends at byte {end} of {len(data)}.")
        tensor = np.frombuffer(data[begin:end].tobytes(), DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            tensor = (tensor.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = tensor
    return tensors


def read_weights(folder: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The float32 weights of a Hugging Face folder, sharded or not: all, or those of ``names`` that exist."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = read_json(index)["weight_map"]
        shards = sorted({shard for name, shard in places.items() if names is None or name in names})
    elif (folder / "model.safetensors").exists():
        shards = ["model.safetensors"]
    else:
        raise CheckpointError(
            f"{folder} has no model.safetensors, and pickled weights are not read. Open the checkpoint in transformers and "
            "save_pretrained() it again."
        )
    weights = {name: t for shard in shards for name, t in read_tensors(folder / shard, names).items()}
    return {name: np.asarray(t, np.float32) for name, t in weights.items()}
