"""Configurations with hostile values, from composition to the dry run: what `lockstep run --dry-run` does.

``KEYS`` is about values, in every group of every component; ``OVERRIDES`` about what people type.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hostile import folders
from hostile.clear import SECRET, only_clear_errors
from hostile.values import TEXTS, Edits, at, edited, edits, paths, scalars
from lockstep.cli import SAID
from lockstep.commands.run.dry_run import dry_run
from lockstep.config.compose import _compose, compose, resolved
from lockstep.errors import LockstepError, short
from lockstep.reporting.console import Console
from lockstep.runs.experiment import Experiment
from runs import TINY

SMALL = [override for override in TINY if override.startswith("data.")]
SOURCE = "[{path: ROWS}]"
HALF = "data.heldout_fraction=0.5"
WORLD = "lockstep.checking.conformance.world"
PARTS = (
    "{a: {name: answer}, b: {name: pattern, pattern: x}, c: {name: length}, d: {name: code, allow: true, column: answer}, "
    "e: {name: judge, url: 'http://127.0.0.1:1/v1', model: m, prompt: '{dialogue} {response}'}}"
)
BASES: dict[str, list[str]] = {
    "miniature": SMALL,
    "endpoint": [*SMALL, "backend=jax", "reward_model=endpoint", f"reward_model.url='http://127.0.0.1:1/score?key={SECRET}'"],
    "function": [*SMALL, "reward_model=function", f"reward_model.function={WORLD}:word_scores", "tracker=tensorboard",
                 "policy=lora", "policy.path=CHECKPOINT",
                 *(f"{key}.lengths.prompt=100" for key in ("sft", "reward", "algorithm", "evaluation")),
                 ],
    "ensemble": [*SMALL, "experiment=ensemble", "tracker=none"],
    "rounds": [*SMALL, "experiment=rounds"],
    "people": [*SMALL, "experiment=rounds", "labeler=people"],
    "scores": [*SMALL, "experiment=rounds", "labeler=scores", "labeler.reward_model={name: length, unit: words, target: null}"],
    "group": [*SMALL, "algorithm=rloo"],
    "engine": [*SMALL, "algorithm=grpo", "engine=vllm"],
    "best": [*SMALL, "algorithm=rejection_sampling"],
    "preferences": [*SMALL, "algorithm=dpo"],
    "online": [*SMALL, "algorithm=online_dpo"],
    "teacher": [*SMALL, "algorithm=distillation", "algorithm.teacher=sft"],
    "parts": [*SMALL, "reward_model=sum", f"reward_model.parts={PARTS}", "reward_model.weights={a: 1, b: 1, c: 1, d: 1, e: 1}"],
    "attacks": [*SMALL, "experiment=hardening"],
    "dialogues": [*SMALL, "experiment=hardening", "environment=target", "environment.policy=last.defender"],
    "templates": [*SMALL, "experiment=hardening", "attacker=templates"],
    "library": ["experiment=library", *(f"data.{key}=20" for key in ("prompts", "demonstrations", "heldout_prompts"))],
    "matching": ["experiment=coverage", "data.demonstrations=20", "data.comparisons=20", "data.heldout=20"],
    "shop": ["experiment=shop", *(f"data.{key}=20" for key in ("prompts", "demonstrations", "heldout_prompts"))],
    "hh": ["experiment=hh", "policy.path=CHECKPOINT", f"data.comparisons={SOURCE}", HALF],
    "ultrafeedback": ["experiment=ultrafeedback", "backend=jax", "policy.path=CHECKPOINT", f"data.comparisons={SOURCE}",
                      f"data.demonstrations={SOURCE}", HALF],
}  # fmt: skip
"""Overrides of configurations that are right; together they have every component but those of `ELSEWHERE`."""
ELSEWHERE = {"gymnasium", "openenv", "tools", "human"}
"""They need a game, a server, a template that writes tools, or a closed round: their own tests have hostile input."""


def filled(override: str) -> str:
    return override.replace("CHECKPOINT", str(folders.checkpoint())).replace("ROWS", str(folders.rows()))


@functools.cache
def base(name: str) -> dict[str, Any]:
    """Its values, interpolations unresolved."""
    return OmegaConf.to_container(_compose([filled(override) for override in BASES[name]]), resolve=False)


Input = tuple[str, Edits]
URLS = st.sampled_from(
    (f"http://me:{SECRET}@127.0.0.1/", f"ftp://127.0.0.1/?key={SECRET}", f"http://127.0.0.1:port/?key={SECRET}")
)
KEYS: st.SearchStrategy[Input] = st.sampled_from(sorted(BASES)).flatmap(
    lambda name: st.tuples(st.just(name), edits(base(name)))
) | st.tuples(st.just("endpoint"), st.tuples(st.tuples(st.just(("reward_model", "url")), URLS)))


def made(name: str, changes: Edits) -> DictConfig:
    return OmegaConf.create(edited(base(name), changes))


def dry(config: dict[str, Any]) -> None:
    dry_run(Experiment(config), Console())


def check_keys(given: Input) -> None:
    name, changes = given
    try:
        config = made(name, changes)
    except OmegaConfBaseException:  # no file and no command line can hold it
        assume(False)
    keys = [str(part)[:50] for path, _ in changes for part in path]
    found = [each for _, value in changes for each in (value, *(at(value, path) for path in paths(value)))]
    values = (value[:50] for value in found if isinstance(value, str) and len(value) > 2)  # long ones, and long keys, are cut
    with only_clear_errors(*keys, *values), as_the_command_says():
        dry(resolved(config))


_KEYS = st.sampled_from(
    (
        "seed", "folder", "name", "stages", "stages.ppo", "policy", "policy.tokenizer.pad_token", "backend", "algorithm",
        "algorithm.kl_coef", "data.texts", "experiment", "hydra", "hydra.run.dir", "x", "a.b", "",
    )
)  # fmt: skip
_VALUES = st.sampled_from([text for text in TEXTS if len(text) < 1000]) | scalars.map(str) | st.text(max_size=8)
_OVERRIDE = st.builds(
    "{}{}{}{}".format, st.sampled_from(("", "+", "++", "~")), _KEYS, st.sampled_from(("=", "", ".", "@")), _VALUES
)
OVERRIDES: st.SearchStrategy[list[str]] = st.lists(_OVERRIDE | st.text(max_size=12), min_size=1, max_size=2)


def check_overrides(given: list[str]) -> None:
    with only_clear_errors(), as_the_command_says():
        dry(compose(given))


@contextlib.contextmanager
def as_the_command_says() -> Iterator[None]:
    """A name that no file can have, and a place that cannot be used, are errors of the operating system, for which the command
    line has one message (`lockstep.cli.SAID`)."""
    try:
        yield
    except OSError as error:
        if error.errno not in SAID:
            raise
        raise LockstepError(f"{short(str(error), 1000)}. {SAID[error.errno]}") from error
