"""Every method from the same SFT policies and reward models, over seeds, beside the best of n samples of those policies: two
tables and a picture of `experiment=methods`.

    lockstep run -m experiment=methods seed=0,1,2,3,4 backend=torch,jax hydra.launcher.parallel=2 \
      algorithm=grpo,dr_grpo,rloo,reinforce_pp,dapo,cispo,gspo,ppo,online_dpo,rejection_sampling,dpo,ipo,hinge,simpo,orpo,kto
    lockstep run -m experiment=methods seed=0,1,2,3,4 backend=torch,jax hydra.launcher.parallel=2 \
      '~stages.ppo' 'evaluation.policies=[sft]' evaluation.best_of=16
    python benchmarks/methods.py runs/methods/sweeps/* --output benchmarks/methods

A gain is a policy's mean minus that of the SFT policy it started from, on the same held-out prompts with the same random numbers;
for the best of n, minus the mean of all its samples. Intervals are Student's t over seeds, 95%, so they say what another training
would have given.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from lockstep.reporting.compare.decisions import half_width
from lockstep.reporting.compare.reading import read
from lockstep.reporting.compare.records import Run

COLOURS = {"torch": "#d9542b", "jax": "#2b7bd9"}
METRICS = {"score": "reward model's score", "gold": "gold"}

Found = dict[str, dict[str, list[Run]]]
"""{method: {backend: a run per seed}}."""


@dataclass(frozen=True)
class Mean:
    """Over seeds. ``half`` is half the width of its interval, None for one seed; ``positive`` how many seeds are above 0."""

    mean: float
    half: float | None
    positive: str

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        n = len(values)
        half = half_width(values) if n > 1 else None
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


def best_of_gains(runs: Sequence[Run], n: int, metric: str) -> list[float]:
    """Of each seed, over the mean of single samples."""
    return [measured(run, "sft", f"best_of_{n}/{metric}") - measured(run, "sft", f"best_of_1/{metric}") for run in runs]


def sizes(runs: Sequence[Run]) -> list[int]:
    """1, 2, 4, ...: the n of which the best was measured."""
    names = runs[0].evaluation.splits["heldout"]["sft"]
    return sorted(int(name.removeprefix("best_of_").removesuffix("/kl")) for name in names if fnmatch(name, "best_of_*/kl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    methods: Found = {}
    best_of: dict[str, list[Run]] = {}
    for run in read(arguments.runs).runs:
        policies, backend = run.evaluation.splits.get("heldout", {}), str(run.backend["name"])
        if "ppo" in policies:
            methods.setdefault(run.config["choices.algorithm"], {}).setdefault(backend, []).append(run)
        elif "best_of_1/kl" in policies.get("sft", {}):
            best_of.setdefault(backend, []).append(run)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "methods.md").write_text(table(methods), encoding="utf-8")
    (arguments.output / "best_of.md").write_text(best_of_table(best_of), encoding="utf-8")
    picture(methods, best_of, arguments.output / "methods.png")


def table(found: Found) -> str:
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
                f"| {ability} | {f'{sampled / 1e3:.0f}k' if sampled else 'none'} | {seconds:.0f} |"
            )
    return "\n".join(lines) + "\n"


def best_of_table(found: dict[str, list[Run]]) -> str:
    lines = [
        "| best of | backend | reward model's score | rose | gold | rose | KL, nats | its bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for backend, runs in sorted(found.items(), reverse=True):
        for n in sizes(runs)[1:]:
            score, gold = (Mean.of(best_of_gains(runs, n, metric)) for metric in METRICS)
            kl = Mean.of([measured(run, "sft", f"best_of_{n}/kl") for run in runs])
            bound = measured(runs[0], "sft", f"best_of_{n}/kl_bound")
            lines.append(f"| {n} | {backend} | {score} | {score.positive} | {gold} | {gold.positive} | {kl} | {bound:.2f} |")
    return "\n".join(lines) + "\n"


def picture(methods: Found, best_of: dict[str, list[Run]], path: Path) -> None:
    """Above, the gains of each method; below, those in gold against KL, beside the best of n samples."""
    rows = 0.36 * len(methods) + 0.6
    figure = plt.figure(figsize=(11, rows + 5))
    grid = figure.add_gridspec(2, 2, height_ratios=[rows, 5])
    score = figure.add_subplot(grid[0, 0])
    gold = figure.add_subplot(grid[0, 1], sharey=score)
    by_method(score, methods, "score")
    by_method(gold, methods, "gold")
    gold.tick_params(labelleft=False)
    against_kl(figure.add_subplot(grid[1, :]), methods, best_of)
    handles = [plt.Line2D([], [], marker="o", ls="", color=colour, label=backend) for backend, colour in COLOURS.items()]
    gold.legend(handles=handles, frameon=False, loc="best")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def by_method(axis: Axes, methods: Found, metric: str) -> None:
    """A point per seed, and the mean with its interval."""
    names = list(methods)[::-1]
    for place, name in enumerate(names):
        for backend, runs in methods[name].items():
            at = place + (0.16 if backend == "torch" else -0.16)
            each = gains(runs, metric)
            axis.plot(each, [at] * len(each), ".", color=COLOURS[backend], alpha=0.35, ms=5)
            mean = Mean.of(each)
            axis.errorbar(mean.mean, at, xerr=mean.half, fmt="o", color=COLOURS[backend], ms=5, capsize=2, lw=1.2)
    axis.axvline(0, color="#999999", lw=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel(f"gain over SFT in {METRICS[metric]}")
    axis.spines[["top", "right"]].set_visible(False)


def against_kl(axis: Axes, methods: Found, best_of: dict[str, list[Run]]) -> None:
    """Means over seeds: a point per method, a line through the best of 1, 2, 4, ... samples. KL is drawn by its root, as in Gao
    et al. 2022 (arXiv 2210.10760)."""
    labels = []
    for backend, runs in best_of.items():
        kl = [float(np.mean([measured(run, "sft", f"best_of_{n}/kl") for run in runs])) for n in sizes(runs)]
        gold = [Mean.of(best_of_gains(runs, n, "gold")) for n in sizes(runs)]
        axis.errorbar(kl, [g.mean for g in gold], [g.half or 0 for g in gold], color=COLOURS[backend], lw=1.2, capsize=2)
        labels += [(f"best of {n}", x, g.mean) for n, x, g in zip(sizes(runs), kl, gold, strict=True) if n > 1]
    for name, backends in methods.items():
        for backend, runs in backends.items():
            place = float(np.mean([measured(run, "ppo", "kl") for run in runs])), float(np.mean(gains(runs, "gold")))
            axis.plot(*place, "o", color=COLOURS[backend], ms=4)
            labels.append((name, *place))
    axis.axhline(0, color="#999999", lw=0.8)
    axis.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    axis.set_xlim(left=0)
    axis.set_xticks([0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2])
    axis.set_xlabel("KL to SFT, nats")
    axis.set_ylabel("gain over SFT in gold")
    axis.spines[["top", "right"]].set_visible(False)
    annotate(axis, {name: (x, y) for name, x, y in reversed(labels)})  # of two backends, the first


def annotate(axis: Axes, labels: Mapping[str, tuple[float, float]]) -> None:
    """Names beside their points, each moved down until it covers none that is there."""
    taken: list[tuple[float, float]] = []
    for name, place in sorted(labels.items(), key=lambda item: -item[1][1]):
        x, y = axis.transData.transform(place) + (6, 2)
        while any(abs(x - other) < 70 and abs(y - beside) < 11 for other, beside in taken):
            y -= 1
        taken.append((x, y))
        axis.annotate(
            name,
            place,
            axis.transData.inverted().transform((x, y)),
            fontsize=7,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "#999999"},
        )


if __name__ == "__main__":
    main()
