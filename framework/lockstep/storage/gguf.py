"""GGUF files (llama.cpp's, mostly quantised), opened as Hugging Face folders. transformers reads a file once and its weights
are cached in float32; the result is a checkpoint like any other, for every backend. The floats are the dequantised values,
so training continues from the quantised model.

transformers reads the sizes and some switches of such a file and silently ignores the other switches. The ignored ones are
compared here, and a file that relies on one of them is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockstep.errors import CheckpointError, listing
from lockstep.storage.files import expanded, move_folder, write_json
from lockstep.storage.locks import hold
from lockstep.storage.weights import write_tensors

COMPARED = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""GGUF keys that transformers may ignore, and the key of its configuration that each must agree with."""

NEUTRAL = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0, "use_parallel_residual": False}
"""The values that other keys must have, if present."""

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Llama 3.1's and Phi-3's scaled rotations, which transformers ignores."""


def as_folder(path: Path | str) -> Path | str:
    """The Hugging Face folder made from a GGUF file; any other path unchanged. If several processes ask for the same file, the
    first makes the folder and the others wait for it.

    Raises:
      CheckpointError: the file does not exist, or transformers cannot read it or would read it as a different model.
    """
    if not str(path).endswith(".gguf"):
        return path
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"There is no file {file}. Download it first: GGUF files are read from the local disk only.")
    folder = _cache() / f"{file.stem}-{_version(file)}"
    if not folder.exists():
        with hold(folder.with_name(f".{folder.name}")):  # the folder itself exists only when it is complete
            if not folder.exists():
                _convert(file, folder)
    return folder


def _cache() -> Path:
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lockstep" / "gguf"


def _version(file: Path) -> str:
    """Identifies the file's current content by path, size and time: hashing gigabytes can take longer than converting."""
    status = file.stat()
    return hashlib.sha256(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:12]


def _convert(file: Path, folder: Path) -> None:
    if missing := [name for name in ("torch", "transformers", "gguf") if importlib.util.find_spec(name) is None]:
        raise CheckpointError(
            f"{file} is a GGUF file; reading it needs torch, transformers and gguf. Not installed: {', '.join(missing)}. "
            "Type: pip install 'lockstep-rlhf[gguf]'"
        )
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        reader = gguf.GGUFReader(file)
        _check_sizes(file, reader)
        model, info = AutoModelForCausalLM.from_pretrained(**where, dtype="float32", output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except CheckpointError:
        raise
    except Exception as error:  # of many kinds: truncated, another architecture, no tokenizer
        raise CheckpointError(f"transformers cannot read {file}: {error}") from error
    if missing := sorted(info["missing_keys"]):  # transformers draws random numbers for them
        raise CheckpointError(f"{file} is damaged: it has no tensors for {listing(missing[:3])}. Download it again.")
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    _check(file, reader, config)
    config["architectures"] = [type(model).__name__]
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    tensors = {name: parameter.detach().float().numpy() for name, parameter in model.named_parameters()}
    write_tensors(temporary / "model.safetensors", tensors)
    write_json(temporary / "config.json", config)
    tokenizer.save_pretrained(temporary)
    move_folder(temporary, folder)


def _check_sizes(file: Path, reader: Any) -> None:
    """Raise CheckpointError for sizes that the file's tensors cannot have, before transformers builds modules of such sizes."""
    numbers = sum(int(tensor.n_elements) for tensor in reader.tensors)
    limits = {"block_count": len(reader.tensors), "embedding_length": numbers, "feed_forward_length": numbers}
    for name, field in reader.fields.items():
        limit = limits.get(name.partition(".")[2])
        if limit is not None and isinstance(size := field.contents(), int) and size > limit:
            raise CheckpointError(
                f"{file} is damaged: it has {name}={size} and {len(reader.tensors)} tensors of {numbers} numbers."
            )


def _check(file: Path, reader: Any, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the file and the configuration that transformers made from it disagree."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    family = reader.fields["general.architecture"].contents()
    understood = {key for key, name in GGUF_CONFIG_MAPPING.get(family, {}).items() if name is not None}
    said = {name.removeprefix(f"{family}."): field for name, field in reader.fields.items() if name.startswith(f"{family}.")}
    wrong = [tensor.name for tensor in reader.tensors if tensor.name in ROPE_TENSORS]
    for key in said.keys() - understood:
        expected = NEUTRAL[key] if key in NEUTRAL else _expected(config, key)
        if said[key].contents() != expected:
            wrong.append(f"{key}={said[key].contents()}")
    if wrong:
        raise CheckpointError(
            f"{file} has {', '.join(sorted(wrong))}, which transformers' GGUF reader ignores: it would open a different model. "
            "Use the model's Hugging Face checkpoint."
        )


def _expected(config: Mapping[str, Any], key: str) -> Any:
    if COMPARED.get(key) == "head_dim":
        return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return config.get(COMPARED.get(key, ""))
