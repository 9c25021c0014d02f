"""Damaged checkpoints and adapters, opened by what reads their files and by the policies of both backends."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from hostile import folders
from hostile.clear import only_clear_errors
from hostile.values import NUMBERS, damaged, damages, edited, edits
from lockstep.config.schema import parse
from lockstep.models import adapters
from lockstep.models.adapters import Adapter
from lockstep.models.architecture import from_hf, linear_layers
from lockstep.models.checkpoint import is_adapter
from lockstep.processes import ALONE
from lockstep.registry import registry
from lockstep.storage.files import read_json, write_json
from lockstep.storage.weights import read_tensors, read_weights, write_tensors
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Message

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@functools.cache
def sharded() -> Path:
    """The checkpoint in two shards with an index."""
    folder = shutil.copytree(folders.checkpoint(), folders.WORK / "sharded")
    tensors = read_tensors(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        write_tensors(folder / shard, {name: tensor for name, tensor in tensors.items() if shards[name] == shard})
    write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": shards})
    return folder


@functools.cache
def adapter() -> Path:
    folder = folders.WORK / "adapter"
    made = Adapter(str(folders.checkpoint()), 2, 4.0, ("q_proj", "v_proj"))
    shapes = made.shapes(linear_layers(folders.ARCHITECTURE))
    adapters.write(folder, made, shapes, adapters.initial(shapes, 0).__getitem__, ALONE, scalar=False)
    folders.tokenizer().save(folder)
    return folder


SOURCES: dict[str, Callable[[], Path]] = {"whole": folders.checkpoint, "sharded": sharded, "adapter": adapter}


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file as its header and its data."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def joined(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tree_of(file: Path) -> Any:
    return split(file.read_bytes())[0] if file.suffix == ".safetensors" else read_json(file)


Input = tuple[str, str, str, tuple[str, Any]]


def _harms(source: str) -> st.SearchStrategy[Input]:
    names = sorted(file.name for file in SOURCES[source]().iterdir())
    return st.sampled_from(names).flatmap(
        lambda name: st.tuples(
            st.sampled_from(("files", "tokenizer", "policies")),
            st.just(source),
            st.just(name),
            st.one_of(_ways(SOURCES[source]() / name)),
        )
    )


_LOOP = "{% for i in range(99999) %}"
TEMPLATES = (
    4 * _LOOP + "a" + 4 * "{% endfor %}", 4 * _LOOP + 4 * "{% endfor %}", "{{ 'a' * 10**10 }}", "{{ '%*d' % (10**10, 1) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages.__class__.__mro__ }}", "{{ raise_exception('\x1b[31m') }}",
    "{{ 1 / 0 }}", "{{ messages[9].content }}", "{{ nope() }}", "{{ eos_token.nope.nope }}", "{% include 'x' %}",
)  # fmt: skip
"""Chat templates that never end, need more memory than there is, or fail."""


def _ways(file: Path) -> list[st.SearchStrategy[tuple[str, Any]]]:
    """In which a file is harmed."""
    found = [st.tuples(st.just("bytes"), damages), st.sampled_from((("gone", None), ("folder", None)))]
    more = st.sampled_from(TEMPLATES) if file.name == "tokenizer_config.json" else st.sampled_from(NUMBERS)
    found += 2 * [st.tuples(st.just("tree"), edits(tree_of(file), more))]
    if file.suffix == ".safetensors":
        names = sorted(read_tensors(file))
        found += 2 * [
            st.tuples(st.sampled_from(sorted(OTHER)), st.lists(st.sampled_from(names), min_size=1, unique=True) | st.just(names))
        ]
    return found


OTHER: dict[str, Callable[[str, np.ndarray], dict[str, np.ndarray]]] = {
    "left out": lambda name, array: {},
    "module.": lambda name, array: {f"module.{name}": array},
    "_orig_mod.": lambda name, array: {f"_orig_mod.{name}": array},
    "without its first part": lambda name, array: {name.partition(".")[2]: array},
    "twice": lambda name, array: {name: array, f"{name}.copy": array},
    "wider": lambda name, array: {name: np.concatenate([array, array], axis=-1)},
    "flat": lambda name, array: {name: array.reshape(-1)},
    "as integers": lambda name, array: {name: array.astype(np.int8)},
    "empty": lambda name, array: {name: array[:0]},
}
"""Other tensors in place of one, in a file that is whole."""


INPUTS: st.SearchStrategy[Input] = st.deferred(lambda: st.sampled_from(sorted(SOURCES)).flatmap(_harms))


def harm(file: Path, what: str, how: Any) -> None:
    content = file.read_bytes()
    file.unlink()
    if what == "bytes":
        file.write_bytes(damaged(content, how))
    elif what == "tree" and file.suffix == ".safetensors":
        header, data = split(content)
        file.write_bytes(joined(edited(header, how), data))
    elif what == "tree":
        file.write_text(json.dumps(edited(json.loads(content), how)))
    elif what == "folder":
        file.mkdir()
    elif what in OTHER:
        file.write_bytes(content)
        tensors = read_tensors(file)
        changed = [OTHER[what](name, array) if name in how else {name: array} for name, array in tensors.items()]
        write_tensors(file, dict(itertools.chain.from_iterable(found.items() for found in changed)))


@functools.cache
def backend(name: str) -> Any:
    cls = registry().resolve("backend", name, name)
    keys = {"torch": {"threads": 1}, "jax": {"compilation_cache": None}}[name]
    return cls(parse(cls.Config, {"device": "cpu", **keys}, "backend"))


def check(given: Input) -> None:
    reader, source, name, (what, how) = given
    with tempfile.TemporaryDirectory(dir=folders.WORK) as temporary:
        folder = shutil.copytree(SOURCES[source](), Path(temporary) / "opened")
        harm(folder / name, what, how)
        if reader == "policies":
            for kind in ("torch", "jax"):
                with only_clear_errors():
                    opened(folder, kind)
        elif reader == "tokenizer":
            with only_clear_errors(folder.name, name, "policy.tokenizer", "chat template"):
                text(folder)
        else:
            with only_clear_errors(folder.name, name):
                stored(folder)
            with only_clear_errors():
                from_hf(read_json(folder / "config.json"))


def stored(folder: Path) -> dict[str, np.ndarray]:
    return adapters.read(folder)[1] if is_adapter(folder) else read_weights(folder)


def text(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    tokenizer.encode("Grass is green.")
    if tokenizer.chat_template is not None:
        tokenizer.render([Message("user", "Hi")], add_generation_prompt=True)


def opened(folder: Path, kind: str) -> None:
    """A policy that opens has the tensors that are stored: none is made up, changed or left out."""
    policy = registry().resolve("policy", "lora" if is_adapter(folder) else "huggingface", kind)
    found, there = policy.load(folder, backend(kind)).parameters(), stored(folder)
    found, there = ({bare(name): array for name, array in tensors.items()} for tensors in (found, there))
    assert found.keys() == there.keys(), f"tensors are made up or left out: {sorted(found.keys() ^ there.keys())[:3]}"
    assert all(np.array_equal(array, there[name], equal_nan=True) for name, array in found.items()), "tensors changed"


def bare(name: str) -> str:
    """A tensor's name without the prefixes that only say what it was saved from."""
    return re.sub(r"^((module|_orig_mod|base_model|model)\.)*", "", name)
