"""Tokens that a vLLM server draws for a policy, beside the tokens that its backend draws.

    python benchmarks/engine.py MODEL URL [--backend torch] [--sampler lockstep] [--rows 32] [--prompt 32] [--tokens 48]

MODEL is a Hugging Face folder; URL a server that docs/scale.md says how to start, with a checkpoint of the same architecture. The
weights that are handed over are MODEL's, each a thousandth larger, so a server that keeps what it started with is found out.
Prompts are random, and no token ends a response. Printed are the share of equal tokens; how far the log-probabilities of the
engine's tokens are from the policy's own, by teacher forcing; and the median tokens per second of both, called in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from lockstep.api.sources import open_backend
from lockstep.interfaces import Generated
from lockstep.learning.randomness import token_seeds
from lockstep.learning.served import Served
from lockstep.registry import registry
from lockstep.runs.assembly import opener
from lockstep.storage.weights import read_weights, write_tensors
from lockstep.text.sequences import join
from lockstep_vllm.server import Server, ServerConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("url")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--sampler", default="lockstep", choices=("lockstep", "vllm"))
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    for name, default in (("rows", 32), ("prompt", 32), ("tokens", 48)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / "changed"
        changed.mkdir()
        write_tensors(changed / "model.safetensors", {n: w * np.float32(1.001) for n, w in read_weights(given.model).items()})
        (changed / "config.json").write_bytes((given.model / "config.json").read_bytes())
        backend = open_backend(given.backend)
        policy = registry().resolve("policy", opener(changed, backend.name), backend.name).load(changed, backend)
        config = Server.Config(sampler=given.sampler, server=ServerConfig(url=given.url))
        served = Served(Server(config), Path(folder) / "handed over")
        tokens = np.random.default_rng(0).integers(4, 200, (given.rows, given.prompt)).astype(np.int32)
        mask, seeds = np.ones(tokens.shape, bool), token_seeds(0, "engine", 0, given.rows, given.tokens)
        found: dict[str, Generated] = {}
        seconds: dict[str, list[float]] = {"backend": [], "engine": []}
        begun = time.perf_counter()
        served.hand_over(policy)
        print(f"handed over in {time.perf_counter() - begun:.1f} s")
        for _ in range(given.repeats):
            for name, drawing in (("backend", policy), ("engine", served.policy(policy))):
                begun = time.perf_counter()
                found[name] = drawing.generate(tokens, mask, seeds, temperature=given.temperature, stop_ids=[], pad_id=0)
                seconds[name].append(time.perf_counter() - begun)
        own, engine = found["backend"], found["engine"]
        read = join(tokens, mask, engine.tokens, engine.mask)
        logprobs = policy.evaluate(read, ["logprobs"], temperature=given.temperature)["logprobs"]
        apart = np.abs(logprobs - engine.logprobs)
        first = np.logical_and.accumulate(own.tokens == engine.tokens, axis=1)
        print(f"equal tokens: {(own.tokens == engine.tokens).mean():.4f}; up to the first that differs: {first.mean():.4f}")
        print(f"log-probabilities: {apart.mean():.2g} nats apart on average, {apart.max():.2g} at most")
        for name, times in seconds.items():
            print(f"{name}: {given.rows * given.tokens / statistics.median(times):.0f} tokens/s")


if __name__ == "__main__":
    main()
