"""Turns of a conversation with the keys and values of earlier turns kept, beside turns that read the whole context again.

    python benchmarks/turns.py MODEL [--backends torch jax] [--rows 16] [--prompt 256] [--said 16] [--tokens 16] [--turns 6]

MODEL is a Hugging Face folder. Each conversation has a random prompt; in each turn the policy draws so many tokens and hears so
many. No token ends a turn, so both ways do the same work and draw the same tokens, which is checked. They take turns, one whole
conversation each; printed are medians of seconds and of the rounds' ratios, without the first round, which compiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from lockstep.api.sources import open_backend
from lockstep.interfaces import Generated, Past, Policy
from lockstep.learning.randomness import token_seeds
from lockstep.learning.turns import Turns
from lockstep.registry import registry


class Forgetful(Turns):
    """Reads the whole context in each turn."""

    def past(self, *_: Any) -> None:
        return None


def converse(policy: Policy, kind: type[Turns], given: argparse.Namespace) -> tuple[float, list[list[int]]]:
    """Seconds, and the contexts at the end."""
    rng = np.random.default_rng(0)
    words = lambda count: rng.integers(4, 200, (given.rows, count)).tolist()  # noqa: E731
    contexts, begun = words(given.prompt), time.perf_counter()

    def generate(tokens: np.ndarray, mask: np.ndarray, seeds: np.ndarray, past: Past | None) -> Generated:
        return policy.generate(tokens, mask, seeds, temperature=1.0, stop_ids=[], pad_id=0, past=past)

    turns = kind(generate, 0)
    columns = given.prompt + given.turns * (given.tokens + given.said)
    for number in range(given.turns):
        seeds = token_seeds(0, "sampling", number, given.rows, given.tokens)
        width = columns if number else given.prompt
        drawn = turns.next(range(given.rows), contexts, seeds, width)
        contexts = [[*c, *t, *s] for c, t, s in zip(contexts, drawn.tokens.tolist(), words(given.said), strict=True)]
    return time.perf_counter() - begun, contexts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--backends", nargs="+", default=["torch", "jax"])
    for name, default in {"rows": 16, "prompt": 256, "said": 16, "tokens": 16, "turns": 6, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    for name in given.backends:
        policy = registry().resolve("policy", "huggingface", name).load(given.model, open_backend(name))
        seconds: dict[type[Turns], list[float]] = {Turns: [], Forgetful: []}
        for number in range(given.rounds + 1):
            found = {kind: converse(policy, kind, given) for kind in (list(seconds) if number % 2 else list(seconds)[::-1])}
            assert found[Turns][1] == found[Forgetful][1]
            if number:
                for kind, (took, _) in found.items():
                    seconds[kind].append(took)
        ratio = statistics.median(b / a for a, b in zip(seconds[Turns], seconds[Forgetful], strict=True))
        kept, anew = (statistics.median(seconds[kind]) for kind in (Turns, Forgetful))
        print(f"{name}: {kept:.2f} s with what was read kept, {anew:.2f} s anew: {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
