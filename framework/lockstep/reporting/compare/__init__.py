"""`lockstep compare PATH...`: a report on several runs, from their folders or W&B runs alone.

records               runs as plain records
reading, wandb_runs   records read from run folders and from W&B
groups                runs that are compared as one, aggregated
statistics, versus    over seeds: interquartile means, probabilities of improvement, seed by seed against a baseline
decisions             tests of differences, corrections for multiple tests, how many seeds decide
claims                the headline and the checklist
cost                  seconds, tokens per second, episodes, memory
tables                terminal, Markdown, LaTeX
plots, figures        how figures are drawn, and which
page                  the HTML report
tidy                  CSV and Parquet
wandb_report          the report at W&B
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.reporting.compare import claims, cost, reading, versus
from lockstep.reporting.compare.claims import Claim
from lockstep.reporting.compare.decisions import Correction
from lockstep.reporting.compare.groups import RunComparison, group
from lockstep.reporting.compare.tables import Table, all_tables, in_short, to_latex, to_markdown, to_rich
from lockstep.reporting.compare.versus import Versus
from lockstep.reporting.console import Terminal
from lockstep.reporting.markdown import escaped

__all__ = ["CompareReport", "compare", "print_summary"]


@dataclass(frozen=True)
class CompareReport:
    headline: str
    claims: Sequence[Claim]
    tables: Mapping[str, Table]
    comparison: RunComparison
    against: Sequence[Versus]
    correction: Correction
    files: Sequence[Path]


def compare(
    paths: Sequence[Path | str], output: Path, by: Sequence[str] | None = None, baseline: str | None = None,
    correction: Correction = "holm", difference: float = 0.0, metrics: Sequence[str] = (),
) -> CompareReport:  # fmt: skip
    """Compare the runs under ``paths``; write the report to ``output``: report.html, .md, .tex and .png, metrics.csv and
    .parquet, and every figure as PNG and SVG.

    Args:
      paths: run folders, folders of them, sweep folders, or W&B filters 'wandb:entity/project?group=...'.
      by: configuration keys to group by; by default those in which the runs differ, except the seed.
      baseline: the group that the others are compared with; see `versus.pairs`.
      correction: how p-values against the baseline are corrected for their number; see `decisions.corrected`.
      difference: report how many seeds this difference needs; 0: no such report.
      metrics: additional metrics to draw, by their names in evaluations or in stages.

    Raises:
      DataError: a path has no run, or no run can be read.
      ConfigError: the runs lack a key, the baseline or a metric.
    """
    from lockstep.reporting.compare import figures, page, tidy  # matplotlib takes a second to import

    comparison = group(reading.read(paths), by)
    comparison.check_metrics(metrics)
    against = versus.against_baseline(comparison, versus.pairs(comparison, baseline))
    headline, found = claims.headline(comparison), claims.find(comparison)
    built, over = all_tables(comparison, found, against, correction, difference), what_intervals_are_over(comparison)
    drawn = figures.drawn(comparison, against, metrics)
    output.mkdir(parents=True, exist_ok=True)

    written = {
        "report.html": page.render(comparison, headline, over, found, built, figures.for_page(drawn)),
        "report.md": _markdown(comparison, headline, built),
        "report.tex": "\n\n".join(map(to_latex, built.values())) + "\n",
    }
    for name, text in written.items():
        (output / name).write_text(text, encoding="utf-8")
    files = [output / name for name in written]
    files += tidy.write(comparison, output)
    main = output / "report.png"
    files += [main] if figures.readme_figure(comparison, main) else []
    files += figures.for_papers(drawn, output / "figures")
    return CompareReport(headline, found, built, comparison, against, correction, files)


def print_summary(report: CompareReport, console: Terminal | None = None, with_power: bool = False) -> None:
    """Print the report for a terminal, with only the main numbers of the policies."""
    console = console or Terminal()
    console.print(report.headline + "\n", style="bold")
    for problem in report.comparison.problems:
        console.print(problem, style="yellow")
    short = in_short(report.comparison, report.against, report.tables, report.correction, with_power)
    for table in short.values():
        console.print(table.title, style="bold")
        console.print(to_rich(table))
    console.print(what_intervals_are_over(report.comparison))
    for file in report.files:
        if file.parent.name != "figures":
            console.print(f"wrote {file}", soft_wrap=True)
    if figures := next((file.parent for file in report.files if file.parent.name == "figures"), None):
        console.print(f"wrote {figures} (PNG and SVG)", soft_wrap=True)


def what_intervals_are_over(c: RunComparison) -> str:
    """One or two sentences: intervals are over prompts, over seeds, or which groups have which."""
    policies = [found for run in c.runs for split in run.evaluation.splits.values() for found in split.values()]
    if policies and not any(estimate.has_interval for found in policies for estimate in found.values()):
        return "These records have no intervals over prompts, and so decide nothing."
    single = [g.label for g in c.groups if len(g.evaluated_seeds) < 2]
    if len(single) == len(c.groups):
        return "Intervals are 95%, over prompts. No group has two evaluated seeds: the intervals do not cover training variance."
    text = "Intervals are 95%, over seeds; those of policies and reward models over seeds and prompts together."
    if single:
        text += f" Over prompts only, because one seed was evaluated: {'; '.join(single)}."
    return text


def _markdown(c: RunComparison, headline: str, built: Mapping[str, Table]) -> str:
    problems = "\n".join(f"- {escaped(problem)}" for problem in c.problems)
    runs = "; ".join(f"{g.label}: {len(g.runs)} run{'s' * (len(g.runs) > 1)} with seed {_seeds(g.seeds)}" for g in c.groups)
    head = f"# Comparison\n\n{escaped(headline)}\n\n{escaped(f'Runs: {runs}. {what_intervals_are_over(c)}')}\n\n{cost.in_all(c)}"
    return "\n\n".join(filter(None, [head, problems, *map(to_markdown, built.values())])) + "\n"


def _seeds(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
