"""PPO with four models of Llama's sizes, planned for a TPU slice on a machine without one.

    pip install libtpu    # half a gigabyte, in an environment of its own: where it is, importing jax prints errors
    python benchmarks/tpu.py 1b --topology v5e:4x4 backend.mesh.fsdp=16 algorithm.batch_size=64 algorithm.micro_batch_size=16
    python benchmarks/tpu.py 8b --topology v5p:4x4x4 backend.mesh.fsdp=64 algorithm.batch_size=128 \
        algorithm.micro_batch_size=64 backend.gradient_checkpointing=true

Prompts and responses have 1,024 tokens each, in bfloat16. No weights are needed. Some programs take minutes to compile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lockstep.config.compose import compose
from lockstep.models.architecture import small_decoder, to_hf
from lockstep.planning.machines import MACHINES
from lockstep.planning.plan import Rehearsed, StagePlan, planned, rehearsed
from lockstep.runs.assembly import Assembly
from lockstep.runs.experiment import Experiment

SIZES = {
    "1b": {"hidden_size": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "intermediate_size": 8192, "tied": True},
    "8b": {"hidden_size": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "intermediate_size": 14336, "tied": False},
}
"""Llama 3.2's 1B and Llama 3.1's 8B (Grattafiori et al. 2024, table 3)."""
TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SIZES)
    parser.add_argument("--topology", required=True)
    arguments, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as place:
        command = [*overrides(Path(place), arguments.model), "backend=jax", "backend.device=cpu", *more]
        subprocess.run([sys.executable, "-m", "lockstep", "plan", *command, "--topology", arguments.topology], check=True)


def ppo(name: str, machine: str, more: Sequence[str], topology: str | None = None) -> StagePlan:
    """As `lockstep plan` does, without the search for a larger micro-batch."""
    with tempfile.TemporaryDirectory() as place:
        experiment = Experiment(compose([*overrides(Path(place), name), "backend.device=cpu", *more]))
        cls, config = experiment.backend
        (stage,) = (stage for stage in rehearsed(experiment) if isinstance(stage, Rehearsed))
        return planned(stage, cls.planner(config, topology), MACHINES[machine], bfloat16=True)


def overrides(place: Path, name: str) -> list[str]:
    """PPO alone, with four models of this size."""
    model = written(place, name)
    half = f"{{prompt: {TOKENS}, response: {TOKENS}, multiple: {TOKENS}}}"
    return [
        "experiment=hh", f"policy.path={model}", "policy.tokenizer.chat_template=plain", f"reward_model.source={model}",
        "data.comparisons=null", "data.demonstrations=null", f"data.prompts=[{{path: {place}/prompts.jsonl}}]",
        "~stages.sft", "~stages.reward", "~stages.evaluate", "~sft", "~reward", "~evaluation", "stages.ppo.policy=new",
        f"lengths={half}", "backend.precision=bfloat16",
    ]  # fmt: skip


def written(folder: Path, name: str) -> Path:
    """A model's config.json with the miniature's tokenizer, and long prompts beside it."""
    model = folder / name
    model.mkdir(exist_ok=True)
    architecture = small_decoder(vocab_size=128256, context_length=2 * TOKENS, rope_theta=5e5, **SIZES[name])
    (model / "config.json").write_text(json.dumps(to_hf(architecture)))
    Assembly(Experiment(compose(["backend=jax"])), {}).tokenizer.save(model)
    # Different ones: equal neighbours would be computed once.
    prompts = [["a" if number >> bit & 1 else "lamp" for bit in range(6)] for number in range(64)]
    lines = [json.dumps({"prompt": " ".join(words * (TOKENS // 6))}) for words in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return model


if __name__ == "__main__":
    main()
