"""``lockstep check NAME``: check one component on every backend and precision, and say what a failure usually means."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.checking.conformance.kit import KINDS, Outcome, conform
from lockstep.checking.conformance.subjects import subject
from lockstep.checking.conformance.world import workers
from lockstep.config import compose
from lockstep.errors import ConfigError, RegistryError, did_you_mean, listing
from lockstep.registry import registry
from lockstep.reporting.console import Console

PRECISIONS = ("float32", "bfloat16")
MARKS = {"passed": "✓", "failed": "✗", "inapplicable": "–"}


@dataclass(frozen=True)
class Place:
    """Where a component is checked. ``precision`` is None if the backend's configuration has no such key."""

    backend: str
    precision: str | None

    def __str__(self) -> str:
        return f"{self.backend}, {self.precision}" if self.precision else self.backend


def report(
    name: str,
    kind: str | None = None,
    backend: str | None = None,
    precision: str | None = None,
    like: str | None = None,
    overrides: Sequence[str] = (),
    verbose: bool = False,
) -> bool:
    """Check the component and print the results. Return True if nothing failed. ``like`` names the configuration file to start
    from if the component has none; ``overrides`` are 'algorithm.kl_coef=0.1', 'backend.device=cuda', ...; ``verbose`` adds the
    traceback of an unexpected error in a check.

    Raises:
      LockstepError: the component cannot be checked; the message says what to type instead.
    """
    kind = kind_of(name, kind)
    where = places(kind, name, [backend] if backend else None, [precision] if precision else None)
    check_overrides(overrides)
    console, found = Console(), []
    for place in where:
        console.say(f"{kind} {name} on {place}")
        made_here = made(kind, name, place, overrides, like)
        console.say(f"  with {' '.join(made_here.settings())}")
        raised: set[str] = set()
        for outcome in conform(kind, made_here):
            console.say(line(outcome, verbose, again=bool(outcome.traceback) and outcome.detail in raised))
            raised.add(outcome.detail)
            found.append(outcome)
    console.say(summary(name, where, found))
    return all(outcome.status != "failed" for outcome in found)


def processes(name: str, kind: str | None = None, backend: str | None = None, overrides: Sequence[str] = ()) -> int:
    """How many processes the checks need on this host.

    Raises:
      LockstepError: backends need different numbers, or the component cannot be checked.
    """
    kind = kind_of(name, kind)
    check_overrides(overrides)
    if not any(each.startswith("backend.mesh") for each in overrides):
        return 1
    counts = {each: workers(each, overrides) for each in ([backend] if backend else usable_backends(kind, name))}
    if len(set(counts.values())) > 1:
        needs = ", ".join(f"{each}: {count}" for each, count in counts.items())
        raise ConfigError(f"Backends need other numbers of processes ({needs}). Add --backend with one of {listing(counts)}.")
    return next(iter(counts.values()))


def made(kind: str, name: str, place: Place, overrides: Sequence[str] = (), like: str | None = None) -> Any:
    """Make the subject of the checks in this place.

    Raises:
      ConfigError: values are missing; the message says where to get them.
    """
    try:
        return subject(kind, name, place.backend, precision=place.precision, overrides=overrides, like=like)
    except ConfigError as error:
        if compose.group(kind, like or name):
            raise
        others = sorted({c.name for c in registry() if c.kind == kind and compose.group(kind, c.name)})
        raise ConfigError(
            f"{error} There is no configuration file {kind}/{like or name}.yaml to start from. Add --like with one of "
            f"{listing(others)}, and {kind}.key=value for what differs."
        ) from error


def kind_of(name: str, kind: str | None = None) -> str:
    """The kind of the component with this name.

    Raises:
      LockstepError: no component has this name, several have it, or its kind has no checks.
    """
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"There are no checks for the kind '{kind}'.{did_you_mean(kind, KINDS)} Kinds: {', '.join(KINDS)}.")
    if ":" in name:
        if kind is None:
            raise ConfigError(f"What kind is {name}? Add --kind with one of {', '.join(KINDS)}.")
        return kind
    named = [component.kind for component in registry() if component.name == name]
    kinds = sorted(set(named) & set(KINDS))
    if kind in kinds:
        return kind
    if kind is None and len(kinds) > 1:
        raise RegistryError(f"'{name}' is {' and '.join(map(_article, kinds))}. Add --kind {' or --kind '.join(kinds)}.")
    if kind is None and kinds:
        return kinds[0]
    if kind is None and named:
        raise RegistryError(f"'{name}' is of kind {named[0]}, which has no checks. Kinds with checks: {', '.join(KINDS)}.")
    for each in [kind] if kind else KINDS:
        if component := compose.group(each, name).get("name"):
            raise RegistryError(
                f"'{name}' is a configuration of the {each} '{component}'. "
                f"Type: lockstep check {component} --kind {each} --like {name}"
            )
    names = {component.name for component in registry() if component.kind in ([kind] if kind else KINDS)}
    what = f"{kind} named '{name}'" if kind else f"component named '{name}'"
    here = f" '{name}' is of kind {named[0]}." if named else ""
    raise RegistryError(
        f"No {what} to check.{here}{did_you_mean(name, names)} There are: {listing(names)}. "
        f"For a class that is not registered, type: lockstep check module:Class --kind {kind or 'algorithm'}"
    )


def places(kind: str, name: str, backends: Sequence[str] | None = None, precisions: Sequence[str] | None = None) -> list[Place]:
    """Where to check: every installed backend that has the component, in each of its precisions; or only those asked for.

    Raises:
      LockstepError: there is no such place.
    """
    chosen = backends or usable_backends(kind, name)
    if kind == "backend" and list(chosen) != [name]:
        raise ConfigError(f"'{name}' is a backend. Leave out --backend, or type: lockstep check {chosen[0]}")
    for backend in chosen:
        if ("backend", backend, backend) not in registry().components and ("backend", backend, None) not in registry().components:
            names = {component.name for component in registry() if component.kind == "backend"}
            raise RegistryError(f"No backend named '{backend}'.{did_you_mean(backend, names)} There are: {listing(names)}.")
    if kind in ON_THE_HOST:
        return [Place(chosen[0], None)]
    known = {backend: known_precisions(kind, name, backend) for backend in chosen}
    if precisions is None:
        return [Place(backend, precision) for backend in chosen for precision in known[backend]]
    found = [Place(backend, precision) for backend in chosen for precision in precisions if precision in known[backend]]
    if not found:
        has = "; ".join(f"{backend} has {listing(filter(None, known[backend]))}" for backend in chosen)
        raise ConfigError(f"There is no precision {' or '.join(precisions)} on {_and(chosen)}: {has}.")
    return found


def usable_backends(kind: str, name: str) -> list[str]:
    """The backends that have the component and a policy, and are installed.

    Raises:
      RegistryError: there is none; the message has the command that installs one.
    """
    if kind == "backend":
        return [name]
    components = list(registry())
    written_for = {c.backend for c in components if (c.kind, c.name) == (kind, name)} or {None}
    candidates = [c for c in components if c.kind == "backend" and ({c.name, None} & written_for)]
    usable = [c.name for c in candidates if not c.missing() and _has_policy(c.name)]
    if not usable:
        commands = [c.plugin.install for c in candidates if c.missing() and c.plugin]
        needs = f" Type: {' or '.join(commands)}" if commands else ""
        raise RegistryError(f"The {kind} '{name}' runs on no installed backend.{needs}")
    first = compose.default("backend")
    return sorted(usable, key=lambda backend: (backend != first, backend))


def _has_policy(backend: str) -> bool:
    return any(c.kind == "policy" and c.backend in (backend, None) for c in registry())


ON_THE_HOST = ("environment", "engine")
"""Kinds that are checked once, on one backend: most environments use none, and an engine has a precision of its own."""


def known_precisions(kind: str, name: str, backend: str) -> Sequence[str | None]:
    """The precisions of the backend's configuration; [None] if it has no such key.

    Raises:
      RegistryError: the backend does not exist, lacks the component, or is not installed.
    """
    if kind != "backend":
        registry().find(kind, name, backend)
    config = registry().resolve("backend", backend, backend).Config
    offered = typing.get_args(typing.get_type_hints(config).get("precision"))
    return [precision for precision in PRECISIONS if precision in offered] or [None]


def check_overrides(overrides: Iterable[str]) -> None:
    """
    Raises:
      ConfigError: an override is not one that a check reads.
    """
    for override in overrides:
        group, dot, key = override.partition("=")[0].partition(".")
        if group not in KINDS or not key or "=" not in override:
            raise ConfigError(
                f"'{override}' is not a setting of a check.{did_you_mean(group, KINDS)} Write group.key=value with a group of "
                f"{', '.join(KINDS)}: algorithm.kl_coef=0.1, say."
            )


# ------------------------------------------------------------------------------------------------------------- in words


def line(outcome: Outcome, verbose: bool = False, again: bool = False) -> str:
    """'  ✓ name', followed by the reason or the failure. ``again``: an earlier check raised the same error."""
    head = f"  {MARKS[outcome.status]} {outcome.check.name}"
    if again:
        return f"{head}: the same error"
    if outcome.status == "inapplicable":
        return f"{head}: {outcome.detail}"
    if outcome.status == "failed":
        return "\n".join([head, *(f"      {each}" for each in explain(outcome, verbose))])
    return head


def explain(outcome: Outcome, verbose: bool = False) -> list[str]:
    """The lines of a failure: the property, the numbers, and what they usually mean. After an unexpected error, the last is left
    out, and ``verbose`` adds the traceback."""
    told = [outcome.check.property, f"found: {outcome.detail}"]
    if outcome.traceback:  # unexpected, so ``usually`` is not about it
        return told + (outcome.traceback.splitlines() if verbose else [])
    return [*told, f"usually: {outcome.check.usually}"]


def summary(name: str, where: Sequence[Place], found: Sequence[Outcome]) -> str:
    """The last line: a check counts as failed if it failed anywhere, as inapplicable if it applied nowhere."""
    by_check: dict[str, set[str]] = {}
    for outcome in found:
        by_check.setdefault(outcome.check.name, set()).add(outcome.status)
    failed = [check for check, statuses in by_check.items() if "failed" in statuses]
    inapplicable = [check for check, statuses in by_check.items() if statuses == {"inapplicable"}]
    precisions = list(dict.fromkeys(place.precision for place in where if place.precision))
    on = ", ".join(filter(None, [_and(dict.fromkeys(place.backend for place in where)), _and(precisions)]))
    passed = len(by_check) - len(failed) - len(inapplicable)
    counts = f"{passed} {'check' if passed == 1 else 'checks'} passed"
    if inapplicable:
        counts += f", {len(inapplicable)} {'does' if len(inapplicable) == 1 else 'do'} not apply"
    if failed:
        return f"{name} does not conform on {on}: {len(failed)} failed ({', '.join(failed)}), {counts}"
    return f"{name} conforms on {on}: {counts}"


def _and(words: Iterable[str]) -> str:
    *rest, last = list(words) or [""]
    return f"{', '.join(rest)} and {last}" if rest else last


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
