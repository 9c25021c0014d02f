"""A backend of shapes: models without weights, which record the calls made to them.

A step of an algorithm on this backend makes the calls of a real step, with real shapes: prompts are real, every response runs
to its limit, and scores are noise. A plan is made from these calls.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import array_api_compat.numpy as xp
import numpy as np

from lockstep.interfaces import (
    Backend,
    ForwardPass,
    Generated,
    Learner,
    Metrics,
    Model,
    Past,
    Policy,
    Responses,
    RewardModel,
    ScalarModel,
    Term,
    check_vocabularies,
    suppliers,
)
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.models.blueprint import Blueprint
from lockstep.planning.calls import Call, Part, Shape
from lockstep.text.sequences import Sequences, rows_per_prompt
from lockstep.text.tokenizer import Tokenizer


class Rehearsal(Backend):
    """Makes models without weights. ``calls`` has all calls so far, in order; ``alive`` returns the models still in use."""

    def __init__(self, name: str):
        self.name = name  # type: ignore[misc]  # each instance stands in for another backend
        self.calls: list[Call] = []
        self.models: weakref.WeakSet[ShapeOnly] = weakref.WeakSet()
        self.learners: list[ShapeLearner] = []

    def learner(self, models: Mapping[str, Model], optimizers: Mapping[str, OptimizerConfig]) -> Learner:
        self.learners.append(ShapeLearner(self, models, optimizers))  # type: ignore[arg-type]  # this backend made them
        return self.learners[-1]

    def alive(self) -> list[ShapeOnly]:
        gc.collect()
        return list(self.models)

    def describe(self) -> dict[str, str]:
        return {}

    def peak_memory_bytes(self) -> int | None:
        return None


class ShapeOnly(Model):
    """A model without weights."""

    def __init__(self, blueprint: Blueprint, backend: Rehearsal, name: str):
        self.network, self.backend, self.name = blueprint, backend, name
        a = blueprint.architecture
        self.vocab_size, self.hidden_size, self.context_length = a.vocab_size, a.hidden_size, a.context_length
        backend.models.add(self)

    @property
    def supplies(self) -> frozenset[str]:  # type: ignore[override]
        b = self.network
        of_tokens = {"logprobs", "entropy"} if b.language_head else {"scores"}
        more = {"values": b.scalar_head, "divergence": b.teacher is not None}
        return frozenset(of_tokens | {name for name, there in more.items() if there})

    def evaluate(self, sequences: Sequences, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, np.ndarray]:
        asked = {self.name: tuple(outputs)}
        self.backend.calls.append(Call("evaluate", {self.name: self.network}, Shape.of(sequences), asked))
        return zeros(sequences, outputs)

    def parameters(self) -> dict[str, np.ndarray]:
        return {}

    def copy(self) -> Self:
        return type(self)(self.network, self.backend, self.name)

    def save(self, folder: Path) -> None:
        raise NotImplementedError


class ShapePolicy(ShapeOnly, Policy):
    @classmethod
    def create(cls, config: Any, backend: Backend, tokenizer: Tokenizer, seed: int) -> Policy:
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path, backend: Backend) -> Policy:
        raise NotImplementedError

    @classmethod
    def load_scalar(cls, folder: Path, backend: Backend) -> ScalarModel:
        raise NotImplementedError

    def generate(
        self, prompt_tokens: np.ndarray, prompt_mask: np.ndarray, seeds: np.ndarray, *, temperature: float,
        stop_ids: Sequence[int], pad_id: int, past: Past | None = None,
    ) -> Generated:  # fmt: skip
        (rows, length), each = seeds.shape, rows_per_prompt(prompt_tokens, prompt_mask)
        shape = Shape(rows, prompt_tokens.shape[1], length, rows_per_prompt=each)
        self.backend.calls.append(Call("generate", {self.name: self.network}, shape))
        words = np.setdiff1d(np.arange(self.vocab_size, dtype=np.int32), [*stop_ids, pad_id])
        return Generated(words[seeds % len(words)], np.ones(seeds.shape, bool), np.zeros(seeds.shape, np.float32))

    def with_value_head(self) -> Policy:
        return ShapePolicy(replace(self.network, scalar_head=True), self.backend, self.name)

    def toward(self, teacher: Policy, beta: float) -> Policy:
        check_vocabularies(self, teacher)
        other: Any = teacher
        return ShapePolicy(replace(self.network, teacher=other.network, beta=beta), self.backend, self.name)

    def scalar_model(self, head: np.ndarray) -> ScalarModel:
        trunk = replace(self.network, language_head=False, scalar_head=True)
        return ShapeScalar(trunk, self.backend, f"{self.name} with a scalar head")


class ShapeScalar(ShapeOnly, ScalarModel):
    def rescale(self, gain: float, bias: float) -> None:
        pass


class ShapeLearner(Learner):
    models: Mapping[str, ShapeOnly]

    def __init__(self, backend: Rehearsal, models: Mapping[str, ShapeOnly], optimizers: Mapping[str, OptimizerConfig]):
        self.backend, self.models = backend, dict(models)
        self.optimizers = {name: optimizers[name] for name in models}
        for name, model in models.items():
            model.name = name

    def forward(self, sequences: Sequences, outputs: Sequence[str], *, temperature: float = 1.0) -> ForwardPass:
        found = suppliers(self.models, outputs)
        self.backend.calls.append(Call("forward", self._blueprints(), Shape.of(sequences), found))
        return ForwardPass(sequences, temperature, zeros(sequences, outputs))

    def update(self, terms: Sequence[Term], lr_scale: float = 1.0) -> Metrics:
        parts = tuple(self._part(term) for term in terms)
        longest = max((part.shape for part in parts), key=lambda shape: shape.rows * shape.columns)
        self.backend.calls.append(Call("update", self._blueprints(), longest, terms=parts, optimizers=self.optimizers))
        metrics: dict[str, float] = {}
        for term in terms:
            value, more = term.loss(xp, zeros(term.sequences, term.loss.outputs), term.batch)
            for name, number in {"loss": value, **more}.items():
                metrics[name] = metrics.get(name, 0.0) + float(number)
        return metrics | {f"grad_norm/{name}": 1.0 for name in self.models}

    def gradients(self, terms: Sequence[Term]) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def averaged(self, model: str) -> Model:
        return self.models[model].copy()

    def save(self, folder: Path) -> None:
        raise NotImplementedError

    def restore(self, folder: Path) -> None:
        raise NotImplementedError

    def _blueprints(self) -> dict[str, Blueprint]:
        return {name: model.network for name, model in self.models.items()}

    def _part(self, term: Term) -> Part:
        batch = {name: (np.shape(array), str(np.asarray(array).dtype)) for name, array in term.batch.items()}
        wanted = suppliers(self.models, term.loss.outputs)
        return Part(Shape.of(term.sequences), wanted, term.loss, batch, term.dropout is not None, term.forward is not None)


class Noise(RewardModel):
    """Stands in for a reward model without a network of its own, so that functions and servers are not called."""

    def __init__(self, config: Any = None, resources: Any = None):
        self.random = np.random.default_rng(0)

    def score(self, responses: Responses) -> np.ndarray:
        return self.random.normal(size=len(responses.texts)).astype(np.float32)


def zeros(sequences: Sequences, outputs: Sequence[str]) -> dict[str, np.ndarray]:
    shape = sequences.mask.shape
    return {name: np.zeros(shape[:1] if name == "scores" else shape, np.float32) for name in outputs}
