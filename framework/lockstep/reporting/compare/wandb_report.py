"""The comparison as a report at W&B, beside the runs' own panels: its text and tables, and curves that W&B draws itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lockstep.errors import DataError
from lockstep.reporting.compare import CompareReport
from lockstep.reporting.compare.groups import RunComparison

CURVES = ("objective/score", "objective/gold", "objective/kl", "objective/entropy", "objective/length")


def publish(comparison: CompareReport, project: str) -> str:
    """Save a report to ``project`` ('entity/project') and return its address.

    Raises:
      DataError: the package for it is missing, ``project`` is malformed, or the report cannot be saved to W&B.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise DataError("A W&B report needs wandb-workspaces. Type: pip install 'lockstep-rlhf[wandb-report]'") from error
    entity, slash, name = project.partition("/")
    if not (entity and slash and name):
        raise DataError(f"--wandb-report {project}: give ENTITY/PROJECT, where the runs are.")
    text = next(file for file in comparison.files if file.name == "report.md").read_text(encoding="utf-8")
    try:
        report = wr.Report(entity=entity, project=name, title="Lockstep comparison", description=comparison.headline)
        report.blocks = [wr.TableOfContents(), wr.MarkdownBlock(text=text), *_panels(wr, comparison.comparison, entity, name)]
        report.save()
        return report.url
    except Exception as error:  # whatever W&B and the network raise
        raise DataError(
            f"The report could not be saved to W&B: {error}. It needs a network and an API key: wandb login"
        ) from error


def _panels(wr: Any, c: RunComparison, entity: str, project: str) -> Sequence[Any]:
    """One grid of curves per stage that has an objective, over the W&B runs of that stage."""
    grids = []
    names = [run.name for run in c.runs]
    for stage in c.stages_with("objective/kl"):
        chosen = f"Group in {names!r} and JobType == {stage!r}"
        runs = wr.Runset(entity=entity, project=project, name=stage, filters=chosen)
        lines = [wr.LinePlot(x="step", y=[metric], title=metric) for metric in CURVES if c.stages_with(metric)]
        grids += [wr.H2(text=f"{stage} at W&B"), wr.PanelGrid(runsets=[runs], panels=lines)]
    return grids
