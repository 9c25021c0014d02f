"""An experiment's parts, built on first use: backend, data, tokenizer, and the models and algorithms of its stages."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lockstep.data.labels import prompts_in
from lockstep.data.mixture import Mixture
from lockstep.errors import CheckpointError, ConfigError, listing
from lockstep.interfaces import (
    Algorithm,
    Attacker,
    Backend,
    Classifier,
    Context,
    DataSource,
    Environment,
    Inputs,
    Labeler,
    Model,
    Policy,
    Resources,
    RewardModel,
    ScalarModel,
)
from lockstep.launchers import place
from lockstep.learning.served import Served
from lockstep.models.architecture import SCALAR_HEAD
from lockstep.processes import ALONE, Processes
from lockstep.registry import registry
from lockstep.runs.asked_once import SharedLabeler, SharedRewardModel
from lockstep.runs.components import Chosen
from lockstep.runs.experiment import Experiment
from lockstep.runs.reward_model_accuracy import labelers_of
from lockstep.runs.stages import NEW, Stage
from lockstep.storage.files import read_object, write_json
from lockstep.storage.records import MADE_BY, OUTPUT, read_record
from lockstep.storage.sources import fetch_folder
from lockstep.storage.weights import check_finite, stored_weights
from lockstep.text.tokenizer import GENERATION, PAD, Tokenizer, TokenizerConfig
from lockstep.types import Fit, Prompt


class Assembly:
    """``outputs`` maps each stage to the folder of its result, which exists once the stage is done. Components see an assembly as
    `lockstep.interfaces.Resources`, through `DeclaredResources`."""

    def __init__(self, experiment: Experiment, outputs: Mapping[str, Path]):
        self.experiment, self.outputs = experiment, outputs
        self.fits: dict[str, dict[str, Fit]] = {}
        self.engines: dict[str, Served] = {}

    @functools.cached_property
    def backend(self) -> Backend:
        cls, config = self.experiment.backend
        return cls(config)

    @property
    def processes(self) -> Processes:
        """The processes of the backend. For a single process, the backend need not be built.

        Raises:
          ConfigError: several were started, and the backend runs as one.
        """
        if (count := place().count) == 1:
            return ALONE
        if self.backend.processes.count != count:
            name = self.experiment.backend_name
            raise ConfigError(
                f"{count} processes were started, and backend={name} runs as one. Start one, as with srun --ntasks=1."
            )
        return self.backend.processes

    @functools.cached_property
    def data(self) -> DataSource:
        cls, config = self.experiment.data
        return cls(config)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The policy's tokenizer: its own path, its checkpoint's, or the data source's."""
        config = self.experiment.tokenizer
        if config.path is not None:
            return Tokenizer.load(config.path, config)
        own = self.data.tokenizer()
        if own is None:
            raise ConfigError(
                "A policy that starts from scratch needs a tokenizer. Set policy.tokenizer.path to a folder or hub id."
            )
        return own.replaced(config)

    def policy(self, source: str) -> Policy:
        """A fresh copy of a stage's or folder's policy, or of the configured one."""
        if source == NEW:
            cls, config = self.experiment.policy
            policy = cls.create(config, self.backend, self.tokenizer, self.experiment.seed)
        else:
            folder = self._folder(source)
            policy = self._policy_class(folder).load(folder, self.backend)
        self.tokenizer.check_embedding(policy.vocab_size, f"the policy '{source}'")
        return policy

    def other_policy(self, source: str) -> tuple[Policy, Tokenizer]:
        """A policy with its own tokenizer, which may differ from this run's."""
        if source == NEW:
            return self.policy(NEW), self.tokenizer
        folder = self._source_folder(source)
        policy, tokenizer = self._policy_class(folder).load(folder, self.backend), load_own_tokenizer(folder)
        tokenizer.check_embedding(policy.vocab_size, f"the policy '{source}'")
        return policy, tokenizer

    def kind(self, source: str) -> Literal["stage", "decoder", "encoder"]:
        folder = self._source_folder(source)
        if (folder / MADE_BY).exists():
            return "stage"
        return "decoder" if SCALAR_HEAD in stored_weights(folder) else "encoder"

    def scalar_model(self, source: str) -> tuple[ScalarModel, Tokenizer]:
        folder = self._source_folder(source)
        model, tokenizer = self._policy_class(folder).load_scalar(folder, self.backend), load_own_tokenizer(folder)
        tokenizer.check_embedding(model.vocab_size, f"the reward model '{source}'")
        return model, tokenizer

    def classifier(self, source: str) -> Classifier:
        return self._policy_class(self._source_folder(source)).load_classifier(source, self.backend)

    def reward_model(self, stage: Stage, group: Mapping[str, Any] | None = None) -> RewardModel | None:
        """The stage's reward model, or the one that ``group`` describes, such as a member; None if the stage has none."""
        if (group := group or stage.reward_model) is None:
            return None
        scorer = stage.scorer(group)
        made = scorer.component(scorer.config, self._resources("reward model", scorer, stage))
        return SharedRewardModel(made, self.processes) if self._asked_once(scorer) else made

    def _asked_once(self, chosen: Chosen) -> bool:
        """True if process 0 asks the component for all processes. A component with models runs on all of them, as models do."""
        inputs = chosen.component.inputs(chosen.config)
        return self.processes.count > 1 and not inputs.outputs and not inputs.members

    def resources(self, stage: Stage) -> Resources:
        """The resources that the stage's algorithm may open."""
        assert stage.component is not None
        return self._resources("algorithm", Chosen(stage.component, stage.config, stage.group), stage)

    def _resources(self, kind: str, chosen: Chosen, stage: Stage) -> Resources:
        return DeclaredResources(self, f"{kind} '{chosen.group['name']}'", chosen.component.inputs(chosen.config), stage)

    def labeler(self, stage: Stage) -> Labeler:
        """The labeler of a collection."""
        assert stage.labeler is not None
        made = stage.labeler.component(stage.labeler.config, self.data, self._resources("labeler", stage.labeler, stage))
        return SharedLabeler(made, self.processes) if self._asked_once(stage.labeler) else made

    def attacker(self, stage: Stage) -> Attacker:
        """The attacker of an attack."""
        assert stage.attacker is not None
        return stage.attacker.component(stage.attacker.config, self.data, self._resources("attacker", stage.attacker, stage))

    def attacks(self, source: str) -> list[Prompt]:
        return prompts_in(self._folder(source), twins=False)

    def data_of(self, stage: Stage) -> DataSource:
        """The run's data, with the sources that the stage names in place of the data's own, and the attacks it evaluates on."""
        if not stage.mixes and not stage.attacked:
            return self.data
        folders = {noun: {source: self._folder(source) for source in sources} for noun, sources in stage.mixes.items()}
        return Mixture(self.data, folders, stage.mixes, {source: self._folder(source) for source in stage.attacked})

    def training_labelers(self, stage: Stage) -> frozenset[str | None] | None:
        """The labelers of the comparisons that the stage's reward models were trained on, None for unnamed ones; of none, those
        of the data. None if a reward model comes from outside: that may have seen any."""
        sources = [source for source, kind in stage.inputs if kind == "reward_model"]
        if not all(source in self.experiment.stages for source in sources):
            return None
        read = [self.data_of(self.experiment.stages[source]) for source in sources] or [self.data]
        return frozenset({None}.union(*(labelers_of(data) for data in read)))

    def environment(self, stage: Stage) -> Environment | None:
        if (chosen := stage.environment) is None:
            return None
        made = chosen.component(chosen.config, self._resources("environment", chosen, stage))
        made.processes = self.processes
        return made

    def engine(self, stage: Stage) -> Served | None:
        """The engine that draws samples in the stage, the same object at each call; None without one."""
        if (chosen := stage.engine) is not None and stage.name not in self.engines:
            folder = self.outputs[stage.name].with_name(".weights.part")
            self.engines[stage.name] = Served(chosen.component(chosen.config), folder, self.processes)
        return self.engines.get(stage.name)

    def algorithm(self, stage: Stage) -> Algorithm:
        policy, reward_model = self.policy(stage.policy), self.reward_model(stage)
        around, others, data = self.environment(stage), self.resources(stage), self.data_of(stage)
        engine = self.engine(stage)
        context = Context(stage.seed, self.backend, self.tokenizer, data, policy, reward_model, around, others, engine)
        self.fits[stage.name] = context.fits
        return stage.component(stage.config, context)

    def save(self, stage: Stage, algorithm: Algorithm, folder: Path) -> None:
        """Write the stage's result: a Hugging Face folder with its tokenizer, and the name of the policy that reads it."""
        reader = self.experiment.config["policy"]["name"]
        if stage.policy != NEW:
            reader = opener(self._folder(stage.policy), self.experiment.backend_name)
        save_result(folder, algorithm.result(), self.tokenizer, algorithm.produces, reader, self.processes.leads)

    def _folder(self, source: str) -> Path:
        return self.outputs.get(source, Path(source))

    def _source_folder(self, source: str) -> Path:
        """The folder of a stage's output, of a local path, or of a hub repository after downloading it."""
        return self.outputs.get(source) or fetch_folder(source)

    def _policy_class(self, folder: Path) -> type[Policy]:
        backend = self.experiment.backend_name
        return registry().resolve("policy", opener(folder, backend), backend)


class DeclaredResources(Resources):
    """Resources for one component, limited to what its `inputs` declare. Anything else is missing from the stage's identity: a
    stage trained with another version of it would be reused."""

    def __init__(self, assembly: Assembly, name: str, inputs: Inputs, stage: Stage):
        self.assembly, self.name, self.inputs, self.stage = assembly, name, inputs, stage
        self.tokenizer = assembly.tokenizer

    @property
    def backend(self) -> Backend:
        return self.assembly.backend

    def policy(self, source: str) -> tuple[Policy, Tokenizer]:
        return self.assembly.other_policy(self._declared(source))

    def attacks(self, source: str) -> list[Prompt]:
        self._check_declared(source)
        return [prompt for each in self.stage.scope.all(source) for prompt in self.assembly.attacks(each)]

    def kind(self, source: str) -> Literal["stage", "decoder", "encoder"]:
        return self.assembly.kind(self._declared(source))

    def scalar_model(self, source: str) -> tuple[ScalarModel, Tokenizer]:
        return self.assembly.scalar_model(self._declared(source))

    def classifier(self, source: str) -> Classifier:
        return self.assembly.classifier(self._declared(source))

    def reward_model(self, group: Mapping[str, Any]) -> RewardModel:
        if group not in self.inputs.members:
            raise ConfigError(f"The {self.name} uses '{group['name']}' without declaring it. {DECLARE}")
        return self.assembly.reward_model(self.stage, group)

    def _declared(self, source: str) -> str:
        """The stage or place that ``source`` means here."""
        self._check_declared(source)
        return self.stage.scope.one(source, f"The {self.name}")

    def _check_declared(self, source: str) -> None:
        if source not in self.inputs.outputs:
            raise ConfigError(f"The {self.name} opens '{source}' without declaring it. {DECLARE}")


DECLARE = "Return it from the classmethod `inputs` of its class."


def opener(folder: Path, backend: str) -> str:
    """The name of the policy that reads this folder: the one recorded by the stage that wrote it, or else the one that opens such
    checkpoints (`Policy.opens`).

    Raises:
      CheckpointError: no policy opens it, or several do.
    """
    if (folder / MADE_BY).exists():
        return read_record(folder / MADE_BY, OUTPUT)["policy"]
    found = {c.name for c in registry().components_of("policy", backend) if c.load().opens(folder)}
    if len(found) != 1:
        who = f"{listing(found)} all open it" if found else f"no policy for {backend} opens it"
        raise CheckpointError(f"{folder} was not written by a stage, and {who}. It should hold a Hugging Face checkpoint.")
    return found.pop()


def load_own_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model that only reads text. Public ones often pad with EOS, which is harmless here:
    `ScalarModel.pad_id` says where such a model reads its score."""
    own = None if (folder / MADE_BY).exists() else TokenizerConfig(None, None, PAD, None)
    return Tokenizer.load(folder, own)


def save_result(folder: Path, model: Model, tokenizer: Tokenizer, kind: str, policy: str, leads: bool = True) -> None:
    """Write a Hugging Face folder with its tokenizer, its kind ('policy', 'reward_model') and the name of the policy that reads
    it. transformers' ``generate`` stops at the tokenizer's EOS. All processes call this to save the model; the one that ``leads``
    writes the rest.

    Raises:
      CheckpointError: the model holds NaN or Inf; nothing is written.
    """
    what = kind.replace("_", " ")
    check_finite(model.arrays(), f"The {what} that should be saved")
    tokenizer.check_embedding(model.vocab_size, f"the {what}")
    if leads:
        folder.mkdir(parents=True, exist_ok=True)
    model.save(folder)
    if not leads:
        return
    tokenizer.save(folder)
    if (folder / "config.json").exists():  # an adapter has none
        write_json(folder / "config.json", read_object(folder / "config.json") | tokenizer.token_ids())
    if kind == "policy":
        write_json(folder / GENERATION, tokenizer.token_ids())
    write_json(folder / MADE_BY, {"kind": kind, "policy": policy})
