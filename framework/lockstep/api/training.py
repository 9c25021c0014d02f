"""Train a policy, or a reward model on top of it, by any algorithm that is registered."""

from __future__ import annotations

import dataclasses
import logging
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lockstep.api import items
from lockstep.api.policies import ChatPolicy, load
from lockstep.api.scorers import Reward, Scorer, reward_model
from lockstep.api.sources import laid_over
from lockstep.config.compose import group, no_file
from lockstep.config.root import component_config
from lockstep.data.columns import texts_of
from lockstep.errors import ConfigError, DataError, Diverged, MissingData, RegistryError, short
from lockstep.interfaces import Algorithm, Backend, Context, DataSource, Environment, Policy, RewardModel
from lockstep.learning.episodes import EnvironmentReward
from lockstep.registry import registry
from lockstep.reporting.console import Console
from lockstep.reporting.health import NOT_FINITE, Health, are_not_finite, diverged
from lockstep.runs.interrupts import GracefulStop
from lockstep.runs.loop import spoilt
from lockstep.text.tokenizer import Tokenizer
from lockstep.types import Comparison, Demonstration, Prompt

if TYPE_CHECKING:
    import pandas

log = logging.getLogger("lockstep")


def train(
    policy: ChatPolicy, algorithm: str, *, prompts: Iterable[Any] | None = None, demonstrations: Iterable[Any] | None = None,
    comparisons: Iterable[Any] | None = None, texts: Iterable[Any] | None = None,
    reward: Reward | Scorer | RewardModel | None = None, environment: Environment | None = None, seed: int = 0, **settings: Any,
) -> Any:  # fmt: skip
    """Train a policy with an algorithm. Returns a `ChatPolicy`, or a `Scorer` if the algorithm learns a reward model; its
    ``metrics`` are a data frame, a row per step and one of the final measures. The given policy does not change.

    Ctrl-C ends training after the step in progress and returns the result so far. A second one stops at once.

    Args:
      algorithm: a file of `conf/algorithm`: 'sft', 'reward_modelling', 'ppo', 'grpo', 'dpo', ...; or a plugin's.
      prompts: text, or dialogues: lists of messages {'role': ..., 'content': ...}.
      demonstrations: pairs (prompt, response).
      comparisons: (prompt, chosen, rejected), or (prompt, completions, ranks), where rank 0 is best.
      texts: raw text.
        Each item of these four may also be a mapping with columns that docs/data.md understands, as rows of `datasets` are.
      reward: for algorithms that need one: a function (prompts, responses) -> scores, where prompts are dialogues; or the
        `Scorer` that `train` made from comparisons. An exception in the function ends training.
      environment: what the policy converses with, for algorithms that sample. Without ``reward``, its own rewards count.
      seed: for the order of data and for sampling.
      settings: keys of the algorithm's configuration that differ from its file in `conf/algorithm`: iterations=20,
        optimizer={'learning_rate': 1e-4}, lengths={'prompt': 256, 'response': 64}, ...

    Raises:
      ConfigError: an unknown key, or a value that does not fit.
      MissingData: the algorithm needs data that was not given.
      DataError: an item has another form, or words that the tokenizer does not know.
      Diverged: a loss or a gradient is not finite, or a parameter after the last step.
    """
    preset = group("algorithm", algorithm)  # grpo.yaml, say, is a configuration of policy_gradient
    keys = {"name": algorithm} | preset
    try:
        cls: type[Algorithm] = registry().resolve("algorithm", keys["name"], policy.backend.name)
    except RegistryError:
        if preset:
            raise
        raise RegistryError(f"{no_file('algorithm', algorithm)} Or name a class: module:Class.") from None
    given = {"prompts": prompts, "demonstrations": demonstrations, "comparisons": comparisons, "texts": texts}
    _refuse_near_arguments(settings, (*given, "reward", "environment"), cls, algorithm)
    config = component_config(cls, laid_over(keys, settings), algorithm)
    if environment is not None and not cls.takes_environment:
        raise ConfigError(f"{algorithm} takes no environment. Leave out environment=.")
    if environment is not None and reward is None:
        reward = EnvironmentReward()
    if cls.needs_reward_model and reward is None:
        raise ConfigError(f"{algorithm} needs a reward. Pass reward=, a function (prompts, responses) -> scores, or a Scorer.")
    if reward is not None and not cls.needs_reward_model:
        raise ConfigError(f"{algorithm} takes no reward. Leave out reward=.")
    data = Given({noun: items.read(noun, found) for noun, found in given.items() if found is not None})
    _refuse_unknown_words(data, policy.tokenizer)
    scores = None if reward is None else reward_model(reward, policy)
    console = Console()
    own: Any = policy.policy.copy()  # some algorithms train it in place
    others: Any = Opened(policy.backend, policy.tokenizer)
    context = Context(seed, policy.backend, policy.tokenizer, data, own, scores, environment, others)
    trainer = cls(config, context)
    metrics = _metrics(_steps(algorithm, trainer, console))
    made: Any = trainer.result()
    if cls.produces == "policy":
        return ChatPolicy(made, policy.tokenizer, policy.backend, policy.name, metrics)
    return Scorer(made, policy.tokenizer, policy.backend, policy.name, metrics)


def _refuse_near_arguments(settings: Iterable[str], arguments: Iterable[str], cls: type[Algorithm], algorithm: str) -> None:
    """
    Raises:
      ConfigError: a setting that the algorithm lacks is the singular or plural of an argument of `train`.
    """
    unknown = set(settings) - {field.name for field in dataclasses.fields(cls.Config)}
    for meant in arguments:
        if other := next((key for key in unknown if key.rstrip("s") == meant.rstrip("s")), None):
            raise ConfigError(f"train has no argument '{other}', and {algorithm} no such setting. Did you mean '{meant}'?")


def _refuse_unknown_words(data: Given, tokenizer: Tokenizer) -> None:
    """
    Raises:
      DataError: a text has words that would become the tokenizer's unknown token.
    """
    for noun, found in data.nouns.items():
        for number, item in enumerate(found):
            if words := dict.fromkeys(word for text in texts_of(item) for word in tokenizer.unknown_words(text)):
                named = ", ".join(f"'{short(word)}'" for word in [*words][:3]) + (", ..." if len(words) > 3 else "")
                raise DataError(
                    f"{noun}[{number}]: the tokenizer does not know {named} and would read the unknown token. Pass tokenizer= to "
                    "new_policy, a folder or a hub id: its default is the miniature's, which knows only the miniature's words."
                )


def _steps(name: str, trainer: Algorithm, console: Console) -> list[dict[str, float]]:
    """Run all steps. Return the metrics of each and, if there are any, those of the end."""
    rows, health = [], Health()
    with GracefulStop(signals=(signal.SIGINT,)) as stop, console.progress(name, 0, trainer.total_steps) as progress:
        for step in range(trainer.total_steps):
            rows.append(trainer.step(step))
            for finding in health.watch(step, rows[-1]):
                log.warning("step %d: %s. %s", step, finding.name, finding.message)
            asked = stop.asked
            ends = asked or step + 1 == trainer.total_steps
            if wrong := diverged(rows[-1]) or (spoilt(trainer.learner) if ends else []):
                where = f"{name} stopped after step {step + 1} of {trainer.total_steps}"
                raise Diverged(f"{where}: {are_not_finite(wrong)} {NOT_FINITE.meaning} Try: {NOT_FINITE.advice}")
            progress(step + 1, rows[-1])
            if asked:
                log.warning("stopped after step %d of %d: returning the result so far", step + 1, trainer.total_steps)
                break
    last = trainer.finish()
    return [*rows, last] if last else rows


def _metrics(rows: Sequence[Mapping[str, float]]) -> pandas.DataFrame:
    """A row per step, without columns that were never measured."""
    import pandas

    return pandas.DataFrame(rows, index=pandas.RangeIndex(len(rows), name="step")).dropna(axis="columns", how="all")


@dataclass
class Opened:
    """Opens other policies that an algorithm names, such as a teacher, with `load`."""

    backend: Backend
    tokenizer: Tokenizer

    def policy(self, source: str) -> tuple[Policy, Tokenizer]:
        found = load(source, self.backend)
        return found.policy, found.tokenizer


class Given(DataSource):
    """The data passed in; nothing is held out."""

    def __init__(self, nouns: Mapping[str, Sequence[Any]]):
        self.nouns = nouns

    def texts(self, split: str) -> Sequence[str]:
        return self._split("texts", split)

    def demonstrations(self, split: str) -> Sequence[Demonstration]:
        return self._split("demonstrations", split)

    def comparisons(self, split: str) -> Sequence[Comparison]:
        return self._split("comparisons", split)

    def prompts(self, split: str) -> Sequence[Prompt]:
        return self._split("prompts", split)

    def _split(self, noun: str, split: str) -> Sequence[Any]:
        if noun not in self.nouns:
            raise MissingData(f"This training needs {noun}. Pass {noun}=[...], each {items.FORMS[noun]}.")
        return self.nouns[noun] if split == "train" else ()
