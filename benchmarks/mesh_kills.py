"""Kill one process of a run on several at random moments, or all of them, start the same command again, and compare every bit
with a run that nobody killed.

    python benchmarks/mesh_kills.py --kills 20
    python benchmarks/mesh_kills.py --kills 20 --backend jax

The reference is an uninterrupted run of the miniature's pipeline (pretraining, SFT, reward model, PPO), tiny, on two processes:
torch starts them by `lockstep run`, JAX by torchrun. In the series "one", one worker is killed with SIGKILL, rank 0 and rank 1
in turn: the launcher has to notice, end the other and say which one died. In the series "all", the launcher and its workers are
killed. A run is killed again and again, each time after up to `STEPS` more steps and up to `SECONDS` more, until it is done
before its kill and is compared; then the next run begins. After the last kill of a series its run goes to the end undisturbed.

What must be equal, for every stage: the bytes of each output file, weights among them, the rows of metrics.jsonl (all but
timings), the bytes of samples.jsonl and health.jsonl, the results in done.json. Linux only: it finds workers in /proc. Writes
``benchmarks/mesh_kills.json`` and ``benchmarks/mesh_kills.md``, for JAX ``mesh_kills_jax``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kills import (
    DECODER,
    PPO_ONLY,
    ROOT,
    STAGES,
    TINY,
    after_kill,
    children,
    different,
    environment,
    find,
    head,
    write_rows,
)  # fmt: skip

PROCESSES = 2
RUN = [
    *(override for override in TINY if not override.startswith("algorithm.")), *DECODER, *PPO_ONLY, "samples_every=2",
    "sft.optimizer.ema_decay=0.9", "algorithm.optimizer.ema_decay=0.9", "algorithm.iterations=6", "algorithm.batch_size=7",
    "algorithm.epochs=2", "algorithm.minibatches=1", "algorithm.ptx_coef=1.0", "algorithm.ptx_ratio=1",
    "algorithm.kl_target=0.5", "algorithm.kl_horizon=100", "backend.device=cpu", f"backend.mesh.fsdp={PROCESSES}",
    "checkpoint_every=1",
]  # fmt: skip
"""A batch of 7 rows: the processes have four each, one of them twice."""
BACKENDS = {
    "torch": (
        ["-m", "lockstep", "run", "backend=torch", "backend.threads=1"],
        "Process {rank} of {count} was killed by SIGKILL first",
    ),
    "jax": (
        [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(PROCESSES),
            "-m",
            "lockstep",
            "run",
            "backend=jax",
        ],
        "rank      : {rank} (local_rank: {rank})",
    ),
}
"""How its processes are started, and what then says which of them died first."""
STEPS, SECONDS = 5, 1.5
LIMIT = 300.0
"""For a run to the end, and for a launcher to notice that a worker is gone."""


def start(backend: str, folder: Path) -> subprocess.Popen[bytes]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"  # the last one counts
    command = [sys.executable, *BACKENDS[backend][0], *RUN, f"folder={folder}"]
    with open(log(folder), "wb") as file:
        return subprocess.Popen(command, env=environment() | {"XLA_FLAGS": flags}, stdout=file, stderr=subprocess.STDOUT)


def log(folder: Path) -> Path:
    return folder.with_suffix(".log")


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    if code := process.wait(LIMIT):
        raise SystemExit(f"exit code {code} of a run that nobody killed:\n{log(folder).read_text(encoding='utf-8')[-3000:]}")


def workers(launcher: int) -> dict[int, int]:
    """{rank: process id}"""
    found = {}
    for child in children(launcher):
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found |= {int(each.removeprefix(b"RANK=")): child for each in variables if each.startswith(b"RANK=")}
    return found


def progress(folder: Path) -> int:
    """Steps and stages that are done."""
    return sum(file.read_bytes().count(b"\n") for file in folder.glob("stages/*/metrics.jsonl")) + len(
        list(folder.glob("stages/*/done.json"))
    )


def kill(
    process: subprocess.Popen[bytes],
    folder: Path,
    ranks: list[int],
    steps: int,
    seconds: float,
    totals: dict[str, int],
    says: str,
) -> dict[str, Any] | None:
    """Kill these ranks, or everything if that is all of them, once the run has said what it will do, has done as many steps more,
    and ``seconds`` have passed. ``totals`` are the steps of each stage; ``says`` is the launcher's word of who died. A row of the
    record; None if the run was done before."""
    goal = progress(folder) + steps
    while process.poll() is None and not (b"to do" in log(folder).read_bytes() and len(workers(process.pid)) == PROCESSES):
        time.sleep(0.01)
    while process.poll() is None and progress(folder) < goal:
        time.sleep(0.01)
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    there = workers(process.pid) if process.poll() is None else {}
    if len(there) < PROCESSES:
        finish(process, folder)
        return None
    if len(ranks) == PROCESSES:
        process.kill()
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(there[rank], signal.SIGKILL)
    killed, problems = time.monotonic(), []
    try:
        code = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        problems.append(f"the launcher was still there {LIMIT:.0f} s after rank {ranks[0]} was killed")
        for pid in (process.pid, *there.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        code = process.wait()
    if code == 0:
        return None  # it came too late
    waited, said = time.monotonic() - killed, log(folder).read_text(encoding="utf-8")
    while any(alive(pid) for pid in there.values()):
        if time.monotonic() > killed + LIMIT:
            raise SystemExit(f"workers of {folder} outlive their launcher")
        time.sleep(0.01)
    if len(ranks) == 1 and says.format(rank=ranks[0], count=PROCESSES) not in said:
        problems.append(f"it does not say that process {ranks[0]} was killed: {said[-500:]}")
    where = after_kill(folder, totals)
    return {"ranks": ranks, "seconds": round(waited, 2), **where, "problems": problems}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def series(
    name: str, backend: str, kills: int, whole: Path, dice: random.Random
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of kills, and of runs with the problems found at their ends."""
    found: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    totals = {stage: json.loads((find(whole, stage) / "done.json").read_text(encoding="utf-8"))["steps"] for stage in STAGES}
    while len(found) < kills:
        folder, before = whole.with_name(f"{name}-{len(runs)}"), len(found)
        while True:
            process = start(backend, folder)
            if len(found) == kills:
                finish(process, folder)
                break
            ranks = list(range(PROCESSES)) if name == "all" else [len(found) % PROCESSES]
            moment = dice.randint(0, STEPS), dice.uniform(0, SECONDS)
            if (row := kill(process, folder, ranks, *moment, totals, BACKENDS[backend][1])) is None:
                break
            found.append({"series": name, "run": len(runs), "kill": len(found) + 1, **row})
            print(json.dumps(found[-1]), flush=True)
        problems = [p for stage in STAGES for p in different(find(whole, stage), find(folder, stage))]
        runs.append({"series": name, "run": len(runs), "kills": len(found) - before, "problems": problems})
        print(json.dumps(runs[-1]), flush=True)
        if not problems:
            shutil.rmtree(folder)
    return found, runs


def report(backend: str, kills: list[dict[str, Any]], runs: list[dict[str, Any]], seconds: float) -> str:
    lines = [
        *head("One process of two killed, and all", seconds, (backend, "numpy", "safetensors")),
        "`mesh_kills.py` says what was run, how the moments were chosen and what was compared; the JSON file beside this has a "
        "row per kill and per run.",
        "",
        f"| killed | kills | {' | '.join(f'in {stage}' for stage in STAGES)} | most steps repeated | seconds until the launcher "
        "ended: median, most | runs equal in every bit |",
        "|---" * (len(STAGES) + 5) + "|",
    ]
    for name, words in (("one", "one process"), ("all", "all, and the launcher")):
        here, ends = ([row for row in rows if row["series"] == name] for rows in (kills, runs))
        took = [row["seconds"] for row in here]
        stages = " | ".join(str(sum(row["stage"] == stage for row in here)) for stage in STAGES)
        lines.append(
            f"| {words} | {len(here)} | {stages} | {max(row['repeated'] for row in here)} | "
            f"{statistics.median(took):.1f}, {max(took):.1f} | {sum(not row['problems'] for row in ends)} of {len(ends)} |"
        )
    wrong = [row for row in (*kills, *runs) if row["problems"]]
    return "\n".join([*lines, "", *(f"* {row['series']}, run {row['run']}: {'; '.join(row['problems'])}" for row in wrong), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="in each series")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--backend", choices=BACKENDS, default="torch")
    parser.add_argument("--output", type=Path, help="of the record: .json and .md")
    arguments = parser.parse_args()
    backend = arguments.backend
    output: Path = arguments.output or ROOT / "benchmarks" / ("mesh_kills" if backend == "torch" else f"mesh_kills_{backend}")
    output.parent.mkdir(parents=True, exist_ok=True)
    began, folder = time.perf_counter(), Path(tempfile.mkdtemp(prefix="mesh-kills-"))
    whole = folder / "whole"
    finish(start(backend, whole), whole)
    kills: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for name in ("one", "all"):
        more, ends = series(name, backend, arguments.kills, whole, random.Random(f"{arguments.seed} {name}"))
        kills += more
        runs += ends
        write_rows(output, (*kills, *runs))
    text = report(backend, kills, runs, time.perf_counter() - began)
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    if any(row["problems"] for row in (*kills, *runs)):
        raise SystemExit(f"kept: {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
