"""The README's picture, drawn from recorded data: how far PyTorch and JAX drift apart over 40 PPO iterations, and what a
SIGKILL changes.

    python benchmarks/lockstep_picture.py docs/lockstep.png

Left: ``benchmarks/parity/*/steps.csv``, written by `lockstep parity`. Right: ``benchmarks/kills.json``, written by
``benchmarks/kills.py``.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

matplotlib.use("Agg")
HERE = Path(__file__).parent
RATES = {"3e-5": "#2a6f97", "1e-4": "#61a5c2", "3e-4": "#c1666b"}
INK, GREY = "#222222", "#8a8a8a"
COLUMNS = {"torch": "#c1666b", "jax": "#2a6f97"}


def drift(axes: Axes) -> None:
    """The largest difference in any log-probability, per iteration, one line for each learning rate."""
    notes = []
    for rate, colour in RATES.items():
        with open(HERE / "parity" / f"ppo-{rate}" / "steps.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        apart = np.array([float(row["logprobs"]) for row in rows])
        same, tokens = (sum(int(row[key]) for row in rows) for key in ("tokens_same", "tokens"))
        first = next((i for i, row in enumerate(rows) if row["tokens_same"] != row["tokens"]), None)
        axes.plot(apart, color=colour, linewidth=1.8)
        said = (
            f"all {tokens:,} tokens the same"
            if first is None
            else f"the same until iteration {first}; {same / tokens:.0%} over all 40"
        )
        notes.append((apart[-1], f"lr {rate}: {said}", colour))
        if first is not None:
            axes.plot(first, apart[first], "o", color=colour, markersize=6)
            axes.annotate("first different token", (first, apart[first]), (-8, 8), textcoords="offset points", ha="right",
                          color=colour, fontsize=8)  # fmt: skip
    for place, (_, text, colour) in enumerate(sorted(notes, key=lambda note: -note[0])):
        axes.text(0.03, 0.96 - 0.07 * place, text, transform=axes.transAxes, color=colour, va="top", fontsize=9)
    axes.set(yscale="log", xlim=(0, 39), ylim=(1e-6, 1e3), xlabel="PPO iteration", ylabel="largest log-probability difference")
    axes.set_title("PyTorch and JAX sample the same tokens", loc="left", fontsize=11, color=INK)


def kills(axes: Axes) -> None:
    """A dot per kill; filled where every output file, metric and sample was bit-equal to the uninterrupted run's."""
    found = json.loads((HERE / "kills.json").read_text(encoding="utf-8"))
    stages = [("torch", "sft"), ("torch", "reward"), ("torch", "ppo"), ("jax", "sft"), ("jax", "reward"), ("jax", "ppo")]
    for row, (backend, stage) in enumerate(stages):
        here = [kill["equal"] for kill in found if (kill["backend"], kill["stage"]) == (backend, stage)]
        for place, equal in enumerate(here):
            colour = COLUMNS[backend]
            axes.plot(place, -row, "o", color=colour, markerfacecolor=colour if equal else "white", markersize=6)
    equal = sum(kill["equal"] for kill in found)
    axes.set_yticks([-row for row in range(len(stages))], [f"{backend}, {stage}" for backend, stage in stages])
    axes.set(xticks=[], xlabel=f"{len(found)} kills at random moments,\n{equal} continuations bit-equal", ylim=(-5.6, 0.6))
    axes.set_title("kill -9 changes no bit", loc="left", fontsize=11, color=INK)


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9), width_ratios=(3, 2), layout="constrained")
    drift(left)
    kills(right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=INK, labelsize=9)
    figure.savefig(sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "docs" / "lockstep.png", dpi=160)


if __name__ == "__main__":
    main()
