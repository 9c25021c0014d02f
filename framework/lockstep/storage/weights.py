"""Weights in safetensors files; no pickle anywhere. A folder of weights has Hugging Face's layout: ``config.json`` beside
``model.safetensors``, in one file or in shards with an index. A learner's state is stored in the same way.

A file's header says where each tensor lies. The whole header is checked before a tensor is read, so a damaged or truncated file
raises an error that names it. Parts of a tensor can be read, and tensors are written one after another, so no process needs
memory for all of them.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lockstep.errors import CheckpointError, listing
from lockstep.processes import ALONE, Processes
from lockstep.storage.files import read_json, read_object, replace, write_json

DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "U32": "<u4",
    "F32": "<f4", "F64": "<f8", "I64": "<i8", "U64": "<u8",
}  # fmt: skip
"""The dtypes of tensors that can be read, in the safetensors library's order: it writes the last kind first. numpy has no
bfloat16; its bits are read as uint16."""
WRITTEN = {np.dtype(kind): name for name, kind in DTYPES.items() if name != "BF16"}
EXPONENTS = {"F64": ("<u8", 0x7FF << 52), "F32": ("<u4", 0xFF << 23), "F16": ("<u2", 0x1F << 10), "BF16": ("<u2", 0xFF << 7)}
"""The bits of the exponent. They are all set in NaN and Inf and in no other number."""
LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
WEIGHTS, LEARNER = "model.safetensors", "learner.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD = 5 * 10**9
"""Bytes of tensors beyond which a file is split into shards."""


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file. Raises CheckpointError if the disk is full or not writable; what was at ``path`` before stays."""
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    replace(path, functools.partial(_write, kinds=kinds, tensors=tensors.items()))


def _write(path: Path, kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write tensors of these kinds, which come one at a time and in any order. The safetensors library writes the same bytes."""
    order, header, end = list(DTYPES), dict[str, Any](__metadata__={"format": "pt"}), 0
    starts = dict[str, int]()
    for name in sorted(kinds, key=lambda name: (-order.index(WRITTEN[kinds[name][0]]), name)):
        dtype, shape = kinds[name]
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": WRITTEN[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            assert tensor.shape == kinds[name][1], f"{name} came as {tensor.shape}, not {kinds[name][1]}"
            file.seek(8 + len(text) + starts.pop(name))
            file.write(np.ascontiguousarray(tensor, kinds[name][0]).data)
    assert not starts, f"{sorted(starts)} did not come"


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    gather: Callable[[str], np.ndarray],
    processes: Processes = ALONE,
    file: str = WEIGHTS,
    sharded: bool = True,
) -> None:
    """Write float32 tensors of these shapes as ``file`` or, if ``sharded`` and beyond `SHARD` bytes, as shards of it with an
    index. The files are the same for any number of processes, which share the work: each writes different shards. Files written
    here before are removed.

    Args:
      gather: returns a tensor by name. Every process calls it with the same names in the same order, so it may ask the other
        processes for their parts. No process keeps a tensor.

    Raises:
      CheckpointError: on all processes, if the disk is full or not writable for one of them.
    """
    shards = _shards(shapes) if sharded else [sorted(shapes)]
    count, stem = len(shards), file.removesuffix(".safetensors")
    files = [file] if count == 1 else [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    trouble: CheckpointError | None = None
    for first in range(0, count, processes.count):
        group = shards[first : first + processes.count]
        tensors = _in_turn(group, gather)
        if processes.rank < len(group):
            kinds = {name: (np.dtype(np.float32), shapes[name]) for name in group[processes.rank]}
            own = ((name, tensor) for name, tensor in tensors if name in kinds)
            try:
                replace(folder / files[first + processes.rank], functools.partial(_write, kinds=kinds, tensors=own))
            except CheckpointError as error:
                trouble = error
        for _ in tensors:  # those that other processes write
            pass
    processes.settle(trouble)
    total = sum(4 * math.prod(shape) for shape in shapes.values())
    places = {name: shard for shard, names in zip(files, shards, strict=True) for name in names}

    def finish() -> None:
        index = folder / f"{file}.index.json"
        if count > 1:
            write_json(index, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
        for old in (folder / file, index, *folder.glob(f"{stem}-[0-9]*-of-[0-9]*.safetensors")):
            if old.name not in files and (old != index or count == 1):
                old.unlink(missing_ok=True)

    processes.share(finish)


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """The tensor names of each file, in sorted order; as many as fit."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(shapes):
        size += 4 * math.prod(shapes[name])
        if size > SHARD and shards[-1]:
            shards.append([])
            size = 4 * math.prod(shapes[name])
        shards[-1].append(name)
    return shards


def _in_turn(group: Sequence[Sequence[str]], gather: Callable[[str], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of several files, one of each file in turn, so that all files grow at the same time."""
    for names in itertools.zip_longest(*group):
        for name in names:
            if name is not None:
                yield name, gather(name)


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


def stored_weights(folder: Path, file: str = WEIGHTS) -> dict[str, Stored]:
    """The tensors of a Hugging Face folder, or of other files that `write_weights` wrote, from the headers of the files.

    Raises:
      CheckpointError: there are no such files, shards are missing, or a file is damaged.
    """
    if (folder / file).exists():  # as in transformers, it takes precedence over an index
        return stored_tensors(folder / file)
    index = folder / f"{file}.index.json"
    if not index.exists():
        raise CheckpointError(
            f"{folder} has no {file}, and pickled weights are not read. Open the checkpoint in transformers and "
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
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(shards)} files in {index.name}: {listing(missing[:3])}."
        )
    found = {name: stored for shard in shards for name, stored in stored_tensors(folder / shard).items()}
    if absent := sorted(places.keys() - found.keys()):
        raise CheckpointError(f"{index} is damaged: the files that it names do not hold {listing(absent[:3])}.")
    return found


def write_learner(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    gather: Callable[[str], np.ndarray],
    steps: int,
    processes: Processes = ALONE,
) -> None:
    """Write what `stored_learner` reads: the tensors, with `write_weights`, and ``learner.json``."""
    write_weights(folder, shapes, gather, processes, LEARNER)
    if processes.leads:
        write_json(folder / "learner.json", {"steps": steps})


def stored_learner(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Stored], int]:
    """The tensors of a learner's state, which must have exactly these names and shapes, and the number of steps it had taken.

    Raises:
      CheckpointError: a tensor is missing, unexpected or of another shape; or as `stored_weights`.
    """
    stored = stored_weights(folder, LEARNER)
    found = {name: each.shape for name, each in stored.items()}
    if wrong := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        raise CheckpointError(f"{folder} is of another architecture: {', '.join(wrong[:3])} do not fit.")
    return stored, read_json(folder / "learner.json")["steps"]


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
    """Read one tensor: bfloat16 as float32, everything else unchanged."""
    array = mapped(stored)
    return as_float32(array) if stored.dtype == "BF16" else np.array(array)


def mapped(stored: Stored) -> np.ndarray:
    """A memory-mapped view of a tensor, read from the disk only where it is used; bfloat16 as its bits, in uint16."""
    return _bytes(stored).view(DTYPES[stored.dtype]).reshape(stored.shape)


def as_float32(part: np.ndarray) -> np.ndarray:
    """A float32 copy of a part of `mapped` weights."""
    if part.dtype != np.uint16:
        return np.array(part, np.float32, order="C")
    return (part.astype(np.uint32, order="C") << 16).view(np.float32)


class OnDisk(Mapping[str, np.ndarray]):
    """Weights that are `mapped` when they are asked for, so that none is in memory for longer than it is used. ``more`` holds
    the weights that the files lack."""

    def __init__(self, stored: Mapping[str, Stored], more: Mapping[str, np.ndarray] | None = None):
        self.stored, self.more = stored, more or {}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.more[name] if name in self.more else mapped(self.stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter([*self.stored, *self.more])

    def __len__(self) -> int:
        return len(self.stored) + len(self.more)


def _bytes(stored: Stored) -> np.ndarray:
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
    """`check_finite` for tensors on the disk, a piece at a time."""
    _refuse_not_finite((name for name, each in stored.items() if not _is_finite(each)), what)


def _is_finite(stored: Stored, piece: int = 2**20) -> bool:
    if stored.dtype not in EXPONENTS:
        return True
    bits, exponent = EXPONENTS[stored.dtype]
    words = _bytes(stored).view(bits)
    exponents = np.dtype(bits).type(exponent)
    return not any(((words[i : i + piece] & exponents) == exponents).any() for i in range(0, len(words), piece))


def _refuse_not_finite(names: Iterable[str], what: str) -> None:
    if wrong := sorted(names):
        raise CheckpointError(
            f"{what} holds NaN or Inf in {len(wrong)} of its tensors: {listing(wrong[:3])}. Such weights come from training that "
            "diverged: start again from earlier ones, with a lower learning rate."
        )
