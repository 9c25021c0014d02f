"""The numpy backend against enumeration, finite differences and hand calculation, on a network small enough for that."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from autograd import grad
from lockstep_numpy import array_api, decoder
from lockstep_numpy.backend import NumpyBackend
from lockstep_numpy.policies import Decoder

from lockstep.errors import CheckpointError, ConfigError
from lockstep.interfaces import Dropout, Term
from lockstep.learning import losses, randomness
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.models.architecture import initial_parameters, small_decoder, to_hf
from lockstep.storage.files import write_json
from lockstep.storage.weights import write_tensors
from lockstep.text.sequences import Sequences, join, left_pad, pack

VOCAB = 7
GARBAGE = 9999  # an id outside the vocabulary
ARCHITECTURE = small_decoder(
    vocab_size=VOCAB, hidden_size=8, layers=2, heads=4, kv_heads=2, intermediate_size=12, context_length=32,
    rope_theta=100.0, tied=True,
)  # fmt: skip
BACKEND = NumpyBackend(NumpyBackend.Config(precision="float32"))
PROMPTS = [[3], [1, 2], [6, 5, 4, 3, 2]]
PLAIN = OptimizerConfig(
    learning_rate=1e-2, betas=(0.9, 0.99), eps=1e-3, tf_style=False, weight_decay=0.0, max_grad_norm=None, ema_decay=None
)


@pytest.fixture
def policy() -> Decoder:
    """Weights as large as trained ones: small ones hide mistakes."""
    parameters = initial_parameters(ARCHITECTURE, 0)
    return Decoder(ARCHITECTURE, {n: p * np.float32(25 if p.ndim > 1 else 1) for n, p in parameters.items()})


def rows(pad_id: int = GARBAGE, columns: int = 5) -> Sequences:
    return pack(PROMPTS, [[1, 2, 3, 4], [5], [6, 0]], pad_id, prompt_columns=columns, response_columns=columns)


@dataclass(frozen=True)
class Likelihood:
    """Σ w (V² - log π - H / 2), over the requested outputs."""

    outputs: tuple[str, ...] = ("logprobs", "entropy", "values")

    def __call__(self, xp, outputs, batch):
        parts = {"logprobs": lambda x: -x, "entropy": lambda x: -0.5 * x, "values": lambda x: x**2}
        loss = sum(losses.weighted_sum(xp, parts[name](outputs[name]), batch["weights"]) for name in self.outputs)
        return loss, {"tokens": xp.sum(batch["weights"])}


def term(sequences: Sequences, loss: Likelihood = Likelihood(), dropout: float = 0.0) -> Term:
    weights = (sequences.mask / sequences.mask.sum()).astype(np.float32)
    seeds = np.arange(sequences.rows, dtype=np.uint32)
    return Term(loss, sequences, {"weights": weights}, 0.8, Dropout(dropout, seeds) if dropout else None)


def learner(policy: Decoder, **changes):
    return BACKEND.learner({"policy": policy}, {"policy": dataclasses.replace(PLAIN, **changes)})


# ------------------------------------------------------------------------------------------ probabilities and sampling


def test_probabilities_of_all_responses_sum_to_one(policy):
    every = list(itertools.product(range(VOCAB), repeat=3))
    sequences = pack([[1, 2]] * len(every), every, GARBAGE)
    out = policy.evaluate(sequences, ["logprobs", "entropy"], temperature=0.8)
    assert np.exp(out["logprobs"].sum(axis=1)).sum() == pytest.approx(1, abs=1e-5)
    first = out["logprobs"][:: VOCAB**2, 0]  # one row for each first token
    assert out["entropy"][0, 0] == pytest.approx(-(np.exp(first) * first).sum(), abs=1e-5)


def test_sampling_is_the_documented_draw_from_the_probabilities_of_all_tokens(policy):
    """Recompute each token from the probabilities of all V tokens after its prefix, without a cache."""
    tokens, mask = left_pad(PROMPTS, GARBAGE, 6)
    seeds = randomness.token_seeds(0, "test", 0, 3, 8)
    drawn = policy.generate(tokens, mask, seeds, temperature=0.8, stop_ids=[4], pad_id=GARBAGE)
    assert 3 < drawn.mask.sum() < drawn.mask.size
    for b, t in zip(*np.nonzero(drawn.mask), strict=True):
        prefix = PROMPTS[b] + drawn.tokens[b, :t].tolist()
        after = pack([prefix] * VOCAB, [[v] for v in range(VOCAB)], GARBAGE)
        logprobs = policy.evaluate(after, ["logprobs"], temperature=0.8)["logprobs"][:, 0]
        assert drawn.tokens[b, t] == (logprobs + randomness.hash_gumbel(seeds[b, t : t + 1], VOCAB)[0]).argmax()
        assert drawn.logprobs[b, t] == pytest.approx(logprobs[drawn.tokens[b, t]], abs=1e-4)


def test_the_stop_token_is_kept_and_all_after_it_is_padding(policy):
    tokens, mask = left_pad(PROMPTS, GARBAGE, 6)
    drawn = policy.generate(tokens, mask, np.zeros((3, 8), np.uint32), temperature=0, stop_ids=range(VOCAB), pad_id=GARBAGE)
    assert drawn.mask.sum(axis=1).tolist() == [1, 1, 1]
    assert (drawn.tokens[:, 1:] == GARBAGE).all() and (drawn.tokens[:, 0] < VOCAB).all()


def test_tokens_are_drawn_as_often_as_they_are_probable(policy):
    count = 4000
    tokens, mask = left_pad([[1, 2]] * count, GARBAGE, 2)
    seeds = randomness.token_seeds(1, "test", 0, count, 1)
    drawn = policy.generate(tokens, mask, seeds, temperature=0.8, stop_ids=[], pad_id=GARBAGE)
    after = pack([[1, 2]] * VOCAB, [[v] for v in range(VOCAB)], GARBAGE)
    p = np.exp(policy.evaluate(after, ["logprobs"], temperature=0.8)["logprobs"][:, 0])
    found = np.bincount(drawn.tokens[:, 0], minlength=VOCAB) / count
    assert (np.abs(found - p) < 4 * np.sqrt(p * (1 - p) / count)).all()


def test_padding_and_its_ids_do_not_matter(policy):
    scalar = policy.scalar_model(np.ones(8, np.float32))
    narrow, wide = rows(pad_id=0), rows(pad_id=-7, columns=9)
    for model, names in ((policy, ["logprobs", "entropy"]), (scalar, ["values"])):
        one, other = model.evaluate(narrow, names), model.evaluate(wide, names)
        for name in names:
            np.testing.assert_allclose(one[name][narrow.mask], other[name][wide.mask], atol=1e-5, err_msg=name)
    scores = [scalar.evaluate(r, ["scores"])["scores"] for r in (narrow, wide)]
    np.testing.assert_allclose(*scores, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- the network


def test_attention_is_a_loop_over_queries_and_keys(policy):
    """One head and query at a time, in double precision; rotated by 0, so only the averaging is tested."""
    x = np.random.default_rng(0).normal(size=(1, 3, 8)).astype(np.float32)
    visible, still = np.tri(3, dtype=bool)[None], (np.float32(1), np.float32(0))
    found = decoder.attention(ARCHITECTURE, policy.weights, 1, x, still, visible, None)
    q, k, v, o = (policy.weights[f"model.layers.1.self_attn.{n}_proj.weight"].astype(np.float64) for n in "qkvo")
    for i in range(3):
        heads = []
        for head in range(4):
            mine, shared = slice(2 * head, 2 * head + 2), slice(2 * (head // 2), 2 * (head // 2) + 2)
            scores = [(q[mine] @ x[0, i]) @ (k[shared] @ x[0, j]) / np.sqrt(2) for j in range(i + 1)]
            shares = np.exp(scores) / np.exp(scores).sum()
            heads.append(sum(share * (v[shared] @ x[0, j]) for j, share in enumerate(shares)))
        np.testing.assert_allclose(found[0, i], o @ np.concatenate(heads), atol=1e-5)


def test_rotations_make_scores_depend_on_distance_alone():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 1, 1, 1, 1, 2)).astype(np.float32)
    turned = lambda x, at: decoder.rotate(x, decoder.rotation(ARCHITECTURE, np.array([[at]])))  # noqa: E731
    assert (turned(q, 5) * turned(k, 2)).sum() == pytest.approx((turned(q, 13) * turned(k, 10)).sum(), abs=1e-5)
    angle = np.arctan2(*turned(np.array([1.0, 0.0], np.float32), 3)[..., ::-1].reshape(2))
    assert angle == pytest.approx(3)  # of the first pair: position x theta^0


def test_dropout_zeroes_by_the_documented_bits_and_scales_the_rest_up():
    seeds, position = np.array([7, 8], np.uint32), np.array([[0, 1, 2], [0, 0, 1]])
    found = decoder.drop(Dropout(0.25, seeds), np.full((2, 3, 16), 3.0, np.float32), 5, position)
    kept = randomness.dropout_bits(seeds, 5, position, 16) >= 0.25 * 2**24
    np.testing.assert_allclose(found, np.where(kept, 4.0, 0.0))
    assert kept.mean() == pytest.approx(0.75, abs=0.15)


# --------------------------------------------------------------------------------------------------- gradients and Adam


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_finite_differences(policy, dropout):
    """Along each parameter's gradient, the slope is the gradient's norm."""
    policy = policy.with_value_head()
    policy.weights["score.weight"] = np.linspace(-1, 1, 8, dtype=np.float32)[None]
    learning, terms = learner(policy), [term(rows(), dropout=dropout)]
    weights = dict(policy.weights)

    def loss(name: str, array: np.ndarray) -> float:
        other = Decoder(ARCHITECTURE, {**weights, name: array.astype(np.float32)})
        return learner(other, learning_rate=0.0).update(terms)["loss"]

    for name, gradient in learning.gradients(terms).items():
        name, length = name.removeprefix("policy."), np.linalg.norm(gradient)
        step = 2e-3 * gradient / length
        slope = (loss(name, weights[name] + step) - loss(name, weights[name] - step)) / (2 * 2e-3)
        assert slope == pytest.approx(length, rel=2e-2, abs=2e-3), name


def test_gradients_do_not_depend_on_micro_batches(policy):
    whole = term(rows(), Likelihood(("logprobs",)), dropout=0.3)
    cuts = [slice(0, 1), slice(1, 3)]
    seeds = whole.dropout.seeds
    parts = [
        Term(whole.loss, whole.sequences.take(c), {"weights": whole.batch["weights"][c]}, 0.8, Dropout(0.3, seeds[c]))
        for c in cuts
    ]
    one, other = learner(policy).gradients([whole]), learner(policy).gradients(parts)
    for name in one:
        np.testing.assert_allclose(other[name], one[name], atol=1e-5, err_msg=name)
        assert one[name].dtype == np.float32


@pytest.mark.parametrize("tf_style", [False, True])
def test_the_first_step_of_adam_is_that_of_the_paper(policy, tf_style):
    """m / (1 - β₁) = g and v / (1 - β₂) = g², so θ₁ = θ₀ - lr (g / (|g| + ε) + λ θ₀), with the clipped g."""
    before, terms = policy.parameters(), [term(rows(), Likelihood(("logprobs",)))]
    gradients = learner(policy).gradients(terms)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
    metrics = learner(policy, tf_style=tf_style, weight_decay=0.1, max_grad_norm=0.5).update(terms, lr_scale=0.5)
    assert metrics["grad_norm/policy"] == pytest.approx(norm, rel=1e-5) and norm > 0.5
    eps = 1e-2 if tf_style else 1e-3  # 1e-3 / sqrt(1 - 0.99)
    for name, parameter in policy.parameters().items():
        g = gradients[f"policy.{name}"] * 0.5 / norm
        decay = 0.1 * before[name] if parameter.ndim == 2 else 0.0
        np.testing.assert_allclose(parameter, before[name] - 5e-3 * (g / (np.abs(g) + eps) + decay), atol=1e-6, err_msg=name)


def test_the_average_is_a_moving_one_of_the_weights(policy):
    before, learning = policy.parameters(), learner(policy, ema_decay=0.9)
    learning.update([term(rows(), Likelihood(("logprobs",)))])
    after, averaged = policy.parameters(), learning.averaged("policy").parameters()
    for name in before:
        np.testing.assert_allclose(averaged[name], 0.9 * before[name] + 0.1 * after[name], atol=1e-6, err_msg=name)


def test_a_restored_learner_continues_bit_for_bit(policy, tmp_path):
    terms = [term(rows(), Likelihood(("logprobs",)), dropout=0.1)]
    other = policy.copy()
    one = learner(policy, ema_decay=0.9, weight_decay=0.1)
    one.update(terms)
    one.save(tmp_path)
    one.update(terms)
    again = learner(other, ema_decay=0.9, weight_decay=0.1)
    again.restore(tmp_path)
    again.update(terms)
    for first, second in ((policy, other), (one.averaged("policy"), again.averaged("policy"))):
        for name, array in first.parameters().items():
            np.testing.assert_array_equal(second.parameters()[name], array, err_msg=name)
    with pytest.raises(CheckpointError, match="of another architecture: policy.average.* do not fit"):
        learner(other).restore(tmp_path)


def test_training_does_not_change_a_copy(policy):
    reference, before = policy.copy(), policy.parameters()
    learner(policy).update([term(rows(), Likelihood(("logprobs",)))])
    assert all(np.array_equal(array, before[name]) for name, array in reference.parameters().items())
    assert not any(np.array_equal(array, before[name]) for name, array in policy.parameters().items())


def test_an_output_that_no_model_supplies_is_named(policy):
    with pytest.raises(ConfigError, match="The loss needs values, which no model supplies. Models: policy."):
        learner(policy).update([term(rows(), Likelihood(("values",)))])


# ----------------------------------------------------------------------------------- what autograd lacks of the standard


def test_broadcast_arguments_of_where_get_gradients_of_their_own_shape():
    mask = np.array([[True, False], [True, True], [False, False]])
    x, y = np.ones(2, np.float32), np.ones((3, 1), np.float32)
    gradients = [grad(lambda x, y: array_api.sum(array_api.where(mask, x, y)), i)(x, y) for i in (0, 1)]
    assert gradients[0].tolist() == [2, 1] and gradients[1].tolist() == [[1], [0], [2]]
    assert {g.dtype for g in gradients} == {np.dtype(np.float32)}


def test_masked_entries_reach_neither_the_sum_nor_its_gradient():
    weights = np.array([0.5, 0.0, 0.5], np.float32)
    x = np.array([1.0, np.nan, 3.0], np.float32)
    assert losses.weighted_sum(array_api, x, weights) == 2
    assert grad(lambda x: losses.weighted_sum(array_api, x, weights))(x).tolist() == [0.5, 0, 0.5]


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_come_back_bit_for_bit_without_the_value_head(policy, tmp_path):
    policy.with_value_head().save(tmp_path)
    again = Decoder.load(tmp_path, BACKEND)
    assert again.architecture == ARCHITECTURE and again.weights.keys() == policy.weights.keys()
    assert all(np.array_equal(array, policy.weights[name]) for name, array in again.weights.items())


def test_a_rescaled_reward_model_comes_back(policy, tmp_path):
    scalar = policy.scalar_model(np.ones(8, np.float32))
    scores = scalar.evaluate(rows(), ["scores"])["scores"]
    scalar.rescale(2.0, 0.5)
    scalar.rescale(0.5, 1.0)  # s -> (2 s + 0.5) / 2 + 1
    scalar.save(tmp_path)
    found = Decoder.load_scalar(tmp_path, BACKEND).evaluate(rows(), ["scores"])["scores"]
    np.testing.assert_allclose(found, scores + 1.25, atol=1e-5)


def test_a_model_with_switches_that_would_be_ignored_is_refused(policy, tmp_path):
    write_tensors(tmp_path / "model.safetensors", policy.weights)
    write_json(tmp_path / "config.json", {**to_hf(ARCHITECTURE), "hidden_act": "gelu"})
    with pytest.raises(CheckpointError, match="that is not a small decoder: backend=numpy opens no other"):
        Decoder.load(tmp_path, BACKEND)


def test_sequences_join_what_was_generated(policy):
    """The sampler's log-probabilities are those of the training graph."""
    tokens, mask = left_pad(PROMPTS, GARBAGE, 5)
    seeds = randomness.token_seeds(2, "test", 0, 3, 6)
    drawn = policy.generate(tokens, mask, seeds, temperature=0.8, stop_ids=[2], pad_id=GARBAGE)
    block = join(tokens, mask, drawn.tokens, drawn.mask)
    scored = policy.evaluate(block, ["logprobs"], temperature=0.8)["logprobs"]
    np.testing.assert_allclose(drawn.logprobs[drawn.mask], scored[drawn.mask], atol=1e-5)
