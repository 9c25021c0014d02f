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
"""An invitation to this group makes an operator, so no group of labelers may have this name."""
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
    """A group of labelers who share a training, an expertise or a culture."""

    instructions: str = setting(INSTRUCTIONS, "Text that members read before their first task.")
    version: str = setting("1", "Version of instructions and consent. Change it when they change; people then read them again.")
    consent: str = setting(CONSENT, "Text that members agree to.")
    modes: tuple[Mode, ...] = setting(("compare", "rank", "arena", "chat", "attack", "write"), "What members may do.")
    labels: int = setting(1, "Labels per task, by different people.", least=0)
    overlap: int = setting(2, "Labels per task in the overlap, to measure agreement.", least=1)
    overlap_share: float = setting(0.1, "Share of the tasks that are in the overlap.", least=0, most=1)
    order: Literal["random", "disagreement"] = setting(
        "random", "random: all tasks equally likely; disagreement: likelier, the further apart the scores of the answers lie."
    )
    screening: int = setting(0, "Gold items that a new member judges first; 0 for InstructGPT's held-out labelers.", least=0)
    screening_accuracy: float = setting(0.7, "New members who score less on gold items get no other tasks.", least=0, most=1)
    checks_share: float = setting(0.05, "Share of tasks that are unannounced gold items.", least=0, most=1)
    checks_accuracy: float = setting(
        0.5, "Members who score less over the last `checks_window` gold items are paused.", least=0, most=1
    )
    checks_window: int = setting(10, "Gold items over which attention is measured.", least=1)

    def __post_init__(self) -> None:
        if not self.instructions.strip() or not self.version.strip():
            raise ConfigError("groups: a group needs instructions and their version. Remove the keys to use the defaults.")


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How policies answer."""

    system: str = setting("", "The system message; '' for none.")
    temperature: float = setting(1.0, "Sampling temperature.", least=0, most=5)
    max_tokens: int = setting(256, "Most tokens of an answer, and at most half of the policy's context.", least=1)
    allowed: tuple[Literal["system", "temperature", "max_tokens", "policy"], ...] = setting(
        ("policy",), "What labelers may change. Without 'policy' they talk to an unnamed policy drawn at random."
    )
    policies: tuple[str, ...] = setting((), "Policies to offer, by stage or identity; empty: all.")
    batch: int = setting(16, "Most answers drawn as one batch.", least=1, most=256)
    loaded: int = setting(3, "Policies kept in memory.", least=1)
    queue: int = setting(400, "Answers that may wait; further requests are refused.", least=1)


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Red-teaming as in Ganguli et al. 2022, arXiv 2209.07858: two replies each turn, the worse is kept, success is rated 0-4."""

    goals: tuple[str, ...] = setting((), "Suggested goals; people may also set their own.")
    categories: tuple[str, ...] = setting(
        ("violence", "hate", "self-harm", "sexual", "crime", "privacy", "deception", "nonsense", "other"),
        "Kinds of harm that an attack may aim at.",
    )
    turns: int = setting(4, "Most turns of an attack.", least=1, most=50)


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Limits against accidents and abuse."""

    body_kilobytes: int = setting(256, "Largest body of a request, in units of 1024 bytes.", least=16)
    text_characters: int = setting(20_000, "Characters of one text that a person writes.", least=100)
    characters_per_day: int = setting(5_000_000, "Stored per person: what they write, and the answers to them.", least=1000)
    conversation_messages: int = setting(200, "Messages of one conversation, in all its branches.", least=2)
    conversation_characters: int = setting(300_000, "Characters of one conversation, in all its branches.", least=1000)
    connections: int = setting(500, "Open connections of one address; proxies have no limit.", least=10)
    requests_per_minute: int = setting(600, "Requests of one visitor.", least=10)
    answers_per_minute: int = setting(30, "Policies' answers to one person.", least=1)
    failures: int = setting(
        10, "Wrong passwords in 15 minutes for one name from one address; ten times as many for one name or one address.", least=1
    )


@dataclass(frozen=True, kw_only=True)
class StudioConfig:
    """All settings in `studio.yaml`."""

    title: str = setting("Studio", "Title at the top of every page.")
    groups: Mapping[str, GroupConfig] = setting(
        {"training": GroupConfig(), "heldout": GroupConfig(), "expert": GroupConfig(modes=("adjudicate", "write"), labels=0)},
        "Groups of labelers. If the experiment says so, labels of the group 'heldout' only measure and are not trained on.",
    )
    comparisons: Literal["auto", "compare", "rank"] = setting(
        "auto", "How answers are judged: compare picks the best, rank orders all. auto: compare pairs, rank more."
    )
    judge_alone: bool = setting(True, "Whether each answer is rated alone before ranking (InstructGPT: 1 to 7, eleven labels).")
    lease_minutes: float = setting(30, "Minutes until an unfinished task is given to another person.", above=0)
    gold: str | None = setting(None, "A file of tasks with known 'ranks', for screening and attention checks.")
    names: tuple[str, ...] = setting(
        (), "Words that give a policy away. Labels of answers with such a word, or a stage's name, are marked as not blind."
    )
    chat: ChatConfig = setting(ChatConfig(), "How policies answer.")
    attack: AttackConfig = setting(AttackConfig(), "Red-teaming.")
    limits: LimitsConfig = setting(LimitsConfig(), "Limits against accidents and abuse.")
    hosts: tuple[str, ...] = setting((), "Names under which browsers reach the studio, besides localhost and --host.")
    https: bool = setting(False, "True behind a proxy that speaks HTTPS: cookies are then never sent without it.")
    proxies: tuple[str, ...] = setting((), "Addresses or networks of proxies, which are trusted to report the visitor's address.")

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
        """The mode in which a task with this many answers is judged."""
        if self.comparisons == "auto":
            return "compare" if completions == 2 else "rank"
        return self.comparisons


def read_settings(file: Path | None) -> StudioConfig:
    """The settings in a file; without a file, the defaults.

    Raises:
      ConfigError: the file is missing or is not YAML, or has invalid keys or values.
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
