"""Prompts and responses as one block of tokens, and how blocks are padded, cut and chunked.

    columns   0 ........ P-1 | P ............ P+T-1
              pad pad a b c  | x y EOS pad pad pad
              left-padded    | right-padded
              prompt_mask    | response_mask          (True = a real token)
                             | mask                   (True = counts in the loss)

Response column t is column P + t. Log-probabilities, values and rewards are [B, T] arrays over the response columns.
One layout serves generation, SFT, reward modelling and PPO; a text without a prompt has a prompt of one BOS token.

Several examples may share a row (`share_rows`); ``segments`` then numbers the example of each token:

    tokens    a b x EOS | c y EOS | pad pad         P = 1: the first example's first token is the prompt column
    segments  1 1 1  1  | 2 2  2  |  0   0          tokens see only their own example, and positions restart in each
    mask        F T  T  | F T  T  |  F   F          prompts do not count
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sequences:
    """Args:
    tokens: int32 [B, P + T].
    prompt_mask: bool [B, P]. False on the left padding.
    response_mask: bool [B, T]. True on real tokens: a prefix of each row.
    mask: bool [B, T]. True on the tokens that count: within response_mask.
    segments: int32 [B, P + T]. The number of each token's example in its row, from 1, and 0 on padding. An example's tokens
      are contiguous. None if each row is one example.
    """

    tokens: np.ndarray
    prompt_mask: np.ndarray
    response_mask: np.ndarray
    mask: np.ndarray
    segments: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def prompt_length(self) -> int:
        """P."""
        return self.prompt_mask.shape[1]

    @property
    def attention_mask(self) -> np.ndarray:
        """bool [B, P + T]."""
        return np.concatenate([self.prompt_mask, self.response_mask], axis=1)

    @property
    def attention(self) -> np.ndarray:
        """The array that attention and positions follow: ``segments`` if given, else `attention_mask`. A token sees the earlier
        tokens with the same number; False and 0 are padding."""
        return self.attention_mask if self.segments is None else self.segments

    @property
    def longest(self) -> int:
        """The number of tokens in the longest example."""
        numbers = self.attention.astype(np.int64)
        rows = np.arange(self.rows)[:, None] * (numbers.max(initial=0) + 1)
        return int(np.bincount((numbers + rows)[numbers > 0]).max(initial=0))

    @property
    def rows_per_prompt(self) -> int:
        """How many neighbouring rows share each prompt, if computing it once for all of them is `WORTHWHILE`; else 1."""
        if self.segments is not None:
            return 1
        found = rows_per_prompt(self.tokens[:, : self.prompt_length], self.prompt_mask)
        spared = self.prompt_length * (found - 1) / found
        return found if spared >= WORTHWHILE * self.tokens.shape[1] else 1

    @property
    def responses(self) -> np.ndarray:
        """int32 [B, T]: the response columns."""
        return self.tokens[:, self.prompt_length :]

    @property
    def last(self) -> np.ndarray:
        """int32 [B]: the column in [0, P + T) of each row's last real token, where a reward model reads its score.

        For an empty response that is the last prompt token, column P - 1.
        """
        return (self.prompt_length - 1 + self.response_mask.sum(axis=1)).astype(np.int32)

    def same_input(self, other: Sequences) -> bool:
        """True if a network gets the same input from both: all arrays are equal, except for ``mask``, which only losses read."""
        names = ("tokens", "prompt_mask", "response_mask", "segments")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)

    def take(self, rows: np.ndarray | slice) -> Sequences:
        arrays = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Sequences(*(None if array is None else array[rows] for array in arrays))

    def pad_rows(self, rows: int) -> Sequences:
        """The block padded to ``rows`` with copies of the first row with ``mask`` False, so that only one shape is compiled."""
        missing = rows - self.rows
        if missing == 0:
            return self
        padded = self.take(np.concatenate([np.arange(self.rows), np.zeros(missing, np.int64)]))
        padded.mask[self.rows :] = False
        return padded


WORTHWHILE = 1 / 8
"""Sharing prompts is worthwhile if it saves at least this share of all columns."""


def rows_per_prompt(tokens: np.ndarray, mask: np.ndarray) -> int:
    """How many neighbouring rows of prompts [B, P] are equal: the largest number that divides the length of every run of equal
    rows."""
    changes = np.any((tokens[1:] != tokens[:-1]) | (mask[1:] != mask[:-1]), axis=1)
    return max(1, int(np.gcd.reduce([len(tokens), *np.flatnonzero(changes) + 1])))


def round_up(length: int, multiple: int) -> int:
    """The length rounded up to a multiple, at least one multiple. This buckets lengths so that few shapes are compiled."""
    return max(multiple, -(-length // multiple) * multiple)


def width(length: int, least: int) -> int:
    """The length rounded up to 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., from ``least`` on: at most a third of the columns pads."""
    power = 1 << (max(length, least, 1) - 1).bit_length()  # the next power of two
    middle = power * 3 // 4
    return middle if power >= 4 and middle >= max(length, least) else power


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens and bool mask, both [B, columns]."""
    tokens = np.full((len(prompts), columns), pad_id, np.int32)
    mask = np.zeros((len(prompts), columns), bool)
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError("a prompt needs at least one token: start texts without a prompt with EOS")
        tokens[row, columns - len(prompt) :] = prompt
        mask[row, columns - len(prompt) :] = True
    return tokens, mask


def right_pad(responses: Sequence[Sequence[int]], pad_id: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens and bool mask, both [B, columns]."""
    tokens = np.full((len(responses), columns), pad_id, np.int32)
    mask = np.zeros((len(responses), columns), bool)
    for row, response in enumerate(responses):
        tokens[row, : len(response)] = response
        mask[row, : len(response)] = True
    return tokens, mask


def pack(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    *,
    prompt_columns: int | None = None,
    response_columns: int | None = None,
) -> Sequences:
    """Token lists as one block in which every real response token counts. Columns default to the longest row."""
    prompt_tokens, prompt_mask = left_pad(prompts, pad_id, prompt_columns or max(map(len, prompts)))
    response_tokens, response_mask = right_pad(responses, pad_id, response_columns or max(map(len, responses)))
    return join(prompt_tokens, prompt_mask, response_tokens, response_mask)


def join(prompt_tokens: np.ndarray, prompt_mask: np.ndarray, response: np.ndarray, response_mask: np.ndarray) -> Sequences:
    """A block from generated responses: every real token counts."""
    return Sequences(np.concatenate([prompt_tokens, response], axis=1), prompt_mask, response_mask, response_mask.copy())


def stack(blocks: Sequence[Sequences], pad_id: int) -> Sequences:
    """The rows of several blocks in one, each padded to the widest prompt and the widest response. No rows are shared."""
    prompt, response = (max(getattr(block, name).shape[1] for block in blocks) for name in ("prompt_mask", "response_mask"))
    parts = []
    for block in blocks:
        columns = (0, 0), (prompt - block.prompt_length, response - block.responses.shape[1])
        left, right = (columns[0], (columns[1][0], 0)), (columns[0], (0, columns[1][1]))
        masks = np.pad(block.prompt_mask, left), np.pad(block.response_mask, right), np.pad(block.mask, right)
        parts.append((np.pad(block.tokens, columns, constant_values=pad_id), *masks))
    return Sequences(*map(np.concatenate, zip(*parts, strict=True)))


def share_rows(examples: Sequence[Sequence[int]], counted: Sequence[Sequence[bool]], pad_id: int, columns: int) -> Sequences:
    """Pack several examples into each row of ``columns`` tokens. ``counted`` says whether each token counts; the first token of
    an example is predicted from nothing and never counts."""
    rows = first_fit([len(example) for example in examples], columns)
    tokens = np.full((len(rows), columns), pad_id, np.int32)
    segments = np.zeros((len(rows), columns), np.int32)
    mask = np.zeros((len(rows), columns), bool)
    for row, members in enumerate(rows):
        start = 0
        for number, member in enumerate(members, 1):
            place = row, slice(start, start + len(examples[member]))
            tokens[place], segments[place], mask[place] = examples[member], number, counted[member]
            mask[row, start] = False
            start += len(examples[member])
    return Sequences(tokens, segments[:, :1] > 0, segments[:, 1:] > 0, mask[:, 1:], segments)


def first_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which items share a bin of ``size``: the longest first, each into the first bin with room (first-fit decreasing; at
    most 11/9 of the fewest bins and one more, Johnson 1973)."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((i for i, left in enumerate(room) if left >= lengths[item]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(size)
        bins[place].append(item)
        room[place] -= lengths[item]
    return bins


def chunks(rows: int, size: int | None) -> Iterator[slice]:
    """Slices of at most ``size`` rows; one slice of all rows if ``size`` is None."""
    for start in range(0, rows, size or rows):
        yield slice(start, min(start + (size or rows), rows))


def in_chunks(
    evaluate: Callable[[Sequences], dict[str, np.ndarray]], sequences: Sequences, size: int | None
) -> dict[str, np.ndarray]:
    """Call ``evaluate`` on chunks of equal shape and join the results. The last chunk is padded, and the padding's results are
    dropped."""
    if size is None or size >= sequences.rows:
        return evaluate(sequences)
    parts = []
    for part in chunks(sequences.rows, size):
        piece = sequences.take(part)
        parts.append({name: value[: piece.rows] for name, value in evaluate(piece.pad_rows(size)).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
