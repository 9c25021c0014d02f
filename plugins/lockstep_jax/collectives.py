"""The collectives in the text of a compiled program, each counted as often as the loops around it run."""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from lockstep.planning.calls import SENT, Traffic, traffic

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
CALLED = re.compile(r"\b(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
DEVICES = re.compile(r"num_partitions=(\d+)")
BOUND = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(SENT)})(-start)?\(")
ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z0-9]*\[([\d,]*)\]")


def collectives(text: str, loop: int) -> tuple[Traffic, ...]:
    """All collectives of a program, one entry for each kind and group.

    Args:
      loop: how often a loop runs if the text does not say.
    """
    program = Program(text, loop)
    return program.within(program.entry)


class Program:
    """A program's computations by name, as lines of text. On a CPU, the line of a loop says how often it runs; on a TPU, it runs
    up to the number in its condition."""

    def __init__(self, text: str, loop: int):
        self.loop, self.entry = loop, ""
        self.devices = max(map(int, DEVICES.findall(text.partition("\n")[0])), default=1)
        self.lines: dict[str, list[str]] = {}
        for line in text.splitlines():
            if header := COMPUTATION.match(line):
                inside = self.lines.setdefault(header[1], [])
                self.entry = header[1] if line.startswith("ENTRY") else self.entry
            elif self.lines:
                inside.append(line)
        self.within = functools.cache(self._within)

    def _within(self, name: str) -> tuple[Traffic, ...]:
        """The collectives of a computation and of the computations that it calls."""
        found: list[Traffic] = []
        for line in self.lines.get(name, ()):
            if one := collective(line, self.devices):
                found.append(one)
                continue
            called = CALLED.findall(line)
            called += [("", each.strip(" %")) for branches in BRANCHES.findall(line) for each in branches.split(",")]
            for role, other in called:
                times = self.trips(line) if role in ("body", "condition") else 1
                found += [times_over(each, times) for each in self.within(other)]
        return summed(found)

    def trips(self, line: str) -> int:
        """How often the loop of this line runs."""
        if known := TRIPS.search(line):
            return int(known[1])
        (condition,) = (name for role, name in CALLED.findall(line) if role == "condition")
        return max((int(each) for part in (line, *self.reached(condition)) for each in BOUND.findall(part)), default=self.loop)

    def reached(self, name: str) -> list[str]:
        """The lines of a computation and of the computations that it calls."""
        own = self.lines.get(name, [])
        return own + [line for each in own for _, other in CALLED.findall(each) for line in self.reached(other)]


def collective(line: str, devices: int) -> Traffic | None:
    """The collective in a line of a program for ``devices`` devices; None if there is none."""
    found = COLLECTIVE.search(line)
    if found is None:
        return None
    result, kind, begins = found.groups()
    members, stride = group(line, devices)
    if members == 1:
        return None
    size = sum(map(array_bytes, ARRAY.findall(result)))
    if begins and kind in ("all-gather", "collective-permute"):  # the result starts with the operand
        size = size * members / (members + 1) if kind == "all-gather" else size / 2
    if kind == "reduce-scatter":
        size *= members
    return traffic(kind, 1, size, members, stride)


def array_bytes(array: tuple[str, str, str]) -> float:
    """The size of a type in the text of a program: ('f', '32', '8,128')."""
    _, bits, shape = array
    return int(bits or 8) / 8 * math.prod(int(size) for size in shape.split(",") if size)


def group(line: str, devices: int) -> tuple[int, int]:
    """The size of the first group of devices that a line names, and the stride of their numbers. A line names groups as empty
    braces (all devices), in braces, as the pairs of a permutation, as a reshaped range [groups, members]<=[sizes]T(order), or as
    axes of a mesh."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", line):
        apart = [abs(int(a) - int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
        return (2, min(each for each in apart if each)) if any(apart) else (1, 1)
    if "replica_groups={}" in line:
        return devices, 1
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        first = np.array(listed[1].split(","), int)
    elif reshaped := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        groups, sizes, order = ([int(each) for each in part.split(",")] if part else None for part in reshaped.groups())
        assert groups and sizes
        first = np.arange(math.prod(sizes)).reshape(sizes).transpose(order or range(len(sizes))).reshape(groups)[0]
    elif axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        shape = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes[1])}
        named = re.findall(r"'(\w+)'", axes[2])
        places = np.arange(math.prod(shape.values())).reshape(tuple(shape.values()))
        first = places[tuple(slice(None) if name in named else 0 for name in shape)].reshape(-1)
    else:
        raise ValueError(f"a collective names its devices in a way that is not known: {line[:500]}")
    return len(first), int(first[1] - first[0]) if len(first) > 1 else 1


def times_over(one: Traffic, times: int) -> Traffic:
    return Traffic(one.kind, times * one.count, times * one.sent, one.members, one.stride)


def summed(found: Iterable[Traffic]) -> tuple[Traffic, ...]:
    """Add up entries of the same kind and group."""
    totals: defaultdict[tuple[str, int, int], list[float]] = defaultdict(lambda: [0, 0.0])
    for each in found:
        total = totals[each.kind, each.members, each.stride]
        total[0] += each.count
        total[1] += each.sent
    return tuple(
        Traffic(kind, int(count), sent, members, stride) for (kind, members, stride), (count, sent) in sorted(totals.items())
    )
