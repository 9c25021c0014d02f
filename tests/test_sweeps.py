"""Sweeps through the command line: who starts the jobs, what is recorded, what happens to those that fail or are killed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from hydra_plugins.lockstep_launcher import varied
from lockstep.commands.cache import stored
from lockstep.commands.run import run_config, sweeps
from lockstep.commands.run.sweeps import SweepFolder, last_words, objective
from lockstep.config.compose import compose
from lockstep.errors import ConfigError
from lockstep.storage.files import read_json
from runs import DECODER, TINY, tiny
from test_runs import lines

ROOT = Path(__file__).parents[1]
FAST = ["backend.threads=1", "~stages.ppo_ptx", "evaluation.policies=[sft,ppo]"]
GOLD = "objective=evaluate/heldout/ppo/gold"
PRETRAIN = ["~stages.sft", "~stages.reward", "~stages.ppo", "~stages.evaluate"]
SFT = [*PRETRAIN[1:], "objective=sft/heldout/loss"]
BROKEN = "seed=0,-1"  # found out before torch is imported


def start(folder, *options):
    command = [sys.executable, "-m", "lockstep", "run", "-m", *TINY, *DECODER, *FAST, f"folder={folder}", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder.parent)


def sweep(folder, *options):
    """(exit code, what was printed, the jobs of sweep.json)"""
    with start(folder, *options) as process:
        printed = process.communicate()[0]
    return process.returncode, printed, jobs(next(folder.glob("sweeps/*")))


def jobs(sweep):
    return json.loads((sweep / "sweep.json").read_text())["jobs"]


def statuses(found):
    return sorted(job["status"] for job in found)


def stages(folder, name):
    return sorted(folder.glob(f"stages/{name}-*"))


def times(folder):
    """When each stage's metrics were last written: a stage that is not made again keeps its time."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("stages/*/metrics.jsonl")}


def needs(package):
    return pytest.mark.skipif(
        importlib.util.find_spec(f"hydra_plugins.{package}") is None,
        reason=f"{package} is not installed: pip install '.[sweeps]'",
    )


def test_each_job_has_its_own_mesh(tmp_path):
    """And what it makes is in the cache like anything else."""
    folder = tmp_path / "runs"
    code, printed, found = sweep(folder, *PRETRAIN, "backend.device=cpu", "backend.mesh.fsdp=2", "seed=0,1")
    assert code == 0 and statuses(found) == ["done", "done"], printed
    records = [read_json(folder / job["run"] / "run.json") for job in found]
    assert [record["backend"]["mesh"] for record in records] == ["fsdp=2"] * 2
    entries = stored.entries(folder, stored.users(folder))
    assert [entry.state for entry in entries] == ["done"] * 2
    assert sorted(entry.runs for entry in entries) == sorted([Path(job["run"]).name] for job in found)


# ------------------------------------------------------------------------------------------------------------ a grid


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """SFT at two learning rates, with a seed that is none, on two processes; and the same again."""
    folder = tmp_path_factory.mktemp("grid") / "runs"
    options = [*SFT, "sft.optimizer.learning_rate=1e-3,2e-3", BROKEN, "hydra.launcher.parallel=2"]
    first = sweep(folder, *options)
    before = times(folder)
    return folder, first, sweep(folder, *options), before


def test_a_jobs_lines_begin_with_what_varies_between_jobs():
    job = ["experiment=demo", "seed=1", r"data.seed=$\{seed\}", "algorithm=rloo", "~stages.ppo=null"]
    assert varied(job, ["experiment=demo", "data.seed=${seed}", "~stages.ppo"]) == ["seed=1", "algorithm=rloo"]
    assert varied([r"name=$\{seed\}"], []) == ["name=${seed}"]


def test_a_failing_job_stops_no_other_and_is_shown_with_its_error(grid):
    _, (code, printed, found), _, _ = grid
    assert code == 1
    assert statuses(found) == ["done", "done", "failed", "failed"]
    end = printed[printed.index("SweepFailed: Jobs: 2 failed. To rerun one:") :]
    assert end.count("ConfigError: seed=-1 must be at least 0.") == 2
    assert "seed=-1" in end.splitlines()[1] and end.splitlines()[1].startswith("  lockstep run ")
    assert "2 of 4 jobs are done. The sweep is in " in end and "The same command runs the rest." in end


def test_jobs_that_were_stopped_are_not_called_failed(tmp_path):
    record = SweepFolder(tmp_path)
    record.begin("lockstep run -m seed=0,1,2")
    for seed, status in enumerate(("done", "stopped", "failed")):
        record.note([f"seed={seed}"], status=status, error=None)
    with pytest.raises(sweeps.SweepFailed, match=r"Jobs: 1 failed, 1 stopped\. To rerun one:\n(.*\n)*1 of 3 jobs are done"):
        sweeps._outcome(record)


def test_the_record_names_runs_overrides_states_and_objectives(grid):
    folder, (_, printed, found), _, _ = grid
    for job in found:
        if job["status"] == "done":
            run = folder / job["run"]
            assert "seed=0" in job["overrides"] and job["error"] is None
            assert compose(job["overrides"])["folder"] == str(folder) and run.name in printed
            assert job["objective"] == objective(run, "sft/heldout/loss")
        else:
            assert "seed=-1" in job["overrides"] and job["objective"] is None
            assert job["error"] == "ConfigError: seed=-1 must be at least 0."


def test_parallel_jobs_make_a_stage_that_they_share_once(grid):
    folder = grid[0]
    assert {name: len(stages(folder, name)) for name in ("pretrain", "sft")} == {"pretrain": 1, "sft": 2}


def test_the_same_sweep_again_goes_on_in_its_folder_and_trains_nothing_that_is_done(grid):
    folder, (_, _, first), (code, printed, second), before = grid
    assert code == 1 and times(folder) == before
    assert {job["run"]: job["status"] for job in second} == {job["run"]: job["status"] for job in first}
    assert printed.count("is already done") == 2 and "resumes at" not in printed


def test_neither_a_sweep_nor_a_run_that_is_done_imports_torch_or_jax(grid):
    folder = grid[0]
    code = (
        "import sys; from lockstep.cli import main\n"
        "try: main()\n"
        "finally: print('heavy:', sorted({'torch', 'jax', 'transformers', 'wandb', 'ray', 'optuna'} & set(sys.modules)))"
    )
    rates = "sft.optimizer.learning_rate=1e-3"
    for options in (["-m", f"{rates},2e-3"], [rates]):
        command = [sys.executable, "-c", code, "run", *options, *TINY, *DECODER, *FAST, f"folder={folder}", *SFT]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "is already done" in done.stdout and done.stdout.splitlines()[-1] == "heavy: []"


# ------------------------------------------------------------------------------------------------------ kill and restart


def wait(process, until):
    deadline = time.monotonic() + 120
    while not until():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.02)


def kill_in_ppo(process, folder, count):
    """Kill so many of the sweep's jobs, each as soon as it has a step of PPO."""
    killed = set()

    def kill():
        for file in set(folder.glob("stages/ppo-*/metrics.jsonl")) - killed:
            if file.stat().st_size:
                os.kill(int((file.parent / "lock").read_text().split()[0]), signal.SIGKILL)
                killed.add(file)
        return len(killed) == count

    wait(process, kill)


def report(folder, runs):
    """What comparing these runs rests on, without times."""
    timed = lambda row: {k: v for k, v in row.items() if not k.startswith("perf/") and k != "seconds"}  # noqa: E731
    content = {}
    for name in runs:
        evaluation = read_json(folder / name / "run.json")["stages"]["evaluate"]["folder"]
        content[name] = (
            {stage: [timed(row) for row in lines(folder / name, stage)] for stage in ("pretrain", "sft", "reward", "ppo")},
            read_json(folder / evaluation / "output" / "evaluation.json"),
        )
    return content


def test_a_sweep_with_two_jobs_killed_and_started_again_ends_as_if_nothing_had_happened(tmp_path):
    common = [GOLD, "checkpoint_every=5", "algorithm.iterations=20"]
    options = [*common, "algorithm.kl_coef=0.05,0.5", "hydra.launcher.parallel=2"]
    broken = tmp_path / "broken"
    with start(broken, *options) as process:
        kill_in_ppo(process, broken, count=2)
        printed = process.communicate()[0]
    assert process.returncode == 1 and "killed by SIGKILL; its last lines:" in printed
    assert statuses(jobs(next(broken.glob("sweeps/*")))) == ["failed", "failed"]
    before = {path: at for path, at in times(broken).items() if "ppo" not in str(path)}
    assert {name: len(stages(broken, name)) for name in ("pretrain", "sft", "reward", "ppo")} == {
        "pretrain": 1, "sft": 1, "reward": 1, "ppo": 2,
    }  # fmt: skip

    code, printed, found = sweep(broken, *options)
    assert code == 0 and statuses(found) == ["done", "done"]
    assert {path: at for path, at in times(broken).items() if "ppo" not in str(path)} == before
    whole = [tiny(tmp_path / "whole", *FAST, *common, f"algorithm.kl_coef={coefficient}") for coefficient in (0.05, 0.5)]
    names = [run.name for run in whole]
    assert sorted(job["run"] for job in found) == sorted(names)
    assert report(broken, names) == report(tmp_path / "whole", names)
    assert [job["objective"] for job in found] == [
        objective(tmp_path / "whole" / job["run"], GOLD.partition("=")[2]) for job in found
    ]


ALONE = [*PRETRAIN, "~stages.ppo_ptx", "backend.threads=1"]


def test_the_stage_of_a_killed_owner_is_taken_over_from_its_checkpoint_by_who_waits(tmp_path):
    """The owner is stopped in its tracks once it has a checkpoint, so that the other certainly has to wait."""
    command = [sys.executable, "-m", "lockstep", "run", *TINY, *DECODER, f"folder={tmp_path}", *ALONE[1:]]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    owner = subprocess.Popen([*command, ALONE[0], "checkpoint_every=1"], **options)
    wait(owner, lambda: list(tmp_path.glob("stages/pretrain-*/checkpoints/0*/sums.json")))
    owner.send_signal(signal.SIGSTOP)
    waiting = subprocess.Popen(command, **options)  # SFT too
    printed = next(line for line in waiting.stdout if "waiting for process" in line)
    assert f"waiting for process {owner.pid} on " in printed and "which is working on pretrain-torch-" in printed
    owner.kill()
    owner.communicate()
    printed = waiting.communicate()[0]
    assert waiting.returncode == 0, printed
    assert "pretrain resumes at step" in printed and "sft done" in printed
    [folder] = tmp_path.glob("stages/pretrain-*")
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------------- other starters


@needs("hydra_optuna_sweeper")
def test_a_search_asks_for_jobs_learns_their_objective_and_outlives_the_failed_ones(tmp_path):
    options = [
        *PRETRAIN, "hydra/sweeper=search", "hydra.sweeper.n_trials=3", "hydra.sweeper.direction=minimize",
        "pretrain.optimizer.learning_rate=tag(log,interval(1e-4,1e-2))", "seed=choice(0,-1)",
        "objective=pretrain/heldout/loss", "hydra.launcher.parallel=2",
    ]  # fmt: skip
    folder = tmp_path / "runs"
    code, printed, found = sweep(folder, *options)
    assert code == 1 and len(found) == 3 and set(statuses(found)) == {"done", "failed"}, printed
    done = [job for job in found if job["status"] == "done"]
    [file] = folder.glob("sweeps/*/optimization_results.yaml")
    best = yaml.safe_load(file.read_text())
    assert best["best_value"] == min(job["objective"] for job in done)
    assert best["best_params"]["seed"] == 0
    before = times(folder)
    again = sweep(folder, *options)
    assert again[2] == found and times(folder) == before  # the same questions, answered already


LAUNCHED = [*PRETRAIN, BROKEN, "objective=pretrain/heldout/loss"]


def assert_launched(folder, code, printed, found):
    """Two jobs, one of them broken."""
    assert code == 1 and "1 of 2 jobs are done" in printed, printed
    done, failed = sorted(found, key=lambda job: job["status"])
    assert done["objective"] == objective(folder / done["run"], "pretrain/heldout/loss")
    assert failed["error"] == "ConfigError: seed=-1 must be at least 0."


@needs("hydra_submitit_launcher")
def test_jobs_started_as_slurm_would_start_them(tmp_path):
    folder = tmp_path / "runs"
    assert_launched(folder, *sweep(folder, "hydra/launcher=slurm_local", *LAUNCHED))
    outputs = [file.read_text() for file in folder.glob("sweeps/*/submitit/*/*_log.out")]
    assert len(outputs) == 2 and any("pretrain done" in output for output in outputs)


SLURM = {
    "sbatch": """
        # Slurm's part, played on one machine: every task of the array at once.
        cp "$1" "$SLURM_PLAYED"
        for task in $(seq 0 $(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")); do
            env SLURM_JOB_ID=$((4711 + task)) SLURM_ARRAY_JOB_ID=4711 SLURM_ARRAY_TASK_ID=$task SLURM_NTASKS=1 \\
                SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_NODELIST=here \\
                sh "$1" > /dev/null 2>&1 &
        done
        echo Submitted batch job 4711
    """,
    "srun": """
        while case "$1" in --output | --error) shift ;; --*) ;; *) false ;; esac; do shift; done
        exec "$@"
    """,
    "sacct": "printf 'JobID|State|NodeList\\n4711_0|RUNNING|here\\n4711_1|RUNNING|here\\n'",
    "scontrol": "echo here",
    "scancel": "true",
}


@needs("hydra_submitit_launcher")
def test_jobs_started_by_slurms_own_commands(tmp_path, monkeypatch):
    """`sbatch` and the others are played by shell scripts; submitit, the launcher and the jobs are real."""
    (tmp_path / "bin").mkdir()
    for name, text in SLURM.items():
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n" + textwrap.dedent(text))
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_PLAYED", str(tmp_path / "script.sh"))
    folder = tmp_path / "runs"
    assert_launched(folder, *sweep(folder, "hydra/launcher=slurm", "hydra.launcher.partition=night", *LAUNCHED))
    script = (tmp_path / "script.sh").read_text()
    wanted = ["partition=night", "time=240", "gpus-per-node=1", "cpus-per-task=4", "mem=32GB", "array=0-1%2", "job-name=lockstep"]
    assert [option for option in wanted if f"#SBATCH --{option}\n" not in script] == []


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'")
def test_jobs_started_by_a_ray_of_this_machine(tmp_path):
    folder = tmp_path / "runs"
    assert_launched(folder, *sweep(folder, "hydra/launcher=ray_jobs", "hydra.launcher.ray.init.num_cpus=2", *LAUNCHED))


@pytest.mark.parametrize(
    ("choice", "package", "extra"),
    [
        ("hydra/sweeper=search", "hydra-optuna-sweeper", "sweeps"),
        ("hydra/launcher=slurm", "hydra-submitit-launcher", "sweeps"),
        ("hydra/launcher=ray_jobs", "hydra-ray-launcher", "ray"),
    ],
)
def test_a_choice_that_is_not_installed_says_what_to_type(choice, package, extra, monkeypatch):
    monkeypatch.setattr(sweeps.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        sweeps.sweep(["-m", choice, "seed=0,1"])
    assert str(caught.value) == f"{choice} needs {package}, which is not installed. Type: pip install 'lockstep-rlhf[{extra}]'"


# ------------------------------------------------------------------------------------------------------ W&B's sweeps


@pytest.mark.parametrize("parallel", ["0", "-1", "1.5", "null", "true"])
def test_a_sweep_runs_at_least_one_job_at_a_time(parallel, tmp_path):
    with pytest.raises(ConfigError, match=f"^hydra.launcher.parallel={parallel} must be at least 1: how many jobs run at a time"):
        sweeps.sweep(["-m", "seed=0,1", f"hydra.launcher.parallel={parallel}", f"folder={tmp_path}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["seed=0,1", "folder=null"], "folder=None should be str"),
        (["algorithm.kl_coef=interval(0.1,1)", "seed=null"], "seed=None should be int"),
        (["seed=0,1", "policy.path=a=b"], """Hydra cannot read policy.path=a=b: .* Type: policy.path="'a=b'"$"""),
        (["seed=range(0,0)"], r"^seed=range\(0,0\) gives no value, so there would be no job\.$"),
        (["seed=0,1", "policy=null"], "policy=null: a group is chosen by the name of one of its files"),
    ],
)
def test_what_all_jobs_would_refuse_is_refused_before_the_first(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        sweeps.sweep(["-m", *given])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("swept", ["experiment=glob(d*)", "algorithm.kl_coef=tag(log,interval(0.02,0.5))", "seed=range(1,3)"])
def test_every_form_of_hydra_names_a_folder_for_the_sweep(swept, tmp_path):
    assert sweeps.sweep_folder(["-m", swept, f"folder={tmp_path}"]).parent == tmp_path / "sweeps"


def test_the_example_of_a_wandb_sweep_composes_and_looks_at_a_metric_that_its_runs_log():
    """Its agent turns {key: value} into key=value, in place of ${args_no_hyphens}."""
    config = yaml.safe_load((ROOT / "docs" / "examples" / "sweep.yaml").read_text())
    assert config["command"][:2] == ["lockstep", "run"] and config["command"][-1] == "${args_no_hyphens}"
    values = {key: (entry.get("values") or [entry["min"]])[0] for key, entry in config["parameters"].items()}
    composed = compose([*config["command"][2:-1], *(f"{key}={value}" for key, value in values.items())])
    assert composed["objective"] == config["metric"]["name"]
    assert composed["algorithm"]["kl_coef"] == values["algorithm.kl_coef"] and composed["seed"] == values["seed"]


def test_the_agents_run_gets_the_objective_and_the_stages_have_runs_of_their_own(tmp_path, monkeypatch):
    from test_tracking import history, run_record

    settings = tmp_path / "parameters.yaml"
    settings.write_text("wandb_version: 1\npretrain.epochs: {value: 1}\n")
    monkeypatch.chdir(tmp_path)
    for name, value in zip(sweeps.AGENT, ("sweep1", "agentrun", str(settings)), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tiny(tmp_path / "runs", *ALONE, "tracker=wandb", "tracker.mode=offline", "objective=pretrain/heldout/loss")
    assert history(tmp_path)[-1]["pretrain/heldout/loss"] == objective(run, "pretrain/heldout/loss")
    assert (run_record(tmp_path).run_id, run_record(tmp_path).sweep_id) == ("agentrun", "sweep1")
    [stage] = stages(tmp_path / "runs", "pretrain")
    assert (run_record(stage).run_id, run_record(stage).sweep_id) == (stage.name, "")


# -------------------------------------------------------------------------------------------------------- small parts


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("runs"), *ALONE)


def test_an_objective_that_no_stage_has_names_the_nearest(pretrained):
    with pytest.raises(
        ConfigError, match=r"the stage pretrain has no final 'heldout/los'. Did you mean 'heldout/loss'\? It has: "
    ):
        objective(pretrained, "pretrain/heldout/los")
    with pytest.raises(
        ConfigError, match=r"objective=pretain/loss: no stage 'pretain'. Did you mean 'pretrain'\? It is stage/metric"
    ):
        run_config(compose([*ALONE, "objective=pretain/loss"]), "test")


def test_the_objective_decides_no_result(pretrained, capsys):
    again = tiny(pretrained.parent, *ALONE, "objective=pretrain/heldout/loss")
    assert again == pretrained
    printed = capsys.readouterr().out
    assert f"run {pretrained.name} is already done" in printed
    assert f"objective pretrain/heldout/loss: {objective(pretrained, 'pretrain/heldout/loss')}" in printed


def test_last_words_are_the_error_or_the_last_lines():
    traceback = ["Traceback (most recent call last):", '  File "x.py", line 1', "torch.OutOfMemoryError: no room", "for 3 GB"]
    assert last_words(["pretrain done", *traceback]) == "torch.OutOfMemoryError: no room\nfor 3 GB"
    assert last_words([f"line {i}" for i in range(9)]) == "line 4\nline 5\nline 6\nline 7\nline 8"
    assert last_words([]) == "it printed nothing"


def test_many_processes_write_one_record(tmp_path):
    code = "import sys; from pathlib import Path; from lockstep.commands.run.sweeps import SweepFolder\n"
    code += "for i in range(20): SweepFolder(Path(sys.argv[1])).note([sys.argv[2], str(i)], status='done')"
    SweepFolder(tmp_path).begin("lockstep run -m")
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(i)]) for i in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert len(SweepFolder(tmp_path).jobs("done")) == 60
