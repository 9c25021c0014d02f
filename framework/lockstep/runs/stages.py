"""One stage of an experiment: its configuration, and its inputs once every name is resolved."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lockstep.config.root import ConfigGroup
from lockstep.config.schema import setting
from lockstep.data.mixture import DATA, GOALS
from lockstep.interfaces import Algorithm, DataSource
from lockstep.runs.components import Chosen
from lockstep.runs.evaluation import EvaluationConfig
from lockstep.runs.reward_model_accuracy import rehearse_on_comparisons
from lockstep.runs.rounds import Scope

NEW = "new"
"""Named in place of a policy: the configured policy, untrained."""

Kind = Literal["train", "evaluate", "collect", "attack"]

MIXED = ("prompts", "comparisons", "demonstrations")
"""The kinds of data for which a stage may name sources other than the data's own."""


@dataclass(frozen=True)
class StageConfig:
    """A stage trains (``algorithm``), evaluates (``evaluation``), collects labels (``collection``) or attacks (``attack``)."""

    algorithm: ConfigGroup | None = setting(None, "The group of the algorithm that trains.")
    policy: str | None = setting(None, "The policy to start from: 'new' for the configured one, or an earlier stage.")
    reward_model: ConfigGroup | None = setting(None, "The group of the reward model, if the stage needs one.")
    environment: ConfigGroup | None = setting(None, "The group of the environment, for training and evaluation.")
    changes: ConfigGroup | None = setting(None, "Keys of the algorithm that differ in this stage.")
    evaluation: ConfigGroup | None = setting(None, "The group of the evaluation.")
    collection: ConfigGroup | None = setting(None, "The group of the collection.")
    labeler: ConfigGroup | None = setting(None, "The group of the labeler of a collection.")
    attack: ConfigGroup | None = setting(None, "The group of the attacks.")
    attacker: ConfigGroup | None = setting(None, "The group of the attacker; reward_model judges the attacks.")
    policies: tuple[str, ...] | None = setting(
        None, "In a collection: the stages, folders or 'new' whose policies respond in turn. In attacks: those attacked."
    )
    prompts: tuple[str, ...] | None = setting(
        None,
        "Sources of prompts in place of the data's: stages that attack, folders, 'data' and, for attackers, 'goals'.",
    )
    comparisons: tuple[str, ...] | None = setting(
        None, "Sources of comparisons in place of the data's: stages that collect, folders, and 'data' for the data's own."
    )
    demonstrations: tuple[str, ...] | None = setting(None, "The same for demonstrations.")
    shares: tuple[float, ...] | None = setting(None, "Share of an epoch, per source; null: each row appears once.", above=0)
    only_if: str | None = setting(None, "A key that the algorithm must have; otherwise the stage is left out.")
    seed_offset: int = setting(0, "Added to the run's seed, for stages that differ in nothing else.", least=-math.inf)


@dataclass(frozen=True)
class Stage:
    """One checked stage.

    component, config: the algorithm and its ``Config``. If the stage does not train: None, and the configuration of its kind,
      such as `EvaluationConfig`.
    group: the configuration group from which, or from a part of which, ``config`` was parsed.
    scorers: its reward model, with its members; then the members of its labeler or attacker, or an evaluation's judges.
    engine: the engine that draws its responses; None: the policy does.
    scope: resolves the names of other stages in it. ``round`` is the number of its round, from 1.
    mixes: {noun: {source: its share, or None}}, if it names sources other than the data's own.
    policies: of a collection or of attacks. ``follows`` is, for an evaluation, {policy: the one of the previous round}.
    attacked: for an evaluation, the stages whose attacks are its splits. ``compares`` are those of ``scorers`` that it tests on
      held-out comparisons.
    """

    name: str
    kind: Kind
    reward_model: ConfigGroup | None
    scorers: tuple[Chosen, ...]
    seed: int
    component: type[Algorithm] | None = None
    config: Any = None
    group: ConfigGroup = field(default_factory=dict)
    policy: str | None = None
    environment: Chosen | None = None
    engine: Chosen | None = None
    scope: Scope = Scope()
    round: int = 1
    mixes: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    policies: tuple[str, ...] = ()
    follows: Mapping[str, str] = field(default_factory=dict)
    labeler: Chosen | None = None
    attacker: Chosen | None = None
    attacked: tuple[str, ...] = ()
    compares: tuple[Chosen, ...] = ()

    @property
    def where(self) -> str:
        """What errors call it."""
        return f"stages.{self.name}"

    @property
    def produces(self) -> str:
        return self.component.produces if self.component else PRODUCES[self.kind]

    @property
    def provides(self) -> tuple[str, ...]:
        """The kinds of input that its output can be."""
        return ("prompts", "demonstrations") if self.kind == "attack" else (self.produces,)

    def arithmetic(self, data: DataSource) -> str:
        """What one step consumes and how many steps there are, in one line.

        Raises:
          LockstepError: the data lack what it needs, or a component does not work here. Raised before any model is loaded.
        """
        self.check()
        if self.component:
            return self.component.arithmetic(self.config, data)
        return self.config.arithmetic(data)

    def check(self) -> None:
        """Check all its components, the algorithm included. `Experiment.check` covers what stages share.

        Raises:
          LockstepError: a component does not work here.
        """
        for each in self._components:
            each.component.check(each.config)

    def rehearse(self, data: DataSource) -> None:
        """Try the reward models on the data, without loading models.

        Raises:
          LockstepError: a reward model would fail on the data.
        """
        for scorer in self.scorers:
            scorer.component.rehearse(scorer.config, data)
        for scorer in self.compares:
            rehearse_on_comparisons(scorer, data, self.config.comparisons)

    def scorer(self, group: Mapping[str, Any]) -> Chosen:
        """The one of ``scorers`` with this group."""
        return next(each for each in self.scorers if each.group == group)

    @property
    def modules(self) -> list[str]:
        """The modules whose code decides its result: those of its classes, their bases, and functions named module:function."""
        classes = [base for each in self._components for base in each.component.__mro__]
        named = [text.partition(":")[0] for each in self._components for text in _texts(each.group) if FUNCTION.fullmatch(text)]
        return [*(cls.__module__ for cls in classes), *named]

    @property
    def inputs(self) -> list[tuple[str, str]]:
        """The stages (or folders, or hub ids) whose output it reads, each with the kind required."""
        return [each for each in self._sources if each != (NEW, "policy")]

    @property
    def reads_new(self) -> bool:
        """True if it uses the configured policy, untrained."""
        return (NEW, "policy") in self._sources

    @property
    def policies_read(self) -> list[str]:
        """The policies that it trains, evaluates, samples or attacks."""
        evaluated = [*(self.config.policies or ()), self.config.baseline] if isinstance(self.config, EvaluationConfig) else []
        return [policy for policy in (self.policy, *self.policies, *evaluated) if policy is not None]

    @property
    def _sources(self) -> list[tuple[str, str]]:
        mixed = [(source, noun) for noun, sources in self.mixes.items() for source in sources if source not in (DATA, GOALS)]
        read = [(source, "prompts") for source in self.attacked]
        return [*((name, "policy") for name in self.policies_read), *self.declared, *mixed, *read]

    @property
    def declared(self) -> list[tuple[str, str]]:
        """The ``inputs`` that its components open themselves."""
        named = [source for each in self._components for source in each.component.inputs(each.config).outputs.items()]
        return [
            (source, kind) for name, kind in named
            for source in (self.scope.all(name) if kind == "prompts" else (self.scope.one(name, self.where),))
        ]  # fmt: skip

    @property
    def files(self) -> list[str]:
        """Local files and folders that it reads."""
        return [file for each in self._components for file in each.component.inputs(each.config).files]

    @property
    def _components(self) -> list[Chosen]:
        return [*([Chosen(self.component, self.config, self.group)] if self.component else []), *self._surrounding]

    @property
    def _surrounding(self) -> list[Chosen]:
        """All components but the algorithm."""
        return [*self.scorers, *filter(None, (self.environment, self.engine, self.labeler, self.attacker))]


FUNCTION = re.compile(r"[^\W\d][\w.]*:\w+")


def _texts(value: Any) -> Iterator[str]:
    """The texts in a configuration group, at every depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


PRODUCES = {"evaluate": "evaluation", "collect": "comparisons", "attack": "attacks"}
"""{kind: what a stage produces}, for stages without an algorithm."""
