"""``backend.gradient_checkpointing``: the same gradients, with less kept for them."""

import dataclasses
import platform
import subprocess
import sys

import numpy as np
import pytest

from conftest import Data, configure, relative
from lockstep.interfaces import Context
from lockstep.registry import registry


def sft(backend, policy, tokenizer):
    cls, config = configure("sft", batch_size=12, dropout=0.1 if type(policy).__name__ == "Decoder" else 0.0)
    algorithm = cls(config, Context(0, backend, tokenizer, Data(), policy, None))
    return algorithm.learner, algorithm.next_terms(0)


def variants(backend):
    """The backend that keeps activations, and the one that computes them again."""
    return [type(backend)(dataclasses.replace(backend.config, gradient_checkpointing=again)) for again in (False, True)]


def test_gradients_are_the_same_and_less_is_kept(backend, folders, tokenizer):
    cls = registry().resolve("policy", "decoder", backend.name)
    found, kept = [], []
    for variant in variants(backend):
        learner, terms = sft(variant, cls.load(folders[0], variant), tokenizer)
        found.append(learner.gradients(terms))
        kept.append(kept_bytes(learner, terms))
    assert relative(*found) < 1e-6
    assert kept[1] < 0.6 * kept[0], kept


def kept_bytes(learner, terms) -> int:
    """What lies between the forward and the backward pass."""
    if learner.backend.name == "jax":
        import jax

        made = learner.forward(terms[0].sequences, ["logprobs"])
        return sum(array.nbytes for array in jax.tree.leaves(learner.kept[made].pullback))
    import torch

    sizes = {}
    record = lambda tensor: sizes.update({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()}) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        outputs = learner._forward(terms[0].sequences, ["logprobs"], 1.0)
    parameters = {p.untyped_storage().data_ptr() for p in learner.models["policy"].network.parameters()}
    assert outputs
    return sum(size for pointer, size in sizes.items() if pointer not in parameters)


def test_jax_compiles_deep_networks_as_a_loop(folders, tokenizer, monkeypatch):
    """Of the same layers, in a loop or one by one, gradients are the same."""
    jax = pytest.importorskip("jax")
    from lockstep_jax import backend, decoder, policies

    cpu = backend.JaxBackend(backend.JaxBackend.Config("cpu", "float32", gradient_checkpointing=False, compilation_cache=None))
    found, kept = [], []
    for limit in (decoder.SHALLOW, 1):
        monkeypatch.setattr(decoder, "SHALLOW", limit)
        jax.clear_caches()
        learner, terms = sft(cpu, policies.Decoder.load(folders[0], cpu), tokenizer)
        found.append(learner.gradients(terms))
        kept.append(kept_bytes(learner, terms))
    jax.clear_caches()
    assert relative(*found) < 1e-6
    assert kept[0] != kept[1], "one program twice"


@pytest.mark.parametrize("limit, again", [(1, True), (8, False)])
def test_jax_computes_again_in_deep_networks_unless_told(limit, again, folders, tokenizer, monkeypatch):
    jax = pytest.importorskip("jax")
    from lockstep_jax import backend, decoder, policies

    monkeypatch.setattr(decoder, "SHALLOW", limit)
    kept = []
    for chosen in (None, again, not again):
        jax.clear_caches()
        cpu = backend.JaxBackend(
            backend.JaxBackend.Config("cpu", "float32", gradient_checkpointing=chosen, compilation_cache=None)
        )
        kept.append(kept_bytes(*sft(cpu, policies.Decoder.load(folders[0], cpu), tokenizer)))
    jax.clear_caches()
    assert kept[0] == kept[1] != kept[2]


FAULTS = """
import ctypes, resource
from lockstep_jax.backend import JaxBackend
from lockstep_jax.device import keep_freed_memory

JaxBackend(JaxBackend.Config("cpu", "float32", gradient_checkpointing=None, compilation_cache=None))
keep_freed_memory()
libc, size = ctypes.CDLL(None), 256 * 2**20
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


LIBC, VERSION = platform.libc_ver()


@pytest.mark.skipif(LIBC != "glibc" or VERSION.split(".") < ["2", "35"], reason="elsewhere malloc has rules of its own")
def test_jax_keeps_freed_memory_for_the_next_call():
    pytest.importorskip("jax")
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    first, second = (int(line) for line in done.stdout.split())
    assert first > 1000 > second


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_networks_of_transformers_keep_their_dropout_off(family, tokenizer, tmp_path):
    """They checkpoint layers in training mode, in which their configuration's dropout would come to life."""
    pytest.importorskip("torch")
    import transformers

    dims = {"vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "attention_dropout": 0.5}
    gpt2 = {"vocab_size": 37, "n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}
    more = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
    opt = dims | {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.5, "max_position_embeddings": 64}
    keys = {"gpt2": gpt2, "gemma2": dims | more, "opt": opt}[family]
    config = transformers.AutoConfig.for_model(family, **keys)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    backend = registry().resolve("backend", "torch", "torch")
    cls = registry().resolve("policy", "huggingface", "torch")
    found, kept = [], []
    for again in (False, True):
        variant = backend(
            backend.Config(device="cpu", precision="float32", gradient_checkpointing=again, cuda_graphs=False, threads=1)
        )
        learner, terms = sft(variant, cls.load(tmp_path, variant), tokenizer)
        found.append(learner.gradients(terms))
        kept.append(kept_bytes(learner, terms))
        drawn = learner.models["policy"].generate(  # with a cache, which transformers drops where it checkpoints layers
            np.array([[1, 2, 3]], np.int32), np.ones((1, 3), bool), np.zeros((1, 4), np.uint32),
            temperature=0.0, stop_ids=[35], pad_id=36,
        )  # fmt: skip
        found.append({"tokens": drawn.tokens})
    assert relative(found[0], found[2]) < 1e-6
    np.testing.assert_array_equal(found[1]["tokens"], found[3]["tokens"])
    assert kept[1] < 0.6 * kept[0], kept
