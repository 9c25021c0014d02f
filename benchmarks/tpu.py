"""What XLA makes of the JAX programs for a TPU, on a machine without one: whether they compile, how large, how much they move.

    pip install libtpu    # half a gigabyte, in an environment of its own: where it is, importing jax prints errors
    python benchmarks/tpu.py MODEL [--precision bfloat16] [--topology v5e:2x2] [--rows 8] [--tokens 32]

MODEL is a folder in Hugging Face's layout. Of one chip of the topology: the gradients of the mean log-probability of ``rows``
responses of ``tokens`` tokens to prompts of as many, and their generation. What a loop over layers moves is counted once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import time
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from lockstep_jax import generation, learner
from lockstep_jax.backend import JaxBackend
from lockstep_jax.model import Block
from lockstep_jax.policies import HuggingFace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    policy = HuggingFace.load(args.model, JaxBackend(JaxBackend.Config("cpu", args.precision, None, None)))
    if args.precision == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # as the backend does on accelerators
    chip = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices[0]
    spec = dataclasses.replace(policy.spec, platform="tpu")

    def shapes(tree: Any) -> Any:
        there = SingleDeviceSharding(chip)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=there), tree)

    half = (args.rows, args.tokens)
    tokens, prompts, responses = np.zeros((args.rows, 2 * args.tokens), np.int32), np.ones(half, bool), np.ones(half, bool)
    block = Block(tokens, prompts, responses, None)
    one, stops, seeds = np.float32(1), np.zeros(1, np.int32), np.zeros(half, np.uint32)

    def loss(xp: Any, outputs: Any, batch: Any) -> Any:
        return -outputs["logprobs"].mean(), {}

    # The functions, not the programs: these have options for the CPU.
    gradients = jax.jit(learner._gradients.__wrapped__, static_argnames=("roles", "loss"))
    given = shapes(({"policy": policy.params}, {"policy": policy.frozen}, block, {}, one))
    report("gradients", gradients.lower(*given, None, roles=(("policy", spec, ("logprobs",)),), loss=loss))
    generate = jax.jit(generation.generate.__wrapped__, static_argnames=("spec", "greedy"))
    drawing = generation.Drawing(seeds, one, stops, stops[0])
    given = shapes((policy.params, policy.frozen, tokens[:, : args.tokens], prompts, drawing))
    report("generation", generate.lower(*given, spec=spec, greedy=False))


def report(name: str, lowered: Any) -> None:
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    memory, moved = compiled.memory_analysis(), compiled.cost_analysis()["bytes accessed"] / 2**20
    turned = len(re.findall(r" (?:copy|transpose)\(", compiled.as_text()))
    print(
        f"{name}: compiled in {seconds:.1f} s; arguments {memory.argument_size_in_bytes / 2**20:.0f} MiB, scratch space "
        f"{memory.temp_size_in_bytes / 2**20:.0f} MiB; moves {moved:.0f} MiB; {turned} copies and transpositions"
    )


if __name__ == "__main__":
    main()
