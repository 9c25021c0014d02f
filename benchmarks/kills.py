"""Kill real runs at random moments, start them again, and compare every bit with a run that nobody killed.

    python benchmarks/kills.py --kills 50 --backend torch,jax
    python benchmarks/kills.py --kills 20 --algorithm grpo    # kills in the stage of another algorithm, in PPO's place

One uninterrupted run per backend is the reference: a tiny pipeline (pretraining, SFT, reward model, PPO) with adaptive KL,
moving averages, pretraining mix and W&B offline. A kill then starts the same command in a fresh folder, into which the
reference's stages before the chosen one were copied, and ends its process group with SIGKILL

* at a random moment between the stage's first step and its end, or
* as soon as a checkpoint is being written (its ``.part`` folder is seen), or
* while the stage's result is written: from the first sight of ``.output.part`` to a few milliseconds after it.

In every second kill W&B's own process, which lives in a session of its own, is killed with it. The command is then started
again and runs to its end. What must be equal, for every stage: the bytes of each output file, the rows of metrics.jsonl (all
but timings), the bytes of samples.jsonl and health.jsonl, the results in done.json. What must hold: no more steps are
repeated than ``checkpoint_every`` allows, and W&B's offline log of the stage is one, under the stage's id, with each step
once and the numbers of metrics.jsonl. A kill that comes after the end of the run is not counted and tried again.

Each backend has a core to itself where there are enough. Writes ``benchmarks/kills.json`` and ``benchmarks/kills.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "framework"), str(ROOT / "plugins"), str(ROOT / "tests")]

from conftest import FAST_COMPILATION  # noqa: E402
from runs import DECODER, PPO_ONLY, TINY  # noqa: E402
from test_tracking import leveldb_log  # noqa: E402

STAGES = ("pretrain", "sft", "reward", "ppo")
PIPELINE = [
    *(override for override in TINY if not override.startswith("algorithm.")), *DECODER, *PPO_ONLY, "tracker=wandb",
    "samples_every=2", "sft.epochs=3", "reward.epochs=1.6", "sft.optimizer.ema_decay=0.9", "algorithm.optimizer.ema_decay=0.9",
]  # fmt: skip
ALGORITHMS = {
    "ppo": [
        "algorithm.iterations=10", "algorithm.batch_size=8", "algorithm.epochs=2", "algorithm.minibatches=2",
        "algorithm.ptx_coef=1.0", "algorithm.ptx_ratio=1", "algorithm.kl_target=0.5", "algorithm.kl_horizon=100",
    ],
    "grpo": [
        "algorithm=grpo", "algorithm.iterations=10", "algorithm.batch_size=4", "algorithm.samples=4", "algorithm.epochs=2",
        "algorithm.minibatches=2", "algorithm.extra_rounds=1",
    ],
    "dpo": ["algorithm=dpo", "algorithm.batch_size=8", "algorithm.epochs=3", "algorithm.heldout_examples=8"],
    "online_dpo": ["algorithm=online_dpo", "algorithm.iterations=10", "algorithm.batch_size=4", "algorithm.minibatches=2"],
}  # fmt: skip


def environment() -> dict[str, str]:
    """Of a run on one core, with this checkout's code."""
    folders = os.pathsep.join(map(str, (ROOT / "framework", ROOT / "plugins")))
    return os.environ | {"PYTHONPATH": folders, "XLA_FLAGS": FAST_COMPILATION, "OMP_NUM_THREADS": "1"}


class Bench:
    """The kills on one backend."""

    def __init__(self, backend: str, folder: Path, core: int | None, seed: int, algorithm: str):
        self.backend, self.folder, self.core, self.algorithm = backend, folder, core, algorithm
        self.random = random.Random(f"{seed} {backend}")
        self.environment = environment() | {
            "WANDB_MODE": "offline",
            **{name: str(folder / "wandb") for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")},
        }

    def command(self, runs: Path, every: int) -> list[str]:
        own = {"torch": "backend.threads=1", "jax": f"backend.compilation_cache={self.folder / 'compiled'}"}[self.backend]
        overrides = [
            *PIPELINE,
            *ALGORITHMS[self.algorithm],
            f"backend={self.backend}",
            own,
            f"checkpoint_every={every}",
            f"folder={runs}",
        ]
        return [sys.executable, "-m", "lockstep", "run", *overrides]

    def start(self, runs: Path, every: int) -> subprocess.Popen[bytes]:
        pin = functools.partial(os.sched_setaffinity, 0, {self.core}) if self.core is not None else None
        with open(runs.with_suffix(".log"), "ab") as log:
            return subprocess.Popen(
                self.command(runs, every), env=self.environment, stdout=log, stderr=subprocess.STDOUT,
                preexec_fn=pin, start_new_session=True,
            )  # fmt: skip

    def finish(self, runs: Path, every: int) -> str:
        """Run to the end; what was printed."""
        log = runs.with_suffix(".log")
        log.unlink(missing_ok=True)
        code = self.start(runs, every).wait()
        if code:
            raise SystemExit(f"exit code {code} of a run that nobody killed:\n{log.read_text(encoding='utf-8')[-3000:]}")
        return log.read_text(encoding="utf-8")

    def reference(self) -> None:
        """The run that nobody kills, and how long each stage takes from its first step on."""
        self.whole = self.folder / "whole"
        self.finish(self.folder / "warm-up", 1)  # fills the compilation cache
        process, first, done = self.start(self.whole, 1), {}, {}
        while process.poll() is None:
            for stage in STAGES:
                if (folder := find(self.whole, stage)) is not None:
                    if stage not in first and has_lines(folder):
                        first[stage] = time.perf_counter()
                    if stage not in done and (folder / "done.json").exists():
                        done[stage] = time.perf_counter()
            time.sleep(0.002)
        if process.returncode:
            raise SystemExit((self.whole.with_suffix(".log")).read_text(encoding="utf-8")[-3000:])
        self.seconds = {stage: done.get(stage, time.perf_counter()) - first[stage] for stage in STAGES}
        self.totals = {
            stage: json.loads((find(self.whole, stage) / "done.json").read_text(encoding="utf-8"))["steps"] for stage in STAGES
        }
        if wrong := wandb_problems(find(self.whole, "ppo")):
            raise SystemExit(f"the reference's W&B log: {wrong}")

    def kill(self, number: int) -> dict[str, Any]:
        """One kill and its continuation, as a row of the record; another try where the kill came too late."""
        how = self.random.choices(("random", "save", "output"), (50, 35, 15))[0]
        target = self.random.choices(STAGES[1:], (25, 25, 50) if self.algorithm == "ppo" else (0, 0, 100))[0]
        every = self.random.choice((1, 1, 2))
        runs = self.folder / f"kill-{number}"
        shutil.rmtree(runs, ignore_errors=True)
        for stage in STAGES[: STAGES.index(target)]:
            done = find(self.whole, stage)
            shutil.copytree(done, runs / "stages" / done.name, ignore=shutil.ignore_patterns("wandb"))
        process = self.start(runs, every)
        self.wait(process, lambda: (folder := find(runs, target)) is not None and has_lines(folder))
        service = children(process.pid) if number % 2 else []
        folder = find(runs, target)
        if how == "random":
            time.sleep(self.random.uniform(0, self.seconds[target]))
        elif how == "save":
            # The first is seen or not; so from the second save on, at most to the last but one.
            last = max(1, len(rows(find(self.whole, target) / "metrics.jsonl")) // every - 2)
            after = f"{self.random.randint(1, last) * every:08d}"
            self.wait(process, lambda: any(name > f".{after}" for name in saving(folder)))
        else:
            self.wait(process, lambda: (folder / ".output.part").exists() or (folder / "output").exists())
            time.sleep(self.random.uniform(0, 0.02))
        if process.poll() is not None:
            return self.kill(number)
        os.killpg(process.pid, signal.SIGKILL)
        for pid in service:
            with contextlib.suppress(ProcessLookupError):  # it ends by itself soon after its owner
                os.kill(pid, signal.SIGKILL)
        process.wait()

        killed = after_kill(runs, self.totals)
        if killed["stage"] is None:
            return self.kill(number)
        printed = self.finish(runs, every)
        went_on = re.search(rf"{killed['stage']} resumes at step (\d+) of", printed)
        began = int(went_on[1]) if went_on else 0
        problems = [p for stage in STAGES for p in different(find(self.whole, stage), find(runs, stage))]
        if began != killed["checkpoint"]:
            problems.append(f"went on at {began}, not at its last checkpoint")
        if killed["repeated"] > every:
            problems.append(f"{killed['repeated']} steps repeated")
        wandb = [p for stage in STAGES[STAGES.index(target) :] for p in wandb_problems(find(runs, stage))]
        row = {
            "backend": self.backend, "kill": number, "how": how, "checkpoint_every": every, **killed,
            "wandb_process_killed": bool(service), "equal": not problems, "wandb_whole": not wandb, "problems": problems + wandb,
        }  # fmt: skip
        if problems or wandb:
            print(f"kept: {runs}", flush=True)
        else:
            shutil.rmtree(runs)
        return row

    def wait(self, process: subprocess.Popen[bytes], until: Callable[[], bool]) -> None:
        while process.poll() is None and not until():
            time.sleep(0.0005)


def find(runs: Path, stage: str) -> Path | None:
    return next(iter(runs.glob(f"stages/{stage}-*")), None)


def has_lines(folder: Path) -> bool:
    file = folder / "metrics.jsonl"
    return file.exists() and file.stat().st_size > 0


def saving(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder / "checkpoints") if name.endswith(".part")]
    except FileNotFoundError:
        return []


def rows(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]] if file.exists() else []


def children(pid: int) -> list[int]:
    """Of W&B there is one: its service. Linux."""
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").glob("*")
        for child in (task / "children").read_text(encoding="utf-8").split()
    ]


def after_kill(runs: Path, totals: dict[str, int]) -> dict[str, Any]:
    """Where the kill came: the stage that is not done, its steps, its newest checkpoint, what was being written."""
    stage = next((s for s in STAGES if (f := find(runs, s)) is None or not (f / "done.json").exists()), None)
    folder = find(runs, stage) if stage else None
    found = {"stage": stage, "steps": 0, "checkpoint": 0, "repeated": 0, "during": "between stages"}
    if folder is None:
        return found
    steps = min(len(rows(folder / "metrics.jsonl")), totals[stage])  # a row after the last step is of the end
    whole = [int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit()]
    checkpoint = max(whole, default=0)
    during = "a step"
    if not has_lines(folder):
        during = "the start of the stage"
    if saving(folder):
        during = "a save"
    if (folder / ".output.part").exists() or (folder / "output").exists():
        during = "writing the result"
    return found | {"steps": steps, "checkpoint": checkpoint, "repeated": max(0, steps - checkpoint), "during": during}


def without_timings(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "seconds" and not name.startswith("perf/")}


def different(one: Path, other: Path) -> list[str]:
    """What of a stage's result is not equal, bit for bit."""
    if one.name != other.name:
        return [f"{one.name} became {other.name}"]
    problems = []
    files, others = ({str(p.relative_to(f)) for p in f.glob("output/**/*") if p.is_file()} for f in (one, other))
    if files != others:
        problems.append(f"files {sorted(files ^ others)}")
    names = [*sorted(files & others), "samples.jsonl", "health.jsonl"]
    problems += [name for name in names if (one / name).exists() and (one / name).read_bytes() != (other / name).read_bytes()]
    metrics = [[without_timings(row) for row in rows(f / "metrics.jsonl")] for f in (one, other)]
    if metrics[0] != metrics[1]:
        problems.append("metrics.jsonl")
    results = [json.loads((f / "done.json").read_text(encoding="utf-8")) for f in (one, other)]
    if any(without_timings(a["metrics"]) != without_timings(b["metrics"]) or a["steps"] != b["steps"] for a, b in [results]):
        problems.append("done.json")
    return [f"{one.name}: {problem}" for problem in problems]


def wandb_problems(folder: Path) -> list[str]:
    """What the stage's offline W&B log lacks or has too much of, read back from W&B's transaction log."""
    from wandb.proto.wandb_internal_pb2 import Record

    files = list(folder.glob("wandb/offline-run-*/*.wandb"))
    if len(files) != 1:
        return [f"{folder.name}: {len(files)} W&B logs"]
    records = [Record.FromString(content) for content in leveldb_log(files[0].read_bytes())]
    ids = {r.run.run_id for r in records if r.WhichOneof("record_type") == "run"}
    logged = [
        {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    metrics = rows(folder / "metrics.jsonl")
    problems = [] if ids == {folder.name} else [f"ids {ids}"]
    if [row["_step"] for row in logged] != [row["step"] for row in metrics]:
        problems.append(f"steps {[row['_step'] for row in logged]}")
    else:
        problems += [
            f"step {row['step']}: {name}"
            for row, there in zip(metrics, logged, strict=True)
            for name, value in row.items()
            if name != "seconds" and not same(there.get(name), value)
        ]
    return [f"{folder.name}: W&B {problem}" for problem in problems]


def same(logged: Any, value: float | None) -> bool:
    """JSON knows no NaN: metrics.jsonl has null, W&B a word."""
    return logged == value or (value is None and (isinstance(logged, str) or (logged is not None and math.isnan(logged))))


def table(kills: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| backend | stage | kills | in a step | in a save | at the start, between stages | writing the result | "
        "most steps repeated with checkpoint_every=1, 2 | bit-equal | W&B log whole |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for backend in dict.fromkeys(kill["backend"] for kill in kills):
        for stage in (*STAGES[1:], "all"):
            here = [k for k in kills if k["backend"] == backend and stage in (k["stage"], "all")]
            if not here:
                continue
            count = lambda *what: sum(k["during"] in what for k in here)  # noqa: E731, B023
            most = [max((k["repeated"] for k in here if k["checkpoint_every"] == every), default=0) for every in (1, 2)]
            equal, whole = sum(k["equal"] for k in here), sum(k["wandb_whole"] for k in here)
            lines.append(
                f"| {backend} | {stage} | {len(here)} | {count('a step')} | {count('a save')} | "
                f"{count('the start of the stage', 'between stages')} | {count('writing the result')} | "
                f"{most[0]}, {most[1]} | {equal} of {len(here)} | {whole} of {len(here)} |"
            )
    return lines


def head(title: str, seconds: float, packages: Sequence[str], where: str = "") -> list[str]:
    """The first lines of a record: what was run, when, of which code, how long and with what."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return [
        f"# {title}",
        "",
        f"{datetime.date.today()}, commit {commit or 'unknown'}, {seconds / 60:.0f} minutes{where}. {platform.system()}, Python "
        f"{platform.python_version()}, {versions}.",
        "",
        f"    python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}",
        "",
    ]


def write_rows(output: Path, rows: Iterable[dict[str, Any]]) -> None:
    """The record's JSON file, a line for each row."""
    lines = ",\n".join(map(json.dumps, rows))
    output.with_suffix(".json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def report(kills: list[dict[str, Any]], seconds: float, output: str) -> str:
    failed = [kill for kill in kills if kill["problems"]]
    packages = ("torch", "jax", "numpy", "safetensors", "wandb")
    return "\n".join(
        [
            *head("Killed at random moments", seconds, packages, " on one core per backend"),
            f"{len(kills)} kills with SIGKILL, {len(kills) - len(failed)} continuations equal to the uninterrupted run in every "
            "bit of every output file, every metric and sample, with one whole W&B log per stage. `kills.py` says what was "
            f"run, how the moments were chosen and what was compared; `{output}.json` has a row per kill.",
            "",
            *table(kills),
            "",
            *[f"* kill {kill['kill']} on {kill['backend']}: {'; '.join(kill['problems'])}" for kill in failed],
            "W&B's own process was killed too in every second kill. Offline, a log is whole because the stage's continuation "
            "writes a new one from metrics.jsonl and removes the earlier; how a server takes a resumed run was not tried here.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="on each backend")
    parser.add_argument("--backend", default="torch,jax")
    parser.add_argument("--algorithm", choices=tuple(ALGORITHMS), default="ppo", help="of the last stage, which is called ppo")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "kills", help="of the record: .json and .md")
    arguments = parser.parse_args()
    backends, started = arguments.backend.split(","), time.perf_counter()
    cores = sorted(os.sched_getaffinity(0))
    kills: list[dict[str, Any]] = []
    writing = threading.Lock()

    def run(number: int) -> None:
        name = backends[number]
        folder = Path(tempfile.mkdtemp(prefix=f"kills-{name}-"))
        bench = Bench(
            name, folder, cores[number % len(cores)] if len(cores) >= len(backends) else None, arguments.seed, arguments.algorithm
        )
        bench.reference()
        for kill in range(1, arguments.kills + 1):
            row = bench.kill(kill)
            with writing:
                kills.append(row)
                kills.sort(key=lambda row: (backends.index(row["backend"]), row["kill"]))
                write_rows(arguments.output, kills)  # so far, lest the record of many be lost with one
            where = f"{row['stage']} after step {row['steps']} in {row['during']}, went on at {row['checkpoint']}"
            said = "equal" if not row["problems"] else "; ".join(row["problems"])
            print(f"{name} {kill}/{arguments.kills}  {where}: {said}", flush=True)
        if not any(row["problems"] for row in kills if row["backend"] == name):
            shutil.rmtree(folder)

    with ThreadPoolExecutor(len(backends)) as pool:
        list(pool.map(run, range(len(backends))))
    text = report(kills, time.perf_counter() - started, arguments.output.name)
    arguments.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print("\n".join(table(kills)))
    sys.exit(any(kill["problems"] for kill in kills))


if __name__ == "__main__":
    main()
