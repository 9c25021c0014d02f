"""The decoder on JAX against transformers' own modules, family by family and switch by switch.

Weights are as large as trained ones, gains are not 1 and biases not 0: small weights hide mistakes in softcaps, eps and
activations. Tolerance is 1e-4 on logits, of a few units to some tens.
"""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from conftest import same  # noqa: E402
from lockstep.config.schema import parse  # noqa: E402
from lockstep.errors import CheckpointError  # noqa: E402
from lockstep.learning import randomness  # noqa: E402
from lockstep.learning.turns import Turns  # noqa: E402
from lockstep.models.architecture import FAMILIES, check_shapes, from_hf, parameter_shapes, scalar_head, to_hf  # noqa: E402
from lockstep.registry import registry  # noqa: E402
from lockstep.storage.files import read_json, write_json  # noqa: E402
from lockstep.storage.weights import write_tensors  # noqa: E402
from lockstep.text.sequences import left_pad, pack  # noqa: E402
from lockstep_jax.backend import JaxBackend  # noqa: E402
from lockstep_jax.decoder import bind  # noqa: E402
from lockstep_jax.policies import HuggingFace  # noqa: E402

VOCAB, TOLERANCE, MATTERS = 61, 1e-4, 1e-3
CPU = JaxBackend.Config(device="cpu", precision="float32", gradient_checkpointing=False, compilation_cache=None)

SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, rms_norm_eps=1e-3, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
LINEAR = {**PLAIN, "rope_type": "linear", "factor": 3.0}
S, F = "sliding_attention", "full_attention"
QWEN = dict(SIZES, rope_parameters=PLAIN, use_sliding_window=True, sliding_window=4, max_window_layers=1)
GEMMA = dict(SIZES, head_dim=16, query_pre_attn_scalar=7, sliding_window=4, final_logit_softcapping=5.0)
NEOX = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "rms_norm_eps")}

CONFIGS = {
    "llama": dict(SIZES, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True),
    "gpt2": dict(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, layer_norm_epsilon=1e-3, bos_token_id=None,
        eos_token_id=None,
    ),
    "qwen2": QWEN,
    "qwen3": dict(QWEN, head_dim=16, attention_bias=True),
    "gemma2": dict(GEMMA, rope_parameters=PLAIN, attn_logit_softcapping=2.0),
    "gemma3_text": dict(
        GEMMA, layer_types=[S, F, S], rope_parameters={S: PLAIN, F: {**LINEAR, "rope_theta": 1000.0}}, attention_bias=True
    ),
    "gpt_neox": dict(NEOX, layer_norm_eps=1e-3, rope_parameters={**PLAIN, "partial_rotary_factor": 0.5}),
    "mistral": dict(SIZES, rope_parameters=PLAIN, head_dim=16, sliding_window=4),
    "phi3": dict(SIZES, rope_parameters={**PLAIN, "partial_rotary_factor": 0.5}, sliding_window=4),
    "smollm3": dict(
        SIZES, rope_parameters=PLAIN, no_rope_layers=[1, 0, 1], attention_bias=True, mlp_bias=True, use_sliding_window=True,
        sliding_window=4, tie_word_embeddings=False,
    ),
}  # fmt: skip

ROPE = [{"rope_parameters": {**PLAIN, "rope_theta": 500.0}}, {"rope_parameters": LINEAR}]
COMMON = [{"rms_norm_eps": 1e-1}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}]
ACTIVATIONS = [{"hidden_act": "gelu"}, {"hidden_act": "silu"}]
BIASES = [{"attention_bias": True}, {"attention_bias": False}, {"mlp_bias": True}, {"mlp_bias": False}]
WINDOW = [{"sliding_window": 2}]
QWENS = [*WINDOW, {"use_sliding_window": False}, {"max_window_layers": 2}, {"layer_types": [S, F, F]}]
GEMMAS = [
    *WINDOW, {"hidden_activation": "gelu"}, {"hidden_activation": "relu"}, {"query_pre_attn_scalar": 16},
    {"final_logit_softcapping": 3.0}, {"final_logit_softcapping": None}, {"layer_types": [F, F, S]}, *BIASES[:2],
]  # fmt: skip

CHANGES = {
    "llama": [*COMMON, *ACTIVATIONS, *BIASES, *ROPE, {"rope_parameters": {**LLAMA3, "factor": 8.0}},
              {"rope_parameters": {**LLAMA3, "low_freq_factor": 0.5}}, {"rope_parameters": {**LLAMA3, "high_freq_factor": 2.0}},
              {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}}],
    "gpt2": [{"n_head": 2}, {"n_inner": 40},
             {"layer_norm_epsilon": 1e-1}, {"activation_function": "relu"},
             {"activation_function": "gelu"}, {"tie_word_embeddings": False}],
    "qwen2": [*COMMON, *ACTIVATIONS, *ROPE, *QWENS],
    "qwen3": [*COMMON, *ACTIVATIONS, *ROPE, *QWENS, *BIASES[:2]],
    "gemma2": [*COMMON, *ROPE, *GEMMAS, {"attn_logit_softcapping": 1.0}, {"attn_logit_softcapping": None}],
    "gemma3_text": [*COMMON, *GEMMAS, {"rope_parameters": {S: PLAIN, F: PLAIN}},
                    {"rope_parameters": {S: {**PLAIN, "rope_theta": 50.0}, F: {**LINEAR, "rope_theta": 1000.0}}}],
    "gpt_neox": [{"num_attention_heads": 2}, {"tie_word_embeddings": True}, *ACTIVATIONS, *BIASES[:2],
                 {"layer_norm_eps": 1e-1}, {"use_parallel_residual": False}]
                + [{"rope_parameters": {**PLAIN, "partial_rotary_factor": part}} for part in (0.25, 1.0)]
                + [{"rope_parameters": {**rope["rope_parameters"], "partial_rotary_factor": 0.5}} for rope in ROPE[:2]],
    "mistral": [*COMMON, *ACTIVATIONS, *ROPE, *WINDOW, {"sliding_window": None}],
    "phi3": [*COMMON, *ACTIVATIONS, ROPE[0], *WINDOW, {"sliding_window": None},
             {"rope_parameters": {**PLAIN, "partial_rotary_factor": 1.0}}],
    "smollm3": [*COMMON, *ACTIVATIONS, *BIASES, *ROPE, *WINDOW, {"use_sliding_window": False}, {"no_rope_layers": [0, 1, 1]},
                {"no_rope_layers": None, "no_rope_layer_interval": 3}, {"layer_types": [S, F, F]}],
}  # fmt: skip
"""Every switch of every family, on and off; what a configuration has already is passed over."""

SIZES_ONLY = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "head_dim", "n_embd", "n_layer", "n_positions", "max_position_embeddings"}  # fmt: skip
"""A wrong one is a tensor of the wrong shape; the longest context is a limit."""

INERT = {
    "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range", "attention_dropout", "hidden_dropout",
    "classifier_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_type", "summary_use_proj", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "is_decoder", "pretraining_tp",
    "original_max_position_embeddings",  # of Phi-3's longrope, which is refused
    "_sliding_window_pattern",  # what layer_types were made from
}  # fmt: skip
"""Keys that change no logits of a trained decoder."""

REFUSED = [
    ({"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
    ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "'longrope' is not supported for phi3. Supported: default"),
    ({"model_type": "qwen2", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"model_type": "gpt_neox", "rotary_pct": 0.29}, "rotates 27 dimensions of each head"),
    ({"model_type": "gpt_neox", "head_dim": 7}, "head_dim=7"),
    ({"model_type": "llama", "hidden_act": "quick_gelu"}, "Activation 'quick_gelu' is not supported. Supported: "),
    ({"model_type": "mistral", "layer_types": [S, F]}, "layer_types="),
    ({"model_type": "phi3", "layer_types": [S, F]}, "layer_types="),
    ({"model_type": "qwen3", "num_hidden_layers": 2, "layer_types": [S, F]}, "sliding_attention in layer_types, but no"),
    ({"model_type": "qwen3", "num_hidden_layers": 2, "layer_types": ["chunked_attention", F]}, "chunked_attention"),
    ({"model_type": "gemma2", "num_hidden_layers": 2, "layer_types": [S]}, "for 2 layers"),
    ({"model_type": "gemma2", "sliding_window": None}, "but no sliding window"),
    ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ({"model_type": "gemma3_text", "rope_parameters": PLAIN}, "one record of rope_parameters"),
    ({"model_type": "gemma3_text", "rope_parameters": {S: LINEAR}}, "rope_type 'linear'"),
    ({"model_type": "gemma2", "rope_parameters": {S: PLAIN, F: PLAIN}}, "rope_parameters per kind of layer"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "2 entries in no_rope_layers for 36 layers"),
    ({"model_type": "gpt2", "scale_attn_weights": False}, "scale_attn_weights=False"),
    ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ({"model_type": "gpt2", "reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True"),
    ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention=True"),
    ({"model_type": "gpt2", "n_head": 12, "num_attention_heads": 2}, "n_head=12 and num_attention_heads=2 are one size"),
    ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantised weights"),
]  # fmt: skip


def realistic(family: str, **changes):
    """A model of transformers whose weights are a function of their names and shapes alone."""
    settings = {key: value for key, value in {**CONFIGS[family], **changes}.items()}
    config = transformers.AutoConfig.for_model(family, **settings)
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            rng = np.random.default_rng(zlib.crc32(f"{name} {tuple(parameter.shape)}".encode()))
            gain = parameter.ndim == 1 and name.endswith("weight") and not family.startswith("gemma")
            values = rng.normal(1.0 if gain else 0.0, 0.3 if parameter.ndim == 1 else 0.25, parameter.shape)
            parameter.copy_(torch.tensor(values))
    return hf


def block(vocab_size: int = 50):
    """Rows of 14, 12 and 9 tokens, padded to 16 on both sides."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocab_size, length).tolist() for length in (8, 5, 3)]
    responses = [rng.integers(0, vocab_size, length).tolist() for length in (6, 7, 6)]
    return pack(prompts, responses, 9999, prompt_columns=8, response_columns=8)


def theirs(hf, s) -> np.ndarray:
    """transformers' logits [tokens, V] at the real tokens."""
    mask = torch.tensor(s.attention_mask)
    position = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = hf(input_ids=torch.where(mask, torch.tensor(s.tokens).long(), 0), attention_mask=mask.long(), position_ids=position)
    return out.logits[mask].numpy()


def ours(policy, s) -> np.ndarray:
    """The same of the decoder, one operation at a time: nothing to compile for every switch."""
    with jax.disable_jit():
        decoder = bind(policy.spec, policy.params, policy.frozen)
        return np.asarray(decoder.logits(decoder.hidden(s.tokens, s.attention_mask), decoder.head()))[s.attention_mask]


@pytest.fixture(scope="module")
def backend() -> JaxBackend:
    return JaxBackend(CPU)


@pytest.fixture(scope="module", params=CONFIGS)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pair(family, backend, tmp_path_factory):
    """(transformers' model, ours)."""
    hf, folder = realistic(family), tmp_path_factory.mktemp(family)
    hf.save_pretrained(folder)
    return hf, HuggingFace.load(folder, backend)


def test_logits_are_those_of_transformers(pair):
    hf, policy = pair
    difference = abs(ours(policy, block()) - theirs(hf, block())).max()
    print(f"{hf.config.model_type}: {difference:.1e}")
    assert difference < TOLERANCE


def test_every_switch_matters_and_is_that_of_transformers(family, pair, backend, tmp_path):
    """Each change of the configuration moves the logits, by far more than the tolerance, to those of transformers; and the
    changes are of every key that transformers' configuration has, or the key is refused."""
    hf, policy = pair
    base, moved, worst = ours(policy, block()), set(), 0.0
    for number, change in enumerate(CHANGES[family]):
        other, folder = realistic(family, **change), tmp_path / str(number)
        other.save_pretrained(folder)
        if other.config.to_dict() == hf.config.to_dict():
            continue
        found = ours(HuggingFace.load(folder, backend), block())
        worst = max(worst, difference := abs(found - theirs(other, block())).max())
        assert difference < TOLERANCE, (change, difference)
        assert abs(found - base).max() > MATTERS, change
        moved |= change.keys()
    print(f"{family}: {worst:.1e}")
    keys = hf.config.to_dict().keys() - transformers.PreTrainedConfig().to_dict().keys()
    refused = {key for config, _ in REFUSED if config["model_type"] == family for key in config}
    assert keys - SIZES_ONLY - INERT - moved <= refused


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_switches_that_are_not_supported_are_named(config, message):
    with pytest.raises(CheckpointError, match=message):
        from_hf(config)


def test_an_unknown_family_is_told_which_are_known():
    with pytest.raises(
        CheckpointError, match="No decoder for model_type 'mamba'. Supported: gemma2, gemma3_text, gpt2, gpt_neox"
    ):
        from_hf({"model_type": "mamba"})


def test_keys_left_out_mean_what_transformers_takes_for_them(family):
    theirs = transformers.AutoConfig.for_model(family).to_dict()
    assert from_hf({"model_type": family}) == from_hf(theirs)
    for key, value in FAMILIES[family].defaults.items():
        assert theirs.get(key) in (value, None), key  # None: a window that is switched off


def test_config_json_is_written_as_it_was_read(family, pair):
    architecture = pair[1].spec.architecture
    assert from_hf(to_hf(architecture)) == architecture
    assert transformers.AutoConfig.for_model(**to_hf(architecture)).architectures == [type(pair[0]).__name__]


def test_a_tensor_too_many_or_too_few_is_named(family, pair):
    _, policy = pair
    expected = parameter_shapes(policy.spec.architecture)
    *rest, last = expected
    with pytest.raises(CheckpointError, match=f"missing: {last}; unused: other.weight"):
        check_shapes("a file", {**{n: expected[n] for n in rest}, "other.weight": (1,)}, expected)


def test_greedy_continuations_are_those_of_transformers(pair):
    """Across the windows' edges, from left-padded prompts, with the cache."""
    hf, policy = pair
    s = block()
    tokens, mask = s.tokens[:, : s.prompt_length], s.prompt_mask
    found = policy.generate(tokens, mask, np.zeros((3, 10), np.uint32), temperature=0.0, stop_ids=[], pad_id=0)
    ids = torch.tensor(np.where(mask, tokens, 0)).long()
    expected = hf.generate(
        input_ids=ids, attention_mask=torch.tensor(mask).long(), do_sample=False, max_new_tokens=10, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    np.testing.assert_array_equal(found.tokens, expected[:, tokens.shape[1] :].numpy())
    assert len(np.unique(found.tokens)) > 3


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "smollm3"])
def test_in_bfloat16_sampling_and_scoring_agree(family, tmp_path, monkeypatch):
    """As accelerators compute: the cache is in bfloat16 too, whatever norms and rotations are in."""
    for module in ("decoder", "layers"):
        monkeypatch.setattr(f"lockstep_jax.{module}.attention_dtype", lambda dtype, platform: dtype)
    half = JaxBackend(dataclasses.replace(CPU, precision="bfloat16"))
    realistic(family).save_pretrained(tmp_path)
    policy, s = HuggingFace.load(tmp_path, half), block()
    with jax.disable_jit():
        decoder = bind(policy.spec, policy.params, policy.frozen)
        whole = decoder.hidden(s.tokens[:, :10], s.attention_mask[:, :10])
        layers = decoder.apart()
        _, cache = decoder.start(layers, s.tokens[:, :8], s.prompt_mask, 2)
        for column in (8, 9):
            step, cache = decoder.advance(layers, s.tokens[:, column], cache)
            assert abs(step - whole[:, column]).max() < 1e-3 * abs(whole).max()
    assert cache.layers[0][0].dtype == "bfloat16" and whole.dtype == "float32"


def test_saved_models_open_in_transformers_and_again(pair, backend, tmp_path):
    hf, policy = pair
    policy.save(tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert type(again) is type(hf) and not info["missing_keys"] and not info["unexpected_keys"]
    np.testing.assert_allclose(theirs(again.eval(), block()), theirs(hf, block()), atol=1e-6)
    reloaded = HuggingFace.load(tmp_path, backend).parameters()
    for name, array in policy.parameters().items():
        np.testing.assert_array_equal(reloaded[name], array, err_msg=name)


def test_saved_scalar_models_open_as_sequence_classifiers(pair, backend, tmp_path):
    _, policy = pair
    s, scalar = block(), policy.scalar_model(scalar_head(32, seed=0))
    scalar.save(tmp_path)
    scores = scalar.evaluate(s, ("scores",))["scores"]
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert read_json(tmp_path / "config.json")["architectures"] == [type(classifier).__name__]
    for row in range(s.rows):
        with torch.no_grad():
            found = classifier(torch.tensor(s.tokens[row][s.attention_mask[row]]).long()[None]).logits.item()
        assert abs(found - scores[row]) < TOLERANCE
    np.testing.assert_array_equal(HuggingFace.load_scalar(tmp_path, backend).evaluate(s, ("scores",))["scores"], scores)


# --------------------------------------------------------------------------------------------------------- both backends


@pytest.fixture(scope="module")
def on_torch():
    backend = registry().resolve("backend", "torch", "torch")
    policy = registry().resolve("policy", "huggingface", "torch")
    values = {"device": "cpu", "precision": "float32", "gradient_checkpointing": False, "cuda_graphs": False, "threads": 1}
    return policy, backend(parse(backend.Config, values, "backend"))


def evaluate(model, outputs):
    """One operation at a time: see `ours`."""
    with jax.disable_jit():
        return model.evaluate(block(), outputs)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_neox", "phi3"])
def test_torch_and_jax_agree_and_read_each_other(family, backend, on_torch, tmp_path):
    """Embedding scale, softcaps, fused tensors and renamed heads; with value heads, and as scalar models."""
    cls, other = on_torch
    realistic(family).save_pretrained(tmp_path)
    one, two = HuggingFace.load(tmp_path, backend), cls.load(tmp_path, other)
    same(one.parameters(), two.parameters())
    outputs, mask = ("logprobs", "entropy", "values"), block().mask
    found, expected = (evaluate(model.with_value_head(), outputs) for model in (one, two))
    for name in outputs:
        np.testing.assert_allclose(found[name][mask], expected[name][mask], atol=TOLERANCE, err_msg=name)
    prompts, seeds = block().tokens[:, :8], randomness.token_seeds(0, "sampling", 0, 3, 8)
    drawn = [m.generate(prompts, block().prompt_mask, seeds, temperature=1.0, stop_ids=[], pad_id=0) for m in (one, two)]
    np.testing.assert_array_equal(drawn[0].tokens, drawn[1].tokens)
    head = scalar_head(32, seed=0)
    scores = evaluate(one.scalar_model(head), ("scores",))["scores"]
    for writer, reader, there in ((one, cls, other), (two, HuggingFace, backend)):
        folder = tmp_path / type(writer).__module__
        writer.scalar_model(head).save(folder)
        found = evaluate(reader.load_scalar(folder, there), ("scores",))["scores"]
        np.testing.assert_allclose(found, scores, atol=TOLERANCE)
        writer.save(folder)
        same(reader.load(folder, there).parameters(), one.parameters())


def test_a_turn_from_the_cache_is_as_from_the_whole_context(family, backend, on_torch, tmp_path):
    """Across the windows' edges, in rows of several lengths. transformers' own layers forget what is outside their window."""
    cls, other = on_torch
    realistic(family).save_pretrained(tmp_path)
    for policy in (HuggingFace.load(tmp_path, backend), cls.load(tmp_path, other)):
        continued = []

        def generate(tokens, mask, seeds, past, policy=policy, continued=continued):
            continued.append(past)
            return policy.generate(tokens, mask, seeds, temperature=1.0, stop_ids=[], pad_id=0, past=past)

        turns, contexts = Turns(generate, 0), [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
        drawn = turns.next(range(3), contexts, randomness.token_seeds(0, "sampling", 0, 3, 5), 7)
        contexts = [[*c, *row.tolist(), *c[:2], 3] for c, row in zip(contexts, drawn.tokens, strict=True)]
        seeds = randomness.token_seeds(0, "sampling", 1, 2, 5)
        found = turns.next([2, 0], [contexts[2], contexts[0]], seeds, 16)
        expected = generate(*left_pad([contexts[2], contexts[0]], 0, 16), seeds, None)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=TOLERANCE)
        architecture = from_hf(read_json(tmp_path / "config.json"))
        windows = any(architecture.window(number) for number in range(architecture.layers))
        assert (continued[1] is None) == (windows and policy.backend is other)


# ------------------------------------------------------------------------------------------------------------------ files


def test_shards_in_bfloat16_are_read(backend, tmp_path):
    realistic("qwen3").bfloat16().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32", attn_implementation="eager")
    assert abs(ours(HuggingFace.load(tmp_path, backend), block()) - theirs(hf, block())).max() < TOLERANCE


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_a_gemma_with_images_is_read(backend, tmp_path, prefix):
    hf = realistic("gemma3_text")
    tensors = {n.replace("model.", prefix, 1): p.detach().numpy() for n, p in hf.named_parameters()}
    tensors["model.vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)
    tensors["multi_modal_projector.weight"] = np.zeros((2, 2), np.float32)
    write_tensors(tmp_path / "model.safetensors", tensors)
    write_json(tmp_path / "config.json", {"model_type": "gemma3", "text_config": hf.config.to_dict()})
    policy = HuggingFace.load(tmp_path, backend)
    assert abs(ours(policy, block()) - theirs(hf, block())).max() < TOLERANCE


def test_sizes_of_gpt2_have_two_names(backend, tmp_path):
    """The usual names, as transformers also takes them; each size differs from its default."""
    names = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
             "n_positions": "max_position_embeddings"}  # fmt: skip
    hf = realistic("gpt2")
    hf.save_pretrained(tmp_path)
    config = {names.get(key, key): value for key, value in hf.config.to_dict().items()}
    write_json(tmp_path / "config.json", config)
    assert from_hf(config) == from_hf(hf.config.to_dict())
    reopened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert abs(ours(HuggingFace.load(tmp_path, backend), block()) - theirs(reopened, block())).max() < TOLERANCE


@pytest.mark.parametrize(
    ("family", "change", "older"),
    [
        ("llama", {"rope_parameters": LINEAR}, {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 3.0}}),
        ("gpt_neox", {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, {"rotary_pct": 0.5, "rotary_emb_base": 100.0}),
        ("phi3", {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
         {"rope_theta": 100.0, "partial_rotary_factor": 0.5, "rope_scaling": None}),
        ("gemma3_text", {"layer_types": [S, F, S], "rope_parameters": {S: PLAIN, F: {**LINEAR, "rope_theta": 1000.0}}},
         {"sliding_window_pattern": 2, "rope_theta": 1000.0, "rope_local_base_freq": 100.0,
          "rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
        ("gemma3_text", {"rope_parameters": {S: PLAIN, F: {**PLAIN, "rope_theta": 1000.0}}},  # it reads no "type"
         {"rope_theta": 1000.0, "rope_local_base_freq": 100.0, "rope_scaling": {"type": "linear", "factor": 3.0}}),
    ],
)  # fmt: skip
def test_configurations_of_older_versions_mean_the_same(family, change, older):
    new = {"model_type": family, **CONFIGS[family], **change}
    old = {key: value for key, value in new.items() if key not in change}
    assert from_hf({**old, **older}) == from_hf(new)
    theirs = transformers.AutoConfig.for_model(**{**old, **older}).to_dict()
    assert from_hf(theirs) == from_hf(new)
