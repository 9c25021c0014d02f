"""The nouns of RLHF: what people write, rank and ask.

Frozen and made of plain Python, so every backend, plugin and process shares them. Anything tokenised is in
``text/sequences.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """What an assistant's message asks a tool to do: ``arguments`` is JSON, an object."""

    name: str
    arguments: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True)
class Message:
    """``calls`` are those of an assistant's message in data, for a chat template to write. A policy writes its own as text."""

    role: Role
    content: str
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A dialogue waiting for the assistant's next turn: its last message is not the assistant's.

    ``truth`` is what the data source knows about the prompt (the gold answer, the task's family). Gold scores read it; a
    model must never see it. ``tools`` are the JSON schemas of the tools that it may call, which chat templates write.
    """

    messages: tuple[Message, ...]
    truth: Mapping[str, Any] = field(default_factory=dict, compare=False)
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    @classmethod
    def of(cls, text: str, **truth: Any) -> Prompt:
        """A prompt of one user message."""
        return cls((Message("user", text),), truth)


@dataclass(frozen=True)
class Goal:
    """What an attack is after: that the assistant helps with ``text``, as a request words it ("poison a cake").

    ask: how an attacker is told of it.
    truth: that of the prompts which pursue it.
    twin: a harmless goal that fits into the same words, as XSTest's contrasts do (Röttger et al. 2024, arXiv 2308.01263).
    """

    text: str
    ask: str
    truth: Mapping[str, Any] = field(default_factory=dict, compare=False)
    twin: Goal | None = None

    def prompt(self) -> Prompt:
        """For an attacker. Its truth is ``goal`` and, under ``pursued``, the goal's: a gold score of an attack means nothing."""
        return Prompt((Message("user", self.ask),), {"goal": self.text, "pursued": dict(self.truth)})


@dataclass(frozen=True)
class Demonstration:
    """What a person wrote as the response to a prompt, and the tools that it calls. In a ``dialogue`` the assistant's earlier
    turns in the prompt are demonstrations too."""

    prompt: Prompt
    response: str
    dialogue: bool = False
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """K completions of one prompt with their ranks: 0 is best, equal ranks are a tie. A chosen/rejected pair is K=2.
    ``group`` is the labeler's: those with one training, one expertise or one culture."""

    prompt: Prompt
    completions: tuple[str, ...]
    ranks: tuple[int, ...]
    labeler: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        if len(self.completions) < 2 or len(self.completions) != len(self.ranks):
            raise ValueError(
                f"a comparison needs at least two completions and one rank for each, "
                f"not {len(self.completions)} completions and {len(self.ranks)} ranks"
            )


@dataclass(frozen=True)
class Candidates:
    """Responses to one prompt that wait for a labeler. ``policies`` says which wrote each, by the identity of its stage, ``seed``
    what they were sampled with, and ``scores`` what a reward model thinks of each: no labeler may see these before the label is
    given."""

    id: str
    prompt: Prompt
    completions: tuple[str, ...]
    policies: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Choice:
    """One item of a test: which option is the right continuation of a raw text? ``answer`` is the place of the best one,
    ``right`` has the places of all that are right; empty: only that. Results are shown for each ``group`` too."""

    context: str
    options: tuple[str, ...]
    answer: int
    right: tuple[int, ...] = ()
    group: str | None = None


@dataclass
class Fit:
    """What length limits did to one data set, counted during encoding: items ``dropped`` because their last prompt alone is
    too long, items ``shortened`` by removing their oldest turns, and responses ``cut``, which then have no EOS. Also comparisons
    ``alike``, left out because all their completions are cut to the same tokens, and items whose own text spells a special token
    (``special``; one of them is ``spelled``), which the model reads as that token."""

    what: str = "examples"
    total: int = 0
    dropped: int = 0
    shortened: int = 0
    cut: int = 0
    alike: int = 0
    special: int = 0
    spelled: str = ""

    def counts(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}
