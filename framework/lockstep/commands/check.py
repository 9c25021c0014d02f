"""lockstep check NAME [hydra overrides]: the conformance kit on one plugin."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

HELP = "run the conformance kit on one plugin: lockstep check ppo --backend jax"
OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="as registered, or module:Class")
    parser.add_argument("--kind", help="algorithm, policy, ..., if the name alone is ambiguous")
    parser.add_argument("--backend", help="default: every installed one")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="default: both, if the backend has both")
    parser.add_argument("--like", help="the configuration file to start from, if NAME has none")
    parser.add_argument("--verbose", action="store_true", help="the traceback of a check that raised an error")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from lockstep.checking.conformance.report import processes, report
    from lockstep.commands.run import workers
    from lockstep.launchers import place

    a = arguments
    if place().count == 1 and (count := processes(a.name, a.kind, a.backend, overrides)) > 1:
        sys.exit(workers.work([sys.executable, "-P", "-m", "lockstep", *sys.argv[1:]], count))
    sys.exit(0 if report(a.name, a.kind, a.backend, a.precision, a.like, overrides, a.verbose) else 1)
