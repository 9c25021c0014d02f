"""A model family is one record in one file, and nothing else knows of it."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import ARCHITECTURE
from lockstep.errors import CheckpointError, RegistryError
from lockstep.models import architecture
from lockstep.models.architecture import (
    FAMILIES,
    causal_class,
    classifier_class,
    families,
    family_of,
    from_hf,
    initial_parameters,
    language_head,
    linear_layers,
    parameter_shapes,
    register,
    to_hf,
    usual_tensors,
)
from lockstep.storage.files import write_json
from lockstep.storage.weights import write_tensors

THIRD_PARTY = '''
"""Llama, with configuration keys and names of tensors of its own: fused, [inputs, outputs], under another root."""

from dataclasses import replace

from lockstep.models.architecture import QKV, Family, Naming
from lockstep.models.architecture.keys import decoder, write_decoder


def read(c):
    return decoder({**c, "hidden_size": c["width"]})


def write(a):
    config = write_decoder(a)
    return {"width": config.pop("hidden_size"), **config}


FAMILY = Family(
    model_type="mine",
    read=read,
    write=write,
    defaults={"hidden_act": "silu", "rope_theta": 100.0, "tie_word_embeddings": False},
    causal="MineLMHeadModel",
    classifier="MineForSequenceClassification",
    special="",
    refused="",
    naming=Naming(
        {"model": "trunk", "mlp.down_proj": "mlp.out", "lm_head": "unembed"}, fused={"attn.qkv": QKV}, transposed=True
    ),
    aliases={"old.": "trunk."},
    foreign=("vision.",),
)
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The record of a package that is not ours, registered for one test."""
    (tmp_path / "their_family.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(tmp_path)
    family = importlib.import_module("their_family").FAMILY
    register(family)
    yield family
    del FAMILIES["mine"], sys.modules["their_family"]


def config(**changes):
    sizes = {
        "vocab_size": 37, "width": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return {"model_type": "mine", **sizes, **changes}


def test_every_file_of_the_folder_is_a_family_of_its_name():
    files = {file.stem for file in Path(families.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == FAMILIES.keys() == {module.name for module in pkgutil.iter_modules(families.__path__)}
    assert all(name == family.model_type for name, family in FAMILIES.items())


def test_a_record_of_another_package_is_read_and_written(mine):
    found = from_hf(config())
    assert (found.family, found.hidden_size, found.heads, found.rope_theta, found.tied) == ("mine", 32, 4, 100.0, False)
    written = to_hf(found)
    assert (written["model_type"], written["architectures"], written["width"]) == ("mine", ["MineLMHeadModel"], 32)
    assert "hidden_size" not in written and from_hf(written) == found
    with pytest.raises(CheckpointError, match="No decoder for model_type 'yours'. Supported: .*llama, mine, mistral"):
        from_hf({"model_type": "yours"})


def test_a_record_of_another_package_names_its_tensors(mine):
    shapes = parameter_shapes(from_hf(config()))
    assert shapes["trunk.layers.1.attn.qkv.weight"] == (32, 32 + 16 + 16)  # queries, keys and values of [inputs, outputs]
    assert shapes["trunk.layers.0.mlp.out.weight"] == (48, 32)
    assert shapes["trunk.embed_tokens.weight"] == shapes["unembed.weight"] == (37, 32)
    assert linear_layers(from_hf(config()))["trunk.layers.0.mlp.out"] == (48, 32)
    assert language_head("mine") == "unembed.weight"


def test_names_of_older_files_foreign_tensors_and_tied_copies_are_sorted_out(mine):
    tied = from_hf(config(tie_word_embeddings=True))
    one = np.ones(1, np.float32)
    weights = {"old.norm.weight": one, "vision.norm.weight": one, "unembed.weight": one, "trunk.layers.0.attn.bias": one}
    assert usual_tensors(tied, weights) == {"trunk.norm.weight": one}
    assert "unembed.weight" in usual_tensors(from_hf(config()), weights)


def test_a_family_is_registered_once(mine):
    register(mine)
    with pytest.raises(RegistryError, match="A family 'mine' already exists. Registered: .*gpt2.*mine"):
        register(architecture.Family(**{**vars(mine), "special": "another"}))


def test_the_decoder_runs_a_family_of_another_package(mine, tmp_path):
    """With the weights of a Llama under the names of the other one, log-probabilities are that Llama's."""
    jax = pytest.importorskip("jax")
    from conftest import BACKENDS
    from lockstep.text.sequences import pack
    from lockstep_jax.backend import JaxBackend
    from lockstep_jax.policies import HuggingFace

    theirs, backend = from_hf(config()), JaxBackend(JaxBackend.Config(**BACKENDS["jax"]))
    weights = {name: 5 * array if array.ndim > 1 else array for name, array in initial_parameters(ARCHITECTURE, 0).items()}
    found = []
    for name, a in (("llama", ARCHITECTURE), ("mine", theirs)):
        tensors = family_of(a).naming.to_checkpoint(a, weights)
        assert {n: t.shape for n, t in tensors.items()} == parameter_shapes(a)
        write_json(tmp_path / name / "config.json", to_hf(a))
        write_tensors(tmp_path / name / "model.safetensors", tensors)
        rows = pack([[1, 2, 3], [4]], [[5, 6], [7, 8]], 0)
        policy = HuggingFace.load(tmp_path / name, backend)
        with jax.disable_jit():
            found.append(policy.evaluate(rows, ["logprobs"])["logprobs"])
        for key, array in policy.parameters().items():
            np.testing.assert_array_equal(array, tensors[key], err_msg=key)
    np.testing.assert_array_equal(*found)
    assert np.abs(found[0] - found[0].mean()).max() > 0.01


def test_a_checkpoint_of_a_family_without_a_record_keeps_its_class():
    opt = {"model_type": "opt", "architectures": ["OPTForCausalLM"]}
    assert (causal_class(opt), classifier_class(opt)) == ("OPTForCausalLM", "OPTForSequenceClassification")
    gpt = {"model_type": "openai-gpt", "architectures": ["OpenAIGPTLMHeadModel"]}
    assert (causal_class(gpt), classifier_class(gpt)) == ("OpenAIGPTLMHeadModel", "OpenAIGPTForSequenceClassification")
    scalar = {"model_type": "opt", "architectures": ["OPTForSequenceClassification"]}
    assert (causal_class(scalar), classifier_class(scalar)) == ("OPTForCausalLM", "OPTForSequenceClassification")
    assert causal_class({"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]}) == "GPT2LMHeadModel"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_fresh_projections_into_the_residual_stream_are_scaled_in_every_family(name):
    keys = ("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head")
    a = from_hf({"model_type": name, "vocab_size": 50, "intermediate_size": 256} | dict.fromkeys(keys[0], 64)
                | dict.fromkeys(keys[1], 8) | dict.fromkeys(keys[2], 4))  # fmt: skip
    common = family_of(a).naming.to_common(a, initial_parameters(a, 0))
    for layer, std in (("self_attn.o_proj", 0.02 / 4), ("mlp.down_proj", 0.02 / 4), ("mlp.up_proj", 0.02)):
        assert common[f"model.layers.3.{layer}.weight"].std() == pytest.approx(std, rel=0.1)


def test_the_table_in_the_documentation_is_made_of_the_records():
    made = subprocess.run([sys.executable, "-m", "lockstep.models.architecture"], capture_output=True, text=True, check=True)
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    assert made.stdout in page and len(made.stdout.splitlines()) == 2 + len(FAMILIES)
    assert page.count("| `model_type` |") == 1
