"""Everything that one card can tell in one sitting: checks, ceilings, and Lockstep beside TRL. Written for one NVIDIA GPU.

    benchmarks/gpu.sh OUTPUT [--peers PEERS] [--seconds 700]
    benchmarks/gpu.sh OUTPUT --device cpu --sizes tiny       # a rehearsal

Contestants run one after the other, the most telling first, each in a process of its own; what does not fit into the time is left
out, and the last lines say what. PEERS has a folder `trl1.12` and a folder `trl1.16`, each a virtual environment or the target of
`pip install --target`. OUTPUT gets `checks.json`, `results.json` (after each contestant), `results.md` and `results.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import models
import report
from run import CEILING, Entry, Process, lockstep, machine, trl
from worker import Work

HERE = Path(__file__).parent
ROUNDS = 5
PATIENCE = 150.0
"""Seconds for a contestant: loading and compiling a model of 1.5 billion parameters, and its rounds."""


@dataclasses.dataclass(frozen=True)
class Contest:
    work: Work
    entry: Entry


def contests(sizes: list[str], device: str) -> list[Contest]:
    """The most telling first: the largest model's training and decoding, PPO and GRPO beside TRL, then smaller ones."""
    on_card = device == "cuda"
    precision, rows, prompt, response, text = ("bfloat16", 64, 128, 128, 1023) if on_card else ("float32", 8, 8, 8, 31)
    works = {
        "sft": lambda size: Work("sft", size, 8 if on_card else 4, 1, text),
        "generate": lambda size: Work("generate", size, rows, prompt, 2 * response if on_card else response),
        "ppo": lambda size: Work("ppo", size, rows, prompt, response, epochs=2),
        "grpo": lambda size: Work("grpo", size, rows, prompt, response, completions=8),
    }
    own = [lockstep(f"lockstep {name}", name, precision, value_network="shared") for name in ("torch", "jax")]
    peers = {"sft": [trl("1.16", precision)], "generate": [], "ppo": [trl("1.12", precision)], "grpo": [trl("1.16", precision)]}
    found = [(task, size) for size in reversed(sizes) for task in ("sft", "generate")]
    found += [(task, size) for size in reversed(sizes) for task in ("ppo", "grpo")]
    return [Contest(works[task](size), entry) for task, size in found for entry in [*own, *peers[task]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--peers", type=Path, default=Path("peers"))
    parser.add_argument("--seconds", type=float, default=700.0, help="for all of it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", nargs="*", default=["0.1b", "0.6b", "1.5b"])
    args = parser.parse_args()
    args.threads, end = os.cpu_count(), time.monotonic() + args.seconds
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        args.models = Path(folder)
        models.write(args.models, ["tiny", *(size for size in args.sizes if size != "tiny")], dtype="bfloat16")
        said(f"models written, {end - time.monotonic():.0f} s left")
        checks(args, end)
        measured, left_out = race(args, end)
    if measured:
        report.main(args.output)
    said(f"{measured} contestants measured; left out: {', '.join(left_out) or 'none'}. It is in {args.output}.")


def said(text: str) -> None:
    print(text, flush=True)


def checks(args: argparse.Namespace, end: float) -> None:
    found = []
    for backend in ("torch", "jax"):
        command = [sys.executable, HERE / "gpu_checks.py", backend, args.device, args.models / "tiny" / "policy"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, min(120, end - time.monotonic())))
            lines, error = done.stdout.splitlines(), done.stderr[-2000:] if done.returncode else ""
        except subprocess.TimeoutExpired:
            lines, error = [], "no answer in time"
        found += [json.loads(line) for line in lines if line.startswith("{")]
        if error:
            found.append({"backend": backend, "error": error})
        said("\n".join(map(str, found[-8:])))
    (args.output / "checks.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def race(args: argparse.Namespace, end: float) -> tuple[int, list[str]]:
    """Returns how many were measured, and the names of the others."""
    here, results, left_out, measured = machine(args), {}, [], 0
    all_contests = contests(args.sizes, args.device)
    ceiling = turns(args, CEILING, all_contests[0].work, end)
    said(f"ceilings: {ceiling}")
    for contest in all_contests:
        work, name = contest.work, f"{contest.work.task}/{contest.work.size}"
        found = turns(args, contest.entry, work, end) if ceiling else None
        if found is None:
            left_out.append(f"{name} {contest.entry.name}")
            continue
        measured += 1
        result = results.setdefault(name, {"work": dataclasses.asdict(work), "machine": here, "groups": [[ceiling]]})
        result["groups"][0].append(found)
        (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        said(f"{name} {contest.entry.name}: {sorted(found['seconds'])[ROUNDS // 2]:.4f} s, {end - time.monotonic():.0f} s left")
    return measured, left_out


def turns(args: argparse.Namespace, entry: Entry, work: Work, end: float) -> dict[str, Any] | None:
    """The record of a contestant; None if it failed or was not done in time."""
    log = args.output / "logs" / f"{work.task}-{work.size}-{entry.name}.log".replace(" ", "-")
    try:
        until = min(end, time.monotonic() + PATIENCE)
        process = Process(entry, work, args.models, args.peers, args.device, args.threads, log, until)
        for _ in range(ROUNDS):
            process.turn()
        return process.close()
    except (SystemExit, OSError) as error:
        said(f"{work.task}/{work.size} {entry.name}: {error}")
        return None


if __name__ == "__main__":
    main()
