"""Hostile values, trees of JSON or YAML with some of their nodes replaced, and damaged bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

GONE = "(gone)"
"""In place of a value: the key is removed."""

NUMBERS = (
    0, 1, -1, 2, 3, 7, 0.5, -0.5, 1.5, 2**31, -(2**31), 2**63, 10**7, 10**30, 1e-320, 1e308, -1e308,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
TEXTS = (
    "", " ", "a", "0", "1e3", "nan", "null", "true", "???", "%s", "{0}", "{", "[", "'", '"', "\\", "=", "\n",
    "x" * 300, "x" * 100_000, "${seed}", "${nope}", "${nope:1}", "${", "{{ x }}", "{% for", "<|pad|>",
    ".", "..", "../x", "a/b", "a/b/c", "/", "~", "~nobody", "nope.jsonl", "nope.jinja", "nope.gguf", "owner/name",
    "a:b", "math:pi", "nope:nope", "os:getcwd",
    "naïve", "数字", "\x00", "\x1b[31mred", "[red]", "[/]", ":ok:", "\u2028", "\ud800",
)  # fmt: skip

scalars = st.one_of(st.none(), st.booleans(), *2 * [st.sampled_from(NUMBERS), st.sampled_from(TEXTS)], st.text(max_size=8))
keys = st.sampled_from(("name", "path", "a", "", "0", "\x1b[1m", "naïve")) | st.text(max_size=4)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=5)

Path = tuple[Any, ...]
Edits = tuple[tuple[Path, Any], ...]


def paths(tree: Any, place: Path = ()) -> Iterator[Path]:
    """Of every node but the root."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*place, key)
        yield from paths(value, (*place, key))


def edits(tree: Any, more: st.SearchStrategy[Any] = values) -> st.SearchStrategy[Edits]:
    """One or two nodes of a tree with another value each, or removed, and keys that nobody knows. ``more``: values that are
    hostile here."""
    found = list(paths(tree))
    groups = [(), *(path for path in found if isinstance(at(tree, path), dict))]
    new = st.builds(
        lambda group, key: (*group, key),
        st.sampled_from(groups),
        st.sampled_from(("nope", "", "naïve", "a.b", "\x1b[1m", 7, "x" * 9000)),
    )
    place = st.sampled_from(found)
    one = st.tuples(place, scalars | values | more) | st.tuples(place, st.just(GONE)) | st.tuples(new, values)
    return st.lists(one, min_size=1, max_size=2).map(tuple)


def edited(tree: Any, changes: Edits) -> Any:
    """A copy with these changes. One whose place an earlier one removed is left out."""
    tree = copy.deepcopy(tree)
    for (*path, last), value in changes:
        try:
            parent = at(tree, tuple(path))
            if value == GONE:
                del parent[last]
            elif not isinstance(parent, str):
                parent[last] = copy.deepcopy(value)
        except (KeyError, IndexError, TypeError):
            continue
    return tree


def at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


# -------------------------------------------------------------------------------------------------------------- bytes

Damage = tuple[str, Any, Any]

_NOISE = st.binary(max_size=16) | st.sampled_from(
    (
        b"\x00" * 64,
        b"\xff" * 64,
        b"\xed\xa0\x80",
        b"\r",
        "\u2028".encode(),
        b"{",
        b"}",
        b'"',
        b"\\ud800",
        b"[" * 9000,
        b"1" * 6000,
        b"1e999",
    )
)
_PLACE = st.floats(0, 1) | st.sampled_from((0.0, 1.0))
damages: st.SearchStrategy[Damage] = st.one_of(
    st.tuples(st.just("cut"), _PLACE, st.none()),
    st.tuples(st.just("over"), _PLACE, _NOISE),
    st.tuples(st.just("insert"), _PLACE, _NOISE),
    st.tuples(st.just("whole"), st.none(), _NOISE | st.sampled_from((b"", b"null", b"[]", b"{}", b"0", b'""', b"NaN"))),
)
"""What happens to a file's bytes, at which part of its length, with which bytes."""


def damaged(content: bytes, damage: Damage) -> bytes:
    what, place, noise = damage
    if what == "whole":
        return noise
    at = round(place * len(content))
    return content[:at] if what == "cut" else content[:at] + noise + content[at + len(noise) * (what == "over") :]
