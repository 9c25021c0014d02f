"""From prompts to responses: sampled, stopped, scored.

    prompts ──Sampler.sample──> Samples ──score──> scores, details      evaluate: one call of a model on Samples.sequences

Every sample is a row. The k samples of a prompt are neighbours: row = prompt · k + j. A row's tokens depend on its prompt, its
seeds and the policy, and on nothing else. Seeds are a function of (seed, stream, step, row)
(`lockstep.learning.randomness.token_seeds`), so rows may be generated in any grouping.

The pieces are pure. An algorithm that needs another order calls them one by one: `Sampler.generate` continues any left-padded
context, and `Sampler.finish` turns the result into `Samples`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from lockstep.errors import ConfigError, RewardError, told
from lockstep.interfaces import Environment, Generated, Past, Policy, Responses, RewardModel
from lockstep.learning.episodes import Row, converse
from lockstep.learning.served import Served, ServedPolicy
from lockstep.text.encoding import Example, Lengths, block, encode_prompt, encode_response
from lockstep.text.sequences import Sequences, chunks, join, left_pad, right_pad, stack
from lockstep.text.stopping import Stops
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Prompt

T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """B sampled responses.

    Args:
      responses: what a reward model reads. A response ended by a stop string appears there as its text and EOS.
      sequences: the policy's tokens up to and including the one that ended the response: the tokens to train on.
      finished: bool [B]. True if EOS or a stop string ended the response (or the last turn), False if the limit did.
      logprobs: float32 [B, T], the sampler's own.
    """

    responses: Responses
    sequences: Sequences
    finished: np.ndarray
    logprobs: np.ndarray

    def take(self, rows: np.ndarray) -> Samples:
        r = self.responses
        rewards = None if r.rewards is None else r.rewards[rows]
        prompts, texts = [r.prompts[i] for i in rows], [r.texts[i] for i in rows]
        responses = Responses(prompts, texts, r.sequences.take(rows), r.tokenizer, rewards)
        return Samples(responses, self.sequences.take(rows), self.finished[rows], self.logprobs[rows])


@dataclass(frozen=True)
class Sampler:
    """How prompts become responses.

    Args:
      stops: what ends a response, and the tokenizer.
      lengths: prompts are padded to ``lengths.columns``.
      batch_size: rows to generate at a time; None: all at once.
      environment: what the policy converses with; None: a response is one turn.
      engine: samples in place of the policy; None: the policy samples.
    """

    stops: Stops
    lengths: Lengths
    temperature: float
    batch_size: int | None = None
    environment: Environment | None = None
    engine: Served | None = None

    def __post_init__(self) -> None:
        marks = () if self.environment is None else self.environment.marks
        if lost := [mark for mark in marks if any(special in mark for special in self.stops.tokenizer.special())]:
            raise ConfigError(
                f"The environment looks for '{lost[0]}' in the policy's text, which has no special tokens, and this is one of "
                "its tokenizer's. Choose another mark."
            )

    def sample(
        self, policy: Policy, prompts: Sequence[Prompt], prompt_ids: Sequence[Sequence[int]], seeds: np.ndarray
    ) -> Samples:
        """Sample one response, or one episode with an environment, for each row of seeds.

        Args:
          prompts, prompt_ids: the prompts and their token ids.
          seeds: uint32 [B, T]. B is k times the number of prompts, for k samples of each. T limits a response, or an episode
            after its prompt.
        """
        samples, rest = divmod(len(seeds), len(prompt_ids))
        if rest or not samples:
            raise ValueError(f"{len(seeds)} rows of seeds do not divide evenly among {len(prompt_ids)} prompts")
        prompts, prompt_ids = neighbours(prompts, samples), neighbours(prompt_ids, samples)
        context = self.context(prompt_ids)
        drawing = policy if self.engine is None else self.engine.policy(policy)
        if self.environment is None:
            return self.finish(prompts, *context, self.generate(drawing, *context, seeds))
        generate, size = functools.partial(self.draw, drawing), self.rows(seeds)
        rows: list[Row] = []
        for part in chunks(len(seeds), size):
            given = prompts[part], prompt_ids[part], seeds[part]
            rows += converse(generate, self.stops, self.lengths, self.environment, *given, size, policy.context_length)
        return self.gather(*context, rows)

    def begin(self, policy: Policy, prompt_ids: Sequence[Sequence[int]], seeds: np.ndarray) -> None:
        """Let the engine start drawing, with the current weights, the samples that `sample` will request with these arguments."""
        assert self.engine is not None
        context = self.context(neighbours(prompt_ids, len(seeds) // len(prompt_ids)))
        self.engine.policy(policy).begin(*context, seeds, **self.how)

    def context(self, prompt_ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """The left-padded prompts and their mask."""
        columns = self.lengths.columns(max(map(len, prompt_ids)), self.lengths.prompt)
        return left_pad(prompt_ids, self.stops.tokenizer.pad_id, columns)

    def generate(self, policy: Policy | ServedPolicy, tokens: np.ndarray, mask: np.ndarray, seeds: np.ndarray) -> Generated:
        """Call `Policy.generate` on chunks of equal shape; the last chunk is padded with copies of its first row."""
        size, parts = self.rows(seeds), []
        for part in chunks(len(seeds), size):
            rows = np.arange(part.start, part.stop)
            filled = np.append(rows, np.full(size - len(rows), part.start))
            found = self.draw(policy, tokens[filled], mask[filled], seeds[filled])
            parts.append([array[: len(rows)] for array in (found.tokens, found.mask, found.logprobs)])
        return Generated(*map(np.concatenate, zip(*parts, strict=True)))

    def draw(
        self, policy: Policy | ServedPolicy, tokens: np.ndarray, mask: np.ndarray, seeds: np.ndarray, past: Past | None = None
    ) -> Generated:
        how = self.how
        if past is not None:  # a policy that keeps no cache need not accept it
            how["past"] = past
        return policy.generate(tokens, mask, seeds, **how)

    @property
    def how(self) -> dict[str, Any]:
        """Keyword arguments of `Policy.generate`."""
        return {"temperature": self.temperature, "stop_ids": self.stops.ids, "pad_id": self.stops.tokenizer.pad_id}

    def rows(self, seeds: np.ndarray) -> int:
        """The number of rows to generate at a time."""
        return min(self.batch_size or len(seeds), len(seeds))

    def finish(self, prompts: Sequence[Prompt], tokens: np.ndarray, mask: np.ndarray, generated: Generated) -> Samples:
        """Cut each response where it ends."""
        ended = self.stops.end(generated.tokens, generated.mask)
        sequences = join(tokens, mask, ended.tokens, ended.mask)
        responses = Responses(prompts, ended.texts, self.stops.as_read(sequences, ended), self.stops.tokenizer)
        return Samples(responses, sequences, ended.finished, generated.logprobs)

    def gather(self, tokens: np.ndarray, mask: np.ndarray, rows: Sequence[Row]) -> Samples:
        """Join episodes, one per row, to their left-padded prompts."""
        tokenizer, width = self.stops.tokenizer, len(rows[0].seeds)
        sequences = join(tokens, mask, *right_pad([row.tokens for row in rows], tokenizer.pad_id, width))
        sequences.mask[sequences.response_mask] = [counts for row in rows for counts in row.counted]
        logprobs = np.zeros((len(rows), width), np.float32)
        prompts, read, counted = [], list[list[int]](), list[bool]()
        for number, row in enumerate(rows):
            logprobs[number, : len(row.logprobs)] = row.logprobs
            *before, last = row.episode.messages
            prompts.append(replace(row.episode.prompt, messages=(*row.episode.prompt.messages, *before)))
            start = len(row.tokens) - len(row.turn)
            ended_otherwise = row.finished and not row.with_eos
            text = tokenizer.broken_up(last.content)
            turn = encode_response(tokenizer, text, width - start) if ended_otherwise else row.turn
            read.append(row.tokens[:start] + turn)
            counted += row.counted[:start] + [True] * len(turn)
        texts = [row.episode.text for row in rows]
        rewards = np.array([row.reward for row in rows], np.float32)
        block = join(tokens, mask, *right_pad(read, tokenizer.pad_id, width))
        block.mask[block.response_mask] = counted
        return Samples(
            Responses(prompts, texts, block, tokenizer, rewards), sequences, np.array([row.finished for row in rows]), logprobs
        )


def responses_of(prompts: Sequence[Prompt], texts: Sequence[str], tokenizer: Tokenizer, lengths: Lengths) -> Responses:
    """Encode given responses for a reward model, cut to ``lengths.response``. The prompts must fit ``lengths.prompt``."""
    ids = {id(prompt): encode_prompt(tokenizer, prompt, lengths.prompt) for prompt in prompts}
    examples = [
        Example(ids[id(prompt)] or [], encode_response(tokenizer, text, lengths.response))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return Responses(prompts, texts, block(examples, tokenizer, lengths), tokenizer)


def concatenate(parts: Sequence[Samples]) -> Samples:
    """Join the rows of several batches, padded to the widest prompt."""
    tokenizer = parts[0].responses.tokenizer
    read = stack([part.responses.sequences for part in parts], tokenizer.pad_id)
    written = stack([part.sequences for part in parts], tokenizer.pad_id)
    prompts = [prompt for part in parts for prompt in part.responses.prompts]
    texts = [text for part in parts for text in part.responses.texts]
    finished, logprobs = (np.concatenate([getattr(part, name) for part in parts]) for name in ("finished", "logprobs"))
    given = [part.responses.rewards for part in parts if part.responses.rewards is not None]
    rewards = np.concatenate(given) if given else None
    return Samples(Responses(prompts, texts, read, tokenizer, rewards), written, finished, logprobs)


def neighbours(items: Sequence[T], samples: int) -> list[T]:
    """Each item ``samples`` times in a row: 1, 2 -> 1, 1, 2, 2."""
    return [item for item in items for _ in range(samples)]


def score(reward_model: RewardModel, samples: Samples) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
    """The scores [B] and the reward model's details. A score is NaN if there is none, or if the environment failed."""
    return mark_failed(scores_of(reward_model, samples.responses), samples), reward_model.details()


def mark_failed(scores: np.ndarray, samples: Samples) -> np.ndarray:
    """The scores [B], NaN for episodes whose environment failed."""
    rewards = samples.responses.rewards
    return scores if rewards is None else np.where(np.isnan(rewards), rewards, scores)


def scores_of(reward_model: RewardModel, responses: Responses) -> np.ndarray:
    """The reward model's scores [B], NaN where there is none.

    Raises:
      RewardError: the reward model did not return one number for each response.
    """
    given, count = reward_model.score(responses), len(responses.texts)
    scores = np.asarray(given)
    if scores.shape != (count,) or scores.dtype.kind not in "fiub":
        what = f"an array {given.shape} of {given.dtype}" if isinstance(given, np.ndarray) else told(given)
        raise RewardError(
            f"{type(reward_model).__name__}.score gave {what} for {count} responses: it must give an array of {count} numbers, "
            "NaN where there is none."
        )
    return scores


def scored_only(sequences: Sequences, scores: np.ndarray) -> Sequences:
    """The sequences with every row masked out that has no finite score: a failed score is never replaced by a number.

    Raises:
      RewardError: no row has a score.
    """
    scored = np.isfinite(scores)
    if not scored.any():
        raise RewardError("The reward model scored none of the batch's episodes. Look at its warnings above.")
    return replace(sequences, mask=sequences.mask & scored[:, None])
