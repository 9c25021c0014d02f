"""The subjects of checks, set up in the small world. For a backend or a policy, the subject is the `World` itself. Other
components are built in a world when a check asks for them."""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from lockstep.checking.conformance.kit import Inapplicable
from lockstep.checking.conformance.policies.calls import COLUMNS, ROWS, TEMPERATURE
from lockstep.checking.conformance.world import LENGTHS, PAD, Data, Scored, World, flat
from lockstep.checking.tap import Crossing, EvaluateCall, GenerateCall, Tap, UpdateCall
from lockstep.config.compose import group as compose_group
from lockstep.errors import ConfigError, DataError, Waiting
from lockstep.interfaces import (
    Algorithm,
    Attacker,
    Context,
    Engine,
    Environment,
    Episode,
    Generated,
    Label,
    Labeler,
    Metrics,
    Policy,
    Responses,
    RewardModel,
    ScalarModel,
    Term,
)  # fmt: skip
from lockstep.learning import randomness
from lockstep.learning.served import Call, checked, digest
from lockstep.text.sequences import Sequences
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Candidates, Goal, Message, Prompt


def subject(
    kind: str, name: str, backend: str, *, precision: str | None = None, overrides: Sequence[str] = (), like: str | None = None
) -> Any:
    """The component ``name`` of ``kind`` on ``backend``, ready for `conform`. Arguments as in `World`; ``like`` names the
    configuration file to start from if the component has none."""
    if kind == "backend":
        return World(name, precision=precision, overrides=overrides, like=like)
    if kind == "policy":
        return World(backend, precision=precision, policy=name, overrides=overrides)
    world = World(backend, precision=precision, overrides=overrides)
    subjects: dict[str, Callable[..., Any]] = {
        "reward_model": RewardModelSubject,
        "environment": EnvironmentSubject,
        "engine": EngineSubject,
        "labeler": LabelerSubject,
        "attacker": AttackerSubject,
        "algorithm": AlgorithmSubject,
    }
    return subjects[kind](world, name, like)


CHECKERS = {
    "extract": r"^(w\d+)", "pattern": "w1", "allow": True,
    "parts": {"right": {"name": "answer", "extract": r"^(w\d+)"}, "model": {"name": "learned", "source": "world"}},
    "weights": {"right": 1.0, "model": 0.5},
    "policy": "world", "names_goal": False, "lengths": LENGTHS,
    "judge": {"name": "function", "function": "lockstep.checking.conformance.world:word_scores"},
}  # fmt: skip
"""Values for keys of rewards that read the text and the columns, set if a configuration has the key."""


class RewardModelSubject:
    """A reward model, and responses for it to score. It also serves as the reward model's `lockstep.interfaces.Resources`."""

    function = "lockstep.checking.conformance.world:word_scores"

    def __init__(self, world: World, name: str, like: str | None = None):
        self.world, self.backend, self.tokenizer = world, world.backend, world.tokenizer
        given = {"source": "world", "function": self.function, "micro_batch_size": None, **CHECKERS}
        self.cls, self.config = world.component("reward_model", name, given, like)
        self.opened: list[str] = []
        self.members: list[Mapping[str, Any]] = []

    def settings(self) -> list[str]:
        return self.world.settings()

    def build(self) -> RewardModel:
        return self.cls(self.config, self)

    def kind(self, source: str) -> str:
        self.opened.append(source)
        return "stage"

    def reward_model(self, group: Mapping[str, Any]) -> RewardModel:
        """A member of an ensemble. Whatever its stage, it reads a copy of the world's model."""
        self.members.append(group)
        given = {**group, "source": "world", "function": self.function}
        cls, config = self.world.component("reward_model", group["name"], given)
        before = list(self.opened)
        member = cls(config, self)
        self.opened = before  # what a member opens, it declares itself
        return member

    def policy(self, source: str) -> tuple[Policy, Tokenizer]:
        self.opened.append(source)
        return self.world.policy(), self.tokenizer

    def attacks(self, source: str) -> list[Prompt]:
        self.opened.append(source)
        return []

    def scalar_model(self, source: str) -> tuple[ScalarModel, Tokenizer]:
        self.opened.append(source)
        return self.world.scalar_model(), self.tokenizer

    def responses(self, rows: Any = slice(None), *, prompt_columns: int = 7, response_columns: int = 6) -> Responses:
        """Eight ragged responses, or those of ``rows``, in a block of this many columns. The truth of every prompt has an
        ``answer``, ``tests`` and a response to compare ``against``. Every second response begins with its prompt's ``answer``."""
        wide = self.world.rollout(response_columns=6)
        block = self.world.rollout(prompt_columns=prompt_columns, response_columns=6)
        extra = response_columns - 6
        tokens = np.pad(block.tokens, ((0, 0), (0, extra)), constant_values=self.tokenizer.pad_id)
        masks = (np.pad(mask, ((0, 0), (0, extra))) for mask in (block.response_mask, block.mask))
        block = Sequences(tokens, block.prompt_mask, *masks).take(rows)
        texts = [self.tokenizer.decode(r[m]) for r, m in zip(wide.responses, wide.mask, strict=True)]
        words = [self.tokenizer.decode(p[m]) for p, m in zip(wide.tokens[:, :7], wide.prompt_mask, strict=True)]
        answers = [text.split(" ")[0] if i % 2 else "w99" for i, text in enumerate(texts)]
        prompts = [Prompt.of(w, answer=a, tests="assert True", against="w1") for w, a in zip(words, answers, strict=True)]
        chosen = np.arange(len(texts))[rows]
        return Responses([prompts[i] for i in chosen], [texts[i] for i in chosen], block, self.tokenizer)


class EnvironmentSubject(RewardModelSubject):
    """An environment, and episodes for it to reply in, which start from its own examples. It also serves as the environment's
    resources."""

    environment: type[Environment]

    def __init__(self, world: World, name: str, like: str | None = None):
        self.world, self.backend, self.tokenizer = world, world.backend, world.tokenizer
        world_of = "lockstep.checking.conformance.world"
        given = {"timeout_seconds": 10.0, "functions": [f"{world_of}:longest_word"], "function": f"{world_of}:passages"}
        self.environment, self.config = world.component("environment", name, {"policy": "world", **given}, like)
        self.opened: list[str] = []
        self.members: list[Mapping[str, Any]] = []

    def build_environment(self, **changes: Any) -> Environment:
        built: Any = self.environment
        return built(replace(self.config, **changes), self)

    def episodes(self, count: int, seed: int = 0) -> list[Episode]:
        """Fresh episodes; equal arguments give equal episodes."""
        prompts = copy.deepcopy(self.environment.examples(self.config))
        return [Episode(prompts[i % len(prompts)], 1000 * seed + i) for i in range(count)]


class EngineSubject:
    """An engine, and the weights of two policies for it to draw with."""

    cls: type[Engine]

    def __init__(self, world: World, name: str, like: str | None = None):
        self.world = world
        self.cls, self.config = world.component("engine", name, {}, like)
        self.version: str | None = None
        """The version of the weights that the engine has."""
        self.logged: list[str] = []
        """The warnings that have been logged while the engine was made, loaded weights and drew."""

    def settings(self) -> list[str]:
        return self.world.settings()

    @cached_property
    def engine(self) -> Engine:
        with self._heard():
            return self.cls(self.config)

    @contextlib.contextmanager
    def _heard(self) -> Iterator[None]:
        heard = logging.Handler(logging.WARNING)
        heard.emit = lambda record: self.logged.append(record.getMessage())  # type: ignore[method-assign]
        loggers = [logging.getLogger(name) for name in (None, "lockstep")]  # the latter passes nothing on
        for logger in loggers:
            logger.addHandler(heard)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(heard)

    def policy(self, number: int = 0) -> Policy:
        return self.world.policy(number)

    def prompts(self) -> tuple[np.ndarray, np.ndarray]:
        return self.world.prompts(ROWS)

    def hand_over(self, number: int) -> str:
        """Give the engine the weights of this policy unless it has them, from a folder that is then removed, as a run does."""
        policy = self.policy(number)
        if (version := digest(policy)) != self.version:
            self.version = None
            with tempfile.TemporaryDirectory(dir=self.world.folder) as folder:
                policy.save(Path(folder))
                with self._heard():
                    self.engine.load(Path(folder), version)
            self.version = version
        return version

    def draw(
        self,
        number: int = 0,
        *,
        prompts: tuple[np.ndarray, np.ndarray] | None = None,
        seeds: np.ndarray | None = None,
        temperature: float = TEMPERATURE,
        stop_ids: Sequence[int] = (),
    ) -> Generated:
        """Responses drawn with the weights of policy ``number``.

        Raises:
          EngineFailed: a run would not take them.
        """
        version, given = self.hand_over(number), self.prompts() if prompts is None else prompts
        seeds = self.world.seeds(len(given[0]), COLUMNS) if seeds is None else seeds
        call = Call(*given, seeds, temperature, tuple(stop_ids), PAD, self.policy(number).vocab_size)
        with self._heard():
            return checked(*self.engine.generate(*call.given, **call.how), call, version)


class LabelerSubject(RewardModelSubject):
    """A labeler, and candidates for it to rank: its own examples, or the world's responses. It also serves as the labeler's
    resources."""

    labeler: type[Labeler]

    def __init__(self, world: World, name: str, like: str | None = None):
        self.world, self.backend, self.tokenizer = world, world.backend, world.tokenizer
        given = {"reward_model": {"name": "function", "function": self.function}, "lengths": LENGTHS}
        self.labeler, self.config = world.component("labeler", name, given, like)
        self.opened: list[str] = []
        self.members: list[Mapping[str, Any]] = []

    def reward_model(self, group: Mapping[str, Any]) -> RewardModel:
        whole = {**compose_group("reward_model", str(group["name"])), **group}
        return super().reward_model(whole)

    def candidates(self) -> list[Candidates]:
        """The labeler's own examples without policies and scores; or several prompts with two to four completions each, some of
        them shared between prompts."""
        if (own := self.labeler.examples(self.config)) is not None:
            return [replace(each, policies=(), scores=()) for each in own[1]]
        responses = self.responses()
        texts, prompts = list(dict.fromkeys(responses.texts)), responses.prompts
        counts = [2 + i % 3 for i in range(len(prompts))]
        rows = [tuple(texts[(i + j) % len(texts)] for j in range(count)) for i, count in enumerate(counts)]
        return [Candidates(f"c{i}", prompt, each) for i, (prompt, each) in enumerate(zip(prompts, rows, strict=True))]

    def labels(self, candidates: Sequence[Candidates], seed: int = 0) -> list[Label]:
        """The labels that a new object gives, sorted.

        Raises:
          Inapplicable: the labeler waits for people.
        """
        own = self.labeler.examples(self.config)
        built: Any = self.labeler
        try:
            found = built(self.config, self.world.data if own is None else own[0], self).label(
                candidates, seed, self.world.folder
            )
        except Waiting as waiting:
            raise Inapplicable("it waits for people") from waiting
        return sorted(found, key=lambda label: (label.id, label.labeler))


class AttackerSubject(RewardModelSubject):
    """An attacker, and goals for it: its own examples, or words of the world. It also serves as the attacker's resources."""

    attacker: type[Attacker]

    def __init__(self, world: World, name: str, like: str | None = None):
        self.world, self.backend, self.tokenizer = world, world.backend, world.tokenizer
        given = {"source": "world", "lengths": LENGTHS, "names_goal": False}
        self.attacker, self.config = world.component("attacker", name, given, like)
        self.opened: list[str] = []
        self.members: list[Mapping[str, Any]] = []

    def build_attacker(self) -> Attacker:
        own = self.attacker.examples(self.config)
        built: Any = self.attacker
        return built(self.config, self.world.data if own is None else own[0], self)

    def goals(self) -> list[Goal]:
        """Six goals, two of them equal."""
        if (own := self.attacker.examples(self.config)) is not None:
            goals = list(own[1])
        else:
            goals = [Goal(text, text, {"answer": text}) for text in ("w1 w2", "w3", "w4 w5", "w6 w1", "w2")]
        return [*goals[:5], goals[1]]

    def attacks_on(self, goals: Sequence[Goal], seed: int = 0) -> Sequence[Sequence[Message] | None]:
        """The attacks that a new object writes."""
        return self.build_attacker().attack(goals, seed)


@dataclass
class Trace:
    """A record of an algorithm's run: for each step, its metrics and what crossed the waist."""

    algorithm: Algorithm
    tap: Tap
    models: dict[int, dict[str, np.ndarray]]
    """The parameters, before the first step, of every model that existed then: {position in `Tap.models`: arrays}."""
    metrics: list[Metrics]
    steps: list[list[Crossing]]

    def of(self, kind: type, step: int | None = None) -> list[Any]:
        """The crossings of one kind, of one step or of all steps."""
        found = self.steps if step is None else [self.steps[step]]
        return [crossing for crossings in found for crossing in crossings if isinstance(crossing, kind)]

    def updates(self, step: int | None = None) -> list[UpdateCall]:
        return self.of(UpdateCall, step)

    def terms(self, step: int | None = None) -> list[Term]:
        return [term for update in self.updates(step) for term in update.terms]

    def generation(self, step: int) -> GenerateCall:
        """
        Raises:
          Inapplicable: the algorithm does not sample.
        """
        if not (found := self.of(GenerateCall, step)):
            raise Inapplicable("it does not sample")
        return found[0]

    def trained(self) -> dict[str, Any]:
        return dict(self.algorithm.learner.models)

    def own_evaluation(self, step: int) -> EvaluateCall:
        """The first evaluation of log-probabilities by a trained model in this step.

        Raises:
          Inapplicable: there is none.
        """
        for evaluation in self.of(EvaluateCall, step):
            if "logprobs" in evaluation.outputs and any(evaluation.model is model for model in self.trained().values()):
                return evaluation
        raise Inapplicable("it does not evaluate the policy it trains")

    def parameters(self) -> dict[str, np.ndarray]:
        """The current parameters of the trained models."""
        return {f"{name}.{key}": a for name, model in self.trained().items() for key, a in model.parameters().items()}


def uneven(responses: Responses) -> np.ndarray:
    """Scores between -1 and 1 that depend on the tokens, none a whole number."""
    rows = responses.sequences
    return np.sin(0.3 + np.where(rows.mask, rows.responses, 0).sum(axis=1)).astype(np.float32)


def constant(responses: Responses) -> np.ndarray:
    """0.73, which an integer array cannot hold."""
    return np.full(len(responses.texts), 0.73, np.float32)


def missing_sometimes(tokens: np.ndarray) -> np.ndarray:
    """tokens [B, T] -> bool [B]: True for about a third of the rows; equal tokens give the same."""
    return tokens.sum(axis=1) % 3 == 0


class AlgorithmSubject:
    """An algorithm run in the small world, with a tap on everything that crosses the waist."""

    defaults = {
        "lengths": LENGTHS, "iterations": 4, "epochs": 2, "minibatches": 2, "micro_batch_size": None,
        "heldout_examples": 4, "temperature": 0.7, "kl_coef": 0.1, "optimizer": {"learning_rate": 3e-3},
        "schedule": {"shape": "constant", "warmup_steps": 0, "initial": 1.0, "final": 1.0},
    }  # fmt: skip
    batch_sizes = (6, 12, 8, 10, 9, 5, 7, 4, 11)
    """The first size that the configuration accepts with the overrides is used, because minibatches must divide it."""

    def __init__(self, world: World, name: str, like: str | None = None):
        self.world, self.name, self.like = world, name, like
        self.defaults = {"batch_size": self.batch_sizes[0], **self.defaults}
        self.data = Data()
        self.cls, self.config = self._first()
        self.traits = self.cls.traits(self.config)
        self._traces: dict[tuple[Any, ...], Trace] = {}

    def _first(self) -> tuple[type[Algorithm], Any]:
        """
        Raises:
          ConfigError: no batch size is accepted.
        """
        refused: ConfigError | None = None
        for size in self.batch_sizes:
            self.defaults["batch_size"] = size
            self.world.given.pop("algorithm", None)
            try:
                return self.world.component("algorithm", self.name, self.defaults, self.like)
            except ConfigError as error:
                refused = refused or error
        raise refused or AssertionError

    def settings(self) -> list[str]:
        return self.world.settings()

    def configured(self, **changes: Any) -> tuple[type[Algorithm], Any]:
        """The algorithm's class, and its configuration with a check's own changes.

        Raises:
          Inapplicable: an override asks for another value, or the configuration refuses the changes.
        """
        asked = flat(self.world.overrides.get("algorithm", {}))
        for key, value in flat(changes).items():
            if asked.get(key, value) != value:
                raise Inapplicable(f"it needs {key}={value}, and algorithm.{key}={asked[key]} was asked for")
        try:
            return self.world.component("algorithm", self.name, {**self.defaults, **changes}, self.like)
        except ConfigError as error:
            if not changes:
                raise
            raise Inapplicable(f"with {' '.join(f'{k}={v}' for k, v in flat(changes).items())}: {error}") from error

    def free(self, **changes: Any) -> dict[str, Any]:
        """The changes whose keys no override sets."""
        return {key: value for key, value in changes.items() if key not in self.world.overrides.get("algorithm", {})}

    def need(self, *keys: str) -> None:
        """
        Raises:
          Inapplicable: the configuration lacks one of these keys, which the check has to set.
        """
        if missing := [key for key in keys if not hasattr(self.config, key)]:
            raise Inapplicable(f"its configuration has no {' and no '.join(missing)} to set")

    def need_reward_model(self) -> None:
        """
        Raises:
          Inapplicable: the algorithm uses no reward model.
        """
        if not self.cls.needs_reward_model:
            raise Inapplicable("it uses no reward model")

    def need_trait(self, holds: bool, otherwise: str) -> None:
        """
        Raises:
          Inapplicable: the algorithm lacks a trait that the check is about; ``otherwise`` says which.
        """
        if not holds:
            raise Inapplicable(otherwise)

    def build(
        self,
        *,
        reward: Callable[[Responses], Any] = uneven,
        seed: int = 0,
        learns: bool = True,
        environment: Environment | None = None,
        **changes: Any,
    ) -> tuple[Algorithm, Tap]:
        """Build the algorithm on fresh models. The reward model scores by ``reward`` and has a network to start a value network
        from. Unless ``learns``, updates are recorded and change nothing."""
        cls, config = self.configured(**changes)
        world, tap = self.world, Tap(frozen=not learns)
        reward_model = None
        if self.cls.needs_reward_model:
            network = tap.model(world.policy(1).scalar_model(np.zeros(world.policy(1).hidden_size, np.float32)))
            reward_model = tap.reward_model(Scored(reward, network))
        policy = tap.model(world.policy())
        others: Any = SimpleNamespace(policy=lambda source: (tap.model(world.policy(1)), world.tokenizer))
        backend = tap.backend(world.backend)
        context = Context(seed, backend, world.tokenizer, self.data, policy, reward_model, environment, others)
        try:
            return cls(config, context), tap
        except DataError:  # the algorithm may refuse ties
            context.data = self.data = Data(ties=False)
            return cls(config, context), tap

    def run(
        self,
        steps: int = 3,
        *,
        again: bool = False,
        reward: Callable[..., Any] = uneven,
        seed: int = 0,
        learns: bool = True,
        environment: Environment | None = None,
        **changes: Any,
    ) -> Trace:
        """The first steps of a run. Equal configurations share a run: a shorter one is continued; a longer one is cut, and then
        `Trace.algorithm` is ahead of the trace. ``again`` makes a new run."""
        key = (reward.__name__, seed, learns, environment, repr(self.configured(**changes)[1]))
        found = None if again else self._traces.get(key)
        if found is None:
            algorithm, tap = self.build(reward=reward, seed=seed, learns=learns, environment=environment, **changes)
            found = Trace(algorithm, tap, {i: model.parameters() for i, model in enumerate(tap.models)}, [], [])
        self.go_on(found, len(found.steps), steps)
        if not again:
            self._traces[key] = found
        return found if len(found.steps) == steps else replace(found, metrics=found.metrics[:steps], steps=found.steps[:steps])

    def first_terms(self, **changes: Any) -> Trace:
        """One step of `run` without learning: its terms are those of a normal run, and no gradient is computed."""
        return self.run(1, learns=False, **changes)

    def go_on(self, trace: Trace, first: int, last: int) -> None:
        for step in range(first, last):
            trace.tap.clear()
            trace.tap.gradients = step == 0
            trace.metrics.append(trace.algorithm.step(step))
            trace.steps.append(trace.tap.crossings)

    def outputs(self, term: Term) -> dict[str, np.ndarray]:
        """Plausible float64 outputs for a term's loss: log-probabilities of the initial policy, and small values and scores."""
        found = {}
        policy = self.world.policy()
        for number, name in enumerate(term.loss.outputs):
            if name in policy.supplies:
                found[name] = policy.evaluate(term.sequences, [name], temperature=term.temperature)[name].astype(np.float64)
            else:
                shape = (term.sequences.rows,) if name == "scores" else term.sequences.mask.shape
                found[name] = randomness.generator(0, "outputs", number).normal(0, 0.05, shape)
        return found


def loss_of(term: Term, outputs: dict[str, np.ndarray], batch: dict[str, np.ndarray] | None = None) -> float:
    """The term's loss in numpy, float64."""
    arrays = {name: _wide(array) for name, array in (term.batch if batch is None else batch).items()}
    return float(term.loss(np, {name: _wide(array) for name, array in outputs.items()}, arrays)[0])


def derivative(term: Term, outputs: dict[str, np.ndarray], name: str, step: float = 1e-6) -> np.ndarray:
    """∂ loss / ∂ outputs[name] by central differences."""
    slopes = np.zeros(outputs[name].shape)
    for place in np.ndindex(slopes.shape):
        moved = []
        for sign in (1, -1):
            array = outputs[name].copy()
            array[place] += sign * step
            moved.append(loss_of(term, outputs | {name: array}))
        slopes[place] = (moved[0] - moved[1]) / (2 * step)
    return slopes


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.floating) else array
