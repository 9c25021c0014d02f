"""Policy gradients without a value network: advantages, ratios, clips, means and penalties against numbers from the papers and
from hand calculation, and what the algorithm does with them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conftest import Scored, configure, same, spy
from lockstep.config.compose import group
from lockstep.config.folders import CORE, conf_folders
from lockstep.config.root import component_config
from lockstep.errors import ConfigError
from lockstep.learning import losses, numerics
from lockstep.learning.online import Clock
from lockstep.registry import registry
from lockstep_rlhf.algorithms.policy_gradient import PolicyGradientLoss


def f32(*values):
    return np.array(values, np.float32)


def advantages(*rewards, samples=None, baseline="group", scale="group"):
    """None: the response has no score."""
    counted = np.array([reward is not None for reward in rewards])
    values = np.array([np.nan if reward is None else reward for reward in rewards], np.float32)
    return numerics.group_advantages(values, counted, samples or len(rewards), baseline=baseline, scale=scale)


# ------------------------------------------------------------------------------------------------------------ advantages


@pytest.mark.parametrize(
    ("rewards", "options", "expected"),
    [
        ([1, 0, 0, 1], {}, [0.865875, -0.865875, -0.865875, 0.865875]),  # 0.5 / (0.577350 + 1e-4)
        ([1, 0, 0, 1], {"scale": "none"}, [0.5, -0.5, -0.5, 0.5]),
        ([1, 0, 0, 0], {"scale": "none"}, [0.75, -0.25, -0.25, -0.25]),
        ([1, 0, 0, 1], {"baseline": "leave_one_out", "scale": "none"}, [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        ([3, 1, 2], {"baseline": "leave_one_out", "scale": "none"}, [1.5, -1.5, 0]),
        ([1, 0, None, 1], {"scale": "none"}, [1 / 3, -2 / 3, 0, 1 / 3]),
        ([1, 0, None, 1], {"baseline": "leave_one_out", "scale": "none"}, [0.5, -1, 0, 0.5]),
        ([1, None, 2], {"baseline": "none", "scale": "none"}, [1, 0, 2]),
    ],
)
def test_advantages_of_a_group(rewards, options, expected):
    np.testing.assert_allclose(advantages(*rewards, **options), expected, atol=1e-6)


def test_the_groups_deviation_has_bessels_correction():
    np.testing.assert_allclose(advantages(1, 0, 0, 0), np.array([1.5, -0.5, -0.5, -0.5]), rtol=3e-4)


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@pytest.mark.parametrize("scale", ["none", "group"])
@pytest.mark.parametrize("rewards", [[0.1] * 7, [-3.7] * 2, [5.0], [None, 2.0, None]])
def test_equal_rewards_say_exactly_nothing(baseline, scale, rewards):
    assert advantages(*rewards, baseline=baseline, scale=scale).tolist() == [0] * len(rewards)


def test_groups_do_not_mix_and_a_response_that_does_not_count_moves_nobody():
    both = advantages(1, 0, 5, 9, samples=2, scale="none")
    np.testing.assert_allclose(both, [0.5, -0.5, -2, 2])
    rewards, counted = f32(1, 0, 100), np.array([True, True, False])
    found = numerics.group_advantages(rewards, counted, 3, baseline="group", scale="none")
    np.testing.assert_allclose(found, [0.5, -0.5, 0])


def test_reinforce_pp_with_a_baseline_whitens_over_the_batch():
    centred = advantages(1, 0, 1, 1, samples=2, scale="none")[:, None] * np.ones((4, 3), np.float32)
    found = numerics.whiten(centred, np.ones((4, 3), bool))
    np.testing.assert_allclose(found[:, 0], [math.sqrt(2), -math.sqrt(2), 0, 0], atol=1e-5)


def test_a_group_says_something_if_its_scores_differ():
    counted = np.array([True, True, True, True, True, False])
    assert numerics.informative(f32(0, 0, 1, 0, 2, np.nan), counted, 2).tolist() == [False, True, False]


def test_the_overlong_penalty_of_dapo():
    lengths = np.array([16384, 18432, 20480, 30000])
    assert numerics.overlong_penalty(lengths, 20480, 4096).tolist() == [0, -0.5, -1, -1]


def test_kl_to_go_sums_the_counted_tokens_that_follow():
    mask = np.array([[True, False, True, True]])
    assert numerics.to_go(f32([1, 50, 2, 3]), mask).tolist() == [[6, 0, 5, 3]]


# ----------------------------------------------------------------------------------------------------------------- means


def test_the_means_of_losses_1_and_2_2_2():
    losses_, mask = f32([1, 0, 0, 0], [2, 2, 2, 0]), np.array([[1, 0, 0, 0], [1, 1, 1, 0]], bool)
    mean = lambda how: float((losses_ * numerics.mean_weights(mask, how, 4)).sum())  # noqa: E731
    found = [mean(how) for how in ("token_mean", "response_mean", "response_sum", "constant")]
    assert found == pytest.approx([1.75, 1.5, 3.5, 0.875], abs=1e-6)


def test_a_response_without_counted_tokens_is_not_one_of_the_mean():
    mask = np.array([[1, 1], [0, 0]], bool)
    assert numerics.mean_weights(mask, "response_mean").tolist() == [[0.5, 0.5], [0, 0]]
    assert numerics.mean_weights(mask, "constant", 4).tolist() == [[0.25, 0.25], [0, 0]]
    assert numerics.mean_weights(np.zeros((2, 2), bool), "response_mean").tolist() == [[0, 0], [0, 0]]


# ------------------------------------------------------------------------------------------------------- ratios and clips


class Torch:
    def __init__(self):
        import torch
        from array_api_compat import torch as xp

        self.torch, self.xp = torch, xp

    def both(self, function, x):
        x = self.torch.tensor(x).requires_grad_()
        value = function(x)
        value.sum().backward()
        return value.detach().numpy(), x.grad.numpy()


class Jax:
    def __init__(self):
        import jax

        self.jax, self.xp = jax, jax.numpy

    def both(self, function, x):
        value = function(self.xp.asarray(x))
        return np.asarray(value), np.asarray(self.jax.grad(lambda x: function(x).sum())(self.xp.asarray(x)))


@pytest.fixture(params=[Torch, Jax], ids=["torch", "jax"])
def library(request):
    return request.param()


def of_ratio(library, loss, ratio, **options):
    """The loss of an advantage at a ratio, and its derivative in the log-probability."""
    value, slope = library.both(lambda x: loss(library.xp, x, **options), f32(math.log(ratio)))
    return float(value[0]), float(slope[0])


def clipped(xp, x, *, advantage, low=0.2, high=0.2, dual=None):
    return losses.clipped_policy_loss(xp, xp.exp(x), xp.zeros_like(x) + advantage, low=low, high=high, dual=dual)


def weighted(xp, x, *, advantage, low=0.0, high=5.0):
    return losses.clipped_weight_loss(xp, x, xp.zeros_like(x) + advantage, low=low, high=high)


def test_the_pessimistic_clip_for_a_negative_advantage(library):
    assert of_ratio(library, clipped, 0.5, advantage=-1.0) == pytest.approx((0.8, 0), abs=1e-6)
    assert of_ratio(library, clipped, 1.5, advantage=-1.0) == pytest.approx((1.5, 1.5), abs=1e-6)


def test_the_decoupled_clip_moves_the_upper_bound_alone(library):
    assert of_ratio(library, clipped, 1.25, advantage=1.0, high=0.28)[1] == pytest.approx(-1.25, abs=1e-6)
    assert of_ratio(library, clipped, 1.25, advantage=1.0)[1] == 0
    assert of_ratio(library, clipped, 0.75, advantage=-1.0, high=0.28)[1] == 0


def test_the_dual_clip_bounds_the_loss_of_a_bad_response(library):
    assert of_ratio(library, clipped, 4.0, advantage=-1.0, dual=3.0) == (3, 0)
    assert of_ratio(library, clipped, 2.0, advantage=-1.0, dual=3.0) == pytest.approx((2, 2), abs=1e-6)
    assert of_ratio(library, clipped, 0.5, advantage=1.0, dual=3.0) == pytest.approx((-0.5, -0.5), abs=1e-6)


@pytest.mark.parametrize(("ratio", "advantage", "slope"), [(7, 1, -5), (1, 1, -1), (0.3, 1, -0.3), (7, -1, 5), (0.3, -2, 0.6)])
def test_cispo_keeps_a_gradient_for_every_token(library, ratio, advantage, slope):
    """The weight is clipped to [0, 5] and detached: the gradient is -A clip(ρ), whatever the log-probability itself."""
    assert of_ratio(library, weighted, ratio, advantage=float(advantage))[1] == pytest.approx(slope, rel=1e-5)


def test_the_loss_of_cispo_is_smooth_and_has_a_lower_bound_if_asked_for(library):
    x = np.linspace(-3, 3, 601, dtype=np.float32)
    value, slope = library.both(lambda x: weighted(library.xp, x, advantage=1.0, low=0.5, high=2.0), x)
    np.testing.assert_allclose(slope, -np.clip(np.exp(x), 0.5, 2), rtol=1e-5)
    np.testing.assert_allclose(np.diff(value), -0.01 * np.clip(np.exp(x[:-1] + 0.005), 0.5, 2), rtol=1e-2)


@pytest.mark.parametrize(("gap", "values"), [(0.5, (0.5, 0.125, 0.106531)), (-0.5, (-0.5, 0.125, 0.148721))])
def test_estimators_of_kl(library, gap, values):
    for kind, expected in zip(("k1", "k2", "k3"), values, strict=True):
        value, _ = library.both(lambda x, kind=kind: losses.kl_estimate(library.xp, kind, x), f32(gap))
        assert float(value[0]) == pytest.approx(expected, abs=1e-6)


def test_what_the_estimators_of_kl_push_towards(library):
    """Two tokens, π (.5, .5), π_ref (.8, .2): the expected gradient of each estimator as a loss, in the first logit."""
    xp, ref = library.xp, f32(0.8, 0.2)
    for kind, expected in (("k1", 0.0), ("k2", -0.346574), ("k3", -0.3)):

        def loss(logits, kind=kind):
            log = logits - xp.log(xp.sum(xp.exp(logits)))
            at_sampling = 0.5  # the sampler's probability is not differentiated
            return at_sampling * losses.kl_estimate(xp, kind, log - xp.log(xp.asarray(ref)))

        assert library.both(loss, f32(0, 0))[1][0] == pytest.approx(expected, abs=1e-6)


GRPO = {"clip": "ratio", "low": 0.2, "high": 0.2, "dual": None, "sequence": False, "kl": None, "kl_coef": 0.0}


def run(library, loss, logprobs, batch):
    xp = library.xp
    arrays = {name: xp.asarray(array) for name, array in batch.items()}
    return library.both(lambda x: loss(xp, {"logprobs": x}, arrays)[0], np.asarray(logprobs, np.float32))


def test_the_ratio_of_a_response_is_the_geometric_mean_of_its_tokens(library):
    logs, mask = f32([0.1, -0.3, 0.2, 0.04, 9.0]), np.array([[True] * 4 + [False]])
    weights = numerics.mean_weights(mask, "response_mean")
    batch = {
        "mask": mask, "old_logprobs": np.zeros((1, 5), np.float32), "advantages": mask.astype(np.float32),
        "weights": weights, "policy_weights": weights, "shares": weights,
    }  # fmt: skip
    open_, slopes = run(library, PolicyGradientLoss(**(GRPO | {"sequence": True, "high": 1.0})), logs, batch)
    assert -float(open_) == pytest.approx(1.010050, abs=1e-6)
    np.testing.assert_allclose(slopes, [[-1.010050 / 4] * 4 + [0]], atol=1e-6)
    bound, slopes = run(library, PolicyGradientLoss(**(GRPO | {"sequence": True, "low": 3e-4, "high": 4e-4})), logs, batch)
    assert -float(bound) == pytest.approx(1.0004, abs=1e-6)
    assert not slopes.any()


@pytest.mark.parametrize("clip", ["ratio", "weight", "none"])
@pytest.mark.parametrize("sequence", [False, True])
def test_what_is_masked_is_inert(library, clip, sequence):
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1, 1, 0], [1, 0, 1, 0]], bool)
    weights = numerics.mean_weights(mask, "response_mean")
    batch = {
        "mask": mask, "old_logprobs": np.where(mask, -1.0, 0).astype(np.float32),
        "ref_logprobs": np.where(mask, -1.2, 0).astype(np.float32),
        "advantages": np.where(mask, rng.normal(size=(2, 1)), 0).astype(np.float32), "weights": weights,
        "policy_weights": weights, "kl_weights": weights, "shares": weights,
    }  # fmt: skip
    high = 5.0 if clip == "weight" else 0.2
    loss = PolicyGradientLoss(
        **(GRPO | {"clip": clip, "sequence": sequence, "low": 0.0, "high": high, "kl": "k3", "kl_coef": 0.1})
    )
    clean = rng.normal(-1, 0.3, (2, 4)).astype(np.float32)
    value, slopes = run(library, loss, clean, batch)
    for garbage in (np.nan, 1e30, -np.inf):
        other, dirty = run(library, loss, np.where(mask, clean, garbage), batch)
        assert other == value
        np.testing.assert_array_equal(dirty, slopes)
        assert not dirty[~mask].any()


# ------------------------------------------------------------------------------------------------------ the sampler's error


def weights_of(logs, level, low=None, high=2.0):
    logs = np.asarray(logs, np.float32)
    return numerics.importance(logs, np.zeros_like(logs), np.ones(logs.shape, bool), level=level, low=low, high=high)


def test_weights_for_a_sampler_that_differs():
    logs = np.log([[0.3, math.e, 6.0]])
    np.testing.assert_allclose(weights_of(logs, "token"), [[0.3, 2, 2]], atol=1e-4)
    np.testing.assert_allclose(weights_of(logs, "token", 0.5, 5), [[0, math.e, 0]], atol=1e-4)
    assert not weights_of([[0.4, 0.4]], "sequence", 0.5, 2).any()  # the product, 2.2255, is out of bounds
    np.testing.assert_allclose(weights_of([[0.4, 0.4]], "mean", 0.5, 2), [[1.4918, 1.4918]], atol=1e-4)
    np.testing.assert_allclose(weights_of([[0.4, 0.4]], "sequence"), [[2, 2]])


def test_the_effective_share_of_a_sample():
    assert numerics.effective_share(f32(1, 1, 1, 1)) == 1
    assert numerics.effective_share(f32(1, 0, 0, 0)) == 0.25
    assert math.isnan(numerics.effective_share(f32(0, 0)))


# --------------------------------------------------------------------------------------------------------- the algorithm


def presets(component):
    names = [file.stem for file in (conf_folders()[CORE] / "algorithm").glob("*.yaml")]
    found = {name: group("algorithm", name) for name in names}
    return {name: keys for name, keys in sorted(found.items()) if keys["name"] == component}


@pytest.mark.parametrize(
    ("component", "published"),
    [
        ("policy_gradient", {"grpo", "dr_grpo", "rloo", "reinforce_pp", "dapo", "cispo", "gspo"}),
        ("preference_optimisation", {"dpo", "ipo", "hinge", "simpo", "orpo", "kto"}),
    ],
)
def test_every_published_method_is_a_file_of_its_own(component, published):
    found = presets(component)
    assert set(found) == published | {component}
    cls = registry().resolve("algorithm", component)
    configs = [component_config(cls, keys, "algorithm") for name, keys in found.items() if name in published]
    assert len(set(map(repr, configs))) == len(configs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 1}, "compares the responses to a prompt, and algorithm.samples=1 gives one"),
        ({"clip": "weight"}, r"leaves out 1. CISPO has clip_low=0 clip_high=5"),
        (
            {"batch_size": 3, "samples": 2, "minibatches": 4},
            "x algorithm.samples=6 is not divisible .* one of 1, 2, 3, 6",
        ),
        ({"overlong_buffer": 12}, "must be below lengths.response=12"),
        ({"clip": "none", "dual_clip": 3.0}, "algorithm.dual_clip has no effect on clip=none"),
        ({"clip": "none", "clip_high": 0.28}, "algorithm.clip_low and clip_high have no effect on clip=none"),
        ({"baseline": "none"}, "algorithm.scale=group divides by the deviation .* Set scale=batch"),
        ({"samples": 1, "baseline": "none", "scale": "batch", "extra_rounds": 2}, "algorithm.extra_rounds replaces prompts"),
        ({"kl_in": "return"}, "algorithm.kl_in=return has no effect on kl_coef=null"),
        ({"kl_in": "reward", "kl_coef": 0.1, "kl_estimator": "k1"}, "algorithm.kl_estimator has no effect on kl_in=reward"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        configure("policy_gradient", **changes)


def of_words(responses):
    """Every other prompt's responses differ in score; the others' do not."""
    rows = responses.sequences
    prompts = np.where(rows.prompt_mask, rows.tokens[:, : rows.prompt_length], 0).sum(axis=1)
    return np.where(prompts % 2, np.sin(rows.responses.sum(axis=1)), 0.5)


def test_dynamic_sampling_fills_the_batch_with_groups_that_say_something(make):
    """Prompts are taken in their order, what says nothing is replaced, and a restart goes on with the next prompt."""
    algorithm = make("policy_gradient", reward_model=Scored(of_words), batch_size=3, samples=2, extra_rounds=3, temperature=2.0)
    rollout = algorithm.rollout(0, Clock())
    assert rollout.sequences.rows == 6 and algorithm.drawn in (6, 9, 12)
    informative = numerics.informative(rollout.scores, rollout.counted, 2)
    plain = make("policy_gradient", reward_model=Scored(of_words), batch_size=algorithm.drawn, samples=2, temperature=2.0)
    order = plain.rollout(0, Clock()).responses.prompts[::2]
    told = [p for p in order if sum(plain.tokenizer.encode(p.messages[0].content)) % 2]
    assert rollout.responses.prompts[::2][: len(told)] == told[:3] and informative[: len(told)].all()
    assert rollout.responses.prompts[0] == rollout.responses.prompts[1]
    again = make("policy_gradient", reward_model=Scored(of_words), batch_size=3, samples=2, extra_rounds=3, temperature=2.0)
    again.load_state(algorithm.state())
    for one in (algorithm, again):
        one.rollout(1, Clock())
    assert algorithm.drawn == again.drawn


def test_kl_in_the_reward_and_in_the_return(make, load):
    """RLOO's reward is score - β KL of the response; REINFORCE++'s advantage loses the KL of this token and the later ones."""
    common = {"reward_model": Scored(), "batch_size": 4, "samples": 2, "kl_coef": 0.5, "temperature": 0.7, "scale": "none"}
    algorithm = make("policy_gradient", kl_in="reward", baseline="leave_one_out", **common)
    algorithm.ref_policy = load(1)
    rollout = algorithm.rollout(0, Clock())
    batch, metrics = algorithm.prepare(rollout)
    rewards = rollout.scores - 0.5 * rollout.kl.sum(axis=1)
    assert metrics["objective/reward"] == pytest.approx(rewards.mean(), rel=1e-5)
    expected = np.ravel([[a - b, b - a] for a, b in rewards.reshape(-1, 2)])
    np.testing.assert_allclose(batch["advantages"].sum(axis=1) / rollout.sequences.mask.sum(axis=1), expected, rtol=1e-4)
    algorithm = make("policy_gradient", kl_in="return", baseline="none", **common)
    algorithm.ref_policy = load(1)
    rollout = algorithm.rollout(0, Clock())
    batch, _ = algorithm.prepare(rollout)
    for row, count in enumerate(rollout.sequences.mask.sum(axis=1)):
        kl = rollout.kl[row, :count]
        expected = [rollout.scores[row] - 0.5 * kl[t:].sum() for t in range(count)]
        np.testing.assert_allclose(batch["advantages"][row, :count], expected, rtol=1e-4, atol=1e-5)


def test_responses_without_eos_can_leave_loss_and_baseline(make):
    algorithm = make("policy_gradient", reward_model=Scored(), batch_size=4, samples=4, mask_unfinished=True)
    rollout = algorithm.rollout(0, Clock())
    assert 0 < rollout.finished.sum() < 16
    batch, _ = algorithm.prepare(rollout)
    assert not batch["mask"][~rollout.finished].any() and not batch["advantages"][~rollout.finished].any()
    scores = np.where(rollout.finished, rollout.scores, np.nan).reshape(4, 4)
    masks, advantages_ = (batch[name].reshape(4, 4, -1) for name in ("mask", "advantages"))
    for row, mask, advantage in zip(scores, masks, advantages_, strict=True):
        own = row[np.isfinite(row)]
        if len(own) > 1 and np.ptp(own) > 0:
            expected = (own - own.mean()) / (own.std(ddof=1) + 1e-4)
            np.testing.assert_allclose(advantage[:, 0][mask[:, 0]], expected, rtol=1e-4)


def test_without_kl_there_is_no_reference(make):
    algorithm = make("policy_gradient", reward_model=Scored(), batch_size=2, samples=2)
    assert algorithm.ref_policy is None and algorithm.policy is algorithm.context.policy
    assert "objective/kl" not in algorithm.step(0)
    measured = make("policy_gradient", reward_model=Scored(), batch_size=2, samples=2, kl_coef=0.0).step(0)
    assert measured["objective/kl"] == pytest.approx(0, abs=1e-5) and "policy/kl_loss" not in measured


def test_rejection_sampling_trains_on_the_best_response_of_each_prompt(make, monkeypatch):
    scores = f32(0.1, 0.9, 0.9, 0.2, 0.3, 0.4, np.nan, 0.0)
    algorithm = make("rejection_sampling", reward_model=Scored(lambda r: scores), batch_size=2, samples=4, unfinished_score=None)
    calls = spy(algorithm, monkeypatch)
    metrics = algorithm.step(0)
    [(terms, _)] = calls
    [term] = terms
    sequences = algorithm.last.sequences
    np.testing.assert_array_equal(term.sequences.tokens, sequences.tokens[[1, 5]])  # the first of equals
    np.testing.assert_allclose(term.batch["weights"], sequences.mask[[1, 5]] / sequences.mask[[1, 5]].sum(), rtol=1e-6)
    assert metrics["best/score"] == pytest.approx(0.65) and metrics["best/kept"] == 1 and metrics["best/tied"] == 0.5
    picky = make(
        "rejection_sampling", reward_model=Scored(lambda r: scores), batch_size=2, samples=4, unfinished_score=None, threshold=0.5
    )
    calls = spy(picky, monkeypatch)
    assert picky.step(0)["best/kept"] == 0.5
    assert not calls[0][0][0].batch["weights"][1].any() and calls[0][0][0].batch["weights"][0].any()


def test_the_best_score_is_the_reward_models_own_and_prompts_without_scores_are_not_tied(make):
    model = Scored(lambda responses: f32(0.1, 0.9, np.nan, np.nan))
    algorithm = make("rejection_sampling", reward_model=model, batch_size=2, samples=2)
    algorithm.scores = lambda rollout: rollout.scores - 5  # as a penalty would
    metrics = algorithm.step(0)
    assert metrics["best/score"] == pytest.approx(0.9) and metrics["best/kept"] == 0.5 and metrics["best/tied"] == 0


def test_rejection_sampling_takes_no_step_where_nothing_is_good_enough(make):
    algorithm = make("rejection_sampling", reward_model=Scored(), batch_size=2, samples=2, threshold=1e9)
    before = algorithm.policy.parameters()
    assert algorithm.step(0)["best/kept"] == 0
    same(algorithm.policy.parameters(), before)


def test_a_minibatch_of_which_nothing_is_kept_is_in_no_mean(make):
    scores = f32(1, 0, 0, 0, 0, 0, 0, 0)
    settings = {"batch_size": 4, "samples": 2, "threshold": 0.5, "unfinished_score": None, "optimizer": {"learning_rate": 1e-9}}
    model, metrics = Scored(lambda r: scores), {}
    for minibatches in (1, 4):
        algorithm = make("rejection_sampling", reward_model=model, minibatches=minibatches, **settings)
        metrics[minibatches] = algorithm.step(0)
        assert algorithm.learner.steps == minibatches
    assert metrics[4]["loss"] == pytest.approx(metrics[1]["loss"], abs=1e-5)


def test_advantages_of_another_shape_are_refused(make, monkeypatch):
    algorithm = make("policy_gradient", reward_model=Scored(), iterations=1, batch_size=2, samples=4)
    monkeypatch.setattr(algorithm, "advantages", lambda rewards, counted: rewards.reshape(2, 4))
    with pytest.raises(ValueError, match=r"PolicyGradient.advantages gave an array \(2, 4\) for rewards \(8,\)"):
        algorithm.step(0)
