"""A tap on the narrow waist: stand-ins for a backend, its models, learners and reward models that record the calls.

Everything that crosses the waist is numpy on the host. So two backends can be compared, or an algorithm checked, one crossing at
a time, without knowing what happens inside. Parity and the conformance kit are built on this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lockstep.interfaces import Backend, Generated, Learner, Metrics, Model, Policy, Responses, RewardModel, Term
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.text.sequences import Sequences


@dataclass(frozen=True)
class GenerateCall:
    """A call of `Policy.generate`."""

    model: Model
    prompt_tokens: np.ndarray
    prompt_mask: np.ndarray
    seeds: np.ndarray
    temperature: float
    generated: Generated


@dataclass(frozen=True)
class EvaluateCall:
    """A call of `Model.evaluate`."""

    model: Model
    sequences: Sequences
    temperature: float
    outputs: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ScoreCall:
    """A call of `RewardModel.score`."""

    responses: Responses
    scores: np.ndarray


@dataclass(frozen=True)
class UpdateCall:
    """A call of `Learner.update`. ``gradients``: the gradients of the terms before the step, if the tap records them."""

    terms: Sequence[Term]
    lr_scale: float
    gradients: Mapping[str, np.ndarray] | None
    metrics: Metrics


Crossing = GenerateCall | EvaluateCall | ScoreCall | UpdateCall


class Tap:
    """Hands out stand-ins; ``crossings`` lists the calls made through them, in order.

    gradients: record the gradients of the first update after each `clear`, at the cost of one more backward pass.
    frozen: record updates without making them; their metrics are computed from outputs that are all -1. This gives the terms
      without the cost of gradients.
    """

    def __init__(self, gradients: bool = False, frozen: bool = False):
        self.gradients, self.frozen = gradients, frozen
        self.crossings: list[Crossing] = []
        self.models: list[Model] = []
        """Every model handed out: given, copied or made with another head."""

    def clear(self) -> None:
        self.crossings = []

    def of(self, kind: type) -> list[Any]:
        """The crossings of one kind."""
        return [crossing for crossing in self.crossings if isinstance(crossing, kind)]

    def backend(self, backend: Backend) -> Backend:
        return _Backend(backend, self)

    def model(self, model: Any) -> Any:
        tapped = _Policy(model, self) if isinstance(model, Policy) else _Model(model, self)
        self.models.append(tapped)
        return tapped

    def reward_model(self, reward_model: RewardModel) -> RewardModel:
        return _RewardModel(reward_model, self)


class _Tapped:
    """Delegates everything that is not recorded to the object behind."""

    def __init__(self, behind: Any, tap: Tap):
        self.behind, self.tap = behind, tap

    def __getattr__(self, name: str) -> Any:
        return getattr(self.behind, name)


class _Model(_Tapped):
    def evaluate(self, sequences: Sequences, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, np.ndarray]:
        found = self.behind.evaluate(sequences, outputs, temperature=temperature)
        self.tap.crossings.append(EvaluateCall(self, sequences, temperature, found))
        return found

    def copy(self) -> Any:
        return self.tap.model(self.behind.copy())


class _Policy(_Model):
    def generate(
        self, prompt_tokens: np.ndarray, prompt_mask: np.ndarray, seeds: np.ndarray, *, temperature: float, **how: Any
    ) -> Generated:
        generated = self.behind.generate(prompt_tokens, prompt_mask, seeds, temperature=temperature, **how)
        self.tap.crossings.append(GenerateCall(self, prompt_tokens, prompt_mask, seeds, temperature, generated))
        return generated

    def with_value_head(self) -> Any:
        return self.tap.model(self.behind.with_value_head())

    def toward(self, teacher: Any, beta: float) -> Any:
        return self.tap.model(self.behind.toward(getattr(teacher, "behind", teacher), beta))

    def scalar_model(self, head: np.ndarray) -> Any:
        return self.tap.model(self.behind.scalar_model(head))


class _Backend(_Tapped):
    def learner(self, models: Mapping[str, Any], optimizers: Mapping[str, OptimizerConfig]) -> Learner:
        learner = self.behind.learner({name: model.behind for name, model in models.items()}, optimizers)
        return _Learner(learner, models, self.tap)


class _Learner(_Tapped):
    def __init__(self, behind: Learner, models: Mapping[str, Model], tap: Tap):
        super().__init__(behind, tap)
        self.models = dict(models)

    evaluate, forward = Learner.evaluate, Learner.forward  # these call the tapped models, which record it; no graph is kept

    def update(self, terms: Sequence[Term], lr_scale: float = 1.0) -> Metrics:
        terms = [replace(term, forward=None) for term in terms]  # the tap's forward passes are not the learner's own
        if self.tap.frozen:
            self.tap.crossings.append(UpdateCall(terms, lr_scale, None, metrics := self.unlearned(terms)))
            return metrics
        gradients = self.behind.gradients(terms) if self.tap.gradients and not self.tap.of(UpdateCall) else None
        metrics = self.behind.update(terms, lr_scale)
        self.tap.crossings.append(UpdateCall(terms, lr_scale, gradients, dict(metrics)))
        return metrics

    def unlearned(self, terms: Sequence[Term]) -> Metrics:
        """The metrics of an update that is not made, from outputs that are all -1."""
        found = {"loss": 0.0, **{f"grad_norm/{name}": 0.0 for name in self.models}}
        for term in terms:
            mask = term.sequences.mask
            shape = {"scores": mask.shape[:1]}
            outputs = {name: np.full(shape.get(name, mask.shape), -1.0, np.float32) for name in term.loss.outputs}
            loss, metrics = term.loss(np, outputs, term.batch)
            for name, value in {"loss": loss, **metrics}.items():
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def averaged(self, model: str) -> Any:
        return self.tap.model(self.behind.averaged(model))


class _RewardModel(_Tapped):
    def score(self, responses: Responses) -> np.ndarray:
        scores = self.behind.score(responses)
        self.tap.crossings.append(ScoreCall(responses, scores))
        return scores

    def value_network(self) -> Any:
        network = self.behind.value_network()
        return network if network is None or isinstance(network, _Tapped) else self.tap.model(network)
