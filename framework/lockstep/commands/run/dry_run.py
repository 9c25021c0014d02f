"""``lockstep run --dry-run``: all of a run that can be checked before a model is loaded or a folder written.

The configuration is composed and checked, the first rows of every data source are read as what they are for, the tokenizer
renders one of them, and each stage says its arithmetic. Of data sets on the hub the first rows are streamed, and the
arithmetic counts those only. What cannot be reached is named; it is not taken for right.
"""

from __future__ import annotations

from pathlib import Path

from lockstep.errors import ConfigError, DataError, MissingData, Unreachable
from lockstep.interfaces import DataSource
from lockstep.reporting.console import Console
from lockstep.runs.assembly import Assembly
from lockstep.runs.experiment import Experiment, is_hub_id
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
    here = f"there is no {experiment.tokenizer.path} here, so it is taken for an id of the Hugging Face hub"
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


def local_tokenizer(experiment: Experiment, data: DataSource) -> Tokenizer | None:
    """The policy's, if it is not on the hub.

    Raises:
      ConfigError: its folder is not there; EOS, pad token or template are not usable.
    """
    path = experiment.tokenizer.path
    if path is not None and not Path(path).exists():
        if is_hub_id(path):
            return None
        raise ConfigError(f"There is no folder {path}, and no hub id looks like that (owner/name).")
    assembly = Assembly(experiment, {})
    assembly.data = data  # not all of it, from the hub
    return assembly.tokenizer


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
