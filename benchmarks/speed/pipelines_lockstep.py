"""A contestant of `pipelines.py`: Lockstep, by its Python API."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lockstep

SPEC = json.loads(sys.argv[1])
DATA, INTO, SETTINGS = Path(SPEC["data"]), Path(SPEC["into"]), SPEC["settings"]
BACKENDS: dict[str, dict[str, Any]] = {
    "torch": {"name": "torch", "threads": SPEC["threads"]},
    "jax": {"name": "jax", "compilation_cache": str(DATA / "programs")},
}
LENGTHS = {"prompt": SETTINGS["prompt"], "response": SETTINGS["response"]}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").open(encoding="utf-8")]


def settings(stage: str) -> dict[str, Any]:
    """The stage's in Lockstep's words."""
    given = {**SETTINGS[stage], "lengths": LENGTHS}
    given["optimizer"] = {"learning_rate": given.pop("learning_rate")}
    return given


def main() -> None:
    start = lockstep.load(str(DATA / "policy"), BACKENDS[SPEC["backend"]])
    made: dict[str, Any] = {}
    stages: dict[str, Callable[[], Any]] = {
        "sft": lambda: lockstep.train(start, "sft", demonstrations=rows("demonstrations"), **settings("sft")),
        "reward": lambda: lockstep.train(
            made["sft"], "reward_modelling", comparisons=rows("pairs"), normalise="none", **settings("reward")
        ),
        "ppo": lambda: lockstep.train(
            made["sft"], "ppo", prompts=rows("prompts"), reward=made["reward"], epochs=1,
            **(settings("ppo") | {"value_optimizer": {"learning_rate": SETTINGS["ppo"]["learning_rate"]}}),
        ),
        "grpo": lambda: lockstep.train(
            made["sft"], "policy_gradient", prompts=rows("prompts"), reward=made["reward"], **settings("grpo")
        ),
        "dpo": lambda: lockstep.train(made["sft"], "preference_optimisation", comparisons=rows("pairs"), **settings("dpo")),
    }  # fmt: skip
    seconds = {}
    for stage in SPEC["stages"]:
        started = time.perf_counter()
        made[stage] = stages[stage]()
        made[stage].save(str(INTO / stage))
        seconds[stage] = time.perf_counter() - started
        (INTO / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


if __name__ == "__main__":
    main()
