"""The JAX backend against transformers, numpy and arithmetic by hand."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from conftest import ARCHITECTURE  # noqa: E402
from lockstep.errors import CheckpointError, ConfigError  # noqa: E402
from lockstep.interfaces import Term  # noqa: E402
from lockstep.learning import losses, randomness  # noqa: E402
from lockstep.learning.optimisation import OptimizerConfig  # noqa: E402
from lockstep.models.architecture import initial_parameters, scalar_head  # noqa: E402
from lockstep.text.sequences import Sequences, join, pack  # noqa: E402
from lockstep_jax import decoder, generation, learner, model, products  # noqa: E402
from lockstep_jax.backend import JaxBackend  # noqa: E402
from lockstep_jax.network import NetworkSpec  # noqa: E402
from lockstep_jax.parameters import from_arrays  # noqa: E402
from lockstep_jax.policies import HuggingFace  # noqa: E402

VOCAB = 61
GARBAGE = 9999  # an id outside every vocabulary
CPU = JaxBackend.Config(device="cpu", precision="float32", gradient_checkpointing=False, compilation_cache=None)


@pytest.fixture(scope="module")
def backend() -> JaxBackend:
    return JaxBackend(CPU)


def llama(**changes):
    """Grouped queries, Llama 3's rope with all three of its regimes, biases, an untied head."""
    rope = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    settings = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-3, rope_parameters=rope, attention_bias=True,
        mlp_bias=True, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | changes)))


def plain_llama():
    rope = {"rope_type": "default", "rope_theta": 500.0}
    return llama(rope_parameters=rope, attention_bias=False, mlp_bias=False, tie_word_embeddings=True, head_dim=16)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, layer_norm_epsilon=1e-3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture(scope="module", params=[llama, plain_llama, gpt2], ids=lambda make: make.__name__)
def family(request, tmp_path_factory):
    """(transformers' model, its checkpoint folder). Weights as large as trained ones: small ones hide mistakes."""
    torch.manual_seed(0)
    hf = request.param().eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(1.0 if gain else 0.0, 0.3 if parameter.ndim == 1 else 0.25)
    folder = tmp_path_factory.mktemp(request.param.__name__)
    hf.save_pretrained(folder)
    return hf, folder


@pytest.fixture(scope="module")
def pair(family, backend):
    hf, folder = family
    return hf, HuggingFace.load(folder, backend)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint with every switch of Llama, for tests of what does not depend on the family."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("checkpoint")
    llama(num_hidden_layers=2).save_pretrained(path)
    return path


@pytest.fixture
def policy(folder, backend) -> HuggingFace:
    return HuggingFace.load(folder, backend)


def sequences(rows: int = 4, pad_id: int = GARBAGE, columns: int = 8) -> Sequences:
    """Rows of different lengths: prompts of 7, 6, 5, 4 tokens and responses of 1, 3, 5, 7."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, 7 - row).tolist() for row in range(rows)]
    responses = [rng.integers(0, VOCAB, 1 + 2 * (row % 4)).tolist() for row in range(rows)]
    return pack(prompts, responses, pad_id, prompt_columns=columns, response_columns=columns)


def prompts(rows: int = 4) -> tuple[np.ndarray, np.ndarray]:
    s = sequences(rows)
    return s.tokens[:, : s.prompt_length], s.prompt_mask


def hf_logits(hf, s: Sequences) -> np.ndarray:
    """transformers' logits [B, T, V] that predict the response tokens."""
    mask = torch.tensor(s.attention_mask)
    position = (mask.long().cumsum(-1) - 1).clamp(min=0)
    tokens = torch.where(mask, torch.tensor(s.tokens).long(), 0)
    with torch.no_grad():
        logits = hf(input_ids=tokens, attention_mask=mask.long(), position_ids=position).logits
    return logits[:, s.prompt_length - 1 : -1].double().numpy()


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@dataclass(frozen=True)
class Likelihood:
    """-Σ w log π, and, where asked, + Σ w V² - Σ w H."""

    outputs: tuple[str, ...] = ("logprobs",)
    sign: ClassVar[dict[str, float]] = {"logprobs": -1.0, "entropy": -1.0, "values": 1.0, "scores": 1.0}

    def __call__(self, xp, outputs, batch):
        total = 0.0
        for name in self.outputs:
            term = outputs[name] ** 2 if name == "values" else outputs[name]
            total = total + self.sign[name] * losses.weighted_sum(xp, term, batch["weights"])
        return total, {"tokens": xp.sum(batch["weights"])}


def term(s: Sequences, loss=Likelihood(), scale: float = 1.0) -> Term:
    return Term(loss, s, {"weights": (scale * s.mask / s.mask.sum()).astype(np.float32)})


PLAIN = OptimizerConfig(
    learning_rate=1e-2, betas=(0.9, 0.999), eps=1e-3, tf_style=False, weight_decay=0.0, max_grad_norm=None, ema_decay=None
)


def learn(backend, models, **changes) -> learner.JaxLearner:
    return backend.learner(models, {name: dataclasses.replace(PLAIN, **changes) for name in models})


# ------------------------------------------------------------------------------------------- agreement with transformers


def test_logprobs_and_entropy_are_those_of_transformers(pair):
    hf, ours = pair
    s = sequences()
    out = ours.evaluate(s, ("logprobs", "entropy"), temperature=0.7)
    logprobs = log_softmax(hf_logits(hf, s) / 0.7)
    taken = np.take_along_axis(logprobs, np.where(s.mask, s.responses, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(out["logprobs"][s.mask], taken[s.mask], atol=1e-4)
    np.testing.assert_allclose(out["entropy"][s.mask], -(np.exp(logprobs) * logprobs).sum(-1)[s.mask], atol=1e-4)
    assert all(np.isfinite(x).all() and x.dtype == np.float32 for x in out.values())


def test_parameters_are_the_checkpoint(pair):
    hf, ours = pair
    theirs = {name: p.detach().numpy() for name, p in hf.named_parameters()}
    mine = ours.parameters()
    assert mine.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(mine[name], array, err_msg=name)


def test_gradients_are_those_of_torch_autograd(pair, backend):
    hf, ours = pair
    s = sequences()
    mine = learn(backend, {"policy": ours}).gradients([term(s)])
    mask = torch.tensor(s.attention_mask)
    tokens = torch.where(mask, torch.tensor(s.tokens).long(), 0)
    hf.zero_grad()
    logits = hf(input_ids=tokens, attention_mask=mask.long(), position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0)).logits
    logprobs = logits[:, s.prompt_length - 1 : -1].log_softmax(-1).gather(-1, tokens[:, s.prompt_length :, None])[..., 0]
    (-logprobs[torch.tensor(s.mask)].mean()).backward()
    for name, parameter in hf.named_parameters():
        theirs = parameter.grad.numpy()
        np.testing.assert_allclose(mine[f"policy.{name}"], theirs, atol=1e-4 * max(1, abs(theirs).max()), err_msg=name)


def test_greedy_generation_is_that_of_transformers(pair):
    hf, ours = pair
    tokens, mask = prompts()
    seeds = np.zeros((4, 12), np.uint32)

    def theirs(stop):
        ids = torch.tensor(np.where(mask, tokens, 0)).long()
        out = hf.generate(input_ids=ids, attention_mask=torch.tensor(mask).long(), do_sample=False, max_new_tokens=12,
                          pad_token_id=0, eos_token_id=stop)  # fmt: skip
        return out[:, tokens.shape[1] :].numpy()

    def mine(stop_ids):
        return ours.generate(tokens, mask, seeds, temperature=0.0, stop_ids=stop_ids, pad_id=GARBAGE)

    free = theirs(None)
    np.testing.assert_array_equal(mine([]).tokens, free)
    stop = int(free[0, 4])  # a token that at least one row does choose
    stopped, expected = mine([stop]), theirs(stop)
    width = expected.shape[1]  # transformers cuts off the columns that no row reached
    np.testing.assert_array_equal(np.where(stopped.mask, stopped.tokens, 0)[:, :width], expected)
    assert not stopped.mask[:, width:].any()
    assert stopped.mask[0].sum() == list(free[0]).index(stop) + 1  # the stop token itself is kept
    assert (stopped.tokens[~stopped.mask] == GARBAGE).all()


def test_sampling_replays_in_numpy_from_transformers_logits(pair):
    hf, ours = pair
    tokens, mask = prompts()
    seeds = randomness.token_seeds(0, "sampling", 3, 4, 10)
    drawn = ours.generate(tokens, mask, seeds, temperature=0.8, stop_ids=[], pad_id=GARBAGE)
    logits = hf_logits(hf, join(tokens, mask, drawn.tokens, drawn.mask)) / 0.8
    np.testing.assert_array_equal(drawn.tokens, (logits + randomness.hash_gumbel(seeds, VOCAB)).argmax(-1))
    taken = np.take_along_axis(log_softmax(logits), drawn.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(drawn.logprobs, taken, atol=1e-4)


def test_saved_policy_opens_in_transformers_and_loads_again(pair, backend, tmp_path):
    hf, ours = pair
    ours.with_value_head().save(tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    s = sequences()
    np.testing.assert_allclose(hf_logits(again.eval(), s), hf_logits(hf, s), atol=1e-5)
    reloaded = HuggingFace.load(tmp_path, backend)
    for name, array in ours.parameters().items():
        np.testing.assert_array_equal(reloaded.parameters()[name], array, err_msg=name)


def test_saved_scalar_model_opens_as_a_sequence_classifier(pair, backend, tmp_path):
    _, ours = pair
    scalar = ours.scalar_model(scalar_head(32, seed=0))
    scalar.save(tmp_path)
    s = sequences()
    scores = scalar.evaluate(s, ("scores",))["scores"]
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for row in range(s.rows):
        ids = torch.tensor(s.tokens[row][s.attention_mask[row]]).long()[None]
        with torch.no_grad():
            assert abs(classifier(ids).logits.item() - scores[row]) < 1e-4
    scalar.rescale(2.0, 0.5)
    scalar.save(tmp_path)
    rescaled = HuggingFace.load_scalar(tmp_path, backend).evaluate(s, ("scores",))["scores"]
    np.testing.assert_allclose(rescaled, 2 * scores + 0.5, atol=1e-5)


def test_checkpoints_with_buffers_and_tied_copies_and_without_prefix_load(tmp_path, backend):
    from safetensors.numpy import load_file, save_file

    gpt2().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name.removeprefix("transformer."): array for name, array in load_file(file).items()}
    weights |= {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "lm_head.weight": weights["wte.weight"].copy()}
    save_file(weights, file, metadata={"format": "pt"})
    loaded = HuggingFace.load(tmp_path, backend).parameters()
    np.testing.assert_array_equal(loaded["transformer.h.1.mlp.c_fc.weight"], weights["h.1.mlp.c_fc.weight"])


# ------------------------------------------------------------------------------------------------------------ invariances


def test_sampler_logprobs_are_the_teacher_forced_ones(policy):
    tokens, mask = prompts()
    seeds = randomness.token_seeds(0, "sampling", 0, 4, 8)
    drawn = policy.generate(tokens, mask, seeds, temperature=0.6, stop_ids=range(20), pad_id=GARBAGE)
    assert 4 <= drawn.mask.sum() < 32  # some row has stopped early
    scored = policy.evaluate(join(tokens, mask, drawn.tokens, drawn.mask), ("logprobs",), temperature=0.6)["logprobs"]
    np.testing.assert_allclose(drawn.logprobs[drawn.mask], scored[drawn.mask], atol=1e-4)


def test_padding_and_its_ids_do_not_matter(policy):
    valued = policy.with_value_head()
    valued.params["score"]["weight"] = jax.numpy.ones((1, 32))
    outputs = ("logprobs", "entropy", "values", "scores")
    narrow, wide = sequences(pad_id=0, columns=7), sequences(pad_id=-7, columns=16)
    one, other = valued.evaluate(narrow, outputs), valued.evaluate(wide, outputs)
    for name in ("logprobs", "entropy", "values"):
        np.testing.assert_allclose(one[name][narrow.mask], other[name][wide.mask], atol=2e-5, err_msg=name)
        assert np.isfinite(other[name]).all()
    np.testing.assert_allclose(one["scores"], other["scores"], atol=2e-5)


def test_sampled_tokens_do_not_depend_on_the_batch(policy):
    tokens, mask = prompts()
    seeds = randomness.token_seeds(0, "sampling", 0, 4, 8)

    def sample(rows):
        return policy.generate(tokens[rows], mask[rows], seeds[rows], temperature=1.0, stop_ids=[5], pad_id=60)

    together = sample(slice(0, 4)).tokens
    np.testing.assert_array_equal(together, np.concatenate([sample(slice(0, 2)).tokens, sample(slice(2, 4)).tokens]))


def test_a_value_is_read_before_its_token_and_a_score_after_the_last(policy):
    scalar = policy.scalar_model(scalar_head(32, seed=0))
    s = sequences()
    before = scalar.evaluate(s, ("values", "scores"))
    changed = s.tokens.copy()
    changed[:, s.prompt_length] = (changed[:, s.prompt_length] + 1) % VOCAB  # the first response token of every row
    after = scalar.evaluate(dataclasses.replace(s, tokens=changed), ("values", "scores"))
    np.testing.assert_array_equal(before["values"][:, 0], after["values"][:, 0])
    assert (before["scores"] != after["scores"]).all()


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_do_not_depend_on_micro_batches(policy, backend, size):
    whole, loss = sequences(), Likelihood(("logprobs", "entropy", "values"))
    learning = learn(backend, {"policy": policy.with_value_head()})
    weights = (whole.mask / whole.mask.sum()).astype(np.float32)
    cut = [slice(start, start + size) for start in range(0, 4, size)]
    parts = [Term(loss, whole.take(rows), {"weights": weights[rows]}) for rows in cut]
    expected, found = learning.gradients([term(whole, loss)]), learning.gradients(parts)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5 * abs(expected[name]).max(), err_msg=name)


def test_masked_tokens_have_no_gradient(policy, backend):
    learning, s = learn(backend, {"policy": policy}), sequences()
    nothing = learning.gradients([term(s, scale=0.0)])
    assert all((array == 0).all() for array in nothing.values())
    half = dataclasses.replace(s, mask=s.mask & (np.arange(s.mask.shape[1]) < 2))
    changed = np.where(np.arange(s.tokens.shape[1]) >= s.prompt_length + 2, (s.tokens + 3) % VOCAB, s.tokens)
    one = learning.gradients([term(half)])
    other = learning.gradients([term(dataclasses.replace(half, tokens=changed))])
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-7, err_msg=name)


def test_values_come_from_the_value_network_and_leave_the_policy_alone(policy, backend):
    models = {"policy": policy, "value": policy.scalar_model(scalar_head(32, seed=0))}
    gradients = learn(backend, models).gradients([term(sequences(), Likelihood(("values",)))])
    assert all((array == 0).all() for name, array in gradients.items() if name.startswith("policy."))
    assert abs(gradients["value.model.embed_tokens.weight"]).max() > 0
    with pytest.raises(ConfigError, match="needs values, which no model supplies. Models: policy."):
        learn(backend, {"policy": policy}).update([term(sequences(), Likelihood(("values",)))])


# ---------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("tf_style", [False, True])
def test_first_step_of_adam(policy, backend, tf_style, parts):
    before, terms = policy.parameters(), [term(sequences(), scale=1 / parts)] * parts
    learning = learn(backend, {"policy": policy}, tf_style=tf_style, max_grad_norm=0.05)
    gradients = learning.gradients(terms)
    metrics = learning.update(terms, lr_scale=0.5)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
    assert norm > 0.05 and metrics["grad_norm/policy"] == pytest.approx(norm, rel=1e-5)
    assert metrics["tokens"] == pytest.approx(1.0)
    eps = 1e-3 / np.sqrt(1 - 0.999) if tf_style else 1e-3
    for name, after in learning.models["policy"].parameters().items():
        g = gradients[f"policy.{name}"] * 0.05 / norm
        np.testing.assert_allclose(after, before[name] - 0.5e-2 * g / (abs(g) + eps), atol=3e-7, err_msg=name)


def test_weight_decay_shrinks_matrices_and_leaves_gains_and_biases(policy, backend):
    before = policy.parameters()
    learn(backend, {"policy": policy}, weight_decay=0.1).update([term(sequences(), scale=0.0)])
    for name, after in policy.parameters().items():
        factor = 1 - 1e-2 * 0.1 if before[name].ndim == 2 else 1.0
        np.testing.assert_allclose(after, factor * before[name], rtol=1e-6, err_msg=name)


def test_average_follows_the_weights_and_training_changes_the_model_itself(policy, backend):
    before, reference = policy.parameters(), policy.copy()
    learning = learn(backend, {"policy": policy}, ema_decay=0.75)
    learning.update([term(sequences())])
    name = "model.layers.1.mlp.up_proj.weight"
    after = policy.parameters()[name]
    assert (after != before[name]).any()
    np.testing.assert_allclose(learning.averaged("policy").parameters()[name], 0.75 * before[name] + 0.25 * after, atol=1e-7)
    np.testing.assert_array_equal(reference.parameters()[name], before[name])
    held = learning.averaged("policy")
    learning.update([term(sequences())])  # must not reach what was handed out
    assert np.isfinite(held.evaluate(sequences(), ("logprobs",))["logprobs"]).all()


def test_restored_learner_goes_on_bit_for_bit(folder, backend, tmp_path):
    def fresh():
        policy = HuggingFace.load(folder, backend)
        return learn(backend, {"policy": policy, "value": policy.scalar_model(scalar_head(32, seed=0))}, ema_decay=0.9)

    def train(learning, steps):
        loss = Likelihood(("logprobs", "values"))
        for step in steps:
            learning.update([term(sequences(), loss, scale=1.0 + step)], lr_scale=1 / (1 + step))
        models = {**learning.models, **{f"average {name}": learning.averaged(name) for name in learning.models}}
        return {f"{name}.{key}": array for name, model in models.items() for key, array in model.parameters().items()}

    first = fresh()
    train(first, range(2))
    first.save(tmp_path)
    expected = train(first, range(2, 4))
    second = fresh()
    second.restore(tmp_path)
    found = train(second, range(2, 4))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    with pytest.raises(CheckpointError, match="is of another architecture: policy.average."):
        learn(backend, {"policy": HuggingFace.load(folder, backend)}).restore(tmp_path)


def test_nothing_is_compiled_twice(policy, backend):
    tokens, mask = prompts()
    learning = learn(backend, {"policy": policy})

    def round_of_work(step):
        seeds = randomness.token_seeds(0, "sampling", step, 4, 8)
        drawn = policy.generate(tokens, mask, seeds, temperature=1.0 - step / 10, stop_ids=[step], pad_id=60 + step)
        s = join(tokens, mask, drawn.tokens, drawn.mask)
        policy.copy().evaluate(s, ("logprobs",), temperature=1.0 - step / 10)
        learning.update([term(s)], lr_scale=1 / (1 + step))
        learning.update([term(s), term(s), term(s)], lr_scale=1 / (1 + step))

    programs = (generation.generate, model._evaluate, learner._learn, learner._gradients, learner._step, learner._add)
    programs = [getattr(program, "jitted", program) for program in programs]
    round_of_work(0)
    compiled = [program._cache_size() for program in programs]
    for step in (1, 2):
        round_of_work(step)
    assert [program._cache_size() for program in programs] == compiled
    assert all(compiled)


# ------------------------------------------------------------------------------------------------------------- the backend


def test_bfloat16_is_near_float32_and_keeps_float32_weights(folder, policy):
    half = HuggingFace.load(folder, JaxBackend(dataclasses.replace(CPU, precision="bfloat16")))
    s = sequences()
    one, other = (m.evaluate(s, ("logprobs",))["logprobs"] for m in (policy, half))
    assert 1e-6 < abs(one - other)[s.mask].max() < 3e-2
    tokens, mask = prompts()
    drawn = half.generate(tokens, mask, np.zeros((4, 4), np.uint32), temperature=1.0, stop_ids=[], pad_id=0)
    assert np.isfinite(drawn.logprobs).all()
    metrics = learn(half.backend, {"policy": half}).update([term(s)])
    assert np.isfinite(metrics["loss"]) and all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(half.params))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_product_and_its_gradients_are_sums_in_float32_of_rounded_operands(precision):
    rng = np.random.default_rng(0)
    x, kernel, gradient = (rng.normal(size=shape).astype(np.float32) for shape in ((24, 40), (40, 16), (24, 16)))
    out, pullback = jax.vjp(lambda x, kernel: products.product(precision, "cpu", x, kernel), x, kernel)
    a, b, g = (np.asarray(jax.numpy.asarray(array, precision)).astype(np.float64) for array in (x, kernel, gradient))
    for found, expected in zip((out, *pullback(gradient)), (a @ b, g @ b.T, a.T @ g), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_cpus_multiply_matrices_in_bfloat16_where_they_are_told_to(family):
    """A product of operands in a form for which XLA has none becomes one of float32 without a word, three times as slow."""
    half = HuggingFace.load(family[1], JaxBackend(dataclasses.replace(CPU, precision="bfloat16")))
    trained, t = learn(half.backend, {"policy": half}), term(sequences())
    given = trained._parameters(), trained._frozen(), *trained._arguments(t)
    hlo = learner._gradients.lower(*given, **trained._static(t)).compile().as_text()
    types = dict(re.findall(r"%(\S+) = (\w+)\[", hlo))
    products = re.findall(r" dot\(%(\S+), %(\S+?)\), lhs_contracting", hlo)  # those of attention begin with lhs_batch
    assert len(products) >= 3 * 4 * half.spec.architecture.layers
    assert {types[operand] for operands in products for operand in operands} == {"bf16"}


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_operands_are_turned_in_memory_on_cpus_only(platform):
    turned = jax.make_jaxpr(lambda x: products.transposed(x, platform))(np.zeros((2, 3), np.float32))
    assert turned.out_avals[0].shape == (3, 2)
    assert ("optimization_barrier" in str(turned)) == (platform == "cpu")


@pytest.mark.parametrize(("platform", "attention"), [("cpu", "float32"), ("tpu", "bfloat16")])
def test_a_network_computes_as_its_own_device_wants_and_not_as_the_default_one(platform, attention):
    config = dataclasses.replace(CPU, precision="bfloat16")
    half = SimpleNamespace(config=config, device=SimpleNamespace(platform=platform), mesh=None)
    spec = NetworkSpec.on(half, ARCHITECTURE, language_head=True, scalar_head=False)
    params = from_arrays(ARCHITECTURE, initial_parameters(ARCHITECTURE, 0))

    def start(params):
        network = decoder.bind(spec, params, {})
        return network.start(network.apart(), np.zeros((1, 2), np.int32), np.ones((1, 2), bool), 1)

    def loss(params):
        network = decoder.bind(spec, params, {})
        return network.hidden(np.zeros((1, 2), np.int32), np.ones((1, 2), bool)).sum()

    assert jax.eval_shape(start, params)[1].layers[0][0].dtype == attention
    assert ("optimization_barrier" in str(jax.make_jaxpr(jax.grad(loss))(params))) == (platform == "cpu")


def test_a_device_that_is_not_there_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"backend.device='tpu' is not usable here: .* Set it to auto or to one of: cpu"):
        JaxBackend(dataclasses.replace(CPU, device="tpu"))


def test_learned_positions_do_not_run_past_the_context(backend, tmp_path):
    gpt2().save_pretrained(tmp_path)
    tokens, mask = prompts()
    with pytest.raises(ConfigError, match="71 tokens do not fit the model's context of 64"):
        HuggingFace.load(tmp_path, backend).generate(
            tokens, mask, np.zeros((4, 64), np.uint32), temperature=1.0, stop_ids=[], pad_id=0
        )


def test_torch_is_never_imported(folder):
    script = f"""
import sys
import numpy as np
from lockstep_jax import plugin
assert not {{"jax", "torch"}} & set(sys.modules), "the manifest is not light"
from lockstep_jax.backend import JaxBackend
from lockstep_jax.policies import HuggingFace
import lockstep_jax.learner
policy = HuggingFace.load({str(folder)!r}, JaxBackend(JaxBackend.Config("cpu", "float32", True, None)))
policy.generate(np.ones((1, 2), np.int32), np.ones((1, 2), bool), np.zeros((1, 2), np.uint32),
                temperature=1.0, stop_ids=[], pad_id=0)
assert not {{"torch", "transformers"}} & set(sys.modules), "torch was imported"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_importing_models_and_learners_gives_jax_no_devices():
    """Processes that have devices cannot join each other, and a CPU cannot be divided. Runs import before they make a backend."""
    script = "import jax, lockstep_jax.policies, lockstep_jax.learner; jax.config.update('jax_num_cpu_devices', 3)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_largest_word_is_the_first_of_equal_ones():
    from lockstep_jax.generation import largest

    x = np.random.default_rng(0).integers(0, 5, (64, 37)).astype(np.float32)  # ties in every row
    assert (largest(x) == x.argmax(axis=1)).all()
    assert 0 <= largest(np.full((1, 37), np.nan, np.float32))[0] < 37  # a word at least, where there is none
