"""Episodes of several turns: a policy and an environment in conversation, as rows of one block.

    columns   0 ...... P-1 | P .................................................. P+T-1
              the prompt   | a turn EOS  what the environment says  a turn EOS  pad pad
              mask         | T T  T   T   F F F F F F F F F F F F F   T T  T   T   F   F

A row holds the policy's tokens exactly as sampled and, between its turns, the text that the chat template writes there, encoded
separately. Nothing is tokenised twice: ids are not a function of text (the same word may be one token or several). T is the limit
of a row, for both sides together. The token in column t is drawn from the seed of column t. So an episode depends on its prompt,
its seeds, the policy and the environment, and not on the other rows.

An episode ends when the environment says so or says nothing, when the policy has used up its turns, when a turn reaches the
limit, or when the environment's messages do not fit (they are then left out).
"""

from __future__ import annotations

import math
import numbers
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from lockstep.config.schema import setting
from lockstep.errors import ConfigError, EnvironmentFailed, raised, told
from lockstep.interfaces import Environment, Episode, Reply, Resources, Responses, RewardModel
from lockstep.learning.randomness import hash32
from lockstep.learning.turns import Generate, Turns
from lockstep.text import encoding
from lockstep.text.encoding import Lengths
from lockstep.text.sequences import right_pad, width
from lockstep.text.stopping import Stops
from lockstep.types import Message, Prompt

MOST_MESSAGES = 16
"""The most messages in one reply."""

LEAST_DRAWN = 8
"""The fewest tokens to draw in a call, unless a turn may have fewer: it keeps the number of compiled shapes low."""


@dataclass(frozen=True)
class EnvironmentConfig:
    """The limits of a conversation; the configuration of an environment extends it."""

    turns: int = setting(4, "Maximum turns of the policy.", least=1)
    turn_tokens: int | None = setting(None, "Maximum tokens in one turn; null: what is left of lengths.response.", least=1)
    reply_tokens: int = setting(256, "Maximum tokens in a message of the environment; longer ones are cut.", least=1)
    at_once: int = setting(1, "How many replies to compute at the same time, each in a thread.", least=1, most=1024)
    timeout_seconds: float = setting(60.0, "Time limit for one reply.", above=0, most=86400)
    on_failure: Literal["raise", "drop"] = setting(
        "raise", "Stop the run; or drop: leave the episode out and report how many. A failure is never a reward."
    )


@dataclass
class Row:
    """One episode, with its ``number``. ``tokens``, ``counted`` and ``logprobs`` cover its response columns; ``counted`` is False
    for the environment's text. ``turn`` holds the ids of the policy's last turn. ``reward`` is NaN if the environment failed."""

    number: int
    episode: Episode
    prompt: list[int]
    seeds: np.ndarray
    tokens: list[int] = field(default_factory=list)
    counted: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    reward: float = 0.0
    finished: bool = False
    with_eos: bool = False
    over: bool = False

    @property
    def left(self) -> int:
        """The number of tokens left until the limit."""
        return len(self.seeds) - len(self.tokens)

    def more(self, limit: int) -> int:
        """The number of tokens that may still be drawn for a ``turn`` of at most ``limit``."""
        return min(self.left, limit) - len(self.turn)


def converse(
    generate: Generate, stops: Stops, lengths: Lengths, environment: Environment, prompts: Sequence[Prompt],
    prompt_ids: Sequence[Sequence[int]], seeds: np.ndarray, most: int, context_length: int,
) -> list[Row]:  # fmt: skip
    """Run an episode for each row of ``seeds`` uint32 [B, T], starting from that row's prompt. ``most`` rows, or a
    half, a quarter, ... of them, are generated at a time, so that few shapes are compiled. ``context_length`` is the policy's.

    Raises:
      EnvironmentFailed: there is no usable reply, and the configuration says to stop.
      ConfigError: the chat template cannot continue a dialogue.
    """
    own = hash32(hash32(seeds[:, 0]) ^ np.uint32(1))
    rows = [
        Row(number, Episode(prompt, int(seed)), list(ids), of_row)
        for number, (prompt, ids, of_row, seed) in enumerate(zip(prompts, prompt_ids, seeds, own, strict=True))
    ]
    turns = Turns(generate, stops.tokenizer.pad_id)
    begun: list[Row] = []
    try:
        for number in range(1, environment.config.turns + 1):
            talking = [row for row in rows if not row.over]
            if not talking:
                break
            take_turns(turns, stops, lengths, environment.config.turn_tokens, talking, most, context_length)
            talking = [row for row in talking if row.finished]
            begun = talking if number == 1 else begun
            for row, reply in zip(talking, replies(environment, [row.episode for row in talking]), strict=True):
                hear(row, reply, stops, environment.config, last=number == environment.config.turns)
    finally:
        for row in begun if environment.processes.leads else ():
            environment.close(row.episode)
    return rows


def offered(environment: Environment | None, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """The prompts, with the environment's tools added to those that name none."""
    if environment is None or not environment.tools:
        return prompts
    return [prompt if prompt.tools else replace(prompt, tools=environment.tools) for prompt in prompts]


def take_turns(
    turns: Turns, stops: Stops, lengths: Lengths, turn_tokens: int | None, rows: Sequence[Row], most: int, context_length: int
) -> None:
    """Generate the policy's next turn in each episode: in one call, or in several if one row's context leaves no room for the
    tokens that another may still draw."""
    limit = min(turn_tokens or len(rows[0].seeds), len(rows[0].seeds))
    for row in rows:
        row.turn = []
    drawing = rows
    while drawing:
        draw(turns, lengths, limit, drawing, most, context_length)
        drawing = [row for row in drawing if row.more(limit) > 0 and row.turn[-1] not in stops.ids]
    drawn = [row.turn[: min(row.left, limit)] for row in rows]
    ended = stops.end(*right_pad(drawn, stops.tokenizer.pad_id, max(map(len, drawn))))
    for i, row in enumerate(rows):
        row.turn = ended.tokens[i][ended.mask[i]].tolist()
        row.finished = bool(ended.finished[i])
        row.with_eos = row.finished and not ended.without_eos[i]
        row.over = not row.finished
        row.tokens += row.turn
        row.counted += [True] * len(row.turn)
        row.logprobs = row.logprobs[: len(row.tokens)]
        row.episode.messages.append(Message("assistant", ended.texts[i]))


def draw(turns: Turns, lengths: Lengths, limit: int, rows: Sequence[Row], most: int, context_length: int) -> None:
    """Draw more of each row's turn, up to ``limit`` tokens, as far as the policy's context has room after the longest row."""
    contexts = [row.prompt + row.tokens + row.turn for row in rows]
    longest, most_columns = max(map(len, contexts)), lengths.prompt + len(rows[0].seeds)
    columns = lengths.columns(longest, most_columns if rows[0].tokens or rows[0].turn else lengths.prompt)
    wanted = max(row.more(limit) for row in rows)
    count = min(width(wanted, LEAST_DRAWN), limit, max(context_length, most_columns) - longest)
    seeds = np.zeros((len(rows), count), np.uint32)
    for i, row in enumerate(rows):
        here = row.seeds[len(row.tokens) + len(row.turn) :][:count]
        seeds[i, : len(here)] = here
    while most % 2 == 0 and most // 2 >= len(rows):
        most //= 2
    filled = [*range(len(rows)), *[0] * (most - len(rows))]
    drawn = turns.next([rows[i].number for i in filled], [contexts[i] for i in filled], seeds[filled], columns)
    for i, row in enumerate(rows):
        here = drawn.mask[i]
        row.turn += drawn.tokens[i][here].tolist()
        row.logprobs += drawn.logprobs[i][here].tolist()


def hear(row: Row, reply: Reply | None, stops: Stops, config: EnvironmentConfig, *, last: bool) -> None:
    """Apply the environment's reply to an episode whose turn is finished; None: the environment failed."""
    row.reward += math.nan if reply is None else float(reply.reward)
    row.over = reply is None or reply.done or not reply.messages or last
    if reply is None or row.over:
        return
    tokenizer, episode = stops.tokenizer, row.episode
    said = [_cut(tokenizer.broken_up(message.content), tokenizer, config.reply_tokens) for message in reply.messages]
    messages = [replace(message, content=text) for message, text in zip(reply.messages, said, strict=True)]
    dialogue = replace(episode.prompt, messages=(*episode.prompt.messages, *episode.messages))
    ids = encoding.encode_reply(tokenizer, dialogue, messages, closed=row.with_eos)
    if len(ids) >= row.left:
        row.over, row.finished = True, False
        return
    episode.messages += messages
    row.tokens += ids
    row.counted += [False] * len(ids)
    row.logprobs += [0.0] * len(ids)


def _cut(text: str, tokenizer: Any, most: int) -> str:
    text = text[: encoding.most_characters(most)]
    ids = tokenizer.encode(text)
    return text if len(ids) <= most else tokenizer.decode(ids[:most])


# -------------------------------------------------------------------------------------------------------------- replies


def replies(environment: Environment, episodes: Sequence[Episode]) -> list[Reply | None]:
    """The environment's replies in a batch, else those of `in_threads`, which runs on process 0 for all processes."""
    if (together := environment.replies(episodes)) is not None:
        return [checked(reply) for reply in together]
    if environment.processes.count == 1:
        return in_threads(environment, episodes)
    found = environment.processes.share(
        lambda: [
            each and ([(m.role, m.content) for m in each.messages], float(each.reward), bool(each.done))
            for each in in_threads(environment, episodes)
        ]
    )
    return [each and Reply(tuple(Message(*said) for said in each[0]), *each[1:]) for each in found]


def in_threads(environment: Environment, episodes: Sequence[Episode]) -> list[Reply | None]:
    """A reply to each episode, ``at_once`` at a time; None for an episode that failed and is left out. Python cannot stop a call
    that has timed out: it keeps running in its thread, and another thread takes over.

    Raises:
      EnvironmentFailed: there is no usable reply, and the configuration says to stop.
    """
    config: EnvironmentConfig = environment.config
    waiting, found = iter(enumerate(episodes)), queue.SimpleQueue[tuple[int, Reply | Exception]]()
    lock, started = threading.Lock(), dict[int, float]()

    def work() -> None:
        while True:
            with lock:
                number, episode = next(waiting, (None, None))
                if number is None or episode is None:
                    return
                started[number] = time.monotonic()
            try:
                found.put((number, checked(environment.reply(episode))))
            except Exception as error:
                found.put((number, error))
            except BaseException as error:  # sys.exit, which would end the thread silently
                found.put((number, EnvironmentFailed(raised(error))))

    def another() -> None:
        threading.Thread(target=work, name="environment", daemon=True).start()

    for _ in range(min(config.at_once, len(episodes))):
        another()
    answers: dict[int, Reply | None] = {}
    while len(answers) < len(episodes):
        for number, answer in _arrived(found, started, answers, config.timeout_seconds):
            if number in answers:
                continue  # it timed out earlier
            if answer is None:
                answer = EnvironmentFailed(f"no reply within environment.timeout_seconds={config.timeout_seconds:g}")
                another()
            if isinstance(answer, Exception) and config.on_failure == "raise":
                raise EnvironmentFailed(f"The environment {type(environment).__name__} failed: {_reason(answer)}") from answer
            answers[number] = None if isinstance(answer, Exception) else answer
    return [answers[number] for number in range(len(episodes))]


def _arrived(
    found: queue.SimpleQueue[tuple[int, Reply | Exception]], started: dict[int, float], answers: dict[int, Any], limit: float
) -> Iterator[tuple[int, Reply | Exception | None]]:
    """The next answer, or None for each episode that has timed out."""
    pending = [begun for number, begun in list(started.items()) if number not in answers]
    wait = min(pending, default=time.monotonic()) + limit - time.monotonic()
    try:
        yield found.get(timeout=max(0.0, wait))
    except queue.Empty:
        now = time.monotonic()
        late = [number for number, begun in list(started.items()) if number not in answers and now - begun >= limit]
        yield from ((number, None) for number in late)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, EnvironmentFailed) else raised(error)


def checked(reply: Any) -> Reply:
    """Return the reply.

    Raises:
      EnvironmentFailed: it is not a usable `Reply`.
    """
    if not isinstance(reply, Reply):
        raise EnvironmentFailed(f"it replied with {told(reply)}. A reply is a lockstep.interfaces.Reply.")
    number = isinstance(reply.reward, numbers.Real) and not isinstance(reply.reward, bool) and math.isfinite(reply.reward)
    if not number:
        raise EnvironmentFailed(f"it gave the reward {told(reply.reward)}. A reward is a finite number.")
    if len(reply.messages) > MOST_MESSAGES:
        raise EnvironmentFailed(f"it said {len(reply.messages)} messages at once. {MOST_MESSAGES} is the most.")
    for message in reply.messages:
        if not isinstance(message, Message) or message.role not in ("user", "tool") or not isinstance(message.content, str):
            raise EnvironmentFailed(f"it said {told(message)}. What it says is messages with the role 'user' or 'tool'.")
    return reply


class EnvironmentReward(RewardModel):
    """The sum of the rewards that the environment gave during an episode."""

    needs_environment = True

    @dataclass(frozen=True)
    class Config:
        """No settings."""

    def __init__(self, config: Config | None = None, resources: Resources | None = None):
        pass

    def score(self, responses: Responses) -> np.ndarray:
        if responses.rewards is None:
            raise ConfigError("reward_model=environment scores episodes, and these responses are none. Set environment=...")
        return responses.rewards
