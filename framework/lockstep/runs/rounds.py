"""Rounds: stages that repeat, each round starting from the results of the previous one.

    stages:
      sft: ...
      rounds:
        repeat: 3
        first: {ppo: sft}
        stages:
          labels: {collection: "${collection}", labeler: "${labeler}", policies: [last.ppo, sft]}
          reward: {algorithm: "${reward}", policy: sft, comparisons: [data, all.labels]}
          ppo: {algorithm: "${algorithm}", policy: sft, reward_model: "${reward_model}"}

makes the stages labels_1, reward_1, ppo_1, labels_2, ... `Scope` defines how stages inside a round, and stages after the last
round, name other stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lockstep.config.root import ConfigGroup
from lockstep.config.schema import REQUIRED, parse, setting
from lockstep.errors import ConfigError, did_you_mean, listing, short
from lockstep.storage.names import checked_name

SEEDS_APART = 1_000_000
"""The difference between a stage's seeds in consecutive rounds."""


@dataclass(frozen=True)
class RoundsConfig:
    """A group of stages that repeats."""

    repeat: int = setting(REQUIRED, "Number of rounds.", least=1, most=1000)
    stages: Mapping[str, ConfigGroup] = setting(REQUIRED, "Stages by name, in the order they run in each round.")
    first: Mapping[str, str] = setting({}, "What `last.STAGE` means in the first round.")


@dataclass(frozen=True)
class Scope:
    """The stages that a name refers to, depending on where it is used:

    | name | stage |
    |---|---|
    | ppo | this round's |
    | last.ppo | the previous round's; in the first round, what ``first`` says |
    | all.ppo | those of all rounds so far |

    After the rounds, the first two both mean the final round's. Any other name means itself.
    """

    names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __or__(self, inner: Scope) -> Scope:
        return Scope({**self.names, **inner.names})

    def all(self, name: str) -> tuple[str, ...]:
        return tuple(self.names.get(name, (name,)))

    def one(self, name: str, where: str) -> str:
        """The only stage that the name means.

        Raises:
          ConfigError: the name means several stages, or none.
        """
        found = self.all(name)
        if not found and name.startswith("last."):
            stage = name.removeprefix("last.")
            raise ConfigError(
                f"{where} reads '{short(name)}', which means no stage in the first round. Say what it means there: "
                f"first: {{{short(stage)}: sft}}."
            )
        if len(found) != 1:
            raise ConfigError(
                f"{where} reads '{short(name)}', which means {len(found)} stages ({listing(found)}). Name one of them."
            )
        return found[0]


def in_rounds(name: str, group: ConfigGroup) -> Iterator[tuple[str, ConfigGroup, Scope, int]]:
    """(name, group, scope, round) of each stage of a repeating group, in order. A final entry, with an empty name and group, has
    the scope of the stages after it.

    Raises:
      ConfigError: the group is wrong.
    """
    rounds = parse(RoundsConfig, group, f"stages.{name}")
    if not rounds.stages:
        raise ConfigError(f"stages.{name}.stages has no stage to repeat.")
    for stage in rounds.stages:
        checked_name("The stage name", stage, ("new", "data"))
    if unknown := [stage for stage in rounds.first if stage not in rounds.stages]:
        raise ConfigError(
            f"stages.{name}.first has '{short(unknown[0])}', which is no stage of these rounds."
            f"{did_you_mean(unknown[0], rounds.stages)} Stages: {listing(rounds.stages)}."
        )
    for number in range(1, rounds.repeat + 1):
        for position, (stage, each) in enumerate(rounds.stages.items()):
            yield f"{stage}_{number}", each, _scope(rounds, number, position), number
    yield "", {}, _scope(rounds, rounds.repeat, len(rounds.stages), after=True), rounds.repeat


def _scope(rounds: RoundsConfig, number: int, position: int, after: bool = False) -> Scope:
    """The scope of the stage at ``position`` of a round. A stage before it in the round is already made in this round."""
    names: dict[str, list[str]] = {}
    for i, stage in enumerate(rounds.stages):
        made = number if i < position else number - 1
        so_far = [f"{stage}_{n}" for n in range(1, made + 1)]
        names[f"all.{stage}"] = so_far
        if number > 1 or after:
            names[f"last.{stage}"] = [f"{stage}_{number if after else number - 1}"]
        else:
            names[f"last.{stage}"] = [rounds.first[stage]] if stage in rounds.first else []
        if i < position:
            names[stage] = so_far[-1:]
    return Scope(names)
