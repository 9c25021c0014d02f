"""What ends a response: EOS, further stop tokens, and stop strings.

Backends end a row at token ids and never see text, so the rest happens here, on the host, after generation. A row ends with
the first token that completes a stop string, even if the string begins inside a token or inside a character's bytes. A stop
string then works like EOS:

* the policy is trained on the tokens up to and including that token, not on later ones;
* the response is finished: the rule for responses without EOS does not change its score;
* its text ends before the stop string. A reward model that reads tokens gets that text, encoded, plus EOS. Special tokens that
  the policy spelled with ordinary ones are broken up in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.errors import ConfigError, told
from lockstep.text import encoding
from lockstep.text.sequences import Sequences, join, right_pad
from lockstep.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Ended:
    """Responses cut where they end: ``tokens`` int32 and ``mask`` bool [B, T], as the policy wrote them; ``finished`` bool [B];
    ``without_eos`` bool [B], True where something other than EOS ended them; ``texts``, without the EOS or stop string."""

    tokens: np.ndarray
    mask: np.ndarray
    finished: np.ndarray
    without_eos: np.ndarray
    texts: list[str]


class Stops:
    """What ends a response, for one tokenizer. ``ids`` are for `Policy.generate`: EOS, and every token whose own text
    contains a stop string, so that most rows stop generating at once. A stop string may also be the name of a special
    token.

    Raises:
      ConfigError: a stop string is empty or can never occur in text.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str] = ()):
        self.tokenizer = tokenizer
        special = tokenizer.special()
        self.strings = [_checked(string, special) for string in strings if string not in special]
        names = {i: tokenizer.core.id_to_token(i) for i in range(tokenizer.vocab_size)} if strings else {}
        stops = [i for i, name in names.items() if name in strings or self._begin(tokenizer.decode([i])) is not None]
        self.ids = list(dict.fromkeys([tokenizer.eos_id, *stops]))

    def end(self, tokens: np.ndarray, mask: np.ndarray) -> Ended:
        """Responses [B, T] from `Policy.generate`, cut after the token that completes a stop string."""
        tokens, mask, texts = tokens.copy(), mask.copy(), []
        completed = np.zeros(len(tokens), bool)
        for row, counts in enumerate(mask):
            ids = tokens[row][counts]
            text = self.tokenizer.decode(ids)
            if (end := self._end(ids, text)) is not None:
                mask[row, end:], tokens[row, end:], completed[row] = False, self.tokenizer.pad_id, True
                text = self.tokenizer.decode(ids[:end])
                text = text[: self._begin(text)]
            texts.append(text)
        finished = completed | ends_with_stop(tokens, mask, self.ids)
        without_eos = finished & ~ends_with_stop(tokens, mask, [self.tokenizer.eos_id])
        return Ended(tokens, mask, finished, without_eos, texts)

    def as_read(self, sequences: Sequences, ended: Ended) -> Sequences:
        """Sequences for a reward model: responses ended by something other than EOS become their text plus EOS; others stay."""
        if not ended.without_eos.any():
            return sequences
        tokenizer, columns = self.tokenizer, ended.tokens.shape[1]
        rows = zip(ended.tokens, ended.mask, ended.without_eos, ended.texts, strict=True)
        responses = [
            encoding.encode_response(tokenizer, tokenizer.broken_up(text), columns) if replaced else tokens[counts].tolist()
            for tokens, counts, replaced, text in rows
        ]
        prompts = sequences.tokens[:, : sequences.prompt_length]
        return join(prompts, sequences.prompt_mask, *right_pad(responses, tokenizer.pad_id, columns))

    def _begin(self, text: str) -> int | None:
        """Where the first stop string in a text begins; None if it has none."""
        return min((place for string in self.strings if (place := text.find(string)) >= 0), default=None)

    def _end(self, ids: np.ndarray, text: str) -> int | None:
        """The number of ids after which their text contains a stop string; None if it never does. Every prefix must be checked:
        while the last character is incomplete, a tokenizer with byte fallback shows the whole run of bytes as U+FFFD and
        drops a line break before it that was already complete."""
        if self._begin(text) is None and "\ufffd" not in text:
            return None
        counts = range(1, len(ids) + 1)
        return next((count for count in counts if self._begin(self.tokenizer.decode(ids[:count])) is not None), None)


def ends_with_stop(responses: np.ndarray, mask: np.ndarray, stop_ids: Sequence[int]) -> np.ndarray:
    """bool [B]: True where the last counted token of a response is one of ``stop_ids``."""
    last = np.maximum(mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1), 0)
    return np.isin(responses[np.arange(len(responses)), last], list(stop_ids)) & mask.any(axis=1)


def _checked(string: str, special: set[str]) -> str:
    if not string or "\ufffd" in string:
        raise ConfigError(f"stop_strings has {told(string)}. A stop string should be text of at least one character.")
    if inside := sorted(token for token in special if token in string):
        raise ConfigError(
            f"stop_strings has {told(string)}, which never occurs in text: '{inside[0]}' in it is a special token. Give "
            f"'{inside[0]}' alone: generation then ends with it."
        )
    return string
