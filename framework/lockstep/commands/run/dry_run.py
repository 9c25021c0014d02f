"""``lockstep run --dry-run``: check everything that needs no model and no run folder.

The configuration is composed and checked, the first rows of every data source are parsed, the tokenizer renders one of them,
the headers of local checkpoints are compared with their config.json and with the tokenizer, and each stage states its
arithmetic. For data sets on the hub, the first rows are streamed and the arithmetic counts only those. Whatever cannot be
reached is listed as not checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lockstep.errors import ConfigError, DataError, MissingData, Unreachable
from lockstep.interfaces import DataSource
from lockstep.models.architecture import SCALAR_HEAD
from lockstep.models.checkpoint import check_files, describe, is_adapter, survey
from lockstep.reporting.console import Console
from lockstep.runs.assembly import Assembly, load_reward_tokenizer
from lockstep.runs.experiment import NEW, Experiment, is_hub_id
from lockstep.text.tokenizer import Tokenizer


def dry_run(experiment: Experiment, console: Console) -> None:
    """
    Raises:
      LockstepError: the first thing that is wrong.
    """
    source, settings = experiment.data
    data = source.preview(settings)
    unknown = []
    for where, found in data.survey():
        console.say(f"{where}: {found}")
        unknown += [where] if isinstance(found, Unreachable) else []
    tokenizer = local_tokenizer(experiment, data)
    here = f"there is no folder {experiment.tokenizer.path}, so it is taken as a Hugging Face hub id"
    console.say(f"tokenizer: {_told(tokenizer, data) if tokenizer else here}")
    unknown += [] if tokenizer else ["tokenizer"]
    for model, rows in embeddings(experiment):
        if tokenizer and rows:
            tokenizer.check_embedding(rows, f"the policy '{model}'")
    check_reward_models(experiment)
    lines = []
    for stage in experiment.stages.values():
        try:
            lines.append((stage.name, "would run", stage.arithmetic(data)))
        except Unreachable:
            lines.append((stage.name, "not known", "its data could not be reached"))
            unknown.append(f"stages.{stage.name}")
    console.plan(experiment.name, lines)
    console.say(f"Not checked: {', '.join(unknown)}." if unknown else "Everything a dry run can check is correct.")


def local_tokenizer(experiment: Experiment, data: DataSource) -> Tokenizer | None:
    """The policy's, if it is not on the hub.

    Raises:
      ConfigError: its folder does not exist, or EOS, pad token or template cannot be used.
    """
    path = experiment.tokenizer.path
    if path is not None and not Path(path).exists():
        if is_hub_id(path):
            return None
        raise ConfigError(f"There is no folder {path}, and it is not a hub id (owner/name).")
    assembly = Assembly(experiment, {})
    assembly.data = data  # from the hub, only the first rows
    return assembly.tokenizer


def embeddings(experiment: Experiment) -> Iterator[tuple[str, int | None]]:
    """The policies that start from files, each with the rows of its embedding if it is on the local disk.

    Raises:
      CheckpointError: their files are damaged or do not fit each other.
    """
    cls: Any
    cls, config = experiment.policy
    yield NEW, cls.survey(config)
    for folder in _outside(experiment, "policy"):
        yield folder, survey(folder, any_family=True)


def check_reward_models(experiment: Experiment) -> None:
    """Compare reward models in local folders with their own tokenizers.

    Raises:
      LockstepError: their files are damaged or do not fit each other.
    """
    for folder in _outside(experiment, "reward_model"):
        _, _, stored = check_files(folder)
        if SCALAR_HEAD in stored and (rows := describe(folder, scalar=True, any_family=True).rows):
            load_reward_tokenizer(Path(folder)).check_embedding(rows, f"the reward model '{folder}'")


def _outside(experiment: Experiment, kind: str) -> list[str]:
    """The local folders with whole checkpoints that stages read a result of this kind from."""
    read = {source for stage in experiment.stages.values() for source, needed in stage.inputs if needed == kind}
    return sorted(f for f in read - experiment.stages.keys() if Path(f).is_dir() and not is_adapter(Path(f)))


def _told(tokenizer: Tokenizer, data: DataSource) -> str:
    text = f"{tokenizer.vocab_size} tokens, ends with '{tokenizer.eos_token}', pads with '{tokenizer.pad_token}'"
    try:
        prompt = data.prompts("train")[0]
    except (MissingData, Unreachable):
        return text
    except DataError as error:
        return f"{text}; no prompt to render: {error}"
    rendered = tokenizer.render(prompt.messages, add_generation_prompt=True)
    return f"{text}; the first prompt has {len(tokenizer.encode(rendered))} tokens and begins {rendered[:40]!r}"
