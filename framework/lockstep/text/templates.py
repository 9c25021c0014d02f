"""Chat templates: jinja from checkpoints and users, rendered in a sandbox, within limits, with the same result every day.

A template is somebody else's program, so its resources are limited: `SECONDS` of processor time, `MEMORY` above the process's
peak so far, and output in proportion to the dialogue. Its inputs are limited too: the date is given (`strftime_now`), and
nothing is random.

Left out: limits on time and memory outside the main thread, where Python has no timers.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2.ext
import jinja2.sandbox

from lockstep.errors import ConfigError, did_you_mean, listing, short, told
from lockstep.storage.files import expanded
from lockstep.types import Message

TEMPLATES = {
    "dialogue": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '\\n\\n' + {'user': 'Human', 'assistant': 'Assistant', 'system': 'System'}[m.role] + ': ' + m.content }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
    ),
    "plain": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
}
"""Chat templates by name, for tokenizers without one: the HH format, and plain text."""

DATE = "2024-07-26"
"""The date that Llama 3's template falls back to."""

SECONDS, MEMORY, CHARACTERS = 10.0, 2**30, 10_000_000
"""Limits of one rendering: processor time, bytes, and output characters beyond ten times those of the dialogue."""


def template_files(given: str | None) -> tuple[str, ...]:
    """The .jinja file that a configuration gives as a template, if it gives one."""
    return (str(expanded(given)),) if given and given.endswith(".jinja") else ()


def template_text(given: str | None) -> str | None:
    """The text of a template that a configuration gives by name, as a .jinja file or as jinja text; None if it gives none.

    Raises:
      ConfigError: it is none of these, or the file is missing or cannot be read.
    """
    if not given or given in TEMPLATES:
        return TEMPLATES.get(given or "")
    if given.endswith(".jinja"):
        file = expanded(given)
        if not file.is_file():
            there = [str(path) for path in file.parent.glob("*.jinja")]
            raise ConfigError(f"policy.tokenizer.chat_template: there is no file {file}.{did_you_mean(str(file), there)}")
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"policy.tokenizer.chat_template: {file} cannot be read: {error}") from error
    if "{{" not in given and "{%" not in given:
        raise ConfigError(
            f"policy.tokenizer.chat_template='{short(given)}' is not a .jinja file, not jinja text and not one of "
            f"{listing(TEMPLATES)}."
            f"{did_you_mean(given, TEMPLATES)}"
        )
    return given


def render(
    template: str, messages: Sequence[Message], *, add_generation_prompt: bool, tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] = (), date: str | None = None, asked_date: Callable[[], None] = lambda: None,
) -> str:  # fmt: skip
    """The dialogue as the template writes it.

    Args:
      tokens: special tokens by their names in templates: ``bos_token``, ``eos_token``, ...
      date: today's date for templates that ask for it; None: `DATE`. ``asked_date`` is called if the template asks.

    Raises:
      ConfigError: the template is not valid, does not accept this dialogue, or exceeds a limit.
    """

    def strftime_now(form: str) -> str:
        asked_date()
        return day(date).strftime(form)

    most, pieces, length = CHARACTERS + 10 * sum(len(m.content) for m in messages), list[str](), 0
    try:
        with _limited():
            for piece in _compiled(template).generate(
                messages=[_given(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=list(tools) or None,
                documents=None,
                strftime_now=strftime_now,
                **tokens,
            ):
                pieces.append(piece)
                length += len(piece)
                if length > most:
                    raise _TooMuch(f"it writes more than {most:,} characters")
    except ConfigError:
        raise
    except _TooMuch as error:
        raise ConfigError(f"The chat template was stopped: {error}. {_ANOTHER}") from None
    except MemoryError:
        raise ConfigError(f"The chat template was stopped: it needs more memory than there is. {_ANOTHER}") from None
    except Exception as error:  # a template can raise whatever Python can
        raise ConfigError(f"The chat template fails on this dialogue: {error}") from error
    return "".join(pieces)


def _given(message: Message) -> dict[str, Any]:
    """A message in the form that templates read, which is transformers'."""
    calls = [{"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}} for call in message.calls]
    return {"role": message.role, "content": message.content} | ({"tool_calls": calls} if calls else {})


def day(date: str | None) -> datetime.date:
    """
    Raises:
      ConfigError: ``date`` is not a date.
    """
    try:
        return datetime.date.fromisoformat(date or DATE)
    except (ValueError, TypeError):
        raise ConfigError(f"policy.tokenizer.date={told(date)} should be a date like {DATE}.") from None


_ANOTHER = "Set policy.tokenizer.chat_template to another."


class _TooMuch(Exception):
    """Stops a template; the message gives the reason."""


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Stop the code inside after `SECONDS` of processor time, or once the peak memory grows by more than `MEMORY`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    memory, started = _peak_memory(), time.thread_time()

    def tick(*_: Any) -> None:
        if time.thread_time() - started > SECONDS:
            raise _TooMuch(f"it does not end within {SECONDS:g} seconds")
        if _peak_memory() > memory + MEMORY:
            raise _TooMuch(f"it takes more than {MEMORY // 2**20:,} MB of memory")

    # Not SIGPROF: libtpu's profiler has a handler in C, which Python cannot put back.
    handler, timer = signal.signal(signal.SIGVTALRM, tick), signal.setitimer(signal.ITIMER_VIRTUAL, _TICK, _TICK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, handler)


_TICK = 0.1  # seconds


def _peak_memory() -> int:
    """The peak memory of the process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's turns in some templates; here it only has to parse."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Refuses single operations that take hours or gigabytes, because no timer can interrupt them."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = [value for value in (left, right) if isinstance(value, int)]
        lengths = [len(value) for value in (left, right) if isinstance(value, (str, list, tuple))]
        if operator == "*" and (
            numbers and lengths and numbers[0] * lengths[0] > CHARACTERS
            or len(numbers) == 2 and sum(number.bit_length() for number in numbers) > _BITS
        ) or operator == "**" and len(numbers) == 2 and right * left.bit_length() > _BITS:  # fmt: skip
            raise _TooMuch(f"the result of its '{operator}' is too large")
        return super().call_binop(context, operator, left, right)

    def check(self, template: str) -> None:
        """Refuse large literal numbers and padding widths."""
        for constant in self.parse(template).find_all(jinja2.nodes.Const):
            if isinstance(constant.value, int) and constant.value > _NUMBER:
                raise _TooMuch(f"it has a number over {_NUMBER:,}")
            if isinstance(constant.value, str) and _PADDING.search(constant.value):
                raise _TooMuch(f"it pads to a width over {_NUMBER:,}")


_BITS, _NUMBER = 4096, 10**9
_PADDING = re.compile(r"%[-+ #0]*\d{10,}|\{[^{}]*:[^{}]*\d{10,}")


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    """The compiled template, sandboxed, with the settings, tags and functions that chat templates on the hub rely on."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: int | str | None = None, separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:  # fmt: skip
        """transformers' filter; jinja's own escapes HTML."""
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationTag], finalize=_no_function
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    del environment.filters["random"], environment.globals["lipsum"]  # the same dialogue must always give the same text
    try:
        environment.check(template)
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ConfigError(f"The chat template is not valid jinja: {error}") from error


def _no_function(value: Any) -> Any:
    """Refuse to write a function: ``{{ text.strip }}`` without its parentheses would write a memory address, which differs
    from run to run."""
    if callable(value) and not isinstance(value, jinja2.Undefined):
        raise jinja2.TemplateError(f"it writes the function '{getattr(value, '__name__', value)}' itself. Are its () missing?")
    return value
