"""The command line.

lockstep run [hydra overrides] [-m]   run or sweep experiments
lockstep cache [why|prune]            stored stages: list them, explain a miss, remove what no run uses
lockstep compare RUN_OR_SWEEP...      tables, plots and a report
lockstep parity [hydra overrides]     the same experiment on two backends, step by step: where they part
lockstep plugins                      what is installed, from which distribution, usable or not and why
lockstep check NAME                   the conformance kit on one plugin
lockstep new-plugin NAME              a working plugin package to start from
lockstep merge ADAPTER OUTPUT         an adapter and its base as one checkpoint
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lockstep import __version__
from lockstep.console import Console
from lockstep.errors import ConfigError, LockstepError, Stopped


def main() -> None:
    """Exit code 0: done; 1: an error that the message says how to mend; 130: stopped by Ctrl-C."""
    parser = argparse.ArgumentParser(prog="lockstep", description="RLHF experiments on PyTorch and JAX alike.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run", help="run or sweep experiments: lockstep run experiment=instructgpt backend=jax", add_help=False
    )
    run.set_defaults(call=lambda arguments, rest: run_command(rest))
    compare = commands.add_parser("compare", help="tables, plots and a report over run folders")
    compare.add_argument("paths", nargs="+", help="run folders, folders of them, sweeps, or wandb:entity/project?group=...")
    compare.add_argument("--by", help="keys to group by: backend,algorithm.kl_coef (default: all that differ, but the seed)")
    compare.add_argument("--baseline", help="the group to hold the others against: backend=torch (default: the first)")
    compare.add_argument("--output", type=Path, default=Path("report"), help="folder for the report (default: report)")
    compare.add_argument("--wandb-report", metavar="ENTITY/PROJECT", help="save it as a report at W&B too")
    compare.set_defaults(call=lambda arguments, rest: compare_command(arguments))
    cache = commands.add_parser("cache", help="stored stages: list them, explain a miss (why), remove unused ones (prune)")
    cache.add_argument("action", nargs="?", default="list", help="list, why or prune; then overrides, as of lockstep run")
    cache.add_argument("--older-than", help="prune only what has not changed for so long: 12h, 30d, 4w")
    cache.add_argument("--yes", action="store_true", help="prune: remove; without it the stages are only listed")
    cache.set_defaults(call=lambda a, rest: cache_command(a.action, rest, a.older_than, a.yes))
    parity = commands.add_parser("parity", help="the same experiment on two backends, step by step: where they part")
    parity.add_argument("--same-start", action="store_true", help="each step starts from the first backend's weights")
    parity.add_argument("--steps", type=int, help="of each stage, at most")
    parity.add_argument("--output", type=Path, default=Path("parity"), help="folder for the report (default: parity)")
    parity.set_defaults(call=lambda a, rest: parity_command(rest, a.same_start, a.steps, a.output))
    check = commands.add_parser("check", help="the conformance kit on one plugin: lockstep check ppo --backend jax")
    check.add_argument("name", help="as registered, or module:Class")
    check.add_argument("--kind", help="backend, policy, reward_model or algorithm, where the name alone does not say")
    check.add_argument("--backend", help="default: every one that is installed")
    check.add_argument("--precision", choices=("float32", "bfloat16"), help="default: both, where the backend has both")
    check.add_argument("--like", help="the configuration file to start from, where NAME has none of its own")
    check.set_defaults(call=lambda a, rest: check_command(a.name, a.kind, a.backend, a.precision, a.like, rest))
    new = commands.add_parser("new-plugin", help="a working plugin package to start from")
    new.add_argument("name", help="of the component: letters, digits and underscores")
    new.add_argument("--kind", default="algorithm", choices=("algorithm", "policy", "reward_model", "backend"))
    new.set_defaults(call=lambda a, rest: new_plugin_command(a.name, a.kind))
    merge = commands.add_parser("merge", help="an adapter and its base as one checkpoint")
    merge.add_argument("adapter", type=Path, help="output folder of a stage of policy=lora, or any folder of peft's")
    merge.add_argument("output", type=Path, help="folder for the checkpoint")
    merge.set_defaults(call=lambda a, rest: merge_command(a.adapter, a.output))
    plugins = commands.add_parser("plugins", help="what is installed, usable or not and why")
    plugins.set_defaults(call=lambda arguments, rest: plugins_command())
    arguments, rest = parser.parse_known_args()
    options = [argument for argument in rest if argument.startswith("-")]
    if unknown := {"run": [], "parity": options, "check": options, "cache": options}.get(arguments.command, rest):
        parser.error(f"unknown arguments: {' '.join(unknown)}")

    sys.path.insert(0, os.getcwd())  # where module:Class of the configuration is looked for, as with python -m
    console = Console()
    try:
        arguments.call(arguments, rest)
    except LockstepError as error:
        console.say(f"{type(error).__name__}: {error}")
        sys.exit(130 if isinstance(error, Stopped) else 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        console.say(f"Could not write: {error}. Make room or choose another folder=..., then run the same command again.")
        sys.exit(1)
    except KeyboardInterrupt:
        console.say("Stopped at once. Run the same command to go on from the last checkpoint.")
        sys.exit(130)


RUN_HELP = """lockstep run [overrides] [-m]

  lockstep run                                             the InstructGPT pipeline on the miniature, on torch
  lockstep run backend=jax seed=1                          the same on JAX, with another seed
  lockstep run algorithm.kl_coef=0.05 algorithm.iterations=50
  lockstep run -m backend=torch,jax seed=0,1,2             a sweep: one process per job; docs/sweeps.md has searches and clusters
  lockstep run --config [overrides]                        print the resolved configuration and stop
  lockstep run --dry-run [overrides]                       check configuration, data and tokenizer, and stop

Overrides are Hydra's: key=value, +key=value to add one, ~key to remove one. Run the same command again to go on where
it stopped. Groups: """


def run_command(arguments: Sequence[str]) -> None:
    from lockstep.composition import compose, conf_folders
    from lockstep.sweeps import sweep

    if {"-h", "--help"} & set(arguments):
        groups = sorted({p.parent.name for c in conf_folders().values() for p in c.rglob("*.yaml") if p.parent != c})
        print(RUN_HELP + ", ".join(groups) + ".")
    elif "--dry-run" in arguments:
        from lockstep.dry_run import dry_run

        if {"-m", "--multirun"} & set(arguments):
            raise ConfigError("A dry run is of one run, not of a sweep: leave out -m.")
        dry_run(compose([a for a in arguments if a != "--dry-run"]), Console())
    elif {"-m", "--multirun"} & set(arguments):
        Console().say(sweep(arguments))
    elif "--config" in arguments:
        import yaml

        print(yaml.safe_dump(compose([a for a in arguments if a != "--config"]), sort_keys=False))
    else:
        run_config(compose(arguments), shlex.join(["lockstep", "run", *arguments]))


def run_config(config: dict[str, Any], command: str) -> Path:
    """Run one experiment and print its summary; the run folder."""
    from lockstep.cache import finished
    from lockstep.experiment import Experiment
    from lockstep.runner import Runner
    from lockstep.summary import summary
    from lockstep.sweeps import agent, objective

    console = Console()
    with agent() as tell:
        if folder := finished(config):
            console.say(f"run {folder.name} is done already")
        else:
            folder = Runner(Experiment(config), console, command).run()
        console.out.print(summary(folder))
        if name := config["objective"]:
            value = objective(folder, name)
            console.say(f"\nobjective {name}: {value}")
            tell(config, name, value)
    console.say(f"\nThe run is in {folder}. To compare runs: lockstep compare {folder} OTHER...")
    return folder


def compare_command(arguments: argparse.Namespace) -> None:
    from lockstep.compare import compare, print_summary, wandb_report

    by = arguments.by.split(",") if arguments.by else None
    report = compare(arguments.paths, arguments.output, by, arguments.baseline)
    print_summary(report)
    if arguments.wandb_report:
        Console().say(f"saved {wandb_report.publish(report, arguments.wandb_report)}")


def cache_command(action: str, overrides: Sequence[str], older_than: str | None, yes: bool) -> None:
    from lockstep import cache, summary
    from lockstep.composition import compose
    from lockstep.errors import ConfigError, did_you_mean

    if "=" in action:
        action, overrides = "list", [action, *overrides]
    if action not in (actions := ("list", "why", "prune")):
        raise ConfigError(f"lockstep cache {action}: no such action.{did_you_mean(action, actions)} There are: list, why, prune.")
    config, console = compose(overrides), Console()
    root = Path(config["folder"])
    if action == "why":
        console.say("\n".join(f"{stage}: {reason}" for stage, reason in cache.why(config).items()))
        return
    found = cache.unused(root, older_than) if action == "prune" else cache.entries(root)
    if found:
        console.out.print(summary.stored_stages(found))
    size = summary.size(sum(entry.size for entry in found))
    if action == "list":
        console.say(f"\n{len(found)} stages in {root / 'stages'}, {size}.")
    elif yes:
        removed = [cache.remove(entry) for entry in found]
        console.say(f"\nRemoved {sum(removed)} of {len(found)} stages that no run uses, {size}.")
    else:
        console.say(f"\n{len(found)} stages that no run uses, {size}. Nothing was removed; to remove them, add --yes.")


def parity_command(overrides: Sequence[str], same_start: bool, steps: int | None, output: Path) -> None:
    from lockstep.parity import parity, print_summary

    print_summary(parity(overrides, same_start=same_start, steps=steps, output=output))


def check_command(
    name: str, kind: str | None, backend: str | None, precision: str | None, like: str | None, overrides: Sequence[str]
) -> None:
    from lockstep.conformance.report import report

    sys.exit(0 if report(name, kind, backend, precision, like, overrides) else 1)


def new_plugin_command(name: str, kind: str) -> None:
    from lockstep.scaffold import new_plugin

    new_plugin(name, kind, Path.cwd())


def merge_command(adapter: Path, output: Path) -> None:
    from lockstep.adapters import merge

    Console().say(f"The merged checkpoint is in {merge(adapter, output)}.")


def plugins_command() -> None:
    from rich.markup import escape
    from rich.table import Table

    from lockstep.registry import registry

    table = Table(box=None, pad_edge=False)
    for column in ("kind", "name", "backend", "from", "usable"):
        table.add_column(column)
    for component in registry():
        missing = component.missing()
        usable = f"no: needs {', '.join(missing)}; type: {component.plugin.install}" if missing else "yes"
        table.add_row(component.kind, component.name, component.backend or "any", component.distribution, escape(usable))
    console = Console()
    console.out.print(table)
    for name, reason in registry().broken.items():
        console.say(f"{name} cannot be loaded: {reason}")
