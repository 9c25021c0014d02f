"""Offline learning, from given examples: what all such algorithms share.

    examples ──order──> a batch ──terms──> one update; held-out examples are measured before the first and after the last

A subclass makes its ``examples`` and its ``learner``, and defines the terms of a batch (`terms`) and what to measure (`measure`).
The order depends on (seed, step) alone.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from lockstep.interfaces import Algorithm, Context, Metrics, Model, Term
from lockstep.learning.optimisation import lr_scale
from lockstep.learning.randomness import example_indices


class Offline(Algorithm):
    """Base class of offline algorithms. Its ``Config`` has at least ``epochs``, ``batch_size``, ``lengths`` and ``schedule``.
    ``learner`` is a `lockstep.interfaces.Learner`, and ``total_steps`` is what `steps` returns for the examples."""

    examples: Sequence[Any]
    learner: Any

    def __init__(self, config: Any, context: Context):
        self.config, self.context, self.tokenizer = config, context, context.tokenizer
        config.lengths.check(context.policy.context_length)

    # ------------------------------------------------------------------------------------------- the algorithm box

    def step(self, step: int) -> Metrics:
        before = self.measured(self.trained) if step == 0 else {}
        scale = lr_scale(self.config.schedule, step, self.total_steps)
        terms = self.next_terms(step)
        metrics = self.learner.update(terms, scale)
        return before | self.logged(metrics, terms) | {"lr_scale": scale}

    def next_terms(self, step: int) -> list[Term]:
        return self.terms(self.batch(step))

    def batch(self, step: int) -> list[Any]:
        """The examples of a step."""
        size = self.per_step(self.config)
        indices = example_indices(self.context.seed, "order", len(self.examples), step * size, size)
        return [self.examples[i] for i in indices]

    @abstractmethod
    def terms(self, batch: Sequence[Any]) -> list[Term]:
        """The loss of a batch, in micro-batches."""

    # --------------------------------------------------------------------------------------------------- the rest

    @property
    @abstractmethod
    def trained(self) -> Model:
        """The model that is trained."""

    @abstractmethod
    def measure(self, model: Any) -> Metrics:
        """Metrics of a model on held-out examples; empty if there are none."""

    def logged(self, metrics: Metrics, terms: Sequence[Term]) -> Metrics:
        """The metrics that the step reports of an update."""
        return metrics

    def measured(self, model: Model) -> Metrics:
        return {f"heldout/{name}": value for name, value in self.measure(model).items()}

    def finish(self) -> Metrics:
        return self.measured(self.result())

    @classmethod
    def per_step(cls, config: Any) -> int:
        """The number of examples that one step consumes."""
        size: int = config.batch_size
        return size

    @classmethod
    def steps(cls, config: Any, examples: int) -> int:
        """Optimizer steps for ``epochs`` passes, at least one; the last batch runs into the next pass."""
        return max(1, math.ceil(config.epochs * examples / cls.per_step(config)))
