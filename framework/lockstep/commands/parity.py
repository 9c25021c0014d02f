"""lockstep parity [hydra overrides]: run one experiment on two backends step by step, and show where they part."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

HELP = "run one experiment on two backends step by step, and show where they diverge"
OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--same-start", action="store_true", help="each step starts from the first backend's weights")
    parser.add_argument("--steps", type=int, help="maximum number of steps per stage")
    parser.add_argument("--output", type=Path, default=Path("parity"), help="folder for the report (default: parity)")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from lockstep.checking.parity import parity, print_summary

    print_summary(parity(overrides, same_start=arguments.same_start, steps=arguments.steps, output=arguments.output))
