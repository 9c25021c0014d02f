"""Every method from the same SFT policies and reward models, over seeds: one table and one picture of `experiment=methods`.

    lockstep run -m experiment=methods seed=0,1,2,3,4 backend=torch,jax hydra.launcher.parallel=2 \
      algorithm=ppo,grpo,dr_grpo,rloo,reinforce_pp,dapo,cispo,gspo,rejection_sampling,online_dpo
    python benchmarks/methods.py runs/methods/sweeps/* --output benchmarks/methods

A gain is a policy's mean minus that of the SFT policy it started from, on the same held-out prompts with the same random numbers.
Intervals are Student's t over seeds, 95%, so they say what another training would have given.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from lockstep.reporting.compare.reading import read
from lockstep.reporting.compare.records import Run

QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Of Student's t for 97.5% and n - 1 degrees of freedom, by n."""
COLOURS = {"torch": "#d9542b", "jax": "#2b7bd9"}


@dataclass(frozen=True)
class Mean:
    """Over seeds. ``half`` is half the width of its interval, None for one seed; ``positive`` how many seeds are above 0."""

    mean: float
    half: float | None
    positive: str

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        n = len(values)
        half = QUANTILE[n] * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else None
        return cls(float(np.mean(values)), half, f"{sum(value > 0 for value in values)}/{n}")

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.half is None else f"{self.mean:.2f} ± {self.half:.2f}"


def measured(run: Run, policy: str, metric: str) -> float:
    return run.evaluation.splits["heldout"][policy][metric].mean


def gains(runs: Sequence[Run], metric: str) -> list[float]:
    """Of each seed."""
    return [measured(run, "ppo", metric) - measured(run, "sft", metric) for run in runs]


def tokens(run: Run) -> float:
    """Sampled in training; those that dynamic sampling replaced count too."""
    metrics = run.stages["ppo"].metrics
    if "objective/length" not in metrics:
        return 0.0
    rows = run.config["algorithm.batch_size"] * run.config["algorithm.samples"]
    drawn = metrics.get("group/prompts_drawn")
    steps = len(metrics["objective/length"].values)
    replaced = 1.0 if drawn is None else drawn.values[-1] / (steps * run.config["algorithm.batch_size"])
    return float(metrics["objective/length"].values.sum()) * rows * replaced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    found: dict[str, dict[str, list[Run]]] = {}
    for run in read(arguments.runs).runs:
        if "ppo" in run.evaluation.splits.get("heldout", {}):
            found.setdefault(run.config["choices.algorithm"], {}).setdefault(str(run.backend["name"]), []).append(run)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "methods.md").write_text(table(found), encoding="utf-8")
    picture(found, arguments.output / "methods.png")


def table(found: dict[str, dict[str, list[Run]]]) -> str:
    lines = [
        "| method | backend | reward model's score | rose | gold | rose | KL, nats | ability | sampled tokens | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, backends in found.items():
        for backend, runs in sorted(backends.items(), reverse=True):
            score, gold, ability = (Mean.of(gains(runs, metric)) for metric in ("score", "gold", "ability"))
            kl = Mean.of([measured(run, "ppo", "kl") for run in runs])
            seconds = np.median([run.stages["ppo"].seconds or np.nan for run in runs])
            sampled = np.mean([tokens(run) for run in runs])
            lines.append(
                f"| `{name}` | {backend} | {score} | {score.positive} | {gold} | {gold.positive} | {kl} "
                f"| {ability} | {sampled / 1e3:.0f}k | {seconds:.0f} |"
            )
    return "\n".join(lines) + "\n"


def picture(found: dict[str, dict[str, list[Run]]], path: Path) -> None:
    """Gains in score and gold: a point per seed, and the mean with its interval."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.5 * len(found) + 1.5), sharey=True)
    names = list(found)[::-1]
    for axis, metric, title in zip(axes, ("score", "gold"), ("reward model's score", "gold"), strict=True):
        for place, name in enumerate(names):
            for backend, runs in found[name].items():
                at = place + (0.16 if backend == "torch" else -0.16)
                each = gains(runs, metric)
                axis.plot(each, [at] * len(each), ".", color=COLOURS[backend], alpha=0.35, ms=5)
                mean = Mean.of(each)
                axis.errorbar(mean.mean, at, xerr=mean.half, fmt="o", color=COLOURS[backend], ms=5, capsize=2, lw=1.2)
        axis.axvline(0, color="#999999", lw=0.8)
        axis.set_xlabel(f"gain over SFT in {title}")
        axis.set_yticks(range(len(names)), names)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Line2D([], [], marker="o", ls="", color=colour, label=backend) for backend, colour in COLOURS.items()]
    axes[1].legend(handles=handles, frameon=False, loc="best")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
