"""``lockstep run --dry-run``: all of a run that can be checked before a model is loaded or a folder written.

The configuration is composed and checked, the first rows of every data source are read as what they are for, the tokenizer
renders one of them, and each stage says its arithmetic. Of data sets on the hub the first rows are streamed, and the
arithmetic counts those only. What cannot be reached is named; it is not taken for right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lockstep.runs.assembly import Assembly
from lockstep.reporting.console import Console
from lockstep.data.files import Files
from lockstep.data.reading import Unreachable
from lockstep.errors import ConfigError, DataError, MissingData
from lockstep.runs.experiment import Experiment, is_hub_id
from lockstep.interfaces import DataSource
from lockstep.text.tokenizer import Tokenizer

FIRST = 100
"""Rows of a data set on the hub."""


def dry_run(config: Mapping[str, Any], console: Console) -> None:
    """
    Raises:
      LockstepError: the first thing that is wrong.
    """
    experiment = Experiment(config)
    data = preview(experiment)
    unknown = []
    for where, found in columns(data):
        console.say(f"{where}: {found}")
        unknown += [where] if isinstance(found, Unreachable) else []
    tokenizer = local_tokenizer(experiment, data)
    here = f"there is no {tokenizer_path(experiment)} here, so it is taken for an id of the Hugging Face hub"
    console.say(f"tokenizer: {_told(tokenizer, data) if tokenizer else here}")
    unknown += [] if tokenizer else ["tokenizer"]
    lines = []
    for stage in experiment.stages.values():
        try:
            lines.append((stage.name, "would run", stage.arithmetic(data)))
        except Unreachable:
            lines.append((stage.name, "not known", "its data could not be reached"))
            unknown.append(f"stages.{stage.name}")
    console.plan(experiment.name, lines)
    console.say(f"Not checked: {', '.join(unknown)}." if unknown else "All that a dry run can check is right.")


def preview(experiment: Experiment) -> DataSource:
    cls, config = experiment.data
    return cls(config, first=FIRST) if issubclass(cls, Files) else cls(config)


def columns(data: DataSource) -> Iterator[tuple[str, str | Unreachable]]:
    """For each source of files what it gives, or why that is not known."""
    for key, sources in (data.sources if isinstance(data, Files) else {}).items():
        for index, source in enumerate(sources):
            try:
                found: str | Unreachable = f"{len(data.items(key, index))} {key} in {source.path}"
            except Unreachable as error:
                found = error
            yield f"data.{key}[{index}]", found


def tokenizer_path(experiment: Experiment) -> str | None:
    """What the configuration says; None where the data source brings its own."""
    _, policy = experiment.policy
    return policy.tokenizer.path or getattr(policy, "path", None)


def local_tokenizer(experiment: Experiment, data: DataSource) -> Tokenizer | None:
    """The policy's, if it is not on the hub.

    Raises:
      ConfigError: its folder is not there; EOS, pad token or template are not usable.
    """
    path = tokenizer_path(experiment)
    if path is not None and not Path(path).exists():
        if is_hub_id(path):
            return None
        raise ConfigError(f"There is no folder {path}, and no hub id looks like that (owner/name).")
    parts = Assembly(experiment, {})
    parts.data = data  # not all of it, from the hub
    return parts.tokenizer


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
