"""`Learner.forward` and `Term.forward`: a pass that an update uses again."""

import gc
from dataclasses import replace

import numpy as np
import pytest

from conftest import Scored, relative
from lockstep.interfaces import Dropout, Learner
from test_ppo import prepared

ONE_TERM = {"batch_size": 8, "epochs": 2, "temperature": 0.7}


@pytest.fixture
def case(make):
    """(algorithm, its rollout, the one term of its batch, without the pass)."""
    algorithm = make("ppo", reward_model=Scored(), **ONE_TERM)
    rollout, batch, _ = prepared(algorithm)
    [term] = algorithm.terms(rollout.sequences, batch, np.arange(8))
    return algorithm, rollout, term


def test_a_pass_gives_what_evaluate_gives_and_the_gradients_of_a_term_without_it(case):
    algorithm, rollout, term = case
    found = algorithm.learner.evaluate(rollout.sequences, ["logprobs", "values"], temperature=0.7)
    for name in found:
        np.testing.assert_allclose(rollout.forward.outputs[name], found[name], atol=1e-5)
    carrying = algorithm.learner.gradients([replace(term, forward=rollout.forward)])
    assert relative(algorithm.learner.gradients([term]), carrying) < 1e-6


def test_a_pass_serves_one_gradient(case):
    algorithm, rollout, term = case
    carrying = replace(term, forward=rollout.forward)
    algorithm.learner.gradients([carrying])
    for again in (algorithm.learner.gradients, algorithm.learner.update):
        with pytest.raises(ValueError, match="it already served a gradient, the parameters have changed since, or another"):
            again([carrying])


def test_a_pass_ends_with_the_parameters_that_it_is_of(case, tmp_path):
    algorithm, rollout, term = case
    learner, carrying = algorithm.learner, replace(term, forward=rollout.forward)
    learner.update([term])
    with pytest.raises(ValueError, match="the parameters have changed since"):
        learner.gradients([carrying])
    learner.save(tmp_path)
    carrying = replace(term, forward=learner.forward(term.sequences, ["logprobs", "values"], temperature=0.7))
    learner.restore(tmp_path)
    with pytest.raises(ValueError, match="the parameters have changed since"):
        learner.gradients([carrying])


def test_a_pass_that_nobody_holds_is_let_go(case):
    learner, term = case[0].learner, case[2]
    held = len(learner.kept)
    made = learner.forward(term.sequences, ["logprobs"], temperature=0.7)
    assert len(learner.kept) == held + 1
    del made
    gc.collect()
    assert len(learner.kept) == held


def test_a_term_refuses_a_pass_that_is_not_its_own(case):
    _, rollout, term = case
    made = rollout.forward
    without = {name: array for name, array in made.outputs.items() if name != "values"}
    tokens = rollout.sequences.tokens.copy()
    tokens[0, -1] += 1
    wrong = {
        "the pass read other tokens": {"sequences": replace(rollout.sequences, tokens=tokens)},
        "the pass read other tokens.": {"sequences": rollout.sequences.take(np.arange(4))},
        "the pass has temperature 0.7, the term 1": {"temperature": 1.0},
        "the term has dropout, and a pass has none": {"dropout": Dropout(0.1, np.zeros(8, np.uint32))},
        "the loss reads values, the pass has entropy, logprobs": {"forward": replace(made, outputs=without)},
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message):
            replace(term, **{"forward": made, **changes})
    other = replace(rollout.sequences, mask=rollout.sequences.mask & False)  # losses read it, models do not
    assert replace(term, forward=made, sequences=other).forward is made


def test_ppo_runs_its_models_once_for_the_rollout_and_its_first_update(make, monkeypatch):
    """Two inner epochs: the second has to run the models again, the first does not. With two minibatches both have to."""
    for minibatches, passes, plain in ((1, 1, 1), (2, 0, 4)):
        algorithm = make("ppo", reward_model=Scored(), **ONE_TERM, minibatches=minibatches)
        made, updated = [], []
        forward, update = algorithm.learner.forward, algorithm.learner.update
        monkeypatch.setattr(algorithm.learner, "forward", lambda *a, f=forward, m=made, **k: m.append(f(*a, **k)) or m[-1])
        monkeypatch.setattr(algorithm.learner, "update", lambda t, s=1.0, u=update, n=updated: n.append(t) or u(t, s))
        algorithm.step(0)
        terms = [term for each in updated for term in each]
        assert len(made) == passes and [term.forward for term in terms if term.forward] == made
        assert sum(term.forward is None for term in terms) == plain
        if made:
            assert terms[0].forward is made[0]


def test_a_learner_without_passes_runs_the_models_again(case):
    """The default of `Learner.forward`, which a tap and small backends use."""
    algorithm, rollout, _ = case
    made = Learner.forward(algorithm.learner, rollout.sequences, ["logprobs", "values"], temperature=0.7)
    found = algorithm.learner.evaluate(rollout.sequences, ["logprobs", "values"], temperature=0.7)
    assert made.outputs.keys() == found.keys() and all(np.array_equal(made.outputs[n], found[n]) for n in found)
    assert made not in algorithm.learner.kept
