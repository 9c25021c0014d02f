"""lockstep plugins: what is installed, from which distribution, usable or not and why."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.table import Table

from lockstep.reporting.console import Console

HELP = "what is installed, usable or not and why"
OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments."""


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from lockstep.config.folders import HERE, conf_folders
    from lockstep.registry import KINDS, registry

    table = Table(box=None, pad_edge=False)
    for column in ("kind", "name", "backend", "from", "usable"):
        table.add_column(column)
    for component in registry():
        missing = component.missing()
        usable = f"no: needs {', '.join(missing)}; type: {component.plugin.install}" if missing else component.lacking() or "yes"
        table.add_row(component.kind, component.name, component.backend or "any", component.distribution, usable)
    console = Console()
    console.out.print(table)
    components = {(component.kind, component.name) for component in registry()}
    for source, folder in conf_folders().items():
        files = [(file.parent.name, file.stem) for file in folder.glob("*/*.yaml")]
        presets = [
            file for file in files if source == HERE or file[0] == "experiment" or file[0] in KINDS and file not in components
        ]
        if choices := sorted(f"{kind}={name}" for kind, name in presets):
            console.say(f"{source}: {', '.join(choices)}")
    for source, conf in registry().conf.items():
        if not conf.is_dir():
            console.say(f"{source}: its conf is no folder: {conf}")
    for name, reason in registry().broken.items():
        console.say(f"{name} cannot be loaded: {reason}")
