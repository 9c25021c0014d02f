"""What a card computes, against a CPU: one JSON object per line.

    python benchmarks/speed/gpu_checks.py torch cuda models/tiny
    python benchmarks/speed/gpu_checks.py jax cuda models/tiny

A float32 policy on the card draws the tokens that a CPU draws, and has its log-probabilities and gradients; bfloat16 and TF32 are
measured against that. On torch, tokens drawn by CUDA graphs are those drawn without.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from with_lockstep import backend_named

from lockstep.interfaces import Policy, Term
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.learning.randomness import token_seeds
from lockstep.registry import registry
from lockstep.text.sequences import Sequences, join
from lockstep_rlhf.algorithms.language_modelling import NextTokenLoss

ROWS, PROMPT, RESPONSE = 16, 24, 276
"""More columns than a mask in memory is for."""


def main(name: str, device: str, folder: Path) -> None:
    def policy(device: str, precision: str = "float32", **more: Any) -> Policy:
        backend = backend_named(name, {"backend": name, "precision": precision, "threads": None}, device)
        if more:
            backend.config = dataclasses.replace(backend.config, **more)
        return registry().resolve("policy", "decoder", name).load(folder, backend)

    def say(what: str, **numbers: Any) -> None:
        print(json.dumps({"backend": name, "device": device, "check": what, **numbers}), flush=True)

    reference = policy("cpu")
    drawn = draw(reference)
    rows = drawn_rows(drawn)
    expected, slopes = logprobs(reference, rows), gradients(reference, rows)

    def compare(what: str, other: Policy) -> None:
        found = draw(other)
        differences = {key: relative(array, slopes[key]) for key, array in gradients(other, rows).items()}
        say(
            what,
            rows_with_the_same_tokens=float(np.mean((found.tokens == drawn.tokens).all(axis=1))),
            logprobs_differ_by=float(np.abs(logprobs(other, rows) - expected).max()),
            gradients_differ_by=max(differences.values()),
            sampler_differs_from_itself_by=float(np.abs(found.logprobs - logprobs(other, drawn_rows(found))).max()),
        )

    compare("float32", policy(device))
    compare("bfloat16", policy(device, "bfloat16"))
    if name == "torch" and device == "cuda":
        import torch

        for precision in ("float32", "bfloat16"):
            with_graphs, without = (draw(policy(device, precision, cuda_graphs=on)) for on in (True, False))
            same = [np.array_equal(getattr(with_graphs, each), getattr(without, each)) for each in ("tokens", "logprobs")]
            say(f"CUDA graphs, {precision}", tokens_are_the_same=same[0], logprobs_are_the_same=same[1])
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        compare("float32 with TF32", policy(device))


def prompts() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mask = np.arange(PROMPT) >= rng.integers(0, PROMPT, ROWS)[:, None]
    return np.where(mask, rng.integers(0, 200, mask.shape), 0).astype(np.int32), mask


def draw(policy: Policy) -> Any:
    seeds = token_seeds(0, "gpu", 0, ROWS, RESPONSE)
    return policy.generate(*prompts(), seeds, temperature=1.0, stop_ids=[3], pad_id=0)


def drawn_rows(drawn: Any) -> Sequences:
    return join(*prompts(), drawn.tokens, drawn.mask)


def logprobs(policy: Policy, rows: Sequences) -> np.ndarray:
    return np.where(rows.mask, policy.evaluate(rows, ["logprobs"])["logprobs"], 0)


def gradients(policy: Policy, rows: Sequences) -> Mapping[str, np.ndarray]:
    learner = policy.backend.learner({"policy": policy}, {"policy": OptimizerConfig()})
    weights = (rows.mask / rows.mask.sum()).astype(np.float32)
    return learner.gradients([Term(NextTokenLoss(), rows, {"mask": rows.mask, "weights": weights})])


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
