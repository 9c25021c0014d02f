"""Memory of one process that loads, trains and saves a decoder of 110 million parameters or a given one, alone and among several:

    python benchmarks/mesh_memory.py
    python benchmarks/mesh_memory.py --processes 2
    python benchmarks/mesh_memory.py --processes 2 --backend jax
    python benchmarks/mesh_memory.py --processes 2 --checkpoint SmolLM2-135M

First the bytes of the arrays that the process keeps: weights, Adam's moments, and gradients, which on JAX exist within a program
only.
For each phase of process 0: the most memory that the process had in it, and what it has afterwards, in MB, more than before it
made the model. Weights, gradients and Adam's two moments are 4 x 4 bytes a parameter. The weights come from a checkpoint on the
disk. glibc keeps freed buffers for later, up to 32 MB each: MALLOC_MMAP_THRESHOLD_=4000000 makes it give them back.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.commands.run import workers
from lockstep.config.schema import parse
from lockstep.launchers import place
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.models.architecture import initial_parameters, small_decoder, to_hf
from lockstep.registry import registry
from lockstep.storage.files import write_json
from lockstep.storage.weights import write_tensors
from lockstep.text.sequences import Sequences, pack
from lockstep_rlhf.algorithms.language_modelling import NextTokenLoss, next_token_terms

SHAPE = small_decoder(
    vocab_size=16384, hidden_size=768, layers=12, heads=12, kv_heads=12, intermediate_size=2048, context_length=128,
    rope_theta=10000.0, tied=False,
)  # fmt: skip
ROWS, COLUMNS = 4, 16


def status(what: str) -> float:
    """A line of /proc/self/status, in MB."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) * 1024 / 1e6


def make(folder: Path) -> None:
    """The checkpoint, and a tiny one. Python's heap would keep what their random numbers take, hence a process of its own."""
    tiny = dataclasses.replace(SHAPE, hidden_size=24, layers=1, intermediate_size=8)
    for name, shape in {"large": SHAPE, "tiny": tiny}.items():
        write_tensors(folder / name / "model.safetensors", initial_parameters(shape, 0))
        write_json(folder / name / "config.json", to_hf(shape))


def batch() -> Sequences:
    tokens = np.random.default_rng(0).integers(0, SHAPE.vocab_size, (2, ROWS, COLUMNS)).tolist()
    return pack(*tokens, 0, prompt_columns=COLUMNS, response_columns=COLUMNS)


def kept(name: str, model: Any, learner: Any) -> dict[str, float]:
    """Of this process's parts of the arrays, in MB. On torch after `Learner.gradients`."""
    if name == "torch":
        from lockstep_torch.mesh import local

        weights = list(model.tensors().values())
        states = [state for adam in learner.adams.values() for state in adam.state.values()]
        arrays = {
            "weights": weights,
            "gradients": [weight.grad for weight in weights],
            "moments": [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")],
        }
        return {what: sum(local(each).nbytes for each in found) / 1e6 for what, found in arrays.items()}
    import jax

    state = learner.moments["policy"]
    trees = {"weights": model.params, "moments": (state.mean, state.square)}
    return {
        what: sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards) / 1e6
        for what, tree in trees.items()
    }


def main(name: str, checkpoint: Path | None) -> None:
    made = None
    if place().rank == 0:  # before the backend has threads
        made = tempfile.mkdtemp()
        subprocess.run([sys.executable, __file__, "--make", made], check=True)
    cls = registry().resolve("backend", name, name)
    backend = cls(parse(cls.Config, {"device": "cpu", "mesh": {"fsdp": place().count}}, "backend"))
    policy, together = registry().resolve("policy", "huggingface", name), backend.processes
    folder = Path(together.share(lambda: made))
    policy.load(folder / "tiny", backend)  # imports what it needs
    before = status("VmRSS")
    lines = []

    def phase(what: str, work: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins anew
        started = time.perf_counter()
        found = work()
        seconds = time.perf_counter() - started
        lines.append(f"{what} {status('VmHWM') - before:.0f} (then {status('VmRSS') - before:.0f}; {seconds:.1f} s)")
        return found

    model = phase("load", lambda: policy.load(checkpoint or folder / "large", backend))
    learner = backend.learner({"policy": model}, {"policy": OptimizerConfig(learning_rate=1e-4)})
    terms = next_token_terms([batch()], None, NextTokenLoss())
    phase("three updates", lambda: [learner.update(terms) for _ in range(3)])
    phase("save the state", lambda: learner.save(folder / "state"))
    together.share(lambda: None)
    phase("restore it", lambda: learner.restore(folder / "state"))
    phase("save the policy", lambda: model.save(folder / "policy"))
    parameters = sum(array.size for array in learner.gradients(terms).values())
    arrays = ", ".join(f"{what} {size:.0f}" for what, size in kept(name, model, learner).items())
    here = f"{name}, process {place().rank} of {place().count}, {parameters / 1e6:.0f} million"
    print(f"{here}: {arrays}; {', '.join(lines)}", flush=True)
    together.share(lambda: shutil.rmtree(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, help="a decoder of this folder")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(given.make)
    elif given.processes > place().count:
        sys.exit(workers.work([sys.executable, *sys.argv], given.processes))
    else:
        main(given.backend, given.checkpoint)
