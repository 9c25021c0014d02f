"""Policies that are wrong on purpose."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import torch

from defects import defect
from lockstep.interfaces import Generated
from lockstep.models.architecture import SCALAR_BIAS
from lockstep.storage.weights import read_weights, write_tensors
from lockstep_torch.decoder import DecoderNetwork
from lockstep_torch.model import LanguageModel, Scalar
from lockstep_torch.network import ScalarHead
from lockstep_torch.policies import Decoder


class Rewired(Decoder):
    """A decoder whose network, or scalar model, is of another class."""

    Network = DecoderNetwork
    Scalar = Scalar

    def __init__(self, network, head, backend):
        super().__init__(network, head, backend)
        self.network.__class__ = self.Network

    def scalar_model(self, head):
        scalar = super().scalar_model(head)
        scalar.__class__ = self.Scalar
        return scalar


# ------------------------------------------------------------------------------------------------------ probabilities


@defect("policy", caught_by="logprobs_are_normalised")
class EntropyAtOne(Decoder):
    """Entropy of the logits before the temperature."""

    def forward(self, block, outputs, temperature, dropout=None):
        found = super().forward(block, outputs, temperature, dropout)
        return found | ({"entropy": super().forward(block, ["entropy"], 1.0)["entropy"]} if "entropy" in outputs else {})


@defect("policy", caught_by="logprobs_are_normalised")
class DividesLogprobs(Decoder):
    """Temperature divides log-probabilities, after the softmax."""

    def forward(self, block, outputs, temperature, dropout=None):
        found = super().forward(block, outputs, 1.0, dropout)
        return found | ({"logprobs": found["logprobs"] / temperature} if "logprobs" in outputs else {})


@defect("policy", caught_by="divergence_is_of_the_whole_vocabulary")
class SwapsTheMixture(Decoder):
    """The mixture weighs the teacher with 1 - beta (TRL#3043)."""

    def toward(self, teacher, beta):
        return super().toward(teacher, beta if beta in (0, 1) else 1 - beta)


@defect("policy", caught_by="divergence_is_of_the_whole_vocabulary")
class ClampsBeta(Decoder):
    """An end of beta becomes its neighbour in the interior, where the divergence vanishes (verl-recipe#151)."""

    def toward(self, teacher, beta):
        return super().toward(teacher, min(max(beta, 1e-4), 1 - 1e-4))


@defect("policy", caught_by="outputs_are_what_was_asked_for")
class GivesEverything(Decoder):
    """Log-probabilities come with whatever was asked for."""

    def evaluate(self, sequences, outputs, *, temperature=1.0):
        return super().evaluate(sequences, ["logprobs", *outputs], temperature=temperature)


@defect("policy", caught_by="outputs_are_what_was_asked_for")
class InfinityUnderTheMask(Decoder):
    """Masked columns are -inf, and 0 · -inf is NaN."""

    def evaluate(self, sequences, outputs, *, temperature=1.0):
        found = super().evaluate(sequences, outputs, temperature=temperature)
        return {name: np.where(sequences.mask, array, np.float32(-np.inf)) for name, array in found.items()}


@defect("policy", caught_by="outputs_are_what_was_asked_for")
class DoubleLogprobs(Decoder):
    """The sampler's log-probabilities are float64."""

    def generate(self, *arguments, **how):
        drawn = super().generate(*arguments, **how)
        return Generated(drawn.tokens, drawn.mask, drawn.logprobs.astype(np.float64))


@defect("policy", caught_by="forwards_agree")
class Noisy(Decoder):
    """Dropout left on."""

    def forward(self, block, outputs, temperature, dropout=None):
        found = super().forward(block, outputs, temperature, dropout)
        return {name: value + value.new_empty(value.shape).normal_(std=1e-3) for name, value in found.items()}


@defect("policy", caught_by="future_is_unseen")
class OneColumnLate(Rewired):
    """States are read one column too late: each token is seen before it is predicted."""

    class Network(DecoderNetwork):
        def hidden(self, tokens, mask, dropout=None):
            return super().hidden(tokens, mask, dropout).roll(-1, dims=1)


@defect("policy", caught_by="padding_is_inert")
class AttendsToPadding(Rewired):
    """The attention mask is not passed on, so that queries see the padding before the prompt."""

    class Network(DecoderNetwork):
        def hidden(self, tokens, mask, dropout=None):
            return super().hidden(tokens.clamp(0, self.vocab_size - 1), torch.ones_like(mask), dropout)


@defect("policy", caught_by="padding_is_inert")
class LooksUpPadding(Rewired):
    """Pad ids go through the embedding; those outside the vocabulary, as lm-human-preferences has them, have no row."""

    class Network(DecoderNetwork):
        def embed(self, tokens, mask):
            return self.model["embed_tokens"](tokens)


@defect("policy", caught_by="padding_does_not_change_what_is_drawn")
class PrefillSeesPadding(Rewired):
    """The sampler's prefill takes padding for part of the prompt."""

    class Network(DecoderNetwork):
        def start(self, tokens, mask, new_tokens):
            return super().start(torch.where(mask, tokens, 0), torch.ones_like(mask), new_tokens)


@defect("policy", caught_by="tokens_that_do_not_count_are_still_read")
class AttendsByLossMask(Decoder):
    """The loss's mask is used for attention too."""

    def evaluate(self, sequences, outputs, *, temperature=1.0):
        return super().evaluate(dataclasses.replace(sequences, response_mask=sequences.mask), outputs, temperature=temperature)


@defect("policy", caught_by="rows_are_independent")
class PositionsOfTheFirstRow(Rewired):
    """Positions are counted once, in the first row, and used for all."""

    class Network(DecoderNetwork):
        def rotation(self, position):
            return super().rotation(position[:1].expand_as(position))


@defect("policy", caught_by="rows_are_independent")
class NoiseByRow(Decoder):
    """The row's number in the batch goes into the noise."""

    def generate(self, prompt_tokens, prompt_mask, seeds, **how):
        return super().generate(prompt_tokens, prompt_mask, seeds + np.arange(len(seeds), dtype=np.uint32)[:, None], **how)


@defect("policy", caught_by="rows_may_have_the_same_prompt")
class PromptsInTurn(Rewired):
    """A prompt's keys are repeated as a, b, a, b where its rows are neighbours."""

    class Network(DecoderNetwork):
        def of_stream(self, tokens, mask, layout):
            columns, turns = layout.columns, torch.arange(len(tokens)).view(layout.each, -1).T.reshape(-1)
            prompts = torch.cat([tokens[turns, :columns], tokens[:, columns:]], dim=1)
            return self.hidden(prompts, torch.cat([mask[turns, :columns], mask[:, columns:]], dim=1), None, columns - 1)


@defect("policy", caught_by="rows_may_have_the_same_prompt")
class CachesInTurn(Rewired):
    """The same in the sampler's cache."""

    class Network(DecoderNetwork):
        def repeated(self, cache, times):
            repeated = super().repeated(cache, times)
            turns = torch.arange(len(repeated.mask)).view(-1, times).T.reshape(-1)
            return dataclasses.replace(repeated, keys=[keys[turns] for keys in repeated.keys])


# ----------------------------------------------------------------------------------------------------------- sampling


@defect("policy", caught_by="sampler_agrees_with_teacher_forcing")
class SamplerCountsPadding(Rewired):
    """From the second token on, the sampler's positions are columns."""

    class Network(DecoderNetwork):
        def advance(self, token, cache):
            cache.count = torch.full_like(cache.count, cache.read)
            return super().advance(token, cache)


@defect("policy", caught_by="sampler_agrees_with_teacher_forcing")
class SamplesAtOne(Decoder):
    """Rollouts are drawn at temperature 1 and scored at another."""

    def generate(self, *arguments, temperature, **how):
        return super().generate(*arguments, temperature=1.0 if temperature else 0.0, **how)


@defect("policy", caught_by="samples_follow_the_seed_rule")
class PositiveSeeds(Decoder):
    """Seeds are made to fit int32: the highest bit is dropped."""

    def generate(self, prompt_tokens, prompt_mask, seeds, **how):
        return super().generate(prompt_tokens, prompt_mask, seeds & np.uint32(0x7FFFFFFF), **how)


@defect("policy", caught_by="samples_follow_the_seed_rule")
class OneSeedPerRow(Decoder):
    """A row's first seed serves all its tokens."""

    def generate(self, prompt_tokens, prompt_mask, seeds, **how):
        return super().generate(prompt_tokens, prompt_mask, np.repeat(seeds[:, :1], seeds.shape[1], axis=1), **how)


@defect("policy", caught_by="temperature_zero_takes_the_most_likely")
class ZeroIsFalse(Decoder):
    """`temperature or 1.0`."""

    def generate(self, *arguments, temperature, **how):
        return super().generate(*arguments, temperature=temperature or 1.0, **how)


@defect("policy", caught_by="same_seeds_same_tokens")
class FixedNoise(Decoder):
    """No seed is passed on: the same noise at every update."""

    def generate(self, prompt_tokens, prompt_mask, seeds, **how):
        return super().generate(prompt_tokens, prompt_mask, np.random.default_rng(0).integers(0, 2**32, seeds.shape), **how)


@defect("policy", caught_by="same_seeds_same_tokens")
class LibraryNoise(Decoder):
    """Noise comes from the library's own generator."""

    def generate(self, prompt_tokens, prompt_mask, seeds, **how):
        return super().generate(prompt_tokens, prompt_mask, torch.randint(0, 2**32, seeds.shape).numpy(), **how)


@defect("policy", caught_by="responses_end_at_the_first_stop_token")
class MasksTheStop(Decoder):
    """The stop token is masked with what comes after it: it never gets a gradient."""

    def generate(self, *arguments, stop_ids, **how):
        drawn = super().generate(*arguments, stop_ids=stop_ids, **how)
        return Generated(drawn.tokens, drawn.mask & ~np.isin(drawn.tokens, stop_ids), drawn.logprobs)


@defect("policy", caught_by="responses_end_at_the_first_stop_token")
class StopsAtItsOwnEos(Decoder):
    """Rows end at the model's own end-of-text id while another stop token is configured."""

    def generate(self, *arguments, stop_ids, **how):
        return super().generate(*arguments, stop_ids=[*stop_ids, 35], **how)


@defect("policy", caught_by="responses_end_at_the_first_stop_token")
class OneStopOnly(Decoder):
    """Of several stop ids only the first is heeded."""

    def generate(self, *arguments, stop_ids, **how):
        return super().generate(*arguments, stop_ids=stop_ids[:1], **how)


@defect("policy", caught_by="responses_end_at_the_first_stop_token")
class GoesOnBehindTheStop(Decoder):
    """What was drawn after the stop token is masked, but not replaced by padding."""

    def generate(self, *arguments, stop_ids, **how):
        drawn, free = (super(GoesOnBehindTheStop, self).generate(*arguments, stop_ids=ids, **how) for ids in (stop_ids, []))
        return Generated(free.tokens, drawn.mask, drawn.logprobs)


@defect("policy", caught_by="what_was_read_is_not_read_again")
class KeepsTheFirstRows(Decoder):
    """Takes the first rows of the cache, whichever rows go on."""

    def generate(self, *arguments, past=None, **how):
        past = past and dataclasses.replace(past, rows=np.arange(len(past.rows)))
        return super().generate(*arguments, past=past, **how)


@defect("policy", caught_by="what_was_read_is_not_read_again")
class KeepsColumns(Decoder):
    """Leaves what it knows in its columns, although padding is of another width now."""

    def generate(self, *arguments, past=None, **how):
        past = past and dataclasses.replace(past, shift=np.zeros_like(past.shift))
        return super().generate(*arguments, past=past, **how)


@defect("policy", caught_by="what_was_read_is_not_read_again")
class CountsFromZero(Rewired):
    """What follows the cache is read at positions from 0."""

    class Network(DecoderNetwork):
        def start(self, tokens, mask, new_tokens, past=None):
            if past is None:
                return super().start(tokens, mask, new_tokens)
            self.shift = past.known
            found = super().start(tokens, mask, new_tokens, past)
            self.shift = 0
            return found

        def rotation(self, position):
            return super().rotation((position - getattr(self, "shift", 0)).clamp(min=0))


@defect("policy", caught_by="the_context_can_be_filled")
class ShortTable(Rewired):
    """The sampler's table of positions ends before the context does."""

    class Network(DecoderNetwork):
        def advance(self, token, cache):
            cache.count = cache.count.clamp(max=self.context_length - 5)
            return super().advance(token, cache)


# -------------------------------------------------------------------------------------------------- copies and heads


@defect("policy", caught_by="copies_are_independent")
class SharedCopy(Decoder):
    """The reference policy is the policy."""

    def copy(self):
        return type(self)(self.network, self.head, self.backend)


@defect("policy", caught_by="copies_are_independent")
class SharedTrunk(Decoder):
    """The value network is a head on the policy's own trunk."""

    def scalar_model(self, head):
        return Scalar(copy.copy(self.network).without_language_head(), ScalarHead(head), self.backend)


@defect("policy", caught_by="copies_are_independent")
class FreshCopy(Decoder):
    """A reference that is made anew from the configuration, not from the weights."""

    def copy(self):
        again = super().copy()
        with torch.no_grad():
            again.network.lm_head.weight.normal_(std=0.02)
        return again


@defect("policy", caught_by="value_head_starts_at_zero")
class RandomValueHead(Decoder):
    """The value head starts from the initialisation of linear layers."""

    def with_value_head(self):
        head = ScalarHead(np.random.default_rng(0).normal(0, 0.02, self.hidden_size))
        return type(self)(copy.deepcopy(self.network), head, self.backend)


@defect("policy", caught_by="scores_are_read_at_the_last_real_token")
class ReadsTheLastColumn(Rewired):
    """Scores are read at [:, -1], which is padding in all rows but the longest."""

    class Scalar(Scalar):
        def forward(self, block, outputs, temperature, dropout=None):
            last = torch.full_like(block.last, block.tokens.shape[1] - 1)
            return super().forward(dataclasses.replace(block, last=last), outputs, temperature, dropout)


@defect("policy", caught_by="scores_are_read_at_the_last_real_token")
class ReadsBeforeTheLast(Rewired):
    """Scores are read one token too early."""

    class Scalar(Scalar):
        def forward(self, block, outputs, temperature, dropout=None):
            return super().forward(dataclasses.replace(block, last=block.last - 1), outputs, temperature, dropout)


@defect("policy", caught_by="rescale_is_folded_in")
class BiasBeforeGain(Rewired):
    """gain · (output + bias)."""

    class Scalar(Scalar):
        def rescale(self, gain, bias):
            super().rescale(gain, gain * bias)


@defect("policy", caught_by="rescale_is_folded_in")
class ForgetsTheOldBias(Rewired):
    """The second normalisation replaces the bias of the first instead of scaling it."""

    class Scalar(Scalar):
        def rescale(self, gain, bias):
            super().rescale(gain, 0.0)
            with torch.no_grad():
                self.head.bias.fill_(bias)


# ------------------------------------------------------------------------------------------- parameters and their files


@defect("policy", caught_by="checkpoints_round_trip")
class SavesHalf(Decoder):
    """Weights are stored in half precision."""

    def save(self, folder):
        super().save(folder)
        half = {name: array.astype(np.float16) for name, array in read_weights(folder).items()}
        write_tensors(folder / "model.safetensors", half)


@defect("policy", caught_by="checkpoints_round_trip")
class SavesTheValueHead(Decoder):
    """The value head goes into the policy's checkpoint, which transformers then warns about."""

    def save(self, folder):
        self.write(folder, "LlamaForCausalLM", vocab_size=self.vocab_size)  # with any setting, the head is written


@defect("policy", caught_by="checkpoints_round_trip")
class LosesTheBias(Decoder):
    """A reward model is loaded without the bias that normalised it."""

    @classmethod
    def load_scalar(cls, folder, backend):
        scalar = super().load_scalar(folder, backend)
        with torch.no_grad():
            scalar.tensors()[SCALAR_BIAS].zero_()
        return scalar


@defect("policy", caught_by="evaluation_changes_nothing")
class OverwritesPadding(Decoder):
    """Pad ids are replaced in the caller's array."""

    def evaluate(self, sequences, outputs, *, temperature=1.0):
        sequences.tokens[~sequences.attention_mask] = 0
        return super().evaluate(sequences, outputs, temperature=temperature)


@defect("policy", caught_by="evaluation_changes_nothing")
class ScalesInPlace(Decoder):
    """The temperature is divided into the weights and not taken out again."""

    def generate(self, *arguments, temperature, **how):
        with torch.no_grad():
            self.network.lm_head.weight.div_(temperature or 1.0)
        return super().generate(*arguments, temperature=1.0 if temperature else 0.0, **how)


@defect("policy", caught_by="parameters_are_copies")
class HandsOutItsParameters(Decoder):
    """Host arrays are views of the parameters."""

    def parameters(self):
        return {name: tensor.detach().numpy() for name, tensor in self.tensors().items()}


@defect("policy", caught_by="all_see_the_new_weights")
class SamplerOfItsOwn(Decoder):
    """The sampler's weights are taken once, at the first rollout."""

    def generate(self, *arguments, **how):
        if not hasattr(self, "sampler"):
            self.sampler = self.copy()
        return LanguageModel.generate(self.sampler, *arguments, **how)


@defect("policy", caught_by="the_same_seed_makes_the_same_policy")
class LibraryWeights(Decoder):
    """Initial weights come from the library's own generator."""

    @classmethod
    def create(cls, config, backend, tokenizer, seed):
        return super().create(config, backend, tokenizer, int(torch.randint(0, 2**31, ())))


@defect("policy", caught_by="the_same_seed_makes_the_same_policy")
class OneSeedForAll(Decoder):
    """The seed is not used: five seeds are one run."""

    @classmethod
    def create(cls, config, backend, tokenizer, seed):
        return super().create(config, backend, tokenizer, 0)


@defect("policy", caught_by="a_stream_gives_the_tokens_of_generate")
class StreamsFromTheFirstSeed(Decoder):
    """Each streamed token is drawn as the first one: from the seeds of column 0."""

    def stream(self, prompt_tokens, prompt_mask, seeds, **how):
        return super().stream(prompt_tokens, prompt_mask, np.repeat(seeds[:, :1], seeds.shape[1], axis=1), **how)
