"""Algorithms that are wrong on purpose, most of them the way some library has been (rlhf-correctness: "mistakes found")."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from defects import defect
from lockstep.interfaces import Responses, Traits
from lockstep.learning import losses, numerics, randomness
from lockstep.text import encoding
from lockstep.text.encoding import Example
from lockstep.text.stopping import ends_with_stop
from lockstep_rlhf.algorithms import (
    distillation,
    online_preferences,
    policy_gradient,
    ppo,
    preference_optimisation,
    reward_modelling,
    sft,
)
from lockstep_rlhf.algorithms.language_modelling import NextTokenLoss
from lockstep_rlhf.algorithms.policy_gradient import PolicyGradientLoss
from lockstep_rlhf.algorithms.ppo import PPOLoss
from lockstep_rlhf.algorithms.preference_losses import PairLoss


class PPO(ppo.PPO):
    like = "ppo"


class SFT(sft.SFT):
    like = "sft"


class PolicyGradient(policy_gradient.PolicyGradient):
    like = "policy_gradient"


class PreferenceOptimisation(preference_optimisation.PreferenceOptimisation):
    like = "preference_optimisation"


class OnlinePreferences(online_preferences.OnlinePreferences):
    like = "online_preferences"


class Distillation(distillation.Distillation):
    like = "distillation"


class RewardModelling(reward_modelling.RewardModelling):
    like = "reward_modelling"


class KTO(preference_optimisation.PreferenceOptimisation):
    like = "kto"


class CISPO(policy_gradient.PolicyGradient):
    like = "cispo"


class RLOO(policy_gradient.PolicyGradient):
    like = "rloo"


# --------------------------------------------------------------------------------------------------- steps and batches


@defect("algorithm", caught_by="its_traits_are_true")
class SaysItDoesNotSample(PPO):
    """The traits are those of a supervised algorithm."""

    @classmethod
    def traits(cls, config):
        return Traits()


@defect("algorithm", caught_by="its_traits_are_true")
class SaysOneRound(PolicyGradient):
    """It samples until all groups are informative, and its traits say that it samples once."""

    def sample(self, step, clock):
        super().sample(step, clock)
        return super().sample(step, clock)


@defect("algorithm", caught_by="optimizer_steps_are_counted")
class ExtraStep(SFT):
    """One optimizer step more on the last batch of each pass."""

    def step(self, step):
        metrics = super().step(step)
        if step % 2 == 1:
            self.learner.update(self.next_terms(step))
        return metrics


@defect("algorithm", caught_by="optimizer_steps_are_counted")
class MinibatchesWithoutEffect(PPO):
    """`minibatches` is read and ignored."""

    def minibatches(self, step, epoch):
        return [np.concatenate(super().minibatches(step, epoch))]


@defect("algorithm", caught_by="optimizer_steps_are_counted")
class OnePassTooFew(SFT):
    """The steps of the last pass are dropped."""

    @classmethod
    def steps(cls, config, examples):
        return super().steps(config, examples) - examples // config.batch_size


@defect("algorithm", caught_by="micro_batches_do_not_matter")
class MeansOfMicroBatches(PPO):
    """Each micro-batch is averaged over its own tokens."""

    def terms(self, *given):
        terms = super().terms(*given)
        for term in terms:
            for name in ("weights", "policy_weights"):
                term.batch[name] = term.batch[name] / term.batch[name].sum() / len(terms)
        return terms


@defect("algorithm", caught_by="micro_batches_do_not_matter")
class CriticGrows(PPO):
    """The critic's gradient grows with the number of micro-batches."""

    def terms(self, *given):
        terms = super().terms(*given)
        for term in terms:
            term.batch["weights"] = term.batch["weights"] * len(terms)
        return terms


@defect("algorithm", caught_by="micro_batches_do_not_matter")
class PairsCutApart(RewardModelling):
    """The share of a micro-batch in its batch is forgotten."""

    def terms(self, batch):
        terms = super().terms(batch)
        return [replace(term, batch={"preferences": term.batch["preferences"] * len(terms)}) for term in terms]


@defect("algorithm", caught_by="the_same_seed_is_the_same_run")
class OwnGenerator(PPO):
    """Minibatches from a generator that is nobody's."""

    generator = np.random.default_rng(5)

    def minibatches(self, step, epoch):
        return np.split(self.generator.permutation(self.config.batch_size), self.config.minibatches)


@defect("algorithm", caught_by="the_same_seed_is_the_same_run")
class SeedWithoutEffect(SFT):
    """The seed of the configuration is not used."""

    def __init__(self, config, context):
        super().__init__(config, replace(context, seed=7))


@defect("algorithm", caught_by="restarts_change_nothing")
class ForgetsBeta(PPO):
    """The adaptive KL coefficient is lost on a restart."""

    def load_state(self, state):
        pass


@defect("algorithm", caught_by="restarts_change_nothing")
class AnchorsAnew(PPO):
    """A restart takes the policy of that moment as its reference."""

    def load_state(self, state):
        super().load_state(state)
        self.ref_policy = self.policy.copy()


@defect("algorithm", caught_by="restarts_change_nothing")
class OrderFromMemory(SFT):
    """The order of the data comes from a counter that a restart sets to 0."""

    calls = 0

    def batch(self, step):
        self.calls += 1
        return super().batch(self.calls - 1)


@defect("algorithm", caught_by="reference_models_are_untouched")
class ReferenceDrifts(PPO):
    """The reference follows the policy."""

    def step(self, step):
        metrics = super().step(step)
        for name, tensor in self.ref_policy.tensors().items():
            tensor.data.lerp_(self.policy.tensors()[name].data, 0.5)
        return metrics


@defect("algorithm", caught_by="training_moves_the_result")
class TrainsNothing(SFT):
    """The learner trains a copy."""

    def __init__(self, config, context):
        super().__init__(config, context)
        copy = self.policy.copy()
        self.learner = context.backend.learner({"policy": copy}, {"policy": config.optimizer})

    def result(self):
        return self.policy


@defect("algorithm", caught_by="training_moves_the_result")
class AverageWithoutEffect(PPO):
    """ema_decay is kept and never used."""

    def result(self):
        return self.policy


@defect("algorithm", caught_by="orders_are_fresh")
class SameNoise(PPO):
    """Every update samples with the same noise."""

    def rollout(self, step, clock):
        return super().rollout(0, clock)


@defect("algorithm", caught_by="orders_are_fresh")
class SamePermutation(PPO):
    """A generator key that is used again: the same minibatches at every update."""

    def minibatches(self, step, epoch):
        return super().minibatches(0, 0)


@defect("algorithm", caught_by="orders_are_fresh")
class OneOrder(SFT):
    """All passes go through the data in one order."""

    def batch(self, step):
        return super().batch(step % 2)


@defect("algorithm", caught_by="orders_are_fresh")
class SomeExamplesTwice(SFT):
    """Batches are drawn with replacement."""

    def batch(self, step):
        draws = randomness.generator(self.context.seed, "draws", step).integers(0, len(self.examples), self.config.batch_size)
        return [self.examples[i] for i in draws]


# ----------------------------------------------------------------------------------------------------------------- masks


class OtherMask(PPO):
    """A rollout whose mask is made by `mask`."""

    def mask(self, sequences):
        raise NotImplementedError

    def rollout(self, step, clock):
        rollout = super().rollout(step, clock)
        return replace(rollout, sequences=replace(rollout.sequences, mask=self.mask(rollout.sequences)))


@defect("algorithm", caught_by="nothing_after_the_stop_token_counts")
class PadsCount(OtherMask):
    """The mask is that of the columns."""

    def mask(self, sequences):
        return np.ones_like(sequences.mask)


@defect("algorithm", caught_by="nothing_after_the_stop_token_counts")
class OneTooMany(OtherMask):
    """The token after EOS counts too."""

    def mask(self, sequences):
        return sequences.mask | np.roll(sequences.mask, 1, axis=1)


@defect("algorithm", caught_by="the_stop_token_is_learned")
class PadIsEos(OtherMask):
    """Pad and EOS are one token, so that EOS falls out of the loss."""

    def mask(self, sequences):
        return sequences.mask & (sequences.responses != self.tokenizer.eos_id)


@dataclass(frozen=True)
class MultiplyingLoss(NextTokenLoss):
    def __call__(self, xp, outputs, batch):
        return -xp.sum(outputs["logprobs"] * batch["weights"]), {}


@defect("algorithm", caught_by="masked_outputs_are_inert")
class Multiplies(SFT):
    """Masked columns are multiplied by 0."""

    def next_terms(self, step):
        return [replace(term, loss=MultiplyingLoss()) for term in super().next_terms(step)]


@defect("algorithm", caught_by="every_token_weighs_the_same")
class MeanOfRows(SFT):
    """Each row is averaged over its own tokens first."""

    def next_terms(self, step):
        terms = []
        for term in super().next_terms(step):
            mask = term.sequences.mask
            weights = mask / mask.sum(axis=1, keepdims=True) / len(mask)
            terms.append(replace(term, batch={"weights": weights.astype(np.float32)}))
        return terms


@defect("algorithm", caught_by="only_the_response_counts")
class PromptToo(SFT):
    """The prompt is trained on as well."""

    def block(self, examples):
        return encoding.block(examples, self.tokenizer, self.config.lengths, prompt_loss=True)


@defect("algorithm", caught_by="only_the_response_counts")
class WithoutEos(SFT):
    """Demonstrations end without EOS."""

    def block(self, examples):
        rows = super().block(examples)
        return replace(rows, mask=rows.mask & (rows.responses != self.tokenizer.eos_id))


# --------------------------------------------------------------------------------------------------------- reinforcement


class OtherTemperature(PPO):
    """Log-probabilities of one kind at temperature 1 instead of the rollout's."""

    wrong: str

    def rollout(self, step, clock):
        rollout = super().rollout(step, clock)
        model = self.policy if self.wrong == "old_logprobs" else self.ref_policy
        found = model.evaluate(rollout.sequences, ["logprobs"], temperature=1.0)["logprobs"]
        return replace(rollout, **{self.wrong: found})


@defect("algorithm", caught_by="the_first_update_is_on_policy")
class OldAtOne(OtherTemperature):
    """Old log-probabilities at temperature 1, new ones at the rollout's."""

    wrong = "old_logprobs"


@defect("algorithm", caught_by="kl_is_zero_before_the_first_step")
class ReferenceAtOne(OtherTemperature):
    """Reference log-probabilities at temperature 1: KL is not 0 at the start."""

    wrong = "ref_logprobs"


@defect("algorithm", caught_by="kl_is_of_the_policy_from_its_start")
class ReferenceIsPolicy(PPO):
    """The reference is the policy that is trained: KL is 0 for ever."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.ref_policy = self.policy


@defect("algorithm", caught_by="kl_is_of_the_policy_from_its_start")
class KLPerToken(PPO):
    """KL is averaged over tokens instead of summed."""

    def prepare(self, rollout):
        batch, metrics = super().prepare(rollout)
        return batch, metrics | {"objective/kl": metrics["objective/kl"] / metrics["objective/length"]}


@defect("algorithm", caught_by="means_leave_padding_out")
class MeanOverPadding(PPO):
    """Entropy is averaged over all columns."""

    def prepare(self, rollout):
        batch, metrics = super().prepare(rollout)
        return batch, metrics | {"objective/entropy": float(rollout.entropy.mean())}


class OtherRewards(PPO):
    """Rewards made by `rewards`; the rest of `prepare` as it should be."""

    def rewards(self, scores, kl, mask):
        raise NotImplementedError

    def prepare(self, rollout):
        right, numerics.token_rewards = numerics.token_rewards, lambda s, k, m, beta: self.rewards(s, beta * k, m)
        try:
            return super().prepare(rollout)
        finally:
            numerics.token_rewards = right


def placed(scores, penalty, mask, column):
    rewards = np.where(mask, -penalty, 0).astype(np.float32)
    rewards[np.arange(len(mask)), column] += scores
    return rewards


@defect("algorithm", caught_by="the_reward_lands_once")
class RewardOnPad(OtherRewards):
    """The reward stands on the column after the last token."""

    def rewards(self, scores, penalty, mask):
        return placed(scores, penalty, mask, np.minimum(mask.sum(axis=1), mask.shape[1] - 1))


@defect("algorithm", caught_by="the_reward_lands_once")
class RewardOnTheFirstToken(OtherRewards):
    """The reward stands on the first token."""

    def rewards(self, scores, penalty, mask):
        return placed(scores, penalty, mask, 0)


@defect("algorithm", caught_by="the_reward_lands_once")
class RewardEverywhere(OtherRewards):
    """Every token has the reward."""

    def rewards(self, scores, penalty, mask):
        return np.where(mask, scores[:, None] - penalty, 0).astype(np.float32)


@defect("algorithm", caught_by="the_reward_lands_once")
class IntegerRewards(OtherRewards):
    """Rewards in an array made like the token ids."""

    def rewards(self, scores, penalty, mask):
        return placed(scores, penalty, mask, np.maximum(mask.sum(axis=1) - 1, 0)).astype(np.int32)


@defect("algorithm", caught_by="the_penalty_is_in_the_reward")
class PenaltyAdded(OtherRewards):
    """The penalty has the wrong sign."""

    def rewards(self, scores, penalty, mask):
        return placed(scores, -penalty, mask, np.maximum(mask.sum(axis=1) - 1, 0))


@defect("algorithm", caught_by="the_penalty_is_in_the_reward")
class PenaltyForgotten(OtherRewards):
    """There is no penalty."""

    def rewards(self, scores, penalty, mask):
        return placed(scores, 0 * penalty, mask, np.maximum(mask.sum(axis=1) - 1, 0))


@defect("algorithm", caught_by="unfinished_responses_are_marked_down")
class OtherStopToken(PPO):
    """The rule looks for <eos> while the policy stops at <stop>."""

    def rollout(self, step, clock):
        rollout = super().rollout(step, clock)
        eos = self.tokenizer.core.token_to_id("<eos>")
        rows = rollout.sequences
        return replace(rollout, finished=ends_with_stop(rows.responses, rows.mask, [eos]))


@defect("algorithm", caught_by="unfinished_responses_are_marked_down")
class Subtracts(PPO):
    """The score is lowered by 1 instead of replaced."""

    def prepare(self, rollout):
        lowered = replace(rollout, scores=np.where(rollout.finished, rollout.scores, rollout.scores - 1).astype(np.float32))
        return super().prepare(replace(lowered, finished=np.ones_like(rollout.finished)))


@defect("algorithm", caught_by="advantages_are_whitened_over_the_batch")
class WhitensMinibatches(PPO):
    """Whitening over each minibatch."""

    def terms(self, sequences, batch, rows, *forward):
        mask = batch["mask"][rows]
        whitened = dict(batch) | {"advantages": batch["advantages"].copy()}
        whitened["advantages"][rows] = numerics.whiten(batch["advantages"][rows], mask)
        return super().terms(sequences, whitened, rows, *forward)


@defect("algorithm", caught_by="advantages_are_whitened_over_the_batch")
class WhitensPadding(PPO):
    """Whitening over all columns, padding included."""

    def prepare(self, rollout):
        right, numerics.whiten = numerics.whiten, lambda x, mask: ((x - x.mean()) / x.std()).astype(np.float32)
        try:
            return super().prepare(rollout)
        finally:
            numerics.whiten = right


@defect("algorithm", caught_by="the_first_policy_loss_is_zero")
class ScalesOnly(PPO):
    """Advantages are scaled to variance 1; their mean stays."""

    def prepare(self, rollout):
        right, numerics.whiten = numerics.whiten, numerics.scale_to_unit_variance
        try:
            return super().prepare(rollout)
        finally:
            numerics.whiten = right


@dataclass(frozen=True)
class MinimumLoss(PPOLoss):
    """The minimum where the maximum of the losses belongs."""

    def __call__(self, xp, outputs, batch):
        logprobs = losses.select(xp, batch["mask"], outputs["logprobs"])
        ratio, advantages = xp.exp(logprobs - batch["old_logprobs"]), batch["advantages"]
        clipped = xp.clip(ratio, 1 - self.clip_range, 1 + self.clip_range)
        loss = xp.minimum(-advantages * ratio, -advantages * clipped)
        return losses.weighted_sum(xp, loss, batch["weights"]), super().__call__(xp, outputs, batch)[1]


@defect("algorithm", caught_by="clipping_binds")
class Minimum(PPO):
    """Clipping binds where it should not, and does not where it should."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.loss = MinimumLoss(config.clip_range, config.value_clip_range, config.value_coef)


@defect("algorithm", caught_by="clipping_binds")
class ClimbsDown(PPO):
    """Advantages enter the loss with the wrong sign."""

    def terms(self, *given):
        terms = super().terms(*given)
        return [replace(term, loss=Flipped(0.2, 0.2, 0.1)) for term in terms]


@defect("algorithm", caught_by="value_clipping_only_raises_the_loss")
class LowersTheValueLoss(PPO):
    """The smaller of the two value losses: clipping rewards values that left their range."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.loss = SmallerValueLoss(config.clip_range, config.value_clip_range, config.value_coef)


@dataclass(frozen=True)
class SmallerValueLoss(PPOLoss):
    def __call__(self, xp, outputs, batch):
        loss, metrics = super().__call__(xp, outputs, batch)
        values, old, returns = outputs["values"], batch["old_values"], batch["returns"]
        near = xp.clip(values, old - self.value_clip_range, old + self.value_clip_range)
        smaller = 0.5 * xp.minimum((values - returns) ** 2, (near - returns) ** 2)
        value = losses.weighted_sum(xp, smaller, batch["weights"])
        return loss + self.value_coef * (value - metrics["value/loss"]), metrics


@defect("algorithm", caught_by="value_clipping_only_raises_the_loss")
class NeverClipsValues(PPO):
    """value_clip_range is read and not used."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.loss = PPOLoss(config.clip_range, 1e9, config.value_coef)


@defect("algorithm", caught_by="advantages_are_sums_of_errors")
class ForgetsLambda(PPO):
    """Monte-Carlo advantages whatever lambda is."""

    def __init__(self, config, context):
        super().__init__(replace(config, lam=1.0), context)


@defect("algorithm", caught_by="advantages_are_sums_of_errors")
class LooksBehindTheEnd(PPO):
    """The last token bootstraps from its own value, as if the episode went on."""

    def prepare(self, rollout):
        batch, metrics = super().prepare(rollout)
        mask = rollout.sequences.mask
        last = mask & (np.cumsum(mask, axis=1) == mask.sum(axis=1, keepdims=True))
        beyond = np.where(last, self.config.gamma * batch["old_values"], 0).astype(np.float32)
        return batch | {name: batch[name] + beyond for name in ("advantages", "returns")}, metrics


@dataclass(frozen=True)
class Flipped(PPOLoss):
    def __call__(self, xp, outputs, batch):
        return super().__call__(xp, outputs, dict(batch) | {"advantages": -batch["advantages"]})


@defect("algorithm", caught_by="the_kl_controller_follows_its_rule")
class ControllerPerToken(PPO):
    """The controller is fed the mean over tokens."""

    def step(self, step):
        self.kl.update = lambda kl, episodes: type(self.kl).update(self.kl, kl / 8, episodes)
        return super().step(step)


@defect("algorithm", caught_by="the_kl_controller_follows_its_rule")
class ControllerWithoutClip(PPO):
    """The controller's error is not clipped."""

    def step(self, step):
        def update(kl, episodes):
            self.kl.coef *= float(1 + (kl / self.config.kl_target - 1) * episodes / self.config.kl_horizon)

        self.kl.update = update
        return super().step(step)


@defect("algorithm", caught_by="the_pretraining_mix_is_added")
class MixWithoutWeight(PPO):
    """ptx_coef switches the mix on and does not weigh it."""

    def extra_terms(self, step, number):
        return [replace(term, loss=NextTokenLoss(1.0, "ptx/loss")) for term in super().extra_terms(step, number)]


@defect("algorithm", caught_by="the_pretraining_mix_is_added")
class MixReplaces(PPO):
    """With the mix on, the episodes weigh half."""

    def terms(self, *given):
        terms = super().terms(*given)
        for term in terms:
            term.batch["weights"] = term.batch["weights"] * (0.5 if self.config.raw_texts else 1.0)
        return terms


@defect("algorithm", caught_by="the_teacher_grades_each_token")
class AwayFromTheTeacher(Distillation):
    """The advantage has the wrong sign."""

    def prepare(self, rollout):
        batch = super().prepare(rollout)
        return batch | {"advantages": -batch["advantages"]}


@defect("algorithm", caught_by="the_teacher_grades_each_token")
class TeacherAtOne(Distillation):
    """The teacher's log-probabilities are at temperature 1."""

    def evaluate(self, model, sequences, outputs):
        return model.evaluate(sequences, outputs) if model is self.teacher else super().evaluate(model, sequences, outputs)


class UndetachedLoss(PolicyGradientLoss):
    def __call__(self, xp, outputs, batch):
        teacher = batch["advantages"] + batch["old_logprobs"]
        gap = losses.select(xp, batch["mask"], outputs["logprobs"]) - teacher
        return losses.weighted_sum(xp, gap, batch["weights"]), {}


@defect("algorithm", caught_by="the_teacher_grades_each_token")
class Undetached(Distillation):
    """The log ratio is the loss, and differentiated: its expected gradient is 0."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.loss = UndetachedLoss("none", 0, 1, None, False, None, 0.0)


# ---------------------------------------------------------------------------------------------------------------- groups


@defect("algorithm", caught_by="a_prompt_has_several_samples")
class OneSeedPerPrompt(PolicyGradient):
    """All samples of a prompt are drawn with the same noise, as by engines that are seeded alike (ms-swift#7858)."""

    def responses(self, first, count, seeds, clock):
        k = self.config.samples
        return super().responses(first, count, np.repeat(seeds[::k], k, axis=0), clock)


@defect("algorithm", caught_by="a_prompt_has_several_samples")
class OneSample(PolicyGradient):
    """Each row of the batch is another prompt."""

    def responses(self, first, count, seeds, clock):
        return super().responses(first * len(seeds), len(seeds), seeds, clock)


@defect("algorithm", caught_by="equal_rewards_say_nothing")
class BatchBaseline(PolicyGradient):
    """The baseline is the batch's mean."""

    def advantages(self, rewards, counted):
        return np.where(counted, rewards - rewards[counted].mean(), 0).astype(np.float32)


@defect("algorithm", caught_by="equal_rewards_say_nothing")
class TinyEpsilon(PolicyGradient):
    """A deviation that is only rounding divides it: in float32, seven rewards of 0.1 have advantages of 0.8."""

    def advantages(self, rewards, counted):
        groups = rewards.astype(np.float32).reshape(-1, self.config.samples)
        mean = groups.sum(axis=1, keepdims=True, dtype=np.float32) / np.float32(self.config.samples)
        return ((groups - mean) / (groups.std(axis=1, keepdims=True) + 1e-9)).reshape(-1)


@defect("algorithm", caught_by="responses_that_do_not_count_shift_nothing")
class NoneIsZeroInTheGroup(PolicyGradient):
    """A response without a score is in its prompt's mean as 0 (TRL#5902)."""

    def advantages(self, rewards, counted):
        return super().advantages(np.nan_to_num(rewards), np.ones_like(counted))


@defect("algorithm", caught_by="responses_that_do_not_count_shift_nothing")
class MaskedSibling(PolicyGradient):
    """A response that is masked still shifts its prompt's baseline (OpenRLHF#1239)."""

    def advantages(self, rewards, counted):
        return super().advantages(rewards, np.isfinite(rewards))


@defect("algorithm", caught_by="the_better_response_has_the_higher_advantage")
class Interleaved(PolicyGradient):
    """The samples of a prompt are taken to be a batch apart, where they are neighbours."""

    def advantages(self, rewards, counted):
        k = self.config.samples
        apart = lambda x: x.reshape(k, -1).T.reshape(-1)  # noqa: E731
        return super().advantages(apart(rewards), apart(counted)).reshape(-1, k).T.reshape(-1)


@defect("algorithm", caught_by="the_better_response_has_the_higher_advantage")
class WorstFirst(PolicyGradient):
    """Rewards are taken for costs."""

    def advantages(self, rewards, counted):
        return super().advantages(-rewards, counted)


@defect("algorithm", caught_by="prompts_that_say_nothing_are_replaced")
class JudgesShapedScores(PolicyGradient):
    """A group looks informative because one response was cut off (NeMo-RL#2431)."""

    def responses(self, first, count, seeds, clock):
        samples, scores, details = super().responses(first, count, seeds, clock)
        return samples, numerics.replace_unfinished(scores, samples.finished, -1.0), details


@defect("algorithm", caught_by="prompts_that_say_nothing_are_replaced")
class TheSamePromptsAgain(PolicyGradient):
    """The extra rounds start from the step's first prompt."""

    def responses(self, first, count, seeds, clock):
        return super().responses(0, count, seeds, clock)


@defect("algorithm", caught_by="clipping_binds")
class OptimisticClip(PolicyGradient):
    """max and min are swapped."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.loss = OptimisticLoss(**vars(self.loss))


@dataclass(frozen=True)
class OptimisticLoss(PolicyGradientLoss):
    def __call__(self, xp, outputs, batch):
        logprobs = losses.select(xp, batch["mask"], outputs["logprobs"])
        ratio = xp.exp(logprobs - batch["old_logprobs"])
        loss = xp.minimum(-batch["advantages"] * ratio, -batch["advantages"] * xp.clip(ratio, 1 - self.low, 1 + self.high))
        return losses.weighted_sum(xp, loss, batch["policy_weights"]), {}


@dataclass(frozen=True)
class PessimisticLoss(PolicyGradientLoss):
    """The maximum of the objectives for negative advantages (EasyDeL)."""

    def __call__(self, xp, outputs, batch):
        logprobs = losses.select(xp, batch["mask"], outputs["logprobs"])
        ratio, advantages = xp.exp(logprobs - batch["old_logprobs"]), batch["advantages"]
        clipped = xp.clip(ratio, 1 - self.low, 1 + self.high)
        loss = xp.where(
            advantages < 0, -advantages * xp.minimum(ratio, clipped), xp.maximum(-advantages * ratio, -advantages * clipped)
        )
        return losses.weighted_sum(xp, loss, batch["policy_weights"]), {}


@defect("algorithm", caught_by="clipping_binds")
class MaximumForTheWorse(PolicyGradient):
    """Clipping is turned round where the advantage is negative."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.loss = PessimisticLoss(**vars(self.loss))


@defect("algorithm", caught_by="the_weight_is_clipped")
class OffsetsOfTheWeight(CISPO):
    """Bounds of 0 and 5 are taken for distances from 1: a weight of 0.3 becomes 1 (SkyRL#1928)."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.loss = replace(self.loss, low=1.0 - 1e-9, high=1 + config.clip_high)


@dataclass(frozen=True)
class RisingLoss(PolicyGradientLoss):
    def __call__(self, xp, outputs, batch):
        return super().__call__(xp, outputs, {**batch, "advantages": -batch["advantages"]})


@defect("algorithm", caught_by="what_has_a_positive_advantage_is_raised")
class ClimbsInsteadOfDescends(RLOO):
    """The loss is minimised where the objective is maximised. Nothing is clipped, so no bound shows it."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.loss = RisingLoss(**vars(self.loss))


@dataclass(frozen=True)
class AttachedLoss(PolicyGradientLoss):
    def __call__(self, xp, outputs, batch):
        logprobs = losses.select(xp, batch["mask"], outputs["logprobs"])
        weight = xp.clip(xp.exp(logprobs - batch["old_logprobs"]), self.low, self.high)
        return losses.weighted_sum(xp, -weight * batch["advantages"] * logprobs, batch["policy_weights"]), {}


@defect("algorithm", caught_by="the_weight_is_clipped")
class AttachedWeight(CISPO):
    """The weight is differentiated too (EasyDeL): at ratio 1 and log π = -2 the gradient has the wrong sign."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.loss = AttachedLoss(**vars(self.loss))


# ----------------------------------------------------------------------------------------------------------- preferences


@dataclass(frozen=True)
class SoftplusOfAbs(PairLoss):
    def of_difference(self, xp, d):
        x = -self.beta * d  # max(x, 0) has the derivative 1/2 at 0, and |x| has 1 on some libraries and 0 on others
        return xp.maximum(x, xp.zeros_like(x)) + xp.log1p(xp.exp(-xp.sqrt(x * x)))


@defect("algorithm", caught_by="gradients_at_ties_are_the_losss")
class NoGradientAtTheStart(PreferenceOptimisation):
    """Softplus by |x|: where the policy equals the reference, its derivative is not 1/2, and the first step goes nowhere."""

    def __init__(self, config, context):
        super().__init__(config, context)
        self.loss = SoftplusOfAbs(**vars(self.loss))


@dataclass(frozen=True)
class AlwaysSigmoid(PairLoss):
    def of_difference(self, xp, d):
        return losses.softplus(xp, -self.beta * d)


@defect("algorithm", caught_by="every_loss_is_another")
class NamesWithoutEffect(PreferenceOptimisation):
    """ipo and hinge are trained as dpo (ms-swift#10167)."""

    def __init__(self, config, context):
        super().__init__(config, context)
        if config.loss in ("ipo", "hinge"):
            self.loss = AlwaysSigmoid(**vars(self.loss))


@defect("algorithm", caught_by="the_reference_reads_what_the_policy_reads")
class RolledTwoWays(KTO):
    """The reference's mismatched pairs are rolled the other way round than the policy's (EasyDeL)."""

    def mismatch(self, rankings):
        own, following = [*rankings[1:], rankings[0]], [rankings[-1], *rankings[:-1]]
        means = []
        for model, others in ((self.policy, own), (self.reference, following)):
            rows = [Example(o.rows[0].prompt, row.response) for r, o in zip(rankings, others, strict=True) for row in r.rows]
            means.append(self.logprobs(model, rows).mean(dtype=np.float64))
        return max(0.0, float(means[0] - means[1]))


class OtherMismatch(KTO):
    """Another order of the prompts that completions are judged under."""

    def order(self, rankings):
        raise NotImplementedError

    def mismatch(self, rankings):
        pairs = zip(rankings, self.order(rankings), strict=True)
        rows = [Example(other.rows[0].prompt, row.response) for ranking, other in pairs for row in ranking.rows]
        return max(0.0, float((self.logprobs(self.policy, rows) - self.logprobs(self.reference, rows)).mean(dtype=np.float64)))


@defect("algorithm", caught_by="mismatched_pairs_are_of_the_batch")
class Reversed(OtherMismatch):
    """The order is reversed: the middle of an odd batch meets its own prompt (TRL#1911)."""

    def order(self, rankings):
        return rankings[::-1]


@defect("algorithm", caught_by="mismatched_pairs_are_of_the_batch")
class MismatchedElsewhere(KTO):
    """The mismatched completions are those of another batch (TRL#2153)."""

    def mismatch(self, rankings):
        return super().mismatch(self.examples[: len(rankings)])


@defect("algorithm", caught_by="references_are_the_first_policys")
class ReferencesOutOfOrder(PreferenceOptimisation):
    """References stay in the order of the data, while completions are sorted by rank."""

    def load(self, split, limit=None):
        rankings = super().load(split, limit)
        return [replace(ranking, ref=ranking.ref[::-1]) for ranking in rankings]


@defect("algorithm", caught_by="references_are_the_first_policys")
class WithoutEOS(PreferenceOptimisation):
    """The reference does not read the last token."""

    def logprobs(self, model, examples):
        return super().logprobs(model, [replace(e, response=e.response[:-1] or e.response) for e in examples])


@defect("algorithm", caught_by="the_preferred_completion_is_raised")
class Swapped(PreferenceOptimisation):
    """Chosen and rejected are swapped."""

    def term(self, *given):
        term = super().term(*given)
        term.batch["pairs"] = term.batch["pairs"].transpose(0, 2, 1)
        return term


@defect("algorithm", caught_by="the_better_response_is_preferred")
class WorseIsPreferred(OnlinePreferences):
    """Rewards are taken for costs."""

    def pairs(self, rewards, counted):
        return super().pairs(-rewards, counted)


@defect("algorithm", caught_by="equal_scores_make_no_pairs")
class TiesArePairs(OnlinePreferences):
    """Of equals the first is preferred."""

    def pairs(self, rewards, counted):
        return super().pairs(rewards - 1e-6 * np.arange(rewards.shape[1]), counted)


# --------------------------------------------------------------------------------------------------------- reward models


@dataclass(frozen=True)
class OverflowingLoss(reward_modelling.RankingLoss):
    def __call__(self, xp, outputs, batch):
        scores = outputs["scores"]
        loss = xp.log(1 + xp.exp(scores[None, :] - scores[:, None]))
        return xp.sum(xp.where(batch["preferences"] > 0, loss, 0 * loss) * batch["preferences"]), {
            "accuracy": xp.sum(batch["preferences"])
        }


class OtherRanking(RewardModelling):
    def terms(self, batch):
        return [self.other(term) for term in super().terms(batch)]


@defect("algorithm", caught_by="equal_scores_cost_log_two")
class Overflows(OtherRanking):
    """log(1 + exp(x)) as it is written: infinite beyond x = 709."""

    def other(self, term):
        return replace(term, loss=OverflowingLoss())


@dataclass(frozen=True)
class AbsoluteLoss(reward_modelling.RankingLoss):
    def __call__(self, xp, outputs, batch):
        loss, metrics = super().__call__(xp, outputs, batch)
        counts = xp.sum(batch["preferences"], axis=1) != 0
        return loss + 0.01 * xp.sum(xp.where(counts, outputs["scores"], 0 * outputs["scores"]) ** 2), metrics


@defect("algorithm", caught_by="equal_scores_cost_log_two")
class SeesShifts(OtherRanking):
    """A penalty on the size of scores: the loss sees a shift."""

    def other(self, term):
        return replace(term, loss=AbsoluteLoss())


@defect("algorithm", caught_by="the_better_completion_is_raised")
class WorseWins(OtherRanking):
    """Rank 0 is taken for the worst."""

    def other(self, term):
        return replace(term, batch={"preferences": np.ascontiguousarray(term.batch["preferences"].T)})


@defect("algorithm", caught_by="scores_are_normalised")
class GainWithoutBias(RewardModelling):
    """The bias is taken off before the gain instead of with it."""

    def normalise(self):
        rescale = self.model.rescale
        self.model.rescale = lambda gain, bias: rescale(gain, bias / gain if gain != 1 else 0.9 * bias)
        return super().normalise()


# --------------------------------------------------------------------------------------------------------------- failures


@defect("algorithm", caught_by="failed_rewards_are_heard")
class SilentZero(PPO):
    """A reward model that fails counts as 0."""

    def __init__(self, config, context):
        super().__init__(config, context)
        score = self.reward_model.score

        def never_fails(responses: Responses):
            try:
                return score(responses)
            except Exception:
                return np.zeros(len(responses.texts), np.float32)

        self.reward_model.score = never_fails


@defect("algorithm", caught_by="episodes_without_a_score_are_left_out")
class NaNIsZero(PPO):
    """A missing score counts as 0."""

    def __init__(self, config, context):
        super().__init__(config, context)
        score = self.reward_model.score
        self.reward_model.score = lambda responses: np.nan_to_num(score(responses))


@defect("algorithm", caught_by="it_reports_in_plain_numbers")
class ArraysInState(PPO):
    """State that JSON does not hold."""

    def state(self):
        return super().state() | {"kl": np.float32(self.kl.coef)}


@defect("algorithm", caught_by="it_reports_in_plain_numbers")
class ArraysInMetrics(SFT):
    """A metric that is an array."""

    def step(self, step):
        metrics = super().step(step)
        return metrics | {"loss": np.array([metrics["loss"]])}


# ----------------------------------------------------------------------------------------------------------- environments


@defect("algorithm", caught_by="what_was_said_is_not_trained_on")
class SpeaksForTheTool(PPO):
    """All real tokens of an episode count (Search-R1, issue 21: the KL of retrieved text)."""

    like = "ppo"

    def rollout(self, step, clock):
        rollout = super().rollout(step, clock)
        rows = rollout.sequences
        every = replace(rows, mask=rows.response_mask & rollout.counted[:, None])
        return replace(rollout, sequences=every, forward=None)
