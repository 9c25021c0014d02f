"""lockstep compare RUN_OR_SWEEP...: tables, plots and a report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lockstep.reporting.console import Console

HELP = "tables, plots and a report over run folders"
OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", help="run folders, folders of them, sweeps, or wandb:entity/project?group=...")
    parser.add_argument("--by", help="keys to group by: backend,algorithm.kl_coef (default: all that differ, except the seed)")
    parser.add_argument("--baseline", help="the group to compare the others with: backend=torch (default: the first)")
    parser.add_argument(
        "--correction", choices=("holm", "bh", "none"), default="holm",
        help="of p-values against the baseline, for their number: Holm (default), Benjamini-Hochberg, or none",
    )  # fmt: skip
    parser.add_argument(
        "--power", nargs="?", type=_positive, const=0.0, metavar="DIFFERENCE",
        help="how many seeds the differences need, and one of this size",
    )  # fmt: skip
    parser.add_argument("--metric", action="append", default=[], metavar="NAME", help="also draw this metric; may be repeated")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder for the report (default: report)")
    parser.add_argument("--wandb-report", metavar="ENTITY/PROJECT", help="also save it as a W&B report")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("a difference is a number above 0")
    return value


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from lockstep.reporting.compare import compare, print_summary, wandb_report

    by = arguments.by.split(",") if arguments.by else None
    report = compare(
        arguments.paths, arguments.output, by, arguments.baseline, arguments.correction, arguments.power or 0.0, arguments.metric
    )
    print_summary(report, with_power=arguments.power is not None)
    if arguments.wandb_report:
        Console().say(f"saved {wandb_report.publish(report, arguments.wandb_report)}")
