"""lockstep cache [why|prune] [hydra overrides]: stored stages: list them, explain a miss, remove what no run uses."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from lockstep.errors import ConfigError, did_you_mean
from lockstep.reporting.console import Console

if TYPE_CHECKING:
    from lockstep.commands.cache.stored import Entry

HELP = "stored stages: list them, explain a miss (why), remove unused ones (prune)"
OVERRIDES = True
ACTIONS = ("list", "why", "prune")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", default="list", help="list, why or prune; then overrides, as for lockstep run")
    parser.add_argument("--older-than", help="prune only stages unchanged for this long: 12h, 30d, 4w")
    parser.add_argument("--yes", action="store_true", help="prune: remove the stages instead of listing them")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from lockstep.commands.cache import stored
    from lockstep.config.compose import compose
    from lockstep.runs.experiment import Experiment
    from lockstep.storage.names import root_folder

    action = arguments.action
    if "=" in action:
        action, overrides = "list", [action, *overrides]
    if action not in ACTIONS:
        raise ConfigError(f"lockstep cache {action}: no such action.{did_you_mean(action, ACTIONS)} Actions: list, why, prune.")
    config, console = compose(overrides), Console()
    root = root_folder(config["folder"])
    if action == "why":
        console.say("\n".join(f"{stage}: {reason}" for stage, reason in stored.why(Experiment(config)).items()))
        return
    if action == "prune":
        found = stored.unused(root, arguments.older_than)
    else:
        users = stored.users(root)
        found = stored.entries(root, users)
    if found:
        console.out.print(stored_stages(found))
    total = size(sum(entry.size for entry in found))
    if action == "list":
        console.say(f"\n{len(found)} stages in {root / 'stages'}, {total}.")
        for line in users.unread:
            console.say(f"Not in this list, because it cannot be read: {line}")
    elif arguments.yes:
        removed = [stored.remove(entry) for entry in found]
        console.say(f"\nRemoved {sum(removed)} of {len(found)} stages that no run uses, {total}.")
    else:
        console.say(f"\n{len(found)} stages that no run uses, {total}. Nothing was removed; to remove them, add --yes.")


def stored_stages(entries: Sequence[Entry]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "state", "size", "changed", "used by"):
        table.add_column(column, overflow="fold", justify="right" if column == "size" else "left")
    for entry in entries:
        more = f" and {len(entry.runs) - 2} more" if len(entry.runs) > 2 else ""
        users = ", ".join(entry.runs[:2]) + more or "no run"
        table.add_row(entry.path.name, entry.state, size(entry.size), f"{age(entry.age)} ago", users)
    return table


def size(count: float) -> str:
    """'1.5 MB': powers of 1000."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.1f} {units[0]}"


def age(seconds: float) -> str:
    """'3 h', in the largest unit that fits."""
    length, unit = next(((n, u) for n, u in ((86400, "d"), (3600, "h"), (60, "min")) if seconds >= n), (1, "s"))
    return f"{seconds / length:.0f} {unit}"
