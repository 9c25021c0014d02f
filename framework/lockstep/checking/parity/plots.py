"""The figure: one panel per measure over the steps of all stages, on a log axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from lockstep.checking.parity.differences import Step
from lockstep.checking.parity.march import StageSteps
from lockstep.reporting.compare.plots import COLOURS, plain, save, style

Value = Callable[[Step], float | None]


def measure(name: str) -> Value:
    return lambda step: step.measures.get(name)


def differing(step: Step) -> float | None:
    return 1 - step.tokens_same / step.tokens if step.tokens else None


PANELS: dict[str, dict[str, Value]] = {
    "Tokens that differ, share of all": {"": differing},
    "Model outputs for the same tokens, |difference|": {
        name: measure(key)
        for key, name in (("logprobs", "log-probabilities"), ("entropy", "entropy"), ("values", "values"), ("scores", "scores"))
    },
    "Loss, |difference|": {"": measure("loss")},
    "Gradient of a step's first update, ‖g₁ - g₂‖ / ‖g₁‖": {"": measure("gradient")},
    "Parameters after the step": {
        "largest |difference|": measure("parameters"),
        "‖p₁ - p₂‖ / ‖p₁‖": measure("parameters_l2"),
    },
}


def figure(stages: Sequence[StageSteps], names: tuple[str, str], same_start: bool, folder: Path) -> list[Path]:
    """Write parity.png and parity.svg, without panels that have no data."""
    stages = [stage for stage in stages if stage.steps]
    steps = [step for stage in stages for step in stage.steps]
    shown = {
        title: lines
        for title, lines in PANELS.items()
        if any(value(step) is not None for value in lines.values() for step in steps)
    }
    with plt.rc_context(style()):
        height = 1.7 * len(shown) + 0.8  # inches
        made = Figure(figsize=(10.3, height))
        axes = made.subplots(len(shown), sharex=True, squeeze=False)
        made.subplots_adjust(left=0.075, right=0.97, top=1 - 0.65 / height, bottom=0.5 / height, hspace=0.34)
        for ax, (title, lines) in zip(axes.flat, shown.items(), strict=True):
            panel(ax, lines, steps)
            boundaries(ax, stages)
            ax.set_title(title, pad=6)
        name_stages(axes.flat[0], stages)
        axes.flat[-1].set_xlabel("step, counted through the stages" if len(stages) > 1 else "step")
        axes.flat[-1].xaxis.set_major_locator(MaxNLocator(12, integer=True))
        mode = "each step from the same weights" if same_start else "free running from the same initial weights"
        made.suptitle(
            f"{names[0]} and {names[1]}, {mode}", x=0.012, y=1 - 0.1 / height, va="top", ha="left", fontsize=11, fontweight="bold"
        )
        files = [folder / "parity.png", folder / "parity.svg"]
        for file in files:
            save(made, file)
    return files


def panel(ax: Axes, lines: dict[str, Value], steps: Sequence[Step]) -> None:
    """Draw a line for each series that has values. Zeros, which a log axis cannot show, are rings at the lower edge."""
    ax.set_yscale("log")
    zeros: list[int] = []
    positive = False
    colours = COLOURS
    for (label, value), colour in zip(lines.items(), colours, strict=False):
        values = [value(step) for step in steps]
        if all(v is None for v in values):
            continue
        marker = "o" if sum(v is not None for v in values) < 60 else None
        y = [v if v and math.isfinite(v) else math.nan for v in values]
        positive = positive or any(v == v for v in y)
        ax.plot(range(len(y)), y, color=colour, label=label, linewidth=1.3, marker=marker, markersize=2.6)
        at = [i for i, v in enumerate(values) if v == 0]
        ax.plot(at, [0.03] * len(at), "o", transform=ax.get_xaxis_transform(), markersize=3, markerfacecolor="white",
                markeredgecolor=colour, markeredgewidth=0.8, clip_on=False)  # fmt: skip
        zeros += at
    if zeros:
        ax.text(1.005, 0.03, "0", transform=ax.transAxes, va="center", fontsize=8)
    ax.yaxis.set_major_locator(LogLocator(numticks=5) if positive else NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.minorticks_off()
    ax.grid(axis="x", visible=False)
    if len([label for label in lines if label]) > 1:
        ax.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=4, fontsize=8, borderpad=0, handlelength=1.6)


def boundaries(ax: Axes, stages: Sequence[StageSteps]) -> None:
    start = 0
    for stage in stages[:-1]:
        start += len(stage.steps)
        ax.axvline(start - 0.5, color="#999999", linewidth=0.8, linestyle=(0, (2, 2)))


def name_stages(ax: Axes, stages: Sequence[StageSteps]) -> None:
    """Write each stage's name at its start, along the panel's upper edge."""
    start = 0
    for stage in stages:
        ax.annotate(plain(stage.name), (start - 0.5, 1), xycoords=ax.get_xaxis_transform(), xytext=(3, -9),
                    textcoords="offset points", fontsize=8, color="#777777", parse_math=False)  # fmt: skip
        start += len(stage.steps)
