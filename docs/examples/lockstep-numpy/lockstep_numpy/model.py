"""Models: weights with a language head, a scalar head or both, and their outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import autograd.numpy as anp
import numpy as np

from lockstep.interfaces import Array, Dropout, Generated, Policy, ScalarModel
from lockstep.models.architecture import SCALAR_BIAS, SCALAR_HEAD, Architecture, family_of, to_hf, trunk_shapes
from lockstep.storage.files import write_json
from lockstep.storage.weights import write_tensors
from lockstep.text.sequences import Sequences
from lockstep_numpy.decoder import Weights, hidden, log_softmax, logits, score
from lockstep_numpy.generation import generate


def forward(
    architecture: Architecture,
    weights: Weights,
    sequences: Sequences,
    outputs: Sequence[str],
    temperature: float,
    dropout: Dropout | None = None,
) -> dict[str, Array]:
    """The named outputs, differentiable. Logits exist at the T columns that predict a response token only."""
    every = hidden(architecture, weights, sequences.tokens, sequences.attention, dropout)
    states = every[:, sequences.prompt_length - 1 : -1]  # [B, T, d]: the state each response token is chosen in
    out = {}
    if "logprobs" in outputs or "entropy" in outputs:
        distribution = log_softmax(logits(weights, states) / temperature)
        tokens = np.where(sequences.response_mask, sequences.responses, 0)  # padding may be outside the vocabulary
        rows, columns = np.indices(tokens.shape)
        out["logprobs"] = distribution[rows, columns, tokens]
        if "entropy" in outputs:
            out["entropy"] = -anp.sum(anp.exp(distribution) * distribution, axis=-1)
    if "values" in outputs:
        out["values"] = score(weights, states)
    if "scores" in outputs:
        out["scores"] = score(weights, every[np.arange(sequences.rows), sequences.last])
    # The gradient of a loss may arrive in double precision; this cast's gradient makes it float32 before the backward pass.
    return {name: out[name].astype(np.float32) for name in outputs}


class NumpyModel:
    """What `LanguageModel` and `Scalar` share. Arrays are replaced, never changed, so copies share them."""

    supplies: frozenset[str]

    def __init__(self, architecture: Architecture, weights: Mapping[str, np.ndarray]):
        self.architecture, self.weights = architecture, dict(weights)
        self.vocab_size, self.hidden_size = architecture.vocab_size, architecture.hidden_size
        self.context_length = architecture.context_length

    def evaluate(self, sequences: Sequences, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, np.ndarray]:
        return forward(self.architecture, self.weights, sequences, outputs, temperature)

    def parameters(self) -> dict[str, np.ndarray]:
        return {name: array.copy() for name, array in self.weights.items()}

    def copy(self) -> Any:
        return type(self)(self.architecture, self.weights)

    def write(self, folder: Path, weights: Weights, **config: Any) -> None:
        """Write a checkpoint of the family's causal language model; ``config`` overrides keys of config.json."""
        write_tensors(folder / "model.safetensors", weights)
        write_json(folder / "config.json", {**to_hf(self.architecture), **config})


class LanguageModel(NumpyModel, Policy):
    """A policy in numpy; `policies.py` creates and loads it."""

    @property
    def supplies(self) -> frozenset[str]:
        return frozenset({"logprobs", "entropy"} | ({"values"} if SCALAR_HEAD in self.weights else set()))

    def generate(self, prompt_tokens: np.ndarray, prompt_mask: np.ndarray, seeds: np.ndarray, **how: Any) -> Generated:
        return generate(self.architecture, self.weights, prompt_tokens, prompt_mask, seeds, **how)

    def with_value_head(self) -> LanguageModel:
        return type(self)(self.architecture, self.weights | head(np.zeros(self.hidden_size)))

    def scalar_model(self, head_weight: np.ndarray) -> Scalar:
        trunk = {name: self.weights[name] for name in trunk_shapes(self.architecture)}
        return Scalar(self.architecture, trunk | head(head_weight))

    def save(self, folder: Path) -> None:
        """The language model alone: a value head belongs to training, not to the policy."""
        weights = {name: array for name, array in self.weights.items() if name not in (SCALAR_HEAD, SCALAR_BIAS)}
        self.write(folder, weights)


class Scalar(NumpyModel, ScalarModel):
    supplies = frozenset({"values", "scores"})

    def rescale(self, gain: float, bias: float) -> None:
        weight, offset = self.weights[SCALAR_HEAD][0], self.weights[SCALAR_BIAS][0]
        self.weights = self.weights | head(gain * weight, gain * offset + bias)

    def save(self, folder: Path) -> None:
        self.write(folder, self.weights, architectures=[family_of(self.architecture).classifier], num_labels=1)


def head(weight: np.ndarray, bias: float = 0.0) -> dict[str, np.ndarray]:
    """A scalar head [hidden_size] under its checkpoint names."""
    return {SCALAR_HEAD: np.array(weight, np.float32).reshape(1, -1), SCALAR_BIAS: np.array([bias], np.float32)}
