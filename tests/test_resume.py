"""Runs that are stopped, killed or damaged, and go on as if nothing had happened.

Here are a few random kills on each backend, and one before every rename of a stage; `benchmarks/kills.py` has fifty random
ones on each.
"""

import errno
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lockstep.errors import CheckpointError, ConfigError, Stopped
from lockstep.runs import identity, store
from lockstep.storage import locks
from lockstep.storage import weights as storage_weights
from lockstep.storage.files import read_json
from lockstep.storage.weights import write_tensors
from runs import DECODER, PPO_ONLY, TINY, tiny
from test_runs import lines, output, weights
from test_tracking import history, run_record

SFT_ONLY = [*PPO_ONLY, "~stages.reward", "~stages.ppo"]


def without_timings(rows):
    return [{k: v for k, v in row.items() if not k.startswith("perf/") and k != "seconds"} for row in rows]


def assert_same(run, other, stage="ppo"):
    """Bit for bit."""
    assert without_timings(lines(run, stage)) == without_timings(lines(other, stage))
    assert lines(run, stage, "samples") == lines(other, stage, "samples")
    files = {path.name: path.read_bytes() for path in output(run, stage).iterdir()}
    assert files == {path.name: path.read_bytes() for path in output(other, stage).iterdir()}


def stop_after(monkeypatch, steps):
    """Make the run stop, as Ctrl-C does, after so many steps of PPO."""
    from lockstep_rlhf.algorithms.ppo import PPO

    step = PPO.step

    def counted(self, number):
        metrics = step(self, number)
        if number + 1 == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return metrics

    monkeypatch.setattr(PPO, "step", counted)


def stopped(monkeypatch, folder, steps, *options):
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(Stopped, match=f"after step {steps}"):
            tiny(folder, *options)


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def checkpoint_folders(folder):
    return sorted(folder.glob("stages/ppo-*/checkpoints/*"))


# ------------------------------------------------------------------------------------------------------- whole runs

ADAPTIVE = [
    *PPO_ONLY, "algorithm.iterations=6", "algorithm.kl_target=0.5", "algorithm.kl_horizon=100",
    "algorithm.optimizer.ema_decay=0.9",
]  # fmt: skip


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """wholes(backend): a run that nobody stopped, and its options. Sums depend on the number of threads; here it is one."""

    @functools.cache
    def run(backend):
        options = [*ADAPTIVE, f"backend={backend}", *(["backend.threads=1"] if backend == "torch" else [])]
        return tiny(tmp_path_factory.mktemp("whole"), *options), options

    return run


@pytest.fixture(params=["torch", "jax"])
def whole(request, wholes):
    return wholes(request.param)


@pytest.fixture
def torch_whole(wholes):
    return wholes("torch")


@pytest.fixture
def begun(wholes, tmp_path):
    """A folder of runs with all that comes before PPO, on torch."""
    return before_ppo(wholes("torch")[0], tmp_path)


def before_ppo(whole, folder):
    """A folder with the stages of ``whole`` that come before PPO."""
    for stage in ("pretrain", "sft", "reward"):
        done = output(whole, stage).parent
        shutil.copytree(done, folder / "runs" / "stages" / done.name)
    return folder / "runs"


def start(folder, options):
    command = [sys.executable, "-m", "lockstep", "run", *TINY, *DECODER, f"folder={folder}", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait(process, until):
    while not until():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.0005)


def has_first_step(folder):
    return any(file.stat().st_size for file in folder.glob("stages/ppo-*/metrics.jsonl"))


def test_a_run_stopped_by_ctrl_c_goes_on_bit_for_bit(whole, tmp_path):
    begun = before_ppo(whole[0], tmp_path)
    options = [*whole[1], "checkpoint_every=4"]
    with start(begun, options) as process:
        wait(process, lambda: has_first_step(begun))
        process.send_signal(signal.SIGINT)
        printed = process.communicate()[0]
    assert process.returncode == 0 or (process.returncode == 130 and "Rerun the same command to resume" in printed)
    assert_same(tiny(begun, *options), whole[0])
    assert len({row["kl_coef"] for row in lines(whole[0], "ppo")}) == 6  # so the coefficient's state matters


@pytest.mark.parametrize("moment", ["at random", "in a save"])
def test_a_killed_run_goes_on_bit_for_bit_in_one_whole_wandb_run(whole, moment, monkeypatch, tmp_path):
    begun = before_ppo(whole[0], tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    options = [*whole[1], "tracker=wandb", "checkpoint_every=1"]
    with start(begun, options) as process:
        wait(process, lambda: has_first_step(begun))
        if moment == "at random":
            time.sleep(random.uniform(0, 0.2))
        else:
            wait(process, lambda: list(begun.glob("stages/ppo-*/checkpoints/.*.part")))
        os.killpg(process.pid, signal.SIGKILL)
    run = tiny(begun, *options)
    assert_same(run, whole[0])
    stage = output(run, "ppo").parent
    assert len(list(stage.glob("wandb/offline-run-*"))) == 1 and run_record(stage).run_id == stage.name
    assert [row["step"] for row in history(stage)] == [0, 1, 2, 3, 4, 5]
    assert not list(run.parent.rglob("*.part"))


KILLED_BEFORE_EVERY_THIRD_RENAME = """
    import os, shutil, signal, sys
    sys.path.insert(0, "tests")
    from pathlib import Path
    from runs import PPO_ONLY, tiny

    # Once, before the forks: each is a process whose imports are done.
    import lockstep_rlhf.algorithms.language_modelling, lockstep_torch.learner, lockstep_torch.policies, torch._dynamo
    from lockstep.config.compose import compose
    compose([])

    folder, options = Path(sys.argv[1]), sys.argv[2:]

    def child(work):
        if (pid := os.fork()) == 0:
            os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            try:
                work()
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def killed_before(number, runs):
        replace, count = os.replace, [0]
        def counted(*arguments):
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*arguments)
        os.replace = counted
        tiny(runs, *options)

    number, code = int(os.environ["FIRST"]), -9
    while code == -9:  # until there are no more renames
        number += 3
        runs = folder / f"killed-{number}"
        shutil.copytree(folder / "pretrained", runs)
        code = child(lambda: killed_before(number, runs))
        assert child(lambda: tiny(runs, *options)) == 0, number
    assert code == 0, code
    print(number)
"""


def number_of(folder):
    return int(folder.name.rpartition("-")[2])


def test_a_run_killed_before_any_rename_goes_on_bit_for_bit(tmp_path):
    options = [*SFT_ONLY, "backend.threads=1", "sft.epochs=0.6", "checkpoint_every=1"]
    tiny(tmp_path / "pretrained", *options, "~stages.sft", "name=pretrained")
    shutil.rmtree(tmp_path / "pretrained" / "pretrained")
    code = textwrap.dedent(KILLED_BEFORE_EVERY_THIRD_RENAME)
    environment = os.environ | {"FIRST": str(random.randint(-2, 0))}
    command = [sys.executable, "-c", code, str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    # Renamed are run.json, stage.json, each checkpoint's files and folder, the output's files and folder, done.json, ...
    *killed, whole = [next(folder.glob("instructgpt-*")) for folder in sorted(tmp_path.glob("killed-*"), key=number_of)]
    assert len(killed) > 5
    for run in killed:
        assert_same(run, whole, "sft")
        assert not list(run.parent.rglob("*.part")) and not list(run.parent.glob("stages/*/checkpoints"))


def test_two_processes_of_one_run_share_the_work(tmp_path):
    options = [*SFT_ONLY, "backend.threads=1", "sft.epochs=2"]
    with start(tmp_path, options) as one, start(tmp_path, options) as other:
        printed = [process.communicate()[0] for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), printed
    assert sum("waiting for process" in text for text in printed) <= 1
    (run,) = tmp_path.glob("instructgpt-*")
    assert [row["step"] for row in lines(run, "sft")] == list(range(9))
    assert read_json(run / "run.json")["status"] == "done"


# --------------------------------------------------------------------------------------------------------- damage


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(begun, monkeypatch, caplog, torch_whole):
    whole, options = torch_whole
    stopped(monkeypatch, begun, 4, *options, "checkpoint_every=1")
    flip_last_byte(checkpoint_folders(begun)[-1] / "learner.safetensors")
    cut = tiny(begun, *options)
    assert "learner.safetensors changed since it was written): trying the previous one" in caplog.text
    assert "ppo resumes at step 3 of 6" in caplog.text
    assert_same(cut, whole)


def test_a_stage_starts_anew_and_says_so_when_no_checkpoint_is_whole(begun, monkeypatch, caplog, torch_whole):
    whole, options = torch_whole
    stopped(monkeypatch, begun, 4, *options, "checkpoint_every=1")
    one, other = checkpoint_folders(begun)
    (one / "state.json").unlink()
    flip_last_byte(other / "learner.safetensors")
    cut = tiny(begun, *options)
    assert "starts over: none of its checkpoints is intact" in caplog.text
    assert "resumes at step" not in caplog.text
    assert_same(cut, whole)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES = {
    "learner.safetensors": [flip_last_byte, truncate, Path.unlink],
    "state.json": [truncate, Path.unlink, lambda path: path.write_text(path.read_text().replace("2.25", "2.35"))],
    "sums.json": [truncate, Path.unlink, lambda path: path.write_text("{}"), lambda path: path.write_text("[]")],
}


@pytest.mark.parametrize(("name", "damage"), [(name, d) for name, damages in DAMAGES.items() for d in damages])
def test_any_damage_to_a_checkpoint_is_noticed(tmp_path, caplog, name, damage):
    folder = store.StageFolder(tmp_path)
    for step in (1, 2):
        tensors = {"w": np.full(5, step, np.float32)}
        write = lambda path, tensors=tensors: write_tensors(path / "learner.safetensors", tensors)  # noqa: E731
        folder.save(step, write, {"kl_coef": step + 0.25})
    damage(tmp_path / "checkpoints" / "00000002" / name)
    read = []
    assert folder.restore(read.append) == (1, {"kl_coef": 1.25})
    assert [path.name for path in read] == ["00000001"]
    assert "00000002 is damaged" in caplog.text
    folder.save(2, write, {"kl_coef": 2.25})
    folder.save(3, write, {"kl_coef": 3.25})
    assert folder.restore(read.append) == (3, {"kl_coef": 3.25})


def test_a_half_written_checkpoint_does_not_count_and_is_removed(tmp_path):
    folder = store.StageFolder(tmp_path)
    folder.save(1, lambda path: (path / "learner").write_text("1"), {})
    shutil.copytree(tmp_path / "checkpoints" / "00000001", tmp_path / "checkpoints" / ".00000002.part")
    assert folder.restore(lambda path: None) == (1, {})
    with folder.lock():
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001"]


def test_a_full_disk_keeps_the_checkpoint_before_it_and_says_so(begun, monkeypatch, torch_whole):
    whole, options = torch_whole[0], [*torch_whole[1], "checkpoint_every=2"]
    real = storage_weights._write
    full = {"now": False}

    def write(path, kinds, tensors):
        if full["now"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, kinds, tensors)

    from lockstep_rlhf.algorithms.ppo import PPO

    step = PPO.step

    def filling(self, number):
        full["now"] = number == 3
        return step(self, number)

    monkeypatch.setattr(storage_weights, "_write", write)
    monkeypatch.setattr(PPO, "step", filling)
    with pytest.raises(CheckpointError, match="No space left on device.*Make room and run the same command again"):
        tiny(begun, *options)
    assert [folder.name for folder in checkpoint_folders(begun)] == ["00000002"]
    monkeypatch.undo()
    assert_same(tiny(begun, *options), whole)


# ------------------------------------------------------------------------------------------------------- the end


def test_a_run_stopped_in_its_last_step_trains_no_more_and_keeps_its_last_metrics(begun, monkeypatch, caplog, torch_whole):
    from lockstep_rlhf.algorithms.ppo import PPO

    whole, options = torch_whole
    stopped(monkeypatch, begun, 6, *options)
    monkeypatch.setattr(PPO, "step", lambda *_: pytest.fail("trained again"))
    run = tiny(begun, *options)
    assert "ppo resumes at step 6 of 6" in caplog.text
    assert_same(run, whole)
    done = read_json(output(run, "ppo").parent / "done.json")
    assert done["metrics"]["objective/score"] == lines(run, "ppo")[-1]["objective/score"]
    assert done["seconds"] >= round(lines(run, "ppo")[-1]["seconds"], 1) - 0.1  # the time before it was stopped counts


@pytest.mark.parametrize("damage", [Path.unlink, truncate])
def test_a_stage_whose_result_is_gone_is_not_done(tmp_path, caplog, damage):
    options = [*SFT_ONLY, "backend.threads=1"]
    run = tiny(tmp_path, *options)
    before = weights(run, "sft")
    damage(output(run, "sft") / "model.safetensors")
    tiny(tmp_path, *options)
    assert "sft starts over: it was done, but files of" in caplog.text
    after = weights(run, "sft")
    assert all(np.array_equal(after[name], before[name]) for name in before)


# --------------------------------------------------------------------------------------------- changed in between


def test_a_named_run_refuses_another_configuration_and_shows_the_difference(begun, monkeypatch, torch_whole):
    options = [*torch_whole[1], "name=mine"]
    stopped(monkeypatch, begun, 2, *options)
    before = {path: path.read_bytes() for path in (begun / "mine").iterdir()}
    with pytest.raises(ConfigError) as caught:
        tiny(begun, *options, "algorithm.kl_coef=0.5", "seed=1", "checkpoint_every=1")
    message = str(caught.value)
    assert message.startswith("The run 'mine' already exists, with another configuration (unfinished: ppo):\n")
    assert "  algorithm.kl_coef: 0.02 -> 0.5\n" in message and "  seed: 0 -> 1\n" in message
    assert "checkpoint_every" not in message and "stages.ppo" not in message
    assert "choose another name=..." in message and "config.yaml" in message
    assert {path: path.read_bytes() for path in (begun / "mine").iterdir()} == before
    tiny(begun, *options, "checkpoint_every=1", "samples_every=1")  # these do not decide results


def test_a_stage_that_starts_anew_because_its_code_changed_says_so(begun, monkeypatch, caplog, torch_whole):
    options = torch_whole[1]
    stopped(monkeypatch, begun, 2, *options)
    real = identity.code_digests
    monkeypatch.setattr(identity, "code_digests", lambda modules: real(modules) | {"lockstep": "changed"})
    run = tiny(begun, *options)
    assert "Starting over: pretrain (its earlier folder pretrain-torch-" in caplog.text
    assert "is unfinished). Changed since: the code of lockstep." in caplog.text
    assert "resumes at step" not in caplog.text
    assert without_timings(lines(run, "ppo")) == without_timings(lines(torch_whole[0], "ppo"))


def test_going_on_with_other_libraries_warns(begun, monkeypatch, caplog, torch_whole):
    from lockstep_torch.backend import TorchBackend

    options = torch_whole[1]
    stopped(monkeypatch, begun, 2, *options)
    monkeypatch.setattr(TorchBackend, "describe", lambda self: {"torch": "9.9", "device": "cpu", "precision": "float32"})
    tiny(begun, *options)
    assert "no longer bit for bit from here on, because this changed: torch: " in caplog.text and "-> 9.9" in caplog.text


# --------------------------------------------------------------------------------------------------------- locks


def test_a_lock_is_waited_for_and_taken_over_from_a_process_that_died(tmp_path, caplog):
    caplog.set_level("INFO", "lockstep")
    code = "import sys, time; from pathlib import Path; from lockstep.storage.locks import hold\nwith hold(Path(sys.argv[1])): "
    code += "print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "held\n"
        held = threading.Event()

        def work():
            with locks.hold(tmp_path):
                held.set()

        thread = threading.Thread(target=work)
        thread.start()
        assert not held.wait(0.3)
        owner.kill()
        assert held.wait(60)
        thread.join()
    assert f"waiting for process {owner.pid} on {socket.gethostname()}, which is working on {tmp_path.name}" in caplog.text


def test_records_keep_what_the_checkpoint_knows_and_say_what_is_missing(tmp_path, caplog):
    records = store.Records(tmp_path)
    records.metrics(0, {"loss": 1.0})
    positions = records.positions()
    records.metrics(1, {"loss": 2.0})
    records.close()
    again = store.Records(tmp_path, positions, seconds=100.0)
    again.metrics(1, {"loss": 3.0})
    again.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 1.0), (1, 3.0)]
    assert rows[1]["seconds"] >= 100
    store.Records(tmp_path, {"metrics": 10_000, "samples": 0}).close()
    assert "metrics.jsonl lost its last lines" in caplog.text
