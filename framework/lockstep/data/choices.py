"""Rows of published tests as items with options (`lockstep.types.Choice`): which of the texts does a policy find likeliest?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lockstep.data.cells import BadRow, Columns, cell, list_in, not_empty, text_in
from lockstep.types import Choice


def item(row: Columns) -> Choice:
    """An item from Lockstep's own columns: context (may be empty), options, answer and, optionally, right (all that are right)
    and group."""
    options = tuple(_option(option, i) for i, option in enumerate(list_in(row, "options", "texts")))
    if len(set(options)) < max(2, len(options)):
        raise BadRow("options that do not differ", f"two or more different 'options' are needed, not {len(set(options))}.")
    answer = _place(cell(row, "answer", int, "a whole number"), options, "answer")
    right = [] if row.get("right") is None else list_in(row, "right", "whole numbers")
    places = tuple(sorted({_place(place, options, "right") for place in right} | {answer}))
    if len(places) == len(options):
        raise BadRow("no wrong option", "all 'options' are right.")
    group = None if row.get("group") is None else text_in(row, "group")
    return Choice(cell(row, "context", str, "text"), options, answer, places, group)


def crows_pairs(row: Columns) -> Choice:
    """CrowS-Pairs (Nangia et al. 2020, arXiv 2010.00133): 'answer' is the sentence that stereotypes more, so a model without a
    preference is "right" half of the time. Groups are the kinds of bias."""
    options = text_in(row, "sent_more"), text_in(row, "sent_less")
    return Choice("", options, 0, (0,), text_in(row, "bias_type"))


def winogender(row: Columns) -> Choice:
    """A template of Winogender schemas (Rudinger et al. 2018, arXiv 1804.09301) with both participants named: 'answer' is the
    sentence with a masculine pronoun, the other option has a feminine one."""
    sentence = text_in(row, "sentence")
    named = sentence.replace("$OCCUPATION", text_in(row, "occupation(0)")).replace(
        "$PARTICIPANT", text_in(row, "other-participant(1)")
    )
    options = _with_pronouns(named, _MASCULINE), _with_pronouns(named, _FEMININE)
    if options[0] == options[1]:
        raise BadRow("a template without a pronoun", "'sentence' should have $NOM_PRONOUN, $POSS_PRONOUN or $ACC_PRONOUN.")
    return Choice("", options, 0, (0,))


def _with_pronouns(sentence: str, words: Mapping[str, str]) -> str:
    return re.sub(r"\$(NOM|POSS|ACC)_PRONOUN", lambda match: words[match[1]], sentence)


_MASCULINE = {"NOM": "he", "POSS": "his", "ACC": "him"}
_FEMININE = {"NOM": "she", "POSS": "her", "ACC": "her"}


def truthfulqa(row: Columns) -> Choice:
    """TruthfulQA (Lin et al. 2022, arXiv 2109.07958, section 3.2 and appendix A.1.2), without the examples before the question.
    The answers of a column are in one cell, separated by ';'."""
    best = _sentence(text_in(row, "Best Answer"))
    right = dict.fromkeys([best, *_sentences(row, "Correct Answers")])
    wrong = [text for text in dict.fromkeys(_sentences(row, "Incorrect Answers")) if text not in right]
    if not wrong:
        raise BadRow("no wrong option", "'Incorrect Answers' has none that is not among the correct ones.")
    options = tuple(f" {text}" for text in (*right, *wrong))
    return Choice(f"Q: {text_in(row, 'Question').strip()}\nA:", options, 0, tuple(range(len(right))))


def _sentences(row: Columns, name: str) -> list[str]:
    return [_sentence(part) for part in text_in(row, name).split(";") if part.strip()]


def _sentence(text: str) -> str:
    """The text with the full stop that the authors' script adds."""
    return text.strip() if text.strip().endswith(".") else f"{text.strip()}."


def _option(value: object, place: int) -> str:
    if not isinstance(value, str):
        raise BadRow("a wrong type", f"'options[{place}]' should be text, not {type(value).__name__}.")
    return not_empty(value, f"options[{place}]")


def _place(value: object, options: Sequence[str], name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(options):
        raise BadRow("a place out of range", f"'{name}' is {str(value)[:40]}, of {len(options)} options, counted from 0.")
    return value
