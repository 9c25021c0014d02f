"""A finding: what somebody published, the sweep that tests it here, and the criteria that decide whether it holds.

    title: RLOO against RAFT and PPO
    source: Ahmadian et al. 2024 (arXiv 2402.14740)
    sweep: [experiment=methods, 'algorithm=rloo,rejection_sampling', 'backend=torch,jax', 'seed=1,2,3,4,5']
    claims:
      rloo_over_raft:
        claim: RLOO reaches a higher gold score than RAFT from the same samples
        published: win rates 77.9% and 73.2% on TL;DR
        value: heldout/ppo/gold[algorithm=rloo] - heldout/ppo/gold[algorithm=rejection_sampling]
        above: 0

Such files are ``finding/NAME.yaml`` in the ``conf`` folder of the core, of a plugin or of the current folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from lockstep.config.folders import conf_folders
from lockstep.config.schema import REQUIRED, parse, setting
from lockstep.errors import ConfigError, did_you_mean, listing, short

GROUP = "finding"
_SIGNS = re.compile(r"\s([+-])\s")
_TERM = re.compile(r"([\w.@]+(?:/[\w.@-]+)+)(?:\(([^()]*)\))?(?:\[([^\[\]]*)\])?")
_RANGE = re.compile(r"\s*([\w./-]+?)\s*=\s*(-?\d*\.?\d+)\s*\.\.\s*(-?\d*\.?\d+)\s*")


@dataclass(frozen=True)
class Range:
    """The steps of a stage at which another of its metrics is from ``low`` to ``high``, both included."""

    metric: str
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.metric}={self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class Term:
    """A metric of a run: SPLIT/POLICY/METRIC of an evaluation, reward_model/METRIC, or STAGE/METRIC, the last value that the
    stage logged, or with ``steps`` the mean of those that it logged there. ``where``: settings that select the run to read it
    from, if a seed has several runs."""

    sign: int
    metric: str
    steps: Range | None
    where: Mapping[str, str]


@dataclass(frozen=True)
class ClaimConfig:
    claim: str = setting(REQUIRED, "What should hold, in a sentence.")
    published: str = setting(REQUIRED, "What was published, with figures.")
    value: str = setting(
        REQUIRED,
        "Per seed: metrics added and subtracted. METRIC[key=value] reads the run with that setting, METRIC(other=LOW..HIGH) the "
        "mean of a stage's metric over the steps at which another is in that range.",
    )
    above: float | None = setting(None, "Holds if the whole interval of the mean over seeds is above this.", least=-math.inf)
    below: float | None = setting(None, "Holds if the whole interval of the mean over seeds is below this.", least=-math.inf)

    def __post_init__(self) -> None:
        if (self.above is None) == (self.below is None):
            raise ConfigError(f"The claim '{short(self.claim)}' needs one of 'above' and 'below', by which it is judged.")
        _ = self.terms

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        parts = _SIGNS.split(f" + {self.value.strip()}")[1:]
        return tuple(_term(sign, text.strip(), self.value) for sign, text in zip(parts[::2], parts[1::2], strict=True))

    @property
    def bound(self) -> float:
        bound = self.above if self.above is not None else self.below
        assert bound is not None
        return bound

    def is_met_by(self, value: float) -> bool:
        """True if ``value`` meets the criterion."""
        return value > self.bound if self.above is not None else value < self.bound

    @property
    def criterion(self) -> str:
        return f"{'above' if self.above is not None else 'below'} {self.bound:g}"


def _term(sign: str, text: str, whole: str) -> Term:
    found = _TERM.fullmatch(text)
    settings = [each.partition("=") for each in (found[3] or "").split(",") if each] if found else []
    if not found or not all(key.strip() and value.strip() for key, _, value in settings):
        raise ConfigError(
            f"'{short(text)}' in the value '{short(whole)}' is no metric. Metrics are heldout/ppo/gold or ppo/objective/kl, with "
            "a setting as in heldout/ppo/gold[algorithm=rloo]; between them stand ' + ' and ' - '."
        )
    steps = None if found[2] is None else _range(found[2], whole)
    return Term(1 if sign == "+" else -1, found[1], steps, {key.strip(): value.strip() for key, _, value in settings})


def _range(text: str, whole: str) -> Range:
    found = _RANGE.fullmatch(text)
    steps = Range(found[1], float(found[2]), float(found[3])) if found else None
    if steps is None or steps.low > steps.high:
        raise ConfigError(
            f"'({short(text)})' in the value '{short(whole)}' is no range. One is written as in "
            "ppo/objective/gold(objective/kl=1..2): the mean over the steps of ppo at which objective/kl is from 1 to 2."
        )
    return steps


@dataclass(frozen=True)
class Finding:
    title: str = setting(REQUIRED, "What the finding is about.")
    source: str = setting(REQUIRED, "Who published it, and where.")
    sweep: tuple[str, ...] = setting(REQUIRED, "Overrides for `lockstep run -m`.")
    hours: float = setting(REQUIRED, "Hours that the sweep takes on two cores.", above=0)
    claims: dict[str, ClaimConfig] = setting(REQUIRED, "Claims by name.")


def findings() -> dict[str, Path]:
    """Return {name: file} of the core, of plugins and of the current folder."""
    return {file.stem: file for folder in conf_folders().values() for file in sorted((folder / GROUP).glob("*.yaml"))}


def finding(name: str) -> tuple[Finding, str]:
    """Return a finding and the text of its file.

    Raises:
      ConfigError: no finding has this name, or its file is not a valid finding.
    """
    known = findings()
    if name not in known:
        raise ConfigError(f"There is no finding '{short(name)}'.{did_you_mean(name, known)} There are: {listing(known)}.")
    text = known[name].read_text(encoding="utf-8")
    return parsed(text, str(known[name])), text


def parsed(text: str, where: str) -> Finding:
    """
    Raises:
      ConfigError: the text is not a valid finding.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is no YAML: {short(str(error))}") from error
    return parse(Finding, content, where)
