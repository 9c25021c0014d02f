"""Numbers that this project did not produce: TRL, lm-human-preferences and "The N+ Implementation Details" ran on the same
inputs (benchmarks/outsiders/ says how), and what came out is in tests/fixtures/outsiders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import Data
from lockstep.learning import losses, numerics
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.text.encoding import token_weights
from lockstep.text.stopping import ends_with_stop
from lockstep.types import Comparison, Demonstration, Prompt
from lockstep_rlhf.algorithms.policy_gradient import PolicyGradient
from lockstep_rlhf.algorithms.ppo import PPOLoss
from lockstep_rlhf.algorithms.preference_optimisation import PreferenceOptimisation
from test_group_methods import Jax, Torch

FIXTURES = Path(__file__).parent / "fixtures" / "outsiders"


def outside(name: str) -> dict:
    return json.loads((FIXTURES / f"{name}.json").read_text())


# ----------------------------------------------------------------------------------------------- TRL, step by step


class Demonstrations(Data):
    def __init__(self, rows):
        self.found = [Demonstration(Prompt.of(row["prompt"]), row["completion"]) for row in rows]

    def demonstrations(self, split):
        return self.found


class Pairs(Data):
    """Every second pair has its rejected completion first: it is the ranks that say which is better."""

    def __init__(self, rows):
        self.found = []
        for i, row in enumerate(rows):
            completions, ranks = (row["chosen"], row["rejected"]), (0, 1)
            if i % 2:
                completions, ranks = completions[::-1], ranks[::-1]
            self.found.append(Comparison(Prompt.of(row["prompt"]), completions, ranks))

    def comparisons(self, split):
        return self.found


def same_settings(fixture: dict, run: dict) -> dict:
    settings, rows = fixture["settings"], len(fixture["data"])
    return {
        "epochs": settings["steps"] * settings["batch_size"] / rows,
        "batch_size": settings["batch_size"],
        "micro_batch_size": run["micro_batch_size"],
        "lengths": {"prompt": 6, "response": 12, "multiple": 12},
        "heldout_examples": 0,
        "optimizer": fixture["adam"] | {"learning_rate": settings["learning_rate"], "ema_decay": None, "tf_style": False},
        "schedule": {"shape": settings["schedule"], "warmup_steps": settings["warmup_steps"], "initial": 0.0, "final": 0.0},
    }


def assert_same_path(algorithm, name: str, run: dict, learning_rate: float) -> None:
    """Loss, gradient norm and rate of every step, and how far each parameter has moved at the end.

    Two float32 programs that round differently: the first loss agrees to 1e-6 of its size, and ten steps of Adam amplify
    that. A gradient of another normalisation, a misplaced epsilon or another group for weight decay moves these by 1e-2.
    """
    model = algorithm.learner.models[name]
    start = model.parameters()
    steps = [algorithm.step(step) for step in range(algorithm.total_steps)]
    end = model.parameters()
    rates = [learning_rate * s["lr_scale"] for s in steps]
    assert steps[0]["loss"] == pytest.approx(run["loss"][0], rel=1e-6)
    assert [s["loss"] for s in steps] == pytest.approx(run["loss"], rel=LOSS)
    assert [s[f"grad_norm/{name}"] for s in steps] == pytest.approx(run["grad_norm"], rel=NORM)
    assert rates == pytest.approx(run["learning_rate"], rel=1e-6, abs=1e-12)
    moved = {n: float(np.linalg.norm(end[n].astype(np.float64) - start[n])) for n in run["moved"]}
    assert moved == pytest.approx(run["moved"], rel=MOVED)
    if "accuracy" in run:
        assert [s["accuracy"] for s in steps] == pytest.approx(run["accuracy"], abs=1e-6)


LOSS, NORM, MOVED = 5e-6, 1e-5, 1e-5


@pytest.mark.parametrize("run", ["whole", "accumulated", "prompt_loss"])
def test_sft_walks_the_path_of_trls_sft_trainer(make, run):
    fixture = outside("trl_sft")
    run = fixture["runs"][run]
    sft = make("sft", data=Demonstrations(fixture["data"]), prompt_loss=run["prompt_loss"], **same_settings(fixture, run))
    assert_same_path(sft, "policy", run, fixture["settings"]["learning_rate"])


@pytest.mark.parametrize("run", ["whole", "accumulated"])
def test_a_reward_model_walks_the_path_of_trls_reward_trainer(make, run):
    fixture = outside("trl_reward")
    run = fixture["runs"][run]
    settings = same_settings(fixture, run)
    algorithm = make("reward_modelling", data=Pairs(fixture["data"]), normalise="none", **settings)
    assert_same_path(algorithm, "reward_model", run, fixture["settings"]["learning_rate"])


def test_sft_with_tensorflows_adam_walks_the_path_of_lm_human_preference_details(make):
    fixture = outside("tf_adam")
    run = fixture["runs"]["whole"]
    settings = same_settings(fixture, run)
    settings["optimizer"]["tf_style"] = True
    assert_same_path(
        make("sft", data=Demonstrations(fixture["data"]), **settings), "policy", run, fixture["settings"]["learning_rate"]
    )


@pytest.mark.parametrize("gradient", ["0.001", "1e-05", "1e-07"])
def test_the_first_step_of_tensorflows_adam_is_that_of_lm_human_preference_details(gradient):
    fixture = outside("tf_adam")
    adam = fixture["adam"]
    config = OptimizerConfig(1.0, tuple(adam["betas"]), adam["eps"], True, 0.0, None, None)
    step = float(gradient) / (float(gradient) + config.eps_at(1))
    assert step == pytest.approx(fixture["first_step_at_gradient"][gradient], rel=1e-8)


# --------------------------------------------------------------------------- lm-human-preferences, on full responses

CLOSE = {"rtol": 2e-6, "atol": 1e-6}  # float32 there, float64 here in between


def arrays(fixture: dict) -> dict[str, np.ndarray]:
    return {name: np.array(values, np.float32) for name, values in fixture["inputs"].items()}


@pytest.fixture(scope="module")
def lhp():
    """The fixture, its inputs, and Lockstep's rewards for them."""
    fixture = outside("lhp")
    x = arrays(fixture)
    every = np.ones(x["old_values"].shape, bool)
    kl = numerics.k1(x["old_logprobs"], x["ref_logprobs"], every)
    return fixture, x, every, numerics.token_rewards(x["scores"], kl, every, fixture["settings"]["kl_coef"])


def test_rewards_and_advantages_of_full_responses_are_lm_human_preferences(lhp):
    fixture, x, every, rewards = lhp
    np.testing.assert_allclose(rewards, fixture["rewards"], **CLOSE)
    advantages, returns = numerics.gae(rewards, x["old_values"], every, gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantages, fixture["advantages"], **CLOSE)
    np.testing.assert_allclose(returns - x["old_values"], fixture["advantages"], **CLOSE)
    discounted, _ = numerics.gae(rewards, x["old_values"], every, gamma=0.9, lam=0.8)
    np.testing.assert_allclose(discounted, fixture["advantages_discounted"], **CLOSE)


def test_both_whitenings_are_lm_human_preferences(lhp):
    fixture, x, every, _ = lhp
    np.testing.assert_allclose(numerics.whiten(x["old_values"], every), fixture["whitened_values"], **CLOSE)
    np.testing.assert_allclose(
        numerics.scale_to_unit_variance(x["old_values"], every), fixture["values_of_unit_variance"], **CLOSE
    )


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("run", ["whitened_rewards", "plain_rewards"])
def test_losses_metrics_and_gradients_of_ppo_are_lm_human_preferences(lhp, run, library):
    fixture, x, every, rewards = lhp
    if run == "whitened_rewards":
        rewards = numerics.scale_to_unit_variance(rewards, every)
    expected, settings = fixture["runs"][run], fixture["settings"]
    stats = expected["stats"]
    advantages, returns = numerics.gae(rewards, x["old_values"], every, gamma=settings["gamma"], lam=settings["lam"])
    assert returns.mean() == pytest.approx(stats["returns/mean"], rel=1e-6)
    assert returns.var() == pytest.approx(stats["returns/var"], rel=1e-6)
    weights = (every / every.sum()).astype(np.float32)
    batch = {
        "mask": every, "old_logprobs": x["old_logprobs"], "old_values": x["old_values"], "returns": returns,
        "advantages": numerics.whiten(advantages, every), "weights": weights, "policy_weights": weights,
    }  # fmt: skip
    loss, metrics, gradients = differentiated(library, ppo_loss(settings), x, batch)
    assert loss == pytest.approx(stats["loss/total"], rel=2e-6, abs=1e-6)
    assert metrics == pytest.approx(
        {
            "policy/loss": stats["loss/policy"],
            "policy/approx_kl": stats["policy/approxkl"],
            "policy/clip_fraction": stats["policy/clipfrac"],
            "value/loss": stats["loss/value"],
            "value/clip_fraction": stats["val/clipfrac"],
        },
        rel=2e-6,
        abs=1e-6,
    )
    np.testing.assert_allclose(gradients["logprobs"], expected["gradient_of_logprobs"], rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(gradients["values"], expected["gradient_of_values"], rtol=2e-6, atol=1e-7)


def test_the_kl_controller_is_lm_human_preferences():
    given = outside("lhp")["kl_controller"]
    running = numerics.AdaptiveKL(given["kl_coef"], given["target"], given["horizon"])
    for kl, after_one, in_sequence in zip(given["kl"], given["after_one"], given["in_sequence"], strict=True):
        alone = numerics.AdaptiveKL(given["kl_coef"], given["target"], given["horizon"])
        alone.update(kl, given["episodes"])
        running.update(kl, given["episodes"])
        assert alone.coef == pytest.approx(after_one, rel=1e-12)
        assert running.coef == pytest.approx(in_sequence, rel=1e-12)


def ppo_loss(settings: dict) -> PPOLoss:
    return PPOLoss(settings["clip_range"], settings["value_clip_range"], settings["value_coef"])


def differentiated(library: str, loss, x: dict, batch: dict) -> tuple[float, dict, dict]:
    """A loss, its metrics and its gradients by new log-probabilities and values, in one of the two libraries."""
    outputs = {"logprobs": x["new_logprobs"], "values": x["new_values"]}
    if library == "jax":
        jax = pytest.importorskip("jax")
        differentiate = jax.jit(jax.value_and_grad(lambda o, b: loss(jax.numpy, o, b), has_aux=True))
        (value, metrics), gradients = differentiate(outputs, batch)
    else:
        torch = pytest.importorskip("torch")
        import array_api_compat.torch as xp

        leaves = {name: torch.tensor(array, requires_grad=True) for name, array in outputs.items()}
        value, metrics = loss(xp, leaves, {name: torch.tensor(array) for name, array in batch.items()})
        value.backward()
        gradients = {name: leaf.grad for name, leaf in leaves.items()}
        value, metrics = value.detach(), {name: m.detach() for name, m in metrics.items()}
    plain = {name: float(m) for name, m in metrics.items()}
    return float(value), plain, {name: np.asarray(g) for name, g in gradients.items()}


# ------------------------------------------------------------------------------------------ N+, on ragged responses


class NPlus:
    """The fixture's rollout in Lockstep's terms. ``mask``: the response with its EOS. ``one_more``: N+ has the reward, and
    a value, one column behind EOS where there is one."""

    def __init__(self):
        self.fixture = outside("n_plus")
        self.settings, self.x = self.fixture["settings"], arrays(self.fixture)
        responses = np.array(self.fixture["responses"])
        before = np.cumsum(responses == self.settings["eos"], axis=1) - (responses == self.settings["eos"])
        self.mask = before == 0
        self.one_more = self.mask | (np.cumsum(~self.mask, axis=1) == 1)
        finished = ends_with_stop(responses, self.mask, [self.settings["eos"]])
        self.scores = numerics.replace_unfinished(self.x["scores"], finished, self.settings["unfinished_score"])
        self.kl = numerics.k1(self.x["old_logprobs"], self.x["ref_logprobs"], self.mask)

    def advantages(self, rewards, values, mask):
        return numerics.gae(rewards, values, mask, gamma=self.settings["gamma"], lam=self.settings["lam"])


@pytest.fixture(scope="module")
def n_plus():
    return NPlus()


@pytest.mark.parametrize("run", ["plain_rewards", "whitened_rewards"])
def test_rewards_advantages_and_returns_of_ragged_responses_are_n_pluss_on_its_columns(n_plus, run):
    expected, values = n_plus.fixture["runs"][run], n_plus.x["old_values"]
    np.testing.assert_allclose(n_plus.scores, expected["scores"], **CLOSE)
    rewards = numerics.token_rewards(n_plus.scores, n_plus.kl, n_plus.one_more, n_plus.settings["kl_coef"])
    if run == "whitened_rewards":
        rewards = numerics.scale_to_unit_variance(rewards, n_plus.one_more)
    np.testing.assert_allclose(rewards, expected["rewards"], **CLOSE)
    advantages, returns = n_plus.advantages(rewards, values, n_plus.one_more)
    np.testing.assert_allclose(returns, expected["returns"], **CLOSE)
    np.testing.assert_allclose(numerics.whiten(advantages, n_plus.mask), expected["advantages"], **CLOSE)


def test_the_reward_on_eos_is_n_pluss_one_behind_it_where_the_value_there_equals_the_score(n_plus):
    """So the value that N+ learns for the column behind EOS is all that separates the two placements."""
    expected, values = n_plus.fixture["runs"]["value_after_eos_is_the_score"], n_plus.x["old_values"]
    rewards = numerics.token_rewards(n_plus.scores, n_plus.kl, n_plus.mask, n_plus.settings["kl_coef"])
    advantages, _ = n_plus.advantages(rewards, values, n_plus.mask)
    whitened = numerics.whiten(advantages, n_plus.mask)
    np.testing.assert_allclose(whitened, expected["advantages"], **CLOSE)
    apart = np.abs(whitened - np.array(n_plus.fixture["runs"]["plain_rewards"]["advantages"]))
    assert apart.max() > 0.03  # with another value behind EOS they do differ


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("run", ["plain_rewards", "whitened_rewards"])
def test_losses_and_gradients_of_ragged_responses_are_n_pluss_on_its_columns(n_plus, run, library):
    expected, x = n_plus.fixture["runs"][run], n_plus.x
    value_terms = {"mask": n_plus.one_more, "weights": token_weights(n_plus.one_more, n_plus.one_more.sum())}
    policy_weights = token_weights(n_plus.mask, n_plus.mask.sum())
    batch = value_terms | {
        "old_logprobs": x["old_logprobs"], "old_values": x["old_values"], "policy_weights": policy_weights,
        "advantages": np.array(expected["advantages"], np.float32), "returns": np.array(expected["returns"], np.float32),
    }  # fmt: skip
    _, metrics, gradients = differentiated(library, ppo_loss(n_plus.settings), x, batch)
    # Terms of size 1 cancel in the policy loss, so the absolute tolerance is the one that counts.
    assert metrics["policy/loss"] == pytest.approx(expected["policy_loss"], rel=2e-6, abs=1e-6)
    assert metrics["value/loss"] == pytest.approx(expected["value_loss"], rel=2e-6, abs=1e-6)
    np.testing.assert_allclose(gradients["logprobs"], expected["gradient_of_logprobs"], rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(gradients["values"], expected["gradient_of_values"], rtol=2e-6, atol=1e-7)
    _, metrics, _ = differentiated(library, ppo_loss(n_plus.settings), x, batch | {"weights": policy_weights})
    assert metrics["policy/clip_fraction"] == pytest.approx(expected["policy_clip_fraction"], rel=1e-5)
    # N+ logs approxkl as a mean over the padding too, where it is 0.
    counted = n_plus.mask.mean()
    assert metrics["policy/approx_kl"] * counted == pytest.approx(expected["approxkl_over_padding_too"], rel=1e-5)


@pytest.mark.parametrize("run", ["plain_rewards", "whitened_rewards"])
def test_the_value_clip_fraction_is_n_pluss_on_its_columns(n_plus, run):
    expected, x = n_plus.fixture["runs"][run], n_plus.x
    returns, values = np.array(expected["returns"], np.float32), x["new_values"]
    clipped = losses.clipped_value_loss(np, values, x["old_values"], returns, clip_range=0.2)
    counted = (clipped > 0.5 * (values - returns) ** 2)[n_plus.one_more]
    assert counted.mean() == pytest.approx(expected["value_clip_fraction"], rel=1e-6)


# --------------------------------------------------------------------- TRL: losses of policy gradients and of preferences


def policy_gradient_of(x, advantages, limit, *, old="old", **keys):
    """Loss and gradient in the log-probabilities [B, T], as the algorithm makes them from its keys."""
    config = PolicyGradient.Config(samples=2, **({"baseline": "none", "scale": "none"} | keys))
    algorithm = PolicyGradient.__new__(PolicyGradient)
    algorithm.config = replace(config, lengths=replace(config.lengths, response=limit))
    mask = x["mask"]
    batch = {
        "mask": mask, "old_logprobs": x[old], "ref_logprobs": x["ref"], "correction": mask.astype(np.float32),
        "advantages": np.where(mask, advantages[:, None], 0).astype(np.float32),
    }  # fmt: skip
    return algorithm.config.make_loss(), batch | algorithm.weights(batch)


def preference_of(x, *, z=0.0, **keys):
    """The same for preferences: of TRL's rows the first half are chosen, the second half rejected; ours alternate."""
    config = PreferenceOptimisation.Config(**keys)
    half = len(x["mask"]) // 2
    order = np.arange(2 * half).reshape(2, half).T.reshape(-1)
    mask, pairs = x["mask"][order], np.zeros((half, 2, 2), np.float32)
    pairs[:, 0, 1] = 1 / half
    ref = np.where(mask, x["ref"][order], 0).sum(axis=1).astype(np.float32)
    batch = {
        "mask": mask, "ref": ref if config.needs_reference else 0 * ref, "lengths": mask.sum(axis=1).astype(np.float32),
        "real": np.ones((half, 2), bool), "pairs": pairs, "best": 0 * ref, "worst": 0 * ref, "z": np.full_like(ref, z),
        "sign": np.tile(np.float32([1, -1]), half), "kto": np.full_like(ref, 1 / (2 * half)),
    }  # fmt: skip
    return order, config.make_loss(), batch


@pytest.fixture(scope="module")
def trl_losses():
    fixture = outside("trl_policy_losses")
    arrays = {name: np.array(value, bool if name == "mask" else np.float32) for name, value in fixture["arrays"].items()}
    return fixture, arrays


def with_slopes(library, loss, logprobs, batch):
    arrays = {name: library.xp.asarray(array) for name, array in batch.items()}
    value, slopes = library.both(lambda x: loss(library.xp, {"logprobs": x}, arrays)[0], logprobs)
    return float(value), slopes


@pytest.fixture(params=[Torch, Jax], ids=["torch", "jax"])
def library(request):
    return request.param()


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("grpo", {}),
        ("grpo_kl", {"kl_coef": 0.04}),
        ("dr_grpo", {"aggregation": "constant"}),
        ("dapo", {"aggregation": "token_mean", "clip_high": 0.28}),
        ("cispo", {"aggregation": "token_mean", "clip": "weight", "clip_low": 0.0, "clip_high": 1.3}),
        ("gspo", {"ratio": "sequence", "clip_low": 0.03, "clip_high": 0.04}),
        ("rloo", {"aggregation": "response_sum", "clip": "none"}),
    ],
)
def test_policy_gradients_have_trls_losses_and_gradients(trl_losses, library, name, keys):
    """RLOO's is compared before the policy moves: afterwards TRL clips the product of a response's ratios, where the paper has no
    ratio. Values differ where gradients do not: of RLOO's loss, a sum over tokens instead of a product; of CISPO's, the integral
    of its gradient."""
    fixture, x = trl_losses
    old = "new" if name == "rloo" else "old"
    loss, batch = policy_gradient_of(x, np.float32(fixture["advantages"]), fixture["limit"], old=old, **keys)
    value, slopes = with_slopes(library, loss, x["new"], batch)
    expected = fixture["found"][name]
    np.testing.assert_allclose(slopes, np.where(x["mask"], expected["gradient"], 0), atol=1e-6)
    if name not in ("cispo", "rloo"):
        assert value == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("dpo", {}),
        ("hinge", {"loss": "hinge"}),
        ("ipo", {"loss": "ipo", "logprobs": "mean"}),
        ("robust", {"loss": "robust", "label_smoothing": 0.1}),
        ("simpo", {"loss": "simpo", "logprobs": "mean", "beta": 2.5, "margin": 1.375}),
        ("orpo", {"loss": "orpo", "logprobs": "mean"}),
        ("kto", {"loss": "kto", "z": 0.7}),
    ],
)
def test_preference_methods_have_trls_losses_and_gradients(trl_losses, library, name, keys):
    fixture, x = trl_losses
    order, loss, batch = preference_of(x, **keys)
    value, slopes = with_slopes(library, loss, x["new"][order], batch)
    expected = fixture["found"][name]
    assert value == pytest.approx(expected["loss"], abs=1e-5)
    gradient = np.where(x["mask"], expected["gradient"], 0)[order]
    np.testing.assert_allclose(slopes, gradient, atol=1e-5 * max(1, abs(gradient).max()))
