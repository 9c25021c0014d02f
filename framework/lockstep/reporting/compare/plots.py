"""How figures are drawn, with matplotlib and without a display.

One colour per group, one line style per stage, everywhere. If several backends have several groups each, every backend has
its own range of colours. On the page they are SVG with CSS variables as ink, and so follow the reader's light or dark
scheme; for papers they are on white.
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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lockstep.reporting.compare.groups import RunComparison, RunGroup
from lockstep.reporting.compare.records import Estimate
from lockstep.reporting.console import shown

# Distinct on white and on near-black, and for colour-blind readers (after Okabe and Ito 2008).
COLOURS = ["#3b82c4", "#e07b39", "#2a9d78", "#b565a7", "#c9a227", "#5a6acf", "#c9515c", "#6b8f3c"]
RANGES = [("#57c4a4", "#3b82c4", "#6d55cc"), ("#e3b23c", "#dd6a2f", "#a8355f"), ("#b5c648", "#45a050", "#23808a")]  # per backend
LINES = ["-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5))]
LONGEST_LABEL = 48
INK, FAINT = "#333333", "#dddddd"
"""Text and grid on white. On the page, CSS variables are in their place."""

DPI = 200

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
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
}

# ------------------------------------------------------------------------------------------------------------- drawing


def policy_dots(ax: Axes, c: RunComparison, split: str, metric: str, percent: bool = False) -> None:
    def of(g: RunGroup, i: int) -> tuple[Estimate | None, Sequence[Estimate]]:
        return g.policy(split, c.policies[i], metric), g.policy_estimates(split, c.policies[i], metric)

    draw_dots(ax, c, c.policies, of)
    _wider_than_noise(ax, [e.high - e.low for g in c.groups for i in range(len(c.policies)) if (e := of(g, i)[0])])
    if percent:
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _wider_than_noise(ax: Axes, widths: Sequence[float]) -> None:
    """Widen the x axis until the widest interval takes at most a third of it, so that noise looks small."""
    low, high = ax.get_xlim()
    ax.set_xlim(_spanning(low, high, 3 * max(widths, default=0.0)))


def _spanning(low: float, high: float, least: float) -> tuple[float, float]:
    """The limits of an axis, moved apart until they span at least ``least``."""
    missing = max(0.0, least - (high - low))
    return low - missing / 2, high + missing / 2


def draw_dots(
    ax: Axes, c: RunComparison, labels: Sequence[str], of: Callable[[RunGroup, int], tuple[Estimate | None, Sequence[Estimate]]]
) -> None:
    """One row per label, one dot with its interval per group; each seed as a small ring if there are several."""
    spacing = min(0.22, 0.7 / len(c.groups))
    offsets = (np.arange(len(c.groups)) - (len(c.groups) - 1) / 2) * spacing
    for (g, colour), offset in zip(coloured(c), offsets, strict=True):
        for i in range(len(labels)):
            estimate, seeds = of(g, i)
            if estimate is None:
                continue
            ax.plot([estimate.low, estimate.high], [i + offset] * 2, color=colour, solid_capstyle="round")
            ax.plot(estimate.mean, i + offset, "o", color=colour, markersize=5)
            if len(seeds) > 1:
                ring = dict(markersize=3.5, markerfacecolor="none", markeredgewidth=0.7, linestyle="none", alpha=0.8)
                ax.plot([e.mean for e in seeds], [i + offset] * len(seeds), "o", color=colour, **ring)
    _rows(ax, labels, 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def draw_curves(ax: Axes, c: RunComparison, metric: str, stages: Sequence[str]) -> None:
    """Draw a curve per group and stage. Earlier groups are drawn wider, so that they show behind a later one that coincides."""
    widths = np.linspace(1.3, 3.5, len(c.groups))[::-1]
    for (g, colour), width in zip(coloured(c), widths, strict=True):
        for stage, line in zip(stages, styles(stages), strict=True):
            draw_curve(ax, g, stage, metric, colour, line, width=width)
    not_too_near(ax, 0.05)


def draw_curve(
    ax: Axes, g: RunGroup, stage: str, metric: str, colour: str, line, marker: str | None = None, width: float | None = None
) -> None:
    """The interquartile mean over runs, with the band of its interval if there are several."""
    curve = g.curve(stage, metric)
    if curve is None:
        return
    ax.plot(curve.steps, curve.mean, color=colour, linestyle=line, marker=marker, markersize=3, linewidth=width)
    if len(g.runs) > 1:
        ax.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.14, linewidth=0)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def not_too_near(ax: Axes, share: float) -> None:
    """Widen the y axis until it spans this share of its largest absolute value, so that a flat curve looks flat."""
    low, high = ax.get_ylim()
    ax.set_ylim(_spanning(low, high, share * max(abs(low), abs(high))))


def draw_point(ax: Axes, x: float, y: Estimate, colour: str) -> None:
    ax.plot([x, x], [y.low, y.high], color=colour, linewidth=1)
    ax.plot(x, y.mean, "o", color=colour, markersize=6)


def draw_bars(ax: Axes, colours: Sequence[str], values: dict[str, list[float | None]]) -> None:
    """One row per name in ``values``, with a bar per colour."""
    height = 0.8 / len(colours)
    for i, colour in enumerate(colours):
        y = np.arange(len(values)) + (i - (len(colours) - 1) / 2) * height
        ax.barh(y, [row[i] or 0 for row in values.values()], height=height * 0.86, color=colour)
    _rows(ax, list(values), 0.45)
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.10g}")


def draw_forest(ax: Axes, rows: Sequence[tuple[str, Estimate | None, str]], neutral: float) -> None:
    """One (label, estimate, colour) per row, around ``neutral``, the value that means no difference."""
    ax.axvline(neutral, color=plt.rcParams["text.color"], linewidth=0.8, alpha=0.6)
    for i, (_, estimate, colour) in enumerate(rows):
        if estimate:
            ax.plot([estimate.low, estimate.high], [i, i], color=colour, linewidth=2.2, solid_capstyle="round")
            ax.plot(estimate.mean, i, "o", color=colour, markersize=6)
    _rows(ax, [label for label, _, _ in rows], 0.5)


def draw_squares(ax: Axes, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]]) -> None:
    """A square with its number for each value, darker for higher values. The scale is 0 to 1, or wider if values lie outside."""
    known = [value for row in values for value in row if value is not None]
    least, most = min(0.0, *known), max(1.0, *known)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value is not None:
                depth = (value - least) / (most - least)
                ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, color=COLOURS[0], alpha=0.08 + 0.72 * depth, linewidth=0))
                ax.annotate(f"{value:.2f}", (x, y), ha="center", va="center", fontsize=7.5)
    _rows(ax, rows, 0.5)
    ax.set_xlim(-0.5, len(columns) - 0.5)
    ax.set_xticks(range(len(columns)), list(map(plain, columns)), rotation=35, ha="right")
    ax.grid(visible=False)
    ax.spines["bottom"].set_visible(False)


def plain(name: str) -> str:
    """A name as a label: visible, on one line, cut where it would crowd out the figure. A leading underscore gets a space before
    it, because Matplotlib leaves such labels out of legends."""
    line = " ".join(shown(name).split())
    line = line if len(line) <= LONGEST_LABEL else f"{line[: LONGEST_LABEL - 1]}…"
    return f" {line}" if line.startswith("_") else line


def _rows(ax: Axes, labels: Sequence[str], margin: float) -> None:
    ax.set_yticks(range(len(labels)), list(map(plain, labels)))
    ax.set_ylim(len(labels) - margin, -margin)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)


# -------------------------------------------------------------------------------------------------------------- layout


def style() -> dict[str, object]:
    text = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "xtick.labelcolor"), INK)
    colours = {"grid.color": FAINT, "axes.edgecolor": FAINT}
    return {**STYLE, **text, **colours, "text.parse_math": False}  # a dollar sign in a name begins no formula


def panels(count: int, *, height: float, width: float = 10.3, columns: int | None = None, **share: bool):
    """A figure of ``count`` panels, each ``height`` inches high; unused places in the last row stay empty."""
    columns = min(columns or count, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width, height * rows + 0.35), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **share)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    for ax in axes.flat[max(0, count - columns) : count]:
        ax.tick_params(labelbottom=True)  # also above an unused place, if panels share the axis
    return figure, list(axes.flat[:count])


def dots_height(c: RunComparison, rows: Sequence[str]) -> float:
    return 0.8 + len(rows) * max(0.4, 0.12 * len(c.groups))


def coloured(c: RunComparison) -> list[tuple[RunGroup, str]]:
    backends = list(dict.fromkeys(g.backend for g in c.groups))
    if len(backends) == 1 or len(backends) == len(c.groups):
        return [(g, COLOURS[i % len(COLOURS)]) for i, g in enumerate(c.groups)]
    members = {backend: [g for g in c.groups if g.backend == backend] for backend in backends}
    ranges = {b: LinearSegmentedColormap.from_list(b, RANGES[i % len(RANGES)]) for i, b in enumerate(backends)}
    place = lambda g: members[g.backend].index(g) / max(1, len(members[g.backend]) - 1)  # noqa: E731
    return [(g, to_hex(ranges[g.backend](place(g)))) for g in c.groups]


def styles(stages: Sequence[str]) -> list:
    return [LINES[i % len(LINES)] for i in range(len(stages))]


def legend(figure: Figure, c: RunComparison, stages: Sequence[str] = (), extra: Sequence[Line2D] = ()) -> None:
    """Draw colours for groups and line styles for stages above the panels; neither if there is only one of them."""
    handles = [Line2D([], [], color=colour, marker="o", markersize=5, label=plain(g.label)) for g, colour in coloured(c)]
    handles = handles if len(handles) > 1 else []
    if len(stages) > 1:
        ink = plt.rcParams["text.color"]
        handles += [Line2D([], [], color=ink, linestyle=s, label=plain(n)) for n, s in zip(stages, styles(stages), strict=True)]
    handles += extra
    if handles:
        longest = max(len(str(handle.get_label())) for handle in handles)
        columns = int(figure.get_figwidth() / (0.55 + 0.075 * longest))  # inches of a line sample and of a letter
        rows = -(-len(handles) // max(1, columns))
        figure.legend(handles=handles, loc="outside upper left", ncols=-(-len(handles) // rows), handlelength=2.6)


def save(figure: Figure, file: Path) -> None:
    """Write the figure as .png or .svg, on white. `Figure.savefig` draws everything twice."""
    figure.set_facecolor("white")
    if file.suffix == ".png":
        figure.set_dpi(DPI)  # `print_svg` leaves it at 72
        FigureCanvasAgg(figure).print_png(file)
    else:
        with plt.rc_context({"svg.fonttype": "path", "svg.hashsalt": "lockstep"}):
            FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})


def to_svg(figure: Figure, name: str) -> str:
    """The figure as SVG for inlining: no XML header, no fixed size, no background, unique ids, ink from CSS. Its layout is then
    computed and stays."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    width, _ = figure.get_size_inches() * 96
    size = f'style="max-width: {width:.0f}px" role="img" aria-label="{name}"'
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', size, svg, count=1)
    svg = re.sub(r"font: ([^;\"<]*?)([\d.]+)px [^;\"<]*", r"font: \1\2px var(--sans)", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)  # every figure has an 'axes_1'
    return svg.replace(INK, "var(--ink)").replace(FAINT, "var(--rule)")
