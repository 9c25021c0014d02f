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
    """A call of a tool in an assistant's message. ``arguments`` is a JSON object."""

    name: str
    arguments: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True)
class Message:
    """One message of a dialogue. ``calls`` are the tool calls of an assistant's message in data, which a chat template writes. A
    policy writes its own calls as text."""

    role: Role
    content: str
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A dialogue waiting for the assistant's next turn: its last message is not the assistant's.

    ``truth`` is what the data source knows about the prompt (the gold answer, the task's family). Gold scores read it; a
    model must never see it. ``tools`` are the JSON schemas of the tools that a model may call; chat templates write them.
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
    """The goal of an attack: that the assistant helps with ``text``, worded as in a request ("poison a cake").

    ask: the message that tells an attacker the goal.
    truth: the ``truth`` of the prompts that pursue the goal.
    twin: a harmless goal that fits into the same words, as XSTest's contrasts do (Röttger et al. 2024, arXiv 2308.01263).
    """

    text: str
    ask: str
    truth: Mapping[str, Any] = field(default_factory=dict, compare=False)
    twin: Goal | None = None

    def prompt(self) -> Prompt:
        """The prompt for an attacker. Its truth has the goal's text as ``goal`` and the goal's truth under ``pursued``: a gold
        score of an attack means nothing."""
        return Prompt((Message("user", self.ask),), {"goal": self.text, "pursued": dict(self.truth)})


@dataclass(frozen=True)
class Demonstration:
    """A response that a person wrote to a prompt, and its tool calls. In a ``dialogue`` the assistant's earlier turns in the
    prompt are demonstrations too."""

    prompt: Prompt
    response: str
    dialogue: bool = False
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """K completions of one prompt with their ranks: 0 is best, equal ranks are a tie. A chosen/rejected pair is K=2.
    ``group`` is the labeler's group: labelers who share a training, an expertise or a culture."""

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
    """Responses to one prompt that wait for a labeler. ``policies`` names the policy that wrote each, by its stage's identity;
    ``seed`` is the seed they were sampled with, and ``scores`` are a reward model's scores. No labeler may see these before the
    label is given."""

    id: str
    prompt: Prompt
    completions: tuple[str, ...]
    policies: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Choice:
    """One item of a test: which option is the right continuation of a raw text? ``answer`` is the index of the best option.
    ``right`` has the indices of all right options, or is empty if only the best is right. Results are shown for each ``group``
    too."""

    context: str
    options: tuple[str, ...]
    answer: int
    right: tuple[int, ...] = ()
    group: str | None = None


@dataclass
class Fit:
    """What length limits did to one data set, counted during encoding: items ``dropped`` because their last prompt alone is
    too long, items ``shortened`` by removing their oldest turns, and responses ``cut``, which then have no EOS. Also comparisons
    ``alike``, left out because all their completions are cut to the same tokens, and ``special`` items, whose own text spells a
    special token, which the model reads as that token. ``spelled`` is the first such token. And ``unknown`` items, with words
    that the tokenizer does not know, so that the model reads its unknown token. ``word`` is the first such word."""

    what: str = "examples"
    total: int = 0
    dropped: int = 0
    shortened: int = 0
    cut: int = 0
    alike: int = 0
    special: int = 0
    spelled: str = ""
    unknown: int = 0
    word: str = ""

    def counts(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}
