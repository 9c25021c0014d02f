"""Checkpoints that are damaged, do not fit their configuration or their tokenizer, or hold NaN: a clear error on both backends,
before a model is built. And what is saved stops in transformers."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers

from conftest import ARCHITECTURE, BACKENDS, WORDS, same
from lockstep.api.policies import ChatPolicy
from lockstep.api.sources import find
from lockstep.config.schema import parse
from lockstep.errors import CheckpointError, ConfigError, DataError
from lockstep.learning.randomness import token_seeds
from lockstep.models import adapters
from lockstep.models.architecture import initial_parameters, to_hf
from lockstep.models.checkpoint import describe, open_checkpoint
from lockstep.registry import registry
from lockstep.runs.assembly import Assembly, opener, save_result
from lockstep.storage.files import read_json, write_json
from lockstep.storage.weights import INDEX, read_tensors, write_tensors
from lockstep.text.encoding import Lengths
from lockstep.text.sequences import join, left_pad, pack
from lockstep.text.tokenizer import Tokenizer, TokenizerConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NAN, SCORE = np.full((37, 32), np.nan, np.float32), np.ones((1, 32), np.float32)
Tensors = dict[str, np.ndarray]
Change = Callable[[Path], object]


def write(folder: Path, *, tied: bool = False) -> Path:
    architecture = dataclasses.replace(ARCHITECTURE, tied=tied)
    write_tensors(folder / "model.safetensors", initial_parameters(architecture, 0))
    write_json(folder / "config.json", to_hf(architecture))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "model")


def policy_class(backend, name: str = "huggingface"):
    return registry().resolve("policy", name, backend.name)


# ----------------------------------------------------------------------------------------------------------- how to change one


def tensors(change: Callable[[Tensors], Tensors]) -> Change:
    return lambda folder: write_tensors(folder / "model.safetensors", change(read_tensors(folder / "model.safetensors")))


def prefixed(prefix: str) -> Change:
    return tensors(lambda weights: {prefix + name: array for name, array in weights.items()})


def without(part: str) -> Change:
    return tensors(lambda weights: {name: array for name, array in weights.items() if part not in name})


def bare(weights: Tensors) -> Tensors:
    return {name.removeprefix("model."): array for name, array in weights.items() if name != HEAD}


def config(**changes: Any) -> Change:
    def change(folder):  # by the library, which writes NaN as others may have
        (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | changes))

    return change


def text(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def bytes_of(change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / "model.safetensors").write_bytes(change((folder / "model.safetensors").read_bytes()))


def header(change: Callable[[Any], Any]) -> Change:
    def changed(file: bytes) -> bytes:
        (length,) = struct.unpack("<Q", file[:8])
        new = change(json.loads(file[8 : 8 + length]))
        content = new if isinstance(new, bytes) else json.dumps(new).encode()
        return struct.pack("<Q", len(content)) + content + file[8 + length :]

    return bytes_of(changed)


def record(**changes: Any) -> Change:
    return header(lambda content: content | {EMBEDDING: content[EMBEDDING] | changes})


def sharded(change: Callable[[dict[str, Any]], Any] = lambda index: index, lost: str = "") -> Change:
    def split(folder: Path) -> None:
        weights = read_tensors(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        places = {name: f"{number % 2}.safetensors" for number, name in enumerate(sorted(weights))}
        for shard in {*places.values()} - {lost}:
            write_tensors(folder / shard, {name: weights[name] for name, place in places.items() if place == shard})
        write_json(folder / INDEX, change({"metadata": {}, "weight_map": places}))

    return split


def place(file: Any) -> Change:
    return sharded(lambda index: index | {"weight_map": index["weight_map"] | {EMBEDDING: file}})


NAMES: dict[str, tuple[Change, str]] = {
    "torch.compile": (prefixed("_orig_mod."), r"missing: lm_head.weight, .* and 18 more; unused: _orig_mod.*torch.compile"),
    "DDP": (prefixed("module."), r"unused: module.lm_head.weight.*names begin with 'module.'.*DistributedDataParallel"),
    "peft": (prefixed("base_model.model."), r"unused: base_model.model.lm_head.weight, .*saved inside peft. Save the"),
    "another prefix": (prefixed("net."), r"missing: lm_head.weight, .*unused: net.lm_head.weight, .* and 18 more\.$"),
    "trunk only": (tensors(bare), r"do not fit its config.json: missing: lm_head.weight\.$"),
    "no MLP in a layer": (without("layers.1.mlp.up"), r"missing: model.layers.1.mlp.up_proj.weight\.$"),
    "more layers": (config(num_hidden_layers=1), r"unused: model.layers.1.input_layernorm.weight, .* and 6 more"),
    "fewer layers": (config(num_hidden_layers=3), r"missing: model.layers.2.input_layernorm.weight, .* and 6 more"),
    "transposed": (tensors(lambda w: w | {HEAD: w[HEAD].T}), r"lm_head.weight is \(32, 37\), not \(37, 32\)"),
    "a scalar head too": (tensors(lambda w: w | {"score.weight": SCORE}), r"unused: score.weight"),
    "stored twice": (tensors(lambda w: w | {"norm.weight": w["model.norm.weight"]}), r"model.norm.weight is stored twice, as"),
    "whole numbers": (tensors(lambda w: w | {HEAD: w[HEAD].astype(np.int32)}), r"numbers, unlike lm_head.weight \(I32\)"),
}  # fmt: skip
CONFIG: dict[str, tuple[Change, str]] = {
    "layers": (config(num_hidden_layers=10**7), r"has num_hidden_layers=10000000, but the weights beside it are only 21 tensors"),
    "vocabulary": (config(vocab_size=10**12), r"has vocab_size=1000000000000, but the weights beside it are only 17888 numbers"),
    "text": (config(hidden_size="32"), r"has hidden_size='32', which should be a whole number of at least 1"),
    "negative": (config(num_attention_heads=-4), r"has num_attention_heads=-4, which should be a whole number"),
    "null": (config(vocab_size=None), r"llama model holds a value of the wrong kind: vocab_size should be a whole number"),
    "heads": (config(num_key_value_heads=3), r"4 heads cannot share 3 keys and values evenly"),
    "no context": (config(max_position_embeddings=0), r"context_length should be a whole number of at least 1, not 0"),
    "epsilon": (config(rms_norm_eps=float("nan")), r"norm_eps should be a number above 0, not nan"),
    "theta": (config(rope_parameters={"rope_theta": 0}, rope_theta=0), r"rope_theta should be a number above 0, not 0.0"),
    "a list of ropes": (config(rope_scaling=[1]), r"holds a value of the wrong kind: 'list' object"),
    "text_config": (config(text_config="x"), r"config.json should hold an object under text_config, not 'x'"),
    "a list": (text("config.json", "[]"), r"config.json should hold a JSON object, but begins \[\]"),
    "empty": (text("config.json", ""), r"config.json cannot be read: Expecting value"),
    "deep": (text("config.json", "[" * 100_000), r"config.json cannot be read: it is nested too deeply"),
    "missing": (lambda folder: (folder / "config.json").unlink(), r"has no config.json, so it is not a Hugging Face checkpoint"),
    "an adapter": (text("adapter_config.json", "{}"), r"holds an adapter, not a whole checkpoint"),
}  # fmt: skip
FILES: dict[str, tuple[Change, str]] = {
    "truncated": (bytes_of(lambda file: file[:-10]), r"safetensors is truncated: its tensors end at byte \d+, the file at \d+"),
    "longer": (bytes_of(lambda file: file + b"1234"), r"model.safetensors is damaged: its tensors end at byte \d+, the file at"),
    "empty": (bytes_of(lambda file: b""), r"is not a readable safetensors file: its header would have 0 bytes, the file has 0"),
    "no header": (bytes_of(lambda file: file[:8]), r"its header would have \d+ bytes, the file has 8"),
    "endless header": (bytes_of(lambda file: b"\xff" * 8 + file[8:]), r"its header would have 18446744073709551615 bytes"),
    "no JSON": (header(lambda content: b"{" * 50), r"is not a readable safetensors file: Expecting property name"),
    "not UTF-8": (header(lambda content: b"\xff" * 50), r"is not a readable safetensors file: 'utf-8' codec"),
    "deep JSON": (header(lambda content: b"[" * 100_000), r"is not a readable safetensors file: maximum recursion depth"),
    "a list": (header(lambda content: [1]), r"its header is not a JSON object"),
    "metadata": (header(lambda content: content | {"__metadata__": {"format": 1}}), r"its __metadata__ should map texts to"),
    "a record that is none": (header(lambda content: content | {EMBEDDING: [1]}), rf"header describes '{EMBEDDING}' as \[1\]"),
    "dtype": (record(dtype="F8_E4M3"), rf"holds '{EMBEDDING}' as F8_E4M3, which is not supported. Supported: BF16, BOOL"),
    "shape": (record(shape=[2**62, 2**62]), r"has 4736 bytes, which are not a tensor of shape \(4611686018427387904, "),
    "negative shape": (record(shape=[-37, 32]), rf"its header describes '{EMBEDDING}' as "),
    "offsets": (record(data_offsets=[0]), rf"its header describes '{EMBEDDING}' as "),
    "overlap": (record(data_offsets=[0, 4736]), rf"'{EMBEDDING}' begins at byte \d+, not \d+"),
    "pickle": (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), r"pickled weights are not"),
    "NaN": (tensors(lambda w: w | {EMBEDDING: NAN, HEAD: NAN}), r"NaN or Inf in 2 of its tensors: lm_head.weight, model.embed"),
    "Inf in half": (tensors(lambda w: w | {HEAD: np.full((37, 32), np.inf, np.float16)}), r"NaN or Inf in 1 of its tensors"),
    "shard lost": (sharded(lost="1.safetensors"), r"lacks 1 of the 2 files in model.safetensors.index.json: 1.safetensors"),
    "no metadata": (sharded(lambda index: {"weight_map": index["weight_map"]}), r'has no metadata.*Add the key "metadata"'),
    "a list for a map": (sharded(lambda index: index | {"weight_map": [1]}), r"it has no weight_map from names of tensors"),
    "index of a list": (sharded(lambda index: [index]), r"index.json should hold a JSON object, but begins \[\{"),
    "outside": (place("../model.safetensors"), r"names the file '../model.safetensors'. Shards lie in the folder of their index"),
    "absolute": (place("/etc/passwd"), r"names the file '/etc/passwd'. Shards lie in the folder"),
    "a number for a file": (place(3), r"it has no weight_map from names of tensors to files"),
    "a name too many": (
        sharded(lambda index: index | {"weight_map": index["weight_map"] | {"other": "0.safetensors"}}),
        r"the files that it names do not hold other",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [*NAMES, *CONFIG, *FILES])
def test_a_checkpoint_that_is_damaged_or_does_not_fit_is_refused_on_both_backends(backend, folder, case):
    change, message = (NAMES | CONFIG | FILES)[case]
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        policy_class(backend).load(folder, backend)


# -------------------------------------------------------------------------------------------------- what is legitimate opens

AS_IT_WAS: dict[str, Change] = {
    "shards": sharded(),
    "buffers of old versions": tensors(lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}),
    "64 bits": tensors(lambda w: {name: array.astype(np.float64) for name, array in w.items()}),
    "a pad token without a row": config(pad_token_id=37),
    "Llama 1's pad token": config(pad_token_id=-1),
    "other token ids": config(bos_token_id=1, eos_token_id=[2, 3]),
    "notes of the writer": header(lambda content: content | {"__metadata__": {"format": "pt", "by": "me"}}),
}


@pytest.mark.parametrize("case", AS_IT_WAS)
def test_checkpoints_with_harmless_differences_open(backend, folder, case):
    expected = read_tensors(folder / "model.safetensors")
    AS_IT_WAS[case](folder)
    same(policy_class(backend).load(folder, backend).parameters(), expected)


def test_a_trunk_saved_alone_is_a_whole_model_where_the_head_is_tied(backend, tmp_path):
    folder = write(tmp_path, tied=True)
    expected = read_tensors(folder / "model.safetensors")
    tensors(bare)(folder)
    same(policy_class(backend).load(folder, backend).parameters(), expected)


def test_a_tied_head_is_a_copy_of_the_embedding_or_an_error(backend, tmp_path):
    folder = write(tmp_path, tied=True)
    tensors(lambda w: w | {HEAD: w[EMBEDDING]})(folder)
    assert HEAD not in policy_class(backend).load(folder, backend).parameters()
    tensors(lambda w: w | {HEAD: w[EMBEDDING] + 1})(folder)
    with pytest.raises(
        CheckpointError, match=f"has tie_word_embeddings=true, but {HEAD} differs from {EMBEDDING}. Set it to false"
    ):
        policy_class(backend).load(folder, backend)


def scored(weights: Tensors, **more: np.ndarray) -> Tensors:
    return {name: array for name, array in weights.items() if name != HEAD} | {"score.weight": SCORE} | more


@pytest.mark.parametrize("policy", ["huggingface", "decoder"])
def test_a_scalar_model_needs_its_trunk_and_its_head_and_nothing_else(backend, folder, policy):
    load = lambda: policy_class(backend, policy).load_scalar(folder, backend)  # noqa: E731
    with pytest.raises(CheckpointError, match="has no reward model: score.weight is missing"):
        load()
    weights = read_tensors(folder / "model.safetensors")
    for good in (scored(weights), scored(weights, **{HEAD: weights[HEAD]}), bare(scored(weights))):
        write_tensors(folder / "model.safetensors", good)
        assert load().supplies == {"values", "scores"}
    lacks = {name: array for name, array in scored(weights).items() if name != "model.layers.0.mlp.down_proj.weight"}
    for bad, message in (
        (lacks, "missing: model.layers.0.mlp.down_proj.weight"),
        (scored(weights, **{"v_head.weight": SCORE}), "unused: v_head.weight"),
        (scored(weights, **{"score.weight": np.ones((3, 32), np.float32)}), "has num_labels=3"),
        (scored(weights, **{"score.weight": np.ones((1, 16), np.float32)}), r"score.weight is \(1, 16\), not \(1, 32\)"),
        (scored(weights, **{"score.weight": SCORE * np.nan}), "NaN or Inf in 1 of its tensors: score.weight"),
    ):
        write_tensors(folder / "model.safetensors", bad)
        with pytest.raises(CheckpointError, match=message):
            load()


def test_a_family_without_a_record_is_compared_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    backend_class = registry().resolve("backend", "torch", "torch")
    backend = backend_class(parse(backend_class.Config, BACKENDS["torch"], "backend"))
    sizes = {"vocab_size": 37, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2}
    settings = transformers.OPTConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)
    transformers.OPTForCausalLM(settings).save_pretrained(tmp_path)
    load = lambda: policy_class(backend).load(tmp_path, backend)  # noqa: E731
    assert load().vocab_size == 37
    weights = read_tensors(tmp_path / "model.safetensors")
    name = "model.decoder.layers.1.fc1.weight"
    for change, message in (
        (without(name), f"do not fit its config.json: missing: {name}"),
        (prefixed("module."), "missing: .*; unused: module.*saved inside DistributedDataParallel"),
        (tensors(lambda w: w | {name: w[name].T.copy()}), rf"{name} is \(16, 24\), not \(24, 16\)"),
        (config(num_hidden_layers=1), "unused: model.decoder.layers.1"),
        (config(num_hidden_layers=10**7), "has num_hidden_layers=10000000, but the weights beside it are only"),
    ):
        change(tmp_path)
        with pytest.raises(CheckpointError, match=message):
            load()
        write_tensors(tmp_path / "model.safetensors", weights)
    write_json(tmp_path / "config.json", {"model_type": "opt", "hidden_size": 16})
    with pytest.raises(CheckpointError, match="cannot be opened as a checkpoint|do not fit its config.json"):
        load()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Granite", {"logits_scaling": 8.0}),
        ("Cohere", {"logit_scale": 0.0625}),
        ("Cohere", {"logit_scale": 2.0}),
        ("StableLm", {}),
    ],
)  # fmt: skip
def test_logits_are_scaled_as_the_family_scales_them(family, changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    backend_class = registry().resolve("backend", "torch", "torch")
    backend = backend_class(parse(backend_class.Config, BACKENDS["torch"], "backend"))
    sizes = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = getattr(transformers, f"{family}Config")(
        **sizes, num_key_value_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0, **changes
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(settings).eval()
    for parameter in theirs.parameters():
        parameter.data.mul_(10)
    theirs.save_pretrained(tmp_path)
    policy = policy_class(backend).load(tmp_path, backend)
    tokens = np.arange(3, 11, dtype=np.int32)[None]
    rows = join(tokens[:, :3], np.ones((1, 3), bool), tokens[:, 3:], np.ones((1, 5), bool))
    ours = policy.evaluate(rows, ["logprobs"])["logprobs"]
    logprobs = theirs(torch.as_tensor(tokens).long()).logits.log_softmax(-1)[0].detach()
    expected = [float(logprobs[t - 1, tokens[0, t]]) for t in range(3, 8)]
    np.testing.assert_allclose(ours[0], expected, atol=1e-4)


def test_logits_that_are_computed_in_an_unknown_way_are_refused(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    backend_class = registry().resolve("backend", "torch", "torch")
    backend = backend_class(parse(backend_class.Config, BACKENDS["torch"], "backend"))
    sizes = {"vocab_size": 37, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 1}
    cls = transformers.OPTForCausalLM
    cls(transformers.OPTConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)).save_pretrained(tmp_path)
    forward = cls.forward

    def squared(self, *given, **how):
        found = forward(self, *given, **how)
        found.logits = found.logits**2
        return found

    monkeypatch.setattr(cls, "forward", squared)
    with pytest.raises(CheckpointError, match="logits of this opt are computed in a way that Lockstep does not know"):
        policy_class(backend).load(tmp_path, backend)


def saved(model_type, folder, **settings):
    """Save a small causal language model of transformers with random weights."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=37, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(10 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("phi3", {"max_position_embeddings": 64, "original_max_position_embeddings": 16,
                  "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}}),
        ("llama", {"max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    ],
)  # fmt: skip
def test_within_the_context_a_row_does_not_depend_on_how_long_its_neighbours_are(model_type, settings, tmp_path):
    backend_class = registry().resolve("backend", "torch", "torch")
    backend = backend_class(parse(backend_class.Config, BACKENDS["torch"], "backend"))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    saved(model_type, tmp_path, **sizes, num_key_value_heads=2, **settings)
    policy = policy_class(backend).load(tmp_path, backend)
    assert policy.context_length == 16
    found = []
    for length in (1, policy.context_length - 3, policy.context_length - 2):
        rows = pack([[3, 4, 5], [6, 7, 8]], [[9, 10, 11], [12] * length], 0)
        found.append(policy.evaluate(rows, ["logprobs"])["logprobs"][0, :3])
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    assert np.abs(found[2] - found[0]).max() > 1e-3
    with pytest.raises(ConfigError, match="12 \\+ 5 exceeds the policy's context of 16 tokens"):
        Lengths(12, 5).check(policy.context_length)


@pytest.mark.parametrize(
    ("model_type", "settings", "context"),
    [
        ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 4}, sys.maxsize),
        ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 4, "seq_length": 24}, 24),
        ("mpt", {"d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 48}, 48),
    ],
)
def test_a_context_is_read_under_each_of_its_names(model_type, settings, context, tmp_path):
    backend_class = registry().resolve("backend", "torch", "torch")
    backend = backend_class(parse(backend_class.Config, BACKENDS["torch"], "backend"))
    saved(model_type, tmp_path, **settings)
    policy = policy_class(backend).load(tmp_path, backend)
    assert policy.context_length == context
    prompts, how = left_pad([[3, 4, 5], [6]], 0, 3), {"temperature": 1.0, "stop_ids": [], "pad_id": 0}
    drawn = policy.generate(*prompts, token_seeds(0, "sampling", 0, 2, 4), **how)
    scored = policy.evaluate(join(*prompts, drawn.tokens, drawn.mask), ["logprobs"])["logprobs"]
    np.testing.assert_allclose(drawn.logprobs, scored, atol=1e-4)


def test_a_model_without_keys_and_values_is_refused(tmp_path):
    backend_class = registry().resolve("backend", "torch", "torch")
    backend = backend_class(parse(backend_class.Config, BACKENDS["torch"], "backend"))
    saved("mamba", tmp_path, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match="cannot sample from this mamba: .* Take a model with attention"):
        policy_class(backend).load(tmp_path, backend)


def test_headers_alone_say_how_many_rows_the_embedding_has(folder):
    assert describe(folder).rows == 37
    tensors(lambda w: w | {EMBEDDING: NAN})(folder)
    assert describe(folder).rows == 37  # the numbers are not read
    with pytest.raises(CheckpointError, match="NaN"):
        open_checkpoint(folder)


# ------------------------------------------------------------------------------------------------------------------- adapters


def lora(backend, base: Path):
    cls = policy_class(backend, "lora")
    nothing = dict.fromkeys(("path", "eos_token", "pad_token", "chat_template"))
    values = {"tokenizer": nothing, "path": str(base), "rank": 2, "alpha": 4.0, "targets": ["q_proj"]}
    return cls.create(parse(cls.Config, values, "policy"), backend, None, 0)


ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 10**9}, r"has r=1000000000, but .*lora_A.weight is \(2, 32\)"),
    "no rank": ({"r": None}, r"adapter_config.json is damaged: it has r=None"),
    "truth value": ({"r": True}, r"it has r=True"),
    "base": ({"base_model_name_or_path": ["x"]}, r"it has base_model_name_or_path=\['x'\]"),
    "targets": ({"target_modules": [1]}, r"uses target_modules=\[1\], which is not supported"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_a_damaged_adapter_is_refused(backend, folder, tmp_path, case):
    lora(backend, folder).save(tmp_path / "adapter")
    changes, message = ADAPTERS[case]
    file = tmp_path / "adapter" / "adapter_config.json"
    write_json(file, read_json(file) | changes)
    with pytest.raises(CheckpointError, match=message):
        policy_class(backend, "lora").load(tmp_path / "adapter", backend)


def test_an_adapter_with_nan_or_on_a_damaged_base_is_refused(backend, folder, tmp_path):
    adapter = tmp_path / "adapter"
    lora(backend, folder).save(adapter)
    weights = read_tensors(adapter / "adapter_model.safetensors")
    write_tensors(adapter / "adapter_model.safetensors", {name: array * np.nan for name, array in weights.items()})
    for read in (
        lambda: policy_class(backend, "lora").load(adapter, backend),
        lambda: adapters.merge(adapter, tmp_path / "merged"),
    ):
        with pytest.raises(CheckpointError, match="The adapter in .* holds NaN or Inf in 4 of its tensors"):
            read()
    write_tensors(adapter / "adapter_model.safetensors", weights)
    prefixed("module.")(folder)
    backend.trunks.clear()
    with pytest.raises(CheckpointError, match="unused: module."):
        policy_class(backend, "lora").load(adapter, backend)


# --------------------------------------------------------------------------------------------------------------- token ids


def words(*more: str, special: tuple[str, ...] = ("<stop>",)) -> tokenizers.Tokenizer:
    """The 34 words, <eos> and <stop>, then ``more``."""
    known = {word: i for i, word in enumerate([*WORDS, "<eos>", "<stop>", *more])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(known))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(list(special))
    return core


def tokenizer_of(core: tokenizers.Tokenizer, **changes: Any) -> Tokenizer:
    return Tokenizer(core, **{"eos_token": "<stop>", "pad_token": None, "chat_template": None} | changes)


def test_tokens_outside_the_embedding_are_named_at_once():
    tokenizer_of(words("w34")).check_embedding(37, "the policy 'new'")
    with pytest.raises(
        ConfigError, match=r"does not fit the policy 'new': .* embedding of 37 rows: 'w35' \(37\), 'w36' \(38\)\. Use"
    ):
        tokenizer_of(words("w34", "w35", "w36")).check_embedding(37, "the policy 'new'")
    with pytest.raises(
        ConfigError, match=r"'x5' \(41\) and 59 more\. Use the tokenizer that the model was trained with, or give"
    ):
        tokenizer_of(words(*(f"x{i}" for i in range(65)))).check_embedding(37, "the policy")
    added = words("w34")
    added.add_tokens(["<think>"])
    with pytest.raises(ConfigError, match=r"'<think>' \(37\)"):
        tokenizer_of(added).check_embedding(37, "the policy")


@pytest.mark.parametrize(
    "changes", [{"eos_token": "<image>"}, {"bos_token": "<image>"}, {"chat_template": "{{ '<image>' + messages[0].content }}"}]
)
def test_a_special_token_that_lockstep_writes_needs_a_row(changes):
    with pytest.raises(ConfigError, match=r"'<image>' \(37\)"):
        tokenizer_of(words("w34", "<image>", special=("<stop>", "<image>")), **changes).check_embedding(37, "the policy")


def test_a_special_token_that_no_text_spells_needs_none_and_a_text_that_spells_it_is_refused():
    """Gemma 3's text models have no row for the token of images that their tokenizer has."""
    tokenizer = tokenizer_of(words("w34", "<image>", special=("<stop>", "<image>")))
    tokenizer.check_embedding(37, "the policy")
    assert tokenizer.encode("w1 w2") == [1, 2]
    for encode in (lambda: tokenizer.encode("w1 <image>"), lambda: tokenizer.encode_many(["w1", "<image> w2"])):
        with pytest.raises(DataError, match="spells '<image>', whose id 37 lies outside the model's embedding of 37 rows"):
            encode()


def test_ids_may_have_gaps():
    """As many tokens as rows, and still one outside; and the pad token gets an id that no token has."""
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<stop>": 1, "b": 5}))
    gapped = tokenizer_of(core)
    assert (gapped.vocab_size, gapped.pad_id, gapped.decode([5])) == (6, 6, "b")
    with pytest.raises(ConfigError, match=r"embedding of 3 rows: 'b' \(5\)"):
        gapped.check_embedding(3, "the policy")
    with pytest.raises(ConfigError, match="has 2 tokens with ids up to 2147483648: tokenizer.json is damaged"):
        tokenizer_of(tokenizers.Tokenizer(tokenizers.models.WordLevel({"<stop>": 0, "a": 2**31})))


def test_a_pad_token_outside_the_embedding_is_accepted_and_never_saved(load, backend, tmp_path):
    core = words("w34", "<pad>", special=("<stop>", "<pad>"))
    for number, pad in enumerate(("<pad>", "<|pad|>")):
        save_result(tmp_path / str(number), load(), tokenizer_of(core, pad_token=pad), "policy", "decoder")
        assert read_json(tmp_path / str(number) / "tokenizer_config.json")["pad_token"] is None
        for name in ("config.json", "generation_config.json"):
            assert read_json(tmp_path / str(number) / name)["pad_token_id"] is None
        assert Tokenizer.load(tmp_path / str(number)).pad_token == "<|pad|>"


def test_every_way_to_a_policy_compares(load, backend, tmp_path, tokenizer):
    wide = tokenizer_of(words("w34", "w35"))
    with pytest.raises(ConfigError, match=r"does not fit the policy: .*'w35' \(37\)"):
        ChatPolicy(load(), wide, backend, "decoder")
    with pytest.raises(ConfigError, match=r"does not fit the policy: .*'w35' \(37\)"):
        save_result(tmp_path, load(), wide, "policy", "decoder")


def test_a_stage_compares_the_models_that_it_reads(folder, backend, tokenizer, tmp_path):
    """As a run has them, `Assembly` proper, without its experiment."""
    assembly = Assembly(SimpleNamespace(backend_name=backend.name, stages={}), {"sft": folder, "reward": tmp_path / "reward"})
    assembly.__dict__ |= {"backend": backend, "tokenizer": tokenizer_of(words("w34", "w35"))}
    with pytest.raises(ConfigError, match=r"does not fit the policy 'sft': .*'w35' \(37\)"):
        assembly.policy("sft")
    write_tensors(tmp_path / "reward" / "model.safetensors", scored(read_tensors(folder / "model.safetensors")))
    write_json(tmp_path / "reward" / "config.json", read_json(folder / "config.json"))
    tokenizer.save(tmp_path / "reward")
    assert assembly.scalar_model("reward")[1].eos_token == "<stop>"
    assembly.tokenizer.save(tmp_path / "reward")
    with pytest.raises(ConfigError, match=r"does not fit the reward model 'reward': .*'w35' \(37\)"):
        assembly.scalar_model("reward")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "output.json is not .*: it is .*not an object"),
        ('{"policy": "decoder"}', "output.json is not .*: kind is missing"),
        ('{"kind": "policy", "policy": 3}', "output.json is not .*: policy is 3, not text"),
    ],
)
def test_a_damaged_note_of_what_an_output_is_is_refused(folder, content, message):
    (folder / "output.json").write_text(content)
    for read in (lambda: find(folder, "policy"), lambda: opener(folder, "torch")):
        with pytest.raises(CheckpointError, match=message):
            read()


def test_nan_is_not_saved(load, tokenizer, tmp_path):
    model = load().scalar_model(np.full(32, np.nan, np.float32))
    with pytest.raises(
        CheckpointError, match="The reward model that should be saved holds NaN or Inf in 1 of its tensors: score.weight"
    ):
        save_result(tmp_path / "output", model, tokenizer, "reward_model", "decoder")
    assert not (tmp_path / "output").exists()


BROKEN: dict[str, tuple[str, str, str]] = {
    "empty tokenizer": ("tokenizer.json", "", "tokenizer.json is not a tokenizer of the tokenizers library: "),
    "no object": ("tokenizer.json", "[]", "tokenizer.json is not a tokenizer of the tokenizers library: "),
    "no model": ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer of the tokenizers library: "),
    "a list": ("tokenizer_config.json", "[1]", r"tokenizer_config.json should hold a JSON object, but begins \[1\]"),
    "empty settings": ("tokenizer_config.json", "", "tokenizer_config.json cannot be read"),
    "EOS is a number": ("tokenizer_config.json", '{"eos_token": 2}', "has eos_token=2, which should be a text"),
    "EOS is a list": ("tokenizer_config.json", '{"eos_token": ["a"]}', r"has eos_token=\['a'\], which should be a text"),
    "content is a number": ("tokenizer_config.json", '{"eos_token": {"content": 3}}', "has eos_token=.*, which should be a text"),
    "template is a number": (
        "tokenizer_config.json", '{"eos_token": "<stop>", "chat_template": 5}', "has a chat_template that is not a text: 5",
    ),
    "templates are texts": (
        "tokenizer_config.json", '{"eos_token": "<stop>", "chat_template": ["x"]}', "has a chat_template that is not a text",
    ),
    "generation": ("generation_config.json", "[1]", "generation_config.json should hold a JSON object"),
    "stop tokens are texts": ("generation_config.json", '{"eos_token_id": ["a"]}', r"has eos_token_id=\['a'\], which should be"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_tokenizer_is_a_clear_error(tokenizer, tmp_path, case):
    tokenizer.save(tmp_path)
    name, content, message = BROKEN[case]
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(tmp_path)


# --------------------------------------------------------------------------------------------------- it stops in transformers

PROMPT = [3, 4, 5]


def greedy(folder: Path) -> list[int]:
    """What transformers' own generate answers, with nothing but what the folder says."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([PROMPT])
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)[0, len(PROMPT) :].tolist()


def stop_at(folder: Path, tokenizer: Tokenizer, count: int) -> tuple[list[int], str]:
    """The first few tokens of the greedy answer, up to a token that has not come before, and that token."""
    answer = greedy(folder)
    end = next(n for n in range(count, 20) if answer[n] not in answer[:n])
    return answer[: end + 1], tokenizer.core.id_to_token(answer[end])


def test_a_saved_policy_stops_in_transformers_at_the_tokenizers_eos(load, backend, tokenizer, folders, tmp_path):
    expected, word = stop_at(folders[0], tokenizer, 1)
    own = Tokenizer(tokenizer.core, eos_token=word, pad_token="<pad>", chat_template=None, bos_token="w1")
    save_result(tmp_path / "one", load(), own, "policy", "decoder")
    assert greedy(tmp_path / "one") == expected
    ids = {"bos_token_id": 1, "eos_token_id": expected[-1], "pad_token_id": 36}
    assert read_json(tmp_path / "one" / "generation_config.json") == ids
    assert read_json(tmp_path / "one" / "config.json").items() >= ids.items()


def test_a_source_with_several_stop_tokens_keeps_them(load, backend, tokenizer, folders, tmp_path):
    expected, word = stop_at(folders[0], tokenizer, 1)
    tokenizer.save(tmp_path / "source")
    write_json(tmp_path / "source" / "generation_config.json", {"eos_token_id": [expected[-1], 35, 99], "temperature": 0.6})
    own = Tokenizer.load(tmp_path / "source", TokenizerConfig(None, "<eos>", None, None))
    save_result(tmp_path / "saved", load(), own, "policy", "decoder")
    assert read_json(tmp_path / "saved" / "generation_config.json")["eos_token_id"] == [34, expected[-1], 35]  # 99 has no row
    assert greedy(tmp_path / "saved") == expected
    assert Tokenizer.load(tmp_path / "saved").eos_ids == (34, expected[-1], 35)


def test_a_merged_adapter_stops_in_transformers_and_has_a_tokenizer(backend, tokenizer, folders, tmp_path):
    expected, word = stop_at(folders[0], tokenizer, 1)
    own = Tokenizer(tokenizer.core, eos_token=word, pad_token="<pad>", chat_template="{{ messages[0].content }}")
    save_result(tmp_path / "adapter", lora(backend, folders[0]), own, "policy", "lora")
    merged = adapters.merge(tmp_path / "adapter", tmp_path / "merged")
    assert greedy(merged) == expected
    assert Tokenizer.load(merged).eos_token == word
    assert read_json(merged / "config.json")["eos_token_id"] == expected[-1]


def test_merging_keeps_a_template_in_a_file_and_files_that_are_not_text(backend, tokenizer, folders, tmp_path):
    lora(backend, folders[0]).save(tmp_path / "adapter")
    tokenizer.save(tmp_path / "adapter")
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "adapter" / "tokenizer.model").write_bytes(b"\xff\x00")
    merged = adapters.merge(tmp_path / "adapter", tmp_path / "merged")
    assert Tokenizer.load(merged).chat_template == "{{ messages }}"
    assert (merged / "tokenizer.model").read_bytes() == b"\xff\x00"


def test_json_has_null_for_what_is_not_finite(tmp_path):
    write_json(tmp_path / "a.json", {"mean": float("nan"), "rows": [float("inf"), 1.5, (np.float64("-inf"), 2, "x", None, True)]})
    strict = lambda text: pytest.fail(f"{text} is not JSON")  # noqa: E731
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=strict)
    assert found == {"mean": None, "rows": [None, 1.5, [None, 2, "x", None, True]]}
