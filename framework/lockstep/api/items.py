"""Reads the nouns of RLHF from plain Python: strings, tuples, messages, and rows with the columns of docs/data.md."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lockstep.data.cells import BadRow, LeftOut, without_fill
from lockstep.data.columns import reader, unread
from lockstep.errors import DataError
from lockstep.types import Comparison, Demonstration, Message, Prompt

log = logging.getLogger("lockstep")

FORMS = {
    "prompts": "text, or a dialogue: a list of messages {'role': ..., 'content': ...}",
    "demonstrations": "a pair (prompt, response)",
    "comparisons": "(prompt, chosen, rejected) or (prompt, completions, ranks), where rank 0 is best",
    "texts": "text",
}
NOUNS: Mapping[str, tuple[type, ...]] = {
    "prompts": (Prompt,),
    "demonstrations": (Demonstration,),
    "comparisons": (Comparison,),
    "texts": (),
}


def read(noun: str, items: Iterable[Any]) -> list[Any]:
    """Read each item as a ``noun``. An item is one of its `FORMS`, a mapping with columns that docs/data.md understands, or the
    noun itself. Items that valid data may have but that cannot be used, such as ties, are left out and counted in the log.

    Raises:
      DataError: an item is none of these, or nothing is left.
    """
    if isinstance(items, (str, Mapping)):
        raise DataError(f"{noun} should be a list, each item {FORMS[noun]}; not {type(items).__name__}.")
    if type(items).__module__.partition(".")[0] == "datasets":
        items = map(without_fill, items)
    found, left_out, beside = [], dict[str, int](), dict[str, None]()
    for number, item in enumerate(items):
        if isinstance(item, Mapping):
            beside |= dict.fromkeys(unread(noun, item, list(item)))
        try:
            found.append(_read(noun, item, f"{noun}[{number}]"))
        except BadRow as error:
            raise DataError(f"{noun}[{number}]: {error} Each item should be {FORMS[noun]}.") from error
        except LeftOut as why:
            left_out[str(why)] = left_out.get(str(why), 0) + 1
    if beside:
        log.warning("%s: columns that are not read: %s", noun, ", ".join(beside))
    for reason, count in left_out.items():
        log.warning("%s: %d left out: %s", noun, count, reason)
    if not found:
        raise DataError(f"There are no {noun} to use. Give at least one: {FORMS[noun]}.")
    return found


def _read(noun: str, item: Any, place: str) -> Any:
    if isinstance(item, NOUNS[noun]):
        return item
    row = item if isinstance(item, Mapping) else _row(noun, item, place)
    return reader(noun, row, place)(row)


def _row(noun: str, item: Any, place: str) -> Mapping[str, Any]:
    """The item as a row with named columns."""
    match noun, item:
        case "texts", str():
            return {"text": item}
        case "prompts", str() | [Mapping() | Message(), *_]:
            return _asked(item)
        case "demonstrations", [prompt, str() as response]:
            return _asked(prompt) | {"response": response}
        case "comparisons", [prompt, str() as chosen, str() as rejected]:
            return _asked(prompt) | {"chosen": chosen, "rejected": rejected}
        case "comparisons", [prompt, completions, ranks]:
            return _asked(prompt) | {"completions": completions, "ranks": ranks}
    raise DataError(f"{place} should be {FORMS[noun]}; not {item!r}.")


def _asked(prompt: Any) -> dict[str, Any]:
    """The columns of a prompt: text as it is, messages as mappings with their tool calls; and what else a `Prompt` has."""
    if isinstance(prompt, Prompt):
        more = {"tools": list(prompt.tools) or None, "truth": dict(prompt.truth) or None}
        return _asked(prompt.messages) | {name: value for name, value in more.items() if value is not None}
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        return {"prompt": [_plain(m) if isinstance(m, Message) else m for m in prompt]}
    return {"prompt": prompt}


def _plain(message: Message) -> dict[str, Any]:
    calls = [{"name": call.name, "arguments": dict(call.arguments)} for call in message.calls]
    return {"role": message.role, "content": message.content} | ({"tool_calls": calls} if calls else {})


def prompt(item: Any) -> Prompt:
    """One item as a prompt."""
    found: Prompt
    (found,) = read("prompts", [item])
    return found
