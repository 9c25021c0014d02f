"""The command line: `lockstep COMMAND ...`, with a module of `lockstep.commands` for each command."""

from __future__ import annotations

import argparse
import atexit
import errno
import importlib
import io
import os
import pkgutil
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from lockstep import commands
from lockstep.errors import ConfigError, LockstepError, Stopped, short
from lockstep.registry import registry
from lockstep.reporting.console import Console, has_reader, nobody_reads, show_bug, shown
from lockstep.version import __version__

_ROOM = "Make room or choose another folder=..., then run the same command again."
_PLACE = "Choose another place for it, or another name."
SAID = {
    errno.ENOSPC: _ROOM, errno.EDQUOT: _ROOM, errno.EROFS: _PLACE, errno.EACCES: _PLACE, errno.EPERM: _PLACE,
    errno.ENAMETOOLONG: _PLACE, errno.ENOTDIR: _PLACE, errno.EEXIST: _PLACE, errno.EISDIR: _PLACE, errno.ELOOP: _PLACE,
}  # fmt: skip
"""File errors that are not bugs of Lockstep, and what to do about each."""


def main() -> None:
    """Run the command. Exit code 0: done; 1: a user error, whose message explains the fix; 130: stopped by Ctrl-C."""
    _have_streams()
    _have_home()
    console = Console()
    sys.excepthook = show_bug
    try:
        _check_current_folder()
        arguments, overrides = _parse()
        arguments.command.run(arguments, overrides)
        sys.stdout.flush()
    except BrokenPipeError:
        if has_reader():
            raise
    except LockstepError as error:
        if console.out.quiet and not error.told:
            print(shown(f"{type(error).__name__}: {error}"), file=sys.stderr)
        console.say(f"{type(error).__name__}: {error}")
        sys.exit(130 if isinstance(error, Stopped) else 1)
    except OSError as error:
        if error.errno not in SAID:
            raise
        console.say(f"{short(str(error), 1000)}. {SAID[error.errno]}")
        sys.exit(1)
    except KeyboardInterrupt:
        console.say("Stopped at once. Run the same command to resume from the last checkpoint.")
        sys.exit(130)
    finally:
        if not has_reader():
            nobody_reads()  # discards what Python still prints when it exits


def _have_streams() -> None:
    """Make standard output and error writable, even if the caller closed them or they cannot show every character."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w", encoding="utf-8") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _have_home() -> None:
    """Libraries keep caches and settings in the home folder. A user without one, as in a container, gets one for this process."""
    try:
        Path.home()
    except RuntimeError:
        home = tempfile.mkdtemp(prefix="lockstep-home-")
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        os.environ["HOME"] = home
        print(f"There is no home folder (HOME is not set): {home} is used until this command ends.", file=sys.stderr)


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("The current folder has been removed. Go to one that exists and run the same command there.") from error


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
    """The core's commands and those that plugins add."""
    names = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
    own = {name.replace("_", "-"): importlib.import_module(f"{commands.__name__}.{name}") for name in names}
    others = {name: importlib.import_module(module) for name, module in registry().commands.items()}
    return dict(sorted((others | own).items()))
