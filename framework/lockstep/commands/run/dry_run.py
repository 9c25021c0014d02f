"""``lockstep run --dry-run``: check everything that needs no model and no run folder.

The configuration is composed and checked, and so is the place where results go. The device is opened, the first rows of every
data source are parsed and encoded for the stages that read them, the headers of local checkpoints are compared with their
config.json and with the tokenizer, reward functions are called on the first prompt, and each stage states its arithmetic. For
data sets on the hub, the first rows are streamed and the arithmetic counts only those. Whatever cannot be reached is listed as
not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.errors import ConfigError, DataError, MissingData, Unreachable
from lockstep.interfaces import DataSource, Policy
from lockstep.models.architecture import SCALAR_HEAD
from lockstep.models.checkpoint import check_files, describe, is_adapter, survey
from lockstep.reporting.console import Console
from lockstep.runs.assembly import Assembly, load_own_tokenizer, opener
from lockstep.runs.experiment import Experiment
from lockstep.runs.kinds import is_hub_id
from lockstep.runs.runner import known_once
from lockstep.runs.stages import NEW, Stage
from lockstep.text import encoding
from lockstep.text.borders import Borders
from lockstep.text.encoding import Lengths
from lockstep.text.stopping import Stops
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Fit

FIRST = 100
"""How many items of each data set are encoded."""
NEVER = (
    "Only the run itself tells whether weights load, contexts are long enough and memory suffices, what rewards are, and whether "
    "training stays finite."
)


def dry_run(experiment: Experiment, console: Console) -> None:
    """Check the experiment, and print what was found.

    Raises:
      LockstepError: something is wrong; the first error is raised.
    """
    experiment.check()
    source, settings = experiment.data
    data = source.preview(settings)
    unknown = []
    for where, found in data.survey():
        console.say(f"{where}: {found}")
        unknown += [where] if isinstance(found, Unreachable) else []
    assembly = Assembly(experiment, {})
    assembly.data = data  # from the hub, only the first rows
    for where, problem in [*_device(assembly), *_policies(experiment)]:
        console.say(f"{where}: {problem}")
        unknown.append(where)
    tokenizer = local_tokenizer(assembly)
    console.say(f"tokenizer: {_told(tokenizer, data) if tokenizer else _ON_HUB.format(experiment.tokenizer.path)}")
    unknown += [] if tokenizer else ["tokenizer"]
    for model, rows in embeddings(experiment):
        if tokenizer and rows:
            tokenizer.check_embedding(rows, f"the policy '{model}'")
    check_reward_models(experiment)
    lines = []
    for stage in experiment.stages.values():
        try:
            missing = experiment.collected(stage)
            arithmetic = known_once(stage, missing, data) if missing else _checked(stage, assembly.data_of(stage), tokenizer)
            lines.append((stage.name, "would run", arithmetic))
        except Unreachable as reason:
            lines.append((stage.name, "not known", str(reason)))
            unknown.append(f"stages.{stage.name}")
    console.plan(experiment.name, lines)
    console.say(f"Not checked: {', '.join(unknown)}." if unknown else "Everything a dry run can check is correct.")
    console.say(NEVER)


_ON_HUB = "there is no folder {}, so it is taken as a Hugging Face hub id"


def _device(assembly: Assembly) -> Iterator[tuple[str, str]]:
    """(name, problem) of the backend, if this machine lacks its device: the run may be meant for another machine."""
    try:
        assembly.backend  # noqa: B018  made on first use
    except ConfigError as error:
        yield "backend", str(error)


def _policies(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """(name, problem) of policies whose files are on the hub.

    Raises:
      LockstepError: a local checkpoint does not exist, or no policy opens it.
    """
    cls: type[Policy]
    cls, config = experiment.policy
    starts = {stage.policy for stage in experiment.stages.values()}
    for path in cls.inputs(config).files if any(stage.reads_new for stage in experiment.stages.values()) else ():
        if _is_on_hub(path):
            yield "policy", _ON_HUB.format(path)
    for folder in starts - {None, NEW, *experiment.stages}:
        opener(Path(str(folder)), experiment.backend_name)


def local_tokenizer(assembly: Assembly) -> Tokenizer | None:
    """The policy's tokenizer; None if it is on the hub.

    Raises:
      ConfigError: its folder does not exist, or EOS, pad token or template cannot be used.
    """
    path = assembly.experiment.tokenizer.path
    return None if path is not None and _is_on_hub(path) else assembly.tokenizer


def _is_on_hub(path: str) -> bool:
    """True if ``path`` is a hub id, False if it is a local file or folder.

    Raises:
      ConfigError: it does not exist, and is not a hub id.
    """
    if Path(path).exists():
        return False
    if not is_hub_id(path):
        raise ConfigError(f"There is no folder {path}, and it is not a hub id (owner/name).")
    return True


def _checked(stage: Stage, data: DataSource, tokenizer: Tokenizer | None) -> str:
    """The stage's arithmetic.

    Raises:
      LockstepError: the stage would fail, for a reason that shows without a model.
    """
    asked: Any = Asked(data)
    arithmetic = stage.arithmetic(asked)
    stage.rehearse(data)
    if tokenizer is not None and isinstance(lengths := getattr(stage.config, "lengths", None), Lengths):
        for noun, split in asked.nouns:
            _check_lengths(noun, split, getattr(data, noun)(split), tokenizer, lengths)
    if tokenizer is not None and (strings := getattr(stage.config, "stop_strings", ())):
        Stops(tokenizer, strings)
    return arithmetic


ENCODERS: Mapping[str, Callable[..., Any]] = {
    "prompts": encoding.encode_prompts,
    "demonstrations": encoding.encode_demonstrations,
    "comparisons": encoding.encode_comparisons,
}


class Asked:
    """A data source that records what it is asked for. ``nouns`` holds pairs such as ('prompts', 'train')."""

    def __init__(self, data: DataSource):
        self.data, self.nouns = data, list[tuple[str, str]]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.data, name)
        if name not in ENCODERS:
            return found

        def noted(split: str) -> Any:
            items = found(split)
            self.nouns += [(name, split)] if (name, split) not in self.nouns else []
            return items

        return noted


def _check_lengths(noun: str, split: str, items: Sequence[Any], tokenizer: Tokenizer, lengths: Lengths) -> None:
    """Encode the first items; if none of them fits, encode all.

    Raises:
      LockstepError: no item fits, or the chat template cannot write them.
    """
    try:
        ENCODERS[noun](tokenizer, items[:FIRST], lengths, Fit(f"first {split} {noun}"))
    except DataError:
        ENCODERS[noun](tokenizer, items[:], lengths, Fit(f"{split} {noun}"))


def embeddings(experiment: Experiment) -> Iterator[tuple[str, int | None]]:
    """The configured policy and those that stages read from local folders, each with the rows of its embedding if known.

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
            load_own_tokenizer(Path(folder)).check_embedding(rows, f"the reward model '{folder}'")


def _outside(experiment: Experiment, kind: str) -> list[str]:
    """The local folders with whole checkpoints (no adapters) from which stages read a result of this kind."""
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
    Borders(tokenizer, "prompts").check(prompt)
    rendered = tokenizer.render(prompt.messages, add_generation_prompt=True)
    return f"{text}; the first prompt has {len(tokenizer.encode(rendered))} tokens and begins {rendered[:40]!r}"
