"""Time and memory of an update as rows get longer: a decoder with SmolLM2-135M's heads, on one CPU core.

    python benchmarks/attention.py jax --rows 1 --prompt 1024 --response 1024
    python benchmarks/attention.py torch --rows 8 --prompt 128 --response 512 --layers 30 --vocabulary 49152

One line: the median and the least CPU seconds, of all threads, of the updates after the first; what the plan says that one needs
beside weights and moments; and the most that the process ever held. To compare two checkouts, alternate between them.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from lockstep.config.schema import parse
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.models.architecture import initial_parameters, small_decoder
from lockstep.models.blueprint import Blueprint
from lockstep.planning.calls import Call, Part, Shape
from lockstep.registry import registry
from lockstep.text.sequences import pack, share_rows
from lockstep_rlhf.algorithms.language_modelling import NextTokenLoss, next_token_terms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=("torch", "jax"))
    for name, default in {"rows": 1, "prompt": 64, "response": 64, "layers": 1, "vocabulary": 512, "updates": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--packed", action="store_true", help="four examples in each row")
    args = parser.parse_args()

    columns = args.prompt + args.response
    architecture = small_decoder(
        vocab_size=args.vocabulary, hidden_size=576, layers=args.layers, heads=9, kv_heads=3, intermediate_size=1536,
        context_length=columns, rope_theta=1e4, tied=True,
    )  # fmt: skip
    cls = registry().resolve("backend", args.backend, args.backend)
    config = parse(cls.Config, {"device": "cpu"}, "backend")
    backend = cls(config)
    policy = made(registry().resolve("policy", "decoder", args.backend), architecture, backend)
    learner = backend.learner({"policy": policy}, {"policy": OptimizerConfig()})
    rng = np.random.default_rng(0)
    draw = lambda length: rng.integers(0, args.vocabulary, length).tolist()  # noqa: E731
    if args.packed:
        examples = [draw(columns // 4) for _ in range(4 * args.rows)]
        block = share_rows(examples, [[True] * len(example) for example in examples], 0, columns)
    else:  # prompts of half to all of their columns
        prompts = [draw(length) for length in rng.integers((args.prompt + 1) // 2, args.prompt + 1, args.rows)]
        responses = [draw(args.response) for _ in prompts]
        block = pack(prompts, responses, 0, prompt_columns=args.prompt, response_columns=args.response)
    terms, seconds = next_token_terms([block], None, NextTokenLoss()), []
    for _ in range(1 + args.updates):
        started = time.process_time()
        learner.update(terms)
        seconds.append(time.process_time() - started)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shape, blueprint = Shape.of(block), Blueprint(architecture)
    batch = {"weights": ((shape.rows, shape.response), "float32")}
    part = Part(shape, {"policy": ("logprobs",)}, NextTokenLoss(), batch, dropout=False, passed=False)
    call = Call("update", {"policy": blueprint}, shape, terms=(part,), optimizers={"policy": OptimizerConfig()})
    need = cls.planner(config, None).measure(call)
    print(
        f"{args.backend} {args.rows} x {columns}{' packed' * args.packed}, {args.layers} layers: "
        f"{statistics.median(seconds[1:]):.3f} s (least {min(seconds[1:]):.3f}, first {seconds[0]:.1f}), "
        f"planned {need.temporary / 2**20:.0f} MiB, most held {most / 2**10:.0f} MiB",
        flush=True,
    )


def made(cls, architecture, backend):
    """A policy with fresh weights, which needs no tokenizer."""
    arrays = initial_parameters(architecture, 0)
    if backend.name == "jax":
        return cls.from_arrays(architecture, arrays, backend, language_head=True)
    from lockstep_torch.decoder import DecoderNetwork

    return cls.filled(DecoderNetwork(architecture), None, backend, arrays)


if __name__ == "__main__":
    main()
