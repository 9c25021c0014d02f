"""Answers a benchmark's requests with a policy, on token ids: log-likelihoods of continuations, and texts that continue contexts.

Requests are answered in batches of equal numbers of rows, the longest first, padded to few widths, because XLA compiles every
new shape. An answer depends on its own request alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.errors import DataError
from lockstep.interfaces import Policy
from lockstep.learning.randomness import token_seeds
from lockstep.learning.rollout import Sampler
from lockstep.text.encoding import Lengths
from lockstep.text.sequences import left_pad, pack, width
from lockstep.text.stopping import Stops

COLD = 2.0**-60
"""A temperature at which the most likely token has a log-probability of 0, and every other token one below -1000. Dividing
float32 logits by a power of two is exact, so even neighbouring numbers end up far apart."""
ROUNDING = 1e-3
"""The allowance for rounding in float32 log-probabilities and entropies, in nats."""

Told = Callable[[int], None]
"""Called with the number of requests answered so far."""


@dataclass(frozen=True)
class Continuation:
    """A ``context``, and the tokens after it, ``ids``, whose log-probability is requested."""

    context: Sequence[int]
    ids: Sequence[int]

    def fitted(self, limit: int) -> Continuation:
        """The same with the oldest context left out, so that at most ``limit`` tokens remain.

        Raises:
          DataError: the continuation does not fit after even one token of context.
        """
        if len(self.ids) >= limit:
            raise DataError(
                f"A continuation has {len(self.ids)} tokens, and the policy's context holds {limit}, of which one comes before "
                "it. Leave the task out, or evaluate a policy with a longer context."
            )
        return Continuation(self.context[-(limit - len(self.ids)) :], self.ids)


@dataclass(frozen=True)
class Asked:
    """A policy that answers requests, ``batch`` rows at a time."""

    policy: Policy
    pad_id: int
    batch: int

    def loglikelihoods(self, requests: Sequence[Continuation], told: Told) -> list[tuple[float, bool]]:
        """For each request, the sum of its tokens' log-probabilities in nats, and whether each token is the most likely one given
        those before it (or, in a tie, one of the most likely).

        The policy supplies log-probabilities and entropies, not the most likely token. A token is the most likely one if its
        log-probability stays near 0 as the temperature falls. The second pass, which tests this, is only for continuations that
        can pass: the most likely token has p >= exp(-H), because the min-entropy is at most the entropy H (Rényi 1961).
        """
        found = self._evaluate(requests, ("logprobs", "entropy"), 1.0, told)
        sums = [float(row["logprobs"].sum(dtype=np.float64)) for row in found]
        possible = [i for i, row in enumerate(found) if (row["logprobs"] >= -row["entropy"] - ROUNDING).all()]
        cold = self._evaluate([requests[i] for i in possible], ("logprobs",), COLD, lambda done: None)
        greedy = {i for i, row in zip(possible, cold, strict=True) if (row["logprobs"] > -1).all()}
        return [(total, i in greedy) for i, total in enumerate(sums)]

    def logprob_sums(self, requests: Sequence[Continuation], told: Told) -> list[float]:
        """For each request, the sum of its tokens' log-probabilities in nats."""
        return [float(row["logprobs"].sum(dtype=np.float64)) for row in self._evaluate(requests, ("logprobs",), 1.0, told)]

    def _evaluate(
        self, requests: Sequence[Continuation], outputs: tuple[str, ...], temperature: float, told: Told
    ) -> list[dict[str, np.ndarray]]:
        """For each continuation, the named outputs of its tokens."""
        fitted = [request.fitted(self.policy.context_length) for request in requests]
        found: list[dict[str, np.ndarray]] = [{} for _ in fitted]
        done = 0
        for rows in self._batches([(width(len(r.ids), 8), len(r.context)) for r in fitted]):
            block = pack(
                [fitted[i].context for i in rows],
                [fitted[i].ids for i in rows],
                self.pad_id,
                prompt_columns=width(max(len(fitted[i].context) for i in rows), 32),
                response_columns=width(max(len(fitted[i].ids) for i in rows), 8),
            )
            out = self.policy.evaluate(block.pad_rows(min(self.batch, len(fitted))), outputs, temperature=temperature)
            for row, i in enumerate(rows):
                found[i] = {name: out[name][row, : len(fitted[i].ids)] for name in outputs}
            done += len(rows)
            told(done)
        return found

    def continuations(
        self, contexts: Sequence[Sequence[int]], stops: Stops, limit: int, temperature: float, seed: int, told: Told
    ) -> list[str]:
        """Generate a text of at most ``limit`` tokens for each context; a context that is too long loses its oldest tokens.
        Temperature 0 takes the most likely token. A context's random draws depend only on the seed and its place.

        Raises:
          DataError: ``limit`` leaves no room for a context.
        """
        room = self.policy.context_length - limit
        if room < 1:
            raise DataError(
                f"A task asks for {limit} new tokens, and the policy's context holds {self.policy.context_length}, prompt "
                "included. Set a smaller max_gen_toks in the task, or evaluate a policy with a longer context."
            )
        seeds = token_seeds(seed, "benchmark", 0, len(contexts), limit)
        texts, done = [""] * len(contexts), 0
        for rows in self._batches([(0, len(context)) for context in contexts]):
            filled = rows + rows[:1] * (min(self.batch, len(contexts)) - len(rows))
            prompts = [contexts[i][-room:] for i in filled]
            padded = left_pad(prompts, self.pad_id, width(max(map(len, prompts)), 32))
            sampler = Sampler(stops, Lengths(room, limit), temperature)
            drawn = sampler.generate(self.policy, *padded, seeds[filled])
            for i, text in zip(rows, stops.end(drawn.tokens, drawn.mask).texts, strict=False):
                texts[i] = text
            done += len(rows)
            told(done)
        return texts

    def _batches(self, sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
        """The requests' numbers in batches, the largest first, so that a batch too large for memory fails at once."""
        order = sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True)
        return [order[start : start + self.batch] for start in range(0, len(order), self.batch)]
