"""Engines that are wrong on purpose."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from conftest import BACKENDS
from defects import defect
from lockstep.config.schema import parse
from lockstep.errors import CheckpointError, EngineFailed
from lockstep.interfaces import Engine, Generated
from lockstep.learning.served import EngineConfig
from lockstep.registry import registry
from lockstep.text.sequences import join

EOS = 34


class Within(Engine):
    """Draws in this process, on torch. Nothing is wrong with it."""

    Config = EngineConfig

    def __init__(self, config):
        super().__init__(config)
        cls = registry().resolve("backend", "torch", "torch")
        self.backend = cls(parse(cls.Config, BACKENDS["torch"], "backend"))

    def load(self, folder: Path, version: str) -> None:
        try:
            self.policy = registry().resolve("policy", "decoder", "torch").load(folder, self.backend)
        except CheckpointError as error:
            raise EngineFailed(str(error)) from error
        self.version = version

    def generate(self, prompt_tokens, prompt_mask, seeds, *, temperature, stop_ids, pad_id):
        how = {"temperature": temperature, "stop_ids": list(stop_ids), "pad_id": pad_id}
        return self.policy.generate(prompt_tokens, prompt_mask, seeds, **how), frozenset([self.version])


@defect("engine", caught_by="a_row_without_stop_ids_is_full")
class StopsAtItsOwn(Within):
    """Ends responses at tokens of its own choice too."""

    def generate(self, prompt_tokens, prompt_mask, seeds, *, stop_ids, **how):
        return super().generate(prompt_tokens, prompt_mask, seeds, stop_ids=[*stop_ids, *range(EOS)], **how)


@defect("engine", caught_by="any_stop_id_ends_a_response_and_is_kept")
class GoesOn(Within):
    """Knows one stop id only."""

    def generate(self, prompt_tokens, prompt_mask, seeds, *, stop_ids, **how):
        return super().generate(prompt_tokens, prompt_mask, seeds, stop_ids=list(stop_ids)[:1], **how)


@defect("engine", caught_by="log_probabilities_are_those_of_the_sampler")
class Raw(Within):
    """Returns log-probabilities at temperature 1, as vLLM does with its default logprobs_mode."""

    def generate(self, prompt_tokens, prompt_mask, seeds, **how):
        found, versions = super().generate(prompt_tokens, prompt_mask, seeds, **how)
        rows = join(prompt_tokens, prompt_mask, found.tokens, found.mask)
        return replace(found, logprobs=self.policy.evaluate(rows, ["logprobs"], temperature=1.0)["logprobs"]), versions


@defect("engine", caught_by="tokens_are_drawn_from_the_policy")
class Nucleus(Within):
    """Draws again what is not among the likelier tokens, as a server does whose default is a top_p below 1."""

    def generate(self, prompt_tokens, prompt_mask, seeds, **how):
        found, versions = super().generate(prompt_tokens, prompt_mask, seeds, **how)
        again, _ = super().generate(prompt_tokens, prompt_mask, seeds + np.uint32(7), **how)
        rare = found.logprobs < -2.5
        chosen = [np.where(rare, two, one) for one, two in ((found.tokens, again.tokens), (found.logprobs, again.logprobs))]
        return Generated(chosen[0], found.mask, chosen[1]), versions


@defect("engine", caught_by="temperature_zero_takes_the_most_likely")
class Lukewarm(Within):
    """Takes the lowest temperature that its server allows for 0."""

    def generate(self, prompt_tokens, prompt_mask, seeds, *, temperature, **how):
        return super().generate(prompt_tokens, prompt_mask, seeds, temperature=temperature or 0.5, **how)


@defect("engine", caught_by="the_newest_weights_draw")
class KeepsTheOld(Within):
    """Keeps the first weights that it was given, and says that it has the new ones."""

    def load(self, folder, version):
        if not hasattr(self, "policy"):
            super().load(folder, version)
        self.version = version


@defect("engine", caught_by="the_newest_weights_draw")
class ReadsLater(Within):
    """Reads the weights when it draws."""

    def load(self, folder, version):
        self.folder, self.version = folder, version

    def generate(self, *given, **how):
        super().load(self.folder, self.version)
        return super().generate(*given, **how)


@defect("engine", caught_by="padding_changes_nothing")
class ReadsPadding(Within):
    """Takes padding for tokens of the prompt."""

    def generate(self, prompt_tokens, prompt_mask, seeds, **how):
        return super().generate(prompt_tokens, np.ones_like(prompt_mask), seeds, **how)


@defect("engine", caught_by="a_row_depends_on_its_own_prompt")
class AsTheyFinish(Within):
    """Answers short prompts first, and forgets whose the answers are."""

    def generate(self, prompt_tokens, prompt_mask, seeds, **how):
        found, versions = super().generate(prompt_tokens, prompt_mask, seeds, **how)
        order = np.argsort(prompt_mask.sum(axis=1), kind="stable")
        return Generated(found.tokens[order], found.mask[order], found.logprobs[order]), versions


@defect("engine", caught_by="tokens_follow_from_the_seeds_or_it_says_so")
class OwnSeeds(Within):
    """Counts its calls for a seed."""

    calls = 0

    def generate(self, prompt_tokens, prompt_mask, seeds, **how):
        logging.getLogger("lockstep").warning("loaded in 3 s")
        self.calls += 1
        return super().generate(prompt_tokens, prompt_mask, seeds + np.uint32(self.calls), **how)


@defect("engine", caught_by="weights_that_cannot_be_loaded_are_an_error")
class TakesAnything(Within):
    """Goes on with what it has if it cannot read the weights."""

    def load(self, folder, version):
        with contextlib.suppress(EngineFailed):
            super().load(folder, version)
