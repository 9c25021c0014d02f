"""The figures for the page, the README and papers. `plots` draws them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from lockstep.reporting.compare import cost
from lockstep.reporting.compare.claims import PERCENT, headline_metric
from lockstep.reporting.compare.groups import RunComparison, RunGroup
from lockstep.reporting.compare.plots import (
    COLOURS,
    LINES,
    coloured,
    dots_height,
    draw_bars,
    draw_curve,
    draw_curves,
    draw_dots,
    draw_forest,
    draw_point,
    draw_squares,
    legend,
    panels,
    plain,
    policy_dots,
    save,
    style,
    styles,
    to_svg,
)
from lockstep.reporting.compare.tables import REWARD_MODEL_METRICS, gold_parts
from lockstep.reporting.compare.versus import Versus

CURVES = {
    "objective/score": "Reward model's score",
    "objective/gold": "Gold score",
    "objective/kl": "KL to the reference, nats",
    "objective/entropy": "Entropy, nats per token",
    "objective/length": "Length, tokens",
}
AGAINST_KL = {"score": "Proxy: the reward model's score", "gold": "Gold score"}


def drawn(c: RunComparison, found: Sequence[Versus], metrics: Sequence[str] = ()) -> dict[str, Figure]:
    """The figures that have data, by name."""
    with plt.rc_context(style()):
        return {name: figure for name, make in _makers(found, metrics).items() if (figure := make(c))}


def for_page(figures: Mapping[str, Figure]) -> dict[str, str]:
    """SVG in colours that follow the page."""
    with plt.rc_context(style()):
        return {name: to_svg(figure, name) for name, figure in figures.items()}


def for_papers(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write ``NAME.png`` and ``.svg``, on white."""
    folder.mkdir(exist_ok=True)
    files = {folder / f"{name}.{kind}": figure for name, figure in figures.items() for kind in ("png", "svg")}
    with plt.rc_context(style()):
        for file, figure in files.items():
            save(figure, file)
    return list(files)


OWN = "metric-"
"""Prefix of the names of figures of metrics that the reader asked for."""


def _makers(found: Sequence[Versus], metrics: Sequence[str]) -> dict[str, Callable[[RunComparison], Figure | None]]:
    own = {OWN + re.sub(r"\W+", "-", name): functools.partial(one_metric, metric=name) for name in metrics}
    return own | {
        "gold": gold,
        "parts": parts,
        "ability": ability,
        "against": lambda c: against_baseline(c, found),
        "frontier": frontier,
        "judges": judges,
        "best_of": best_of,
        "curves": curves,
        "reward_model": reward_model,
        "losses": losses,
        "cost": costs,
    }


# --------------------------------------------------------------------------------------------------------- the figures


def gold(c: RunComparison) -> Figure | None:
    """The true score of each policy, one panel per split."""
    metric = next((m for m in ("gold", "score") if c.has(m)), None)
    splits = [s for s in c.splits if metric and c.has(metric, s)]
    if not splits:
        return None
    figure, axes = panels(len(splits), height=dots_height(c, c.policies), columns=3, sharex=True, sharey=True)
    for ax, split in zip(axes, splits, strict=True):
        policy_dots(ax, c, split, metric)
        where = "held-out" if split == "heldout" else split
        ax.set_title(plain(f"{'Gold score' if metric == 'gold' else 'Score'}, {where} prompts"))
    legend(figure, c)
    return figure


def one_metric(c: RunComparison, metric: str) -> Figure | None:
    """Any metric by its name: one panel per split, over policies, and one over the steps of the stages that have it."""
    splits, stages = [s for s in c.splits if c.has(metric, s)], c.stages_with(metric)
    figure, axes = panels(len(splits) + bool(stages), height=max(2.4, dots_height(c, c.policies)), columns=3)
    for ax, split in zip(axes, splits, strict=False):
        policy_dots(ax, c, split, metric)
        ax.set_title(plain(f"{metric}, {split}"))
    if stages:
        draw_curves(axes[-1], c, metric, stages)
        axes[-1].set_title(plain(f"{metric}, in training"))
        axes[-1].set_xlabel("step")
    legend(figure, c, stages)
    return figure


def parts(c: RunComparison) -> Figure | None:
    found = [m for m in gold_parts(c) if c.split and c.has(m, c.split)]
    if not found:
        return None
    figure, axes = panels(len(found), height=dots_height(c, c.policies), columns=3, sharex=True, sharey=True)
    for ax, metric in zip(axes, found, strict=True):
        policy_dots(ax, c, c.split, metric)
        ax.set_title(plain(metric.capitalize()))
    legend(figure, c)
    return figure


def ability(c: RunComparison) -> Figure | None:
    if not (c.split and c.has("ability", c.split)):
        return None
    figure, (ax,) = panels(1, height=dots_height(c, c.policies), width=6.0)
    policy_dots(ax, c, c.split, "ability", percent=True)
    legend(figure, c)
    return figure


def curves(c: RunComparison) -> Figure | None:
    """Learning curves of the stages that have an objective."""
    found = [m for m in CURVES if c.stages_with(m)]
    if not found:
        return None
    figure, axes = panels(len(found), height=2.4, columns=3)
    stages = list(dict.fromkeys(s for m in found for s in c.stages_with(m)))
    for ax, metric in zip(axes, found, strict=True):
        draw_curves(ax, c, metric, stages)
        ax.set_title(CURVES[metric])
    for ax in axes[-3:]:
        ax.set_xlabel("step")
    legend(figure, c, stages)
    return figure


def losses(c: RunComparison) -> Figure | None:
    """Loss of each supervised stage, with its held-out loss if it has one; per backend if its groups share the stages."""
    objective = set(c.stages_with("objective/score"))
    stages = [s for s in c.stages_with("loss") if s not in objective]
    if not stages:
        return None
    if all(_made(g, stages) == _made(b, stages) for b in cost.by_backend(c) for g in c.groups if g.backend == b.label):
        c = dataclasses.replace(c, groups=cost.by_backend(c))
    figure, axes = panels(len(stages), height=2.4, columns=3)
    for ax, stage in zip(axes, stages, strict=True):
        for g, colour in coloured(c):
            draw_curve(ax, g, stage, "loss", colour, "-")
            draw_curve(ax, g, stage, "heldout/loss", colour, LINES[2], marker="o")
        ax.set_title(plain(f"{stage}, loss"))
        ax.set_xlabel("step")
    ink = plt.rcParams["text.color"]
    handles = [Line2D([], [], color=ink, linestyle=s, label=n) for n, s in (("training", "-"), ("held-out", LINES[2]))]
    held_out = any(c.stages_with("heldout/loss"))
    legend(figure, c, extra=handles if held_out else [])
    return figure


def _made(g: RunGroup, stages: Sequence[str]) -> set[str]:
    return {stage.identity for name in stages for stage in g.stages(name)}


def frontier(c: RunComparison) -> Figure | None:
    """Proxy and gold score against the square root of KL (Gao et al. 2022): what drift gains, and where it stops helping."""
    trained = c.stages_with("objective/kl")
    evaluated = bool(c.split and c.has("kl", c.split))
    found = [m for m in AGAINST_KL if (evaluated and c.has(m, c.split)) or set(c.stages_with(f"objective/{m}")) & set(trained)]
    if not found:
        return None
    figure, axes = panels(len(found), height=3.4, width=10.3 if len(found) > 1 else 6.4, sharex=True)
    for ax, metric in zip(axes, found, strict=True):
        for g, colour in coloured(c):
            for stage, line in zip(trained, styles(trained), strict=True):
                kl, value = g.curve(stage, "objective/kl", points=25), g.curve(stage, f"objective/{metric}", points=25)
                if kl and value and len(kl.mean) == len(value.mean):
                    ax.plot(_root(kl.mean), value.mean, color=colour, linestyle=line, linewidth=1, alpha=0.55)
        if evaluated:
            _evaluated_points(ax, c, metric)
        ax.set_title(AGAINST_KL[metric])
        ax.set_xlabel("√KL to the reference, √nats")
    legend(figure, c, trained)
    return figure


def judges(c: RunComparison) -> Figure | None:
    """A panel per judge and group, with a square per policy and split, darker where the judge's mean score is higher."""
    shown = [(name, g) for name in c.judges for g in c.groups if any(g.policy(s, p, name) for s in c.splits for p in c.policies)]
    if not shown:
        return None
    figure, axes = panels(len(shown), height=1.3 + 0.32 * len(c.policies), columns=2)
    for ax, (name, g) in zip(axes, shown, strict=True):
        found = [[g.policy(split, policy, name) for split in c.splits] for policy in c.policies]
        draw_squares(ax, c.policies, c.splits, [[None if each is None else each.mean for each in row] for row in found])
        ax.set_title(plain(f"{name}, {g.label}" if len(c.groups) > 1 else name))
    return figure


def best_of(c: RunComparison) -> Figure | None:
    """The baseline's best of n samples, for n = 1, 2, 4, ..., beside the trained policies: score and gold against √KL."""
    estimate = lambda g, n, metric: g.policy(c.split, c.baseline, f"best_of_{n}/{metric}")  # noqa: E731
    found = [m for m in AGAINST_KL if any(estimate(g, n, m) for g in c.groups for n in c.best_of)]
    if not found:
        return None
    figure, axes = panels(len(found), height=3.4, width=10.3 if len(found) > 1 else 6.4, sharex=True)
    for ax, metric in zip(axes, found, strict=True):
        for g, colour in coloured(c):
            kl = [(n, e) for n in c.best_of if (e := estimate(g, n, "kl"))]
            points = [(n, float(_root(e.mean)), value) for n, e in kl if (value := estimate(g, n, metric))]
            ax.plot([x for _, x, _ in points], [y.mean for *_, y in points], color=colour, linewidth=1, alpha=0.7)
            for n, x, y in points:
                ax.plot([x, x], [y.low, y.high], color=colour, linewidth=1)
                ax.plot(x, y.mean, "o", color=colour, markersize=4, markerfacecolor="none")
                if g is c.groups[0] and n > 1:
                    ax.annotate(f"n={n}", (x, y.mean), xytext=(4, -10), textcoords="offset points", fontsize=7)
        _evaluated_points(ax, c, metric)
        ax.set_title(AGAINST_KL[metric])
        ax.set_xlabel(plain(f"√KL to {c.baseline}, √nats"))
    legend(figure, c)
    return figure


def _evaluated_points(ax: Axes, c: RunComparison, metric: str) -> None:
    """A dot per policy and group. The last policy's dots are joined, backend by backend: the frontier."""
    for i, policy in enumerate([c.baseline, *c.after_baseline]):
        places = {}
        for g, colour in coloured(c):
            drift, value = g.policy(c.split, policy, "kl"), g.policy(c.split, policy, metric)
            if drift and value:
                x = float(_root(drift.mean))
                draw_point(ax, x, value, colour)
                places.setdefault(g.backend, []).append((x, value.mean))
                if g is c.groups[0]:
                    side = (6, 8) if i % 2 else (6, -14)  # neighbours are often close
                    ax.annotate(plain(str(policy)), (x, value.mean), xytext=side, textcoords="offset points")
        for line in places.values() if policy == c.policies[-1] else ():
            ax.plot(*zip(*sorted(line), strict=True), color=plt.rcParams["text.color"], linewidth=0.8, alpha=0.5, zorder=1)


def _root(kl: np.ndarray | float) -> np.ndarray:
    return np.sqrt(np.maximum(kl, 0))  # an estimate of a small KL may be negative


def against_baseline(c: RunComparison, found: Sequence[Versus]) -> Figure | None:
    """Difference and probability of improvement, in the headline metric, of every policy trained against a reward."""
    metric = headline_metric(c)
    rows = [v for v in found if v.metric == metric]
    if not rows:
        return None
    several = len({v.policy for v in rows}) > 1
    same = len({v.names[1] for v in rows}) == 1
    colours = {g.label: colour for g, colour in coloured(c)}
    names = [f"{v.policy}: " * several + v.group.label + (f" against {v.names[1]}" if not same else "") for v in rows]
    figure, axes = panels(2, height=0.9 + 0.26 * len(rows), sharey=True)
    against = rows[0].names[1] if same else "its baseline"
    for ax, estimates, neutral in ((axes[0], [v.difference for v in rows], 0.0), (axes[1], [v.improvement for v in rows], 0.5)):
        draw_forest(ax, list(zip(names, estimates, [colours[v.group.label] for v in rows], strict=True)), neutral)
    axes[0].set_title(plain(f"{metric.replace('_', ' ').capitalize()} minus that of {against}"))
    axes[1].set_title("Probability of improvement")
    axes[1].set_xlim(-0.03, 1.03)
    axes[1].xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def reward_model(c: RunComparison) -> Figure | None:
    """Accuracies as dots. A single labeler's agreement with gold comes first: the mark to beat."""
    found = [m for m, (_, form) in REWARD_MODEL_METRICS.items() if form == PERCENT and m in c.reward_model_metrics]
    if not found:
        return None
    figure, (ax,) = panels(1, height=dots_height(c, found), width=7.2)
    titles = [REWARD_MODEL_METRICS[m][0] for m in found]
    draw_dots(ax, c, titles, lambda g, i: (g.reward_model(found[i]), []))
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend(figure, c)
    return figure


def costs(c: RunComparison) -> Figure | None:
    """Seconds, tokens per second and peak memory of each stage, per backend."""
    backends = cost.by_backend(c)
    measures = {"Seconds": cost.seconds, "Tokens per second": cost.speed, "Peak memory, GiB": cost.memory}
    found = {title: {s: [of(g, s) for g in backends] for s in c.stage_names} for title, of in measures.items()}
    found = {title: {s: row for s, row in values.items() if any(row)} for title, values in found.items()}
    found = {title: values for title, values in found.items() if values}
    if not found:
        return None
    most = max(map(len, found.values()))
    figure, axes = panels(len(found), height=0.9 + most * (0.2 + 0.16 * len(backends)))
    colours = COLOURS[: len(backends)]
    for ax, (title, values) in zip(axes, found.items(), strict=True):
        draw_bars(ax, colours, values)
        ax.set_title(title)
    handles = [
        Line2D([], [], color=k, marker="o", markersize=5, label=plain(g.label)) for g, k in zip(backends, colours, strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), handlelength=2.6)
    return figure


def readme_figure(c: RunComparison, file: Path) -> bool:
    """The main figure as PNG: gold per policy, how it was learned, what it cost. False if there is nothing to draw."""
    metric = next((m for m in ("gold", "score") if c.split and c.has(m, c.split)), None)
    learned = [m for m in ("objective/gold", "objective/score", "objective/kl") if c.stages_with(m)][:2]
    tax = bool(c.split and c.has("ability", c.split))
    count = bool(metric) + len(learned) + tax
    if not count:
        return False
    with plt.rc_context(style()):
        figure, axes = panels(count, height=2.9, columns=2)
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
        legend(figure, c, stages)
        save(figure, file)
    return True
