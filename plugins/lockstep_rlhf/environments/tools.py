"""Python functions as tools, called by name with JSON arguments, in the form that tool-using models' chat templates write."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.config.schema import REQUIRED, setting
from lockstep.errors import ConfigError, told
from lockstep.interfaces import Environment, Episode, Reply, Resources
from lockstep.learning.episodes import MOST_MESSAGES, EnvironmentConfig
from lockstep.registry import function_at
from lockstep.types import Message

TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


class Tools(Environment):
    """Runs the function calls in the policy's turn. A call is {"name": ..., "arguments": {...}} between ``call_begin`` and
    ``call_end``; its result is a message with the role 'tool'. A turn without a call is the policy's answer and ends the episode;
    the reward model scores it.

    If a call fails (invalid JSON, an unknown tool, wrong arguments, an exception), the policy gets the error message and may try
    again. Only the policy's own text is read as calls, never a tool's result.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(EnvironmentConfig):
        functions: tuple[str, ...] = setting(REQUIRED, "module:function each; name, docstring and annotations describe it.")
        call_begin: str = setting("<tool_call>", "The mark before a call in the policy's text (Hermes, Qwen).")
        call_end: str = setting("</tool_call>", "The mark after a call; optional at the end of a turn.")

        def __post_init__(self) -> None:
            if not self.call_begin or not self.call_end:
                raise ConfigError("environment.call_begin and environment.call_end should be texts of at least one character.")

    @classmethod
    def check(cls, config: Config) -> None:
        _functions(config.functions)

    def __init__(self, config: Config, resources: Resources | None = None):
        super().__init__(config, resources)
        self.functions = _functions(config.functions)
        self.marks = (config.call_begin,)
        self.tools = tuple(schema(name, function) for name, function in self.functions.items())

    def reply(self, episode: Episode) -> Reply:
        calls = self.calls(episode.text)
        if not calls:
            return Reply.ends()
        results = tuple(Message("tool", self.result(call)) for call in calls[:MOST_MESSAGES])
        return Reply(results)

    def calls(self, text: str) -> list[str]:
        """The text of each call, between the marks."""
        return [part.partition(self.config.call_end)[0].strip() for part in text.split(self.config.call_begin)[1:]]

    def result(self, call: str) -> str:
        """The result of the call as text, or an error message."""
        try:
            asked = json.loads(call)
        except (ValueError, RecursionError) as error:
            return f"error: the call is not JSON: {error}"
        arguments = asked.get("arguments", {}) if isinstance(asked, Mapping) else None
        if not isinstance(asked, Mapping) or not isinstance(arguments, Mapping):
            return 'error: a call should be {"name": ..., "arguments": {...}}'
        name = asked.get("name")
        if not isinstance(name, str) or name not in self.functions:
            return f"error: there is no tool {told(name)}. Tools: {', '.join(self.functions)}."
        try:
            found = self.functions[name](**arguments)
        except Exception as error:
            return f"error: {told(error)}"
        return found if isinstance(found, str) else _json(found)


def schema(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function, in the form that transformers' chat templates take."""
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    described = {
        "name": name,
        "description": inspect.cleandoc(function.__doc__ or "").partition("\n\n")[0],
        "parameters": {
            "type": "object",
            "properties": {parameter.name: _type(hints.get(parameter.name)) for parameter in parameters},
            "required": [parameter.name for parameter in parameters if parameter.default is parameter.empty],
        },
    }
    return {"type": "function", "function": described}


def _type(hint: Any) -> dict[str, Any]:
    options = [option for option in typing.get_args(hint) if option is not types.NoneType]
    if typing.get_origin(hint) is typing.Literal:
        return {"enum": list(typing.get_args(hint))}
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and len(options) == 1:
        return _type(options[0])
    known = TYPES.get(typing.get_origin(hint) or hint)
    return {} if known is None else {"type": known}


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return told(value)


def _functions(paths: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    """
    Raises:
      ConfigError: one is not there, is no function, or two have the same name.
    """
    found: dict[str, Callable[..., Any]] = {}
    for path in paths:
        function = function_at(path, "environment.functions")
        if function.__name__ in found:
            raise ConfigError(f"environment.functions names two functions '{function.__name__}': a call could mean either.")
        found[function.__name__] = function
    if not found:
        raise ConfigError("environment.functions names no function. Give at least one: [my_tools:search].")
    return found
