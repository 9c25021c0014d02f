"""Turn rows in the formats people already have into the nouns. ``CONVENTIONS`` is the table; ``docs/data.md`` has a row of each.

A row can be unusable in two ways. `BadRow` is a mistake that the user should know about, so by default it ends the run.
`LeftOut` occurs in good data too (a tie, a transcript that breaks off): such rows are left out and counted.

No column is dropped silently. A row is a `BadRow` if it uses a column that cannot be read and that changes its meaning
(`OF_A_ROW`, `OF_A_MESSAGE`). `unread` names the other unread columns, once per source.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lockstep.data import choices
from lockstep.data.cells import (
    MOST_CHARACTERS,
    BadRow,
    Columns,
    LeftOut,
    cell,
    from_json,
    list_in,
    not_empty,
    says_nothing,
    text_in,
    too_long,
)  # fmt: skip
from lockstep.errors import DataError, listing
from lockstep.types import Choice, Comparison, Demonstration, Goal, Message, Prompt, Role, ToolCall

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


# ------------------------------------------------------------------------------------------- columns, messages, text


def _refuse_meaningful(keys: Columns, names: frozenset[str], where: str) -> None:
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
    _refuse_meaningful(value, OF_A_MESSAGE, f"'{where}'")
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


def _is_hh(text: Any) -> bool:
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


def _dialogue(row: Columns, name: str) -> tuple[Message, ...]:
    """A whole dialogue: messages, or an HH transcript."""
    value = cell(row, name, (str, list, tuple), "an HH transcript or a list of messages")
    if _is_hh(value):
        return _hh_messages(value)
    if isinstance(value, str):
        raise BadRow(
            "text without a prompt",
            f"'{name}' should be a transcript that begins with 'Human:' or a list of messages, or come with a column 'prompt'.",
        )
    return _messages(list_in(row, name, "messages"), name)


def _split_dialogue(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], Message]:
    """The messages before the last, and the last, which is the response. Earlier answers stay in the prompt."""
    *before, last = messages
    if last.role != "assistant":
        raise LeftOut("dialogues that do not end with the assistant")
    if not before or before[-1].role == "assistant":
        raise LeftOut("dialogues whose last answer has nothing to answer")
    return tuple(before), last


def _prompt(row: Columns, messages: tuple[Message, ...]) -> Prompt:
    """A prompt from the messages, with the history, system message, truth and tools of the row's other columns."""
    messages = _with_system(row, _with_history(row, messages))
    if messages[-1].role == "assistant":
        raise BadRow("a prompt that is answered", "the last message of a prompt should not be the assistant's.")
    return Prompt(messages, _truth(row), _tools(row))


def _truth(row: Columns) -> Mapping[str, Any]:
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


def _prompt_column(row: Columns, name: str = "prompt") -> Prompt:
    """The prompt in a column. Text is one user message, unless it is an HH transcript, which may end with an open 'Assistant:'.
    RealToxicityPrompts (Gehman et al. 2020, arXiv 2009.11462) has the text in a group, beside its toxicity."""
    value = cell(row, name, (str, list, tuple, Mapping), "text or a list of messages")
    if isinstance(value, Mapping):
        return _prompt(row, (Message("user", text_in(value, "text")),))
    if _is_hh(value):
        return _prompt(row, _hh_messages(re.sub(r"\n\nAssistant:\s*$", "", value)))
    if isinstance(value, str):
        return _prompt(row, (Message("user", text_in(row, name)),))
    return _prompt(row, _messages(list_in(row, name, "messages"), name))


def _completion(value: Any, where: str) -> str:
    """A completion from text, or from a list of one assistant message."""
    if isinstance(value, str):
        return not_empty(value, where)
    if not isinstance(value, (list, tuple)):
        raise BadRow("a wrong type", f"'{where}' should be {_COMPLETION}, not {type(value).__name__}.")
    messages = _messages(value, where)
    if [message.role for message in messages] != ["assistant"]:
        raise BadRow("a malformed completion", f"'{where}' should be {_COMPLETION}, the assistant's.")
    return _only_text(messages[0], where)


def _only_text(message: Message, where: str) -> str:
    if message.calls:
        raise BadRow("a tool call that is compared", f"'{where}' calls a tool: write the call as text, as the policy does.")
    return message.content


def _answered(row: Columns, completions: Mapping[str, Any], ranks: tuple[int, ...]) -> Answered:
    """A prompt and its completions, keyed by their places in the row. With an HH prompt, completions are stripped of white
    space, as in a whole transcript."""
    prompt = _prompt_column(row)
    texts = tuple(_completion(value, where) for where, value in completions.items())
    if _is_hh(row["prompt"]):
        texts = tuple(text.strip() for text in texts)
    return Answered(prompt, texts, ranks, _labeler(row))


def _answers_in(row: Columns, *names: str) -> Answered:
    """A prompt and one completion in each of the columns ``names``, best first."""
    completions = {name: cell(row, name, (str, list, tuple), _COMPLETION) for name in names}
    return _answered(row, completions, tuple(range(len(names))))


def _labeler(row: Columns) -> str | None:
    return None if row.get("labeler") is None else str(row["labeler"])


# --------------------------------------------------------------------------------------------------------- conventions


def _dialogue_in(name: str) -> Callable[[Columns], Answered]:
    """A reader of dialogues in a column. A dialogue that ends with the user is a prompt; a noun that needs a response reports
    that it is missing."""

    def read(row: Columns) -> Answered:
        messages = _dialogue(row, name)
        if messages[-1].role != "assistant":
            return Answered(_prompt(row, messages))
        before, response = _split_dialogue(messages)
        answered = any(message.role == "assistant" for message in before)
        return Answered(_prompt(row, before), (response.content,), (0,), dialogue=answered, calls=response.calls)

    return read


def _instruction(row: Columns) -> Answered:
    """Alpaca's columns: 'input' (Dolly's 'context') is what the instruction is about; it may be empty."""
    about = [cell(row, name, str, "text") for name in ("input", "context") if row.get(name)]
    text = "\n\n".join([text_in(row, "instruction"), *about])
    prompt = _prompt(row, (Message("user", text),))
    answers = (text_in(row, "output"),) if "output" in row else ()
    return Answered(prompt, answers, (0,) * len(answers), dialogue=bool(row.get("history")))


def _pair(row: Columns) -> Answered:
    """Two completions beside a prompt, or two whole dialogues that agree until the last answer. Whole dialogues contain their
    prompt, so a column 'prompt' beside them (UltraFeedback) is not read."""
    names = ("chosen", "rejected")
    if row.get("prompt") is None or all(_is_whole(row.get(name)) for name in names):
        (before, chosen), (other, rejected) = (_split_dialogue(_dialogue(row, name)) for name in names)
        if before != other:
            raise LeftOut("pairs that differ before the last answer")
        texts = _only_text(chosen, "chosen"), _only_text(rejected, "rejected")
        return Answered(_prompt(row, before), texts, (0, 1), _labeler(row))
    return _answers_in(row, *names)


def _is_whole(value: Any) -> bool:
    return _is_hh(value) or (isinstance(value, (list, tuple)) and len(value) > 1)


def _ranked_by(name: str, best: Callable[[float], float]) -> Callable[[Columns], Answered]:
    """A reader of K completions with their numbers in the column ``name``; the lowest ``best(number)`` is the best."""

    def read(row: Columns) -> Answered:
        texts = {f"completions[{i}]": text for i, text in enumerate(list_in(row, "completions", "completions"))}
        numbers = list_in(row, name, "numbers")
        if len(numbers) != len(texts) or len(texts) < 2:
            raise BadRow(
                f"{name} that do not fit the completions",
                f"two or more completions and as many {name} are needed, not {len(texts)} and {len(numbers)}.",
            )
        return _answered(row, texts, _ranks(numbers, best, name))

    return read


def _ranks(numbers: Sequence[Any], best: Callable[[float], float], name: str) -> tuple[int, ...]:
    """The ranks of numbers: the lowest ``best(number)`` is the best, and equal ones tie."""
    if not all(isinstance(n, int) and not isinstance(n, bool) or isinstance(n, float) and math.isfinite(n) for n in numbers):
        raise BadRow("a wrong type", f"'{name}' should be numbers, not {reprlib.repr(numbers)}.")
    order = sorted({best(n) for n in numbers})
    return tuple(order.index(best(n)) for n in numbers)


def _ultrafeedback(row: Columns) -> Answered:
    """openbmb/UltraFeedback: an instruction and completions by (mostly four) models, each with GPT-4's overall score. A few
    instructions have fewer than two completions."""
    prompt = _prompt(row, (Message("user", text_in(row, "instruction")),))
    completions = cell(row, "completions", (list, tuple), "a list of completions")
    if len(completions) < 2:
        raise LeftOut("instructions with fewer than two completions")
    texts, scores = [], []
    for i, completion in enumerate(completions):
        if not isinstance(completion, Mapping):
            raise BadRow("a malformed completion", f"'completions[{i}]' should have 'response' and 'overall_score'.")
        score = cell(completion, "overall_score", (int, float), "a number")
        texts.append(cell(completion, "response", str, "text"))
        scores.append(score)
    if not all(text.strip() for text in texts):
        raise LeftOut("instructions with an empty completion")
    return Answered(prompt, tuple(texts), _ranks(scores, lambda score: -score, "overall_score"))


TLDR = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
CNN_DM = "Article:\n{article}\n\nTL;DR:\n"
"""Stiennon et al. 2020's prompts for a summary (openai/summarize-from-feedback), verbatim."""


def _summary_prompt(row: Columns, about: Mapping[str, Any]) -> Prompt:
    """The prompt for a Reddit post or a news article."""
    if about.get("post") is None and about.get("article") is not None:
        text = CNN_DM.format(article=text_in(about, "article"))
    else:
        text = TLDR.format(**{name: cell(about, name, str, "text") for name in ("subreddit", "title", "post")})
    return _prompt(row, (Message("user", text),))


def _reddit_summary(row: Columns) -> Answered:
    """The filtered TL;DR posts with their authors' summaries, set off from 'TL;DR:' by a space as in the comparisons."""
    return Answered(_summary_prompt(row, row), (" " + text_in(row, "summary").lstrip(),), (0,))


def _summaries(row: Columns) -> Answered:
    """openai/summarize_from_feedback, 'comparisons': two summaries, and the place of the better one."""
    summaries = list_in(row, "summaries", "groups with 'text'")
    if not all(isinstance(summary, Mapping) for summary in summaries):
        raise BadRow("a wrong type", f"'summaries' should hold groups with 'text', not {reprlib.repr(summaries)}.")
    texts = [text_in(summary, "text") for summary in summaries]
    choice = cell(row, "choice", int, "a whole number")
    if not 0 <= choice < len(texts):
        raise BadRow("a choice out of range", f"'choice' is {reprlib.repr(choice)}, of {len(texts)} summaries.")
    labeler = None if row.get("worker") is None else str(row["worker"])
    ranks = tuple(int(i != choice) for i in range(len(texts)))
    return Answered(_summary_prompt(row, cell(row, "info", Mapping, "a group of keys")), tuple(texts), ranks, labeler)


def _query(row: Columns) -> Answered:
    """N+'s version of the TL;DR posts: a query, and a reference response that ends in a literal '<|endoftext|>'."""
    response = text_in(row, "reference_response").removesuffix("<|endoftext|>")
    return Answered(_prompt_column(row, "query"), (not_empty(response, "reference_response"),), (0,))


def _goal(row: Columns, name: str) -> Goal:
    """The goal in the column ``name``: AdvBench's 'goal', HarmBench's 'Behavior', or 'task_description' of hh-rlhf's red-team
    attempts (Ganguli et al. 2022, arXiv 2209.07858). HarmBench's behaviours that need a context are left out."""
    if not says_nothing(row.get("ContextString")):
        raise LeftOut("goals with a context")
    text, truth = text_in(row, name), _truth(row)
    twin = None if says_nothing(row.get("twin")) else Goal(text_in(row, "twin"), text_in(row, "twin"), truth)
    return Goal(text, text if says_nothing(row.get("ask")) else text_in(row, "ask"), truth, twin)


@dataclass(frozen=True)
class Convention:
    """A format of rows. ``columns`` must be present; those in ``also`` and `_BESIDES` may be."""

    columns: tuple[str, ...]
    read: Callable[[Columns], Any]
    also: tuple[str, ...] = ()


_BESIDES = ("system", "system_prompt", "history", "labeler", "truth", "tools")
_ALPACA = ("input", "context", "output")

_PAIRS = (
    Convention(("info", "summaries", "choice"), _summaries, ("worker",)),
    Convention(("prompt", "chosen", "rejected"), _pair),
    Convention(("chosen", "rejected"), _pair),
    Convention(("instruction", "completions"), _ultrafeedback),
    Convention(("prompt", "completions", "ranks"), _ranked_by("ranks", lambda rank: rank)),
    Convention(("prompt", "completions", "scores"), _ranked_by("scores", lambda score: -score)),
)
_ANSWERS = (
    Convention(("subreddit", "title", "post", "summary"), _reddit_summary),
    Convention(("query", "reference_response"), _query),
    Convention(("prompt", "completion"), lambda row: _answers_in(row, "completion")),
    Convention(("prompt", "response"), lambda row: _answers_in(row, "response")),
    Convention(("messages",), _dialogue_in("messages")),
    Convention(("conversations",), _dialogue_in("conversations")),
    Convention(("instruction", "output"), _instruction, _ALPACA),
)
_PROMPTS = (
    Convention(("subreddit", "title", "post", "summary"), _reddit_summary),
    Convention(("query", "reference_response"), _query),
    Convention(("info", "summaries", "choice"), _summaries, ("worker",)),
    Convention(("messages",), _dialogue_in("messages")),
    Convention(("conversations",), _dialogue_in("conversations")),
    Convention(("transcript", "task_description"), _dialogue_in("transcript")),
    Convention(("prompt",), lambda row: Answered(_prompt_column(row))),
    Convention(("instruction",), _instruction, _ALPACA),
    Convention(("chosen", "rejected"), _pair),
    Convention(("text",), lambda row: Answered(_prompt_column(row, "text"))),
)
_GOALS = (
    Convention(("goal",), lambda row: _goal(row, "goal"), ("ask", "twin")),
    Convention(("Behavior",), lambda row: _goal(row, "Behavior"), ("ContextString",)),
    Convention(("task_description",), lambda row: _goal(row, "task_description")),
)
WITHOUT_PROMPTS = {"texts": "raw texts", "tests": "tests"}
"""{noun: what errors call it} for nouns without a prompt, which allow neither columns beside a prompt nor columns for rewards."""

CONVENTIONS: Mapping[str, tuple[Convention, ...]] = {
    "demonstrations": _ANSWERS + _PAIRS,
    "comparisons": _PAIRS,
    "prompts": _PROMPTS,
    "texts": (Convention(("text",), lambda row: text_in(row, "text")),),
    "goals": _GOALS,
    "tests": (
        Convention(("context", "options", "answer"), choices.item, ("right", "group")),
        Convention(("sent_more", "sent_less", "bias_type"), choices.crows_pairs),
        Convention(("occupation(0)", "other-participant(1)", "sentence"), choices.winogender),
        Convention(("Question", "Best Answer", "Correct Answers", "Incorrect Answers"), choices.truthfulqa),
    ),
}
"""The conventions of each noun in order of preference: the first whose columns are all present is used."""


# --------------------------------------------------------------------------------------------------------------- nouns


def _demonstration(row: Answered) -> Demonstration:
    """The best completion as a demonstration, so that comparisons can be used too; if several tie, the first."""
    if not row.completions:
        raise BadRow("no response", "the last message should be the assistant's.")
    return Demonstration(row.prompt, row.completions[row.ranks.index(min(row.ranks))], row.dialogue, row.calls)


def _comparison(row: Answered) -> Comparison:
    if len(set(row.completions)) == 1 or len(set(row.ranks)) == 1:
        raise LeftOut("ties")
    return Comparison(row.prompt, row.completions, row.ranks, row.labeler)


_MAKE: Mapping[str, Callable[[Any], Any]] = {
    "demonstrations": _demonstration,
    "comparisons": _comparison,
    "prompts": lambda row: row.prompt,
    "texts": lambda text: text,
    "goals": lambda goal: goal,
    "tests": lambda item: item,
}


def reader(noun: str, first: Any, place: str, named: Sequence[str] = ()) -> Callable[[Any], Any]:
    """The function that makes this noun from each row of a source, chosen by the columns of its first row. The columns ``named``
    go into the prompt's ``truth``.

    Raises:
      DataError: the first row has no columns, or they fit no convention; the message lists the conventions.
    """
    if not isinstance(first, Mapping):
        raise DataError(f"{place}: {_no_object(first)}")
    convention = _convention(noun, first)
    if convention is None:
        known = "; ".join(" + ".join(convention.columns) for convention in CONVENTIONS[noun])
        raise DataError(
            f"{place}: no {noun} can be made from the columns {listing(first)}. Columns that work: {known}. Rename yours; "
            "docs/data.md has an example of each."
        )

    def read(row: Any) -> Any:
        if not isinstance(row, Mapping):
            raise _no_object(row)
        if noun not in WITHOUT_PROMPTS:
            _refuse_meaningful(row, OF_A_ROW, "the row")
        if noun == "demonstrations" and convention in _ANSWERS and not _desirable(row):
            raise LeftOut("answers that are labelled as bad")
        item = _MAKE[noun](convention.read(row))
        if named and noun not in WITHOUT_PROMPTS:
            item = _with_truth(item, {name: _value(row, name) for name in named})
        for text in _texts(item):
            _check_text(text)
        return item

    return read


def _value(row: Columns, name: str) -> Any:
    """The value of a column for a reward function: any JSON value, null included."""
    if name not in row:
        raise BadRow(f"no column '{name}'", f"its source names it under columns. The row has: {listing(row)}.")
    try:
        json.dumps(row[name], ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"a column '{name}' that is no JSON value", f"{reprlib.repr(row[name])}: {error}.") from None
    return row[name]


def _with_truth(item: Any, known: Columns) -> Any:
    """The item with ``known`` added to the truth of its prompt or goal."""
    if isinstance(item, Prompt):
        return replace(item, truth={**item.truth, **known})
    if isinstance(item, Goal):
        twin = None if item.twin is None else _with_truth(item.twin, known)
        return replace(item, truth={**item.truth, **known}, twin=twin)
    return replace(item, prompt=_with_truth(item.prompt, known))


def unread(noun: str, first: Columns, columns: Sequence[str], named: Sequence[str] = ()) -> list[str]:
    """The columns of a source that neither the convention of its first row reads nor the source names."""
    convention = _convention(noun, first)
    besides = () if noun in WITHOUT_PROMPTS else (*_BESIDES, *OF_A_ROW)
    if noun == "demonstrations" and convention in _ANSWERS:
        besides += tuple(name for name in LABELS if _truth_value(first.get(name)) is not None)
    read = {*convention.columns, *convention.also, *besides, *named} if convention else columns
    return [name or "(without a name)" for name in columns if name not in read]


def _convention(noun: str, first: Columns) -> Convention | None:
    return next((convention for convention in CONVENTIONS[noun] if set(convention.columns) <= set(first)), None)


LABELS = ("label", "kto_tag")
"""Columns of KTO (Ethayarajh et al. 2024) that say whether the answer is good, as TRL and LLaMA-Factory name them."""


def _desirable(row: Columns) -> bool:
    """False if a label says that the answer is bad. A word other than true and false is some other kind of label, and ignored."""
    for name in LABELS:
        value = row.get(name)
        if value is not None and not isinstance(value, (bool, str)):
            raise BadRow(
                f"a column '{name}' that is not true or false",
                f"it is {reprlib.repr(value)}, which may mean a bad answer. If it does not, remove the column, or add "
                f"ignore: [{name}] to its source.",
            )
        if _truth_value(value) is False:
            return False
    return True


def _truth_value(value: Any) -> bool | None:
    """The value of a label, which is a word in CSV; None if it is neither true nor false."""
    return {"true": True, "false": False}.get(str(value).lower())


def _texts(item: Any) -> Iterator[str]:
    """All texts of an item."""
    if isinstance(item, str):
        yield item
        return
    if isinstance(item, Goal):
        yield from (item.text, item.ask, *(_texts(item.twin) if item.twin else ()))
        return
    if isinstance(item, Choice):
        yield from (item.context, *item.options)
        return
    prompt = item if isinstance(item, Prompt) else item.prompt
    yield from (message.content for message in prompt.messages)
    if isinstance(item, Demonstration):
        yield item.response
    if isinstance(item, Comparison):
        yield from item.completions


def _check_text(text: str) -> None:
    if len(text) > MOST_CHARACTERS:
        raise too_long()
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start : error.start + 1])
        raise BadRow(
            "half a character", f"a text holds {half}, one half of a surrogate pair, after {error.start} characters."
        ) from None


def _no_object(row: Any) -> BadRow:
    """The error for a row without columns: what `reading` found wrong with it, or that it is another kind of JSON."""
    return row if isinstance(row, BadRow) else BadRow("a line that is not a JSON object", f"{type(row).__name__}.")
