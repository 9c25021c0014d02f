"""lockstep run [hydra overrides] [-m]: run or sweep experiments."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lockstep.errors import ConfigError, did_you_mean
from lockstep.launchers import place
from lockstep.reporting.console import Console

HELP = "run or sweep experiments: lockstep run experiment=instructgpt backend=jax"
OVERRIDES = True
OPTIONS = ("-m", "--multirun", "--config", "--dry-run", "-h", "--help")

USAGE = """lockstep run [overrides] [-m]

  lockstep run                                             the InstructGPT pipeline on the miniature, on torch
  lockstep run backend=jax seed=1                          the same on JAX, with another seed
  lockstep run algorithm.kl_coef=0.05 algorithm.iterations=50
  lockstep run -m backend=torch,jax seed=0,1,2             a sweep: one process per job; docs/sweeps.md has searches and clusters
  lockstep run --config [overrides]                        print the resolved configuration and stop
  lockstep run --dry-run [overrides]                       check configuration, data and tokenizer, and stop

Overrides are Hydra's: key=value, +key=value to add one, ~key to remove one. Rerun the same command to resume a run.
Groups: """


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares none: Hydra reads all arguments."""


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from lockstep.config.compose import compose
    from lockstep.config.folders import conf_folders
    from lockstep.config.secrets import without_secrets

    given, many = set(overrides), {"-m", "--multirun"} & set(overrides)
    if not many and (unknown := [each for each in overrides if each.startswith("-") and each not in OPTIONS]):
        raise ConfigError(
            f"lockstep run has no option {unknown[0]}.{did_you_mean(unknown[0], OPTIONS)} It has {', '.join(OPTIONS)}."
        )
    if {"-h", "--help"} & given:
        from lockstep.reporting.findings.finding import GROUP

        groups = sorted({p.parent.name for c in conf_folders().values() for p in c.glob("*/*.yaml")} - {GROUP})
        print(USAGE + ", ".join(groups) + ".")
    elif "--dry-run" in given:
        from lockstep.commands.run.dry_run import dry_run
        from lockstep.runs.experiment import Experiment

        if many:
            raise ConfigError("A dry run checks one run, not a sweep. Leave out -m.")
        dry_run(Experiment(compose([o for o in overrides if o != "--dry-run"])), Console())
    elif many:
        from lockstep.commands.run.sweeps import sweep  # imports numpy

        if place().count > 1:
            raise ConfigError("A sweep starts the processes of its jobs itself. Leave the launcher out: lockstep run -m ...")
        Console().say(sweep(overrides))
    elif "--config" in given:
        import yaml

        print(yaml.safe_dump(without_secrets(compose([o for o in overrides if o != "--config"])), sort_keys=False))
    else:
        from lockstep.commands.run import workers

        config = compose(overrides)
        if (count := workers.wanted(config)) > 1:
            sys.exit(workers.work([sys.executable, "-P", "-m", "lockstep", "run", *overrides], count))
        run_config(config, shlex.join(["lockstep", "run", *overrides]))


def run_config(config: dict[str, Any], command: str) -> Path:
    """Run one experiment and print its summary. Returns the run folder. With several processes, each runs it and one prints."""
    from lockstep.commands.run.sweeps import agent, objective
    from lockstep.config.overrides import shell
    from lockstep.reporting.summary import summary
    from lockstep.runs.experiment import Experiment, finished
    from lockstep.runs.runner import Runner

    console = Console()
    if place().rank:
        return Runner(Experiment(config), console, command).run()
    with agent() as tell:
        if place().count == 1 and (folder := finished(config)):
            console.say(f"run {folder.name} is already done")
        else:
            folder = Runner(Experiment(config), console, command).run()
        console.out.print(summary(folder))
        if name := config["objective"]:
            value = objective(folder, name)
            console.say(f"\nobjective {name}: {value}")
            tell(config, name, value)
    console.say(f"\nThe run is in {folder}. To compare runs: lockstep compare {shell(str(folder))} OTHER...")
    return folder
