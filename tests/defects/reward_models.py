"""Reward models that are wrong on purpose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from defects import defect
from lockstep.interfaces import Inputs
from lockstep_rlhf.reward_models.answer import Answer
from lockstep_rlhf.reward_models.ensemble import Ensemble
from lockstep_rlhf.reward_models.function import Function
from lockstep_rlhf.reward_models.learned import Learned
from lockstep_rlhf.reward_models.sum import Sum


class Broken(Learned):
    like = "learned"


@defect("reward_model", caught_by="one_finite_score_per_response")
class PerToken(Broken):
    """One score per token."""

    def score(self, responses):
        return np.repeat(super().score(responses)[:, None], responses.sequences.mask.shape[1], axis=1)


@defect("reward_model", caught_by="fractions_survive")
class IntegerRewards(Broken):
    """Scores in an array made like the token ids: 0.73 becomes 0."""

    def score(self, responses):
        out = np.zeros_like(responses.sequences.tokens[:, 0])
        out[:] = super().score(responses)
        return out.astype(np.float32)


@defect("reward_model", caught_by="fractions_survive")
class RoundedFunction(Function):
    """A reward function whose scores are rounded to one digit."""

    like = "function"

    def score(self, responses):
        return np.round(super().score(responses), 1)


@defect("reward_model", caught_by="scores_do_not_depend_on_the_batch")
class NormalisedByBatch(Broken):
    """The mean of the batch is taken off."""

    def score(self, responses):
        scores = super().score(responses)
        return scores - scores.mean()


@defect("reward_model", caught_by="padding_is_inert")
class LastColumn(Broken):
    """The score is read at the last column, which is padding."""

    def score(self, responses):
        rows = responses.sequences
        return self.model.evaluate(rows, ["values"])["values"][:, -1]


@defect("reward_model", caught_by="the_same_response_has_the_same_score")
class Sampled(Broken):
    """A judge that is sampled."""

    rng = np.random.default_rng(0)

    def score(self, responses):
        return super().score(responses) + self.rng.normal(0, 1e-3, len(responses.texts)).astype(np.float32)


@defect("reward_model", caught_by="failures_are_heard")
class SilentZero(Broken):
    """A failure counts as 0."""

    def score(self, responses):
        try:
            return super().score(responses)
        except Exception:
            return np.zeros(8, np.float32)


@defect("reward_model", caught_by="inputs_are_left_alone")
class EditsMasks(Broken):
    """The mask is edited in place."""

    def score(self, responses):
        responses.sequences.mask[:, -1] = False
        return super().score(responses)


@defect("reward_model", caught_by="inputs_are_left_alone")
class EditsColumns(Answer):
    """What is known about a prompt is used up."""

    like = "answer"

    def score(self, responses):
        scores = super().score(responses)
        responses.prompts[0].truth.clear()
        return scores


@defect("reward_model", caught_by="missing_columns_are_heard")
class NoGoldIsWrong(Answer):
    """A row without a gold answer scores 0."""

    like = "answer"

    def score(self, responses):
        known = [replace(prompt, truth={"answer": prompt.truth.get("answer", "")}) for prompt in responses.prompts]
        return np.nan_to_num(super().score(replace(responses, prompts=known)))


@defect("reward_model", caught_by="scores_do_not_depend_on_the_batch")
class FirstColumn(Answer):
    """Every response is compared with the first row's answer."""

    like = "answer"

    def score(self, responses):
        first = [replace(prompt, truth=responses.prompts[-1].truth) for prompt in responses.prompts]
        return super().score(replace(responses, prompts=first))


@defect("reward_model", caught_by="details_are_numbers_per_response")
class StaleDetails(Ensemble):
    """The details are those of the first batch."""

    like = "ensemble"

    def score(self, responses):
        before = self._details
        scores = super().score(responses)
        self._details = before or self._details
        return scores


@defect("reward_model", caught_by="what_it_reads_is_declared")
class UndeclaredParts(Sum):
    """It adds other reward models and does not say so."""

    like = "sum"

    @classmethod
    def inputs(cls, config):
        return Inputs()


@defect("reward_model", caught_by="the_value_network_is_a_copy")
class SharedNetwork(Broken):
    """The network itself is handed out."""

    def value_network(self):
        return self.model


@defect("reward_model", caught_by="what_it_reads_is_declared")
class Undeclared(Broken):
    """It opens a stage's output and does not say so: PPO against an older reward model would be reused."""

    @classmethod
    def inputs(cls, config):
        return Inputs()


@defect("reward_model", caught_by="what_it_reads_is_declared")
class UndeclaredMembers(Ensemble):
    """It is made of other reward models and does not say so."""

    like = "ensemble"

    @classmethod
    def inputs(cls, config):
        return Inputs()
