"""Rollouts, rewards, advantages and clipping; and episodes of several turns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lockstep.checking.conformance.algorithms.traces import in_batch, the_metric
from lockstep.checking.conformance.kit import Inapplicable, check, near, require, same
from lockstep.checking.conformance.subjects import AlgorithmSubject, constant, derivative, loss_of
from lockstep.checking.conformance.world import Talks
from lockstep.checking.tap import GenerateCall, ScoreCall
from lockstep.interfaces import Term
from lockstep.learning import randomness
from lockstep.learning.episodes import EnvironmentConfig

NO_WHITENING: dict[str, Any] = {"whiten_advantages": False, "whiten_rewards": False}


@check("algorithm", usually="log-probabilities not at the sampler's temperature, or dropout in one of two forward passes")
def the_first_update_is_on_policy(subject: AlgorithmSubject) -> None:
    """Before the first step the ratio is 1, whatever the temperature: approx_kl and clip_fraction are 0 (invariant 1)."""
    first = subject.run(1).updates()[0].metrics
    names = [name for name in ("policy/approx_kl", "policy/clip_fraction") if name in first]
    if not names:
        raise Inapplicable("it logs neither policy/approx_kl nor policy/clip_fraction")
    for name in names:
        near(f"{name} of the first update", first[name], 0.0, subject.world.tolerance(1e-6, 1e-2))


@check("algorithm", usually="the reference is not the initial policy, or is evaluated at another temperature")
def kl_is_zero_before_the_first_step(subject: AlgorithmSubject) -> None:
    """objective/kl of step 0 is 0: the policy equals its reference, at every temperature (invariant 1)."""
    for temperature in (0.7, 1.0):
        kl = the_metric(subject.run(1, temperature=temperature).metrics[0], "objective/kl")
        near(f"objective/kl of step 0 at temperature {temperature:g}", kl, 0.0, subject.world.tolerance(1e-5, 5e-2))


@check("algorithm", usually="the reference is the trained policy itself, or is reset during training")
def kl_is_of_the_policy_from_its_start(subject: AlgorithmSubject) -> None:
    """objective/kl is the mean over responses of the *sum* over counted tokens of log pi - log pi_ref, at the temperature of
    the sampler (Ziegler et al. 2019); the reference is the initial policy."""
    trace = subject.run(2)
    logged = the_metric(trace.metrics[1], "objective/kl")
    own = trace.own_evaluation(1)
    temperature = trace.generation(1).temperature
    start = subject.world.policy().evaluate(own.sequences, ["logprobs"], temperature=temperature)["logprobs"]
    sums = np.where(own.sequences.mask, own.outputs["logprobs"].astype(np.float64) - start, 0).sum(axis=1)
    near("objective/kl of step 1", logged, sums.mean(), subject.world.tolerance(1e-4, 5e-2))


@check("algorithm", usually="means over all columns, padding included")
def means_leave_padding_out(subject: AlgorithmSubject) -> None:
    """Logged entropy, length and score are means over the counted tokens and responses (section 5)."""
    trace = subject.run(2)
    own = trace.own_evaluation(1)
    mask, metrics = own.sequences.mask, trace.metrics[1]
    scores = [scoring.scores for scoring in trace.of(ScoreCall, 1)]
    expected = {"objective/length": mask.sum(axis=1).mean()}
    if "entropy" in own.outputs:
        expected["objective/entropy"] = own.outputs["entropy"][mask].mean()
    if scores:
        expected["objective/score"] = np.concatenate(scores).mean()
    for name, value in expected.items():
        if name in metrics:
            near(name, metrics[name], value, 1e-4 * max(1.0, abs(value)))


@check("algorithm", usually="the score is on a pad token, the first token or several tokens, or in an integer array")
def the_reward_lands_once(subject: AlgorithmSubject) -> None:
    """With gamma = lambda = 1, values of 0 and no KL, the return at every counted token is the score, 0.73, because the only
    reward is on the last token (invariant 11)."""
    subject.need_reward_model()
    subject.need("gamma", "lam")
    changes = {"gamma": 1.0, "lam": 1.0, "unfinished_score": None, **NO_WHITENING}
    trace = subject.first_terms(reward=constant, **changes)
    tolerance = subject.world.tolerance(1e-4, 2e-2)
    for term in in_batch(trace, "returns"):
        mask = term.sequences.mask
        near("returns", np.where(mask, term.batch["returns"], 0.73), np.full(mask.shape, 0.73), tolerance)
    discounted = subject.first_terms(reward=constant, **{**changes, "gamma": 0.5})
    for term in in_batch(discounted, "returns"):
        mask = term.sequences.mask
        distance = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] - 1
        near("returns at gamma 0.5", np.where(mask, term.batch["returns"], 0), np.where(mask, 0.73 * 0.5**distance, 0), tolerance)


@check("algorithm", usually="the penalty is missing, has the wrong sign, or is a mean instead of a sum")
def the_penalty_is_in_the_reward(subject: AlgorithmSubject) -> None:
    """objective/reward = objective/score - kl_coef x objective/kl once the policy has moved (invariant 11)."""
    subject.need_reward_model()
    subject.need_trait(subject.traits.kl in ("reward", "return"), f"its KL is not in the reward: kl={subject.traits.kl}")
    metrics = subject.run(3, unfinished_score=None, **NO_WHITENING).metrics[2]
    score, kl, coef = (the_metric(metrics, name) for name in ("objective/score", "objective/kl", "kl_coef"))
    require(kl != 0, "objective/kl is still 0 after two steps")
    near("objective/reward", the_metric(metrics, "objective/reward"), score - coef * kl, 1e-4 * max(1.0, abs(score)))


@check("algorithm", usually="eos_token_id is used instead of the configured stop token, or the score is lowered, not replaced")
def unfinished_responses_are_marked_down(subject: AlgorithmSubject) -> None:
    """unfinished_score replaces the score of a response that does not end with the configured stop token; others keep theirs
    (invariant 12)."""
    subject.need_reward_model()
    subject.need("unfinished_score", "gamma", "lam")
    trace = subject.first_terms(reward=constant, gamma=1.0, lam=1.0, unfinished_score=-1.0, **NO_WHITENING)
    stop, seen = subject.world.tokenizer.eos_id, set()
    for term in in_batch(trace, "returns"):
        mask = term.sequences.mask
        finished = ((term.sequences.responses == stop) & mask).any(axis=1)
        expected = np.where(finished, 0.73, -1.0)[:, None] * np.ones(mask.shape)
        returns = np.where(mask, term.batch["returns"], expected)
        near("returns (0.73 where finished, -1 where cut off)", returns, expected, subject.world.tolerance(1e-4, 2e-2))
        seen |= set(finished.tolist())
    require(seen == {True, False}, f"the rollout does not have both kinds of responses, only finished = {seen}")


@check("algorithm", usually="whitening per minibatch, with padding, or of rewards instead of advantages")
def advantages_are_whitened_over_the_batch(subject: AlgorithmSubject) -> None:
    """With whiten_advantages, the advantages of all counted tokens of the whole batch, not of each minibatch, have mean 0 and
    variance 1 (invariant 17)."""
    subject.need("whiten_advantages", "minibatches")
    trace = subject.first_terms(whiten_advantages=True)
    terms = in_batch(trace, "advantages")
    one_epoch = terms[: len(terms) // subject.config.epochs]
    values = np.concatenate([term.batch["advantages"][term.sequences.mask] for term in one_epoch]).astype(np.float64)
    near("the mean of the batch's advantages", values.mean(), 0.0, 1e-5)
    near("their variance", values.var(), 1.0, 1e-3)
    means = [float(term.batch["advantages"][term.sequences.mask].mean()) for term in one_epoch]
    require(len(means) == 1 or max(map(abs, means)) > 1e-3, f"each minibatch was whitened separately: their means are {means}")


@check("algorithm", usually="advantages are not whitened, or weights do not sum to 1")
def the_first_policy_loss_is_zero(subject: AlgorithmSubject) -> None:
    """With whitened advantages, one minibatch and ratio 1, the first policy loss is 0 (invariant 2)."""
    subject.need("whiten_advantages", "minibatches")
    trace = subject.run(1, whiten_advantages=True, minibatches=1)
    near("policy/loss", the_metric(trace.updates()[0].metrics, "policy/loss"), 0.0, subject.world.tolerance(1e-6, 1e-2))


def moved(subject: AlgorithmSubject, ratio: float, advantage: float) -> np.ndarray:
    """∂ loss / ∂ log π of the counted tokens of a first-step term, if the policy had moved by ``ratio`` and had this advantage.

    Raises:
      Inapplicable: the algorithm's losses read no advantages or no old log-probabilities.
    """
    term = next((t for t in in_batch(subject.run(1), "advantages") if "old_logprobs" in t.batch), None)
    if term is None:
        raise Inapplicable("its losses read no array called old_logprobs")
    return slopes_at(subject, term, ratio, advantage)


def slopes_at(subject: AlgorithmSubject, term: Term, ratio: float, advantage: float) -> np.ndarray:
    """`moved`, of this term."""
    outputs, mask = subject.outputs(term), term.sequences.mask & term.batch.get("mask", term.sequences.mask)
    batch = dict(term.batch)
    batch["advantages"] = np.where(mask, advantage, 0.0)
    if "old_logprobs" in batch:
        batch["old_logprobs"] = np.where(mask, outputs["logprobs"] - np.log(ratio), 0)
    if "ref_logprobs" in batch:  # so that a KL term has no slope
        batch["ref_logprobs"] = np.where(mask, outputs["logprobs"], 0)
    return derivative(replace(term, batch=batch), outputs, "logprobs")[mask]


@check("algorithm", usually="the loss has the wrong sign, and training makes what is rewarded rarer")
def what_has_a_positive_advantage_is_raised(subject: AlgorithmSubject) -> None:
    """On policy, the loss falls with the log-probability of a token of positive advantage, and rises with that of a negative
    one."""
    terms = [term for term in in_batch(subject.run(1), "advantages") if "logprobs" in term.loss.outputs]
    if not terms:
        raise Inapplicable("its losses read no log-probabilities")
    for advantage in (1.0, -1.0):
        slopes = slopes_at(subject, terms[0], 1.0, advantage)
        wrong = slopes[slopes * advantage > 1e-9]
        where = f"at advantage {advantage:+g} the derivative in log-probabilities is"
        require(not len(wrong), f"{where} {wrong[0] if len(wrong) else 0:+.3g} for {len(wrong)} of {len(slopes)} tokens")
        require((slopes * advantage < -1e-9).any(), f"{where} 0 for all {len(slopes)} tokens")


@check("algorithm", usually="max and min are swapped, or advantages have the wrong sign")
def clipping_binds(subject: AlgorithmSubject) -> None:
    """A ratio above the clip's bounds with a positive advantage, or below them with a negative one, has gradient 0; the other two
    combinations do not (invariant 20)."""
    subject.need_trait(subject.traits.clip == "ratio", f"its ratio is not clipped: clip={subject.traits.clip}")
    low, high = subject.traits.bounds
    above, below = 1.6 * high, 0.6 * low
    cases = [(above, 1.0, True), (above, -1.0, False)] + ([(below, -1.0, True), (below, 1.0, False)] if low > 0 else [])
    for ratio, advantage, bound in cases:
        slopes = moved(subject, ratio, advantage)
        largest, downhill = np.abs(slopes).max(), (np.sign(slopes) == -np.sign(advantage)).all()
        where = f"at ratio {ratio:g} and advantage {advantage:+g} the derivative in log-probabilities is"
        require((largest < 1e-9) == bound, f"{where} {largest:.3g}")
        require(bound or downhill, f"{where} {slopes[0]:+.3g}: it raises the loss where it should lower it")


@check("algorithm", usually="bounds are taken for distances from 1, or the weight is part of the gradient")
def the_weight_is_clipped(subject: AlgorithmSubject) -> None:
    """The gradient of a token's log-probability is -advantage x the ratio clipped to the bounds, and does not vanish beyond them
    (CISPO: MiniMax 2025, eq. 4 and 5)."""
    subject.need_trait(subject.traits.clip == "weight", f"it does not clip weights: clip={subject.traits.clip}")
    low, high = subject.traits.bounds
    for advantage in (1.0, -1.0):
        at_one = moved(subject, 1.0, advantage)
        require((np.sign(at_one) == -advantage).all(), f"at ratio 1 and advantage {advantage:+g} the slope is {at_one[0]:+.3g}")
        for ratio in (0.6 * low, 0.3, 2.0, 1.4 * high):
            if ratio > 0:
                what = f"at ratio {ratio:g} and advantage {advantage:+g}, the weight"
                near(what, moved(subject, ratio, advantage) / at_one, np.full(at_one.shape, np.clip(ratio, low, high)), 1e-3)


@check("algorithm", usually="min instead of max, or values are clipped around the returns instead of the old values")
def value_clipping_only_raises_the_loss(subject: AlgorithmSubject) -> None:
    """A value that moved beyond old_values +- value_clip_range towards the return has gradient 0; one that moved away from the
    return keeps its gradient, so clipping never lowers the loss (invariant 19)."""
    subject.need("value_clip_range")
    reach = subject.config.value_clip_range
    term = in_batch(subject.run(1), "old_values")[0]
    outputs, mask = subject.outputs(term), term.sequences.mask
    for target, bound in ((3.0, True), (-3.0, False)):
        batch = dict(term.batch)
        batch["old_values"] = np.where(mask, outputs["values"] - 2 * reach, 0)
        batch["returns"] = np.where(mask, batch["old_values"] + target * reach, 0)
        largest = np.abs(derivative(replace(term, batch=batch), outputs, "values")[mask]).max()
        where = f"two clip ranges above the old value, and with the return {target:+g} from it, the derivative in values is"
        require((largest == 0) == bound, f"{where} {largest:.3g}")


@check("algorithm", usually="lambda has no effect, an index is off by one, or padding's value follows the last token")
def advantages_are_sums_of_errors(subject: AlgorithmSubject) -> None:
    """A_t = sum of (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, with V = 0 after the last token, and the
    return is A_t + V_t (Schulman et al. 2016, eq. 16; invariant 8). Without KL the score is the only reward."""
    subject.need_reward_model()
    subject.need("gamma", "lam", "kl_coef")
    gamma, lam = 0.9, 0.5
    trace = subject.run(3, reward=constant, gamma=gamma, lam=lam, kl_coef=0.0, unfinished_score=None, **NO_WHITENING)
    largest = 0.0
    for term in in_batch(trace, "old_values", 2):
        mask = term.sequences.mask
        advantages, returns = np.zeros(mask.shape), np.zeros(mask.shape)
        for row, count in enumerate(mask.sum(axis=1)):
            values = np.append(term.batch["old_values"][row, :count].astype(np.float64), 0.0)
            errors = np.where(np.arange(count) == count - 1, 0.73, 0.0) + gamma * values[1:] - values[:-1]
            for t in range(count):
                advantages[row, t] = sum((gamma * lam) ** k * error for k, error in enumerate(errors[t:]))
            returns[row, :count] = advantages[row, :count] + values[:-1]
            largest = max(largest, np.abs(values).max())
        tolerance = subject.world.tolerance(1e-5, 1e-4)
        near("advantages", np.where(mask, term.batch["advantages"], 0), advantages, tolerance)
        near("returns", np.where(mask, term.batch["returns"], 0), returns, tolerance)
    require(largest > 0, "all values are still 0 after two steps")


@check("algorithm", usually="the controller gets KL per token, or lacks its clip at 0.2")
def the_kl_controller_follows_its_rule(subject: AlgorithmSubject) -> None:
    """kl_coef *= 1 + clip(KL / target - 1, -0.2, 0.2) x episodes / horizon with the KL per response, after each step
    (Ziegler et al. 2019, 2.2; invariant 18)."""
    subject.need("kl_target", "kl_horizon")
    trace = subject.run(2)
    kl, episodes = the_metric(trace.metrics[1], "objective/kl"), len(trace.generation(0).seeds)
    horizon = 8.0 * episodes
    for target in (abs(kl) / 1.1, 1e3, 1e-6):
        metrics = subject.run(2 if target == 1e3 else 3, kl_target=target, kl_horizon=horizon).metrics
        for step in range(len(metrics) - 1):
            error = min(max(metrics[step]["objective/kl"] / target - 1, -0.2), 0.2)
            expected = metrics[step]["kl_coef"] * (1 + error * episodes / horizon)
            near(f"with kl_target={target:.3g}, kl_coef of step {step + 1}", metrics[step + 1]["kl_coef"], expected, 1e-9)


@check("algorithm", usually="ptx_coef multiplies the wrong term, or raw texts replace some episodes")
def the_pretraining_mix_is_added(subject: AlgorithmSubject) -> None:
    """ptx_coef adds ptx_coef x the next-token loss on raw text to each update and leaves the other terms alone (invariant
    24)."""
    subject.need("ptx_coef", "ptx_ratio")
    plain = subject.run(1).updates()[0]
    mixed = subject.first_terms(ptx_coef=3.0, ptx_ratio=1.0).updates()[0]
    extra = mixed.terms[len(plain.terms) :]
    require(extra, f"an update with ptx_coef=3 has {len(mixed.terms)} terms, no more than without")
    for one, other in zip(plain.terms, mixed.terms, strict=False):
        same("the tokens of a term beside the mix", other.sequences.tokens, one.sequences.tokens)
        for name in one.batch:
            same(f"{name} of a term beside the mix", other.batch[name], one.batch[name])
    value = sum(loss_of(term, {"logprobs": np.full(term.sequences.mask.shape, -2.0)}) for term in extra)
    near("the mix's loss with every log-probability at -2 and ptx_coef=3", value, 6.0, 1e-4)


@check("algorithm", usually="the log ratio is differentiated, has the wrong sign, or the teacher reads at another temperature")
def the_teacher_grades_each_token(subject: AlgorithmSubject) -> None:
    """The derivative of the first loss in the log-probability of a sampled token is proportional to log pi - log teacher, at the
    temperature of the sampler (invariant 29)."""
    subject.need("teacher")
    terms = [term for term in subject.run(1).updates()[0].terms if term.loss.outputs == ("logprobs",)]
    if not terms:
        raise Inapplicable("its loss does not read the log-probabilities of sampled tokens alone")
    for term in terms:
        mask, unit = term.sequences.mask, lambda x: x / np.linalg.norm(x)
        student, teacher = (
            subject.world.policy(n).evaluate(term.sequences, ["logprobs"], temperature=0.7)["logprobs"].astype(np.float64)
            for n in (0, 1)
        )
        slopes = derivative(term, {"logprobs": student}, "logprobs")[mask]
        expected = unit((student - teacher)[mask])
        near("the direction of the derivative", unit(slopes), expected, subject.world.tolerance(1e-3, 5e-2))


# ----------------------------------------------------------------------------------------------------------- environments


@check("algorithm", usually="the loss is over all real tokens of an episode: the policy learns to speak for its tools")
def what_was_said_is_not_trained_on(subject: AlgorithmSubject) -> None:
    """In an episode with an environment, only the policy's own tokens count, turn by turn. Model outputs at the environment's
    tokens do not affect the loss (invariant 30)."""
    subject.need_trait(subject.cls.takes_environment, "it takes no environment")
    changes: dict[str, Any] = {"lengths": {"response": 16}, "stop_strings": ["w1", "w2", "w3"]}
    environment = Talks(EnvironmentConfig(turns=2, turn_tokens=6))
    trace, gaps = subject.run(1, environment=environment, learns=False, **changes), 0
    drawn = {
        tuple(tokens[:length])
        for call in trace.of(GenerateCall, 0)
        for tokens in call.generated.tokens.tolist()
        for length in range(1, len(tokens) + 1)
    }
    for term in trace.terms(0):
        rows = term.sequences
        for tokens, mask in zip(rows.responses, rows.mask, strict=True):
            turns = np.split(tokens, np.flatnonzero(np.diff(mask)) + 1)[not mask[0] :: 2] if mask.any() else []
            wrong = [turn.tolist() for turn in turns if tuple(turn.tolist()) not in drawn]
            require(not wrong, f"the tokens {wrong[:1]} count, and no turn of the policy has them")
        said = rows.response_mask & ~rows.mask & rows.mask.any(axis=1, keepdims=True)
        gaps += int(said.any(axis=1).sum())
        outputs = subject.outputs(term)
        noise = randomness.generator(0, "said").normal(size=said.shape)
        moved = {n: a + np.where(said, noise, 0) if a.shape == said.shape else a for n, a in outputs.items()}
        near("the loss under other outputs for what was said", loss_of(term, moved), loss_of(term, outputs), 1e-9)
    require(gaps, "0 of the rows that it trains on have a second turn")
