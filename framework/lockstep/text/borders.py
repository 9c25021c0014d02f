"""Check that training reads what the chat template writes where a prompt ends and where its answer ends.

Training reads the prompt rendered with the generation prompt, then the answer, then EOS. Each is encoded separately, because
generation continues from the prompt's tokens. This module also renders a dialogue whole, answer included, and compares the two.
White space that only one of them has is not reported: templates add and strip it at will.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lockstep.errors import ConfigError, DataError
from lockstep.types import Message, Prompt

if TYPE_CHECKING:
    from lockstep.text.tokenizer import Tokenizer

ANSWER = "Yes."
"""A stand-in for prompts, which have no answer."""

SHORT = 100_000
"""Only a dialogue with fewer characters is checked in full: the check tokenises it four more times."""


class Borders:
    """Checks one data set, called ``what`` in messages: the first short dialogue in full, and how every answer begins."""

    def __init__(self, tokenizer: Tokenizer, what: str):
        self.tokenizer, self.what = tokenizer, what
        self.opened: str | None = None
        self.checked = self.writes_tools = False

    def check(self, prompt: Prompt, answers: Sequence[str] = ()) -> None:
        """
        Raises:
          DataError: an answer begins with a tag that the template has already written, such as '<think>', or the template
            leaves out the tools of a prompt.
        """
        if prompt.tools and not self.writes_tools:
            self.writes_tools = True
            render = lambda tools: self.tokenizer.render(prompt.messages, add_generation_prompt=True, tools=tools)  # noqa: E731
            if render(()) == render(prompt.tools):
                raise DataError(
                    f"{self.what}: the chat template does not write the tools of a prompt, and without them it means something "
                    "else. Set policy.tokenizer.chat_template to a template that writes them. To train without: ignore: [tools]."
                )
        if not self.checked and sum(map(len, [*(message.content for message in prompt.messages), *answers])) < SHORT:
            self.checked, self.opened = True, opened(self.tokenizer, prompt)
            for finding in findings(self.tokenizer, prompt, answers[0] if answers else ANSWER):
                self.tokenizer.warn_once(finding)
            closing = f"</{(self.opened or '')[1:]}"
            if answers and self.opened and closing not in answers[0] and closing in str(self.tokenizer.chat_template):
                self.tokenizer.warn_once(
                    f"the chat template opens {self.opened!r} before an answer, and the first answer of the {self.what} does not "
                    f"close it: the policy learns to leave it open. Begin the answers with {closing!r}, or {_ANOTHER}"
                )
        if self.opened and any(answer.lstrip().startswith(self.opened) for answer in answers):
            raise DataError(
                f"{self.what}: an answer begins with {self.opened!r}, which the chat template has already written at the end of "
                f"the prompt: it would be there twice. Remove it from the answers, or {_ANOTHER}."
            )


_ANOTHER = "set policy.tokenizer.chat_template to a template that does not write it"


def opened(tokenizer: Tokenizer, prompt: Prompt) -> str | None:
    """The tag that the template opens where the answer begins; None if it opens none."""
    try:
        waiting, before = (tokenizer.render(prompt.messages, add_generation_prompt=ready) for ready in (True, False))
    except ConfigError:
        return None  # a template that only renders answered dialogues, or only those that wait for an answer
    found = re.search(r"(<[^<>/\s]+>)\s*\Z", waiting[len(before) :]) if waiting.startswith(before) else None
    return found and found[1]


def findings(tokenizer: Tokenizer, prompt: Prompt, answer: str) -> list[str]:
    """Messages on how the tokens of training differ from the answered dialogue as the template writes it, and what to set."""
    waiting = tokenizer.render(prompt.messages, add_generation_prompt=True)
    try:
        whole = tokenizer.render([*prompt.messages, Message("assistant", answer)], add_generation_prompt=False)
    except ConfigError:
        return []  # a template for prompts only
    same = len(os.path.commonprefix([waiting, whole]))
    begin = whole.find(answer.strip(), same)
    if begin < 0:
        return []  # the template does not write answers, or changes them
    end = begin + len(answer.strip())
    found = [_beginning(tokenizer, prompt, waiting[same:], whole[same:begin])]
    with contextlib.suppress(DataError):  # a word-level tokenizer may lack tokens for the answer, or for words run together
        found.append(_end(tokenizer, whole[end:]))
        if waiting[same:].strip() == whole[same:begin].strip() == "":
            found.append(_tokens(tokenizer, waiting, answer, whole[:end]))
    return [finding for finding in found if finding]


def _beginning(tokenizer: Tokenizer, prompt: Prompt, only_waiting: str, only_answered: str) -> str | None:
    if only_answered.strip() and not only_waiting.strip():
        return (
            f"the chat template writes {only_answered!r} before an answer, but does not end a prompt with it: training and "
            "sampling do without. Set policy.tokenizer.chat_template to one that writes it if add_generation_prompt is true"
        )
    if only_waiting.strip() and only_waiting.strip() != opened(tokenizer, prompt):
        return (
            f"the chat template ends a prompt with {only_waiting!r}; once it is answered, {only_answered!r} is in its place. "
            "Training and sampling read the former. If that is wrong, set policy.tokenizer.chat_template to another template"
        )
    return None


def _end(tokenizer: Tokenizer, after: str) -> str | None:
    ids = tokenizer.encode(after.lstrip())[:1]
    added = tokenizer.core.get_added_tokens_decoder()
    if not ids or ids[0] not in added or ids[0] == tokenizer.eos_id:
        return None
    name = added[ids[0]].content
    return (
        f"the chat template ends an answer with '{name}', but responses end with EOS, '{tokenizer.eos_token}': the policy learns "
        f"another end than the template's. For the template's, set 'policy.tokenizer.eos_token=\"{name}\"'"
    )


def _tokens(tokenizer: Tokenizer, waiting: str, answer: str, whole: str) -> str | None:
    apart, beginning = tokenizer.encode(waiting) + tokenizer.encode(answer.strip()), waiting + answer.strip()
    if apart in (together := [tokenizer.encode(text) for text in (whole, beginning)]):
        return None
    same = len(os.path.commonprefix([apart, together[1]]))
    names = [[str(tokenizer.core.id_to_token(i)) for i in ids[same : same + 3]] for ids in (apart, together[1])]
    return (
        f"the tokens of a prompt and its answer are not those of both as one text: {' '.join(names[0])!r} where that has "
        f"{' '.join(names[1])!r}. White space at the end of a prompt does that: set policy.tokenizer.chat_template to a template "
        "that ends it otherwise"
    )
