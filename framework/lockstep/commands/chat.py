"""lockstep chat RUN_OR_FOLDER: talk to a policy, a line at a time.

On a terminal the answer streams; Ctrl-C stops it and Ctrl-D quits. Otherwise each line of standard input is answered by one
line of standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import signal
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from lockstep.errors import LockstepError, did_you_mean
from lockstep.reporting.console import Console
from lockstep.runs.interrupts import GracefulStop
from lockstep.text.visible import visible

if TYPE_CHECKING:
    from lockstep.api.policies import Conversation

HELP = "talk to a policy in the terminal: lockstep chat runs/demo/NAME"
OVERRIDES = False

COMMANDS = {
    "/reset": "forget the dialogue",
    "/system": "start over with this system message: /system Be brief.",
    "/regenerate": "draw another answer",
    "/help": "this list",
    "/quit": "leave",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="run folder, checkpoint folder, GGUF file or hub id")
    parser.add_argument("--stage", help="for a run: the stage whose policy to use (default: the last one)")
    parser.add_argument("--backend", help="default: the run's, else the configured one")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token (default: 1)")
    parser.add_argument("--max-tokens", type=int, help="limit of an answer (default: 256, or half the context if that is less)")
    parser.add_argument("--system", help="the system message")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal answers (default: 0)")


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    from lockstep.api.policies import load

    a = arguments
    policy = load(a.source, a.backend, stage=a.stage)
    conversation = policy.conversation(system=a.system, max_tokens=a.max_tokens, temperature=a.temperature, seed=a.seed)
    terminal, console = sys.stdin.isatty() and sys.stdout.isatty(), Console()
    if not terminal and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # invalid UTF-8 spoils one line only
    if policy.tokenizer.chat_template is None:
        print("This policy has no chat template: it continues each line as plain text.", file=sys.stderr)
    if terminal:
        console.say(f"{a.source} on {policy.backend.name}. /help lists the commands.")
    for line in lines(terminal):
        if line.strip() == "/quit":
            return
        try:
            (write if terminal else write_line)(reply(conversation, line))
        except LockstepError as error:
            said = f"{type(error).__name__}: {error}"
            if terminal:
                console.say(said)
            else:
                print(flush=True)  # the line of this answer
                print(said, file=sys.stderr)


def lines(terminal: bool) -> Iterator[str]:
    """The user's lines, until the end of input. On a terminal, Ctrl-C only drops the line being typed."""
    if not terminal:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\nTo leave, type /quit or press Ctrl-D.")
        except EOFError:
            print()
            return


def reply(conversation: Conversation, line: str) -> Generator[str, None, None]:
    """The reply to a line: an answer in pieces, or the output of a command."""
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
        yield f"No command {command}.{did_you_mean(command, COMMANDS)} Commands: {', '.join(COMMANDS)}."


def write_line(pieces: Iterable[str]) -> None:
    """Print all pieces as one line, so that line n of the output is the answer to line n of the input."""
    print(visible("".join(pieces)).replace("\n", "\\n"), flush=True)


def write(pieces: Generator[str, None, None]) -> None:
    """Print each piece as it comes; Ctrl-C ends the answer."""
    any_piece = False
    with GracefulStop(message="", signals=(signal.SIGINT,)) as stop, contextlib.closing(pieces):
        try:
            for piece in pieces:
                any_piece = True
                print(visible(piece), end="", flush=True)
                if stop.asked:
                    print(" [stopped]", end="")
                    break
        finally:
            if any_piece:
                print(flush=True)
