"""The page of a finding: page.html, page.md, page.png and outcomes.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import matplotlib.pyplot as plt
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lockstep.reporting.compare.page import template
from lockstep.reporting.compare.plots import COLOURS, FAINT, INK, save, style, to_svg
from lockstep.reporting.console import shown
from lockstep.reporting.findings.finding import ClaimConfig, Finding
from lockstep.reporting.findings.outcomes import Difference, Outcome, as_claimed
from lockstep.reporting.markdown import escaped
from lockstep.storage.files import write_text
from lockstep.version import __version__

HELD = ("held", "not held", "not decided")


@dataclass(frozen=True)
class Report:
    """A finding with what its runs say. ``how``: the criteria, cost and settings, in sentences."""

    finding: Finding
    found: Sequence[Outcome]
    differences: Sequence[Difference]
    problems: Sequence[str]
    command: str
    how: str

    @property
    def summary(self) -> str:
        """'torch: of 6 claims 5 held, 1 not decided. jax: ...'"""
        sentences = []
        for backend in dict.fromkeys(each.backend for each in self.found):
            verdicts = [each.verdict for each in self.found if each.backend == backend]
            counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in HELD if verdict in verdicts]
            sentences.append(f"{backend}: of {len(verdicts)} claims {', '.join(counts)}.")
        return " ".join(sentences) or "No run is complete yet."

    @property
    def reading(self) -> str:
        return (
            "Means over seeds with Student's 95% interval. A claim holds if the whole interval is where the criterion says, and "
            f"does not hold if none of it is. Nothing is corrected for the number of verdicts, {len(self.found)}: were nothing "
            "true, one in forty would be 'held' by chance."
        )

    def claims(self) -> list[tuple[ClaimConfig, list[Outcome]]]:
        return [
            (claim, found)
            for name, claim in self.finding.claims.items()
            if (found := [each for each in self.found if each.name == name])
        ]


def write(report: Report, output: Path) -> list[Path]:
    output.mkdir(parents=True, exist_ok=True)
    picture = ""
    if report.found:
        with plt.rc_context(style()):
            drawn = figure(report)
            picture = to_svg(drawn, "claims")
            save(drawn, output / "page.png")
    written = {"page.html": html(report, picture), "page.md": markdown(report), "outcomes.csv": table(report)}
    for name, text in written.items():
        write_text(output / name, text)
    return [output / name for name in (*written, *(["page.png"] if report.found else []))]


def html(report: Report, picture: str) -> str:
    """``picture``: SVG; empty if there is nothing to draw."""
    return template(Path(__file__).parent / "page.html.jinja").render(
        finding=report.finding,
        summary=report.summary,
        how=report.how,
        reading=report.reading,
        problems=report.problems,
        claims=report.claims(),
        as_claimed=as_claimed,
        differences=[(report.finding.claims[each.name], each) for each in report.differences],
        figure=Markup(picture),
        command=report.command,
        version=__version__,
        now=datetime.now(UTC),
    )


def markdown(report: Report) -> str:
    f = report.finding
    lines = [f"# {escaped(f.title)}", f"{escaped(f.source)}.", escaped(report.summary), escaped(report.how)]
    rows = ["| claim | published | holds if | backend | here | seeds as claimed | verdict |", "|---|---|---|---|---|---|---|"]
    for claim, found in report.claims():
        texts = [escaped(text) for text in (claim.claim, claim.published, claim.criterion)]
        rows += [
            f"| {' | '.join(texts)} | {each.backend} | {each.found} | {as_claimed(claim, each.found)} | {each.verdict} |"
            for each in found
        ]
    lines += ["\n".join(rows), escaped(report.reading)]
    if report.differences:
        rows = ["| claim | seed by seed | here | | verdicts |", "|---|---|---|---|---|"]
        for each in report.differences:
            texts = [escaped(f.claims[each.name].claim), " − ".join(each.backends), str(each.found)]
            rows.append(f"| {' | '.join(texts)} | {'apart' if each.apart else 'not apart'} | {'; '.join(each.verdicts)} |")
        lines.append("\n".join(rows))
    rows = ["| claim | value of a seed |", "|---|---|"]
    rows += [f"| {escaped(claim.claim)} | {escaped(claim.value)} |" for claim in f.claims.values()]
    lines += ["\n".join(rows), *(f"- {escaped(problem)}" for problem in report.problems), f"    {report.command}"]
    return "\n\n".join(lines) + "\n"


def table(report: Report) -> str:
    """CSV with a row for each claim, backend and seed."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["claim", "backend", "seed", "value"])
    for each in report.found:
        writer.writerows([each.name, each.backend, seed, repr(value)] for seed, value in each.found.seeds.items())
    return buffer.getvalue()


def figure(report: Report) -> Figure:
    """A panel for each claim, with its own scale: a dot with its interval for each backend, a ring for each seed, and a line
    at the criterion."""
    claims = report.claims()
    backends = list(dict.fromkeys(each.backend for each in report.found))
    colours = dict(zip(backends, COLOURS, strict=False))
    height = 0.42 + 0.16 * len(backends)
    drawn = Figure(figsize=(8.6, 0.5 + height * len(claims)), layout="constrained")
    axes = drawn.subplots(len(claims), squeeze=False)
    for ax, (claim, found) in zip(axes[:, 0], claims, strict=True):
        for row, each in enumerate(found):
            colour, seeds = colours[each.backend], list(each.found.seeds.values())
            if len(seeds) > 1:
                ax.plot([each.found.low, each.found.high], [row] * 2, color=colour, solid_capstyle="round")
            ax.plot(each.found.mean, row, "o", color=colour, markersize=5)
            ax.plot(
                seeds, [row] * len(seeds), "o", color=colour, markersize=3.5, fillstyle="none", markeredgewidth=0.7, alpha=0.7
            )
        ax.axvline(claim.bound, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
        verdicts = ", ".join(f"{each.backend} {each.verdict}" for each in found)
        ax.set_title(shown(f"{claim.claim}: {verdicts}"), fontsize=9, fontweight="normal", color=INK, parse_math=False)
        ax.set_yticks([])
        ax.set_ylim(len(found) - 0.4, -0.6)
        ax.tick_params(colors=INK, labelsize=8)
        ax.grid(visible=True, axis="x", color=FAINT)
        for side in ax.spines.values():
            side.set_color(FAINT)
    handles = [Line2D([], [], color=colour, marker="o", markersize=5, label=backend) for backend, colour in colours.items()]
    handles.append(Line2D([], [], color=INK, linewidth=0.9, linestyle=(0, (3, 2)), label="criterion"))
    drawn.legend(handles=handles, loc="outside upper right", ncols=len(handles), labelcolor=INK)
    return drawn
