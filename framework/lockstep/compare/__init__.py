"""`lockstep compare RUN...`: what several runs show, from their folders alone.

records   run folders into plain records
groups    runs that differ only by seed, aggregated
claims    the headline and the checklist
tables    terminal, Markdown
plots     figures
page      the HTML report
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lockstep.compare import claims, records
from lockstep.compare.claims import Claim
from lockstep.compare.groups import Comparison, group
from lockstep.compare.tables import Table, all_tables, policies_in_short, to_markdown, to_rich

__all__ = ["Report", "compare", "print_summary"]


@dataclass(frozen=True)
class Report:
    headline: str
    claims: Sequence[Claim]
    tables: Mapping[str, Table]
    comparison: Comparison
    files: Sequence[Path]


def compare(paths: Sequence[Path], output: Path) -> Report:
    """Compare the runs under ``paths`` and write report.md, report.html, report.png and metrics.csv to ``output``.

    Raises:
      DataError: a path that holds no run, or no run that can be read.
    """
    from lockstep.compare import page, plots  # matplotlib takes a second to import

    comparison = group(records.read([Path(path) for path in paths]))
    headline, found = claims.headline(comparison), claims.find(comparison)
    built = all_tables(comparison, found)
    output.mkdir(parents=True, exist_ok=True)

    figures = plots.page_figures(comparison)
    written = {
        "report.html": page.render(comparison, headline, found, built, figures),
        "report.md": _markdown(comparison, headline, built),
    }
    for name, text in written.items():
        (output / name).write_text(text)
    _write_metrics(comparison, output / "metrics.csv")
    files = [output / name for name in (*written, "metrics.csv")]
    if plots.readme_figure(comparison, output / "report.png"):
        files.append(output / "report.png")
    return Report(headline, found, built, comparison, files)


def print_summary(report: Report, console: Console | None = None) -> None:
    """The report's text for a terminal; of the policies only what is looked at first."""
    console = console or Console()
    console.print(report.headline + "\n", style="bold", markup=False, highlight=False)
    for problem in report.comparison.problems:
        console.print(problem, style="yellow", markup=False, highlight=False)
    shown = {**report.tables, "policies": policies_in_short(report.comparison)}
    for table in shown.values():
        if table.rows:
            console.print(table.title, style="bold")
            console.print(to_rich(table))
    for file in report.files:
        console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)


def _markdown(c: Comparison, headline: str, built: Mapping[str, Table]) -> str:
    problems = "\n".join(f"- {problem}" for problem in c.problems)
    runs = ", ".join(f"{g.label}: {len(g.runs)} seed{'s' if len(g.runs) > 1 else ''}" for g in c.groups)
    head = f"# Comparison\n\n{headline}\n\nRuns: {runs}. Means with 95% intervals."
    return "\n\n".join(filter(None, [head, problems, *map(to_markdown, built.values())])) + "\n"


def _write_metrics(c: Comparison, file: Path) -> None:
    """Tidy data, one value a row. Evaluations have no step; their metric is 'split/policy/metric'."""
    with open(file, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["run", "backend", "seed", "stage", "step", "metric", "value"])
        writer.writerows(_tidy(c))


def _tidy(c: Comparison) -> Iterator[list[object]]:
    for run in c.runs:
        who = [run.name, run.backend.get("name"), run.seed]
        for stage in run.stages.values():
            for metric, series in stage.metrics.items():
                for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
                    yield [*who, stage.name, step, metric, value]
        for split, policies in run.evaluation.splits.items():
            for policy, estimates in policies.items():
                for metric, estimate in estimates.items():
                    yield [*who, "evaluate", "", f"{split}/{policy}/{metric}", estimate.mean]
        for metric, estimate in run.evaluation.reward_model.items():
            yield [*who, "evaluate", "", f"reward_model/{metric}", estimate.mean]
