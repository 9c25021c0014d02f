"""Files of weights: one or several, written and read a part at a time."""

from __future__ import annotations

import errno
import itertools
import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lockstep.checking.conformance.backends import terms as kit
from lockstep.errors import CheckpointError
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.models.architecture import initial_parameters, small_decoder, to_hf
from lockstep.processes import Processes
from lockstep.registry import registry
from lockstep.storage import weights
from lockstep.storage.files import read_json, write_json
from lockstep.storage.weights import (
    OnDisk,
    as_float32,
    read_tensors,
    read_weights,
    stored_tensors,
    stored_weights,
    write_tensors,
    write_weights,
)

TENSORS = {f"layer.{i}": np.random.default_rng(i).normal(size=(i + 1, 10)).astype(np.float32) for i in range(6)}
SHAPES = {name: tensor.shape for name, tensor in TENSORS.items()}


def test_a_file_has_the_bytes_that_the_safetensors_library_writes(tmp_path):
    kinds = ("?", "u1", "i1", "<i2", "<u2", "<f2", "<i4", "<u4", "<f4", "<f8", "<i8", "<u8")
    numbers = np.random.default_rng(0).normal(size=(3, 4)) * 5
    tensors = {f"ä{i}.{kind}": numbers[:, i:].astype(kind) for i, kind in itertools.product(range(3), kinds)}
    tensors |= {"empty": np.zeros((0, 4), np.float32), "transposed": numbers.astype(np.float32).T}
    write_tensors(tmp_path / "ours", tensors)
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


class One(Processes):
    """Process ``rank`` of ``count``, which takes its turn while the others are imagined to do theirs."""

    def __init__(self, rank, count):
        self.rank, self.count = rank, count

    def exchange(self, message):
        return [message] * self.count

    def share(self, make):
        return make() if self.leads else None


def test_shards_are_the_same_whoever_writes_them_and_open_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD", 399)  # bytes: the tensors have 40, 80, ... 240
    for count in (1, 2, 3, 5):
        asked = []
        for rank in range(count):
            asked.append([])
            gather = lambda name, seen=asked[-1]: seen.append(name) or TENSORS[name]  # noqa: E731
            write_weights(tmp_path / str(count), SHAPES, gather, One(rank, count))
        assert all(names == asked[0] and sorted(names) == sorted(TENSORS) for names in asked)  # each gathered once, in one order
    files = {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir()}
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(files) == [*shards, weights.INDEX]
    for count in (2, 3, 5):
        assert {path.name: path.read_bytes() for path in (tmp_path / str(count)).iterdir()} == files
    index = json.loads(files[weights.INDEX])
    assert index["metadata"] == {"total_size": 840} and list(index["weight_map"]) == sorted(TENSORS)
    assert [sorted(load_file(tmp_path / "1" / shard)) for shard in shards] == [
        ["layer.0", "layer.1", "layer.2"], ["layer.3", "layer.4"], ["layer.5"],
    ]  # fmt: skip
    for name, tensor in read_weights(tmp_path / "1").items():
        np.testing.assert_array_equal(tensor, TENSORS[name])


def test_little_is_one_file_and_a_tensor_larger_than_a_shard_has_one_to_itself(tmp_path, monkeypatch):
    write_weights(tmp_path / "one", SHAPES, TENSORS.__getitem__)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    write_tensors(tmp_path / "whole", TENSORS)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "whole").read_bytes()
    monkeypatch.setattr(weights, "SHARD", 10)
    write_weights(tmp_path / "each", SHAPES, TENSORS.__getitem__, file="learner.safetensors")
    assert len(list((tmp_path / "each").glob("learner-*-of-00006.safetensors"))) == 6
    assert stored_weights(tmp_path / "each", "learner.safetensors").keys() == TENSORS.keys()


def test_what_was_written_before_in_another_number_of_files_is_gone(tmp_path, monkeypatch):
    """A single file would be read before an index; an old index would name shards that are gone."""
    shapes = {"a": (4,), "b": (4,)}

    def written(value, size):
        monkeypatch.setattr(weights, "SHARD", size)
        weights.write_weights(tmp_path, shapes, lambda name: np.full(shapes[name], value, np.float32))
        return {name: array[0] for name, array in weights.read_weights(tmp_path).items()}, len(list(tmp_path.iterdir()))

    assert written(0, 100) == ({"a": 0, "b": 0}, 1)
    assert written(1, 16) == ({"a": 1, "b": 1}, 3)
    assert written(2, 100) == ({"a": 2, "b": 2}, 1)


def test_a_lost_and_a_damaged_shard_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD", 399)
    write_weights(tmp_path, SHAPES, TENSORS.__getitem__, file="learner.safetensors")
    lost = tmp_path / "learner-00002-of-00003.safetensors"
    content = lost.read_bytes()
    lost.write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match="learner-00002-of-00003.safetensors is truncated"):
        stored_weights(tmp_path, "learner.safetensors")
    lost.unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of the 3 files in learner.safetensors.index.json: learner-00002-of-00003"):
        stored_weights(tmp_path, "learner.safetensors")


def test_a_full_disk_under_one_shard_does_not_keep_the_others_from_their_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD", 399)
    real = weights._write

    def write(path, kinds, tensors):
        if "00002-of" in path.name:
            next(iter(tensors))
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, kinds, tensors)

    monkeypatch.setattr(weights, "_write", write)
    asked = []
    with pytest.raises(CheckpointError, match="00002-of-00003.safetensors: .*No space left on device"):
        write_weights(tmp_path, SHAPES, lambda name: asked.append(name) or TENSORS[name], One(1, 2))
    assert sorted(asked) == sorted(TENSORS)
    assert not list(tmp_path.glob("*00002*")) and not list(tmp_path.glob(".*"))


def test_parts_of_weights_are_read_in_float32(tmp_path):
    numbers = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    rounded = ((numbers.view(np.uint32) >> 16) << 16).view(np.float32)
    bits = {"dtype": "BF16", "shape": [4, 6], "data_offsets": [0, 48]}
    header, half = json.dumps({"bfloat16": bits}).encode(), numbers.astype(np.float16)
    content = (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + content)
    write_tensors(tmp_path / "b", {"float16": half, "float32": numbers})
    found = OnDisk(stored_tensors(tmp_path / "a") | stored_tensors(tmp_path / "b"), {"more": numbers})
    assert sorted(found) == ["bfloat16", "float16", "float32", "more"] and len(found) == 4
    for name, expected in {"bfloat16": rounded, "float16": half, "float32": numbers, "more": numbers}.items():
        part = as_float32(found[name].T[1:5, ::2])
        assert part.dtype == np.float32 and part.flags.c_contiguous and part.flags.writeable
        np.testing.assert_array_equal(part, expected.astype(np.float32).T[1:5, ::2])
    np.testing.assert_array_equal(read_tensors(tmp_path / "a")["bfloat16"], rounded)


# ----------------------------------------------------------------------------------------------------------- memory

SHAPE = small_decoder(
    vocab_size=64, hidden_size=128, layers=12, heads=4, kv_heads=4, intermediate_size=192, context_length=32, rope_theta=10000.0,
    tied=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tensors(folder / "model.safetensors", initial_parameters(SHAPE, 0))
    write_json(folder / "config.json", to_hf(SHAPE))
    return folder


def most(work):
    """The result, and the most bytes that Python and numpy had at a time: what the array libraries keep does not count."""
    work()  # imports, compiled programs
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_no_host_copy_of_all_weights_exists_while_they_are_loaded_saved_and_restored(backend, checkpoint, tmp_path):
    whole = 4 * sum(math.prod(tensor.shape) for tensor in stored_weights(checkpoint).values())
    cls = registry().resolve("policy", "huggingface", backend.name)
    policy, peak = most(lambda: cls.load(checkpoint, backend))
    # JAX releases host arrays in threads, when these get to it: at worst all leaves are there, but no weights beside them.
    read = {"torch": 0.4, "jax": 1.5}[backend.name] * whole
    assert peak < read
    learner = backend.learner({"policy": policy}, {"policy": OptimizerConfig(learning_rate=1e-3)})
    assert most(lambda: learner.save(tmp_path))[1] < 0.4 * whole
    assert most(lambda: learner.restore(tmp_path))[1] < (read if backend.name == "torch" else 3 * read)  # of three trees
    assert most(lambda: policy.save(tmp_path / "policy"))[1] < 0.4 * whole
    assert (tmp_path / "policy" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_a_trainer_reads_sharded_state_and_a_policy_a_sharded_folder(backend, load, tmp_path, monkeypatch):
    policy = load()
    learner = backend.learner({"policy": policy}, {"policy": kit.ADAM})
    learner.save(tmp_path / "one")
    monkeypatch.setattr(weights, "SHARD", 20_000)
    learner.save(tmp_path / "several")
    policy.save(tmp_path / "policy")
    assert len(list((tmp_path / "several").glob("learner-*.safetensors"))) > 2
    assert read_json(tmp_path / "policy" / weights.INDEX)["weight_map"].keys() == policy.parameters().keys()
    again = type(policy).load(tmp_path / "policy", backend)
    for name, array in policy.parameters().items():
        np.testing.assert_array_equal(again.parameters()[name], array)
    monkeypatch.undo()
    other = backend.learner({"policy": load(1)}, {"policy": kit.ADAM})
    other.restore(tmp_path / "several")
    other.save(tmp_path / "again")
    assert (tmp_path / "again/learner.safetensors").read_bytes() == (tmp_path / "one/learner.safetensors").read_bytes()


def test_transformers_opens_a_sharded_policy(load, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(weights, "SHARD", 20_000)
    policy = load()
    policy.save(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    theirs = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    for name, array in policy.parameters().items():
        np.testing.assert_array_equal(theirs[name].detach().numpy(), array)
