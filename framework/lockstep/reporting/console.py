"""Terminal output: the plan, a progress bar with the few numbers that matter, a summary.

On a terminal the bar moves; a file or a pipe gets a line every few seconds instead. All output is first made safe to show
(`shown`): names, data, models and servers may contain anything.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import rich.console
import rich.logging
import rich.progress
import rich.table
import rich.text

from lockstep.config.secrets import redact
from lockstep.launchers import place
from lockstep.text.visible import visible

SHOWN = {
    "objective/score": "score",
    "objective/gold": "gold",
    "objective/kl": "kl",
    "value/explained_variance": "ev",
    "accuracy": "acc",
    "loss": "loss",
    "heldout/loss": "held-out loss",
    "heldout/accuracy": "held-out acc",
    "perf/tokens_per_second": "tok/s",
}
"""The numbers in the progress bar, in this order. The others are in metrics.jsonl and the tracker."""
SECONDS_BETWEEN_LINES = 5.0
SECONDS_BEFORE_A_WORD = 2.0

Progress = Callable[..., None]


def shown(text: str) -> str:
    """Return ``text`` made safe to show: secrets redacted, and nothing in it can steer a terminal."""
    return visible(redact(text))


def show_bug(*error: Any) -> None:
    """Print a traceback in place of `sys.excepthook`, made safe to show: it may contain text that is not ours."""
    print(shown("".join(traceback.format_exception(*error))), end="", file=sys.stderr)


class Terminal(rich.console.Console):
    """A rich console that treats strings as data: it prints them as `shown`, without interpreting markup or emoji codes or
    colouring numbers. This covers lines and the titles, headers and cells of tables. A `rich.text.Text` is printed as is: do
    not build one from data."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)
        if isinstance(self.file, io.TextIOWrapper):
            self.file.reconfigure(errors="backslashreplace")  # not every terminal can show every character

    def render_str(self, text: str, **options: Any) -> rich.text.Text:
        return super().render_str(shown(text), **{**options, "markup": False, "emoji": False})


class LogHandler(rich.logging.RichHandler):
    def render_message(self, record: logging.LogRecord, message: str) -> rich.console.ConsoleRenderable:
        return rich.text.Text(shown(message))


class Console:
    def __init__(self) -> None:
        # Of several processes, only the first prints.
        self.out = Terminal(soft_wrap=True, width=None if sys.stdout.isatty() else 150, quiet=place().rank > 0)
        self.out.on_broken_pipe = nobody_reads  # type: ignore[method-assign]
        logger = logging.getLogger("lockstep")
        logger.setLevel(logging.INFO)
        logger.handlers = [LogHandler(console=self.out, show_time=False, show_path=False)]

    def plan(self, name: str, lines: list[tuple[str, str, str]]) -> None:
        table = rich.table.Table(title=f"run {name}", title_justify="left", box=None, pad_edge=False)
        for column in ("stage", "", "what one step consumes, how many steps"):
            table.add_column(column, overflow="fold")
        for line in lines:
            table.add_row(*line)
        self.out.print(table)

    @contextlib.contextmanager
    def progress(self, name: str, done: int, total: int) -> Iterator[Progress]:
        """Yields ``progress(done, metrics, note='')``."""
        if not self.out.is_terminal:
            yield self._lines(name, total)
            return
        bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:>12}", markup=False),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[numbers]}", markup=False),
            console=self.out,
        )
        with bar:
            task = bar.add_task(shown(name), total=total, completed=done, numbers="")
            yield lambda now, metrics, note="": bar.update(task, completed=now, numbers=shown(note) or numbers(metrics))

    def _lines(self, name: str, total: int) -> Progress:
        last = [time.perf_counter()]

        def line(now: int, metrics: Mapping[str, float], note: str = "") -> None:
            if now == total or time.perf_counter() - last[0] > SECONDS_BETWEEN_LINES:
                last[0] = time.perf_counter()
                self.out.print(f"{name:>12} {now}/{total}  {note or numbers(metrics)}")

        return line

    def stage_done(self, name: str, result: Mapping[str, Any], *, reused: bool) -> None:
        said = "reused, took" if reused else "done in"
        self.out.print(f"{name:>12} {said} {result['seconds']:.0f} s  {numbers(result['metrics'])}")

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Print ``what`` if the block takes longer than two seconds: to stderr, because it is not a result."""
        timer = threading.Timer(SECONDS_BEFORE_A_WORD, lambda: print(f"{shown(what)} ...", file=sys.stderr, flush=True))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def say(self, text: str) -> None:
        self.out.print(text)


def tell(text: str) -> None:
    """Print ``text`` unformatted and without a final newline, made safe to show."""
    try:
        print(shown(text), end="", flush=True)
    except BrokenPipeError:
        nobody_reads()


def has_reader() -> bool:
    """False if standard output is a pipe whose other end has been closed."""
    output = select.poll()
    with contextlib.suppress(OSError):  # not a file at all, as in a notebook
        output.register(sys.stdout.fileno(), 0)  # errors only
    return not output.poll(0)


def nobody_reads() -> None:
    """Discard all further standard output, so that the work continues after the reader has gone, as in
    ``lockstep cache | head``."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def numbers(metrics: Mapping[str, float | None]) -> str:
    """The metrics in `SHOWN` as text: 'loss 2.31  acc 0.71'."""
    return "  ".join(f"{label} {metrics[name]:.4g}" for name, label in SHOWN.items() if metrics.get(name) is not None)
