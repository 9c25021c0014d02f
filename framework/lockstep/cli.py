"""The command line: `lockstep COMMAND ...`, with a module of `lockstep.commands` for each command."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import pkgutil
import sys
from types import ModuleType

from lockstep import commands
from lockstep.errors import LockstepError, Stopped
from lockstep.reporting.console import Console, show_bug
from lockstep.version import __version__


def main() -> None:
    """Exit code 0: done; 1: a user error, which the message explains how to fix; 130: stopped by Ctrl-C."""
    arguments, overrides = _parse()
    sys.path.insert(0, os.getcwd())  # so that module:Class in the configuration is found here, as with python -m
    console = Console()
    sys.excepthook = show_bug
    try:
        arguments.command.run(arguments, overrides)
    except LockstepError as error:
        console.say(f"{type(error).__name__}: {error}")
        sys.exit(130 if isinstance(error, Stopped) else 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        console.say(f"Could not write: {error}. Make room or choose another folder=..., then run the same command again.")
        sys.exit(1)
    except KeyboardInterrupt:
        console.say("Stopped at once. Run the same command to resume from the last checkpoint.")
        sys.exit(130)


def _parse() -> tuple[argparse.Namespace, list[str]]:
    """The parsed arguments, with the command's module as ``command``, and the overrides."""
    parser = argparse.ArgumentParser(prog="lockstep", description="RLHF experiments on PyTorch and JAX alike.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in _commands().items():
        # `lockstep run` prints its own help, which says more than argparse can.
        subparser = subparsers.add_parser(name, help=command.HELP, add_help=name != "run")
        command.add_arguments(subparser)
        subparser.set_defaults(command=command)
    arguments, rest = parser.parse_known_args()
    unknown = [argument for argument in rest if argument.startswith("-")] if arguments.command.OVERRIDES else rest
    if unknown and arguments.command.__name__ != "lockstep.commands.run":  # its options are Hydra's
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return arguments, rest


def _commands() -> dict[str, ModuleType]:
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    return {name.replace("_", "-"): importlib.import_module(f"{commands.__name__}.{name}") for name in names}
