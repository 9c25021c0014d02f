"""Measures from a policy's log-probabilities of given texts: multiple-choice tests, and the loss on raw text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lockstep.errors import MissingData
from lockstep.interfaces import DataSource, Model, Policy
from lockstep.learning import numerics
from lockstep.runs.measures import Measure, mean, proportion
from lockstep.text import encoding
from lockstep.text.encoding import Example, Lengths
from lockstep.text.sequences import Sequences, in_chunks
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Choice, Fit


@dataclass
class Likelihood:
    """Tests policies on the tests and on at most ``most_texts`` held-out raw texts of a data source."""

    data: DataSource
    tokenizer: Tokenizer
    lengths: Lengths
    batch_size: int
    most_texts: int
    fits: dict[str, Fit]
    """Gets what was left out of each test."""

    def tests(self, policy: Policy) -> dict[str, Measure]:
        """For each test of the data source: how often the answer has a higher log-probability than every wrong option, overall
        and by group. If items have several right options, also the mean probability of these; if they have two options, also the
        mean entropy."""
        measures: dict[str, Measure] = {}
        for name, items in self.encoded_tests.items():
            if taken := self.options(policy, name, items):
                measures |= results(name, taken)
        return measures

    @cached_property
    def encoded_tests(self) -> dict[str, list[tuple[Choice, list[Example]]]]:
        """Each item of each test, with its options as tokens; the same for all policies."""
        return {
            name: [(item, [option_example(self.tokenizer, item, option) for option in item.options]) for item in items]
            for name, items in self.data.tests().items()
        }

    def options(
        self, policy: Policy, name: str, items: Sequence[tuple[Choice, list[Example]]]
    ) -> list[tuple[Choice, np.ndarray]]:
        """Each item, with its options' log-probabilities. Items that are too long for the policy are left out."""
        fit = self.fits[f"{name} items"] = Fit(f"{name} items", total=len(items))
        taken, examples = [], []
        for item, found in items:
            if max(len(each.prompt) + len(each.response) for each in found) > policy.context_length:
                fit.dropped += 1
                continue
            taken.append(item)
            examples += found
        if not taken:
            return []
        sums = self.text_logprobs(policy, examples)[0].sum(axis=1)
        ends = np.cumsum([len(item.options) for item in taken])
        return list(zip(taken, np.split(sums, ends[:-1]), strict=True))

    def text_loss(self, policy: Policy) -> dict[str, Measure]:
        """Negative log-likelihood on held-out raw text, in nats per token: the mean over texts of each text's mean."""
        try:
            texts = self.data.texts("heldout")[: self.most_texts]
        except MissingData:
            return {}
        examples = encoding.encode_texts(self.tokenizer, texts, self.lengths)
        if not examples:
            return {}
        found, mask = self.text_logprobs(policy, examples)
        return {"text_loss": mean(-found.sum(axis=1) / mask.sum(axis=1))}

    def text_logprobs(self, policy: Policy, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
        """[B, T] log-probabilities, 0 on padding, and their mask. Rows are padded to the longest."""
        longest = max(len(e.prompt) for e in examples), max(len(e.response) for e in examples)
        block = encoding.block(examples, self.tokenizer, Lengths(*longest, self.lengths.multiple))
        return np.where(block.mask, logprobs(policy, block, 1.0, self.batch_size), 0), block.mask


def logprobs(model: Model, sequences: Sequences, temperature: float, batch_size: int) -> np.ndarray:
    """[B, T] log-probabilities of the responses, ``batch_size`` rows per forward pass."""
    call = lambda part: model.evaluate(part, ["logprobs"], temperature=temperature)  # noqa: E731
    return in_chunks(call, sequences, batch_size)["logprobs"]


def results(name: str, taken: Sequence[tuple[Choice, np.ndarray]]) -> dict[str, Measure]:
    """The measures of a test, from its items and their options' log-probabilities."""
    rights = [item.right or (item.answer,) for item, _ in taken]
    preferred = np.array([numerics.prefers(x, item.answer, right) for (item, x), right in zip(taken, rights, strict=True)])
    measures = {name: proportion(preferred)}
    for group in dict.fromkeys(item.group for item, _ in taken if item.group is not None):
        chosen = preferred[[item.group == group for item, _ in taken]]
        measures[f"{name}/{group}"] = proportion(chosen)
    probabilities = [numerics.option_probabilities(x) for _, x in taken]
    if max(map(len, rights)) > 1:
        sums = [p[list(right)].sum() for p, right in zip(probabilities, rights, strict=True)]
        measures[f"{name}/probability"] = mean(np.array(sums))
    if max(map(len, probabilities)) == 2:
        measures[f"{name}/entropy"] = mean(np.array([numerics.entropy_bits(p) for p in probabilities]))
    return measures


def option_example(tokenizer: Tokenizer, item: Choice, option: str) -> Example:
    return Example([tokenizer.start_id, *tokenizer.encode(item.context)], tokenizer.encode(option))
