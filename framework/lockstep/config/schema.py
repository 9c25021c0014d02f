"""YAML to checked dataclasses.

YAML holds every value; a frozen dataclass without defaults holds the types. `parse` is the one way from one to the
other, and says what is wrong with where, what exists and what to type next.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from lockstep.errors import ConfigError, did_you_mean, listing

T = TypeVar("T")


def parse(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """``values`` as an instance of the dataclass ``cls``; ``where`` is their place in the configuration ('algorithm').

    Raises:
      ConfigError: unknown or missing keys, wrong types.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a group of keys, not {values!r}.")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ConfigError(f"Unknown key {where}.{key}.{did_you_mean(str(key), names)} Known: {listing(names)}.")
    if missing := [n for n in names if n not in values]:
        raise ConfigError(f"Missing: {', '.join(f'{where}.{n}' for n in missing)}. Set it on the command line or in YAML.")
    return cls(**{name: _convert(hints[name], values[name], f"{where}.{name}") for name in names})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` as type ``hint``; int is taken for float, a list for a tuple, a mapping for a dataclass."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if value == "???":
        raise ConfigError(f"Missing: {where}. Set it on the command line: {where}=...")
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            names = [str(a) for a in arguments]
            raise ConfigError(f"{where}={value!r} is not one of {', '.join(names)}.{did_you_mean(str(value), names)}")
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return parse(hint, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        if arguments[-1] is Ellipsis:
            return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(arguments) == len(value):
            return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True)))
    elif (origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping") and isinstance(value, Mapping):
        return {_convert(arguments[0], k, where): _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif (
        hint is int and isinstance(value, int) and not isinstance(value, bool) or hint in (str, bool) and isinstance(value, hint)
    ):
        return value
    raise ConfigError(f"{where}={value!r} should be {_name(hint)}, not {type(value).__name__}.")


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    problems = []
    for option in rest:
        try:
            return _convert(option, value, where)
        except ConfigError as error:
            problems.append(error)
    if len(rest) == 1 or any(dataclasses.is_dataclass(o) for o in rest):
        raise problems[-1]
    raise ConfigError(f"{where}={value!r} should be {' or '.join(map(_name, options))}, not {type(value).__name__}.")


def _name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_name, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """'sft.epochs: 1 -> 2' for every leaf in which two configurations differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            line
            for key in keys
            for line in differences(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{where}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{where}: {old} -> {new}"]
