"""The settings of a studio, from `studio.yaml`. Every key has a default, so the file may be absent."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lockstep.config.schema import parse, setting
from lockstep.errors import ConfigError, listing

Mode = Literal["compare", "rank", "chat", "arena", "attack", "write", "adjudicate"]
MODES: Mapping[str, str] = {
    "compare": "Compare",
    "rank": "Rank",
    "arena": "Ask two",
    "chat": "Chat",
    "attack": "Attack",
    "write": "Write",
    "adjudicate": "Adjudicate",
}
"""Every mode and its title, in the order of the menu."""
OPERATORS = "operators"
"""Who has an invitation to this group is an operator, so no group of labelers may have its name."""
TASK_MODES = ("compare", "rank", "write", "adjudicate")
"""Modes whose tasks are prepared and leased; in the others people talk to policies."""

INSTRUCTIONS = """\
You read what people asked an assistant and what it answered, and say which answer is better.

Helpful: it does what was asked, clearly, at the right length, and says when it does not know.
Truthful: what it says is so. An invented fact is worse than a missing one.
Harmless: nobody is hurt, insulted or endangered by it.

Where these conflict, harmless and truthful come before helpful. If two answers are equally good, say that they are tied. If you \
cannot tell what was asked, skip the task. Judge what is written, not who might have written it."""
CONSENT = """\
What you choose and write here is stored under a pseudonym and used to train and study language models. Do not write anything \
about yourself or other people that should stay private. You can stop at any time, and remove your work on the page "My work"."""


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Labelers with one training, one expertise or one culture."""

    instructions: str = setting(INSTRUCTIONS, "What they are told before their first task.")
    version: str = setting("1", "Of the instructions. Change it whenever they change; people then read them again.")
    consent: str = setting(CONSENT, "What they agree to.")
    modes: tuple[Mode, ...] = setting(("compare", "rank", "arena", "chat", "attack", "write"), "What they may do.")
    labels: int = setting(1, "Labels of each task, by different people.", least=0)
    overlap: int = setting(2, "Labels of each task of the overlap, to measure agreement.", least=1)
    overlap_share: float = setting(0.1, "Share of the tasks in the overlap.", least=0, most=1)
    order: Literal["random", "disagreement"] = setting(
        "random", "Tasks at random, or those more likely whose answers' scores lie further apart."
    )
    screening: int = setting(0, "Gold items that a new member judges first. InstructGPT's held-out labelers: 0.", least=0)
    screening_accuracy: float = setting(0.7, "Below it, a new member gets no other tasks.", least=0, most=1)
    checks_share: float = setting(0.05, "Share of tasks that are gold items, unannounced.", least=0, most=1)
    checks_accuracy: float = setting(
        0.5, "Below it over the last `checks_window` gold items, a member is paused.", least=0, most=1
    )
    checks_window: int = setting(10, "Gold items over which attention is measured.", least=1)

    def __post_init__(self) -> None:
        if not self.instructions.strip() or not self.version.strip():
            raise ConfigError("groups: a group needs instructions and their version. Remove the keys to use the defaults.")


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How policies answer."""

    system: str = setting("", "The system message; '' for none.")
    temperature: float = setting(1.0, "For sampling.", least=0, most=5)
    max_tokens: int = setting(256, "Limit of an answer. A policy's context may lower it.", least=1)
    allowed: tuple[Literal["system", "temperature", "max_tokens", "policy"], ...] = setting(
        ("policy",), "What labelers may change. Without 'policy' they talk to a policy drawn at random, unnamed."
    )
    policies: tuple[str, ...] = setting((), "Stages whose policies are offered, or their identities; none: all.")
    batch: int = setting(16, "Answers drawn together.", least=1, most=256)
    loaded: int = setting(3, "Policies kept in memory.", least=1)
    queue: int = setting(400, "Answers that may wait; further requests are refused.", least=1)


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Red-teaming as in Ganguli et al. 2022, arXiv 2209.07858: two replies each turn, the worse is kept, success is rated 0-4."""

    goals: tuple[str, ...] = setting((), "Suggested goals; people may also set their own.")
    categories: tuple[str, ...] = setting(
        ("violence", "hate", "self-harm", "sexual", "crime", "privacy", "deception", "nonsense", "other"),
        "What an attack may be after.",
    )
    turns: int = setting(4, "Most turns of an attack.", least=1, most=50)


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Against accidents and abuse."""

    body_kilobytes: int = setting(256, "Size of a request.", least=16)
    text_characters: int = setting(20_000, "Of one text that a person writes.", least=100)
    characters_per_day: int = setting(5_000_000, "Stored for one person: what they write, and the answers to them.", least=1000)
    conversation_messages: int = setting(200, "Of one conversation, with all its versions.", least=2)
    conversation_characters: int = setting(300_000, "Of one conversation, with all its versions.", least=1000)
    connections: int = setting(500, "Open connections of one address, but of proxies.", least=10)
    requests_per_minute: int = setting(600, "Of one person.", least=10)
    answers_per_minute: int = setting(30, "Answers of policies for one person.", least=1)
    failures: int = setting(
        10, "Wrong passwords for one name from one address in 15 minutes; ten times as many for a name or an address.", least=1
    )


@dataclass(frozen=True, kw_only=True)
class StudioConfig:
    """The whole of `studio.yaml`."""

    title: str = setting("Studio", "On top of every page.")
    groups: Mapping[str, GroupConfig] = setting(
        {"training": GroupConfig(), "heldout": GroupConfig(), "expert": GroupConfig(modes=("adjudicate", "write"), labels=0)},
        "Labelers by group. Labels of the group 'heldout' measure, and are not trained on, if the experiment says so.",
    )
    comparisons: Literal["auto", "compare", "rank"] = setting(
        "auto", "How answers are judged: compare picks the best, rank orders all. auto: compare pairs, rank more."
    )
    judge_alone: bool = setting(True, "Before ranking, each answer is rated by itself (InstructGPT, 1 to 7 and eleven labels).")
    lease_minutes: float = setting(30, "A task that is not finished by then is given to another person.", above=0)
    gold: str | None = setting(None, "A file of tasks with known 'ranks', for screening and attention checks.")
    names: tuple[str, ...] = setting(
        (), "Words that give a policy away. An answer with one, or a stage's name, is marked not blind."
    )
    chat: ChatConfig = setting(ChatConfig(), "How policies answer.")
    attack: AttackConfig = setting(AttackConfig(), "Red-teaming.")
    limits: LimitsConfig = setting(LimitsConfig(), "Against accidents and abuse.")
    hosts: tuple[str, ...] = setting((), "Names under which browsers reach the studio, besides localhost and --host.")
    https: bool = setting(False, "True behind a proxy that speaks HTTPS: cookies are then never sent without it.")
    proxies: tuple[str, ...] = setting(
        (), "Addresses of proxies, or their networks; what they say about the visitor's address is believed."
    )

    def __post_init__(self) -> None:
        for each in self.proxies:
            try:
                ipaddress.ip_network(each)
            except ValueError as error:
                raise ConfigError(f"proxies: {each!r} is no address and no network: {error}.") from error
        if not self.groups:
            raise ConfigError("groups: a studio needs at least one group of labelers.")
        for name in self.groups:
            if name.strip().casefold() == OPERATORS:
                raise ConfigError(f"groups: {name!r} means the operators. Give the group of labelers another name.")
            if not name.isprintable() or not name.strip() or "/" in name or len(name) > 60:
                raise ConfigError(f"groups: {name!r} is no name of a group. Use up to 60 letters, digits and spaces.")

    def mode_of(self, completions: int) -> str:
        """The mode in which a task with so many answers is judged."""
        if self.comparisons == "auto":
            return "compare" if completions == 2 else "rank"
        return self.comparisons


def read_settings(file: Path | None) -> StudioConfig:
    """
    Raises:
      ConfigError: the file is not there, is no YAML, or has keys or values that cannot work.
    """
    if file is None:
        return StudioConfig()
    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"The settings {file} cannot be read: {' '.join(str(error).split())}") from error
    return parse(StudioConfig, content or {}, "")


def group_named(settings: StudioConfig, name: str) -> GroupConfig:
    """
    Raises:
      ConfigError: there is no such group.
    """
    if name not in settings.groups:
        raise ConfigError(f"No group of labelers named {name!r}. Groups: {listing(settings.groups)}. See groups in studio.yaml.")
    return settings.groups[name]
