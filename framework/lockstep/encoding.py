"""Nouns to token ids: rendering, length limits, and saying what was dropped."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.errors import DataError
from lockstep.nouns import Comparison, Demonstration, Prompt
from lockstep.sequences import Sequences, pack, round_up
from lockstep.tokenizer import Tokenizer

log = logging.getLogger("lockstep")


@dataclass(frozen=True)
class Lengths:
    """Limits in tokens. Columns are padded to a multiple of ``multiple``, at most to the limit: every new shape is a
    compilation on XLA."""

    prompt: int
    response: int
    multiple: int

    def columns(self, longest: int, limit: int) -> int:
        return min(round_up(longest, self.multiple), limit)


@dataclass(frozen=True)
class Example:
    """One row: token ids of a prompt and of a response."""

    prompt: list[int]
    response: list[int]


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, limit: int) -> list[int] | None:
    """Ids of the rendered dialogue, ready for the assistant's turn. A dialogue that is too long loses its oldest turns,
    never a part of one; None where its last turn alone is too long."""
    messages = list(prompt.messages)
    system = messages[:1] if messages[0].role == "system" else []
    turns = messages[len(system) :]
    while turns:
        ids = tokenizer.encode(tokenizer.render(system + turns, add_generation_prompt=True))
        if len(ids) <= limit:
            return ids
        turns = turns[1:]
        while turns and turns[0].role != "user":
            turns = turns[1:]
    return None


def encode_response(tokenizer: Tokenizer, response: str, limit: int) -> list[int]:
    """Ids of the response with EOS; cut to ``limit``, then without EOS: a cut response is not a finished one."""
    return (tokenizer.encode(response) + [tokenizer.eos_id])[:limit]


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[Prompt], lengths: Lengths) -> tuple[list[Prompt], list[list[int]]]:
    """Those prompts that fit, and their ids.

    Raises:
      DataError: none is left.
    """
    kept = [(p, ids) for p in prompts if (ids := encode_prompt(tokenizer, p, lengths.prompt)) is not None]
    _report(len(prompts), len(kept), f"prompts longer than {lengths.prompt} tokens")
    return [p for p, _ in kept], [ids for _, ids in kept]


def encode_demonstrations(tokenizer: Tokenizer, demonstrations: Sequence[Demonstration], lengths: Lengths) -> list[Example]:
    examples = []
    for demonstration in demonstrations:
        ids = encode_prompt(tokenizer, demonstration.prompt, lengths.prompt)
        if ids is not None:
            examples.append(Example(ids, encode_response(tokenizer, demonstration.response, lengths.response)))
    _report(len(demonstrations), len(examples), f"demonstrations whose prompt is longer than {lengths.prompt} tokens")
    _report_cut(sum(e.response[-1] != tokenizer.eos_id for e in examples), len(examples), lengths)
    return examples


def encode_comparisons(
    tokenizer: Tokenizer, comparisons: Sequence[Comparison], lengths: Lengths
) -> list[tuple[list[Example], tuple[int, ...]]]:
    """For each comparison its completions as examples, and their ranks."""
    encoded = []
    for comparison in comparisons:
        ids = encode_prompt(tokenizer, comparison.prompt, lengths.prompt)
        if ids is not None:
            rows = [Example(ids, encode_response(tokenizer, c, lengths.response)) for c in comparison.completions]
            encoded.append((rows, comparison.ranks))
    _report(len(comparisons), len(encoded), f"comparisons whose prompt is longer than {lengths.prompt} tokens")
    completions = [row for rows, _ in encoded for row in rows]
    _report_cut(sum(e.response[-1] != tokenizer.eos_id for e in completions), len(completions), lengths)
    return encoded


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], lengths: Lengths) -> list[Example]:
    """Raw documents: BOS (or EOS) alone is the prompt, the document and EOS the response, together at most as long as a
    prompt and a response are; what is longer is cut, as in any pretraining."""
    limit = _text_lengths(lengths).response
    return [Example([tokenizer.start_id], (ids + [tokenizer.eos_id])[:limit]) for ids in tokenizer.encode_many(texts) if ids]


def text_block(examples: Sequence[Example], tokenizer: Tokenizer, lengths: Lengths) -> Sequences:
    """Encoded raw documents as one block."""
    return block(examples, tokenizer, _text_lengths(lengths))


def _text_lengths(lengths: Lengths) -> Lengths:
    return Lengths(1, lengths.prompt + lengths.response - 1, lengths.multiple)


def block(examples: Sequence[Example], tokenizer: Tokenizer, lengths: Lengths, *, prompt_loss: bool = False) -> Sequences:
    """Rows as one block, padded to few shapes. With ``prompt_loss`` every token but the first counts (as N+ trains its
    SFT): the prompt then moves into the response columns."""
    if prompt_loss:
        examples = [Example(e.prompt[:1], e.prompt[1:] + e.response) for e in examples]
        lengths = Lengths(1, lengths.prompt + lengths.response, lengths.multiple)
    prompt_columns = lengths.columns(max(len(e.prompt) for e in examples), lengths.prompt)
    response_columns = lengths.columns(max(len(e.response) for e in examples), lengths.response)
    return pack(
        [e.prompt for e in examples],
        [e.response for e in examples],
        tokenizer.pad_id,
        prompt_columns=prompt_columns,
        response_columns=response_columns,
    )


def token_weights(mask: np.ndarray, total: int) -> np.ndarray:
    """float32, 1 / total on each counted token, 0 elsewhere; ``total`` counts the tokens of the *whole* minibatch, so
    that the gradient is the minibatch's however it is cut into micro-batches."""
    return (mask / max(1, total)).astype(np.float32)


def _report(before: int, after: int, what: str) -> None:
    if before and not after:
        raise DataError(f"All {before} examples were dropped: {what}. Raise the limit in the algorithm's `lengths`.")
    if before > after:
        log.warning("dropped %d of %d: %s", before - after, before, what)


def _report_cut(cut: int, total: int, lengths: Lengths) -> None:
    if cut:
        log.warning("cut %d of %d responses to %d tokens (they carry no EOS)", cut, total, lengths.response)
