"""Dialogues in a row: messages, HH transcripts, histories and system messages become one prompt and its completions.

No column is dropped silently. A row is a `BadRow` if it uses a column that cannot be read and that changes its meaning
(`OF_A_ROW`, `OF_A_MESSAGE`).
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.data.cells import BadRow, Columns, LeftOut, cell, from_json, list_in, not_empty, says_nothing, text_in
from lockstep.errors import listing
from lockstep.types import Message, Prompt, Role, ToolCall

ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""Roles by their names in message lists, in ShareGPT and, capitalised, in HH."""


_COMPLETION = "text or a list of one message"

OF_A_ROW = frozenset({"functions", "images", "image", "videos", "video", "audios", "audio", "chat_template_kwargs"})
OF_A_MESSAGE = OF_A_ROW | {
    "function_call", "reasoning_content", "reasoning", "thinking", "weight", "train", "training"
}  # fmt: skip
"""Columns of a row, and keys of a message, that nothing here reads although they change its meaning."""


@dataclass(frozen=True)
class Answered:
    """Everything that a row can contain: a prompt, its completions (none, one or K) and their ranks, 0 the best. ``dialogue``:
    the row is a whole dialogue with earlier assistant turns. ``calls``: the tool calls of its one completion."""

    prompt: Prompt
    completions: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    labeler: str | None = None
    dialogue: bool = False
    calls: tuple[ToolCall, ...] = ()


def refuse_unreadable(keys: Columns, names: frozenset[str], where: str) -> None:
    """
    Raises:
      BadRow: one of the keys ``names`` has a value, which nothing here reads although it changes the meaning.
    """
    for name in sorted(names.intersection(keys)):
        trains = name in ("weight", "train", "training") and keys[name] == 1
        if not trains and not says_nothing(keys[name]):
            raise BadRow(
                f"a column '{name}', which cannot be read",
                f"{where} has a value there, and without it the row means something else. To use the row without it, remove the "
                f"column, or add ignore: [{name}] to its source.",
            )


def without(row: Any, ignored: Sequence[str]) -> Any:
    """The row, and each message in it, without the columns ``ignored``."""
    if not ignored or not isinstance(row, Mapping):
        return row
    bare = lambda value: [without(each, ignored) for each in value] if isinstance(value, (list, tuple)) else value  # noqa: E731
    return {name: bare(value) for name, value in row.items() if name not in ignored}


def _messages(values: Sequence[Any], where: str) -> tuple[Message, ...]:
    """Messages from [{role, content}, ...] or ShareGPT's [{from, value}, ...]."""
    return tuple(_message(value, f"{where}[{i}]") for i, value in enumerate(values))


def _message(value: Any, where: str) -> Message:
    for role, content in (("role", "content"), ("from", "value")):
        if isinstance(value, Mapping) and role in value and content in value:
            break
    else:
        raise BadRow("a malformed message", f"'{where}' should have 'role' and 'content', or 'from' and 'value'.")
    if value[role] not in list(ROLES):
        raise BadRow("an unknown role", f"'{where}' is by {reprlib.repr(value[role])}. Roles: {listing(ROLES)}.")
    refuse_unreadable(value, OF_A_MESSAGE, f"'{where}'")
    calls = _calls(value.get("tool_calls"), where) if ROLES[value[role]] == "assistant" else ()
    text = "" if calls and value[content] is None else value[content]
    if not isinstance(text, str) or not (text.strip() or calls):
        raise BadRow("an empty message", f"'{where}' should have text in '{content}', not {reprlib.repr(value[content])}.")
    return Message(ROLES[value[role]], text, calls)


def _calls(value: Any, where: str) -> tuple[ToolCall, ...]:
    """Tool calls: OpenAI's and transformers' {"function": {"name", "arguments"}} each, or only the inner object. The arguments
    may be JSON text."""
    if says_nothing(value):
        return ()
    found = []
    for i, each in enumerate(value if isinstance(value, (list, tuple)) else [value]):
        call = each.get("function", each) if isinstance(each, Mapping) else None
        arguments = from_json(call.get("arguments")) if isinstance(call, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or not isinstance(arguments, Mapping):
            raise BadRow(
                "a malformed tool call", f"'{where}.tool_calls[{i}]' should have 'name' and 'arguments', a group of keys."
            )
        found.append(ToolCall(call["name"], arguments))
    return tuple(found)


def _tools(row: Columns) -> tuple[Mapping[str, Any], ...]:
    """The JSON schemas of a row's tools, as transformers' chat templates take them; the list may be JSON text."""
    if says_nothing(row.get("tools")):
        return ()
    tools = from_json(row["tools"])
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("a wrong type", f"'tools' should be a list of JSON schemas, not {reprlib.repr(row['tools'])}.")
    return tuple(tools)


_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def is_hh(text: Any) -> bool:
    """True for a transcript in the form of Anthropic's hh-rlhf: '\\n\\nHuman: ...\\n\\nAssistant: ...'. Without the empty line
    before it, 'Human:' may simply begin a sentence, so there must also be an 'Assistant:'."""
    return isinstance(text, str) and re.match(r"\s*\n\nHuman:|\s*Human:(?=.*\n\nAssistant:)", text, re.DOTALL) is not None


def _hh_messages(text: str) -> tuple[Message, ...]:
    """The turns of a transcript, without the white space around them. The transcripts were made by splitting and joining text,
    which broke a few in a thousand: hence `LeftOut`."""
    _, *parts = _HH_TURN.split(text.strip())
    turns = tuple(Message(ROLES[name.lower()], content.strip()) for name, content in zip(parts[::2], parts[1::2], strict=True))
    if not all(turn.content for turn in turns):
        raise LeftOut("transcripts with an empty turn")
    return turns


def whole_dialogue(row: Columns, name: str) -> tuple[Message, ...]:
    """A whole dialogue: messages, or an HH transcript."""
    value = cell(row, name, (str, list, tuple), "an HH transcript or a list of messages")
    if is_hh(value):
        return _hh_messages(value)
    if isinstance(value, str):
        raise BadRow(
            "text without a prompt",
            f"'{name}' should be a transcript that begins with 'Human:' or a list of messages, or come with a column 'prompt'.",
        )
    return _messages(list_in(row, name, "messages"), name)


def split_dialogue(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], Message]:
    """The messages before the last, and the last, which is the response. Earlier answers stay in the prompt."""
    *before, last = messages
    if last.role != "assistant":
        raise LeftOut("dialogues that do not end with the assistant")
    if not before or before[-1].role == "assistant":
        raise LeftOut("dialogues whose last answer has nothing to answer")
    return tuple(before), last


def prompt_from(row: Columns, messages: tuple[Message, ...]) -> Prompt:
    """A prompt from the messages, with the history, system message, truth and tools of the row's other columns."""
    messages = _with_system(row, _with_history(row, messages))
    if messages[-1].role == "assistant":
        raise BadRow("a prompt that is answered", "the last message of a prompt should not be the assistant's.")
    return Prompt(messages, truth_in(row), _tools(row))


def truth_in(row: Columns) -> Mapping[str, Any]:
    return {} if row.get("truth") is None else cell(row, "truth", Mapping, "a group of keys")


def _with_history(row: Columns, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages after the earlier turns in ``history``: [[question, answer], ...], as LLaMA-Factory has them."""
    if says_nothing(row.get("history")):
        return messages
    pairs = list_in(row, "history", "pairs of a question and an answer")
    if len([message for message in messages if message.role != "system"]) > 1:
        raise BadRow("a history beside a dialogue", "'history' should come with one question, not with a dialogue.")
    turns = []
    for i, pair in enumerate(pairs):
        texts = [text for text in pair if isinstance(text, str) and text.strip()] if isinstance(pair, (list, tuple)) else []
        if len(texts) != 2 or len(pair) != 2:
            raise BadRow("a malformed history", f"'history[{i}]' should be a question and its answer, not {reprlib.repr(pair)}.")
        turns += [Message("user", texts[0]), Message("assistant", texts[1])]
    system = [message for message in messages if message.role == "system"]
    return (*system, *turns, *messages[len(system) :])


def _with_system(row: Columns, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages after the system message in ``system`` or ``system_prompt``, unless the dialogue has it already."""
    texts = {text_in(row, name) for name in ("system", "system_prompt") if not says_nothing(row.get(name))}
    if messages[0].role == "system":
        texts.add(messages[0].content)
        messages = messages[1:]
    if len(texts) > 1:
        raise BadRow("two system messages", f"they differ: {' and '.join(sorted(map(reprlib.repr, texts)))}.")
    return (*(Message("system", text) for text in texts), *messages)


def prompt_column(row: Columns, name: str = "prompt") -> Prompt:
    """The prompt in a column. Text is one user message, unless it is an HH transcript, which may end with an open 'Assistant:'.
    RealToxicityPrompts (Gehman et al. 2020, arXiv 2009.11462) has the text in a group, beside its toxicity."""
    value = cell(row, name, (str, list, tuple, Mapping), "text or a list of messages")
    if isinstance(value, Mapping):
        return prompt_from(row, (Message("user", text_in(value, "text")),))
    if is_hh(value):
        return prompt_from(row, _hh_messages(re.sub(r"\n\nAssistant:\s*$", "", value)))
    if isinstance(value, str):
        return prompt_from(row, (Message("user", text_in(row, name)),))
    return prompt_from(row, _messages(list_in(row, name, "messages"), name))


def _completion(value: Any, where: str) -> str:
    """A completion from text, or from a list of one assistant message."""
    if isinstance(value, str):
        return not_empty(value, where)
    if not isinstance(value, (list, tuple)):
        raise BadRow("a wrong type", f"'{where}' should be {_COMPLETION}, not {type(value).__name__}.")
    messages = _messages(value, where)
    if [message.role for message in messages] != ["assistant"]:
        raise BadRow("a malformed completion", f"'{where}' should be {_COMPLETION}, the assistant's.")
    return only_text(messages[0], where)


def only_text(message: Message, where: str) -> str:
    if message.calls:
        raise BadRow("a tool call that is compared", f"'{where}' calls a tool: write the call as text, as the policy does.")
    return message.content


def with_completions(row: Columns, completions: Mapping[str, Any], ranks: tuple[int, ...]) -> Answered:
    """A prompt and its completions, keyed by their places in the row. With an HH prompt, completions are stripped of white
    space, as in a whole transcript."""
    prompt = prompt_column(row)
    texts = tuple(_completion(value, where) for where, value in completions.items())
    if is_hh(row["prompt"]):
        texts = tuple(text.strip() for text in texts)
    return Answered(prompt, texts, ranks, labeler_in(row))


def with_completion_columns(row: Columns, *names: str) -> Answered:
    """A prompt and one completion in each of the columns ``names``, best first."""
    completions = {name: cell(row, name, (str, list, tuple), _COMPLETION) for name in names}
    return with_completions(row, completions, tuple(range(len(names))))


def labeler_in(row: Columns) -> str | None:
    return None if row.get("labeler") is None else str(row["labeler"])
