"""lockstep chat RUN_OR_FOLDER: talk to a policy, a line at a time.

On a terminal the answer appears as it is drawn, Ctrl-C stops it and Ctrl-D leaves. Otherwise each line of the standard input is
answered on the standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import unicodedata
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

from lockstep.api.interrupts import noted
from lockstep.errors import LockstepError, did_you_mean
from lockstep.reporting.console import Console

if TYPE_CHECKING:
    from lockstep.api.policies import Conversation

HELP = "talk to a policy in the terminal: lockstep chat runs/demo/NAME"
OVERRIDES = False

COMMANDS = {
    "/reset": "forget the dialogue",
    "/system": "forget it, and start over from this system message: /system Be brief.",
    "/regenerate": "draw another answer",
    "/help": "this list",
    "/quit": "leave",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="run folder, checkpoint folder, GGUF file or hub id")
    parser.add_argument("--stage", help="of a run: whose policy (default: the last that made one)")
    parser.add_argument("--backend", help="default: the run's, else the configured one")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token (default: 1)")
    parser.add_argument("--max-tokens", type=int, help="of an answer (default: 256, or half the context if that is less)")
    parser.add_argument("--system", help="the system message")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal answers (default: 0)")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from lockstep.api.policies import load

    a = arguments
    policy = load(a.source, a.backend, stage=a.stage)
    conversation = policy.conversation(system=a.system, max_tokens=a.max_tokens, temperature=a.temperature, seed=a.seed)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not have every character
    if policy.tokenizer.chat_template is None:
        print("This policy has no chat template: it continues each line as plain text.", file=sys.stderr)
    if terminal:
        print(f"{a.source} on {policy.backend.name}. /help lists the commands.")
    for line in lines(terminal):
        if line.strip() == "/quit":
            return
        try:
            write(reply(conversation, line))
        except LockstepError as error:
            Console().say(f"{type(error).__name__}: {error}")


def lines(terminal: bool) -> Iterator[str]:
    """What is said, until the end. On a terminal Ctrl-C only drops the line that is being typed."""
    if not terminal:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  keys that edit the line, and its history
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves.")
        except EOFError:
            print()
            return


def reply(conversation: Conversation, line: str) -> Generator[str, None, None]:
    """What the line brings: an answer in pieces, or what a command says."""
    command, _, rest = line.strip().partition(" ")
    if not command:
        return
    if not command.startswith("/"):
        yield from conversation.say(line)
    elif command == "/regenerate":
        yield from conversation.regenerate()
    elif command == "/reset":
        conversation.reset(conversation.system)
    elif command == "/system":
        conversation.reset(rest.strip() or None)
    elif command == "/help":
        yield "\n".join(f"{name:12} {what}" for name, what in COMMANDS.items())
    else:
        yield f"There is no {command}.{did_you_mean(command, COMMANDS)} Commands: {', '.join(COMMANDS)}."


def write(pieces: Generator[str, None, None]) -> None:
    """Each piece at once; Ctrl-C ends them."""
    any_piece = False
    with noted() as interrupted, contextlib.closing(pieces):
        try:
            for piece in pieces:
                any_piece = True
                print(visible(piece), end="", flush=True)
                if interrupted():
                    print(" [stopped]", end="")
                    break
        finally:
            if any_piece:
                print(flush=True)


def visible(text: str) -> str:
    """With control characters spelled out, so that no text of a model commands the terminal; line breaks and tabs are kept."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text)
