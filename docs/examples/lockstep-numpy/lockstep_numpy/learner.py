"""Gradients of any loss over [batch, time], and Adam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from autograd import grad
from autograd.tracer import getval

from lockstep.interfaces import Learner, Metrics, Term, suppliers
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.storage.weights import LEARNER, read_tensors, stored_learner, write_learner
from lockstep_numpy import array_api
from lockstep_numpy.decoder import Weights
from lockstep_numpy.model import NumpyModel, forward

Gradients = dict[str, dict[str, np.ndarray]]
"""{model: {parameter: float32 array}}."""


class NumpyLearner(Learner):
    """``moments`` holds Adam's means and squares, and moving averages of the weights, under their checkpoint names:
    <model>.mean.<parameter>, <model>.square.<parameter>, <model>.average.<parameter>."""

    def __init__(self, models: Mapping[str, NumpyModel], optimizers: Mapping[str, OptimizerConfig]):
        self.models = dict(models)
        self.optimizers = {name: optimizers[name] for name in self.models}
        self.steps = 0
        self.moments: dict[str, np.ndarray] = {}
        for name, model in self.models.items():
            for key, array in model.weights.items():
                self.moments |= {f"{name}.{part}.{key}": np.zeros_like(array) for part in ("mean", "square")}
                if self.optimizers[name].ema_decay is not None:
                    self.moments[f"{name}.average.{key}"] = array

    def update(self, terms: Sequence[Term], lr_scale: float = 1.0) -> Metrics:
        gradients, metrics = self._backward(terms)
        self.steps += 1
        for name, config in self.optimizers.items():
            norm = float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradients[name].values())))
            metrics[f"grad_norm/{name}"] = norm
            limit = config.max_grad_norm
            clip = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))  # as PyTorch clips
            for key, gradient in gradients[name].items():
                self._adam(name, key, clip * gradient, lr_scale)
        return metrics

    def gradients(self, terms: Sequence[Term]) -> dict[str, np.ndarray]:
        gradients, _ = self._backward(terms)
        return {f"{name}.{key}": array for name, arrays in gradients.items() for key, array in arrays.items()}

    def _backward(self, terms: Sequence[Term]) -> tuple[Gradients, Metrics]:
        """The summed gradients and metrics of all terms."""
        weights = {name: model.weights for name, model in self.models.items()}
        total = {name: {key: np.zeros_like(array) for key, array in arrays.items()} for name, arrays in weights.items()}
        metrics: Metrics = {}
        for term in terms:

            def loss(weights: Mapping[str, Weights], term: Term = term) -> Any:
                value, found = term.loss(array_api, self._outputs(term, weights), term.batch)
                for name, number in {"loss": value, **found}.items():
                    metrics[name] = metrics.get(name, 0.0) + float(getval(number))  # out of autograd's box
                return value

            for name, arrays in grad(loss)(weights).items():
                total[name] = {key: total[name][key] + np.asarray(g, np.float32) for key, g in arrays.items()}
        return total, metrics

    def _outputs(self, term: Term, weights: Mapping[str, Weights]) -> dict[str, Any]:
        outputs: dict[str, Any] = {}
        for name, wanted in suppliers(self.models, term.loss.outputs).items():
            architecture = self.models[name].architecture
            outputs |= forward(architecture, weights[name], term.sequences, wanted, term.temperature, term.dropout)
        return outputs

    def _adam(self, name: str, key: str, gradient: np.ndarray, lr_scale: float) -> None:
        """One step of one parameter and of its average: `lockstep.learning.optimisation.OptimizerConfig`.

        m ← β₁ m + (1 - β₁) g      v ← β₂ v + (1 - β₂) g²
        θ ← θ - lr [m / (1 - β₁ᵗ) / (sqrt(v / (1 - β₂ᵗ)) + ε) + λ θ]      λ on matrices only
        """
        config, weights, moments = self.optimizers[name], self.models[name].weights, self.moments
        mean, square, average = (f"{name}.{part}.{key}" for part in ("mean", "square", "average"))
        first, second = config.betas
        moments[mean] = first * moments[mean] + (1 - first) * gradient
        moments[square] = second * moments[square] + (1 - second) * gradient**2
        root = np.sqrt(moments[square] / (1 - second**self.steps)) + config.eps_at(self.steps)
        direction = moments[mean] / (1 - first**self.steps) / root
        if gradient.ndim >= 2:
            direction = direction + config.weight_decay * weights[key]
        weights[key] = weights[key] - config.learning_rate * lr_scale * direction
        if average in moments:
            moments[average] = moments[average] + (1 - config.ema_decay) * (weights[key] - moments[average])

    def averaged(self, model: str) -> NumpyModel:
        averaged = self.models[model].copy()
        averaged.weights = {key: self.moments.get(f"{model}.average.{key}", w) for key, w in averaged.weights.items()}
        return averaged

    def save(self, folder: Path) -> None:
        state = self._state()
        write_learner(folder, {name: array.shape for name, array in state.items()}, state.__getitem__, self.steps)

    def restore(self, folder: Path) -> None:
        _, steps = stored_learner(folder, {name: array.shape for name, array in self._state().items()})
        stored = read_tensors(folder / LEARNER)
        self.moments = {name: stored[name] for name in self.moments}
        for name, model in self.models.items():
            model.weights = {key: stored[f"{name}.parameters.{key}"] for key in model.weights}
        self.steps = steps

    def _state(self) -> dict[str, np.ndarray]:
        """Every array that training changes, by name."""
        models = self.models.items()
        return self.moments | {f"{name}.parameters.{key}": w for name, model in models for key, w in model.weights.items()}
