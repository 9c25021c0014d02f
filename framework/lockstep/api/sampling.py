"""Responses of a policy to encoded prompts, whole or streamed.

Token t of row b is drawn from the seed of (seed, turn, b, t) and nothing else: the same seed gives the same text, streamed or
not, on every backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.config.schema import REQUIRED, setting
from lockstep.interfaces import Policy
from lockstep.learning.randomness import token_seeds
from lockstep.learning.rollout import Sampler
from lockstep.text.encoding import Lengths
from lockstep.text.stopping import Stops
from lockstep.text.tokenizer import Tokenizer

ROWS = 64
"""Responses drawn at a time."""
COLUMNS = 64
"""Prompts are padded to a multiple of this: XLA compiles every new shape."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Samples are a function of seed and turn, so each turn of a conversation draws fresh ones."""

    max_tokens: int = setting(REQUIRED, "The most tokens of a response.", least=1)
    temperature: float = setting(1.0, "0 takes the most likely token.", least=0)
    stop: tuple[str, ...] = setting((), "Texts that end a response, as EOS does; they are not part of it.")
    seed: int = setting(0, "Seed of the samples.", least=0)
    turn: int = setting(0, "Turn of the conversation, counted from 0.", least=0)


def respond(policy: Policy, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], how: Sampling) -> list[str]:
    """One response to each prompt, given as token ids."""
    if not prompts:
        return []
    stops = Stops(tokenizer, how.stop)
    seeds = token_seeds(how.seed, "chat", how.turn, len(prompts), how.max_tokens)
    sampler = Sampler(stops, _lengths(prompts, policy, how), how.temperature, ROWS)
    drawn = sampler.generate(policy, *sampler.context(prompts), seeds)
    return stops.end(drawn.tokens, drawn.mask).texts


def stream(policy: Policy, tokenizer: Tokenizer, prompt: Sequence[int], how: Sampling) -> Iterator[str]:
    """The response to one prompt, in pieces that join to the text of `respond`. A piece holds whole characters, and nothing
    that may turn out to begin a stop string. Only text that turns out to be invalid UTF-8 may have been shown differently."""
    stops, ids, shown = Stops(tokenizer, how.stop), list[int](), 0
    seeds = token_seeds(how.seed, "chat", how.turn, 1, how.max_tokens)
    context, text = Sampler(stops, _lengths([prompt], policy, how), how.temperature).context([prompt]), ""
    for (token,) in policy.stream(*context, seeds, temperature=how.temperature, stop_ids=stops.ids, pad_id=tokenizer.pad_id):
        ids.append(int(token))
        ended = stops.end(np.array([ids], np.int32), np.ones((1, len(ids)), bool))
        (text,) = ended.texts
        if ended.finished[0]:
            break
        certain = len(text) - _uncertain(text, how.stop)
        if certain > shown:
            yield text[shown:certain]
            shown = certain
    if len(text) > shown:
        yield text[shown:]


def _uncertain(text: str, stop: Sequence[str]) -> int:
    """How many of the last characters may still change: an incomplete character, or the beginning of a stop string."""
    complete = text.rstrip("\ufffd")
    begun = (n for string in stop for n in range(1, len(string)) if complete.endswith(string[:n]))
    return len(text) - len(complete) + max(begun, default=0)


def _lengths(prompts: Sequence[Sequence[int]], policy: Policy, how: Sampling) -> Lengths:
    return Lengths(max(policy.context_length - how.max_tokens, *map(len, prompts)), how.max_tokens, COLUMNS)
