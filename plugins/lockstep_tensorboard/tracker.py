"""A stage's record for TensorBoard: ``tensorboard --logdir runs/stages``.

Metrics are scalars under their own names; samples, warnings and the configuration are text. TensorBoard has no artifacts and
no run groups, so those are left out.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.config.schema import setting
from lockstep.interfaces import Metrics
from lockstep.reporting.markdown import escaped
from lockstep.reporting.tracking import Surviving


class TensorBoard(Surviving):
    """Writes a folder ``tensorboard`` into each stage's folder. A resumed stage rewrites it: otherwise steps after the checkpoint
    would appear twice."""

    label = "TensorBoard"

    @dataclass(frozen=True)
    class Config:
        flush_seconds: int = setting(10, "Seconds until TensorBoard shows new values.", least=1)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self._writer: Any = None  # while a stage runs

    def start(self, *, folder: Path, run: str, stage: str, identity: str, config: Mapping[str, Any], resume: bool) -> None:
        with self._surviving("start"):
            from tensorboard.summary.writer.event_file_writer import EventFileWriter  # takes 0.6 s

            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            self._writer = EventFileWriter(str(folder / "tensorboard"), flush_secs=self.config.flush_seconds)
            about = {"run": run, "stage": stage, "identity": identity, **config}
            self._text("configuration", f"```\n{json.dumps(about, indent=2, ensure_ascii=False)}\n```", 0)
            if resume:
                self._replay(folder)

    def log(self, metrics: Metrics, step: int) -> None:
        with self._surviving("log metrics"):
            from tensorboard.compat.proto.summary_pb2 import Summary

            self._write(Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]), step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        with self._surviving("log a table"):
            if rows:
                self._text(name, markdown(rows), step)

    def alert(self, title: str, text: str, step: int) -> None:
        with self._surviving("log a warning"):
            self._text(f"health/{title}", escaped(text), step)

    def artifact(self, kind: str, folder: Path) -> None:
        pass

    def finish(self, failed: bool = False) -> None:
        writer, self._writer = self._writer, None
        with self._surviving("finish"):
            if writer:
                writer.close()

    def _text(self, name: str, text: str, step: int) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._write(text_pb(name, text), step)

    def _write(self, summary: Any, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if self._writer:
            self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cell = lambda value: escaped(str("" if value is None else value))  # noqa: E731
    lines = [
        list(map(escaped, columns)),
        ["---"] * len(columns),
        *([cell(row.get(column)) for column in columns] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
