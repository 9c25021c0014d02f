"""Lockstep beside what people would use instead, on the same work, in turns.

    python benchmarks/speed/models.py models/speed --smollm2 models/smollm2
    python benchmarks/speed/run.py models/speed --peers PEERS --output benchmarks/speed/MACHINE [--only ppo/tiny] [--rounds 7]
                                                                                                [--device cuda]

PEERS holds one virtual environment per peer (`README.md` says how they are made). For each work all contestants are started,
warm up, and then take turns: one unit of work each per round, so that a slow minute of the machine hits all alike. Beside
every work runs the ceiling: the largest rate of float32 matrix products and of reading memory, measured in the same rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker import WORK, Work, multiplies_bfloat16

HERE = Path(__file__).parent
SELF = Path(sys.executable)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A contestant: a script, the environment it runs in, and its options."""

    name: str
    script: str
    environment: str | None = None  # of the peers; None: this one
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def lockstep(name: str, backend: str, precision: str = "float32", **options: Any) -> Entry:
    return Entry(name, "with_lockstep.py", None, {"backend": backend, "precision": precision, **options})


CEILING = Entry("ceiling", "ceiling.py")


def trl(version: str, precision: str = "float32") -> Entry:
    suffix = "" if precision == "float32" else f" {precision}"
    return Entry(f"TRL {version}{suffix}", "with_trl.py", f"trl{version}", {"precision": precision})


TRANSFORMERS = Entry("transformers", "with_transformers.py", "trl1.16", {"precision": "float32"})
TUNIX = Entry("tunix", "with_tunix.py", "tunix", {"precision": "float32"})


def entries(name: str, device: str) -> list[Entry]:
    """The contestants of a work."""
    precisions = ["float32", "bfloat16"] if multiplies_bfloat16(device) else ["float32"]

    def own(suffix: str, precision: str, **options: Any) -> list[Entry]:
        return [lockstep(f"lockstep {name}{suffix}", name, precision, **options) for name in ("torch", "jax")]

    task = WORK[name].task
    same = [*own("", "float32"), lockstep("lockstep torch compiled", "torch", compile=True)]
    if task == "ppo":
        recommended = own(" recommended", precisions[-1], value_network="shared")
        return [*same, *recommended, trl("1.12"), *([TUNIX] if name == "ppo/tiny" else [])]
    all_own = same + (own(" bfloat16", "bfloat16") if "bfloat16" in precisions else [])
    both = [trl("1.16", precision) for precision in precisions]
    peers = {"generate": [TRANSFORMERS], "sft": both, "reward": [trl("1.16")], "grpo": both}
    return all_own + peers[task]


def groups(name: str, device: str, chosen: list[str] | None) -> list[list[Entry]]:
    """Who takes turns with whom: all with all, but of SmolLM2, of which few processes fit into memory, each entry of
    Lockstep's with the peers."""
    found = [entry for entry in entries(name, device) if chosen is None or entry.name in chosen]
    if WORK[name].size != "smollm2":
        return [[CEILING, *found]]
    own = [entry for entry in found if entry.script == "with_lockstep.py"]
    peers = [entry for entry in found if entry not in own]
    return [[CEILING, entry, *peers] for entry in own]


def interpreter(entry: Entry, peers: Path) -> tuple[Path, dict[str, str]]:
    """The Python that runs it, and the environment variables that find its packages: of a virtual environment, or of a folder of
    packages beside those that are here."""
    if entry.environment is None:
        return SELF, {}
    folder = peers / entry.environment
    python = folder / "bin" / "python"
    if python.exists():
        return python, {"PYTHONPATH": ""}
    return SELF, {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))}


class Process:
    """A contestant at work. Its standard error goes to a file beside the results."""

    def __init__(
        self,
        entry: Entry,
        work: Work,
        models: Path,
        peers: Path,
        device: str,
        threads: int,
        log: Path,
        until: float | None = None,
    ):
        python, packages = interpreter(entry, peers)
        options = {"threads": threads, **entry.options}
        spec = {"work": dataclasses.asdict(work), "options": options, "device": device, "models": str(models)}
        # Of several cards TRL would use all. JAX takes most of one's memory at once, and would leave the others none.
        card = {"CUDA_VISIBLE_DEVICES": "" if device == "cpu" else "0", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **card, **os.environ, **packages}
        self.entry, self.log, self.until = entry, log, until
        log.parent.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [python, HERE / entry.script, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w", encoding="utf-8"),
            text=True,
            env=environment,
        )
        started = time.perf_counter()
        self.versions = self.read()["ready"]
        self.warm_up = time.perf_counter() - started
        self.turns: list[dict[str, Any]] = []

    def read(self) -> dict[str, Any]:
        """Its next answer; it ends if there is none by ``until``, a time of `time.monotonic`."""
        patience = None if self.until is None else threading.Timer(max(0.0, self.until - time.monotonic()), self.process.kill)
        if patience:
            patience.start()
        line = self.process.stdout.readline()
        if patience:
            patience.cancel()
        if not line:
            raise SystemExit(f"{self.entry.name} ended: {self.log.read_text(encoding='utf-8')[-2000:]}")
        return json.loads(line)

    def turn(self) -> dict[str, Any]:
        self.turns.append(self.ask("go"))
        return self.turns[-1]

    def ask(self, what: str) -> dict[str, Any]:
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> dict[str, Any]:
        self.process.stdin.close()
        self.process.wait()
        facts = {"name": self.entry.name, "precision": self.entry.options.get("precision", "float32"), "versions": self.versions}
        turns = {key: [round(turn[key], 5) for turn in self.turns] for key in self.turns[0]}
        return facts | {"warm_up_seconds": round(self.warm_up, 2)} | turns


def contest(name: str, chosen: list[Entry], args: argparse.Namespace) -> list[dict[str, Any]]:
    work, logs = WORK[name], args.logs / name.replace("/", "-")
    processes = []
    for entry in chosen:
        print(f"{name}: {entry.name} warms up", flush=True)
        log = logs / f"{entry.name.replace(' ', '-')}.log"
        processes.append(Process(entry, work, args.models, args.peers, args.device, args.threads, log))
    for number in range(args.rounds):
        order = processes if number % 2 == 0 else processes[::-1]
        for process in order:
            process.turn()
        print(f"{name}: round {number + 1}/{args.rounds}", *(f"{p.turns[-1]['seconds']:.3f}" for p in processes), flush=True)
    return [process.close() for process in processes]


def machine(args: argparse.Namespace) -> dict[str, Any]:
    pairs = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if ":" in line]
    cpu = {key.strip(): value.strip() for key, value in pairs}
    named = f"{cpu['model name']} (family {cpu['cpu family']}, model {cpu['model']})"
    if args.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        named = f"{subprocess.check_output(query, text=True).splitlines()[0]} beside {named}"
    return {"cpu": named, "cores": args.threads, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def recorded(args: argparse.Namespace, file: Path, measure: Callable[[argparse.Namespace], Any], repeats: str) -> Any:
    """The content of ``file``, {"machine", "points"}, which the command `measure` writes anew. ``repeats`` is the argument that
    says how often a point is measured."""
    if args.command == "measure":
        file.parent.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine(args) | {repeats: getattr(args, repeats)}, "points": measure(args)}
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="a folder for this machine")
    parser.add_argument("--logs", type=Path, default=Path("/tmp/lockstep-speed"))
    parser.add_argument("--only", nargs="*", default=list(WORK))
    parser.add_argument("--contestants", nargs="*", help="names; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in args.only:
        found = [contest(name, group, args) for group in groups(name, args.device, args.contestants)]
        results[name] = {"work": dataclasses.asdict(WORK[name]), "machine": machine(args), "groups": found}
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        for contestant in [contestant for group in found for contestant in group[1:]]:
            print(f"{name}: {contestant['name']:28s} {statistics.median(contestant['seconds']):8.3f} s")


if __name__ == "__main__":
    main()
