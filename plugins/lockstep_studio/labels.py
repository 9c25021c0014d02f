"""lockstep labels: exports closed rounds to the formats of other tools, and imports files of other tools as rounds.

lockstep labels export studio/rounds/round-1 trl-preference pairs.jsonl
lockstep labels import battles.json arena rounds/arena
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lockstep.reporting.console import Console

HELP = "labels to and from other tools: lockstep labels export ROUND FORMAT FILE"
OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, dest="action", metavar="export|import")
    export = actions.add_parser("export", help="a closed round as a file")
    export.add_argument("round", help="its folder, such as studio/rounds/round-1")
    export.add_argument("format", help="trl-preference, hh, arena, ...: another name lists all")
    export.add_argument("file", help="what to write")
    back = actions.add_parser("import", help="a file as a folder that stages and data=human read")
    back.add_argument("file", help="what to read")
    back.add_argument("format", help="as for export")
    back.add_argument("round", help="the folder to write")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from lockstep_studio import exchange

    a, console = arguments, Console()
    with console.waiting(f"reading {a.round if a.action == 'export' else a.file}"):
        if a.action == "export":
            console.say(f"{exchange.export(a.round, a.format, a.file)} in {a.file}.")
        else:
            console.say(f"{exchange.import_round(a.file, a.format, a.round)} in {a.round}.")
