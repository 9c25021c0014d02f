"""YAML to checked dataclasses.

A component's ``Config`` is a plain frozen dataclass. Each field is declared once, by `setting`: its default, its unit and its
source, and its range. `parse` is the only way from YAML (or from keywords in Python) to a ``Config``: it fills in defaults
and checks names, types and ranges. Its errors say what is wrong, where, what exists and what to type next.

Ranges are checked here, not in the constructor, because only `parse` knows a key's full path. Constraints across fields
(minibatches must divide the batch) belong in the dataclass's ``__post_init__``; by then each value is in its range.
"""

from __future__ import annotations

import collections.abc
import copy
import dataclasses
import math
import numbers
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from lockstep.config.overrides import override
from lockstep.errors import ConfigError, did_you_mean, listing, short

T = TypeVar("T")

SMALLEST, LARGEST = 2.0**-126, (2 - 2**-23) * 2.0**127
"""The range of float32's normal numbers. In the arithmetic, smaller numbers become 0 and larger ones infinite."""

REQUIRED: Any = dataclasses.MISSING
"""In place of a default: the value must be given."""


@dataclass(frozen=True)
class Range:
    """The range of a number; null, if the type allows it, is in every range. A number that float32 or int64
    cannot hold is in none."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    finite: bool = True

    def __contains__(self, number: float) -> bool:
        return (
            (self.held(number) or not self.finite and number in (math.inf, -math.inf))
            and (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    @staticmethod
    def held(number: float) -> bool:
        if isinstance(number, int):
            return -(2**63) <= number < 2**63
        return number == 0 or SMALLEST <= abs(number) <= LARGEST

    def wanted(self, number: float) -> str:
        """What a number outside the range should be."""
        if isinstance(number, int) and not self.held(number):
            return "an integer of 64 bits"
        if not math.isfinite(number) and self.finite:
            return "a finite number"
        if math.isfinite(number) and not self.held(number):
            return f"between {SMALLEST:.2g} and {LARGEST:.2g} in size: the arithmetic is float32"
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
      doc: what it is, its unit, and the source of the default.
      least, above, most, below: the range; for a tuple, of each number. Errors state it, so ``doc`` does not. A number that may
        be anything has least=-math.inf.
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
        raise ConfigError(f"{where} must be a group of keys, not {_shown(values)}.")
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
    return f"{where}.{short(str(key))}" if where else short(str(key))


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _check_range(allowed: Range, value: Any, where: str, hint: Any) -> None:
    if isinstance(value, tuple):
        for i, each in enumerate(value):
            _check_range(allowed, each, f"{where}[{i}]", None)
    elif isinstance(value, dict) and typing.get_args(hint)[1:] in ((int,), (float,)):
        for key, each in value.items():
            _check_range(allowed, each, _at(where, key), None)
    elif isinstance(value, (int, float)) and value not in allowed:
        wanted = allowed.wanted(value)
        null = ", or null" if type(None) in typing.get_args(hint) else ""
        raise ConfigError(f"{where}={_shown(value)} must be {wanted}{null}.")


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
            near = did_you_mean(value, names) if isinstance(value, str) else ""
            raise ConfigError(f"{where}={_shown(value)} is not one of {', '.join(names)}.{near}")
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return parse(hint, value, where, default if isinstance(default, hint) else None)
    if origin is tuple and isinstance(value, (list, tuple)):
        if arguments[-1] is Ellipsis:
            return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(arguments) == len(value):
            return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True)))
    elif (origin in (dict, Mapping) or getattr(origin, "__name__", "") == "Mapping") and isinstance(value, Mapping):
        if other := [key for key in value if not isinstance(key, arguments[0])]:
            raise ConfigError(
                f"{where} has the key {_shown(other[0])}, but its keys are text. Write '{_shown(other[0])}' in quotes."
            )
        return {k: _convert(arguments[1], v, _at(where, k)) for k, v in value.items()}
    elif hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):  # numpy's too
        return value if isinstance(value, int) and not Range.held(value) else float(value)  # too large, as the range will say
    elif hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    elif hint in (str, bool) and isinstance(value, hint):
        return value
    raise ConfigError(
        f"{where}={_shown(value)} should be {_name(hint)}, not {type(value).__name__}.{_quoted(where, value, hint)}"
    )


def _quoted(where: str, value: Any, *hints: Any) -> str:
    """What to type if text was read as something else (a number, a boolean or a list), or was given for a list of one or for a
    group with a file's path."""
    if isinstance(value, str) and where and "[" not in where and tuple[str, ...] in hints:
        return f" For a list of one, type: {override(where, [value])}"
    item = re.fullmatch(r"([^\[]+)\[\d+\]", where)
    key, fits = (item[1], _is_group) if item else (where, _is_list_of_groups)
    if isinstance(value, str) and Path(value).suffix and key and "[" not in key and any(map(fits, hints)):
        return f" For a file, type: {override(key, [{'path': short(value)}])}"
    if str not in hints or not isinstance(value, (bool, int, float, list)) or not where or "[" in where:
        return ""
    text = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
    return f" For the text, type: {override(where, short(text))}"


def _is_group(hint: Any) -> bool:
    """True for a group of free keys."""
    return typing.get_origin(hint) in (dict, collections.abc.Mapping)


def _is_list_of_groups(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple and _is_group(typing.get_args(hint)[0])


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
    names = " or ".join(map(_name, options))
    raise ConfigError(f"{where}={_shown(value)} should be {names}, not {type(value).__name__}.{_quoted(where, value, *rest)}")


def _shown(value: Any) -> str:
    try:
        return short(repr(value))
    except ValueError:  # an int of more than 4,300 digits
        return "(a number of thousands of digits)"


def _name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if _is_group(hint):
        return "a group of keys"
    if _is_list_of_groups(hint):
        return "a list of groups of keys"
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_name, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        first, *rest = map(_name, (each for each in typing.get_args(hint) if each is not Ellipsis))
        return f"[{', '.join([first, *rest])}]" if rest else f"a list of {first}"
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
