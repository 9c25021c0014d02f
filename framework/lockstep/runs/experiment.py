"""An experiment, composed once: every name is resolved and every group checked before anything is loaded. It knows what its
stages read and what identifies them, and is passed down unchanged.

    compose (config/compose.py)   overrides -> one plain dictionary, the configuration
    Experiment                    the configuration -> checked stages, their identities and folders
    Assembly                      a stage -> backend, tokenizer, models, algorithm, on first use
    Runner                        stages in order: reuse, resume, record
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.config.root import ConfigGroup, check_groups, completed, component_config, component_name
from lockstep.config.schema import parse
from lockstep.config.secrets import without_secrets
from lockstep.data.mixture import TWINS
from lockstep.errors import CheckpointError, ConfigError, did_you_mean, listing, short
from lockstep.models.checkpoint import context_of
from lockstep.registry import registry
from lockstep.runs import identity
from lockstep.runs.attacks import AttackConfig
from lockstep.runs.collection import CollectionConfig
from lockstep.runs.evaluation import EvaluationConfig
from lockstep.runs.rounds import SEEDS_APART, Scope, in_rounds
from lockstep.runs.stages import MIXED, NEW, Chosen, Stage, StageConfig
from lockstep.runs.store import RunFolder, StageFolder, decisive
from lockstep.storage.names import NOT_RUNS, checked_name, in_a_name, root_folder
from lockstep.storage.records import RUN, STAGES, read_record
from lockstep.text.encoding import Lengths
from lockstep.text.templates import template_text
from lockstep.text.tokenizer import TokenizerConfig

log = logging.getLogger("lockstep")


NAMELESS: Mapping[str, type[Any]] = {"evaluation": EvaluationConfig, "collection": CollectionConfig, "attack": AttackConfig}
"""{key: class} for groups of the root that choose no component."""


class Experiment:
    """``config`` with every name resolved and every group checked.

    Raises:
      LockstepError: something is wrong; the first error is raised before anything is loaded.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config = completed(config)
        check_groups(config)
        self.seed: int = config["seed"]
        for key, cls in NAMELESS.items():
            if config[key] is not None:
                parse(cls, config[key], key)
        self.backend_name: str = config["backend"]["name"]
        self.backend = self._component("backend", config["backend"])
        self.data = self._component("data", config["data"])
        self.policy = self._component("policy", config["policy"])
        self.tracker = self._component("tracker", config["tracker"])
        self.engine = self._chosen_if_any("engine", config["engine"])
        self.stages: dict[str, Stage] = {}
        for name, group, scope, number in _in_order(config["stages"]):
            if name in self.stages:
                raise ConfigError(f"Two stages are called '{short(name)}', one of them in rounds. Rename either.")
            if stage := self._stage(name, group, scope, number):
                self._check_context(stage)
                self.stages[name] = stage
        if config["environment"] is not None and not any(stage.environment for stage in self.stages.values()):
            raise ConfigError(
                f"No stage uses environment={config['environment']['name']}. Give a stage whose algorithm samples the line "
                'environment: "${environment}", or set environment=null.'
            )
        if config["engine"] is not None and not any(stage.engine for stage in self.stages.values()):
            raise ConfigError(f"No stage samples, so none uses engine={config['engine']['name']}. Set engine=null.")
        if not self.stages:
            raise ConfigError("The experiment has no stages. Choose one that has: experiment=instructgpt.")
        if (objective := config["objective"]) is not None:
            self._check_objective(objective)

    @property
    def name(self) -> str:
        return run_name(self.config)

    @property
    def root(self) -> Path:
        """Where runs and stages are kept."""
        return root_folder(self.config["folder"])

    @property
    def tokenizer(self) -> TokenizerConfig:
        """The policy's; a path of None means the data source's tokenizer."""
        cls, config = self.policy
        return cls.tokenizer_config(config)

    @functools.cached_property
    def identities(self) -> dict[str, ConfigGroup]:
        """{stage: everything that decides its result}: configuration, inputs, data, code. The hash of this names its folder.
        Secrets are left out: another token for the same server gives the same stage."""
        found: dict[str, ConfigGroup] = {}
        source, config = self.data
        data = without_secrets(self.config["data"]) | {"fingerprint": source.fingerprint(config)}
        common = [base.__module__ for cls in (self.backend[0], self.policy[0], source) for base in cls.__mro__]
        template = self.tokenizer.chat_template
        is_file = template is not None and template.endswith(".jinja")
        tokenizer = dataclasses.replace(self.tokenizer, chat_template=template_text(template) if is_file else template)
        for stage in self.stages.values():
            found[stage.name] = {
                "stage": without_secrets(stage.group),
                "reward_model": without_secrets(stage.reward_model),
                "environment": without_secrets(_group(stage.environment)),
                "engine": without_secrets(identity.without_server(_group(stage.engine))),
                "labeler": without_secrets(_group(stage.labeler)),
                "attacker": without_secrets(_group(stage.attacker)),
                "mixes": {noun: list(sources.items()) for noun, sources in stage.mixes.items()},
                "round": stage.round if stage.kind in ("collect", "attack") else None,
                "follows": dict(stage.follows),
                "policy": without_secrets(self.config["policy"]) if stage.reads_new else None,
                "tokenizer": dataclasses.asdict(tokenizer),
                "inputs": {name: self._made(name, found[name]) for name, _ in stage.inputs if name in found},
                "folders": {path: identity.folder_digest(path) for path in self._outside(stage)},
                "backend": without_secrets(identity.decisive_backend(self.config["backend"])),
                "data": data,
                "seed": stage.seed,
                "run_seed": self.seed if stage.reads_new or stage.kind in ("collect", "attack") else None,
                "code": identity.code_digests([*common, *stage.modules]),
            }
        return found

    @functools.cached_property
    def folders(self) -> dict[str, StageFolder]:
        """{stage: the folder of its result}, whether it exists or not."""
        return {name: self._folder(name, content) for name, content in self.identities.items()}

    def collected(self, stage: Stage) -> list[str]:
        """The stages of this run whose labels or attacks this stage uses as data."""
        mixed = [source for sources in stage.mixes.values() for source in sources]
        return [source for source in (*mixed, *stage.attacked) if source in self.stages]

    def check(self) -> None:
        """Check what all stages share. `Stage.check` covers the rest.

        Raises:
          ConfigError: the place for results is not writable, or holds a run of this name with another configuration.
          LockstepError: the backend, data, policy or tracker does not work here.
        """
        self._check_place()
        for component, config in (self.backend, self.data, self.policy, self.tracker):
            component.check(config)

    def _check_place(self) -> None:
        place = next(path for path in [self.root, *self.root.absolute().parents] if path.exists())
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(f"folder={self.root}: nothing can be written to {place}. Choose another folder=...")
        run = RunFolder(self.root, self.name)
        if changes := run.config_changes(self.config):
            lines = "\n".join(f"  {change}" for change in changes)
            unfinished = run.unfinished()
            begun = f" (unfinished: {', '.join(unfinished)})" if unfinished else ""
            raise ConfigError(
                f"The run '{self.name}' already exists, with another configuration{begun}:\n{lines}\n"
                f"To start a separate run, choose another name=... To continue '{self.name}', use its earlier values, on the "
                f"left; all of them are in {run.config_file}. To replace it, remove {run.path}: stages are kept beside it, and "
                "reused where nothing has changed."
            )

    def _made(self, stage: str, content: ConfigGroup) -> str:
        """A stage's result, as it enters the identity of stages that read it: the folder's name and, if labels came into the
        folder from outside, their digest."""
        folder, labeler = self._folder(stage, content), self.stages[stage].labeler
        received = folder.result().get("received") if folder.done else labeler and labeler.component.received(folder.path)
        return f"{folder.path.name} {received}" if received else folder.path.name

    def _folder(self, stage: str, content: ConfigGroup) -> StageFolder:
        return StageFolder.of(self.root, stage, self.backend_name, content)

    def _outside(self, stage: Stage) -> list[str]:
        """Local files and folders that the stage reads, except those that stages of this run make."""
        policy, config = self.policy
        named = [*(name for name, _ in stage.inputs), *stage.files, *policy.inputs(config).files]
        return sorted({name for name in named if name not in self.stages and Path(name).exists()})

    def _component(self, kind: str, group: ConfigGroup) -> tuple[type[Any], Any]:
        name = component_name(group, kind)
        cls = registry().resolve(kind, name, self.backend_name if kind != "backend" else name)
        return cls, component_config(cls, group, kind)

    def _chosen(self, kind: str, group: ConfigGroup) -> Chosen:
        return Chosen(*self._component(kind, group), group)

    def _chosen_if_any(self, kind: str, group: ConfigGroup | None) -> Chosen | None:
        return None if group is None else self._chosen(kind, group)

    def _check_context(self, stage: Stage) -> None:
        """Check the stage's length limits.

        Raises:
          ConfigError: they exceed the context of a policy that it reads, if that is known.
        """
        lengths = getattr(stage.config, "lengths", None)
        contexts = [self._context(policy) for policy in stage.policies_read]
        if isinstance(lengths, Lengths) and (known := [context for context in contexts if context is not None]):
            try:
                lengths.check(min(known))
            except ConfigError as error:
                raise ConfigError(f"stages.{stage.name}: {error}") from None

    def _context(self, policy: str) -> int | None:
        """The context length of a policy: 'new', an earlier stage or a folder. None if it is unknown."""
        while policy in self.stages and (before := self.stages[policy].policy) is not None:
            policy = before
        cls: Any
        cls, config = self.policy
        return cls.context(config) if policy == NEW else context_of(policy)

    def _check_objective(self, objective: str) -> None:
        stage, _, metric = objective.partition("/")
        if stage not in self.stages or not metric:
            known = stage in self.stages
            wrong = "it has no metric." if known else f"no stage '{short(stage)}'.{did_you_mean(stage, self.stages)}"
            raise ConfigError(
                f"objective={short(objective)}: {wrong} It is stage/metric, as in "
                f"evaluate/heldout/ppo/gold. Stages: {listing(self.stages)}."
            )

    def _scorers(self, group: Mapping[str, Any] | None) -> Iterator[Chosen]:
        """A reward model, and its members."""
        if group is not None:
            scorer = self._chosen("reward_model", dict(group))
            yield scorer
            yield from self._members(scorer)

    def _members(self, chosen: Chosen) -> Iterator[Chosen]:
        """The reward models that a component combines, and their members."""
        for member in chosen.component.inputs(chosen.config).members:
            yield from self._scorers(member)

    def _stage(self, name: str, group: ConfigGroup, scope: Scope, number: int) -> Stage | None:
        """The checked stage; None if it is left out."""
        stage, where = parse(StageConfig, group, f"stages.{name}"), f"stages.{name}"
        if sum(each is not None for each in (stage.algorithm, stage.evaluation, stage.collection, stage.attack)) != 1:
            raise ConfigError(f"{where} needs one of algorithm, evaluation, collection and attack.")
        if stage.algorithm and stage.only_if and stage.only_if not in stage.algorithm:
            log.info(
                "no stage %s: %s has no %s", name, component_name(stage.algorithm, f"stages.{name}.algorithm"), stage.only_if
            )
            return None
        seed = self.seed + stage.seed_offset + SEEDS_APART * (number - 1)
        if not 0 <= seed < 2**63:
            raise ConfigError(
                f"stages.{name}.seed_offset={stage.seed_offset} makes the seed {seed}. It must be from 0 to 2**63 - 1."
            )
        scorers = tuple(self._scorers(stage.reward_model))
        if stage.environment is None and (needy := next((s for s in scorers if s.component.needs_environment), None)):
            raise ConfigError(
                f"stages.{name}: reward_model={needy.group['name']} scores episodes with an environment, and the stage has none. "
                "Choose one: environment=NAME."
            )
        common: dict[str, Any] = {
            "reward_model": stage.reward_model, "scorers": scorers, "seed": seed, "scope": scope, "round": number,
            "environment": self._chosen_if_any("environment", stage.environment), "engine": self.engine,
        }  # fmt: skip
        mixed = {noun: names for noun in MIXED if (names := getattr(stage, noun))}
        if stage.shares is not None and [len(names) for names in mixed.values()] != [len(stage.shares)]:
            raise ConfigError(f"{where}.shares={list(stage.shares)} needs as many sources, in comparisons or in demonstrations.")
        if mixed and stage.algorithm is None and not (stage.collection and set(mixed) == {"prompts"}):
            raise ConfigError(f"{where} trains nothing, so it takes no {listing(mixed)}. Remove the key.")
        mixes = {noun: _sources(names, stage.shares, scope) for noun, names in mixed.items()}
        if stage.collection is None and stage.labeler is not None:
            raise ConfigError(f"{where} has a labeler, which only a collection has. Remove it.")
        if stage.attack is None and stage.attacker is not None:
            raise ConfigError(f"{where} has an attacker, and no attack. Write attack: {{}}, or remove it.")
        if stage.policies is not None and stage.collection is None and stage.attack is None:
            raise ConfigError(f"{where} has policies, which collections and attacks have. Remove them.")
        if stage.algorithm is not None:
            checked = self._training(name, stage.algorithm, stage, mixes, common)
        elif stage.evaluation is not None:
            checked = self._evaluation(name, stage.evaluation, common)
        elif stage.collection is not None:
            checked = self._collection(name, stage, mixes, common)
        else:
            checked = self._attack(name, stage, common)
        for source, kind in checked.inputs:
            if not source:
                empty = listing(f"{where}.{key}" for key in _empty(group))
                raise ConfigError(f"{where} reads a stage or a folder, and the key that names it is empty: {empty}.")
            if source in self.stages:
                if kind not in self.stages[source].provides:
                    made = self.stages[source].produces
                    raise ConfigError(f"stages.{name} needs a {kind} from the stage '{source}', which makes a {made}.")
            elif not Path(source).is_dir() and not ((opened := (source, kind) in checked.declared) and is_hub_id(source)):
                hub = f" A public {kind.replace('_', ' ')} is a folder or a hub id, owner/name." if opened else ""
                raise ConfigError(
                    f"stages.{name} reads the stage '{source}', which does not come before it."
                    f"{did_you_mean(source, self.stages)} Before it: {listing(self.stages)}.{hub}"
                )
        return checked

    def _training(
        self, name: str, algorithm: ConfigGroup, stage: StageConfig, mixes: Mapping[str, Mapping[str, float | None]],
        common: Mapping[str, Any],
    ) -> Stage:  # fmt: skip
        where, scope = f"stages.{name}", common["scope"]
        merged = _merge(algorithm, stage.changes or {}, f"{where}.changes")
        cls = registry().resolve("algorithm", component_name(merged, f"{where}.algorithm"), self.backend_name)
        config = component_config(cls, merged, f"{where}.algorithm")
        if cls.needs_reward_model and stage.reward_model is None:
            raise ConfigError(f"{where} ({merged['name']}) needs a reward_model.")
        if stage.policy is None:
            raise ConfigError(f"{where} needs a policy to start from: '{NEW}' or an earlier stage.")
        if stage.environment is not None and not cls.takes_environment:
            raise ConfigError(f"{where} ({merged['name']}) takes no environment. Remove {where}.environment.")
        policy = scope.one(stage.policy, where)
        if cls.traits(config).data != "prompts":
            common = {**common, "engine": None}  # it samples nothing
        return Stage(name, "train", cls, config, merged, policy, **common, mixes=mixes)

    def _evaluation(self, name: str, group: ConfigGroup, common: Mapping[str, Any]) -> Stage:
        where, scope = f"stages.{name}", common["scope"]
        given = parse(EvaluationConfig, group, f"{where}.evaluation")
        named = [policy for each in given.policies or () for policy in scope.all(each)]
        trained = [stage.name for stage in self.stages.values() if stage.produces == "policy"]
        evaluation = group | {"policies": named or trained, "baseline": scope.one(given.baseline, where)}
        splits = [each for split in given.splits for each in scope.all(split)]
        attacked = tuple(split for split in splits if split in self.stages)
        evaluation["splits"] = [each for split in splits for each in (split, *([split + TWINS] if split in attacked else []))]
        config = parse(EvaluationConfig, evaluation, f"{where}.evaluation")
        judges = [scorer for group in config.judges.values() for scorer in self._scorers(group)]
        common = {**common, "scorers": (*common["scorers"], *judges)}
        if config.best_of and common["reward_model"] is None:
            raise ConfigError(f"{where}: best_of={config.best_of} ranks by a reward_model. Name one, or set it to 0.")
        before = {policy: self._before(policy) for policy in config.policies or ()}
        follows = {policy: last for policy, last in before.items() if last is not None and last in before}
        return Stage(name, "evaluate", None, config, evaluation, None, **common, follows=follows, attacked=attacked)

    def _before(self, name: str) -> str | None:
        """For a stage in rounds, the stage that ``last.STAGE`` means there: the same one in the previous round."""
        if (stage := self.stages.get(name)) is None:
            return None
        (before,) = stage.scope.all(f"last.{name.removesuffix(f'_{stage.round}')}") or (None,)
        return before

    def _collection(
        self, name: str, stage: StageConfig, mixes: Mapping[str, Mapping[str, float | None]], common: Mapping[str, Any]
    ) -> Stage:
        where, scope = f"stages.{name}", common["scope"]
        config = parse(CollectionConfig, stage.collection, f"{where}.collection")
        policies = _meant(stage.policies or (), scope)
        if not policies:
            raise ConfigError(f"{where} collects responses of no policy. Name stages: {where}.policies=[sft].")
        if len(policies) > config.samples:
            raise ConfigError(
                f"{where}: {len(policies)} policies share collection.samples={config.samples} responses to a prompt. Raise it to "
                f"{len(policies)} or name fewer policies: {', '.join(policies)}."
            )
        if stage.environment is not None:
            raise ConfigError(f"{where} collects single responses, without an environment. Remove {where}.environment.")
        if stage.labeler is None:
            raise ConfigError(f"{where} has no labeler. Choose who ranks: labeler=people, or labeler=scores for a reward model.")
        group = {"collection": stage.collection, "policies": list(policies)}
        own = self._with_members("labeler", stage.labeler, common)
        return Stage(name, "collect", None, config, group, None, **own, policies=policies, mixes=mixes)

    def _attack(self, name: str, stage: StageConfig, common: Mapping[str, Any]) -> Stage:
        where, scope = f"stages.{name}", common["scope"]
        config = parse(AttackConfig, stage.attack or {}, f"{where}.attack")
        policies = _meant(stage.policies or (), scope)
        if not policies:
            raise ConfigError(f"{where} attacks no policy. Name stages: {where}.policies=[sft].")
        if stage.reward_model is None:
            raise ConfigError(
                f"{where} needs a judge, a reward model that says whether an attack succeeded: {where}.reward_model."
            )
        if stage.environment is not None:
            raise ConfigError(f"{where} attacks without an environment. Remove {where}.environment.")
        if stage.attacker is None:
            raise ConfigError(f"{where} has no attacker. Choose who writes the attacks: attacker=templates or attacker=policy.")
        group = {"attack": stage.attack, "policies": list(policies)}
        own = self._with_members("attacker", stage.attacker, common)
        return Stage(name, "attack", None, config, group, None, **own, policies=policies)

    def _with_members(self, kind: str, group: ConfigGroup, common: Mapping[str, Any]) -> dict[str, Any]:
        """``common``, with a component and the reward models that it combines added."""
        chosen = self._chosen(kind, group)
        return {**common, kind: chosen, "scorers": (*common["scorers"], *self._members(chosen))}


def _group(chosen: Chosen | None) -> ConfigGroup | None:
    return None if chosen is None else chosen.group


def _meant(names: Sequence[str], scope: Scope) -> tuple[str, ...]:
    """The distinct stages that the names mean, in order."""
    return tuple(dict.fromkeys(stage for name in names for stage in scope.all(name)))


def _empty(group: Mapping[str, Any]) -> Iterator[str]:
    """The keys whose value is, or contains, an empty string."""
    for key, value in group.items():
        if isinstance(value, Mapping):
            yield from (f"{key}.{inner}" for inner in _empty(value))
        elif value == "" or (isinstance(value, (list, tuple)) and "" in value):
            yield key


def _in_order(stages: Mapping[str, ConfigGroup]) -> Iterator[tuple[str, ConfigGroup, Scope, int]]:
    """(name, group, scope, round) of each stage; repeating stages appear once per round."""
    scope = Scope()
    for name, group in stages.items():
        if "repeat" not in group:
            yield name, group, scope, 1
            continue
        *inside, (_, _, after, _) = in_rounds(name, group)
        yield from ((stage, each, scope | inner, number) for stage, each, inner, number in inside)
        scope |= after


def _sources(names: Sequence[str], shares: Sequence[float] | None, scope: Scope) -> dict[str, float | None]:
    """{source: its share}; a name that means several stages divides its share among them."""
    found: dict[str, float | None] = {}
    for name, share in itertools.zip_longest(names, shares or ()):
        stages = scope.all(name)
        found |= {stage: None if share is None else share / len(stages) for stage in stages}
    return found


def is_hub_id(source: str) -> bool:
    """True for owner/name. False if ``owner`` is a local folder: ``source`` is then taken for a path that does not exist."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None and not Path(source).parent.is_dir()


def run_name(config: Mapping[str, Any]) -> str:
    """The given name, or one made from the keys that differ between runs. The same configuration gets the same name, and so
    resumes.

    Raises:
      ConfigError: the name cannot name a folder, or holds a secret, such as the value of an environment variable.
    """
    digest = identity.digest(without_secrets(decisive(config)))[:6]
    label = f"{config['experiment_name']}-{in_a_name(config['backend']['name'])}-seed{config['seed']}-{digest}"
    name = label if config["name"] is None else config["name"]
    if without_secrets([name, label]) != [name, label]:
        raise ConfigError(
            "The run's name holds a secret, and would be the name of a folder. Set name=... or experiment_name=... to another."
        )
    return checked_name("The run name", name, NOT_RUNS)


def finished(config: Mapping[str, Any]) -> Path | None:
    """The folder of the run that this configuration describes, if all its stages are done and neither code nor data have
    changed since. Imports neither torch nor JAX."""
    root = root_folder(config["folder"])
    run = RunFolder(root, run_name(config))
    try:
        record, contents = read_record(run.path / "run.json", RUN), read_record(run.path / "stages.json", STAGES)
    except CheckpointError:
        return None
    if record["status"] != "done" or not run.config_file.exists() or run.config_changes(config):
        return None
    source = registry().resolve("data", config["data"]["name"])
    fingerprint = source.fingerprint(component_config(source, config["data"], "data"))
    for stage, content in contents.items():
        folder = StageFolder.of(root, stage, config["backend"]["name"], content)
        if not folder.done or not _up_to_date(content, fingerprint):
            return None
    return run.path


def _up_to_date(content: ConfigGroup, fingerprint: str | None) -> bool:
    """True if the code, data and folders of a stage are unchanged."""
    return (
        content["code"] == identity.code_digests(content["code"])
        and content["data"]["fingerprint"] == fingerprint
        and all(Path(path).exists() and identity.folder_digest(path) == digest for path, digest in content["folders"].items())
    )


def _merge(group: ConfigGroup, changes: ConfigGroup, where: str) -> ConfigGroup:
    """``group`` with ``changes`` merged in. Raises ConfigError if a change has an unknown key."""
    if unknown := [k for k in changes if k not in group]:
        raise ConfigError(f"Unknown key {where}.{unknown[0]}.{did_you_mean(str(unknown[0]), group)} Known: {listing(group)}.")
    return {
        key: _merge(value, changes[key], f"{where}.{key}") if isinstance(value, dict) and isinstance(changes.get(key), dict)
        else changes.get(key, value)
        for key, value in group.items()
    }  # fmt: skip
