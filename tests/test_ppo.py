"""PPO on a tiny real policy: what it feeds the learner, and what it leaves alone.

Expected values come from loops over tokens, from models evaluated one row at a time, or from numbers written here.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import CONSTANT, Data, NoTexts, Scored, configure, gradients, head, relative, same, spy
from lockstep.errors import ConfigError, MissingData, RewardError
from lockstep.interfaces import Generated, Term
from lockstep.learning import losses
from lockstep.learning.online import Clock
from lockstep.text.sequences import pack
from lockstep.types import Prompt

SMALL = {"iterations": 3, "batch_size": 8, "epochs": 1, "temperature": 0.7, "schedule": CONSTANT}


@pytest.fixture
def ppo(make):
    """ppo(**changes): PPO with 8 episodes, T = 0.7, one step per iteration; every response is scored by its length."""
    return lambda reward_model=None, **changes: make("ppo", reward_model=reward_model or Scored(), **(SMALL | changes))


def prepared(algorithm, step=0):
    rollout = algorithm.rollout(step, Clock())
    return rollout, *algorithm.prepare(rollout)


def rows_of(rollout, rows):
    """A rollout of some of its episodes."""
    arrays = [f.name for f in fields(rollout) if f.name not in ("sequences", "responses", "details", "forward")]
    taken = {name: getattr(rollout, name)[rows] for name in arrays}
    responses = replace(rollout.responses, prompts=[rollout.responses.prompts[i] for i in rows],
                        texts=[rollout.responses.texts[i] for i in rows])  # fmt: skip
    return replace(rollout, sequences=rollout.sequences.take(rows), responses=responses, **taken)


@dataclass(frozen=True)
class Likelihood:
    outputs = ("logprobs",)

    def __call__(self, xp, outputs, batch):
        return losses.weighted_sum(xp, -outputs["logprobs"], batch["weights"]), {}


# ------------------------------------------------------------------------------------------------ models and samplers


def block(pad_id=36, prompt_columns=6, response_columns=6):
    """Rows of different lengths: prompts of 5, 4, 3, 2 tokens and responses of 1, 3, 6, 2."""
    rng = np.random.default_rng(0)
    prompts, responses = ([rng.integers(0, 34, n).tolist() for n in lengths] for lengths in ((5, 4, 3, 2), (1, 3, 6, 2)))
    return pack(prompts, responses, pad_id, prompt_columns=prompt_columns, response_columns=response_columns)


def test_padding_and_what_stands_in_it_change_nothing(load):
    policy, scalar = load(), load().scalar_model(head())
    tight, wide = block(), block(pad_id=9999, prompt_columns=11, response_columns=9)
    for model, names in ((policy, ("logprobs", "entropy")), (scalar, ("values", "scores"))):
        one, other = model.evaluate(tight, names), model.evaluate(wide, names)
        for name in names:
            a, b = (one[name], other[name]) if name == "scores" else (one[name][tight.mask], other[name][wide.mask])
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


def test_rows_do_not_depend_on_their_neighbours(load):
    model = load().scalar_model(head())
    rows, order = block(), np.array([2, 0, 3, 1])
    whole = model.evaluate(rows, ("values", "scores"))
    permuted = model.evaluate(rows.take(order), ("values", "scores"))
    np.testing.assert_allclose(permuted["scores"], whole["scores"][order], atol=1e-5)
    for i in range(4):
        alone = model.evaluate(rows.take([i]), ("values", "scores"))
        np.testing.assert_allclose(alone["scores"][0], whole["scores"][i], atol=1e-5)
        np.testing.assert_allclose(alone["values"][0][rows.mask[i]], whole["values"][i][rows.mask[i]], atol=1e-5)


def test_two_forwards_agree_bit_for_bit(load):
    policy, rows = load(), block()
    same(policy.evaluate(rows, ("logprobs", "entropy")), policy.evaluate(rows, ("logprobs", "entropy")))


def test_the_score_is_read_in_the_state_after_the_last_real_token(load):
    """The value of one more token, before it is emitted, is the score of the row without it."""
    model, rows = load().scalar_model(head()), block()
    longer = pack([rows.tokens[i, :6][rows.prompt_mask[i]].tolist() for i in range(4)],
                  [[*rows.responses[i][rows.mask[i]].tolist(), 7] for i in range(4)], 36)  # fmt: skip
    values = model.evaluate(longer, ["values"])["values"]
    np.testing.assert_allclose(model.evaluate(rows, ["scores"])["scores"], values[np.arange(4), [1, 3, 6, 2]], atol=1e-5)


def test_logprobs_are_of_logits_over_the_temperature(load):
    """Σ_v π(v) = 1 at every temperature, and log π_T(a) - log π_T(b) = (log π(a) - log π(b)) / T."""
    policy = load()
    every = pack([[1, 2, 3]] * 37, [[v] for v in range(37)], 36)
    plain, sharp = (policy.evaluate(every, ["logprobs", "entropy"], temperature=t) for t in (1.0, 0.5))
    logp, logs = plain["logprobs"][:, 0].astype(np.float64), sharp["logprobs"][:, 0].astype(np.float64)
    assert np.exp(logp).sum() == pytest.approx(1, abs=1e-5) and np.exp(logs).sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(logs - logs[0], 2 * (logp - logp[0]), atol=1e-4)
    np.testing.assert_allclose(sharp["entropy"][:, 0], -(np.exp(logs) * logs).sum(), atol=1e-4)


def test_the_samplers_logprobs_are_those_of_teacher_forcing(ppo):
    _, _, metrics = prepared(ppo())
    assert metrics["sampler/mismatch_max"] < 1e-4 and metrics["sampler/mismatch_mean"] < 2e-5


class OnePrompt(Data):
    def prompts(self, split):
        return [Prompt.of("w1 w2 w3")]


def test_samples_differ_between_rows_updates_and_seeds_and_repeat_with_the_seed(ppo):
    draw = lambda step, **changes: ppo(data=OnePrompt(), **changes).rollout(step, Clock()).sequences.responses.tolist()  # noqa: E731
    first = draw(0)
    assert len({tuple(row) for row in first}) == 8
    assert first == draw(0)
    assert all(a != b for a, b in zip(first, draw(1), strict=True))
    assert all(a != b for a, b in zip(first, draw(0, seed=1), strict=True))


# ------------------------------------------------------------------------------------------- PPO: before the first step


@pytest.mark.parametrize("network", ["separate", "shared"])
def test_before_the_first_step_nothing_has_moved(ppo, network):
    metrics = ppo(value_network=network).step(0)
    for name in ("policy/clip_fraction", "value/clip_fraction"):
        assert metrics[name] == 0, name
    for name in ("objective/kl", "objective/k3"):  # the policy's pass and the reference's may be two programs
        assert metrics[name] == pytest.approx(0, abs=1e-6), name
    assert metrics["policy/approx_kl"] < 1e-10
    assert metrics["policy/loss"] == pytest.approx(0, abs=1e-6)
    assert metrics["loss"] == pytest.approx(0.1 * metrics["value/loss"], abs=1e-6) and metrics["value/loss"] > 0


def test_old_and_reference_logprobs_are_taken_at_the_sampling_temperature(ppo, load):
    algorithm = ppo()
    algorithm.ref_policy = load(1)
    rollout, _, metrics = prepared(algorithm)
    mine, theirs = (p.evaluate(rollout.sequences, ["logprobs"], temperature=0.7)["logprobs"] for p in (load(0), load(1)))
    mask = rollout.sequences.response_mask
    sums = [sum(float(mine[i, t] - theirs[i, t]) for t in range(12) if mask[i, t]) for i in range(8)]
    assert metrics["objective/kl"] == pytest.approx(sum(sums) / 8, abs=1e-4)
    assert abs(metrics["objective/kl"]) > 0.1
    assert {term.temperature for term in algorithm.terms(rollout.sequences, algorithm.prepare(rollout)[0], np.arange(8))} == {0.7}


def test_entropy_and_score_are_logged_over_what_counts(ppo):
    rollout, _, metrics = prepared(ppo())
    counted = [float(rollout.entropy[i, t]) for i, t in np.argwhere(rollout.sequences.mask)]
    assert metrics["objective/entropy"] == pytest.approx(sum(counted) / len(counted), rel=1e-5)
    assert metrics["objective/length"] == len(counted) / 8
    assert metrics["objective/score"] == pytest.approx(len(counted) / 8 - 5)


# ------------------------------------------------------------------------------------------------------ PPO: rewards


def test_a_constant_score_of_073_is_every_tokens_monte_carlo_return(ppo, load):
    """KL is 0 at first; with λ = 1 each return is the sum of the rewards to come, whatever the value network says."""
    model = Scored(lambda r: np.full(8, 0.73), load(1).scalar_model(head()))
    rollout, batch, metrics = prepared(ppo(model, lam=1.0, unfinished_score=None))
    mask = rollout.sequences.mask
    np.testing.assert_allclose(batch["returns"], np.where(mask, 0.73, 0), atol=1e-5)
    assert metrics["objective/reward"] == pytest.approx(0.73)
    assert abs(rollout.old_values[mask]).min() > 0


def test_rewards_sum_to_the_score_minus_beta_times_the_kl(ppo, load):
    algorithm = ppo(lam=1.0, kl_coef=0.3, unfinished_score=None)
    algorithm.ref_policy = load(1)
    rollout, batch, _ = prepared(algorithm)
    for i, counts in enumerate(rollout.sequences.mask):
        kl = sum(float(rollout.old_logprobs[i, t] - rollout.ref_logprobs[i, t]) for t in range(12) if counts[t])
        assert batch["returns"][i, 0] == pytest.approx(rollout.scores[i] - 0.3 * kl, abs=1e-4)


def test_reward_whitening_scales_rewards_and_keeps_their_mean(ppo, load):
    returns = {}
    for on in (False, True):
        algorithm = ppo(lam=1.0, kl_coef=0.3, whiten_rewards=on)
        algorithm.ref_policy = load(1)
        rollout, batch, metrics = prepared(algorithm)
        returns[on] = batch["returns"]
    mask = rollout.sequences.mask
    to_come = {on: np.pad(r, ((0, 0), (0, 1)))[:, 1:] for on, r in returns.items()}
    raw, scaled = ((returns[on] - to_come[on])[mask] for on in (False, True))
    assert scaled.mean() == pytest.approx(raw.mean(), abs=1e-5)
    assert scaled.std() == pytest.approx(1, abs=1e-4)
    assert np.corrcoef(raw, scaled)[0, 1] == pytest.approx(1, abs=1e-5)


def test_advantages_are_whitened_over_the_whole_batch_and_returns_are_not(ppo, load):
    model = Scored(network=load(1).scalar_model(head()))
    rollout, batch, _ = prepared(ppo(model, minibatches=4))
    _, plain, _ = prepared(ppo(model, minibatches=4, whiten_advantages=False))
    mask = rollout.sequences.mask
    assert batch["advantages"][mask].mean() == pytest.approx(0, abs=1e-5)
    assert batch["advantages"][mask].std() == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(batch["returns"], np.where(mask, plain["advantages"] + rollout.old_values, 0), atol=1e-5)


def crafted(algorithm, responses, monkeypatch):
    """Let the policy 'sample' these token lists; what `generate` was asked for is returned."""
    asked = {}

    def generate(tokens, mask, seeds, **options):
        asked.update(options)
        drawn = np.full(seeds.shape, algorithm.tokenizer.pad_id, np.int32)
        for row, response in enumerate(responses):
            drawn[row, : len(response)] = response
        counts = np.arange(seeds.shape[1]) < np.array([[len(r)] for r in responses])
        return Generated(drawn, counts, np.zeros(seeds.shape, np.float32))

    monkeypatch.setattr(algorithm.policy, "generate", generate)
    return asked


def test_only_the_configured_stop_token_finishes_a_response(ppo, tokenizer, monkeypatch):
    """<eos> is in the vocabulary, but this tokenizer stops at <stop>."""
    stop, eos = tokenizer.eos_id, tokenizer.core.token_to_id("<eos>")
    algorithm = ppo(Scored(lambda r: [5, 5, 5]), batch_size=3, lam=1.0)
    asked = crafted(algorithm, [[1, 2, stop], [1, 2, *[3] * 9, eos], [*[3] * 11, stop]], monkeypatch)
    rollout, batch, metrics = prepared(algorithm)
    assert asked == {"temperature": 0.7, "stop_ids": [stop], "pad_id": tokenizer.pad_id}
    assert rollout.finished.tolist() == [True, False, True]
    np.testing.assert_allclose(batch["returns"][:, 0], [5, -1, 5], atol=1e-5)
    assert metrics["objective/score"] == 5 and metrics["objective/finished"] == pytest.approx(2 / 3)


def test_without_a_score_for_the_unfinished_the_reward_models_stands(ppo, monkeypatch):
    algorithm = ppo(Scored(lambda r: [5, 5]), batch_size=2, lam=1.0, unfinished_score=None)
    crafted(algorithm, [[1, 2], [3] * 12], monkeypatch)
    np.testing.assert_allclose(prepared(algorithm)[1]["returns"][:, 0], 5, atol=1e-5)


def test_the_reward_model_reads_prompts_texts_and_tokens_of_the_same_rows(ppo, tokenizer):
    seen = []
    rollout = ppo(Scored(lambda r: seen.append(r) or np.zeros(8))).rollout(0, Clock())
    [responses] = seen
    for i in range(8):
        real = rollout.sequences.responses[i][rollout.sequences.mask[i]]
        assert responses.texts[i] == tokenizer.decode(real)
        prompt = rollout.sequences.tokens[i, : rollout.sequences.prompt_length][rollout.sequences.prompt_mask[i]]
        assert tokenizer.decode(prompt) == responses.prompts[i].messages[0].content


# --------------------------------------------------------------------------------------- PPO: which tokens get gradients


def test_the_rollout_has_finished_and_unfinished_responses_of_different_lengths(ppo):
    """What the tests below need to mean anything."""
    rollout = ppo().rollout(0, Clock())
    assert 0 < rollout.finished.sum() < 8
    assert len(set(rollout.sequences.mask.sum(axis=1))) > 2


def test_eos_gets_policy_gradient_and_nothing_after_it_does(ppo):
    algorithm = ppo(value_coef=0.0)
    rollout, batch, _ = prepared(algorithm)
    row = int(np.argmax(rollout.finished))
    eos = rollout.sequences.mask[row].sum() - 1
    assert rollout.sequences.responses[row, eos] == algorithm.tokenizer.eos_id
    only = {True: np.zeros((8, 12), np.float32), False: np.zeros((8, 12), np.float32)}
    only[True][row, eos], only[False][row, eos + 1 :] = 1, 1e3
    at_eos, after = (gradients(algorithm, rollout, batch | {"advantages": only[here]}) for here in (True, False))
    assert max(abs(g).max() for g in at_eos.values()) > 1e-4
    assert all((g == 0).all() for g in after.values())


@pytest.mark.parametrize("network", ["separate", "shared"])
def test_whatever_stands_after_eos_is_inert(ppo, network):
    algorithm = ppo(value_network=network)
    rollout, batch, metrics = prepared(algorithm)
    garbage = ~rollout.sequences.response_mask
    assert garbage.any()
    tokens = rollout.sequences.tokens.copy()
    tokens[:, rollout.sequences.prompt_length :][garbage] = 9999
    names = ("old_logprobs", "ref_logprobs", "old_values", "entropy", "sampler_logprobs")
    dirty = replace(rollout, sequences=replace(rollout.sequences, tokens=tokens),
                    **{n: np.where(garbage, np.nan, getattr(rollout, n)) for n in names})  # fmt: skip
    other, dirty_metrics = algorithm.prepare(dirty)
    assert metrics == pytest.approx(dirty_metrics)
    [term] = algorithm.terms(rollout.sequences, batch, np.arange(8), rollout.forward)
    kept = algorithm.learner.gradients([term])  # from the rollout's own pass; the others are by one program
    clean = gradients(algorithm, rollout, batch)
    same(clean, gradients(algorithm, dirty, other))
    assert relative(kept, clean) < 1e-6


@pytest.mark.parametrize("network", ["separate", "shared"])
def test_gradients_do_not_depend_on_the_micro_batch(ppo, load, network):
    model = Scored(network=load(1).scalar_model(head()))
    found, metrics = {}, {}
    for size in (None, 1, 2, 3, 4, 8):
        algorithm = ppo(model, micro_batch_size=size, value_network=network)
        rollout, batch, _ = prepared(algorithm)
        terms = algorithm.terms(rollout.sequences, batch, np.arange(8))
        assert len(terms) == math.ceil(8 / (size or 8))
        found[size] = algorithm.learner.gradients(terms)
        metrics[size] = {n: v for n, v in algorithm.learner.update(terms).items() if not n.startswith("grad_norm")}
    for size in (1, 2, 3, 4, 8):
        assert relative(found[None], found[size]) < 1e-5, size
        assert metrics[size] == pytest.approx(metrics[None], rel=1e-4, abs=1e-6)


def test_an_episode_without_a_score_is_out_of_the_batch(ppo, load):
    """NaN for one episode gives the gradient of a batch that never had it; a score of 0 would not."""
    scores = lambda r: r.sequences.mask.sum(axis=1) - 5.0  # noqa: E731
    network = load(1).scalar_model(head())
    lost = lambda value: Scored(lambda r: np.where(np.arange(8) == 2, value, scores(r)), network)  # noqa: E731
    algorithm = ppo(lost(np.nan))
    rollout, batch, metrics = prepared(algorithm)
    without = rows_of(rollout, [0, 1, 3, 4, 5, 6, 7])
    expected = gradients(algorithm, without, algorithm.prepare(without)[0])
    found = gradients(algorithm, rollout, batch)
    assert relative(expected, found) < 1e-5
    assert metrics["objective/dropped"] == 1
    assert metrics["objective/score"] == pytest.approx(scores(without).mean())
    zero = ppo(lost(0.0))
    zero.reward_model.details = lambda: {"part": np.array([1, 2, np.nan, 3, 4, 5, 6, 7], np.float32)}
    rollout, batch, metrics = prepared(zero)
    assert metrics["reward_model/part"] == 4  # the mean over the responses of which it is known
    assert relative(expected, gradients(zero, rollout, batch)) > 1e-3


def test_a_batch_without_any_score_stops_the_run(ppo):
    with pytest.raises(RewardError, match="scored none of the batch's episodes"):
        ppo(Scored(lambda r: [np.nan] * 8)).step(0)


def test_importance_weights_correct_for_the_sampler_up_to_a_cap(ppo):
    algorithm = ppo(correction={"kind": "truncate", "high": 2.0})
    rollout = algorithm.rollout(0, Clock())
    shift = np.zeros((8, 12), np.float32)
    shift[0], shift[1], shift[2] = math.log(3), math.log(1.5), -math.log(4)
    weights = algorithm.correction(replace(rollout, sampler_logprobs=rollout.old_logprobs - shift))
    for row, expected in enumerate([2, 1.5, 0.25, 1]):
        np.testing.assert_allclose(weights[row][rollout.sequences.mask[row]], expected, rtol=1e-5)
    batch = algorithm.prepare(rollout)[0] | {"correction": weights}
    [term] = algorithm.terms(rollout.sequences, batch, np.arange(8))
    np.testing.assert_allclose(term.batch["policy_weights"], term.batch["weights"] * weights, rtol=1e-6)
    assert term.batch["weights"].sum() == pytest.approx(1, abs=1e-6)


# --------------------------------------------------------------------------------------------------- PPO: optimisation


@pytest.mark.parametrize(("epochs", "minibatches", "micro"), [(1, 1, None), (3, 2, None), (2, 4, 1), (1, 8, 1)])
def test_optimizer_steps_are_epochs_times_minibatches_and_a_pass_sees_each_episode_once(
    ppo, monkeypatch, epochs, minibatches, micro
):
    algorithm = ppo(epochs=epochs, minibatches=minibatches, micro_batch_size=micro)
    calls = spy(algorithm, monkeypatch)
    algorithm.step(0)
    assert len(calls) == epochs * minibatches
    everyone = sorted(map(bytes, algorithm.last.sequences.tokens))
    for first in range(0, len(calls), minibatches):
        terms = [term for terms, _ in calls[first : first + minibatches] for term in terms]
        assert sorted(bytes(row) for term in terms for row in term.sequences.tokens) == everyone
    for terms, _ in calls:
        assert sum(term.sequences.rows for term in terms) == 8 // minibatches
        assert sum(float(term.batch["weights"].sum()) for term in terms) == pytest.approx(1, abs=1e-6)


def test_minibatches_are_shuffled_anew_in_every_pass_of_every_iteration(ppo):
    algorithm = ppo(epochs=4, minibatches=2)
    orders = {tuple(np.concatenate(algorithm.minibatches(step, epoch))) for step in range(3) for epoch in range(4)}
    assert len(orders) == 12


def test_every_array_of_a_minibatch_belongs_to_its_rows(ppo):
    algorithm = ppo(micro_batch_size=2)
    rollout, batch, _ = prepared(algorithm)
    batch["correction"] = np.arange(96, dtype=np.float32).reshape(8, 12)
    terms, rows = algorithm.terms(rollout.sequences, batch, np.array([6, 1, 4])), [[6, 1], [4]]
    n = rollout.sequences.mask[[6, 1, 4]].sum()
    for term, here in zip(terms, rows, strict=True):
        for name in ("old_logprobs", "old_values", "advantages", "returns", "mask"):
            np.testing.assert_array_equal(term.batch[name], batch[name][here])
        np.testing.assert_array_equal(term.sequences.tokens, rollout.sequences.tokens[here])
        np.testing.assert_allclose(term.batch["weights"], rollout.sequences.mask[here] / n)
        np.testing.assert_allclose(
            term.batch["policy_weights"], rollout.sequences.mask[here] / n * batch["correction"][here], rtol=1e-6
        )


def test_the_learning_rate_follows_the_iteration(ppo, monkeypatch):
    algorithm = ppo(iterations=4, epochs=2, schedule={"shape": "linear", "warmup_steps": 0, "final": 0.0})
    calls = spy(algorithm, monkeypatch)
    assert [algorithm.step(step)["lr_scale"] for step in (0, 3)] == [1, 0.25]
    assert [scale for _, scale in calls] == [1, 1, 0.25, 0.25]


def test_training_moves_policy_and_value_network_and_leaves_reference_and_reward_model(ppo, learned, load):
    algorithm = ppo(learned, epochs=2, minibatches=2)
    critic = {n: p.copy() for n, p in algorithm.learner.models["value"].parameters().items()}
    same(critic, learned.model.parameters())  # the value network starts from the reward model
    for step in range(3):
        algorithm.step(step)
    same(algorithm.ref_policy.parameters(), load(0).parameters())
    same(learned.model.parameters(), load(1).scalar_model(head()).parameters())
    assert relative(algorithm.policy.parameters(), load(0).parameters()) > 1e-4
    assert relative(algorithm.learner.models["value"].parameters(), critic) > 1e-4


def test_the_value_loss_does_not_touch_a_policy_with_a_separate_value_network(ppo, learned):
    algorithm = ppo(learned)
    rollout, batch, _ = prepared(algorithm)
    found = gradients(algorithm, rollout, batch | {"advantages": np.zeros((8, 12), np.float32)})
    assert all((g == 0).all() for n, g in found.items() if n.startswith("policy."))
    assert max(abs(g).max() for n, g in found.items() if n.startswith("value.")) > 0


def test_values_start_at_zero_without_a_network_to_start_from_and_on_a_shared_trunk(ppo):
    for network in ("separate", "shared"):
        assert not prepared(ppo(value_network=network))[0].old_values.any()


def test_ppo_learns_to_stop_when_length_is_punished(ppo):
    algorithm = ppo(Scored(lambda r: -r.sequences.mask.sum(axis=1)), batch_size=64, epochs=4, unfinished_score=None,
                    temperature=1.0, lam=1.0, optimizer={"learning_rate": 3e-3}, data=OnePrompt())  # fmt: skip
    scores = [algorithm.step(step)["objective/score"] for step in range(12)]
    assert scores[-1] > scores[0] + 3


# ------------------------------------------------------------------------------------------------------------ PPO: ptx


def test_ptx_gradient_is_ppos_plus_coef_times_the_language_models(ppo):
    algorithm = ppo(ptx_coef=27.8, ptx_ratio=0.5)
    rollout, batch, _ = prepared(algorithm)
    terms, [ptx] = algorithm.terms(rollout.sequences, batch, np.arange(8)), algorithm.extra_terms(0, 0)
    mask = ptx.sequences.mask
    plain = Term(Likelihood(), ptx.sequences, {"weights": (mask / mask.sum()).astype(np.float32)})
    alone, language = algorithm.learner.gradients(terms), algorithm.learner.gradients([plain])
    both = algorithm.learner.gradients([*terms, ptx])
    assert relative({n: alone[n] + 27.8 * language[n] for n in alone}, both) < 1e-6
    assert ptx.temperature == 1 and ptx.sequences.rows == 4


def test_ptx_reads_eight_texts_per_episode_and_goes_on_where_it_stopped(ppo, monkeypatch):
    algorithm = ppo(ptx_coef=1.0, minibatches=4, epochs=2, micro_batch_size=5)
    calls = spy(algorithm, monkeypatch)
    algorithm.step(0)
    texts = [[t for term in terms if "mask" not in term.batch for t in map(bytes, term.sequences.tokens)] for terms, _ in calls]
    assert [len(t) for t in texts] == [16] * 8  # minibatches of 2 episodes
    assert all(one != other for one, other in itertools.pairwise(texts))
    for terms, _ in calls:
        weight = sum(float(term.batch["weights"].sum()) for term in terms if "mask" not in term.batch)
        assert weight == pytest.approx(1, abs=1e-5)


def test_a_ptx_coefficient_of_zero_needs_no_texts_and_changes_nothing(ppo):
    with pytest.raises(MissingData):
        ppo(ptx_coef=1.0, data=NoTexts())
    off, never = ppo(ptx_coef=0.0, ptx_ratio=8.0, data=NoTexts()), ppo(ptx_coef=0.0, ptx_ratio=0.0)
    for algorithm in (off, never):
        algorithm.step(0)
    same(off.policy.parameters(), never.policy.parameters())


# ------------------------------------------------------------------------------------------- PPO: KL controller, resume


def test_the_adaptive_controller_is_fed_the_mean_over_episodes_of_the_sum_over_tokens(ppo, load):
    algorithm = ppo(kl_coef=0.15, kl_target=6.0)
    algorithm.ref_policy = load(1)
    metrics = algorithm.step(0)
    rollout = algorithm.last
    kl = sum(float(rollout.old_logprobs[i, t] - rollout.ref_logprobs[i, t]) for i, t in np.argwhere(rollout.sequences.mask)) / 8
    assert abs(kl) > 0.5
    error = max(-0.2, min(0.2, kl / 6 - 1))
    assert metrics["kl_coef"] == 0.15
    assert algorithm.kl.coef == pytest.approx(0.15 * (1 + error * 8 / 10000), abs=1e-9)


def test_the_coefficient_of_this_iteration_is_in_its_rewards(ppo, load):
    algorithm = ppo(kl_coef=0.5, kl_target=6.0, lam=1.0, unfinished_score=None)
    algorithm.ref_policy = load(1)
    algorithm.load_state({"kl_coef": 2.0})
    rollout, batch, _ = prepared(algorithm)
    kl = float((rollout.old_logprobs - rollout.ref_logprobs)[0][rollout.sequences.mask[0]].sum())
    assert batch["returns"][0, 0] == pytest.approx(rollout.scores[0] - 2 * kl, abs=1e-4)


@pytest.mark.parametrize("value_network", ["shared", "separate"])
def test_a_reference_that_follows_is_the_average_before_each_step(ppo, value_network):
    """ema = 0.75 ema + 0.25 policy after each optimizer step, one of which is in an iteration here."""
    algorithm = ppo(kl_coef=0.5, value_network=value_network, reference="average", optimizer={"ema_decay": 0.75})
    first = average = {name: array.copy() for name, array in algorithm.policy.parameters().items()}
    for step in range(3):
        found = algorithm.step(step)
        rollout, reference = algorithm.last, algorithm.ref_policy.parameters()
        for name, array in average.items():
            np.testing.assert_allclose(reference[name], array, atol=1e-6, err_msg=name)
        assert (relative(reference, first) > 1e-5) == (step > 0)
        ref = algorithm.ref_policy.evaluate(rollout.sequences, ["logprobs"], temperature=0.7)["logprobs"]
        kl = np.where(rollout.sequences.mask, rollout.old_logprobs - ref, 0).sum(axis=1)
        assert found["objective/kl"] == pytest.approx(kl.mean(), abs=1e-5)
        assert (abs(found["objective/kl"]) < 1e-5) == (step == 0)
        now = algorithm.policy.parameters()
        average = {name: 0.75 * array + 0.25 * now[name] for name, array in average.items()}


@pytest.mark.parametrize("reference", ["initial", "average"])
def test_a_run_that_resumes_ends_where_an_uninterrupted_one_does_and_keeps_its_reference(ppo, load, tmp_path, reference):
    settings = {"kl_coef": 0.15, "kl_target": 1e-3, "epochs": 2, "minibatches": 2, "ptx_coef": 1.0, "value_network": "shared",
                "optimizer": {"ema_decay": 0.9}, "reference": reference}  # fmt: skip
    whole, begun = ppo(**settings), ppo(**settings)
    for step in range(3):
        whole.step(step)
    for step in range(2):
        begun.step(step)
    begun.learner.save(tmp_path)
    state = json.loads(json.dumps(begun.state()))
    resumed = ppo(**settings)
    resumed.learner.restore(tmp_path)
    resumed.load_state(state)
    if reference == "initial":
        same(resumed.ref_policy.parameters(), load(0).parameters())
    resumed.step(2)
    same(resumed.ref_policy.parameters(), whole.ref_policy.parameters())
    np.testing.assert_array_equal(resumed.last.kl, whole.last.kl)
    assert resumed.kl.coef == whole.kl.coef != 0.15
    same(resumed.policy.parameters(), whole.policy.parameters())
    same(resumed.result().parameters(), whole.result().parameters())


# ------------------------------------------------------------------------------------------------- PPO: configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minibatches": 3}, r"batch_size=8 is not divisible by algorithm.minibatches=3. Set minibatches to one of 1, 2, 4, 8\."),
        ({"temperature": 0.0}, "algorithm.temperature=0.0 must be above 0."),
        ({"value_network": "both"}, "value_network='both' is not one of separate, shared"),
        ({"reference": "average"}, "algorithm.reference=average is the moving average of the policy, and algorithm.optimizer"),
        ({"value_optimizer": {"ema_decay": 0.9}}, "algorithm.value_optimizer.ema_decay has no effect: the result is the policy"),
        ({"correction": {"level": "mean"}}, "algorithm.correction.level has no effect on kind=none. Set it to token, or kind"),
        ({"correction": {"high": 3.0}}, "high has no effect on kind=none. Set it to 2.0, or kind to truncate or mask."),
        ({"correction": {"kind": "truncate", "low": 0.1}}, "correction.low has no effect on kind=truncate. Set it to 0.5, or"),
        ({"schedule": {"shape": "cosin"}}, "is not one of constant, linear, cosine"),
    ],
)  # fmt: skip
def test_impossible_settings_say_what_would_be_possible(changes, message):
    with pytest.raises(ConfigError, match=message):
        configure("ppo", **(SMALL | changes))


def test_a_context_that_is_too_short_is_an_error_before_anything_runs(ppo):
    with pytest.raises(ConfigError, match=r"lengths.prompt \+ lengths.response = 60 \+ 12 exceeds the policy's context of 64"):
        ppo(lengths={"prompt": 60})


def test_a_value_network_whose_context_is_too_short_is_an_error_before_anything_runs(ppo):
    model = Scored()
    model.value_network = lambda: SimpleNamespace(context_length=17)
    with pytest.raises(ConfigError, match=r"lengths.response = 6 \+ 12 exceeds the value network's context of 17"):
        ppo(model)
    ppo(model, value_network="shared")


def test_the_batch_arithmetic_is_one_line():
    changes = {"iterations": 10, "epochs": 2, "minibatches": 2, "micro_batch_size": 3, "ptx_coef": 1.0}
    cls, config = configure("ppo", **(SMALL | changes))
    assert cls.arithmetic(config, Data()) == (
        "10 iterations x 8 episodes = 80 episodes over 12 prompts; 2 epochs x 2 minibatches of 4 = 4 optimizer steps per "
        "iteration; micro-batches of 3, + 32 raw texts each, from 12"
    )


# ---------------------------------------------------------------------------------------------------------- steady state


@pytest.mark.parametrize("backend", ["jax"], indirect=True)
@pytest.mark.parametrize("network", ["separate", "shared"])
def test_after_the_first_iteration_nothing_is_compiled_again(ppo, request, network):
    """Prompts and responses of all lengths: the shapes are those of the limits, whatever is drawn."""
    import jax

    compiled = []

    def listen(event, seconds, **about):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    request.addfinalizer(lambda: jax.monitoring.unregister_event_duration_listener(listen))
    algorithm = ppo(iterations=5, epochs=2, minibatches=2, value_network=network, clip_range=0.21)
    lengths = set()
    algorithm.step(0)
    assert compiled
    compiled.clear()
    for step in range(1, 5):
        algorithm.step(step)
        lengths |= set(algorithm.last.sequences.response_mask.sum(axis=1))
    assert not compiled
    assert len(lengths) > 2
