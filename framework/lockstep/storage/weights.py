"""Weights in safetensors files; no pickle anywhere. A folder of weights is Hugging Face's layout: ``config.json`` beside
``model.safetensors``, in one file or in shards with an index.

A file's header says where each tensor lies. It is checked whole before a tensor is read, so a damaged or truncated file is
an error that names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from lockstep.errors import CheckpointError, listing
from lockstep.storage.files import read_object, replace

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
EXPONENTS = {"F64": ("<u8", 0x7FF << 52), "F32": ("<u4", 0xFF << 23), "F16": ("<u2", 0x1F << 10), "BF16": ("<u2", 0xFF << 7)}
"""The bits of an exponent, which are all set in NaN and Inf and in no other number."""
LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises CheckpointError if the disk is full or not writable; whatever was at ``path`` before stays."""

    def write(temporary: Path) -> None:
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, temporary, metadata={"format": "pt"})

    replace(path, write)


class Stored(NamedTuple):
    """Where a tensor lies: bytes ``begin`` to ``end`` of ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def stored_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, from its header.

    Raises:
      CheckpointError: the file is missing, damaged, truncated or not in safetensors format.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, LONGEST_HEADER):
                raise ValueError(f"its header would have {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
        raise CheckpointError(f"{path} is damaged: its __metadata__ should map texts to texts, and is {str(about)[:200]}.")
    found = {name: _entry(path, name, record, 8 + length) for name, record in header.items()}
    expected = 8 + length
    for name, stored in sorted(found.items(), key=lambda item: item[1][-2:]):
        if stored.begin != expected:
            raise CheckpointError(f"{path} is damaged: '{name}' begins at byte {stored.begin}, not {expected}.")
        expected = stored.end
    if expected != size:
        how = "truncated" if size < expected else "damaged"
        raise CheckpointError(f"{path} is {how}: its tensors end at byte {expected}, the file at {size}. Download it again.")
    return found


def _entry(path: Path, name: str, record: Any, start: int) -> Stored:
    """One record of a header, whose offsets count from byte ``start``."""
    fields: dict[str, Any] = record if isinstance(record, dict) else {}
    dtype, shape, offsets = (fields.get(key, "") for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _counts(shape) and _counts(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{path} is damaged: its header describes '{name}' as {str(record)[:200]}.")
    if dtype not in DTYPES:
        raise CheckpointError(f"{path} holds '{name}' as {dtype}, which is not supported. Supported: {listing(DTYPES)}.")
    begin, end = offsets
    if end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        what = f"'{name}' has {end - begin} bytes, which are not a tensor of shape {tuple(shape)} in {dtype}"
        raise CheckpointError(f"{path} is damaged: {what}.")
    return Stored(path, dtype, tuple(shape), start + begin, start + end)


def _counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)


def stored_weights(folder: Path) -> dict[str, Stored]:
    """The tensors of a Hugging Face folder, sharded or not, from the headers of its files.

    Raises:
      CheckpointError: there are no such files, shards are missing, or a file is damaged.
    """
    if (folder / WEIGHTS).exists():  # as in transformers, it precedes an index
        return stored_tensors(folder / WEIGHTS)
    index = folder / INDEX
    if not index.exists():
        raise CheckpointError(
            f"{folder} has no {WEIGHTS}, and pickled weights are not read. Open the checkpoint in transformers and "
            "save_pretrained() it again."
        )
    content = read_object(index)
    places = content.get("weight_map")
    if not (isinstance(places, dict) and places and all(isinstance(shard, str) for shard in places.values())):
        raise CheckpointError(f"{index} is damaged: it has no weight_map from names of tensors to files.")
    if not isinstance(content.get("metadata"), dict):
        raise CheckpointError(f'{index} has no metadata, which transformers needs. Add the key "metadata": {{}} to it.')
    shards = sorted(set(places.values()))
    if outside := [shard for shard in shards if Path(shard).name != shard or shard in ("", "..")]:
        raise CheckpointError(f"{index} names the file {outside[0]!r}. Shards lie in the folder of their index.")
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise CheckpointError(f"{folder} lacks {len(missing)} of the {len(shards)} files in {INDEX}: {listing(missing[:3])}.")
    found = {name: stored for shard in shards for name, stored in stored_tensors(folder / shard).items()}
    if absent := sorted(places.keys() - found.keys()):
        raise CheckpointError(f"{index} is damaged: the files that it names do not hold {listing(absent[:3])}.")
    return found


def read_tensors(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The named tensors of a safetensors file, or all; bfloat16 comes back as float32, everything else unchanged.

    Raises:
      CheckpointError: the file is missing, damaged, truncated or not in safetensors format.
    """
    return {name: read_tensor(stored) for name, stored in stored_tensors(path).items() if names is None or name in names}


def read_weights(folder: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The float32 weights of a Hugging Face folder, sharded or not: all, or those of ``names`` that exist."""
    stored = {name: each for name, each in stored_weights(folder).items() if names is None or name in names}
    return {name: np.asarray(read_tensor(each), np.float32) for name, each in stored.items()}


def read_tensor(stored: Stored) -> np.ndarray:
    """bfloat16 as float32, everything else unchanged."""
    tensor = np.frombuffer(_mapped(stored).tobytes(), DTYPES[stored.dtype]).reshape(stored.shape)
    return (tensor.astype(np.uint32) << 16).view(np.float32) if stored.dtype == "BF16" else tensor


def _mapped(stored: Stored) -> np.ndarray:
    """Its bytes, read from the disk when they are used."""
    return np.memmap(stored.file, np.uint8, mode="r")[stored.begin : stored.end]


# ----------------------------------------------------------------------------------------------------------- NaN and Inf


def not_finite(arrays: Iterable[tuple[str, np.ndarray]]) -> list[str]:
    """The names of arrays that hold NaN or Inf."""
    return [name for name, array in arrays if not np.isfinite(array).all()]


def check_finite(arrays: Iterable[tuple[str, np.ndarray]], what: str) -> None:
    """
    Raises:
      CheckpointError: an array holds NaN or Inf; ``what``, the subject of the message, says where.
    """
    _refuse_not_finite(not_finite(arrays), what)


def check_stored_finite(stored: Mapping[str, Stored], what: str) -> None:
    """`check_finite` of tensors on the disk, a piece at a time."""
    _refuse_not_finite((name for name, each in stored.items() if not _is_finite(each)), what)


def _is_finite(stored: Stored, piece: int = 2**20) -> bool:
    if stored.dtype not in EXPONENTS:
        return True
    bits, exponent = EXPONENTS[stored.dtype]
    words = _mapped(stored).view(bits)
    exponents = np.dtype(bits).type(exponent)
    return not any(((words[i : i + piece] & exponents) == exponents).any() for i in range(0, len(words), piece))


def _refuse_not_finite(names: Iterable[str], what: str) -> None:
    if wrong := sorted(names):
        raise CheckpointError(
            f"{what} holds NaN or Inf in {len(wrong)} of its tensors: {listing(wrong[:3])}. Such weights come from training that "
            "diverged: start again from earlier ones, with a lower learning rate."
        )
