"""Runs read from W&B: ``wandb:entity/project?group=NAME``, as the `wandb` tracker has recorded them.

At W&B, each stage is a run whose group is the name of Lockstep's run; here the stages become one run again. The part after the
question mark filters W&B runs by its API's names: ``group``, ``tags``, ``state``, ``jobType``, ``config.seed`` and so on. A
name given twice matches either value. A stage that several runs share is recorded under the run that trained it. The others
find it through the inputs of their own stages, if the filter lets it through.

Unlike with run folders, evaluations are means without intervals over prompts, samples are not read, and ``algorithm`` is the
first stage that trains against a reward.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.errors import DataError
from lockstep.reporting.compare.records import Estimate, EvaluationRecord, Reading, Run, StageRecord, flatten, series
from lockstep.storage.records import EACH, mismatch

STATUS = {"finished": "done", "running": "running", "pending": "running"}  # all else is 'failed'


def read(source: str, reading: Reading) -> None:
    """Read the runs of ``source`` into ``reading``.

    Raises:
      DataError: W&B cannot be queried, or has no such runs.
    """
    path, filters = parse(source)
    import wandb

    try:
        stages = list(wandb.Api().runs(path, filters=filters))
        runs = _grouped(stages, reading.problems)
    except Exception as error:  # whatever W&B and the network raise
        advice = "It needs a network and an API key: wandb login. Or compare the folders: lockstep compare runs/NAME"
        raise DataError(f"W&B could not be queried for {source}: {error}. {advice}") from error
    if not runs:
        raise DataError(f"No runs of Lockstep in {source}: {len(stages)} W&B runs, none with a group and a job type.")
    by_id = {stage.id: stage for stage in stages}
    for name, members in runs.items():
        run = _run(name, _with_shared(members, by_id), path)
        if run.status != "done":
            reading.problems.append(f"{name} is not finished ({run.status}): compared as far as it got.")
        reading.runs.append(run)


def parse(source: str) -> tuple[str, dict[str, Any]]:
    """'wandb:me/rlhf?group=a&config.seed=0' -> ('me/rlhf', {'group': 'a', 'config.seed': 0})."""
    path, _, query = source.removeprefix("wandb:").partition("?")
    if not path:
        raise DataError(f"'{source}' names no project. Type wandb:PROJECT or wandb:ENTITY/PROJECT?group=NAME")
    filters: dict[str, Any] = {}
    for key, values in urllib.parse.parse_qs(query).items():
        found = [_value(value) for value in values]
        filters[key] = found[0] if len(found) == 1 else {"$in": found}
    return path, filters


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


CONFIG = {
    "stage": dict, "backend": {"name": str}, "seed": int, "inputs": {EACH: str}, "data?": (dict, None),
    "reward_model?": (dict, None), "produces?": str,
}  # fmt: skip
"""The configuration of a W&B run that the `wandb` tracker made."""


def _grouped(stages: Sequence[Any], problems: list[str]) -> dict[str, dict[str, Any]]:
    """{run: {stage: W&B run}}. If a stage was recorded twice, the later one counts. ``problems`` names runs of other programs."""
    runs: dict[str, dict[str, Any]] = {}
    for stage in stages:  # the API gives the oldest first
        if not stage.group or not stage.job_type:
            continue
        if problem := mismatch(dict(stage.config), CONFIG):
            problems.append(f"The W&B run {stage.id} is left out: it is not Lockstep's ({problem}).")
        else:
            runs.setdefault(stage.group, {})[stage.job_type] = stage
    return runs


def _with_shared(members: Mapping[str, Any], by_id: Mapping[str, Any]) -> dict[str, Any]:
    """The run's own stages, preceded by the stages of other runs that they started from."""
    found = dict(members)
    queue = list(members.values())
    while queue:
        for name, identity in queue.pop().config["inputs"].items():
            if name not in found and identity in by_id and not mismatch(dict(by_id[identity].config), CONFIG):
                found = {name: by_id[identity], **found}
                queue.append(by_id[identity])
    return found


def _run(name: str, stages: Mapping[str, Any], path: str) -> Run:
    configs = {stage: found.config for stage, found in stages.items()}
    anyone = next(iter(configs.values()))
    read = {stage: _stage(stage, found) for stage, found in stages.items()}
    unfinished = [stage.status for stage in read.values() if stage.status != "done"]
    return Run(
        name=name,
        folder=Path(name),
        experiment=path.rpartition("/")[2],
        seed=anyone["seed"],
        backend=anyone["backend"],
        status=unfinished[0] if unfinished else "done",
        seconds=None,
        command="",
        stages=read,
        config=_config(configs),
        evaluation=_evaluation(stages),
        samples=[],
    )


def _config(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The configuration, with the key names that a run folder uses."""
    whole: dict[str, Any] = {"stages": {name: {"algorithm": c["stage"]} for name, c in configs.items()}}
    for config in configs.values():
        whole |= {key: config[key] for key in ("backend", "data", "seed", "choices") if key in config}
        if config.get("reward_model") and "algorithm" not in whole and "baseline" not in config["stage"]:
            whole["algorithm"] = config["stage"]
    return dict(flatten(whole))


def _stage(name: str, found: Any) -> StageRecord:
    rows = [_numbers(row) for row in found.scan_history()]
    algorithm = found.config["stage"].get("name")
    return StageRecord(
        name=name,
        kind="train" if algorithm else "evaluate",
        algorithm=algorithm,
        status=STATUS.get(found.state, "failed"),
        seconds=found.summary.get("_runtime"),
        metrics=series([row for row in rows if isinstance(row.get("step"), int)]),
        identity=found.id,
        produces=found.config.get("produces", ""),
    )


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("_")}


def _evaluation(stages: Mapping[str, Any]) -> EvaluationRecord:
    """Read 'heldout/ppo/gold' and 'reward_model/accuracy/gold' of evaluation stages, which are those that name a baseline."""
    baseline, splits, reward_model = None, {}, {}
    for found in stages.values():
        if named := found.config["stage"].get("baseline"):
            baseline = named
            for key, value in dict(found.summary).items():
                split, _, rest = key.partition("/")
                policy, _, metric = rest.partition("/")
                if not metric or not isinstance(value, (int, float)):
                    continue
                estimate = Estimate(float(value), float(value), float(value))
                if split == "reward_model":
                    reward_model[rest] = estimate
                else:
                    splits.setdefault(split, {}).setdefault(policy, {})[metric] = estimate
    return EvaluationRecord(baseline, splits, reward_model)
