"""GGUF files, written here with the gguf package alone, on both backends."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

gguf_format = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from conftest import ARCHITECTURE, BACKENDS, same  # noqa: E402
from lockstep.config.schema import parse  # noqa: E402
from lockstep.errors import CheckpointError  # noqa: E402
from lockstep.models.architecture import initial_parameters  # noqa: E402
from lockstep.registry import registry  # noqa: E402
from lockstep.runs import identity  # noqa: E402
from lockstep.storage import gguf, locks  # noqa: E402
from lockstep.storage.files import read_json  # noqa: E402
from lockstep.text.sequences import pack  # noqa: E402
from lockstep.text.tokenizer import Tokenizer, TokenizerConfig  # noqa: E402

A = ARCHITECTURE
LETTERS = [chr(ord("a") + i) for i in range(26)] + ["Ġ"]
TOKENS = [*LETTERS, "he", "hel", *[f"<{i}>" for i in range(A.vocab_size - 31)], "<s>", "</s>"]
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""Of llama.cpp: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, 'Standardized tensor names'."""


def llama_cpp(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module = name.removesuffix(".weight")
    if module in top:
        return f"{top[module]}.weight"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp turns neighbouring pairs of rows of a head, where Hugging Face's files turn halves of it."""
    return array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def write(path, parameters, *, blocks=A.layers, **more) -> None:
    writer = gguf_format.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(A.context_length)
    writer.add_embedding_length(A.hidden_size)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(A.intermediate_size)
    writer.add_head_count(A.heads)
    writer.add_head_count_kv(A.kv_heads)
    writer.add_layer_norm_rms_eps(A.norm_eps)
    writer.add_rope_freq_base(A.rope_theta)
    writer.add_rope_dimension_count(A.head_dim)
    writer.add_vocab_size(A.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in TOKENS])
    writer.add_token_merges(["h e", "he l"])
    writer.add_bos_token_id(TOKENS.index("<s>"))
    writer.add_eos_token_id(TOKENS.index("</s>"))
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    for key, value in more.items():
        writer.add_string(key.replace("__", "."), value)
    for name, array in parameters.items():
        if "q_proj" in name or "k_proj" in name:
            array = interleaved(array, A.heads if "q_proj" in name else A.kv_heads)
        if name.endswith("up_proj.weight"):
            kind = gguf_format.GGMLQuantizationType.Q8_0
            writer.add_tensor(llama_cpp(name), gguf_format.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(llama_cpp(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def parameters():
    """One matrix in 8 bits, as what these stand for; large enough to matter."""
    kind = gguf_format.GGMLQuantizationType.Q8_0
    found = {name: 10 * array if array.ndim == 2 else array for name, array in initial_parameters(A, 0).items()}
    coarse = {n: gguf_format.dequantize(gguf_format.quantize(a, kind), kind) for n, a in found.items() if "up_proj" in n}
    return found | coarse


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path, parameters):
    write(tmp_path / "tiny.gguf", parameters)
    return tmp_path / "tiny.gguf"


def test_a_gguf_file_is_a_policy_on_both_backends(file, parameters, cache, tmp_path):
    expected = {}
    for name, settings in BACKENDS.items():
        cls = registry().resolve("backend", name, name)
        backend = cls(parse(cls.Config, settings, "backend"))
        policy = registry().resolve("policy", "huggingface", name).load(file, backend)
        same(policy.parameters(), parameters)
        found = policy.evaluate(pack([[1, 2, 3], [4]], [[5, 6], [7, 8]], 0), ("logprobs",))["logprobs"]
        np.testing.assert_allclose(found, expected.setdefault("logprobs", found), atol=2e-5)
        policy.save(tmp_path / name)
        assert "quantization_config" not in read_json(tmp_path / name / "config.json")
    assert len(list(cache.glob("lockstep/gguf/*/config.json"))) == 1  # converted once


def test_a_gguf_file_brings_its_tokenizer(file):
    tokenizer = Tokenizer.load(file, TokenizerConfig(None, None, "<|pad|>", None))
    assert tokenizer.encode("hello") == [TOKENS.index("hel"), TOKENS.index("l"), TOKENS.index("o")]
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("</s>", "<s>")
    assert "m.content" in tokenizer.chat_template


def test_what_transformers_would_pass_over_is_refused(tmp_path, parameters):
    """Llama 3.1's rotation is a tensor of its own there; transformers reads the file without a word."""
    write(tmp_path / "scaled.gguf", parameters, llama__rope__scaling__type="yarn")
    with pytest.raises(CheckpointError, match="has rope.scaling.type=yarn, which transformers' GGUF reader ignores"):
        gguf.as_folder(tmp_path / "scaled.gguf")


def test_a_gguf_file_that_is_not_there_or_broken_is_said_so(tmp_path):
    with pytest.raises(CheckpointError, match="There is no file .*model.gguf. Download it first"):
        gguf.as_folder(tmp_path / "model.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="transformers cannot read .*cut.gguf"):
        gguf.as_folder(tmp_path / "cut.gguf")


def test_a_gguf_file_that_lacks_a_tensor_is_refused(tmp_path, parameters):
    """transformers would draw random numbers for it."""
    write(tmp_path / "lacks.gguf", {n: array for n, array in parameters.items() if "layers.1.mlp.down_proj" not in n})
    with pytest.raises(CheckpointError, match="is damaged: it has no tensors for model.layers.1.mlp.down_proj.weight"):
        gguf.as_folder(tmp_path / "lacks.gguf")
    write(tmp_path / "deep.gguf", parameters, blocks=10**7)
    with pytest.raises(CheckpointError, match="is damaged: it has llama.block_count=10000000 and 21 tensors of 17888 numbers"):
        gguf.as_folder(tmp_path / "deep.gguf")


def test_a_changed_gguf_file_is_another_input(file, parameters):
    before = identity.folder_digest(str(file)), gguf.as_folder(file)
    write(file, {name: 2 * array for name, array in parameters.items()})
    assert identity.folder_digest(str(file)) != before[0]
    assert gguf.as_folder(file) != before[1]


def test_a_gguf_file_that_several_processes_open_is_converted_once(file, monkeypatch):
    """The second begins while the first converts. It would replace the folder that the first already reads."""
    begun, second = threading.Event(), threading.Event()  # the second waits, or converts too
    made = []

    def convert(file, folder):
        made.append(folder)
        (second if begun.is_set() else begun).set()
        assert second.wait(60)
        folder.mkdir(parents=True)

    monkeypatch.setattr(gguf, "_convert", convert)
    monkeypatch.setattr(locks.log, "info", lambda *_: second.set())  # "waiting for process ..."
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(gguf.as_folder, file)
        assert begun.wait(60)
        assert pool.submit(gguf.as_folder, file).result() == first.result()
    assert made == [first.result()] and gguf.as_folder(file) == made[0]


def test_what_a_killed_conversion_left_is_no_part_of_the_next(file):
    folder = gguf.as_folder(file)
    names = {path.name for path in folder.iterdir()}
    left = folder.with_name(f".{folder.name}.part")
    folder.rename(left)
    (left / "model-00002-of-00002.safetensors").write_bytes(b"half")
    assert {path.name for path in gguf.as_folder(file).iterdir()} == names and not left.exists()


def test_what_is_not_installed_is_said_with_what_to_type(file, monkeypatch):
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(CheckpointError, match=r"Not installed: gguf. Type: pip install 'lockstep-rlhf\[gguf\]'"):
        gguf.as_folder(file)
