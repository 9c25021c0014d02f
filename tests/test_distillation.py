"""On-policy distillation: divergences against hand calculation and enumeration, and what the algorithm does."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import BACKENDS, CONSTANT, Scored, configure, relative, same
from lockstep.commands.run import run_config
from lockstep.config.compose import compose
from lockstep.config.schema import parse
from lockstep.errors import ConfigError
from lockstep.interfaces import Context
from lockstep.learning import losses
from lockstep.learning.online import Clock
from lockstep.registry import registry
from lockstep.runs.experiment import Experiment
from lockstep.storage.files import read_json
from lockstep.text.sequences import pack
from runs import DECODER, TINY
from test_group_methods import Jax, Torch, f32

TEACHER, STUDENT = np.log([0.8, 0.2]), np.log([0.5, 0.5])
MADE = {"batch_size": 48, "temperature": 0.7, "schedule": CONSTANT}  # one shape for all


@pytest.fixture(scope="session")
def backend():
    """One is enough for what happens on the host; test_parity.py has three steps on both."""
    cls = registry().resolve("backend", "torch", "torch")
    return cls(parse(cls.Config, BACKENDS["torch"], "backend"))


@pytest.fixture(params=[Torch, Jax], ids=["torch", "jax"])
def library(request):
    return request.param()


# ----------------------------------------------------------------------------------------------------------- divergences


@pytest.mark.parametrize(("beta", "expected"), [(0, 0.192745), (1, 0.223144), (0.5, 0.050672), (0.9, 0.019599)])
def test_forward_and_reverse_kl_are_apart_from_the_jensen_shannon_divergences_between_them(library, beta, expected):
    """Swapped mixture weights would give 0.9 the value of 0.1; a beta of 1 clamped into the interior about 0."""
    student, teacher = f32(STUDENT)[0], f32(TEACHER)[0]
    found, _ = library.both(lambda x: losses.divergence(library.xp, x, library.xp.asarray(teacher), beta), student)
    assert float(found) == pytest.approx(expected, abs=1e-6)
    assert losses.divergence(np, STUDENT, TEACHER, beta) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_a_divergence_is_zero_only_between_equals_and_stays_finite(beta):
    assert losses.divergence(np, TEACHER, TEACHER, beta) == pytest.approx(0, abs=1e-12)
    far = np.array([-1e-9, -80.0]), np.array([-80.0, -1e-9])
    assert 0 < losses.divergence(np, *far, beta) < math.inf


def test_the_sampled_form_has_the_gradient_of_the_reverse_kl_in_expectation():
    """Of a token with two values and the student's logit x: E[A dlogpi/dx] = -dKL/dx. Without the stop it would be 0."""
    student, teacher, step = np.array([0.5, 0.5]), np.array([0.8, 0.2]), 1e-6
    slopes = np.array([0.5, -0.5])  # of log pi of each value
    advantage = np.log(teacher) - np.log(student)
    moved = [1 / (1 + math.exp(-sign * step)) for sign in (1, -1)]
    kl = [p * math.log(p / 0.8) + (1 - p) * math.log((1 - p) / 0.2) for p in moved]
    exact = (kl[0] - kl[1]) / (2 * step)
    assert exact == pytest.approx(-0.346574, abs=1e-6)
    assert (student * -advantage * slopes).sum() == pytest.approx(exact, abs=1e-6)
    assert (student * slopes).sum() == 0  # of sampled k1, differentiated


# ------------------------------------------------------------------------------------------------------------ the models


def whole(policy, sequences, temperature):
    """log-probabilities [T, V] of every token at each place of one row, one evaluation of each."""
    found = []
    for t in range(sequences.mask.shape[1]):
        rows = sequences.take(np.zeros(policy.vocab_size, np.int64))
        rows.tokens[:, sequences.prompt_length + t] = np.arange(policy.vocab_size)
        found.append(policy.evaluate(rows, ["logprobs"], temperature=temperature)["logprobs"][:, t])
    return np.array(found, np.float64)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_a_policy_toward_a_teacher_supplies_the_divergence_of_the_whole_vocabulary(backend, load, beta, monkeypatch):
    rows = world_rows()
    one = rows.take(np.array([1]))
    student, teacher = load(0), load(1)
    expected = losses.divergence(np, whole(student, one, 0.7), whole(teacher, one, 0.7), beta)
    toward = student.toward(teacher, beta)
    found = toward.evaluate(one, ["divergence"], temperature=0.7)["divergence"][0]
    np.testing.assert_allclose(found[one.mask[0]], expected[one.mask[0]], rtol=2e-4, atol=1e-5)
    monkeypatch.setattr(f"lockstep_{backend.name}.model.LOGITS_AT_ONCE", 37 * 5)  # several pieces
    pieces = student.toward(teacher, beta).evaluate(rows.take(np.arange(5)), ["divergence"], temperature=0.7)["divergence"]
    np.testing.assert_allclose(pieces[1], found, rtol=1e-4, atol=1e-5)
    same(toward.parameters(), student.parameters())


def world_rows():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 34, 1 + i % 4).tolist() for i in range(6)]
    return pack(prompts, [rng.integers(0, 34, 2 + i % 3).tolist() for i in range(6)], 36, prompt_columns=4, response_columns=4)


# --------------------------------------------------------------------------------------------------------- the algorithm


def test_the_advantage_of_a_token_is_how_much_likelier_the_teacher_finds_it(make, load):
    algorithm = make("distillation", kl_coef=0.5, **MADE)
    rollout = algorithm.rollout(0, Clock())
    mask = rollout.sequences.mask
    teacher, student = (load(n).evaluate(rollout.sequences, ["logprobs"], temperature=0.7)["logprobs"] for n in (1, 0))
    np.testing.assert_allclose(algorithm.prepare(rollout)["advantages"][mask], 0.5 * (teacher - student)[mask], atol=1e-4)
    metrics = algorithm.objective(rollout)
    assert metrics["teacher/kl"] == pytest.approx(np.where(mask, student - teacher, 0).sum(axis=1).mean(), abs=1e-3)
    assert not {"objective/kl", "objective/score"} & metrics.keys()
    assert algorithm.samples() == [] and algorithm.last is None


def test_the_sampled_gradient_points_where_the_exact_one_does(make):
    """Of the same samples: the expected gradient of a sampled token is that of the reverse KL of its distribution."""
    gradients = []
    for changes in ({}, {"loss": "divergence", "beta": 1.0}):
        algorithm = make("distillation", **MADE, **changes)
        rollout = algorithm.rollout(0, Clock())
        terms = algorithm.terms(rollout.sequences, algorithm.prepare(rollout), np.arange(48), rollout.forward)
        found = algorithm.learner.gradients(terms)
        gradients.append(np.concatenate([found[name].ravel() for name in sorted(found)]).astype(np.float64))
    sampled, exact = gradients
    assert sampled @ exact / (exact @ exact) == pytest.approx(1, abs=0.35)


def test_the_student_comes_to_its_teacher_which_stays_as_it_is(make):
    algorithm = make("distillation", loss="divergence", iterations=5, optimizer={"learning_rate": 1e-2}, **MADE)
    before = algorithm.teacher.parameters()
    found = [algorithm.step(step)["teacher/divergence"] for step in range(5)]
    assert found[-1] < 0.8 * found[0]
    same(algorithm.teacher.parameters(), before)
    assert algorithm.samples()[0]["score"] is None


def test_the_exact_loss_reuses_the_rollouts_pass_and_does_not_depend_on_micro_batches(make):
    gradients = []
    for micro_batch_size in (None, 32):
        algorithm = make("distillation", loss="divergence", micro_batch_size=micro_batch_size, **MADE)
        rollout = algorithm.rollout(0, Clock())
        given = rollout.sequences, algorithm.prepare(rollout), np.arange(48), rollout.forward
        terms = algorithm.terms(*given)
        assert (terms[0].forward is not None) == (micro_batch_size is None)
        gradients.append(algorithm.learner.gradients(terms))
    assert relative(*gradients) < 1e-4


def test_scores_of_a_reward_model_are_logged_and_change_nothing(make):
    plain, scored = make("distillation", **MADE), make("distillation", reward_model=Scored(), **MADE)
    one, other = plain.step(0), scored.step(0)
    assert other["objective/score_std"] > 0
    same(plain.result().parameters(), scored.result().parameters())
    assert one["policy/loss"] == other["policy/loss"]


def test_a_teacher_with_another_vocabulary_is_refused(backend, tokenizer, load):
    cls, config = configure("distillation")
    other = SimpleNamespace(core=SimpleNamespace(to_str=lambda: "another"))
    context = Context(0, backend, tokenizer, None, load(), resources=SimpleNamespace(policy=lambda source: (load(1), other)))
    with pytest.raises(ConfigError, match="The teacher 'teacher' has another vocabulary than the policy"):
        cls(config, context)


# ------------------------------------------------------------------------------------------------------------- in a run

STAGES = [
    "~stages.sft",
    "~stages.reward",
    "~stages.ppo_ptx",
    "~stages.evaluate",
    "stages.ppo.policy=new",
    "stages.ppo.reward_model=null",
]
RUN = [*(option for option in TINY if "ptx" not in option), *DECODER, *STAGES, "algorithm=distillation"]


def test_a_stage_is_the_teacher_and_part_of_the_identity(tmp_path):
    run = run_config(compose([*RUN, f"folder={tmp_path}", "algorithm.teacher=pretrain", "algorithm.iterations=2"]), "test")
    stages = read_json(run / "run.json")["stages"]
    content = read_json(tmp_path / stages["ppo"]["folder"] / "stage.json")
    assert content["inputs"] == {"pretrain": Path(stages["pretrain"]["folder"]).name}
    rows = (tmp_path / stages["ppo"]["folder"] / "metrics.jsonl").read_text()
    assert "teacher/kl" in rows and "objective/score" not in rows


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pretrian", "stages.ppo reads the stage 'pretrian', which does not come before it. Did you mean 'pretrain'?"),
        ("evaluate", "A public policy is a folder or a hub id, owner/name."),
    ],
)
def test_a_teacher_that_is_not_there_is_named(source, message):
    with pytest.raises(ConfigError) as caught:
        Experiment(compose([*RUN, f"algorithm.teacher={source}"]))
    assert message in str(caught.value)


def test_a_public_teacher_may_be_on_the_hub_and_a_policy_to_start_from_may_not():
    Experiment(compose([*RUN, "algorithm.teacher=owner/name"]))
    with pytest.raises(ConfigError, match="reads the stage 'owner/name'"):
        Experiment(compose([*RUN, "algorithm.teacher=pretrain", "stages.ppo.policy=owner/name"]))


def test_options_without_effect_are_refused():
    for message, changes in {
        "algorithm.beta=0.5 needs the whole distribution": {"beta": 0.5},
        "algorithm.unfinished_score has no effect on distillation": {"unfinished_score": -1.0},
    }.items():
        with pytest.raises(ConfigError, match=message):
            configure("distillation", **changes)
