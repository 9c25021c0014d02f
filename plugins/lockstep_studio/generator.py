"""Generates policies' answers for many readers. One thread owns the models. It draws waiting requests for the same policy and
temperature as one batch. Batches take turns, a token at a time, so a new reader does not wait for another's long answer. If a
reader leaves, their answer stops; a batch without readers ends.

An answer depends only on its messages, seed, temperature and limit, not on the rest of the batch. It is the same as that of
``lockstep.load(...).chat(messages, seed=...)``.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lockstep.errors import DataError, LockstepError
from lockstep.learning.randomness import token_seeds
from lockstep.text.encoding import encode_prompt
from lockstep.text.sequences import left_pad, round_up
from lockstep.text.stopping import Stops
from lockstep.types import Message, Prompt
from lockstep_studio.store.people import Refused

log = logging.getLogger("lockstep")

COLUMNS = 64
"""Prompts are padded to a multiple of this: XLA compiles every new shape."""
STREAMS = 4
"""The most batches that take turns."""
FAILED = "The policy failed; the operator's log says why."


@dataclass(frozen=True)
class Request:
    policy: str
    messages: tuple[Message, ...]
    seed: int
    temperature: float
    max_tokens: int


@dataclass(frozen=True)
class Piece:
    """An event of an answer: more ``text``; or its end ('done', 'stopped', 'failed'), with a reason if it failed; or its place in
    the queue, with ``ahead`` others before it."""

    text: str = ""
    ended: str | None = None
    reason: str = ""
    ahead: int | None = None


class Speaker(Protocol):
    """A policy that answers several requests at once. Each step gives every request a piece; closing the iterator stops it."""

    def speak(self, requests: Sequence[Request]) -> Iterator[Sequence[Piece]]: ...


class Ticket:
    """A submitted request. Read `pieces` on the event loop that submitted it."""

    def __init__(self, request: Request):
        self.request, self.text = request, ""
        self.cancelled = self.over = False
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()

    def tell(self, piece: Piece) -> None:
        """Pass a piece to the reader, from any thread."""
        self.over = self.over or piece.ended is not None
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        except RuntimeError:  # the server stopped meanwhile
            self.cancelled = True

    def cancel(self) -> None:
        self.cancelled = True

    async def pieces(self, heartbeat: float = 10.0) -> AsyncIterator[Piece]:
        """Yield pieces until the answer has ended; an empty piece whenever nothing came for ``heartbeat`` seconds."""
        while True:
            try:
                piece = await asyncio.wait_for(self._pieces.get(), heartbeat)
            except TimeoutError:
                piece = Piece()
            self.text += piece.text
            yield piece
            if piece.ended is not None:
                return


@dataclass(eq=False)
class _Stream:
    """A batch in progress."""

    policy: str
    tickets: list[Ticket]
    steps: Iterator[Sequence[Piece]]
    last: list[Ticket] = field(default_factory=list)

    def step(self) -> bool:
        """Draw a token for every row; return False once the batch is over."""
        for ticket in self.tickets:
            if ticket.cancelled and not ticket.over:
                ticket.tell(Piece(ended="stopped"))
        if all(ticket.over for ticket in self.tickets):
            return False
        pieces = next(self.steps, None)
        for ticket, piece in zip(self.tickets, pieces or [Piece(ended="done")] * len(self.tickets), strict=True):
            if not ticket.over and (piece.text or piece.ended):
                ticket.tell(piece)
        return pieces is not None


class Generator:
    """The queue of requests, and the thread that answers them.

    Args:
      opened: makes the speaker of a policy; called on the thread.
      batch: the most answers in a batch.
      loaded: speakers kept in memory.
      most: requests that may wait.
    """

    def __init__(self, opened: Callable[[str], Speaker], *, batch: int = 16, loaded: int = 3, most: int = 400):
        self._open, self.batch, self.loaded, self.most = opened, batch, loaded, most
        self._waiting: deque[Ticket] = deque()
        self._speakers: OrderedDict[str, Speaker] = OrderedDict()
        self._streams: list[_Stream] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="studio-generator", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Ticket:
        """Queue a request.

        Raises:
          Refused: too many requests wait already.
        """
        ticket = Ticket(request)
        with self._changed:
            if len(self._waiting) >= self.most:
                raise Refused("Too many people are waiting for an answer. Try again in a minute.", 503)
            self._waiting.append(ticket)
            ticket.tell(Piece(ahead=len(self._waiting) - 1))
            self._changed.notify()
        return ticket

    @property
    def load(self) -> dict[str, int]:
        """How many answers are waiting, and how many are being written."""
        with self._changed:
            writing = sum(not ticket.over for stream in self._streams for ticket in stream.tickets)
            return {"waiting": len(self._waiting), "writing": writing}

    def close(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout=30)

    # ------------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self._waiting or self._streams):
                    self._changed.wait()
                if self._stopping:
                    break
                batch = self._next() if len(self._streams) < STREAMS else []
            if batch:
                self._begin(batch)
            for stream in list(self._streams):
                self._advance(stream)
        for ticket in [*self._waiting, *(ticket for stream in self._streams for ticket in stream.tickets)]:
            ticket.tell(Piece(ended="stopped"))

    def _next(self) -> list[Ticket]:
        """Take the first request, and those that can be drawn with it, from the queue. Tell the others their new place."""
        for ticket in [ticket for ticket in self._waiting if ticket.cancelled]:
            self._waiting.remove(ticket)
            ticket.tell(Piece(ended="stopped"))
        if not self._waiting:
            return []
        kind = lambda ticket: (ticket.request.policy, ticket.request.temperature)  # noqa: E731
        first = kind(self._waiting[0])
        batch = [ticket for ticket in self._waiting if kind(ticket) == first][: self.batch]
        for ticket in batch:
            self._waiting.remove(ticket)
        for ahead, ticket in enumerate(self._waiting):
            ticket.tell(Piece(ahead=ahead))
        return batch

    def _begin(self, batch: list[Ticket]) -> None:
        policy = batch[0].request.policy
        try:
            steps = self._speaker(policy).speak([ticket.request for ticket in batch])
        except Exception as error:
            self._fail(batch, error)
            return
        self._streams.append(_Stream(policy, batch, steps))

    def _advance(self, stream: _Stream) -> None:
        try:
            going = stream.step()
        except Exception as error:
            self._fail(stream.tickets, error)
            going = False
        if not going:
            self._streams.remove(stream)
            if close := getattr(stream.steps, "close", None):
                close()

    def _speaker(self, policy: str) -> Speaker:
        if policy not in self._speakers:
            used = {stream.policy for stream in self._streams}
            for old in [name for name in self._speakers if name not in used][: max(0, len(self._speakers) + 1 - self.loaded)]:
                del self._speakers[old]
            self._speakers[policy] = self._open(policy)
        self._speakers.move_to_end(policy)
        return self._speakers[policy]

    def _fail(self, tickets: Sequence[Ticket], error: Exception) -> None:
        """End the answers as failed. All readers are told the same, since the error may name the policy."""
        if isinstance(error, LockstepError):
            log.error("The policy %s failed: %s", tickets[0].request.policy, error)
        else:
            log.exception("The generator failed.", exc_info=error)
        for ticket in tickets:
            if not ticket.over:
                ticket.tell(Piece(ended="failed", reason=FAILED))


# ------------------------------------------------------------------------------------------------------- a real policy


class PolicySpeaker:
    """A `lockstep.api.policies.ChatPolicy` as a speaker."""

    def __init__(self, policy: Any):
        self.chat, self.stops = policy, Stops(policy.tokenizer)

    def speak(self, requests: Sequence[Request]) -> Iterator[Sequence[Piece]]:
        context, tokenizer = self.chat.policy.context_length, self.chat.tokenizer
        limits = [min(request.max_tokens, context // 2) for request in requests]
        prompts = [self._encoded(request, context - max(limits)) for request in requests]
        rows = [number for number, ids in enumerate(prompts) if ids is not None]
        answers = [_Answer(tokenizer, limit, self.stops.ids, ids is None) for limit, ids in zip(limits, prompts, strict=True)]
        found = [(requests[number], prompts[number]) for number in rows]
        steps = self._columns(found, max(limits)) if rows else iter(())
        while not all(answer.over for answer in answers):
            column = next(steps, ())
            tokens = dict(zip(rows, column, strict=False))  # a column may have more rows, which `_columns` adds
            yield [answer.piece(tokens.get(number)) for number, answer in enumerate(answers)]

    def _columns(self, found: Sequence[tuple[Request, Any]], limit: int) -> Iterator[np.ndarray]:
        """Yield each row's next token, int32 [B]. B is a power of two; the rows after those of ``found`` repeat the first."""
        context, pad_id = self.chat.policy.context_length, self.chat.tokenizer.pad_id
        filled = [*found, *[found[0]] * ((1 << (len(found) - 1).bit_length()) - len(found))]
        prompts = [ids for _, ids in filled]
        columns = min(round_up(max(map(len, prompts)), COLUMNS), context - limit)
        tokens, mask = left_pad(prompts, pad_id, columns)
        seeds = np.concatenate([token_seeds(request.seed, "chat", 0, 1, limit) for request, _ in filled])
        how: dict[str, Any] = {"temperature": found[0][0].temperature, "stop_ids": self.stops.ids, "pad_id": pad_id}
        steps: Iterator[np.ndarray] = self.chat.policy.stream(tokens, mask, seeds, **how)
        return steps

    def _encoded(self, request: Request, limit: int) -> list[int] | None:
        """The tokens of the prompt; None if they do not fit within ``limit``."""
        tokenizer = self.chat.tokenizer
        if tokenizer.chat_template is None:
            ids = [tokenizer.start_id, *tokenizer.encode(request.messages[-1].content)]
            return ids if len(ids) <= limit else None
        try:
            return encode_prompt(tokenizer, Prompt(request.messages), limit)
        except DataError:
            return None


class _Answer:
    """A row's text as it grows. An incomplete character is held back until it is complete."""

    def __init__(self, tokenizer: Any, limit: int, stop_ids: Sequence[int], too_long: bool):
        self.tokenizer, self.limit, self.stop_ids, self.too_long = tokenizer, limit, set(stop_ids), too_long
        self.ids: list[int] = []
        self.shown, self.over = 0, False

    def piece(self, token: int | None) -> Piece:
        if self.over:
            return Piece()
        if self.too_long:
            self.over = True
            return Piece(ended="failed", reason="The message is too long for this policy.")
        stopped = token is None or token in self.stop_ids
        if not stopped:
            self.ids.append(int(token or 0))
        self.over = stopped or len(self.ids) == self.limit
        text = self.tokenizer.decode(self.ids)
        certain = len(text) if self.over else len(text.rstrip("\ufffd"))
        fresh = text[self.shown : certain]
        self.shown = max(self.shown, certain)
        return Piece(fresh, "done" if self.over else None)
