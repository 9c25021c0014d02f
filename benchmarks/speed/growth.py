"""Time and memory of Lockstep as the work grows, with slopes: growth.json, growth.md and growth.png.

    python benchmarks/speed/growth.py measure benchmarks/speed/MACHINE models/speed [--turns 5]
    python benchmarks/speed/growth.py report benchmarks/speed/MACHINE

One thing grows at a time: the episodes of a PPO iteration, the length of its responses, the width of its models, and the
completions per prompt of a reward-model step. A slope is the exponent of time against arithmetic (`worker.Work.flops`), fitted
to all points: below 1, fixed costs still count; above 1, something grows faster than the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogFormatter, NullLocator
from report import COLOURS
from run import Process, lockstep, recorded
from worker import Work

PPO = Work("ppo", "tiny", 32, 32, 32)
REWARD = Work("reward", "tiny", 32, 32, 32)
WIDTHS = {64: "width64", 128: "tiny", 256: "width256", 512: "width512"}
AXES = {
    "episodes": {n: dataclasses.replace(PPO, rows=n) for n in (8, 16, 32, 64, 128)},
    "response tokens": {n: dataclasses.replace(PPO, response=n) for n in (16, 32, 64, 128, 256)},
    "width": {d: dataclasses.replace(PPO, size=size) for d, size in WIDTHS.items()},
    "completions": {k: dataclasses.replace(REWARD, rows=16 * k, completions=k) for k in (2, 4, 8, 16)},
}
BACKENDS = ("torch", "jax")


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A process per point, so that its peak memory is its own."""
    points = []
    for axis, works in AXES.items():
        for size, work in works.items():
            for backend in BACKENDS:
                log = args.logs / f"growth-{axis.split()[0]}-{size}-{backend}.log"
                process = Process(lockstep(backend, backend), work, args.models, Path(), args.device, args.threads, log)
                for _ in range(args.turns):
                    process.turn()
                found = process.close()
                seconds, peak = statistics.median(found["seconds"]), max(found["peak_mib"])
                spread = {"low": min(found["seconds"]), "high": max(found["seconds"])}
                point = {"axis": axis, "size": size, "backend": backend, "flops": work.flops, "seconds": seconds}
                points.append(point | spread | {"peak_mib": peak})
                print(f"{axis} {size}: {backend} {seconds:.3f} s, {peak:.0f} MiB", flush=True)
    return points


def curve(points: list[dict[str, Any]], axis: str, backend: str) -> list[dict[str, Any]]:
    return [point for point in points if (point["axis"], point["backend"]) == (axis, backend)]


def slope(points: list[dict[str, Any]]) -> float:
    return float(np.polyfit(np.log([p["flops"] for p in points]), np.log([p["seconds"] for p in points]), 1)[0])


def table(points: list[dict[str, Any]]) -> list[str]:
    lines = ["| what grows | | from | to | work | seconds | slope of time | last step | peak MiB |", "|" + "---|" * 9]
    for axis in AXES:
        for backend in BACKENDS:
            found = curve(points, axis, backend)
            first, last = found[0], found[-1]
            seconds, peak = (
                f"{first[key]:.{digits}f} to {last[key]:.{digits}f}" for key, digits in (("seconds", 3), ("peak_mib", 0))
            )
            lines.append(
                f"| {axis} | {backend} | {first['size']} | {last['size']} | x {last['flops'] / first['flops']:.0f} | {seconds} "
                f"| {slope(found):.2f} | {slope(found[-2:]):.2f} | {peak} |"
            )
    return lines


def picture(points: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(2, len(AXES), figsize=(13, 5.5), sharex="col")
    for column, axis in zip(axes.T, AXES, strict=True):
        for backend in BACKENDS:
            found = curve(points, axis, backend)
            sizes = [p["size"] for p in found]
            label = f"{backend}, slope {slope(found):.2f}"
            column[0].loglog(sizes, [p["seconds"] for p in found], "o-", color=COLOURS[f"lockstep {backend}"], label=label)
            column[1].loglog(sizes, [p["peak_mib"] for p in found], "o-", color=COLOURS[f"lockstep {backend}"])
        column[0].legend(fontsize=8)
        column[0].set_title("reward-model step" if axis == "completions" else "PPO iteration", fontsize=10)
        column[1].set_xlabel(axis)
        column[1].set_xticks(sizes, [str(size) for size in sizes])
        column[1].xaxis.set_minor_locator(NullLocator())
        for panel in column:
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak MiB of the process")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def report(points: list[dict[str, Any]], about: dict[str, Any], folder: Path) -> None:
    head = [
        "# Growth",
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['date']}; float32, medians of {about['turns']} turns.",
        "Written by `growth.py`, which says what the columns mean; `last step` is the slope between the two largest points.",
        "",
    ]
    (folder / "growth.md").write_text("\n".join(head + table(points)) + "\n", encoding="utf-8")
    picture(points, folder / "growth.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    reporting, measuring = commands.add_parser("report"), commands.add_parser("measure")
    for command in (reporting, measuring):
        command.add_argument("folder", type=Path, help="of this machine")
    measuring.add_argument("models", type=Path)
    measuring.add_argument("--turns", type=int, default=5)
    measuring.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    measuring.add_argument("--threads", type=int, default=os.cpu_count())
    measuring.add_argument("--logs", type=Path, default=Path("/tmp/lockstep-speed"))
    args = parser.parse_args()
    found = recorded(args, args.folder / "growth.json", measure, "turns")
    report(found["points"], found["machine"], args.folder)


if __name__ == "__main__":
    main()
