"""YAML to checked dataclasses.

A component's ``Config`` is a plain frozen dataclass. Each field is declared once, by `setting`: its default, its unit and its
source, and its range. `parse` is the only way from YAML (or from keywords in Python) to a ``Config``: it fills in defaults
and checks names, types and ranges. Its errors say what is wrong, where, what exists and what to type next.

Ranges are checked here, not in the constructor, because only `parse` knows a key's full path. Constraints across fields
(minibatches must divide the batch) belong in the dataclass's ``__post_init__``; by then each value is in its range.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union

from lockstep.errors import ConfigError, did_you_mean, listing

T = TypeVar("T")

REQUIRED: Any = dataclasses.MISSING
"""In place of a default: the value must be given."""


@dataclass(frozen=True)
class Range:
    """The range of a number; null, if the type allows it, is in every range."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    finite: bool = True

    def __contains__(self, number: float) -> bool:
        return (
            (math.isfinite(number) or not self.finite and not math.isnan(number))
            and (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        ends = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {end:g}" for word, end in ends.items() if end is not None) or "a number"


FINITE = Range()


def setting(
    default: Any, doc: str, *, least: float | None = None, above: float | None = None, most: float | None = None,
    below: float | None = None, finite: bool = True,
) -> Any:  # fmt: skip
    """A field of a configuration: ``learning_rate: float = setting(3e-4, "Peak step size.", above=0)``.

    Args:
      default: `REQUIRED` if there is no safe one.
      doc: what it is, its unit, and whose number the default is.
      least, above, most, below: the range; in a tuple, of each number. Errors state it, so ``doc`` does not.
      finite: False also accepts ±inf; NaN is never accepted.
    """
    given = {"default_factory": lambda: copy.deepcopy(default)} if isinstance(default, (dict, list)) else {"default": default}
    return dataclasses.field(**given, metadata={"doc": doc, "range": Range(least, above, most, below, finite)})


def parse(cls: type[T], values: Mapping[str, Any], where: str, defaults: T | None = None) -> T:
    """``values`` as an instance of the dataclass ``cls``.

    Args:
      where: their place in the configuration ('algorithm'); '' at the root.
      defaults: values for absent keys, in place of the fields' own defaults. So an outer group sets the defaults of a nested
        one ('algorithm.optimizer'): PPO's epsilon is not the optimizer's.

    Raises:
      ConfigError: unknown or missing keys, wrong types, numbers out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must be a group of keys, not {values!r}.")
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(f"Unknown key {_at(where, key)}.{did_you_mean(str(key), fields)} Known: {listing(fields)}.")
    if missing := [name for name, f in fields.items() if name not in values and defaults is None and _default(f) is REQUIRED]:
        raise ConfigError(f"Missing: {', '.join(_at(where, n) for n in missing)}. Set it on the command line or in YAML.")
    made = {}
    for name, field in fields.items():
        default = _default(field) if defaults is None else getattr(defaults, name)
        made[name] = _convert(hints[name], values[name], _at(where, name), default) if name in values else default
        _check_range(field.metadata.get("range", FINITE), made[name], _at(where, name), hints[name])
    return cls(**made)


def _at(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _check_range(allowed: Range, value: Any, where: str, hint: Any) -> None:
    if isinstance(value, tuple):
        for i, each in enumerate(value):
            _check_range(allowed, each, f"{where}[{i}]", None)
    elif isinstance(value, (int, float)) and value not in allowed:
        wanted = allowed if math.isfinite(value) or not allowed.finite else "a finite number"
        null = ", or null" if type(None) in typing.get_args(hint) else ""
        raise ConfigError(f"{where}={value!r} must be {wanted}{null}.")


def _convert(hint: Any, value: Any, where: str, default: Any = None) -> Any:
    """``value`` as type ``hint``. An int becomes a float, a list a tuple, a mapping a dataclass, with absent keys
    from ``default``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if value == "???":
        raise ConfigError(f"Missing: {where}. Set it on the command line: {where}=...")
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where, default)
    if origin is Literal:
        if value not in arguments:
            names = [str(a) for a in arguments]
            raise ConfigError(f"{where}={value!r} is not one of {', '.join(names)}.{did_you_mean(str(value), names)}")
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return parse(hint, value, where, default if isinstance(default, hint) else None)
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


def _convert_union(options: tuple[Any, ...], value: Any, where: str, default: Any) -> Any:
    if value is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    problems = []
    for option in rest:
        try:
            return _convert(option, value, where, default)
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
    """'sft.epochs: 1 -> 2' for every leaf where two configurations differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            line
            for key in keys
            for line in differences(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{where}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{where}: {old} -> {new}"]
