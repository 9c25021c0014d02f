"""A pipeline small enough for tests: seconds on torch, compilation included some more on JAX."""

from pathlib import Path

from lockstep.commands.run import run_config
from lockstep.config.compose import compose

TINY = [
    "tracker=none",
    "data.texts=60", "data.demonstrations=60", "data.comparisons=40", "data.prompts=60",
    "data.heldout_texts=12", "data.heldout_demonstrations=12", "data.heldout_comparisons=12",
    "data.heldout_prompts=12", "data.adversarial_prompts=6", "data.ability_items=12",
    "pretrain.batch_size=16", "pretrain.heldout_examples=8",
    "sft.batch_size=16", "sft.heldout_examples=8",
    "reward.batch_size=8", "reward.heldout_examples=8", "reward.epochs=0.6",
    "algorithm.iterations=3", "algorithm.batch_size=8", "algorithm.epochs=1", "algorithm.ptx_ratio=1",
    "evaluation.prompts=6", "evaluation.comparisons=6", "evaluation.texts=6", "evaluation.batch_size=6",
]  # fmt: skip
DECODER = [
    "policy.layers=2", "policy.hidden_size=16", "policy.heads=2", "policy.kv_heads=1", "policy.intermediate_size=24",
]  # fmt: skip
PPO_ONLY = ["~stages.ppo_ptx", "~stages.evaluate"]


def tiny(folder: Path, *overrides: str, policy: list[str] = DECODER) -> Path:
    """Run it; the run folder."""
    arguments = [*TINY, *policy, f"folder={folder}", *overrides]
    return run_config(compose(arguments), "test")
