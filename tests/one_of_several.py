"""What one process of test_processes.py does: python one_of_several.py FOLDER BACKEND MESH POLICY... Alone or as one of two, it
trains each policy, samples and saves in the same way, and leaves numbers in FOLDER/POLICY/<count>.<rank>.npz; as one of three it
passes state on. Two save theirs in shards."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lockstep.checking.conformance.backends import terms as kit
from lockstep.checking.conformance.world import PAD, STOP, World
from lockstep.errors import OutOfStep
from lockstep.launchers import place
from lockstep.storage import weights

ROWS = 7  # two processes have four each, one of them twice


@contextlib.contextmanager
def sent() -> Iterator[list[int]]:
    """Bytes that this process sends in each of torch's collectives, in a ring; without messages and DTensor's own arithmetic."""
    found: list[int] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "c10d":
                tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
                if len(tensors) == 2 and tensors[0].dtype == torch.float32:  # all-reduces, of matmuls that are divided, have one
                    own, whole = sorted(leaf.nbytes for leaf in tensors)
                    found.append(whole - own)
            return func(*args, **kwargs or {})

    with Noting():
        yield found


def main(folder: Path, backend: str, mesh: str, policy: str) -> None:
    folder.mkdir(exist_ok=True)
    here, world = place(), World(backend, policy=policy, overrides=["backend.device=cpu", *mesh.split()])
    models = kit.pair(world)
    world.backend.processes = together = world.processes  # from here on, the processes save for each other
    learner = kit.learning(world, models)
    if here.count == 3:
        learner.restore(folder / "saved by 2")
        learner.save(folder / "again saved by 2 at 3")
        return

    def term(seed: int = 0):
        return kit.term(world, rows=np.arange(ROWS), seed=seed, dropout=0.1)

    with sent() as collectives:
        found = {f"gradient {name}": array for name, array in learner.gradients([term()]).items()}
    drawn = models["policy"].generate(
        *world.prompts(rows=ROWS), world.seeds(ROWS, 12), temperature=1.0, stop_ids=[STOP], pad_id=PAD
    )
    found |= {"tokens": drawn.tokens, "mask": drawn.mask, "logprobs": drawn.logprobs}
    found |= {f"output {name}": array for name, array in kit.outputs_of(models, term()).items()}
    found["losses"] = np.array([learner.update([term(seed)])["loss"] for seed in range(3)])
    found |= {f"parameter {name}": array for name, array in kit.parameters(models).items()}
    weights.SHARD = 20_000 if here.count == 2 else weights.SHARD
    learner.save(folder / f"saved by {here.count}")
    models["policy"].save(folder / f"policy of {here.count}")
    together.share(lambda: None)  # it is written
    for source in sorted(folder.glob("saved by ?")):
        again = kit.learning(world, {name: model.copy() for name, model in models.items()})
        again.update([term(9)])
        again.restore(source)
        again.save(folder / f"again {source.name} at {here.count}")
        found[f"after {source.name}"] = np.array([again.update([term(3)])["loss"]])
    if here.count > 1:
        try:
            learner.update([term(seed=here.rank)])
        except OutOfStep as error:
            found["divergence"] = np.array(str(error))
    found["sent"] = np.array(collectives)
    np.savez(folder / f"{here.count}.{here.rank}.npz", **found)


if __name__ == "__main__":
    for each in sys.argv[4:]:
        main(Path(sys.argv[1]) / each, sys.argv[2], sys.argv[3], each)
