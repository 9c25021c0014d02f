"""The trackers, against a real offline W&B: what was logged is read back from W&B's own transaction log."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lockstep.errors import ConfigError
from lockstep.interfaces import Tracker
from lockstep.registry import registry
from lockstep.reporting.tracking import Silent, Wandb
from lockstep.runs.experiment import component_config
from wandb_server import Server, aliases

wandb = pytest.importorskip("wandb")
CONF = Path(__file__).parents[1] / "conf" / "tracker"


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """W&B as on a machine where nobody has logged in."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    wandb.teardown()


def tracker(mode: str = "auto") -> Wandb:
    return Wandb(Wandb.Config(project="lockstep", entity=None, mode=mode, tags=("test",)))


def start(tracker: Wandb, folder: Path, *, resume: bool = False, **config: Any) -> None:
    tracker.start(folder=folder, run="demo", stage="sft", identity="sft-torch-0123", config=config, resume=resume)


def records(folder: Path) -> list[Any]:
    """The protobuf records of every W&B run under a stage folder, oldest first."""
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its service, a process of its own, writes the log
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [Record.FromString(content) for file in files for content in leveldb_log(file.read_bytes())]


def leveldb_log(data: bytes, block: int = 32768, header: int = 7) -> Iterator[bytes]:
    """The records of a LevelDB log, the container of a .wandb file. (W&B 0.31 has its reader in Go only.)"""
    position, record = 7, b""  # the file starts with 7 bytes of W&B's own
    while position + header <= len(data):
        if block - position % block < header:  # the rest of a block is padding
            position += block - position % block
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + header : position + header + length]
        position += header + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def history(folder: Path) -> list[dict[str, Any]]:
    rows = [r.history for r in records(folder) if r.WhichOneof("record_type") == "history"]
    return [{(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in row.item} for row in rows]


def run_record(folder: Path) -> Any:
    return next(r.run for r in records(folder) if r.WhichOneof("record_type") == "run")


def inspected(folder: Path, *options: str) -> list[Any]:
    """The one W&B run under a stage folder as W&B's own reader prints it."""
    wandb.teardown()
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(done.stdout)] if options else [json.loads(line) for line in done.stdout.splitlines()]


def write(file: Path, *rows: Mapping[str, Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ours(caplog) -> list[str]:
    """What Lockstep logged, W&B's own log left out."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("lockstep")]


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_file_names_a_registered_tracker_and_fits_it(file):
    yaml = pytest.importorskip("yaml")
    group = yaml.safe_load(file.read_text())
    component = registry().find("tracker", group["name"])
    if component.missing():
        pytest.skip(f"{group['name']} is not installed")
    assert issubclass(component.load(), Tracker)
    component_config(component.load(), group, "tracker")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"project": "team/rlhf"}, "'team/rlhf': .* Type: tracker.entity=team tracker.project=rlhf$"),
        *(
            ({"project": name}, "W&B takes 1 to 128 characters")
            for name in ("a/b/c", "/a", "a/", "", "a:b", "a#b", "100%", "x" * 129)
        ),
        ({"entity": "me/you"}, "tracker.entity='me/you'"),
        ({"tags": ["", "a"]}, "tracker.tags"),
        ({"tags": ["x" * 65]}, "tracker.tags"),
    ],
)
def test_a_name_that_wandb_would_not_take_is_refused_before_anything_is_trained(changes, said):
    with pytest.raises(ConfigError, match=said):
        component_config(Wandb, {"name": "wandb", **changes}, "tracker")


def test_names_that_wandb_takes_are_taken():
    component_config(Wandb, {"name": "wandb", "project": "my project, über+1", "entity": "team-1", "tags": ["x" * 64]}, "tracker")
    wandb.Settings(project="my project, über+1", entity="team-1", run_tags=["x" * 64])
    for project in ("team/rlhf", "a:b", "x" * 129):
        with pytest.raises(Exception, match="Invalid project name"):
            wandb.Settings(project=project)


def test_importing_the_trackers_does_not_import_wandb():
    subprocess.run(
        [sys.executable, "-c", "import sys, lockstep.reporting.tracking as t; assert 'wandb' not in sys.modules"], check=True
    )


def test_without_an_api_key_the_stage_is_recorded_offline_and_can_be_read_back(tmp_path, capfd):
    stage, files = tmp_path / "stage", tmp_path / "checkpoint"
    files.mkdir()
    (files / "model.safetensors").write_bytes(b"weights")
    t = tracker()
    start(t, stage, algorithm={"kl_coef": 0.02})
    for step in range(3):
        t.log({"loss": 1.5 - step}, step)
    t.table("samples", [{"prompt": "a", "score": 1.0}, {"prompt": "b", "note": 2}], step=2)
    t.artifact("policy", files)
    t.finish()

    run = run_record(stage)
    assert (run.run_id, run.run_group, run.job_type) == ("sft-torch-0123", "demo", "sft")
    assert (run.display_name, run.project, list(run.tags)) == ("demo/sft", "lockstep", ["test"])
    config = {item.key: json.loads(item.value_json) for item in run.config.update if item.key}
    assert config["algorithm"] == {"kl_coef": 0.02}
    rows = history(stage)
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(0, 1.5), (1, 0.5), (2, -0.5)]
    table = json.loads(next(stage.glob("wandb/*/files/media/table/*.json")).read_text())
    assert table == {"columns": ["prompt", "score", "note"], "data": [["a", 1.0, None], ["b", None, 2]]}
    artifacts = [r.artifact for r in records(stage) if r.WhichOneof("record_type") == "artifact"]
    assert ("sft-torch", "policy", {"0123", "latest"}) in [(a.name, a.type, set(a.aliases)) for a in artifacts]
    assert [r.exit.exit_code for r in records(stage) if r.WhichOneof("record_type") == "exit"] == [0]
    assert "".join(capfd.readouterr()) == ""


def test_wandbs_own_reader_finds_configuration_history_table_artifact_lineage_and_alert(tmp_path):
    stage, output = tmp_path / "stage", tmp_path / "output"
    output.mkdir()
    (output / "model.safetensors").write_bytes(b"weights")
    t = tracker()
    start(t, stage, algorithm={"kl_coef": 0.02}, inputs={"pretrain": "pretrain-torch-4567"})
    for step in range(3):
        t.log({"loss": 1.5 - step, "objective/score": float(step % 2), "grad_norm/policy": 1.0, "kl_coef": 0.02}, step)
    t.alert("kl_running_away", "objective/kl is 60 nats", 2)
    t.table("samples", [{"prompt": "a", "score": 1.0}], step=2)
    t.artifact("policy", output)
    t.finish()

    found: dict[str, list[Any]] = {}
    for record in inspected(stage):
        found.setdefault(record["type"], []).append(record[record["type"]])
    assert found["run"][0]["config"]["update"]["algorithm"] == {"kl_coef": 0.02}
    assert found["run"][0]["config"]["update"]["inputs"] == {"pretrain": "pretrain-torch-4567"}
    assert [(row["item"]["step"], row["item"]["loss"]) for row in found["history"]] == [(0, 1.5), (1, 0.5), (2, -0.5)]
    assert found["history"][2]["item"]["samples._type"] == "table-file" and found["history"][2]["item"]["samples.nrows"] == 1
    (artifact,) = [a for a in found["artifact"] if a["name"] == "sft-torch"]
    assert (artifact["type"], set(artifact["aliases"])) == ("policy", {"0123", "latest"})
    assert [file["path"] for file in artifact["manifest"]["contents"]] == ["model.safetensors"]
    metadata = json.loads(artifact["metadata"])
    assert metadata["identity"] == "sft-torch-0123" and metadata["inputs"] == {"pretrain": "pretrain-torch-4567"}
    (alert,) = found["alert"]
    assert (alert["title"], alert["level"]) == ("kl_running_away", "WARN")
    assert alert["text"] == "sft, step 2: objective/kl is 60 nats"

    (state,) = inspected(stage, "--summary")
    assert (state["state"], state["step"]) == ("finished", 2)
    assert state["summary"]["loss"] == {"last": -0.5, "min": -0.5}
    assert state["summary"]["objective/score"] == {"last": 0, "max": 1}
    assert state["summary"]["grad_norm/policy"] == {"last": 1, "max": 1} and state["summary"]["kl_coef"] == 0.02


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    with Server() as server:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        yield server
        wandb.teardown()


def output(folder: Path) -> Path:
    (folder / "output").mkdir(parents=True)
    (folder / "output" / "model.safetensors").write_bytes(b"weights")
    return folder / "output"


def test_online_a_server_gets_runs_history_alerts_artifacts_and_their_lineage(server, tmp_path, caplog):
    caplog.set_level("INFO", "lockstep")
    t = tracker()
    start(t, tmp_path / "sft")
    t.artifact("policy", output(tmp_path / "sft"))
    t.finish()
    inputs = {"sft": "sft-torch-0123", "reward": "reward-torch-89ab"}  # of the second the server has never heard
    t.start(
        folder=tmp_path / "ppo",
        run="demo",
        stage="ppo",
        identity="ppo-torch-4567",
        config={"inputs": inputs, "seed": 1},
        resume=False,
    )
    for step in range(3):
        t.log({"loss": 1.5 - step}, step)
    t.alert("kl_running_away", "objective/kl is 60 nats", 2)
    t.artifact("policy", output(tmp_path / "ppo"))
    t.finish()

    seen = server.record
    run = seen.runs["ppo-torch-4567"]
    assert (run["groupName"], run["jobType"], run["displayName"], run["tags"]) == ("demo", "ppo", "demo/ppo", ["test"])
    config = json.loads(run["config"])
    assert (config["seed"]["value"], config["inputs"]["value"]) == (1, inputs)
    assert [(row["step"], row["loss"]) for row in seen.history["ppo-torch-4567"]] == [(0, 1.5), (1, 0.5), (2, -0.5)]
    assert [(a["title"], a["text"]) for a in seen.alerts] == [("kl_running_away", "ppo, step 2: objective/kl is 60 nats")]
    made = [(a["artifactCollectionName"], a["artifactTypeName"], aliases(a), a["committed"]) for a in seen.artifacts]
    assert made == [("sft-torch", "policy", {"0123", "latest"}, True), ("ppo-torch", "policy", {"4567", "latest"}, True)]
    assert seen.uploads["model.safetensors"] == b"weights"
    assert seen.used == [("ppo-torch-4567", "sft-torch")]
    (told,) = ours(caplog)
    assert told.startswith("W&B shows no lineage from reward-torch-89ab: ")


def test_wandb_sync_uploads_an_offline_stage(server, tmp_path):
    t = tracker("offline")
    start(t, tmp_path, inputs={"pretrain": "pretrain-torch-89ab"})
    for step in range(3):
        t.log({"loss": 1.5 - step}, step)
    t.alert("not_finite", "loss is not finite", 2)
    t.artifact("policy", output(tmp_path))
    t.finish()
    wandb.teardown()
    assert server.record.runs == {}
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    subprocess.run([sys.executable, "-m", "wandb", "sync", str(folder)], check=True, capture_output=True)

    seen = server.record
    assert json.loads(seen.runs["sft-torch-0123"]["config"])["inputs"]["value"] == {"pretrain": "pretrain-torch-89ab"}
    assert [(row["step"], row["loss"]) for row in seen.history["sft-torch-0123"]] == [(0, 1.5), (1, 0.5), (2, -0.5)]
    ((artifact,), (alert,)) = seen.artifacts, seen.alerts
    assert (artifact["artifactCollectionName"], aliases(artifact), artifact["committed"]) == (
        "sft-torch",
        {"0123", "latest"},
        True,
    )
    assert json.loads(artifact["metadata"])["inputs"] == {"pretrain": "pretrain-torch-89ab"}
    assert alert["title"] == "not_finite" and seen.uploads["model.safetensors"] == b"weights"


def test_a_stage_resumed_online_sends_what_the_server_lacks_and_nothing_twice(server, tmp_path):
    t = tracker()
    start(t, tmp_path)
    for step in range(3):
        t.log({"loss": float(step)}, step)
    t.finish(failed=True)
    wandb.teardown()
    del server.record.history["sft-torch-0123"][2:]  # killed before the last row was sent
    write(tmp_path / "metrics.jsonl", *({"step": n, "seconds": 0.1, "loss": float(n)} for n in range(4)))
    write(tmp_path / "samples.jsonl", {"step": 1, "prompt": "a"}, {"step": 3, "prompt": "b"})
    write(tmp_path / "health.jsonl", {"step": 1, "name": "known", "message": ""}, {"step": 3, "name": "new", "message": ""})
    start(t, tmp_path, resume=True)
    t.log({"loss": 4.0}, 4)
    t.finish()
    rows = server.record.history["sft-torch-0123"]
    assert [(row["step"], row["loss"]) for row in rows] == [(n, float(n)) for n in range(5)]
    assert [row["step"] for row in rows if "samples" in row] == [3]
    assert [alert["title"] for alert in server.record.alerts] == ["new"]


def test_offline_nothing_phones_home(tmp_path, monkeypatch):
    """Every address that W&B might call leads to a port on which a call would be seen."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        address = f"http://127.0.0.1:{door.getsockname()[1]}"
        for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, address)
        t = tracker()
        start(t, tmp_path)
        t.log({"loss": 1.0}, 0)
        t.alert("not_finite", "loss is not finite", 0)
        t.artifact("policy", CONF)
        t.finish()
        assert [row["loss"] for row in history(tmp_path)] == [1.0]
        door.setblocking(False)
        with pytest.raises(BlockingIOError):
            door.accept()


def test_a_resumed_stage_goes_on_in_the_same_run_with_each_step_once(tmp_path, caplog, capfd):
    t = tracker()
    start(t, tmp_path)
    for step in (0, 2, 3):  # 1 was lost in the kill, 2 and 3 come after the checkpoint
        t.log({"loss": float(step)}, step)
    t.finish(failed=True)
    write(
        tmp_path / "metrics.jsonl",
        {"step": 0, "seconds": 0.1, "loss": 0.0},
        {"step": 1, "seconds": 0.2, "loss": 1.0, "ratio": None},
    )
    write(tmp_path / "samples.jsonl", {"step": 1, "prompt": "a"}, {"step": 1, "prompt": "b"})
    write(tmp_path / "health.jsonl", {"step": 1, "name": "not_finite", "message": "ratio is not finite"})
    time.sleep(1)  # W&B names its folders by the second
    start(t, tmp_path, resume=True)
    for step in range(2, 5):
        t.log({"loss": float(step)}, step)
    t.finish()

    assert {r.run.run_id for r in records(tmp_path) if r.WhichOneof("record_type") == "run"} == {"sft-torch-0123"}
    logged = history(tmp_path)
    assert [(row["_step"], row["step"], row["loss"]) for row in logged] == [(n, n, float(n)) for n in range(5)]
    assert "seconds" not in logged[0] and math.isnan(logged[1]["ratio"])
    table = json.loads(next(tmp_path.glob("wandb/*/files/media/table/*.json")).read_text())
    assert table == {"columns": ["prompt"], "data": [["a"], ["b"]]}
    assert [r.alert.title for r in records(tmp_path) if r.WhichOneof("record_type") == "alert"] == ["not_finite"]
    assert [r.exit.exit_code for r in records(tmp_path) if r.WhichOneof("record_type") == "exit"] == [0]
    definitions = [r.metric for r in records(tmp_path) if r.WhichOneof("record_type") == "metric"]
    assert ("*", "step") in [(m.glob_name, m.step_metric) for m in definitions]
    assert ours(caplog) == [] and "".join(capfd.readouterr()) == ""


def test_a_stage_that_starts_afresh_leaves_no_earlier_log(tmp_path):
    t = tracker()
    for _ in range(2):
        start(t, tmp_path)
        t.log({"loss": 0.0}, 0)
        t.finish()
        time.sleep(1)  # W&B names its folders by the second
    assert [row["step"] for row in history(tmp_path)] == [0]


def test_neither_the_arguments_of_a_run_nor_the_command_line_leak_secrets(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lockstep", "reward_model.api_key=hunter2"])
    monkeypatch.setenv("MY_API_KEY", "hunter2-and-more")
    t = Wandb(Wandb.Config(mode="offline", tags=("good", "hunter2-and-more")))
    start(t, tmp_path, reward_model={"url": "https://me:hunter2@example.org/score", "api_key": "hunter2"}, seed=1)
    t.log({"loss": 0.0}, 0)
    t.finish()
    assert list(run_record(tmp_path).tags) == ["good", "***"]  # which also waits until all is written
    everything = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"example.org/score" in everything and b"hunter2" not in everything


def test_a_failure_inside_wandb_is_told_once_and_raises_nothing(tmp_path, caplog, monkeypatch):
    def no_space(*_, **__):
        raise OSError("No space left on device")

    t = tracker("offline")
    start(t, tmp_path)
    monkeypatch.setattr(type(t._run), "log", no_space)
    for step in range(3):
        t.log({"loss": 0.0}, step)
    t.artifact("policy", tmp_path / "does-not-exist")
    t.finish()
    (warning,) = ours(caplog)
    assert "No space left on device" in warning and "its folder holds every record" in warning


def test_a_tracker_that_could_not_start_ignores_what_follows(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(wandb.errors.CommError("down")))
    t = tracker("offline")
    start(t, tmp_path)
    t.log({"loss": 0.0}, 0)
    t.table("samples", [{"prompt": "a"}], 0)
    t.artifact("policy", tmp_path)
    t.finish(failed=True)
    (warning,) = ours(caplog)
    assert "could not start" in warning


def test_an_api_key_means_online_and_an_unreachable_server_means_offline(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("lockstep.reporting.tracking.CONNECT_SECONDS", 1)
    t = tracker()
    start(t, tmp_path)
    t.log({"loss": 2.0}, 0)
    t.finish()
    (warning,) = ours(caplog)
    assert "cannot be reached" in warning
    assert [row["loss"] for row in history(tmp_path)] == [2.0]


def test_the_mode_that_the_environment_asks_for_wins_over_auto(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    t = tracker()
    start(t, tmp_path)
    t.log({"loss": 2.0}, 0)
    t.finish()
    assert not list(tmp_path.glob("wandb/offline-run-*"))


def test_the_silent_tracker_keeps_nothing(tmp_path):
    t = Silent(Silent.Config())
    t.start(folder=tmp_path / "stage", run="demo", stage="sft", identity="x", config={}, resume=False)
    t.log({"loss": 0.0}, 0)
    t.table("samples", [{}], 0)
    t.alert("not_finite", "loss is not finite", 0)
    t.artifact("policy", tmp_path)
    t.finish()
    assert not list(tmp_path.iterdir())
