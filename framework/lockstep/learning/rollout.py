"""From prompts to responses: sampled, stopped, scored.

    prompts ──Sampler.sample──> Samples ──score──> scores, details      evaluate: one call of a model on Samples.sequences

Every sample is a row. The k samples of a prompt are neighbours: row = prompt · k + j. A row's tokens depend on its prompt, its
seeds and the policy, and on nothing else. Seeds are a function of (seed, stream, step, row)
(`lockstep.learning.randomness.token_seeds`), so rows may be generated in any grouping.

The pieces are pure. An algorithm that needs another order calls them one by one: `Sampler.generate` continues any left-padded
context, and `Sampler.finish` makes `Samples` of what came back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np

from lockstep.errors import RewardError
from lockstep.interfaces import Generated, Policy, Responses, RewardModel
from lockstep.text.encoding import Lengths
from lockstep.text.sequences import Sequences, chunks, join, left_pad, stack
from lockstep.text.stopping import Stops
from lockstep.types import Prompt

T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """B sampled responses.

    Args:
      responses: what a reward model reads. A response ended by a stop string appears there as its text and EOS.
      sequences: what the policy wrote, up to and including what ended it: the tokens to train on.
      finished: bool [B]. Whether EOS or a stop string ended the response, not the limit.
      logprobs: float32 [B, T], the sampler's own.
    """

    responses: Responses
    sequences: Sequences
    finished: np.ndarray
    logprobs: np.ndarray

    def take(self, rows: np.ndarray) -> Samples:
        r = self.responses
        responses = Responses([r.prompts[i] for i in rows], [r.texts[i] for i in rows], r.sequences.take(rows), r.tokenizer)
        return Samples(responses, self.sequences.take(rows), self.finished[rows], self.logprobs[rows])


@dataclass(frozen=True)
class Sampler:
    """How prompts become responses.

    Args:
      stops: what ends a response, and the tokenizer.
      lengths: prompts are padded to ``lengths.columns``.
      batch_size: rows to generate at a time; None: all at once.
    """

    stops: Stops
    lengths: Lengths
    temperature: float
    batch_size: int | None = None

    def sample(
        self, policy: Policy, prompts: Sequence[Prompt], prompt_ids: Sequence[Sequence[int]], seeds: np.ndarray
    ) -> Samples:
        """One response for each row of seeds.

        Args:
          prompts, prompt_ids: the prompts and their token ids.
          seeds: uint32 [B, T]. B is k times the number of prompts, for k samples of each; T is the limit of a response.
        """
        samples, rest = divmod(len(seeds), len(prompt_ids))
        if rest or not samples:
            raise ValueError(f"{len(seeds)} rows of seeds do not divide evenly among {len(prompt_ids)} prompts")
        columns = self.lengths.columns(max(map(len, prompt_ids)), self.lengths.prompt)
        context = left_pad(neighbours(prompt_ids, samples), self.stops.tokenizer.pad_id, columns)
        return self.finish(neighbours(prompts, samples), *context, self.generate(policy, *context, seeds))

    def generate(self, policy: Policy, tokens: np.ndarray, mask: np.ndarray, seeds: np.ndarray) -> Generated:
        """`Policy.generate` on chunks of equal shape: the last is padded with copies of its first row."""
        size, parts = min(self.batch_size or len(seeds), len(seeds)), []
        for part in chunks(len(seeds), size):
            rows = np.arange(part.start, part.stop)
            filled = np.append(rows, np.full(size - len(rows), part.start))
            found = policy.generate(
                tokens[filled],
                mask[filled],
                seeds[filled],
                temperature=self.temperature,
                stop_ids=self.stops.ids,
                pad_id=self.stops.tokenizer.pad_id,
            )
            parts.append([getattr(found, field.name)[: len(rows)] for field in fields(found)])
        return Generated(*map(np.concatenate, zip(*parts, strict=True)))

    def finish(self, prompts: Sequence[Prompt], tokens: np.ndarray, mask: np.ndarray, generated: Generated) -> Samples:
        """Cut the responses where they end."""
        ended = self.stops.end(generated.tokens, generated.mask)
        sequences = join(tokens, mask, ended.tokens, ended.mask)
        responses = Responses(prompts, ended.texts, self.stops.as_read(sequences, ended), self.stops.tokenizer)
        return Samples(responses, sequences, ended.finished, generated.logprobs)


def concatenate(parts: Sequence[Samples]) -> Samples:
    """The rows of several batches in one, padded to the widest prompt."""
    tokenizer = parts[0].responses.tokenizer
    read = stack([part.responses.sequences for part in parts], tokenizer.pad_id)
    written = stack([part.sequences for part in parts], tokenizer.pad_id)
    prompts = [prompt for part in parts for prompt in part.responses.prompts]
    texts = [text for part in parts for text in part.responses.texts]
    finished, logprobs = (np.concatenate([getattr(part, name) for part in parts]) for name in ("finished", "logprobs"))
    return Samples(Responses(prompts, texts, read, tokenizer), written, finished, logprobs)


def neighbours(items: Sequence[T], samples: int) -> list[T]:
    """Each item ``samples`` times in a row: 1, 2 -> 1, 1, 2, 2."""
    return [item for item in items for _ in range(samples)]


def score(reward_model: RewardModel, samples: Samples) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
    """float32 [B] scores, NaN where there is none; and the reward model's other results per response."""
    return reward_model.score(samples.responses), reward_model.details()


def scored_only(sequences: Sequences, scores: np.ndarray) -> Sequences:
    """The same sequences with rows without a score masked out: a failed score is never replaced by a number.

    Raises:
      RewardError: no row has a score.
    """
    scored = np.isfinite(scores)
    if not scored.any():
        raise RewardError("The reward model scored none of the batch's episodes. Look at its warnings above.")
    return replace(sequences, mask=sequences.mask & scored[:, None])
