"""The stages of an experiment, checked: one function for what all kinds of stage share, and one for each kind.

A stage trains (``algorithm``), evaluates (``evaluation``), collects labels (``collection``) or attacks (``attack``).
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lockstep.config.root import ConfigGroup, component_name
from lockstep.config.schema import parse
from lockstep.data.mixture import TWINS
from lockstep.errors import ConfigError, did_you_mean, listing
from lockstep.runs.attacks import AttackConfig
from lockstep.runs.collection import CollectionConfig
from lockstep.runs.components import Chosen, Components
from lockstep.runs.evaluation import EvaluationConfig
from lockstep.runs.rounds import SEEDS_APART, Scope
from lockstep.runs.stages import MIXED, NEW, Kind, Stage, StageConfig

log = logging.getLogger("lockstep")

KINDS: Mapping[Kind, str] = {"train": "algorithm", "evaluate": "evaluation", "collect": "collection", "attack": "attack"}
"""{kind: the key that makes a stage one of it}."""


def checked_stage(
    name: str, group: ConfigGroup, scope: Scope, number: int, *, components: Components, engine: Chosen | None, run_seed: int,
    before: Mapping[str, Stage],
) -> Stage | None:  # fmt: skip
    """The stage that a group describes; None if it is left out.

    Args:
      scope: what the names of stages mean in it.
      number: its round, from 1.
      components: resolves its components.
      engine: that of the run; a stage that samples nothing has none.
      run_seed: the run's seed, from which the stage's own follows.
      before: the stages before it.

    Raises:
      LockstepError: something is wrong with it.
    """
    given, where = parse(StageConfig, group, f"stages.{name}"), f"stages.{name}"
    kinds = [kind for kind, key in KINDS.items() if getattr(given, key) is not None]
    if len(kinds) != 1:
        raise ConfigError(f"{where} needs one of algorithm, evaluation, collection and attack.")
    if given.algorithm and given.only_if and given.only_if not in given.algorithm:
        log.info("no stage %s: %s has no %s", name, component_name(given.algorithm, f"{where}.algorithm"), given.only_if)
        return None
    seed = run_seed + given.seed_offset + SEEDS_APART * (number - 1)
    if not 0 <= seed < 2**63:
        raise ConfigError(f"{where}.seed_offset={given.seed_offset} makes the seed {seed}. It must be from 0 to 2**63 - 1.")
    scorers = tuple(components.scorers(given.reward_model))
    if given.environment is None and (needy := next((s for s in scorers if s.component.needs_environment), None)):
        raise ConfigError(
            f"{where}: reward_model={needy.group['name']} scores episodes with an environment, and the stage has none. "
            "Choose one: environment=NAME."
        )
    base = Stage(
        name=name,
        kind=kinds[0],
        reward_model=given.reward_model,
        scorers=scorers,
        seed=seed,
        environment=components.if_any("environment", given.environment),
        engine=engine,
        scope=scope,
        round=number,
        mixes=mixes(given, scope, where),
    )
    refuse_keys_of_other_kinds(given, where)
    if given.algorithm is not None:
        stage = training_stage(base, given, given.algorithm, components)
    elif given.evaluation is not None:
        stage = evaluation_stage(base, given.evaluation, components, before)
    elif given.collection is not None:
        stage = collection_stage(base, given, given.collection, components)
    else:
        stage = attack_stage(base, given, given.attack or {}, components)
    check_inputs(stage, group, before)
    return stage


def training_stage(base: Stage, given: StageConfig, algorithm: ConfigGroup, components: Components) -> Stage:
    where = base.where
    chosen = components.of("algorithm", _merge(algorithm, given.changes or {}, f"{where}.changes"), f"{where}.algorithm")
    cls, name = chosen.component, chosen.group["name"]
    if cls.needs_reward_model and given.reward_model is None:
        raise ConfigError(f"{where} ({name}) needs a reward_model.")
    if given.policy is None:
        raise ConfigError(f"{where} needs a policy to start from: '{NEW}' or an earlier stage.")
    if given.environment is not None and not cls.takes_environment:
        raise ConfigError(f"{where} ({name}) takes no environment. Remove {where}.environment.")
    samples = cls.traits(chosen.config).data == "prompts"
    policy, engine = base.scope.one(given.policy, where), base.engine if samples else None
    return replace(base, component=cls, config=chosen.config, group=chosen.group, policy=policy, engine=engine)


def evaluation_stage(base: Stage, group: ConfigGroup, components: Components, before: Mapping[str, Stage]) -> Stage:
    where, scope = base.where, base.scope
    given = parse(EvaluationConfig, group, f"{where}.evaluation")
    named = [policy for each in given.policies or () for policy in scope.all(each)]
    trained = [stage.name for stage in before.values() if stage.produces == "policy"]
    splits = [each for split in given.splits for each in scope.all(split)]
    attacked = tuple(split for split in splits if split in before)
    whole = group | {
        "policies": named or trained,
        "baseline": scope.one(given.baseline, where),
        "splits": [each for split in splits for each in (split, *([split + TWINS] if split in attacked else []))],
    }
    config = parse(EvaluationConfig, whole, f"{where}.evaluation")
    judges = [scorer for judge in config.judges.values() for scorer in components.scorers(judge)]
    if config.best_of and base.reward_model is None:
        raise ConfigError(f"{where}: best_of={config.best_of} ranks by a reward_model. Name one, or set it to 0.")
    last = {policy: _of_last_round(policy, before) for policy in config.policies or ()}
    follows = {policy: other for policy, other in last.items() if other is not None and other in last}
    scorers = (*base.scorers, *judges)
    compared = config.comparisons and not any(scorer.component.needs_environment for scorer in base.scorers)
    compares = base.scorers if compared else ()
    return replace(base, config=config, group=whole, scorers=scorers, follows=follows, attacked=attacked, compares=compares)


def collection_stage(base: Stage, given: StageConfig, group: ConfigGroup, components: Components) -> Stage:
    where = base.where
    config = parse(CollectionConfig, group, f"{where}.collection")
    policies = _stages_named(given.policies or (), base.scope)
    if not policies:
        raise ConfigError(f"{where} collects responses of no policy. Name stages: {where}.policies=[sft].")
    if len(policies) > config.samples:
        raise ConfigError(
            f"{where}: {len(policies)} policies share collection.samples={config.samples} responses to a prompt. Raise it to "
            f"{len(policies)} or name fewer policies: {', '.join(policies)}."
        )
    if given.environment is not None:
        raise ConfigError(f"{where} collects single responses, without an environment. Remove {where}.environment.")
    if given.labeler is None:
        raise ConfigError(f"{where} has no labeler. Choose who ranks: labeler=people, or labeler=scores for a reward model.")
    own = {"collection": group, "policies": list(policies)}
    return replace(_with(base, "labeler", given.labeler, components), config=config, group=own, policies=policies)


def attack_stage(base: Stage, given: StageConfig, group: ConfigGroup, components: Components) -> Stage:
    where = base.where
    config = parse(AttackConfig, group, f"{where}.attack")
    policies = _stages_named(given.policies or (), base.scope)
    if not policies:
        raise ConfigError(f"{where} attacks no policy. Name stages: {where}.policies=[sft].")
    if given.reward_model is None:
        raise ConfigError(f"{where} needs a judge, a reward model that says whether an attack succeeded: {where}.reward_model.")
    if given.environment is not None:
        raise ConfigError(f"{where} attacks without an environment. Remove {where}.environment.")
    if given.attacker is None:
        raise ConfigError(f"{where} has no attacker. Choose who writes the attacks: attacker=templates or attacker=policy.")
    own = {"attack": given.attack, "policies": list(policies)}
    return replace(_with(base, "attacker", given.attacker, components), config=config, group=own, policies=policies)


# -------------------------------------------------------------------------------------------------- what kinds share


def mixes(given: StageConfig, scope: Scope, where: str) -> dict[str, dict[str, float | None]]:
    """{noun: {source: its share, or None}} of what the stage reads in place of the data's."""
    mixed = {noun: names for noun in MIXED if (names := getattr(given, noun))}
    if given.shares is not None and [len(names) for names in mixed.values()] != [len(given.shares)]:
        raise ConfigError(f"{where}.shares={list(given.shares)} needs as many sources, in comparisons or in demonstrations.")
    if mixed and given.algorithm is None and not (given.collection and set(mixed) == {"prompts"}):
        raise ConfigError(f"{where} trains nothing, so it takes no {listing(mixed)}. Remove the key.")
    return {noun: _sources(names, given.shares, scope) for noun, names in mixed.items()}


def refuse_keys_of_other_kinds(given: StageConfig, where: str) -> None:
    """
    Raises:
      ConfigError: a key belongs to another kind of stage.
    """
    if given.collection is None and given.labeler is not None:
        raise ConfigError(f"{where} has a labeler, which only a collection has. Remove it.")
    if given.attack is None and given.attacker is not None:
        raise ConfigError(f"{where} has an attacker, and no attack. Write attack: {{}}, or remove it.")
    if given.policies is not None and given.collection is None and given.attack is None:
        raise ConfigError(f"{where} has policies, which collections and attacks have. Remove them.")


def check_inputs(stage: Stage, group: ConfigGroup, before: Mapping[str, Stage]) -> None:
    """
    Raises:
      ConfigError: it reads a stage that does not come before it or makes something else, or a folder that does not exist.
    """
    where = stage.where
    for source, kind in stage.inputs:
        if not source:
            empty = listing(f"{where}.{key}" for key in _empty(group))
            raise ConfigError(f"{where} reads a stage or a folder, and the key that names it is empty: {empty}.")
        if source in before:
            if kind not in before[source].provides:
                made = before[source].produces
                raise ConfigError(f"{where} needs a {kind} from the stage '{source}', which makes a {made}.")
        elif not Path(source).is_dir() and not ((opened := (source, kind) in stage.declared) and is_hub_id(source)):
            hub = f" A public {kind.replace('_', ' ')} is a folder or a hub id, owner/name." if opened else ""
            raise ConfigError(
                f"{where} reads the stage '{source}', which does not come before it."
                f"{did_you_mean(source, before)} Before it: {listing(before)}.{hub}"
            )


def _with(base: Stage, kind: Literal["labeler", "attacker"], group: ConfigGroup, components: Components) -> Stage:
    """The stage with a component, and with the reward models that this combines."""
    chosen = components.of(kind, group)
    own: dict[str, Any] = {kind: chosen}
    return replace(base, scorers=(*base.scorers, *components.members(chosen)), **own)


def _of_last_round(name: str, before: Mapping[str, Stage]) -> str | None:
    """The stage that ``last.STAGE`` means in a stage of rounds."""
    if (stage := before.get(name)) is None:
        return None
    (last,) = stage.scope.all(f"last.{name.removesuffix(f'_{stage.round}')}") or (None,)
    return last


def _stages_named(names: Sequence[str], scope: Scope) -> tuple[str, ...]:
    """The distinct stages that the names mean, in order."""
    return tuple(dict.fromkeys(stage for name in names for stage in scope.all(name)))


def _empty(group: Mapping[str, Any]) -> Iterator[str]:
    """The keys whose value is, or contains, an empty string."""
    for key, value in group.items():
        if isinstance(value, Mapping):
            yield from (f"{key}.{inner}" for inner in _empty(value))
        elif value == "" or (isinstance(value, (list, tuple)) and "" in value):
            yield key


def _sources(names: Sequence[str], shares: Sequence[float] | None, scope: Scope) -> dict[str, float | None]:
    """{source: its share}. A name that means several stages divides its share among them; a stage that several names mean has
    the sum of their shares."""
    found: dict[str, float | None] = {}
    for name, share in itertools.zip_longest(names, shares or ()):
        stages = scope.all(name)
        for stage in stages:
            found[stage] = None if share is None else (found.get(stage) or 0) + share / len(stages)
    return found


def is_hub_id(source: str) -> bool:
    """True for owner/name. False if ``owner`` is a local folder: ``source`` is then taken for a path that does not exist."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None and not Path(source).parent.is_dir()


def _merge(group: ConfigGroup, changes: ConfigGroup, where: str) -> ConfigGroup:
    """``group`` with ``changes`` merged in. Raises ConfigError if a change has an unknown key."""
    if unknown := [k for k in changes if k not in group]:
        raise ConfigError(f"Unknown key {where}.{unknown[0]}.{did_you_mean(str(unknown[0]), group)} Known: {listing(group)}.")
    return {
        key: _merge(value, changes[key], f"{where}.{key}") if isinstance(value, dict) and isinstance(changes.get(key), dict)
        else changes.get(key, value)
        for key, value in group.items()
    }  # fmt: skip
