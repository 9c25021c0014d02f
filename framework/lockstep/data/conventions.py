"""The formats of rows that people already have, a reader for each. `CONVENTIONS` is the table; docs/data.md has a row of each."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.data import choices
from lockstep.data.cells import BadRow, Columns, LeftOut, cell, list_in, not_empty, says_nothing, text_in
from lockstep.data.messages import (
    Answered,
    is_hh,
    labeler_in,
    only_text,
    prompt_column,
    prompt_from,
    split_dialogue,
    truth_in,
    whole_dialogue,
    with_completion_columns,
    with_completions,
)
from lockstep.types import Goal, Message, Prompt


def _dialogue_in(name: str) -> Callable[[Columns], Answered]:
    """A reader of dialogues in a column. A dialogue that ends with the user is a prompt; a noun that needs a response reports
    that it is missing."""

    def read(row: Columns) -> Answered:
        messages = whole_dialogue(row, name)
        if messages[-1].role != "assistant":
            return Answered(prompt_from(row, messages))
        before, response = split_dialogue(messages)
        answered = any(message.role == "assistant" for message in before)
        return Answered(prompt_from(row, before), (response.content,), (0,), dialogue=answered, calls=response.calls)

    return read


def _instruction(row: Columns) -> Answered:
    """Alpaca's columns: 'input' (Dolly's 'context') is what the instruction is about; it may be empty."""
    about = [cell(row, name, str, "text") for name in ("input", "context") if row.get(name)]
    text = "\n\n".join([text_in(row, "instruction"), *about])
    prompt = prompt_from(row, (Message("user", text),))
    answers = (text_in(row, "output"),) if "output" in row else ()
    return Answered(prompt, answers, (0,) * len(answers), dialogue=bool(row.get("history")))


def _pair(row: Columns) -> Answered:
    """Two completions beside a prompt, or two whole dialogues that agree until the last answer. Whole dialogues contain their
    prompt, so a column 'prompt' beside them (UltraFeedback) is not read."""
    names = ("chosen", "rejected")
    if row.get("prompt") is None or all(_is_whole(row.get(name)) for name in names):
        (before, chosen), (other, rejected) = (split_dialogue(whole_dialogue(row, name)) for name in names)
        if before != other:
            raise LeftOut("pairs that differ before the last answer")
        texts = only_text(chosen, "chosen"), only_text(rejected, "rejected")
        return Answered(prompt_from(row, before), texts, (0, 1), labeler_in(row))
    return with_completion_columns(row, *names)


def _is_whole(value: Any) -> bool:
    return is_hh(value) or (isinstance(value, (list, tuple)) and len(value) > 1)


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
        return with_completions(row, texts, _ranks(numbers, best, name))

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
    prompt = prompt_from(row, (Message("user", text_in(row, "instruction")),))
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
    return prompt_from(row, (Message("user", text),))


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
    return Answered(prompt_column(row, "query"), (not_empty(response, "reference_response"),), (0,))


def _goal(row: Columns, name: str) -> Goal:
    """The goal in the column ``name``: AdvBench's 'goal', HarmBench's 'Behavior', or 'task_description' of hh-rlhf's red-team
    attempts (Ganguli et al. 2022, arXiv 2209.07858). HarmBench's behaviours that need a context are left out."""
    if not says_nothing(row.get("ContextString")):
        raise LeftOut("goals with a context")
    text, truth = text_in(row, name), truth_in(row)
    twin = None if says_nothing(row.get("twin")) else Goal(text_in(row, "twin"), text_in(row, "twin"), truth)
    return Goal(text, text if says_nothing(row.get("ask")) else text_in(row, "ask"), truth, twin)


@dataclass(frozen=True)
class Convention:
    """A format of rows. ``columns`` must be present; those in ``also`` and `BESIDES` may be."""

    columns: tuple[str, ...]
    read: Callable[[Columns], Any]
    also: tuple[str, ...] = ()


BESIDES = ("system", "system_prompt", "history", "labeler", "truth", "tools")
_ALPACA = ("input", "context", "output")

_PAIRS = (
    Convention(("info", "summaries", "choice"), _summaries, ("worker",)),
    Convention(("prompt", "chosen", "rejected"), _pair),
    Convention(("chosen", "rejected"), _pair),
    Convention(("instruction", "completions"), _ultrafeedback),
    Convention(("prompt", "completions", "ranks"), _ranked_by("ranks", lambda rank: rank)),
    Convention(("prompt", "completions", "scores"), _ranked_by("scores", lambda score: -score)),
)
ANSWERS = (
    Convention(("subreddit", "title", "post", "summary"), _reddit_summary),
    Convention(("query", "reference_response"), _query),
    Convention(("prompt", "completion"), lambda row: with_completion_columns(row, "completion")),
    Convention(("prompt", "response"), lambda row: with_completion_columns(row, "response")),
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
    Convention(("prompt",), lambda row: Answered(prompt_column(row))),
    Convention(("instruction",), _instruction, _ALPACA),
    Convention(("chosen", "rejected"), _pair),
    Convention(("text",), lambda row: Answered(prompt_column(row, "text"))),
)
_GOALS = (
    Convention(("goal",), lambda row: _goal(row, "goal"), ("ask", "twin")),
    Convention(("Behavior",), lambda row: _goal(row, "Behavior"), ("ContextString",)),
    Convention(("task_description",), lambda row: _goal(row, "task_description")),
)
WITHOUT_PROMPTS = {"texts": "raw texts", "tests": "tests"}
"""{noun: what errors call it} for nouns without a prompt, which allow neither columns beside a prompt nor columns for rewards."""

CONVENTIONS: Mapping[str, tuple[Convention, ...]] = {
    "demonstrations": ANSWERS + _PAIRS,
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
