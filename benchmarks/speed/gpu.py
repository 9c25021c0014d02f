"""Everything that one card can tell in one sitting: checks, ceilings, and Lockstep beside TRL. Written for one NVIDIA GPU.

    benchmarks/gpu.sh OUTPUT [--peers PEERS] [--seconds 700] [--only sft/1.5b ppo/1.5b] [--profiles]
    benchmarks/gpu.sh OUTPUT --device cpu --sizes tiny       # a rehearsal

Contestants run in processes of their own, those of Lockstep in turns, the most telling work first; what does not fit in the time
is left out, and the last lines say what. PEERS has a folder `trl1.12` and a folder `trl1.16`, each a virtual environment or the
target of `pip install --target`. OUTPUT gets `checks.json`, `results.json` (after each group), `results.md` and `results.png`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import report
import torch
from run import CEILING, TRANSFORMERS, Entry, Process, lockstep, machine, trl
from worker import Work

HERE = Path(__file__).parent
ROUNDS = 4
PATIENCE = 150.0
"""Seconds for a group to warm up: loading and compiling models of 1.5 billion parameters."""

ROWS = {"0.1b": 64, "0.6b": 32, "1.5b": 16}
"""Of PPO and GRPO: as many as TRL's five networks and its logits leave room for on one card."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Contestants that warm up at the same time and then take turns: their models fit on the card together."""

    work: Work
    entries: list[Entry]

    @property
    def name(self) -> str:
        return f"{self.work.task}/{self.work.size}"


def groups(sizes: list[str], device: str, cache: Path) -> list[Group]:
    """The most telling first: the largest model's training, decoding and PPO, then smaller ones."""
    on_card = device == "cuda"
    precision, prompt, response, text = ("bfloat16", 128, 128, 1023) if on_card else ("float32", 8, 8, 31)
    works = {
        "sft": lambda size: Work("sft", size, 8 if on_card else 4, 1, text),
        "generate": lambda size: Work("generate", size, ROWS.get(size, 8), prompt, response),  # PPO's, whose programs JAX keeps
        "ppo": lambda size: Work("ppo", size, ROWS.get(size, 8), prompt, response, epochs=2),
        "grpo": lambda size: Work("grpo", size, ROWS.get(size, 8), prompt, response, completions=8),
    }
    options = {"value_network": "shared", "compilation_cache": str(cache)}
    torch_only = [lockstep("lockstep torch", "torch", precision, **options)]
    torch_only += [lockstep("lockstep torch compiled", "torch", precision, compile=True, **options)]
    own = [torch_only, [lockstep("lockstep jax", "jax", precision, **options)]]
    peers = {
        "sft": trl("1.16", precision),
        "generate": dataclasses.replace(TRANSFORMERS, options={"precision": precision}),
        "ppo": trl("1.12", precision),
        "grpo": trl("1.16", precision),
    }
    largest_first = list(reversed(sizes))
    found = [(task, size, entries) for size in largest_first for entries in (*own, None) for task in ("sft", "generate", "ppo")]
    found += [("grpo", size, entries) for size in largest_first for entries in (*own, None)]
    return [Group(works[task](size), entries or [peers[task]]) for task, size, entries in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--peers", type=Path, default=Path("peers"))
    parser.add_argument("--seconds", type=float, default=700.0, help="for all of it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sizes", nargs="*", default=["0.1b", "0.6b", "1.5b"])
    parser.add_argument("--only", nargs="*", help="such as sft/1.5b; default: all")
    parser.add_argument("--profiles", action="store_true", help="write the kernels of a step, by their time, to profiles.txt")
    args = parser.parse_args()
    args.threads, end = os.cpu_count(), time.monotonic() + args.seconds
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        args.models = Path(folder)
        sizes = ["grouped", *args.sizes]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            models.write(args.models, sizes[:1], dtype="bfloat16", device=args.device)
            checked = pool.submit(checks, args, end)
            models.write(args.models, sizes[1:], dtype="bfloat16", device=args.device)
            checked.result()
        if args.device == "cuda":
            torch.cuda.empty_cache()  # what writing them took
        said(f"models written and checks made, {end - time.monotonic():.0f} s left")
        measured, left_out = race(args, end)
    if measured:
        report.main(args.output)
    said(f"{measured} contestants measured; left out: {', '.join(left_out) or 'none'}. It is in {args.output}.")


def said(text: str) -> None:
    print(text, flush=True)


def checks(args: argparse.Namespace, end: float) -> None:
    def of(backend: str) -> list[dict[str, Any]]:
        command = [sys.executable, HERE / "gpu_checks.py", backend, args.device, args.models / "grouped" / "policy"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, min(120, end - time.monotonic())))
            lines, error = done.stdout.splitlines(), done.stderr[-2000:] if done.returncode else ""
        except subprocess.TimeoutExpired as late:
            lines, error = (late.stdout or b"").decode().splitlines(), "no answer in time"
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [*found, {"backend": backend, "error": error}] if error else found

    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = [each for backend in pool.map(of, ("torch", "jax")) for each in backend]
    said("\n".join(map(str, found)))
    (args.output / "checks.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def race(args: argparse.Namespace, end: float) -> tuple[int, list[str]]:
    """Returns how many were measured, and the names of the others."""
    here, results, left_out, measured = machine(args), {}, [], 0
    todo = groups(args.sizes, args.device, args.models / "programs")
    todo = [group for group in todo if args.only is None or group.name in args.only]
    ceiling = next(iter(turns(args, Group(todo[0].work, [CEILING]), end)), None)
    said(f"ceilings: {ceiling}")
    for group in todo:
        found = turns(args, group, end) if ceiling else []
        names = {each["name"] for each in found}
        left_out += [f"{group.name} {entry.name}" for entry in group.entries if entry.name not in names]
        if not found:
            continue
        measured += len(found)
        record = {"work": dataclasses.asdict(group.work), "machine": here, "groups": [[ceiling]]}
        results.setdefault(group.name, record)["groups"][0].extend(found)
        (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        for each in found:
            said(f"{group.name} {each['name']}: {statistics.median(each['seconds']):.4f} s, {end - time.monotonic():.0f} s left")
    return measured, left_out


def turns(args: argparse.Namespace, group: Group, end: float) -> list[dict[str, Any]]:
    """The records of those that did not fail and were done in time."""
    until = min(end, time.monotonic() + PATIENCE)

    def guarded(entry: Entry, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (SystemExit, OSError, KeyError) as error:
            said(f"{group.name} {entry.name}: {str(error)[-1500:]}")
            return None

    def started(entry: Entry) -> Process | None:
        log = args.output / "logs" / f"{group.name.replace('/', '-')}-{entry.name}.log".replace(" ", "-")
        make = functools.partial(Process, entry, group.work, args.models, args.peers, args.device, args.threads, log, until)
        return guarded(entry, make)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        processes = [process for process in pool.map(started, group.entries) if process]
    for _ in range(ROUNDS):
        processes = [each for each in processes if guarded(each.entry, each.turn)]
    for each in processes:
        if args.profiles and each.entry.script == "with_lockstep.py":
            said_of = guarded(each.entry, functools.partial(each.ask, "profile")) or {"profile": "none\n"}
            with (args.output / "profiles.txt").open("a", encoding="utf-8") as file:
                file.write(f"# {group.name} {each.entry.name}\n\n{said_of['profile']}\n")
    return [record for each in processes if (record := guarded(each.entry, each.close))]


if __name__ == "__main__":
    main()
