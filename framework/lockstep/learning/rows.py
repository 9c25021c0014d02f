"""Prompts in the form that reward functions receive: their messages, and their ground truth (`lockstep.types.Prompt.truth`) as
columns with one value per response."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lockstep.config.overrides import override
from lockstep.errors import MissingData, RewardError, Unreachable, did_you_mean, listing
from lockstep.interfaces import DataSource
from lockstep.types import Prompt

Columns = Mapping[str, Sequence[Any]]
"""{name: one value per response, None where its prompt has none}."""

Dialogue = list[dict[str, str]]
"""Messages: {role, content}."""

STAND_IN = "A response."


def dialogues(prompts: Sequence[Prompt]) -> list[Dialogue]:
    return [[{"role": m.role, "content": m.content} for m in prompt.messages] for prompt in prompts]


def columns_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Every column that at least one of the prompts has."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.truth)
    return {name: [prompt.truth.get(name) for prompt in prompts] for name in names}


class MissingColumn(RewardError):
    """None of the prompts has the column ``name``. ``asks`` begins the message: it names what needs the column.

    among, sources: whose prompts these are, and the key that names their sources.
    """

    def __init__(self, asks: str, name: str, columns: Columns, among: str = "prompt", sources: str = "data.prompts"):
        source = override(sources, [{"path": "my.jsonl", "columns": [name]}])
        super().__init__(
            f"{asks} needs the column '{name}', which no {among} has.{did_you_mean(name, columns)} Columns there: "
            f"{listing(columns)}. Name it in its source: {source}."
        )
        self.asks, self.name, self.columns = asks, name, columns


def column(columns: Columns, name: str, asks: str) -> Sequence[Any]:
    """The column called ``name``.

    Raises:
      MissingColumn: no prompt has it. ``asks`` names what needs the column.
    """
    if name in columns:
        return columns[name]
    raise MissingColumn(asks, name, columns)


def arguments(function: Callable[..., Any], columns: Columns) -> dict[str, list[Any]]:
    """The keyword arguments of ``function(prompts, responses, ...)``: copies of the columns it has parameters for, or of all
    columns if it takes ``**columns``. A parameter with a default may lack its column.

    Raises:
      MissingColumn: a parameter without a default has no column.
    """
    return {name: copy.deepcopy(list(columns[name])) for name in _wanted(function, columns)}


def _wanted(function: Callable[..., Any], columns: Columns) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return []
    taken = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:2]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p not in taken]
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in columns:
            column(columns, parameter.name, f"The reward function's parameter '{parameter.name}' has no default, so it")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return [name for name in columns if name not in [p.name for p in taken]]
    return [p.name for p in named if p.name in columns]


def first_row(data: DataSource) -> tuple[Prompt, str] | None:
    """The first training prompt, and a response to try a reward on: the first demonstration's, or a stand-in. None if no prompt
    is available now."""
    try:
        prompt = data.prompts("train")[0]
    except (MissingData, Unreachable):
        return None
    try:
        return prompt, data.demonstrations("train")[0].response
    except (MissingData, Unreachable):
        return prompt, STAND_IN
