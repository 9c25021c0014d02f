"""Prompts, demonstrations, comparisons and raw texts to token ids: rendering, length limits, and a report of what was dropped."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError, DataError, short
from lockstep.text.borders import Borders
from lockstep.text.sequences import Sequences, chunks, pack, round_up, share_rows
from lockstep.types import Comparison, Demonstration, Fit, Message, Prompt

if TYPE_CHECKING:
    from lockstep.text.tokenizer import Tokenizer

log = logging.getLogger("lockstep")
T = TypeVar("T")


def most_characters(limit: int) -> int:
    """The most characters to tokenise for ``limit`` tokens. Longer text is cut to this, or counts as too long, because a
    tokenizer takes 40 bytes a character. The longest tokens have 128 characters, and average ones four, so ``limit`` tokens
    never have more."""
    return max(1_000_000, 128 * limit)


@dataclass(frozen=True)
class Lengths:
    """Limits in tokens. Columns are padded to a multiple of ``multiple``, up to the limit, because XLA compiles for every new
    shape."""

    prompt: int = setting(28, "Tokens. A longer dialogue loses its oldest turns or is dropped. 28 fits the miniature.", least=1)
    response: int = setting(20, "Tokens. 20 fits the miniature.", least=1)
    multiple: int = setting(28, "Pad columns to a multiple of this many tokens. The largest limit gives a single shape.", least=1)

    def columns(self, longest: int, limit: int) -> int:
        return min(round_up(longest, self.multiple), limit)

    def check(self, context_length: int, model: str = "policy") -> None:
        """
        Raises:
          ConfigError: a prompt and a response do not fit into the context of the ``model``.
        """
        if self.prompt + self.response > context_length:
            raise ConfigError(
                f"lengths.prompt + lengths.response = {self.prompt} + {self.response} exceeds the {model}'s context of "
                f"{context_length} tokens. Lower them, or take a model with a longer context (of policy=decoder: "
                "policy.context_length)."
            )


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of a response. ``counted`` says which response tokens count; None: all.

    If all assistant turns of a dialogue count, the prompt is everything before the first of them.
    """

    prompt: list[int]
    response: list[int]
    counted: list[bool] | None = None

    @property
    def counts(self) -> list[bool]:
        return [True] * len(self.response) if self.counted is None else self.counted


def report(fit: Fit, lengths: Lengths) -> None:
    """Log one line if anything was dropped, shortened or cut.

    Raises:
      DataError: everything was dropped.
    """
    if fit.total and fit.dropped + fit.alike == fit.total:
        alike = f"; {fit.alike} have completions that are the same tokens, cut to {lengths.response}" if fit.alike else ""
        raise DataError(
            f"All {fit.total} {fit.what} were dropped: their last prompts alone are longer than {lengths.prompt} tokens{alike}. "
            "Raise lengths.prompt: the algorithm's, or evaluation.lengths.prompt if it is an evaluation that reads them."
        )
    parts = {
        f"{fit.dropped} dropped because their last prompt alone is longer than {lengths.prompt} tokens": fit.dropped,
        f"{fit.shortened} lost their oldest turns": fit.shortened,
        f"{fit.cut} responses cut to the limit, without EOS": fit.cut,
        f"{fit.alike} left out because their completions are the same once cut to {lengths.response} tokens": fit.alike,
        f"{fit.special} spell a special token in their text, such as '{fit.spelled}', which the model reads as that": fit.special,
        f"{fit.unknown} have words that the tokenizer does not know, such as '{short(fit.word)}', which the model reads as its "
        "unknown token": fit.unknown,
    }
    if said := [part for part, count in parts.items() if count]:
        log.warning("%s: of %d, %s", fit.what, fit.total, "; ".join(said))


def encode_prompt(
    tokenizer: Tokenizer, prompt: Prompt, limit: int, fit: Fit | None = None, *, whole: bool = False
) -> list[int] | None:
    """Ids of the rendered dialogue, ready for the assistant's turn. A dialogue that is too long loses whole turns, oldest
    first; None if its last turn alone is too long, and with ``whole`` if it is too long at all."""
    return _fitting_prompts(tokenizer, [prompt], limit, fit or Fit(), whole)[0]


def _fitting_prompts(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], limit: int, fit: Fit, whole: bool = False
) -> list[list[int] | None]:
    dialogues = [(prompt, _whole) for prompt in prompts]
    return [pieces and pieces[0] for pieces in _fitting(tokenizer, dialogues, limit, fit, whole)]


Pieces = list[list[int]]
Cut = Callable[["Tokenizer", Sequence[Message], Sequence[Mapping[str, Any]]], list[str]]
"""A dialogue and its tools as pieces of text that are encoded one by one."""


def _whole(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[str]:
    return [tokenizer.render(messages, add_generation_prompt=True, tools=tools)]


def _fitting(
    tokenizer: Tokenizer, dialogues: Sequence[tuple[Prompt, Cut]], limit: int, fit: Fit, whole: bool = False
) -> list[Pieces | None]:
    """The encoded pieces of the longest suffix of each dialogue that fits, or of those that fit ``whole``; None for the others.

    All searches go on in step, and what they ask for is encoded at once, because a tokenizer then uses every core.
    """
    searches = [_longest_suffix(prompt, limit, fit, whole) for prompt, _ in dialogues]
    found: list[Pieces | None] = [None] * len(dialogues)
    answers: dict[int, Pieces | None] = dict.fromkeys(range(len(dialogues)))
    while answers:
        asked = {}
        for i, answer in answers.items():
            prompt, cut = dialogues[i]
            try:
                asked[i] = cut(tokenizer, searches[i].send(answer), prompt.tools)
            except StopIteration as end:
                found[i] = end.value
        encoded = iter(tokenizer.encode_many([text for texts in asked.values() for text in texts]))
        answers = {i: list(itertools.islice(encoded, len(texts))) for i, texts in asked.items()}
    return found


def _longest_suffix(prompt: Prompt, limit: int, fit: Fit, whole: bool) -> Generator[Sequence[Message], Pieces, Pieces | None]:
    """Yield suffixes of the dialogue and be sent their encoded pieces; return those of the longest that fits, or None. The system
    message stays. ``whole``: only all of the dialogue will do."""
    messages = list(prompt.messages)
    system = messages[:1] if messages[0].role == "system" else []
    turns = messages[len(system) :]

    def fitting(start: int) -> Generator[Sequence[Message], Pieces, Pieces | None]:
        kept = system + turns[start:]
        if sum(len(message.content) for message in kept) > most_characters(limit):
            return None
        pieces = yield kept
        return pieces if sum(map(len, pieces)) <= limit else None

    if turns and (pieces := (yield from fitting(0))) is not None:
        return pieces
    starts = [] if whole else [i for i, turn in enumerate(turns) if i and turn.role == "user"]
    longest = None
    while starts:  # bisection, because a dialogue may have thousands of turns
        middle = len(starts) // 2
        pieces = yield from fitting(starts[middle])
        longest, starts = (longest, starts[middle + 1 :]) if pieces is None else (pieces, starts[:middle])
    fit.shortened += longest is not None
    fit.dropped += longest is None
    return longest


def _dialogue(tokenizer: Tokenizer, pieces: Pieces, last: list[int]) -> Example:
    """An example in which every assistant turn counts, each with its EOS if the template writes one. ``pieces`` are those of
    `_turns`, or the whole prompt; ``last`` is the response."""
    if len(pieces) == 1:
        return Example(pieces[0], last)
    response, counted = [], []
    for turn, others in zip(pieces[1::2], pieces[2::2], strict=True):
        closing = _closing(tokenizer, others)
        response += turn + others
        counted += [True] * len(turn) + [i == closing for i in range(len(others))]
    return Example(pieces[0], response + last, counted + [True] * len(last))


def encode_reply(tokenizer: Tokenizer, dialogue: Prompt, reply: Sequence[Message], *, closed: bool) -> list[int]:
    """Ids of what the chat template writes after the dialogue's last message, an assistant's turn, up to where the assistant
    answers the reply. With ``closed``, that turn already ended with EOS, so EOS is left out here.

    Raises:
      ConfigError: the template writes the turn differently once the dialogue continues.
    """
    *before, turn = dialogue.messages
    render = lambda messages: tokenizer.render(messages, add_generation_prompt=True, tools=dialogue.tools)  # noqa: E731
    whole = render([*dialogue.messages, *reply])
    _, end = _find_turn(tokenizer, whole, render(before), turn)
    ids = tokenizer.encode(whole[end:])
    place = _closing(tokenizer, ids)
    return ids[place + 1 :] if closed and place is not None else ids


def _turns(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """The rendered dialogue, ready for the assistant's next turn, cut where the assistant's turns begin and end: others' text and
    markup, an assistant's turn, ..., others' text and markup. The pieces are encoded separately, so that no token crosses a
    boundary, and each turn follows the ids that generation would start from."""
    text, start, pieces = tokenizer.render(messages, add_generation_prompt=True, tools=tools), 0, []
    for number, message in enumerate(messages):
        if message.role == "assistant":
            before = tokenizer.render(messages[:number], add_generation_prompt=True, tools=tools)
            begin, end = _find_turn(tokenizer, text, before, message)
            pieces += [text[start:begin], text[begin:end]]
            start = end
    return [*pieces, text[start:]]


def _closing(tokenizer: Tokenizer, ids: list[int]) -> int | None:
    """The index of a turn's EOS in the ids after the turn. None if there is none, or if more than white space precedes it."""
    place = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else None
    return None if place is None or tokenizer.decode(ids[:place]).strip() else place


def _find_turn(tokenizer: Tokenizer, text: str, before: str, turn: Message) -> tuple[int, int]:
    """Where the assistant's turn begins and ends in a rendered dialogue: right after the text ``before``. White space that the
    template adds before the turn or strips from it is not the assistant's. A turn that calls tools spans everything that the
    template writes before EOS.

    Raises:
      ConfigError: the turn is not there.
    """
    content = turn.content
    if turn.calls:
        end = text.find(tokenizer.eos_token, len(before)) if text.startswith(before) else -1
        written = text[len(before) : max(end, 0)]
        if all(call.name in written for call in turn.calls):
            return len(before), end
        content = f"a call of {turn.calls[0].name}, and '{tokenizer.eos_token}'"
    for form in (content, content.strip()):
        begin = text.find(form, len(before))
        if text.startswith(before) and begin >= 0 and not text[len(before) : begin].strip():
            return begin, begin + len(form)
    raise ConfigError(
        "This chat template writes an earlier assistant turn differently once the dialogue continues, so its tokens cannot be "
        f"identified: after {before[-40:]!r} comes {text[len(before) :][:40]!r} where {content[:40]!r} was expected. Set "
        "policy.tokenizer.chat_template to a template that writes all turns alike; SFT can do without, with "
        "sft.assistant_turns=last."
    )


def with_calls_as_text(tokenizer: Tokenizer, demonstration: Demonstration) -> Demonstration:
    """The demonstration with its tool calls as text in the response, as the chat template writes them.

    Raises:
      ConfigError: the template does not write them.
    """
    if not demonstration.calls:
        return demonstration
    prompt, answer = demonstration.prompt, Message("assistant", demonstration.response, demonstration.calls)
    before = tokenizer.render(prompt.messages, add_generation_prompt=True, tools=prompt.tools)
    text = tokenizer.render([*prompt.messages, answer], add_generation_prompt=False, tools=prompt.tools)
    begin, end = _find_turn(tokenizer, text, before, answer)
    return replace(demonstration, response=text[begin:end], calls=())


def encode_response(tokenizer: Tokenizer, response: str, limit: int, fit: Fit | None = None) -> list[int]:
    """Ids of the response with EOS, cut to ``limit``. A cut response is not finished, so it has no EOS. A response whose text
    already ends with EOS gets no second one."""
    return _encode_responses(tokenizer, [response], limit, fit or Fit())[0]


def _encode_responses(tokenizer: Tokenizer, responses: Sequence[str], limit: int, fit: Fit) -> list[list[int]]:
    texts = [_without_eos(tokenizer, response)[: most_characters(limit)] for response in responses]
    rows = [ids + [tokenizer.eos_id] for ids in tokenizer.encode_many(texts)]
    fit.cut += sum(len(ids) > limit for ids in rows)
    return [ids[:limit] for ids in rows]


def _without_eos(tokenizer: Tokenizer, response: str) -> str:
    text = response.rstrip()
    return text.removesuffix(tokenizer.eos_token) if text.endswith(tokenizer.eos_token) else response


def _count_odd(tokenizer: Tokenizer, prompt: Prompt, answers: Sequence[str], rows: Iterable[Sequence[int]], fit: Fit) -> None:
    """Count the item if its text spells a special token or has words that the tokenizer does not know. ``rows`` are its ids."""
    texts = [*(message.content for message in prompt.messages), *(_without_eos(tokenizer, answer) for answer in answers)]
    if token := next(filter(None, map(tokenizer.spelled, texts)), None):
        fit.special, fit.spelled = fit.special + 1, fit.spelled or token
    found = any(tokenizer.unknown_id in ids for ids in rows)  # the template may have written it
    if found and (words := [word for text in texts for word in tokenizer.unknown_words(text)]):
        fit.unknown, fit.word = fit.unknown + 1, fit.word or words[0]


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], lengths: Lengths, fit: Fit | None = None
) -> tuple[list[Prompt], list[list[int]]]:
    """The prompts that fit, and their ids.

    Raises:
      DataError: none fits.
    """
    fit = fit or Fit("prompts")
    fit.total = len(prompts)
    kept, borders = [], Borders(tokenizer, fit.what)
    for part in _parts(prompts):
        for prompt, ids in zip(part, _fitting_prompts(tokenizer, part, lengths.prompt, fit), strict=True):
            if ids is not None:
                kept.append((prompt, ids))
                borders.check(prompt)
                _count_odd(tokenizer, prompt, (), [ids], fit)
    report(fit, lengths)
    return [p for p, _ in kept], [ids for _, ids in kept]


def encode_demonstrations(
    tokenizer: Tokenizer, demonstrations: Sequence[Demonstration], lengths: Lengths, fit: Fit | None = None, *,
    every_turn: bool = False,
) -> list[Example]:  # fmt: skip
    """The demonstrations that fit, as examples. With ``every_turn``, earlier assistant turns of whole dialogues count too."""
    fit = fit or Fit("demonstrations")
    fit.total = len(demonstrations)
    examples, borders = [], Borders(tokenizer, fit.what)
    for given in _parts(demonstrations):
        part = [with_calls_as_text(tokenizer, demonstration) for demonstration in given]
        dialogues = [(d.prompt, _turns if every_turn and d.dialogue else _whole) for d in part]
        found = _fitting(tokenizer, dialogues, lengths.prompt, fit)
        kept = [(d, pieces) for d, pieces in zip(part, found, strict=True) if pieces is not None]
        responses = _encode_responses(tokenizer, [d.response for d, _ in kept], lengths.response, fit)
        for (demonstration, pieces), response in zip(kept, responses, strict=True):
            example = _dialogue(tokenizer, pieces, response)
            examples.append(example)
            borders.check(demonstration.prompt, [demonstration.response])
            rows = [example.prompt, example.response]
            _count_odd(tokenizer, demonstration.prompt, [demonstration.response], rows, fit)
    report(fit, lengths)
    return examples


def encode_comparisons(
    tokenizer: Tokenizer, comparisons: Sequence[Comparison], lengths: Lengths, fit: Fit | None = None
) -> list[tuple[list[Example], tuple[int, ...]]]:
    """For each comparison that fits, its completions as examples, and their ranks. A comparison whose completions are all cut to
    the same tokens teaches nothing and is left out."""
    fit = fit or Fit("comparisons")
    fit.total = len(comparisons)
    encoded, borders = [], Borders(tokenizer, fit.what)
    for part in _parts(comparisons):
        prompts = _fitting_prompts(tokenizer, [comparison.prompt for comparison in part], lengths.prompt, fit)
        kept = [(comparison, ids) for comparison, ids in zip(part, prompts, strict=True) if ids is not None]
        completions = [completion for comparison, _ in kept for completion in comparison.completions]
        responses = iter(_encode_responses(tokenizer, completions, lengths.response, fit))
        for comparison, ids in kept:
            rows = [Example(ids, next(responses)) for _ in comparison.completions]
            if all(row.response == rows[0].response for row in rows):
                fit.alike += 1
                continue
            encoded.append((rows, comparison.ranks))
            borders.check(comparison.prompt, comparison.completions)
            _count_odd(tokenizer, comparison.prompt, comparison.completions, [ids, *(row.response for row in rows)], fit)
    report(fit, lengths)
    return encoded


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], lengths: Lengths, fit: Fit | None = None) -> list[Example]:
    """Raw documents as examples. The prompt is BOS (or EOS) alone, the response is the document and EOS; together they are at
    most as long as a prompt and a response. Longer documents are cut, as in any pretraining, and special tokens may separate
    the parts of a document. Both are counted in ``fit`` but not logged, as are documents with unknown words."""
    limit, encoded, special = _text_lengths(lengths).response, list[list[int]](), 0
    for part in _parts(texts):
        documents = [text[: most_characters(limit)] for text in part]
        encoded += [ids[:limit] for ids in tokenizer.encode_many(documents) if ids]
        special += sum(tokenizer.spelled(document) is not None for document in documents)
    if fit is not None:
        fit.total, fit.cut = len(encoded), sum(len(ids) >= limit for ids in encoded)
        fit.special, fit.unknown = special, sum(tokenizer.unknown_id in ids for ids in encoded)
    return [Example([tokenizer.start_id], (ids + [tokenizer.eos_id])[:limit]) for ids in encoded]


def _parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """The items in parts that are encoded at once: enough for every core, few enough for memory."""
    return (items[part] for part in chunks(len(items), 1000))


def text_block(examples: Sequence[Example], tokenizer: Tokenizer, lengths: Lengths) -> Sequences:
    """Encoded raw documents as one block."""
    return block(examples, tokenizer, _text_lengths(lengths))


def _text_lengths(lengths: Lengths) -> Lengths:
    return Lengths(1, lengths.prompt + lengths.response - 1, lengths.multiple)


def block(examples: Sequence[Example], tokenizer: Tokenizer, lengths: Lengths, *, prompt_loss: bool = False) -> Sequences:
    """Examples as the rows of one block, padded to few shapes. With ``prompt_loss`` every token but the first counts (as N+
    trains its SFT): the prompt then moves into the response columns."""
    if prompt_loss:
        examples = prompts_count(examples)
        lengths = Lengths(1, lengths.prompt + lengths.response, lengths.multiple)
    longest = max(len(e.response) for e in examples)
    limit = lengths.response if longest <= lengths.response else lengths.prompt + lengths.response  # a dialogue: all its turns
    rows = pack(
        [e.prompt for e in examples],
        [e.response for e in examples],
        tokenizer.pad_id,
        prompt_columns=lengths.columns(max(len(e.prompt) for e in examples), lengths.prompt),
        response_columns=lengths.columns(longest, limit),
    )
    rows.mask[rows.response_mask] = [counts for e in examples for counts in e.counts]
    return rows


def packed_block(
    examples: Sequence[Example], tokenizer: Tokenizer, lengths: Lengths, *, prompt_loss: bool = False, rows_multiple: int | None
) -> Sequences:
    """`block`, but each row holds as many examples as fit into lengths.prompt + lengths.response tokens. The same tokens count.

    The number of rows differs from batch to batch, and XLA compiles for every new number. So rows that do not count are added,
    up to a multiple of ``rows_multiple`` or, if that is None, of an eighth of the power of two below the number of rows. This
    adds at most an eighth, and batches of one size come in very few shapes.
    """
    examples = prompts_count(examples) if prompt_loss else examples
    rows = share_rows(
        [e.prompt + e.response for e in examples],
        [[False] * len(e.prompt) + e.counts for e in examples],
        tokenizer.pad_id,
        lengths.prompt + lengths.response,
    )
    return rows.pad_rows(round_up(rows.rows, rows_multiple or max(1, 2 ** rows.rows.bit_length() // 16)))


def prompts_count(examples: Sequence[Example]) -> list[Example]:
    """Examples in which every token but the first counts: the prompt moves into the response."""
    return [Example(e.prompt[:1], e.prompt[1:] + e.response) for e in examples]


def token_weights(mask: np.ndarray, total: int) -> np.ndarray:
    """float32, 1 / total on each counted token, 0 elsewhere. ``total`` counts the tokens of the *whole* minibatch, so
    cutting it into micro-batches does not change the gradient."""
    return (mask / max(1, total)).astype(np.float32)
