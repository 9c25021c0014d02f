"""Adapters: against peft, against the merged checkpoint, and one backend against the other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from conftest import BACKENDS, relative
from lockstep.config.compose import compose
from lockstep.config.schema import parse
from lockstep.errors import CheckpointError, ConfigError
from lockstep.interfaces import Term
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.models import adapters
from lockstep.registry import registry
from lockstep.runs.experiment import Experiment
from lockstep.storage.files import read_json, write_json
from lockstep.text.sequences import pack
from lockstep_rlhf.algorithms.language_modelling import NextTokenLoss
from runs import TINY

NO_TOKENIZER = dict.fromkeys(("path", "eos_token", "pad_token", "chat_template"))
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h"],
    "phi3": ["qkv_proj", "gate_up_proj"],
}
"""The last three keep queries, keys and values in one matrix, each in its own way."""
ADAM = OptimizerConfig(1e-2, (0.9, 0.95), 1e-5, False, 0.0, None, None)
ROWS = pack([[3, 4, 5], [6, 7]], [[8, 9, 10, 11], [12, 13]], 0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints with weights as large as trained ones, so that every layer counts."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=41, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    llama = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=True))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    neox = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=41, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=64,
        )
    )  # fmt: skip
    phi3 = Phi3ForCausalLM(Phi3Config(**sizes, intermediate_size=48, max_position_embeddings=64, pad_token_id=0))
    folders = {}
    for name, model in (("llama", llama), ("gpt2", gpt2), ("gpt_neox", neox), ("phi3", phi3)):
        for parameter in model.parameters():
            parameter.data.mul_(5 if parameter.ndim > 1 else 1)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


@pytest.fixture(params=["llama", "gpt2"])
def base(request, bases) -> Path:
    return bases[request.param]


def lora(backend, base: Path, **changes):
    cls = registry().resolve("policy", "lora", backend.name)
    values = {"tokenizer": NO_TOKENIZER, "path": str(base), "rank": 4, "alpha": 8.0, "targets": TARGETS[family(base)]}
    return cls.create(parse(cls.Config, values | changes, "policy"), backend, None, 0)


def family(base: Path) -> str:
    return read_json(base / "config.json")["model_type"]


def load(backend, folder, name="lora"):
    return registry().resolve("policy", name, backend.name).load(folder, backend)


def other(backend):
    name = {"torch": "jax", "jax": "torch"}[backend.name]
    cls = registry().resolve("backend", name, name)
    return cls(parse(cls.Config, BACKENDS[cls.name], "backend"))


def logprobs(model) -> np.ndarray:
    return model.evaluate(ROWS, ["logprobs"])["logprobs"][ROWS.mask]


def logprobs_of_transformers(model) -> np.ndarray:
    tokens, mask = torch.tensor(ROWS.tokens).long(), torch.tensor(ROWS.attention_mask).long()
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model.eval()(input_ids=tokens, attention_mask=mask, position_ids=position).logits.log_softmax(-1)
    found = out[:, ROWS.prompt_length - 1 : -1].gather(-1, tokens[:, ROWS.prompt_length :, None])[..., 0]
    return found.numpy()[ROWS.mask]


def term() -> Term:
    return Term(NextTokenLoss(), ROWS, {"weights": (ROWS.mask / ROWS.mask.sum()).astype(np.float32)})


def train(backend, model, steps=3):
    learner = backend.learner({"policy": model}, {"policy": ADAM})
    return [learner.update([term()])["loss"] for _ in range(steps)]


def test_a_fresh_adapter_changes_nothing(backend, base):
    np.testing.assert_array_equal(logprobs(lora(backend, base)), logprobs(load(backend, base, "huggingface")))


def test_backends_start_from_the_same_adapter(backend, base):
    own, others = lora(backend, base).parameters(), lora(other(backend), base).parameters()
    assert own.keys() == others.keys()
    for name in own:
        np.testing.assert_array_equal(own[name], others[name])
    assert sorted({name.split(".")[-2] for name in own}) == ["lora_A", "lora_B"]


@pytest.mark.parametrize("family_", TARGETS)
def test_an_adapter_that_peft_wrote_gives_the_log_probabilities_that_peft_gives(backend, bases, family_, tmp_path):
    base = bases[family_]
    torch.manual_seed(1)
    settings = LoraConfig(
        r=4, lora_alpha=12, target_modules=TARGETS[family(base)], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    peft.save_pretrained(tmp_path)
    found = logprobs(load(backend, tmp_path))
    np.testing.assert_allclose(found, logprobs_of_transformers(peft), atol=1e-4)
    assert abs(found - logprobs(load(backend, base, "huggingface"))).max() > 0.1  # else it would prove nothing


@pytest.mark.parametrize("family_", TARGETS)
def test_what_is_trained_here_opens_in_peft_and_on_the_other_backend(backend, bases, family_, tmp_path):
    base = bases[family_]
    policy = lora(backend, base)
    losses = train(backend, policy)
    assert losses[-1] < losses[0]
    policy.save(tmp_path)
    own = logprobs(policy)
    np.testing.assert_array_equal(logprobs(load(backend, tmp_path)), own)
    np.testing.assert_allclose(logprobs(load(other(backend), tmp_path)), own, atol=1e-4)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    np.testing.assert_allclose(logprobs_of_transformers(peft), own, atol=1e-4)


def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule(backend, base, tmp_path):
    """W' = W + s B A, so dL/dB = s dL/dW' Aᵀ and dL/dA = s Bᵀ dL/dW', with dL/dW' of the merged checkpoint."""
    policy = lora(backend, base)
    train(backend, policy)  # B is no longer zero
    policy.save(tmp_path / "adapter")
    merged = load(backend, adapters.merge(tmp_path / "adapter", tmp_path / "merged"), "huggingface")
    whole = backend.learner({"policy": merged}, {"policy": ADAM}).gradients([term()])
    found = backend.learner({"policy": policy}, {"policy": ADAM}).gradients([term()])
    expected = {}
    for name, a in policy.parameters().items():
        if name.endswith("lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            weight = whole[f"policy.{layer}.weight"]
            weight = weight.T if family(base) == "gpt2" else weight
            b = policy.parameters()[f"{layer}.lora_B.weight"]
            expected[f"policy.{layer}.lora_A.weight"] = 2.0 * b.T @ weight
            expected[f"policy.{layer}.lora_B.weight"] = 2.0 * weight @ a.T
    assert found.keys() == expected.keys()
    assert relative(found, expected) < 1e-5


def test_the_merged_checkpoint_is_the_adapted_model_to_transformers_too(backend, base, tmp_path):
    policy = lora(backend, base)
    train(backend, policy)
    policy.save(tmp_path / "adapter")
    merged = adapters.merge(tmp_path / "adapter", tmp_path / "merged")
    np.testing.assert_allclose(
        logprobs_of_transformers(AutoModelForCausalLM.from_pretrained(merged)), logprobs(policy), atol=1e-4
    )


def test_all_adapters_share_one_trunk_that_training_leaves_alone(backend, base):
    policy = lora(backend, base)
    ref, critic = policy, policy.scalar_model(np.ones(32, np.float32))
    policy = policy.with_value_head()
    before, copied = logprobs(ref), policy.copy()
    train(backend, policy)
    assert abs(logprobs(policy) - before).max() > 1e-3
    for model in (ref, copied):
        np.testing.assert_array_equal(logprobs(model), before)
    trunks = [set(frozen(model)) for model in (ref, policy, copied, critic)]
    assert trunks[0] == trunks[1] == trunks[2] and trunks[3] <= trunks[0] and trunks[3]


def frozen(model) -> list[int]:
    """Where in memory the weights lie that are not trained."""
    if hasattr(model, "frozen"):
        import jax

        return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model.frozen)]
    return [tensor.data_ptr() for tensor in model.network.parameters() if not tensor.requires_grad]


def test_a_reward_model_on_an_adapter_opens_in_peft_and_on_the_other_backend(backend, base, tmp_path):
    policy = lora(backend, base)
    train(backend, policy)
    model = policy.scalar_model(np.random.default_rng(0).normal(size=32).astype(np.float32))
    model.save(tmp_path)
    scores = model.evaluate(ROWS, ["scores"])["scores"]
    for backend_ in (backend, other(backend)):
        again = registry().resolve("policy", "lora", backend_.name).load_scalar(tmp_path, backend_)
        np.testing.assert_allclose(again.evaluate(ROWS, ["scores"])["scores"], scores, atol=1e-4)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    merged = adapters.merge(tmp_path, tmp_path / "merged")
    row = ROWS.take(slice(0, 1))
    for found in (PeftModel.from_pretrained(classifier, tmp_path), AutoModelForSequenceClassification.from_pretrained(merged)):
        found.config.pad_token_id = 0
        with torch.no_grad():
            score = found.eval()(input_ids=torch.tensor(row.tokens[row.attention_mask]).long()[None]).logits[0, 0]
        assert float(score) == pytest.approx(float(scores[0]), abs=1e-4)


def test_a_learner_of_adapters_goes_on_bit_for_bit(backend, bases, tmp_path):
    policy = lora(backend, bases["llama"])
    learner = backend.learner({"policy": policy}, {"policy": ADAM})
    learner.update([term()])
    learner.save(tmp_path)
    expected = learner.update([term()])
    fresh = backend.learner({"policy": lora(backend, bases["llama"])}, {"policy": ADAM})
    fresh.restore(tmp_path)
    assert fresh.update([term()]) == expected
    assert len(load_file(tmp_path / "learner.safetensors")) == 3 * len(policy.parameters())  # nothing of the trunk


def test_generation_samples_from_the_adapted_model(backend, base):
    policy = lora(backend, base)
    train(backend, policy, 5)
    seeds = np.arange(12, dtype=np.uint32).reshape(2, 6)
    prompts = (ROWS.tokens[:, :3], ROWS.prompt_mask)
    drawn = policy.generate(*prompts, seeds, temperature=1.0, stop_ids=[], pad_id=0)
    rows = pack([[3, 4, 5], [6, 7]], drawn.tokens.tolist(), 0)
    scored = policy.evaluate(rows, ["logprobs"])["logprobs"]
    np.testing.assert_allclose(drawn.logprobs, scored, atol=1e-4)


def test_merging_a_folder_without_an_adapter_says_which_folder_to_name(bases, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no adapter: adapter_config.json is missing. Name the output folder"):
        adapters.merge(bases["llama"], tmp_path)


def test_a_target_that_is_no_layer_is_named_with_those_that_are(backend, bases):
    with pytest.raises(
        ConfigError, match=r"targets names 'q_prj', which .* does not have. Did you mean 'q_proj'\? .*down_proj, gate"
    ):
        lora(backend, bases["llama"], targets=["q_prj"])


@pytest.mark.parametrize(("key", "value"), [("use_dora", True), ("init_lora_weights", "pissa"), ("revision", "v2")])
def test_a_variant_of_lora_is_refused_by_name(backend, bases, tmp_path, key, value):
    lora(backend, bases["llama"]).save(tmp_path)
    settings = read_json(tmp_path / "adapter_config.json")
    write_json(tmp_path / "adapter_config.json", settings | {key: value})
    with pytest.raises(CheckpointError, match=f"uses {key}={value!r}, which is not supported"):
        load(backend, tmp_path)


def test_an_adapter_is_not_opened_as_a_whole_checkpoint(backend, base, tmp_path):
    """On torch transformers would open it, with every weight frozen: training would train nothing."""
    lora(backend, base).save(tmp_path)
    with pytest.raises(CheckpointError, match="holds an adapter, not a whole checkpoint.*lockstep merge"):
        load(backend, tmp_path, "huggingface")


def test_a_target_in_one_block_alone_is_refused(backend, bases):
    with pytest.raises(ConfigError, match="in every block or in none"):
        lora(backend, bases["llama"], targets=["layers.0.self_attn.q_proj"])


def test_an_adapter_of_another_shape_is_refused(backend, bases, tmp_path):
    lora(backend, bases["llama"]).save(tmp_path)
    settings = read_json(tmp_path / "adapter_config.json")
    write_json(tmp_path / "adapter_config.json", settings | {"target_modules": ["q_proj", "o_proj"]})
    with pytest.raises(CheckpointError, match="does not fit its base: .*lora_A"):
        load(backend, tmp_path)


def test_an_adapter_that_a_stage_begins_with_brings_its_base_into_the_stages_identity(bases, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(bases["llama"], base)
    adapter.mkdir()
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": str(base)})
    named = [*TINY, "experiment=demo", f"folder={tmp_path}", f"stages.ppo.policy={adapter}"]
    before = Experiment(compose(named)).identities
    (base / "model.safetensors").write_bytes(b"other weights")
    after = Experiment(compose(named)).identities
    assert before["ppo"]["folders"].keys() == {str(adapter), str(base)}
    assert [name for name in before if before[name]["folders"] != after[name]["folders"]] == ["ppo"]
