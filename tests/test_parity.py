"""The two backends side by side: same weights, same rollout, so the same tokens, losses, gradients and steps."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import ARCHITECTURE, BACKENDS, CONSTANT, Data, configure, head
from lockstep.config.schema import parse
from lockstep.errors import CheckpointError
from lockstep.interfaces import Context, Dropout, Term
from lockstep.learning import randomness
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.models.architecture import RopeScaling, initial_parameters, to_hf
from lockstep.registry import registry
from lockstep.storage.files import read_json, write_json
from lockstep.storage.weights import write_tensors
from lockstep.text.sequences import join, left_pad, pack
from lockstep_rlhf.algorithms.language_modelling import NextTokenLoss
from lockstep_rlhf.algorithms.ppo import PPOLoss

ADAM = OptimizerConfig(1e-3, (0.9, 0.95), 1e-5, False, 0.1, 1.0, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    parameters = initial_parameters(ARCHITECTURE, 3)
    write_tensors(path / "model.safetensors", {n: p * (10 if p.ndim > 1 else 1) for n, p in parameters.items()})
    write_json(path / "config.json", to_hf(ARCHITECTURE))
    return path


@pytest.fixture(scope="module")
def both(folder):
    """For each backend: itself, and a function that loads a fresh policy."""
    found = []
    for name, values in BACKENDS.items():
        cls = registry().resolve("backend", name, name)
        backend = cls(parse(cls.Config, values, "backend"))
        policy = registry().resolve("policy", "decoder", name)
        found.append((backend, lambda policy=policy, backend=backend: policy.load(folder, backend)))
    return found


def rollout(policy, rows=32, columns=12):
    rng = np.random.default_rng(0)
    tokens, mask = left_pad([rng.integers(0, 34, 1 + i % 7).tolist() for i in range(rows)], 36, 8)
    seeds = randomness.token_seeds(0, "parity", 0, rows, columns)
    out = policy.generate(tokens, mask, seeds, temperature=0.7, stop_ids=[35], pad_id=36)
    return join(tokens, mask, out.tokens, out.mask)


def ppo_term(sequences) -> Term:
    rng = np.random.default_rng(1)
    mask = sequences.mask
    noise = lambda: np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)  # noqa: E731
    weights = (mask / mask.sum()).astype(np.float32)
    batch = {"mask": mask, "old_logprobs": noise() - 3, "old_values": noise(), "advantages": noise(), "returns": noise()}
    return Term(PPOLoss(0.2, 0.2, 0.1), sequences, batch | {"weights": weights, "policy_weights": weights}, temperature=0.7)


def test_both_draw_the_same_tokens(both):
    (_, one), (_, other) = both
    first, second = rollout(one()), rollout(other())
    assert np.array_equal(first.tokens, second.tokens) and np.array_equal(first.mask, second.mask)
    assert 0.3 < first.mask.mean() < 1  # some rows stop early


def test_both_evaluate_alike(both):
    (_, one), (_, other) = both
    sequences = rollout(one())
    names = ["logprobs", "entropy", "values"]
    first, second = (load().with_value_head().evaluate(sequences, names, temperature=0.7) for load in (one, other))
    scores = [load().scalar_model(head()).evaluate(sequences, ["scores"])["scores"] for load in (one, other)]
    assert all(np.abs(first[n] - second[n])[sequences.mask].max() < 1e-5 for n in names)
    assert np.abs(scores[0] - scores[1]).max() < 1e-5


def test_ppo_has_the_same_loss_gradients_and_next_parameters(both):
    found = []
    for backend, load in both:
        policy, value = load(), load().scalar_model(head())
        learner = backend.learner({"policy": policy, "value": value}, {"policy": ADAM, "value": ADAM})
        term = ppo_term(rollout(both[0][1]()))
        gradients = learner.gradients([term])
        metrics = learner.update([term])
        found.append((metrics, gradients, policy.parameters() | {f"v.{n}": p for n, p in value.parameters().items()}))
    (metrics, gradients, parameters), (metrics2, gradients2, parameters2) = found
    assert metrics == pytest.approx(metrics2, rel=1e-5, abs=1e-6)
    scale = max(np.abs(g).max() for g in gradients.values())
    assert gradients.keys() == gradients2.keys()
    assert max(np.abs(gradients[n] - gradients2[n]).max() for n in gradients) < 1e-4 * scale
    # Adam divides by the gradient's size: where that is near eps, rounding moves a step by a fraction of the rate.
    assert max(np.abs(parameters[n] - parameters2[n]).max() for n in parameters) < 1e-5


def test_three_steps_of_distillation_are_the_same_on_both(both, tokenizer, folders):
    settings = {"loss": "divergence", "beta": 0.5, "optimizer": {"learning_rate": 1e-3, "eps": 1e-5}, "schedule": CONSTANT}
    cls, config = configure("distillation", batch_size=6, iterations=3, **settings)
    found = []
    for backend, load in both:
        teacher = registry().resolve("policy", "decoder", backend.name).load(folders[1], backend)
        others = SimpleNamespace(policy=lambda source, teacher=teacher: (teacher, tokenizer))
        algorithm = cls(config, Context(0, backend, tokenizer, Data(), load(), resources=others))
        metrics = [algorithm.step(step) for step in range(3)]
        found.append(([{n: v for n, v in m.items() if "perf" not in n and "mismatch" not in n} for m in metrics], algorithm))
    (first, one), (second, other) = found
    for ours, theirs in zip(first, second, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    before, after = one.result().parameters(), other.result().parameters()
    assert max(np.abs(before[n] - after[n]).max() for n in before) < 1e-4


SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip


@pytest.mark.parametrize("modules, changes", [("DecoderNetwork", {}), ("TransformersNetwork", {"rope_parameters": SCALED})])
def test_a_checkpoints_pad_token_is_learned_like_any_other(folder, tmp_path, modules, changes):
    """transformers makes its embedding deaf to gradients; SmolLM2's is the token that ends a turn. With scaled rotation torch
    runs transformers' modules."""
    config = read_json(folder / "config.json")
    write_json(tmp_path / "config.json", config | {"pad_token_id": 35} | changes)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    sequences = pack([[5, 35, 6]] * 2, [[7, 35], [35, 8, 35]], 36, prompt_columns=4)
    term = Term(NextTokenLoss(), sequences, {"weights": (sequences.mask / sequences.mask.sum()).astype(np.float32)})
    found = []
    for name, values in BACKENDS.items():
        cls = registry().resolve("backend", name, name)
        backend = cls(parse(cls.Config, values, "backend"))
        policy = registry().resolve("policy", "huggingface", name).load(tmp_path, backend)
        found.append(gradients(backend, lambda policy=policy: policy, [term])["policy.model.embed_tokens.weight"])
        assert name != "torch" or type(policy.network).__name__ == modules
    assert np.abs(found[1][35]).max() > 1e-2
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def dropout_term(rows: slice = slice(None), pad: int = 0) -> Term:
    rng = np.random.default_rng(2)
    responses = [rng.integers(0, 34, k).tolist() for k in (3, 9, 1, 12)]
    sequences = pack([[5, 6]] * 4, responses, 36, prompt_columns=2 + pad)
    weights = (sequences.mask / sequences.mask.sum()).astype(np.float32)
    seeds = np.arange(4, dtype=np.uint32) + 7
    return Term(NextTokenLoss(), sequences.take(rows), {"weights": weights[rows]}, dropout=Dropout(0.3, seeds[rows]))


def gradients(backend, load, terms):
    return backend.learner({"policy": load()}, {"policy": ADAM}).gradients(terms)


def largest_difference(a, b):
    return max(np.abs(a[n] - b[n]).max() for n in a)


def test_dropout_is_the_same_on_both_and_for_every_cut_and_padding(both):
    whole = [gradients(backend, load, [dropout_term()]) for backend, load in both]
    without = gradients(*both[0], [replace(dropout_term(), dropout=None)])
    assert largest_difference(*whole) < 1e-5 < 1e-2 < largest_difference(whole[0], without)
    for (backend, load), reference in zip(both, whole, strict=True):
        cut = gradients(backend, load, [dropout_term(slice(0, 1)), dropout_term(slice(1, 4))])
        assert largest_difference(cut, reference) < 1e-5
        assert largest_difference(gradients(backend, load, [dropout_term(pad=3)]), reference) < 1e-5


def test_dropout_drops_its_rate_and_keeps_the_mean():
    bits = randomness.dropout_bits(np.arange(50, dtype=np.uint32), 3, np.tile(np.arange(20), (50, 1)), 64)
    kept = bits >= 0.2 * 2**24
    assert kept.mean() == pytest.approx(0.8, abs=0.005)
    other = randomness.dropout_bits(np.arange(50, dtype=np.uint32), 4, np.tile(np.arange(20), (50, 1)), 64) >= 0.2 * 2**24
    assert (kept & other).mean() == pytest.approx(0.64, abs=0.005)  # another place in the network is independent


def test_dropout_is_the_documented_bits(both):
    """The torch module against the numpy reference; JAX agrees with torch above."""
    from lockstep_torch.network import DropoutMask

    torch = pytest.importorskip("torch")
    seeds, position = np.array([7, 8], np.uint32), np.array([[0, 1, 2], [0, 0, 1]])
    x = DropoutMask(0.3, torch.tensor(seeds.view(np.int32)))(torch.ones(2, 3, 16), 5, torch.tensor(position)).numpy()
    kept = randomness.dropout_bits(seeds, 5, position, 16) >= 0.3 * 2**24
    assert np.allclose(x, kept / 0.7)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True, "output_bias": True},
        {"mlp_bias": True},
        {"activation": "gelu_tanh"},
        {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)},
    ],
)
def test_torch_refuses_a_checkpoint_whose_switches_its_decoder_would_ignore(change, tmp_path):
    pytest.importorskip("torch")
    other = replace(ARCHITECTURE, **change)
    write_json(tmp_path / "config.json", to_hf(other))
    write_tensors(tmp_path / "model.safetensors", initial_parameters(other, 0))
    cls = registry().resolve("backend", "torch", "torch")
    backend = cls(parse(cls.Config, BACKENDS["torch"], "backend"))
    with pytest.raises(CheckpointError, match="not a small decoder. Open it with policy=huggingface"):
        registry().resolve("policy", "decoder", "torch").load(tmp_path, backend)


@pytest.mark.parametrize("name", BACKENDS)
def test_large_vocabularies_are_scored_some_positions_at_a_time(both, name, monkeypatch):
    """The same numbers and gradients, and no array of [B, T, V] on the way."""
    import jax

    from lockstep_jax.decoder import DecoderNetwork as JaxNetwork
    from lockstep_torch.decoder import DecoderNetwork as TorchNetwork

    backend, load = both[list(BACKENDS).index(name)]
    sequences = rollout(load())
    term = ppo_term(sequences)

    def found():
        jax.clear_caches()  # the constant is read when a program is traced
        policy = load().with_value_head()
        learner = backend.learner({"policy": policy}, {"policy": ADAM})
        return policy.evaluate(sequences, ["logprobs", "entropy"], temperature=0.7) | learner.gradients([term])

    whole = found()
    seen = []

    def watched(logits):
        return lambda self, states, *head: seen.append(math.prod(states.shape[:-1])) or logits(self, states, *head)

    for network in (JaxNetwork, TorchNetwork):
        monkeypatch.setattr(network, "logits", watched(network.logits))
    for module in ("lockstep_jax.model", "lockstep_torch.model"):
        monkeypatch.setattr(f"{module}.LOGITS_AT_ONCE", 100 * load().vocab_size)
    pieces = found()
    jax.clear_caches()
    assert seen and max(seen) <= 100 < sequences.responses.size
    assert pieces.keys() == whole.keys()
    for key, array in pieces.items():
        np.testing.assert_allclose(array, whole[key], rtol=2e-5, atol=2e-6, err_msg=key)


def test_a_checkpoint_keeps_what_its_configuration_says(folder, tmp_path):
    """Torch, policy=huggingface: a model that the lean decoder runs is saved with the config.json it came with."""
    config = read_json(folder / "config.json")
    (tmp_path / "given").mkdir()
    write_json(tmp_path / "given" / "config.json", config | {"eos_token_id": 35, "bos_token_id": 1})
    (tmp_path / "given" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    cls = registry().resolve("backend", "torch", "torch")
    backend = cls(parse(cls.Config, BACKENDS["torch"], "backend"))
    policy = registry().resolve("policy", "huggingface", "torch").load(tmp_path / "given", backend)
    policy.copy().save(tmp_path / "saved")
    saved = read_json(tmp_path / "saved" / "config.json")
    assert (saved["eos_token_id"], saved["bos_token_id"], saved["architectures"]) == (35, 1, ["LlamaForCausalLM"])
