"""Schedules at their ends, and Adam's first step against arithmetic by hand, on a real learner."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pytest

from lockstep.config.schema import parse
from lockstep.errors import ConfigError
from lockstep.interfaces import Term
from lockstep.learning import losses
from lockstep.learning.optimisation import OptimizerConfig, ScheduleConfig, lr_scale
from lockstep.text.sequences import pack

ADAM = OptimizerConfig(
    learning_rate=1e-2, betas=(0.9, 0.999), eps=1e-3, tf_style=False, weight_decay=0.0, max_grad_norm=None, ema_decay=None
)


# ---------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(("shape", "middle", "end"), [("constant", 1, 1), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)])
def test_a_schedule_starts_at_the_peak_and_reaches_its_end(shape, middle, end):
    schedule = ScheduleConfig(shape, warmup_steps=0, initial=1.0, final=0.1)
    assert [lr_scale(schedule, s, 100) for s in (0, 50, 100)] == pytest.approx([1, middle, end])
    values = [lr_scale(schedule, s, 100) for s in range(101)]
    assert values == sorted(values, reverse=True)


def test_the_cosine_is_a_cosine():
    assert lr_scale(ScheduleConfig("cosine", 0, 1.0, 0.0), 25, 100) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_instructgpts_warm_up_takes_ten_steps_from_a_tenth():
    schedule = ScheduleConfig("constant", warmup_steps=10, initial=0.1, final=1.0)
    assert [lr_scale(schedule, s, 100) for s in (0, 5, 10, 99)] == pytest.approx([0.1, 0.55, 1, 1])


def test_linear_to_zero_is_lm_human_preferences_and_never_wastes_the_last_step():
    schedule = ScheduleConfig("linear", 0, 1.0, 0.0)
    assert [lr_scale(schedule, s, 4) for s in range(4)] == [1, 0.75, 0.5, 0.25]


def test_decay_starts_where_the_warm_up_ends():
    schedule = ScheduleConfig("linear", warmup_steps=10, initial=0.0, final=0.0)
    assert [lr_scale(schedule, s, 30) for s in (9, 10, 20, 30)] == pytest.approx([0.9, 1, 0.5, 0])


def test_a_run_shorter_than_its_warm_up_is_fine():
    assert lr_scale(ScheduleConfig("cosine", 10, 0.0, 0.1), 2, 3) == pytest.approx(0.2)


def test_an_unknown_shape_lists_those_that_exist():
    with pytest.raises(ConfigError, match="schedule.shape='step' is not one of constant, linear, cosine"):
        parse(ScheduleConfig, {"shape": "step"}, "schedule")


# --------------------------------------------------------------------------------------------------------------- Adam


def test_epsilon_of_tensorflow_one_shrinks_to_pytorchs_with_the_steps():
    tf = dataclasses.replace(ADAM, eps=1e-5, tf_style=True)
    assert [ADAM.eps_at(s) for s in (1, 1000)] == [1e-3, 1e-3]
    assert tf.eps_at(1) == pytest.approx(1e-5 / math.sqrt(0.001))
    assert tf.eps_at(10**6) == pytest.approx(1e-5)
    # The published comparison: at a gradient of 1e-5 the first steps differ 16-fold (Huang et al. 2023).
    assert (1e-5 / (1e-5 + 1e-5)) / (1e-5 / (1e-5 + tf.eps_at(1))) == pytest.approx(16.3, abs=0.05)


@dataclass(frozen=True)
class Likelihood:
    outputs = ("logprobs",)

    def __call__(self, xp, outputs, batch):
        return losses.weighted_sum(xp, -outputs["logprobs"], batch["weights"]), {}


@pytest.fixture
def term():
    rows = pack([[1, 2], [3]], [[4, 5, 6], [7]], 36)
    return Term(Likelihood(), rows, {"weights": (rows.mask / 4).astype(np.float32)})


def first_step(backend, policy, term, scale=1.0, **changes):
    """(parameters before, gradients, what one update added), all by checkpoint name."""
    learner = backend.learner({"policy": policy}, {"policy": dataclasses.replace(ADAM, **changes)})
    before = {f"policy.{n}": p for n, p in policy.parameters().items()}
    gradients = learner.gradients([term])
    metrics = learner.update([term], scale)
    after = {f"policy.{n}": p for n, p in policy.parameters().items()}
    return before, gradients, {n: after[n] - before[n] for n in after}, metrics, learner


@pytest.mark.parametrize(("tf_style", "eps"), [(False, 1e-3), (True, 1e-3 / math.sqrt(1 - 0.999))])
def test_adams_first_step_is_the_gradient_over_its_size_plus_epsilon(backend, load, term, tf_style, eps):
    _, gradients, added, *_ = first_step(backend, load(), term, scale=0.5, tf_style=tf_style)
    for name, g in gradients.items():
        np.testing.assert_allclose(added[name], -0.005 * g / (abs(g) + eps), rtol=1e-3, atol=3e-7, err_msg=name)


def test_the_gradient_norm_is_reported_before_clipping_and_clipping_scales_the_gradient(backend, load, term):
    _, gradients, added, metrics, _ = first_step(backend, load(), term, max_grad_norm=0.01)
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
    assert metrics["grad_norm/policy"] == pytest.approx(norm, rel=1e-4) and norm > 0.1
    g = gradients["policy.lm_head.weight"] * 0.01 / norm
    np.testing.assert_allclose(added["policy.lm_head.weight"], -0.01 * g / (abs(g) + 1e-3), rtol=1e-3, atol=3e-7)


def test_weight_decay_is_decoupled_and_leaves_gains_alone(backend, load, term):
    _, _, plain, *_ = first_step(backend, load(), term)
    before, _, decayed, *_ = first_step(backend, load(), term, weight_decay=0.5)
    for name, weights in before.items():
        shrunk = -0.01 * 0.5 * weights if weights.ndim > 1 else 0
        np.testing.assert_allclose(decayed[name], plain[name] + shrunk, atol=3e-7, err_msg=name)


def test_the_moving_average_moves_by_one_minus_its_decay(backend, load, term):
    before, _, added, _, learner = first_step(backend, load(), term, ema_decay=0.75)
    averaged = learner.averaged("policy").parameters()
    for name, weights in averaged.items():
        np.testing.assert_allclose(weights, before[f"policy.{name}"] + 0.25 * added[f"policy.{name}"], atol=1e-6)


def test_without_a_moving_average_the_averaged_model_is_a_copy(backend, load, term):
    policy = load()
    *_, learner = first_step(backend, policy, term)
    averaged, now = learner.averaged("policy"), policy.parameters()
    learner.update([term])
    for name, weights in averaged.parameters().items():
        np.testing.assert_array_equal(weights, now[name])
