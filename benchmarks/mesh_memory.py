"""Memory of one process that trains a decoder of 50 million parameters, alone and among several:

    python benchmarks/mesh_memory.py
    torchrun --nproc-per-node 2 benchmarks/mesh_memory.py

'held' is what the process has more after three updates than before it made the model, and 'peak' the most it ever had more: in
MB, without what Python and torch themselves take. Weights, gradients and Adam's two moments are 4 x 4 bytes a parameter. glibc
keeps freed buffers for later, up to 32 MB each: MALLOC_MMAP_THRESHOLD_=4000000 makes it give them back.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np
import torch

from lockstep.config.schema import parse
from lockstep.launchers import place
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.models.architecture import initial_parameters, small_decoder
from lockstep.text.sequences import Sequences, pack
from lockstep_rlhf.algorithms.language_modelling import NextTokenLoss, next_token_terms
from lockstep_torch.backend import TorchBackend
from lockstep_torch.decoder import DecoderNetwork, load_arrays
from lockstep_torch.policies import Decoder

SHAPE = small_decoder(
    vocab_size=8192, hidden_size=640, layers=8, heads=10, kv_heads=10, intermediate_size=1728, context_length=128,
    rope_theta=10000.0, tied=False,
)  # fmt: skip
ROWS, COLUMNS = 4, 32


def held() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 1e6


def batch() -> Sequences:
    tokens = np.random.default_rng(0).integers(0, SHAPE.vocab_size, (2, ROWS, COLUMNS)).tolist()
    return pack(*tokens, 0, prompt_columns=COLUMNS, response_columns=COLUMNS)


def main() -> None:
    torch.set_num_threads(1)
    mesh = {"fsdp": place().count}
    backend = TorchBackend(parse(TorchBackend.Config, {"device": "cpu", "mesh": mesh}, "backend"))
    before, peak_before = held(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    network = DecoderNetwork(SHAPE)
    load_arrays(network, initial_parameters(SHAPE, 0))
    parameters = sum(p.numel() for p in network.parameters())
    model = Decoder(network, None, backend)
    learner = backend.learner({"policy": model}, {"policy": OptimizerConfig(learning_rate=1e-4)})
    sequences, seconds = batch(), []
    terms = next_token_terms([sequences], None, NextTokenLoss())
    for _ in range(3):
        started = time.perf_counter()
        learner.update(terms)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"process {place().rank} of {place().count}: {parameters / 1e6:.1f} million parameters, {16 * parameters / 1e6:.0f} MB "
        "of weights, gradients and moments; "
        f"held {held() - before:.0f} MB, peak {(peak - peak_before) * 1024 / 1e6:.0f} MB more; {min(seconds):.2f} s"
    )


if __name__ == "__main__":
    main()
