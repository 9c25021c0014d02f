"""What a person waits for, as it grows: waits.json, waits.md and waits.png.

    python benchmarks/speed/waits.py measure FOLDER RUN --checkpoint models/smollm2 --comparisons hh.jsonl.gz [--times 3]
    python benchmarks/speed/waits.py report FOLDER

RUN is a finished run of `experiment=demo`. Copies of it are compared and listed, each with a seed of its own, noise on every
value and, where steps grow, its rows of metrics repeated. The comparisons are tokenised with the checkpoint's tokenizer, repeated
until there are enough. Every measurement is a process, from its start to its end. A slope is the exponent of time against size,
fitted to all points.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from run import recorded

LOCKSTEP = str(Path(sys.executable).with_name("lockstep"))
STARTS = {
    "lockstep --help": ["--help"],
    "lockstep plugins": ["plugins"],
    "lockstep run experiment=demo --config": ["run", "experiment=demo", "--config"],
}
SIZES = {
    "runs compared": (2, 25, 50, 100, 200),
    "steps of two runs compared": (100, 1_000, 10_000),
    "stages in the cache": (12, 102, 1_002),
    "comparisons tokenised": (10_000, 30_000, 100_000),
}
SETTINGS = (0.3, 0.6, 0.9, 1.2)
"""KL coefficients: as many groups of runs."""


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    points = []

    def add(what: str, size: int, command: Sequence[str], **environment: str) -> None:
        found = [seconds(command, environment) for _ in range(args.times)]
        points.append({"what": what, "size": size, "seconds": statistics.median(found), "low": min(found), "high": max(found)})
        print(f"{what} {size}: {points[-1]['seconds']:.2f} s", flush=True)

    for what, command in STARTS.items():
        add(what, 1, [LOCKSTEP, *command])
    runs, steps, stages, rows = SIZES
    compare = lambda place: ["compare", str(place / "runs"), "--output", str(place / "report")]  # noqa: E731
    for what, copied, command in (
        (runs, lambda place, n: copies(args.run, place, n), compare),
        (steps, lambda place, n: copies(args.run, place, 2, n), compare),
        (stages, lambda place, n: copies(args.run, place, n // 6, 10), lambda place: ["cache", f"folder={place / 'runs'}"]),
    ):
        for size in SIZES[what]:
            with tempfile.TemporaryDirectory(dir=args.run.parent.parent) as place:  # beside the run, for hard links
                copied(Path(place), size)
                add(what, size, [LOCKSTEP, *command(Path(place))])
    for size, threads in itertools.product(SIZES[rows], sorted({1, args.threads})):
        command = [sys.executable, __file__, "tokenise", str(args.checkpoint), str(args.comparisons), str(size)]
        named = f"{rows}, {threads} cores" if threads > 1 else f"{rows}, one core"
        add(named, size, command, RAYON_NUM_THREADS=str(threads))
    return points


def seconds(command: Sequence[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


# ------------------------------------------------------------------------------------------------------ copies of a run


def copies(run: Path, place: Path, count: int, steps: int | None = None) -> None:
    """``count`` runs in ``place/runs``, with this many rows of metrics in each stage that has any; None: as many as there are.
    Files that do not differ are hard links."""
    record, config = (run / "run.json").read_text(), yaml.safe_load((run / "config.yaml").read_text())
    for number in range(count):
        setting, seed, random_ = SETTINGS[number % len(SETTINGS)], number // len(SETTINGS), random.Random(number)
        own = json.loads(record) | {"name": f"demo-{number}", "seed": seed}
        folder = place / "runs" / own["name"]
        for name, stage in own["stages"].items():
            old = run.parent / stage["folder"]
            stage["folder"] = f"stages/{name}-{own['backend']['name']}-{number:012x}"
            copy_stage(old, place / "runs" / stage["folder"], steps, random_)
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(own))
        config["seed"], config["algorithm"]["kl_coef"] = seed, setting
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def copy_stage(old: Path, new: Path, steps: int | None, random_: random.Random) -> None:
    for file in sorted(path for path in old.rglob("*") if path.is_file()):
        target = new / file.relative_to(old)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.name == "metrics.jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            chosen = itertools.islice(itertools.cycle(rows), steps or len(rows))
            lines = [json.dumps({**noisy(row, random_), "step": step}) for step, row in enumerate(chosen)]
            target.write_text("\n".join(lines) + "\n")
        elif file.name == "evaluation.json":
            target.write_text(json.dumps(noisy(json.loads(file.read_text()), random_)))
        elif file.name != "lock":
            os.link(file, target)


def noisy(value: Any, random_: random.Random) -> Any:
    if isinstance(value, dict):
        return {key: noisy(each, random_) for key, each in value.items()}
    return value * (1 + random_.gauss(0, 0.02)) if isinstance(value, float) else value


# -------------------------------------------------------------------------------------------------------------- tokenise


def tokenise(checkpoint: Path, comparisons: Path, count: int) -> None:
    from lockstep.data.files import Files
    from lockstep.text.encoding import Lengths, encode_comparisons
    from lockstep.text.tokenizer import Tokenizer, TokenizerConfig

    found = Files(Files.Config(comparisons=({"path": str(comparisons)},), heldout_fraction=0.1, on_bad_row="skip"))
    rows = list(itertools.islice(itertools.cycle(found.comparisons("train")), count))
    encode_comparisons(Tokenizer.load(checkpoint, TokenizerConfig(pad_token="<|pad|>")), rows, Lengths(96, 96, 96))


# ---------------------------------------------------------------------------------------------------------------- report


def curves(points: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for what, found in itertools.groupby(sorted(points, key=lambda p: (p["what"], p["size"])), lambda p: p["what"]):
        yield what, list(found)


def table(points: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| what | seconds, by size | spread at the largest | slope |", "|---|---|---|---|"]
    for what, found in curves(points):
        sizes, times = [p["size"] for p in found], [p["seconds"] for p in found]
        shown = f"{times[0]:.2f}" if len(found) == 1 else ", ".join(f"{n:,}: {t:.2f}" for n, t in zip(sizes, times, strict=True))
        slope = f"{np.polyfit(np.log(sizes), np.log(times), 1)[0]:.2f}" if len(found) > 1 else ""
        lines.append(f"| {what} | {shown} | {found[-1]['low']:.2f} to {found[-1]['high']:.2f} | {slope} |")
    return lines


def picture(points: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SIZES), figsize=(13, 3.2), layout="constrained")
    for ax, axis in zip(axes, SIZES, strict=True):
        for what, found in curves(points):
            if what.startswith(axis):
                ax.plot(
                    [p["size"] for p in found], [p["seconds"] for p in found], "o-", label=what.removeprefix(axis).strip(", ")
                )
                ax.fill_between([p["size"] for p in found], [p["low"] for p in found], [p["high"] for p in found], alpha=0.2)
        ax.set_xlabel(axis)
        ax.set_ylim(bottom=0)
        ax.set_xlim(left=0)
        if len(ax.lines) > 1:
            ax.legend(fontsize=8)
    axes[0].set_ylabel("seconds")
    figure.savefig(path, dpi=110)


def report(points: Sequence[dict[str, Any]], about: dict[str, Any], folder: Path) -> None:
    head = [
        "# What a person waits for",
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['date']}; medians of {about['times']}.",
        "Written by `waits.py`, which says what grows.",
        "",
    ]
    (folder / "waits.md").write_text("\n".join(head + table(points)) + "\n", encoding="utf-8")
    picture(points, folder / "waits.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    reporting, measuring, tokenising = (commands.add_parser(name) for name in ("report", "measure", "tokenise"))
    for command in (reporting, measuring):
        command.add_argument("folder", type=Path, help="of this machine")
    measuring.add_argument("run", type=Path)
    measuring.add_argument("--checkpoint", type=Path, required=True)
    measuring.add_argument("--comparisons", type=Path, required=True)
    measuring.add_argument("--times", type=int, default=3)
    measuring.add_argument("--threads", type=int, default=os.cpu_count())
    measuring.add_argument("--device", choices=("cpu",), default="cpu")
    tokenising.add_argument("checkpoint", type=Path)
    tokenising.add_argument("comparisons", type=Path)
    tokenising.add_argument("count", type=int)
    args = parser.parse_args()
    if args.command == "tokenise":
        tokenise(args.checkpoint, args.comparisons, args.count)
        return
    found = recorded(args, args.folder / "waits.json", measure, "times")
    report(found["points"], found["machine"], args.folder)


if __name__ == "__main__":
    main()
