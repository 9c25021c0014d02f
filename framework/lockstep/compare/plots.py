"""The figures of the page and of the README, with matplotlib and without a display.

One colour per group, one line style per stage, everywhere. The page's figures are SVG whose ink is CSS variables, so
that they follow the reader's light or dark scheme; the README's is a PNG on white.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lockstep.compare.claims import PERCENT
from lockstep.compare.groups import Comparison, Group
from lockstep.compare.records import Estimate
from lockstep.compare.tables import REWARD_MODEL_METRICS

# Told apart on white and on near-black, and by the colour-blind (after Okabe and Ito 2008).
COLOURS = ["#3b82c4", "#e07b39", "#2a9d78", "#b565a7", "#c9a227", "#5a6acf", "#c9515c", "#6b8f3c"]
LINES = ["-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5))]
INK, FAINT = "#123456", "#abcdef"  # stand-ins: `to_svg` replaces them by CSS variables, `to_png` by greys

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
}
ON_PAGE = {"text": INK, "faint": FAINT}
ON_WHITE = {"text": "#333333", "faint": "#dddddd"}

CURVES = {
    "objective/score": "Reward model's score",
    "objective/gold": "Gold score",
    "objective/kl": "KL to the reference, nats",
    "objective/entropy": "Entropy, nats per token",
    "objective/length": "Length, tokens",
}
PARTS = ("helpful", "truthful", "harmless")


def page_figures(c: Comparison) -> dict[str, str]:
    """SVG by name; a figure for which there are no data is left out."""
    makers: dict[str, Callable[[Comparison], Figure | None]] = {
        "gold": gold,
        "parts": parts,
        "curves": curves,
        "frontier": frontier,
        "ability": ability,
        "reward_model": reward_model,
        "losses": losses,
        "time": time,
    }
    with plt.rc_context(_style(ON_PAGE)):
        return {name: to_svg(figure, name) for name, make in makers.items() if (figure := make(c))}


# --------------------------------------------------------------------------------------------------------- the figures


def gold(c: Comparison) -> Figure | None:
    """The true score of each policy, one panel per split."""
    metric = next((m for m in ("gold", "score") if c.has(m)), None)
    splits = [s for s in c.splits if metric and c.has(metric, s)]
    if not splits:
        return None
    figure, axes = _panels(len(splits), height=_dots_height(c, c.policies), share=True)
    for ax, split in zip(axes, splits, strict=True):
        policy_dots(ax, c, split, metric)
        where = "held-out" if split == "heldout" else split
        ax.set_title(f"{'Gold score' if metric == 'gold' else 'Score'}, {where} prompts")
    _legend(figure, c)
    return figure


def parts(c: Comparison) -> Figure | None:
    found = [m for m in PARTS if c.split and c.has(m, c.split)]
    if not found:
        return None
    figure, axes = _panels(len(found), height=_dots_height(c, c.policies), share=True)
    for ax, metric in zip(axes, found, strict=True):
        policy_dots(ax, c, c.split, metric)
        ax.set_title(metric.capitalize())
    _legend(figure, c)
    return figure


def ability(c: Comparison) -> Figure | None:
    if not (c.split and c.has("ability", c.split)):
        return None
    figure, (ax,) = _panels(1, height=_dots_height(c, c.policies), width=6.0)
    policy_dots(ax, c, c.split, "ability", percent=True)
    _legend(figure, c)
    return figure


def curves(c: Comparison) -> Figure | None:
    """Learning curves of the stages that have an objective."""
    found = [m for m in CURVES if c.stages_with(m)]
    if not found:
        return None
    figure, axes = _panels(len(found), height=2.4, columns=3)
    stages = list(dict.fromkeys(s for m in found for s in c.stages_with(m)))
    for ax, metric in zip(axes, found, strict=True):
        draw_curves(ax, c, metric, stages)
        ax.set_title(CURVES[metric])
    for ax in axes[-3:]:
        ax.set_xlabel("step")
    _legend(figure, c, stages)
    return figure


def losses(c: Comparison) -> Figure | None:
    """Loss of each supervised stage, with its held-out loss where it has one."""
    objective = set(c.stages_with("objective/score"))
    stages = [s for s in c.stages_with("loss") if s not in objective]
    if not stages:
        return None
    figure, axes = _panels(len(stages), height=2.4, columns=3)
    for ax, stage in zip(axes, stages, strict=True):
        for g, colour in _coloured(c):
            _draw(ax, g, stage, "loss", colour, "-")
            _draw(ax, g, stage, "heldout/loss", colour, LINES[2], marker="o")
        ax.set_title(f"{stage}, loss")
        ax.set_xlabel("step")
    handles = [Line2D([], [], color=INK, linestyle=s, label=n) for n, s in (("training", "-"), ("held-out", LINES[2]))]
    held_out = any(c.stages_with("heldout/loss"))
    _legend(figure, c, extra=handles if held_out else [])
    return figure


def frontier(c: Comparison) -> Figure | None:
    """Gold against the square root of KL (Gao et al. 2022): what drift buys, and when it stops paying."""
    stages = [s for s in c.stages_with("objective/gold") if s in c.stages_with("objective/kl")]
    evaluated = c.split is not None and c.has("kl", c.split) and c.has("gold", c.split)
    if not stages and not evaluated:
        return None
    figure, (ax,) = _panels(1, height=3.6, width=6.4)
    for g, colour in _coloured(c):
        for stage, line in zip(stages, _styles(stages), strict=True):
            kl, value = g.curve(stage, "objective/kl", points=25), g.curve(stage, "objective/gold", points=25)
            if kl and value and len(kl.mean) == len(value.mean):
                ax.plot(np.sqrt(np.maximum(kl.mean, 0)), value.mean, color=colour, linestyle=line, alpha=0.75)
        for i, policy in enumerate([c.baseline, *c.after_baseline] if evaluated else []):
            drift, value = g.policy(c.split, policy, "kl"), g.policy(c.split, policy, "gold")
            if drift and value:
                _point(ax, np.sqrt(max(drift.mean, 0)), value, colour)
                if g is c.groups[0]:
                    side = (6, 8) if i % 2 else (6, -14)  # neighbours are often close
                    ax.annotate(policy, (np.sqrt(max(drift.mean, 0)), value.mean), xytext=side, textcoords="offset points")
    ax.set_xlabel("√KL to the reference, √nats")
    ax.set_ylabel("gold score")
    _legend(figure, c, stages)
    return figure


def reward_model(c: Comparison) -> Figure | None:
    """Accuracies as dots, a single labeler's agreement with gold first: the bar to pass."""
    found = [m for m, (_, form) in REWARD_MODEL_METRICS.items() if form == PERCENT and m in c.reward_model_metrics]
    if not found:
        return None
    figure, (ax,) = _panels(1, height=_dots_height(c, found), width=7.2)
    titles = [REWARD_MODEL_METRICS[m][0] for m in found]
    draw_dots(ax, c, titles, lambda g, i: (g.reward_model(found[i]), []))
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _legend(figure, c)
    return figure


def time(c: Comparison) -> Figure | None:
    """Seconds and tokens per second of each stage."""
    seconds = {s: [_mean_seconds(g, s) for g in c.groups] for s in c.stage_names}
    speeds = {s: [_mean_speed(g, s) for g in c.groups] for s in c.stages_with("perf/tokens_per_second")}
    seconds = {name: values for name, values in seconds.items() if any(values)}
    panels = [(t, v) for t, v in (("Seconds", seconds), ("Tokens per second", speeds)) if v]
    if not panels:
        return None
    most = max(len(values) for _, values in panels)
    figure, axes = _panels(len(panels), height=0.9 + most * (0.2 + 0.16 * len(c.groups)))
    for ax, (title, values) in zip(axes, panels, strict=True):
        _bars(ax, c, values)
        ax.set_title(title)
    _legend(figure, c)
    return figure


def readme_figure(c: Comparison, file: Path) -> bool:
    """The main figure as PNG: gold per policy, how it was learned, what it cost. False: there was nothing to draw."""
    metric = next((m for m in ("gold", "score") if c.split and c.has(m, c.split)), None)
    learned = [m for m in ("objective/gold", "objective/score", "objective/kl") if c.stages_with(m)][:2]
    tax = bool(c.split and c.has("ability", c.split))
    count = bool(metric) + len(learned) + tax
    if not count:
        return False
    with plt.rc_context(_style(ON_WHITE)):
        figure, axes = _panels(count, height=2.9, columns=2)
        rest = iter(axes)
        if metric:
            ax = next(rest)
            policy_dots(ax, c, c.split, metric)
            ax.set_title("Gold score" if metric == "gold" else "Reward model's score")
        stages = list(dict.fromkeys(s for m in learned for s in c.stages_with(m)))
        for name in learned:
            ax = next(rest)
            draw_curves(ax, c, name, stages)
            ax.set_title(f"{CURVES[name]}, during training")
            ax.set_xlabel("step")
        if tax:
            ax = next(rest)
            policy_dots(ax, c, c.split, "ability", percent=True)
            ax.set_title("Ability")
        _legend(figure, c, stages)
        figure.savefig(file, dpi=160, facecolor="white", bbox_inches="tight")
        plt.close(figure)
    return True


# ------------------------------------------------------------------------------------------------------- what they draw


def policy_dots(ax: Axes, c: Comparison, split: str, metric: str, percent: bool = False) -> None:
    def of(g: Group, i: int) -> tuple[Estimate | None, Sequence[Estimate]]:
        return g.policy(split, c.policies[i], metric), g.policy_estimates(split, c.policies[i], metric)

    draw_dots(ax, c, c.policies, of)
    if percent:
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def draw_dots(
    ax: Axes, c: Comparison, labels: Sequence[str], of: Callable[[Group, int], tuple[Estimate | None, Sequence[Estimate]]]
) -> None:
    """One row per label, one dot with its interval per group; each seed as a small ring where there are several."""
    spacing = min(0.22, 0.7 / len(c.groups))
    offsets = (np.arange(len(c.groups)) - (len(c.groups) - 1) / 2) * spacing
    for (g, colour), offset in zip(_coloured(c), offsets, strict=True):
        for i in range(len(labels)):
            estimate, seeds = of(g, i)
            if estimate is None:
                continue
            ax.plot([estimate.low, estimate.high], [i + offset] * 2, color=colour, solid_capstyle="round")
            ax.plot(estimate.mean, i + offset, "o", color=colour, markersize=5)
            if len(seeds) > 1:
                ring = dict(markersize=3.5, markerfacecolor="none", markeredgewidth=0.7, linestyle="none", alpha=0.8)
                ax.plot([e.mean for e in seeds], [i + offset] * len(seeds), "o", color=colour, **ring)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def draw_curves(ax: Axes, c: Comparison, metric: str, stages: Sequence[str]) -> None:
    for g, colour in _coloured(c):
        for stage, line in zip(stages, _styles(stages), strict=True):
            _draw(ax, g, stage, metric, colour, line)


def _draw(ax: Axes, g: Group, stage: str, metric: str, colour: str, line, marker: str | None = None) -> None:
    """The mean over seeds, with a band from the smallest to the largest."""
    curve = g.curve(stage, metric)
    if curve is None:
        return
    ax.plot(curve.steps, curve.mean, color=colour, linestyle=line, marker=marker, markersize=3)
    if len(g.runs) > 1:
        ax.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.14, linewidth=0)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _point(ax: Axes, x: float, y: Estimate, colour: str) -> None:
    ax.plot([x, x], [y.low, y.high], color=colour, linewidth=1)
    ax.plot(x, y.mean, "o", color=colour, markersize=6)


def _bars(ax: Axes, c: Comparison, values: dict[str, list[float | None]]) -> None:
    height = 0.8 / len(c.groups)
    for i, (_, colour) in enumerate(_coloured(c)):
        y = np.arange(len(values)) + (i - (len(c.groups) - 1) / 2) * height
        ax.barh(y, [row[i] or 0 for row in values.values()], height=height * 0.86, color=colour)
    ax.set_yticks(range(len(values)), list(values))
    ax.set_ylim(len(values) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")


def _mean_seconds(g: Group, stage: str) -> float | None:
    found = [s.seconds for s in g.stages(stage) if s.seconds is not None]
    return float(np.mean(found)) if found else None


def _mean_speed(g: Group, stage: str) -> float | None:
    curve = g.curve(stage, "perf/tokens_per_second", points=1)
    return float(curve.mean[0]) if curve else None


# -------------------------------------------------------------------------------------------------------------- layout


def _style(ink: dict[str, str]) -> dict[str, object]:
    text = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink["text"])
    return {**STYLE, **text, "grid.color": ink["faint"], "axes.edgecolor": ink["faint"], "xtick.labelcolor": ink["text"]}


def _panels(count: int, *, height: float, width: float = 10.3, columns: int | None = None, share: bool = False):
    """A figure of ``count`` panels, each ``height`` inches high; the surplus of the last row is switched off."""
    columns = min(columns or count, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height * rows + 0.35), squeeze=False, sharex=share, sharey=share, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return figure, list(axes.flat[:count])


def _dots_height(c: Comparison, rows: Sequence[str]) -> float:
    return 0.8 + len(rows) * max(0.4, 0.12 * len(c.groups))


def _coloured(c: Comparison) -> list[tuple[Group, str]]:
    return [(g, COLOURS[i % len(COLOURS)]) for i, g in enumerate(c.groups)]


def _styles(stages: Sequence[str]) -> list:
    return [LINES[i % len(LINES)] for i in range(len(stages))]


def _legend(figure: Figure, c: Comparison, stages: Sequence[str] = (), extra: Sequence[Line2D] = ()) -> None:
    """Colours for groups, line styles for stages, above the panels; nothing where there is nothing to tell apart."""
    handles = [Line2D([], [], color=colour, marker="o", markersize=5, label=g.label) for g, colour in _coloured(c)]
    handles = handles if len(handles) > 1 else []
    if len(stages) > 1:
        ink = plt.rcParams["text.color"]
        handles += [Line2D([], [], color=ink, linestyle=s, label=n) for n, s in zip(stages, _styles(stages), strict=True)]
    handles += extra
    if handles:
        longest = max(len(str(handle.get_label())) for handle in handles)
        columns = int(figure.get_figwidth() / (0.55 + 0.075 * longest))  # inches of a line sample and of a letter
        figure.legend(handles=handles, loc="outside upper left", ncols=max(1, min(columns, len(handles))), handlelength=2.6)


def to_svg(figure: Figure, name: str) -> str:
    """The figure for inlining: no XML header, no fixed size, no background, ids of its own, ink from CSS."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    width, _ = figure.get_size_inches() * 96
    size = f'style="max-width: {width:.0f}px" role="img" aria-label="{name}"'
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', size, svg, count=1)
    svg = re.sub(r"font: ([^;\"]*?)([\d.]+)px [^;\"]*", r"font: \1\2px var(--sans)", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)  # every figure has an 'axes_1'
    return svg.replace(INK, "var(--ink)").replace(FAINT, "var(--rule)")
