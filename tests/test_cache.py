"""`lockstep cache`: what is stored, why a stage is not reused, and what is removed."""

import argparse
import errno
import itertools
import json
import os
import shutil
import threading
import time

import pytest

from lockstep.api.sources import find
from lockstep.commands import cache as cache_command
from lockstep.commands.cache import stored as cache
from lockstep.commands.run import run_config
from lockstep.config.compose import compose
from lockstep.errors import CheckpointError, ConfigError
from lockstep.runs import identity, store
from lockstep.runs.experiment import Experiment, finished
from lockstep.runs.runner import Runner
from lockstep.storage import locks
from runs import DECODER, TINY, tiny

SFT = ["~stages.reward", "~stages.ppo", "~stages.ppo_ptx", "~stages.evaluate", "backend.threads=1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pretraining, and SFT at two learning rates."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, [tiny(folder, *SFT, f"sft.optimizer.learning_rate={rate}") for rate in ("1e-3", "2e-3")]


@pytest.fixture
def runs(made, tmp_path):
    """A copy of them to do harm to; its folders, and the overrides of the first run."""
    shutil.copytree(made[0], tmp_path / "runs")
    return tmp_path / "runs", [run.name for run in made[1]], described(tmp_path / "runs", "sft.optimizer.learning_rate=1e-3")


def described(folder, *overrides):
    return [*TINY, *DECODER, *SFT, f"folder={folder}", *overrides]


def listed(folder):
    return cache.entries(folder, cache.users(folder))


def said(capsys, action, overrides, older_than=None, yes=False):
    cache_command.run(argparse.Namespace(action=action, older_than=older_than, yes=yes), overrides)
    return capsys.readouterr().out


def test_the_list_says_state_size_age_and_users(runs, capsys):
    folder, (first, second), overrides = runs
    found = {entry.path.name.split("-")[0]: entry for entry in listed(folder)}
    assert found["pretrain"].runs == sorted([first, second]) and len(found["sft"].runs) == 1
    assert {entry.state for entry in found.values()} == {"done"}
    files = [file.stat().st_size for file in found["pretrain"].path.rglob("*") if file.is_file() and file.name != "lock"]
    assert found["pretrain"].size == sum(files) > 10_000
    printed = said(capsys, "list", overrides)
    assert "3 stages in " in printed and "pretrain-torch-" in printed and first in printed
    assert "3 stages in " in said(capsys, overrides[0], overrides[1:])  # without a word for it


def test_why_tells_what_is_stored_and_in_what_the_nearest_differs(runs, capsys):
    folder, _, _ = runs
    printed = said(capsys, "why", described(folder, "sft.optimizer.learning_rate=4e-3", "sft.batch_size=8")).splitlines()
    assert printed[0].startswith("pretrain: stored: ")
    said_of_sft, _, nearest = printed[1].partition(" (from the nearest stored one, ")
    changes = set(said_of_sft.removeprefix("sft: differs in ").split("; "))
    batch, (rate,) = "stage.batch_size: 16 -> 8", changes - {"stage.batch_size: 16 -> 8"}
    assert batch in changes and rate in [f"stage.optimizer.learning_rate: {r} -> 0.004" for r in (0.001, 0.002)]  # equally near
    assert nearest.startswith("sft-torch-")
    printed = said(capsys, "why", described(folder, "data.seed=1")).splitlines()
    assert all("differs in data.seed: 0 -> 1 (from" in line for line in printed)
    printed = said(capsys, "why", described(folder / "elsewhere"))
    assert f"pretrain: no stage of this name is stored in {folder / 'elsewhere' / 'stages'}" in printed


def test_why_names_the_package_whose_code_has_changed(runs, capsys, monkeypatch):
    real = identity.code_digests
    monkeypatch.setattr(identity, "code_digests", lambda modules: real(modules) | {"lockstep_rlhf": "changed"})
    assert "pretrain: differs in the code of lockstep_rlhf (from the nearest" in said(capsys, "why", runs[2])


def test_pruning_removes_what_no_run_uses_and_only_after_yes(runs, capsys):
    folder, (first, second), overrides = runs
    assert "0 stages that no run uses" in said(capsys, "prune", overrides, yes=True)
    [stage] = [entry.path for entry in listed(folder) if entry.runs == [second]]
    shutil.rmtree(folder / second)
    printed = said(capsys, "prune", overrides)
    assert stage.name in printed and "Nothing was removed; to remove them, add --yes." in printed and stage.exists()
    assert "0 stages that no run uses" in said(capsys, "prune", overrides, older_than="1d", yes=True)
    for file in stage.rglob("*"):
        os.utime(file, (0, time.time() - 2 * 86400))
    assert "Removed 1 of 1 stages" in said(capsys, "prune", overrides, older_than="1d", yes=True)
    assert not stage.exists() and len(listed(folder)) == 2
    assert finished(compose(overrides))


def test_a_stage_that_a_process_works_on_or_a_run_is_going_to_use_is_not_removed(runs):
    folder, (first, second), _ = runs
    shutil.copytree(folder / first, folder.parent / first)
    shutil.rmtree(folder / first)
    [entry] = cache.unused(folder)
    with locks.hold(entry.path):
        assert cache.unused(folder) == [] and not cache.remove(entry)
        assert f"process {os.getpid()} on " in next(e.state for e in listed(folder) if e.path == entry.path)
    record = folder.parent / first / "run.json"
    record.write_text(record.read_text().replace(entry.path.name, "sft-torch-older"))  # not begun; but planned, in stages.json
    shutil.copytree(folder.parent / first, folder / first)
    assert cache.unused(folder) == [] and not cache.remove(entry)
    assert entry.path.exists()


@pytest.mark.parametrize("where", ["deeper", "linked", "planned", "by its path"])
def test_what_a_run_points_to_is_not_pruned_wherever_the_run_is(runs, where):
    folder, (first, _), _ = runs
    [stage] = [entry.path for entry in listed(folder) if entry.runs == [first]]
    run = folder / first
    if where == "deeper":
        (folder / "2026" / "november").mkdir(parents=True)
        run.rename(folder / "2026" / "november" / first)
    elif where == "linked":
        run.rename(folder.parent / first)
        run.symlink_to(folder.parent / first)
        (folder.parent / first / "loop").symlink_to(folder)
    elif where == "planned":
        (run / "run.json").unlink()  # its process was killed before it wrote one
    else:
        record = json.loads((run / "stages.json").read_text())
        read = {"pretrain": record["pretrain"] | {"folders": {f"elsewhere/stages/{stage.name}/output": "0"}}}
        (run / "stages.json").write_text(json.dumps(read))
        (run / "run.json").unlink()
    assert stage.name not in [entry.path.name for entry in cache.unused(folder)]
    [entry] = [entry for entry in listed(folder) if entry.path == stage]
    assert len(entry.runs) >= 1


@pytest.mark.parametrize("damage", ["run.json", "stages.json", "link", "foreign"])
def test_nothing_is_pruned_while_a_run_cannot_be_read_and_the_list_names_it(runs, capsys, damage):
    folder, (first, second), overrides = runs
    if damage == "link":
        shutil.rmtree(folder / first)
        (folder / first).symlink_to(folder.parent / "a disk that is not mounted")
        said_of_it = f"{folder / first} is a link to nothing."
    elif damage == "foreign":
        (folder / first / "run.json").write_text('{"theirs": 1}')
        said_of_it = f"{folder / first / 'run.json'} is not the record of a run: name is missing."
    else:
        (folder / first / damage).write_bytes(b"")
        said_of_it = f"{folder / first / damage} cannot be read: it is empty."
    before = [entry.path for entry in listed(folder)]
    with pytest.raises(CheckpointError, match="Nothing is pruned, because what these use is not known:") as caught:
        said(capsys, "prune", overrides, yes=True)
    assert said_of_it in str(caught.value)
    with pytest.raises(CheckpointError):
        cache.remove(listed(folder)[0])
    assert [entry.path for entry in listed(folder)] == before and len(before) == 3
    printed = said(capsys, "list", overrides)
    assert "3 stages in " in printed and f"Not in this list, because it cannot be read: {said_of_it}" in printed


def test_a_folder_that_is_no_stage_is_neither_listed_nor_pruned_and_one_stage_that_cannot_be_read_hides_no_other(runs, capsys):
    folder, _, overrides = runs
    for name in ("my-data", "sft-torch-notes", ".hidden"):
        (folder / "stages" / name).mkdir()
    assert len(listed(folder)) == 3 and cache.unused(folder) == []
    for file in folder.glob("stages/sft-*/stage.json"):
        file.write_bytes(b"")
    why = said(capsys, "why", described(folder, "sft.optimizer.learning_rate=4e-3"))
    assert "sft: no stage of this name is stored in " in why and why.count("stage.json cannot be read: it is empty") == 2


def test_a_file_that_goes_while_the_list_is_made_is_left_out(runs, monkeypatch):
    folder = runs[0]
    (folder / "stages" / "gone").symlink_to(folder / "nowhere")
    [stage] = folder.glob("stages/pretrain-*")
    before = cache.entry(stage, ()).size
    (stage / "output" / "vanishing").symlink_to(folder / "nowhere")  # stat finds no file, as after a rename
    assert cache.entry(stage, ()).size == before


def test_a_file_in_the_place_of_a_run_is_named(tmp_path):
    (tmp_path / "runs").write_text("mine")
    with (
        pytest.raises(CheckpointError, match=f"{tmp_path / 'runs'}.* is in the way of {tmp_path / 'runs' / 'x'}. Move it away"),
        locks.hold(tmp_path / "runs" / "x"),
    ):
        pass
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "lock").symlink_to("/nowhere/lock")
    with (
        pytest.raises(
            CheckpointError, match="cannot be locked: its file 'lock' is removed again and again, or is a link to nowhere"
        ),
        locks.hold(tmp_path / "held"),
    ):
        pass


def test_a_lock_file_that_is_not_text_still_says_that_somebody_works_there(tmp_path):
    with locks.hold(tmp_path):
        (tmp_path / "lock").write_bytes(b"\xff\xfe" * 1000)
        with locks.hold_if_free(tmp_path) as owner:
            assert owner == "\ufffd" * 200


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(CheckpointError, match="its file system has no locks .*Choose another folder="), locks.hold(tmp_path):
        pass


def test_who_waits_for_a_stage_that_is_pruned_makes_its_folder_anew(tmp_path):
    folder, held = tmp_path / "stage", threading.Event()

    def work():
        with locks.hold(folder):
            held.set()

    with locks.hold(folder):
        thread = threading.Thread(target=work)
        thread.start()
        assert not held.wait(0.2)
        shutil.rmtree(folder)
    assert held.wait(10)
    thread.join()
    assert (folder / "lock").exists()


@pytest.mark.parametrize("change", ["code", "output", "run", "config"])
def test_a_run_is_done_only_while_all_that_made_it_is_as_it_was(runs, monkeypatch, change):
    folder, (first, _), overrides = runs
    config = compose(overrides)
    assert finished(config) == folder / first
    if change == "code":
        monkeypatch.setattr(identity, "code_digests", lambda modules: dict.fromkeys(modules, "changed"))
    elif change == "output":
        for weights in folder.glob("stages/sft-*/output/model.safetensors"):
            weights.unlink()
    elif change == "run":
        shutil.rmtree(folder / first)
    else:
        config = compose([*overrides, "seed=1"])
    assert finished(config) is None


class Trains(Exception):
    """In place of training."""


def test_an_output_that_another_stage_is_to_read_is_compared_with_its_checksums(runs, monkeypatch, caplog):
    """Bit rot: a byte differs, the size does not."""
    folder, _, overrides = runs

    def train(self, stage, folder):
        raise Trains(stage.name)

    monkeypatch.setattr(Runner, "_train", train)
    experiment = Experiment(compose(overrides))
    weights = experiment.folders["pretrain"].output / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert experiment.folders["pretrain"].done and not experiment.folders["pretrain"].intact
    run_config(compose(overrides), "test")  # nothing reads it any more
    (experiment.folders["sft"].path / "done.json").unlink()
    with pytest.raises(Trains, match="pretrain"):
        run_config(compose(overrides), "test")
    assert "pretrain starts over: it was done, but files of" in caplog.text


@pytest.mark.parametrize("content", ['{"output": {"model.safetensors": 5}}', '{"output": [1]}', "[1]", "null", ""])
def test_a_damaged_or_foreign_done_json_is_not_done(tmp_path, content):
    stage = store.StageFolder(tmp_path)
    with stage.write_output() as output:
        (output / "model.safetensors").write_bytes(b"12345")
    stage.finish({"steps": 1, "seconds": 1.0, "metrics": {}})
    assert stage.done and stage.intact
    (tmp_path / "done.json").write_text(content)
    assert not stage.done and not stage.intact


def test_a_result_that_changed_since_is_not_opened(runs):
    folder, (first, _), overrides = runs
    output = Experiment(compose(overrides)).folders["sft"].output
    assert find(folder / first, "policy") == find(folder / first, "policy", "sft")
    settings = output / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<eos>", "<EOS>"))
    for source in (folder / first, output.parent, output):
        with pytest.raises(
            CheckpointError, match=r"are missing or changed since its stage wrote them. .* once .*done.json is removed"
        ):
            find(source, "policy")
    shutil.copytree(output, folder / "taken")  # a copy is the user's own
    assert find(folder / "taken", "policy") == (folder / "taken", None)


def test_mistakes_say_what_to_type(runs):
    with pytest.raises(
        ConfigError, match=r"lockstep cache prunes: no such action. Did you mean 'prune'\? Actions: list, why, prune."
    ):
        cache_command.run(argparse.Namespace(action="prunes"), [])
    with pytest.raises(ConfigError, match="--older-than '30' is not a time. Write a number and h, d or w: 12h, 30d, 4w."):
        cache_command.run(argparse.Namespace(action="prune", older_than="30", yes=False), runs[2])


def test_the_kl_sweep_makes_one_reward_model_per_backend_and_seed(tmp_path):
    made = {}
    for backend, seed, kl in itertools.product(("torch", "jax"), (0, 1), (0.05, 0.45)):
        overrides = ["experiment=kl_sweep", f"backend={backend}", f"seed={seed}", f"algorithm.kl_coef={kl}", f"folder={tmp_path}"]
        for stage, folder in Experiment(compose(overrides)).folders.items():
            made.setdefault(stage, set()).add(folder.path)
    assert {stage: len(folders) for stage, folders in made.items()} == {
        "pretrain": 4, "sft": 4, "reward": 4, "ppo": 8, "evaluate": 8,
    }  # fmt: skip


def test_sizes_and_ages_are_rounded_to_what_a_person_reads():
    assert [cache_command.size(n) for n in (0, 999, 1500, 2_500_000, 7e12, 7e15)] == [
        "0 B", "999 B", "1.5 kB", "2.5 MB", "7.0 TB", "7000.0 TB",
    ]  # fmt: skip
    assert [cache_command.age(s) for s in (5, 90, 7200, 200_000)] == ["5 s", "2 min", "2 h", "2 d"]
