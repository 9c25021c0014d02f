"""What several files of checks read from an algorithm's run."""

from __future__ import annotations

import numpy as np

from lockstep.checking.conformance.kit import Inapplicable
from lockstep.checking.conformance.subjects import AlgorithmSubject, Trace
from lockstep.interfaces import Metrics, Responses, Term


def timeless(metrics: Metrics) -> Metrics:
    """Drop timings, which differ between two equal runs."""
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def the_metric(metrics: Metrics, name: str) -> float:
    """
    Raises:
      Inapplicable: the metric is not logged.
    """
    if name not in metrics:
        raise Inapplicable(f"it does not log {name}")
    return metrics[name]


def in_batch(trace: Trace, name: str, step: int = 0) -> list[Term]:
    """The terms whose loss reads the array ``name``.

    Raises:
      Inapplicable: no loss reads it.
    """
    if not (terms := [term for term in trace.terms(step) if name in term.batch]):
        raise Inapplicable(f"its losses read no array called {name}")
    return terms


def examples_of(term: Term) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(tokens that do not count, tokens that count) of each example with tokens that count. Several examples may share a row."""
    rows, found = term.sequences, []
    segments = np.where(rows.attention_mask, 1, 0) if rows.segments is None else rows.segments
    counts = np.concatenate([np.zeros_like(rows.prompt_mask), rows.mask], axis=1)
    for tokens, here, counted in zip(rows.tokens, segments, counts, strict=True):
        for number in range(1, int(here.max(initial=0)) + 1):
            mine = here == number
            if (mine & counted).any():
                found.append((tuple(tokens[mine & ~counted].tolist()), tuple(tokens[mine & counted].tolist())))
    return found


def demonstrations(subject: AlgorithmSubject) -> set[tuple[int, ...]]:
    """The token ids of each demonstration's response, with EOS."""
    tokenizer = subject.world.tokenizer
    return {tuple(tokenizer.encode(d.response) + [tokenizer.eos_id]) for d in subject.data.demonstrations("train")}


def by_prompt(responses: Responses) -> np.ndarray:
    """The same score for all responses to a prompt, and another score for another prompt."""
    rows = responses.sequences
    tokens = np.where(rows.prompt_mask, rows.tokens[:, : rows.prompt_length], 0)
    return np.sin(0.3 + tokens.sum(axis=1)).astype(np.float32)
