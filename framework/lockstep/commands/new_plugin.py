"""lockstep new-plugin NAME: write a working plugin package to start from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

HELP = "write a working plugin package to start from"
OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="name of the component: letters, digits and underscores")
    parser.add_argument(
        "--kind",
        default="algorithm",
        choices=("algorithm", "policy", "reward_model", "environment", "engine", "labeler", "attacker", "backend"),
    )


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from lockstep.checking.scaffold import new_plugin

    new_plugin(arguments.name, arguments.kind, Path.cwd())
