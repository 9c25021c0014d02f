"""lockstep merge ADAPTER OUTPUT: merge an adapter and its base into one checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lockstep.reporting.console import Console

HELP = "merge an adapter and its base into one checkpoint"
OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="output folder of a stage with policy=lora, or any peft adapter")
    parser.add_argument("output", type=Path, help="folder for the checkpoint")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from lockstep.models.adapters import merge
    from lockstep.runs.store import check_output

    check_output(arguments.adapter)
    Console().say(f"The merged checkpoint is in {merge(arguments.adapter, arguments.output)}.")
