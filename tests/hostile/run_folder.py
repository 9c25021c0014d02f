"""Damaged run folders, read by everything that reads one: compare, the cache, resuming, and the Python API."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from hostile import folders
from hostile.clear import only_clear_errors
from hostile.values import damaged, damages, edited, edits
from lockstep.api import policies, results
from lockstep.commands.cache import stored, stored_stages
from lockstep.commands.run.sweeps import SweepFolder
from lockstep.config.compose import compose
from lockstep.reporting.compare import claims, reading, tables, tidy, versus
from lockstep.reporting.compare.groups import group
from lockstep.reporting.console import Console
from lockstep.reporting.health import Health
from lockstep.runs.experiment import Experiment, finished
from lockstep.runs.store import Records, RunFolder
from lockstep.storage.files import write_json
from lockstep.storage.records import METRICS, read_rows

NAME = "demo"
LINES = [
    json.dumps({"step": step, "seconds": 0.1, "loss": 2.0 - step, "objective/score": None if step else 0.5}) + "\n"
    for step in range(3)
]
STATE = {"positions": {"metrics": len(LINES[0]), "samples": 0, "health": 0}}


@functools.cache
def config() -> dict[str, Any]:
    return compose(["tracker=none", "~stages.ppo_ptx", f"name={NAME}", f"folder={folders.WORK / 'runs'}"])


@functools.cache
def run() -> Path:
    """A run folder as `lockstep run` leaves it, with its stages beside it; ``ppo`` is at its second checkpoint."""
    experiment = Experiment(config())
    folder = RunFolder(experiment.root, NAME)
    folder.record |= {
        "experiment": "demo",
        "seed": 0,
        "backend": {"name": "torch"},
        "command": "lockstep run",
        "status": "stopped",
    }
    folder.write_config(config())
    write_json(folder.path / "stages.json", experiment.identities)
    for stage in experiment.stages.values():
        there = experiment.folders[stage.name]
        write_json(there.path / "stage.json", experiment.identities[stage.name])
        (there.path / "metrics.jsonl").write_text("".join(LINES))
        (there.path / "health.jsonl").touch()
        facts = {"kind": stage.kind, "algorithm": "ppo", "identity": there.path.name, "produces": stage.produces, "health": []}
        if stage.name == "ppo":
            for step in (1, 2):
                there.save(step, lambda checkpoint: (checkpoint / "learner.safetensors").write_bytes(b"weights"), STATE)
            folder.stage(stage.name, there, status="stopped", **facts)
            continue
        with there.write_output() as output:
            if stage.name == "evaluate":
                write_json(output / "evaluation.json", EVALUATION)
                (output / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n")
            else:
                write_json(output / "output.json", {"kind": stage.produces, "policy": "decoder"})
            if stage.name == "sft":
                shutil.copytree(folders.checkpoint(), output, dirs_exist_ok=True)
        there.finish({"seconds": 1.0, "memory": 1 << 20, "steps": 3, "data": {}, "metrics": {"loss": 1.0}, "health": []})
        folder.stage(stage.name, there, status="done", seconds=1.0, **facts)
    write_json(experiment.root / SWEEP / "sweep.json", JOBS)
    return folder.path


SWEEP = Path("sweeps/0a1b2c3d")
JOBS = {
    "command": "lockstep run -m seed=0,1", "started": "2026-11-28T00:00:00+00:00",
    "jobs": [
        {"overrides": ["seed=0"], "run": NAME, "status": "done", "error": None, "objective": 0.5},
        {"overrides": ["seed=1"], "run": None, "status": "failed", "error": "it stopped"},
    ],
}  # fmt: skip
GOOD = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 10}
EVALUATION = {
    "baseline": "sft",
    "splits": {"heldout": {name: {"gold": GOOD, "kl": GOOD, "score": GOOD} for name in ("pretrain", "sft", "ppo")}},
    "reward_model": {"accuracy/gold": GOOD, "ece": {"mean": 0.1, "n": 5}},
}
SAMPLE = {"policy": "ppo", "split": "heldout", "prompt": "Hi", "response": "Hello", "gold": 0.1, "score": None}


@functools.cache
def files() -> list[Path]:
    root = run().parent
    return sorted(file.relative_to(root) for file in root.rglob("*") if file.is_file() and file.name != "lock")


def read_as(file: Path, content: str) -> Any:
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in content.splitlines()]
    return yaml.safe_load(content) if file.suffix == ".yaml" else json.loads(content)


def written_as(file: Path, tree: Any) -> str:
    if file.suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in tree)
    return yaml.safe_dump(tree, sort_keys=False) if file.suffix == ".yaml" else json.dumps(tree)


Input = tuple[str, Path, tuple[str, Any]]


def harms(file: Path) -> st.SearchStrategy[tuple[str, Any]]:
    """What happens to a file."""
    found = [
        st.tuples(st.just("bytes"), damages),
        st.tuples(st.just("becomes"), st.sampled_from(files())),
        st.sampled_from((("gone", None), ("folder", None), ("itself", None))),
    ]
    if file.suffix in (".json", ".yaml", ".jsonl") and (tree := read_as(file, (run().parent / file).read_text())):
        found += 4 * [st.tuples(st.just("tree"), edits(tree))]
    return st.one_of(found)


INPUTS: st.SearchStrategy[Input] = st.deferred(
    lambda: st.sampled_from(files()).flatmap(lambda file: st.tuples(st.sampled_from(sorted(READERS)), st.just(file), harms(file)))
)


def harm(file: Path, what: str, how: Any) -> None:
    content = file.read_bytes()
    file.unlink()
    if what == "bytes":
        file.write_bytes(damaged(content, how))
    elif what == "tree":
        file.write_text(written_as(file, edited(read_as(file, content.decode()), how)), encoding="utf-8", errors="surrogatepass")
    elif what == "becomes":
        shutil.copy(run().parent / how, file)
    elif what == "folder":
        file.mkdir()
    elif what == "itself":
        file.symlink_to(file.name)


def copy(into: Path) -> Path:
    """The folder of runs, which readers may change."""
    return shutil.copytree(run().parent, into / "runs")


def check(given: Input) -> None:
    reader, file, (what, how) = given
    with tempfile.TemporaryDirectory(dir=folders.WORK) as folder:
        root = copy(Path(folder))
        harm(root / file, what, how)
        with only_clear_errors(NAME, file.name, file.parts[-2]):
            READERS[reader](root)


def comparison(root: Path) -> None:
    found = group(reading.read([root]))
    against = versus.against_baseline(found, versus.pairs(found, None))
    for table in tables.all_tables(found, claims.find(found), against).values():
        Console().out.print(tables.to_rich(table))
        tables.to_markdown(table)
    print(claims.headline(found), *found.problems)
    tidy.table(found)


def sweep(root: Path) -> None:
    folder = SweepFolder(root / SWEEP)
    folder.note(["seed=1"], status="running", error=None)
    folder.jobs("failed", "running")
    print(*reading.read([root / SWEEP]).problems)


def cache(root: Path) -> None:
    Console().out.print(stored_stages(stored.entries(root, stored.users(root))))
    stored.unused(root)


def again(root: Path) -> None:
    """What the same command does, before it opens a model."""
    settings = {**config(), "folder": str(root)}
    if finished(settings):
        return
    experiment, folder = Experiment(settings), RunFolder(root, NAME)
    folder.config_changes(settings)
    folder.unfinished()
    stored.why(experiment)
    stage = experiment.folders["ppo"]
    restored = stage.restore(lambda checkpoint: None)
    assert restored in (None, (1, STATE), (2, STATE))
    Health().replay(read_rows(stage.path / "metrics.jsonl", METRICS))
    Records(stage.path, STATE["positions"] if restored else None).close()


def api(root: Path) -> None:
    opened = results.Run(root / NAME)
    opened.status, opened.config, opened.metrics, opened.evaluation  # noqa: B018
    opened.outputs("policy")


def chat(root: Path) -> None:
    opened = policies.load(root / NAME, {"name": "torch", "threads": 1}, stage="sft")
    assert opened.tokenizer.vocab_size == opened.policy.vocab_size


READERS = {reader.__name__: reader for reader in (comparison, sweep, cache, again, api, chat)}
