"""Several processes that run one program: what they share, what they divide, and how a run of them begins and ends."""

import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lockstep.checking.conformance.backends import terms as kit
from lockstep.checking.conformance.world import ARCHITECTURE, World
from lockstep.commands.run import workers
from lockstep.config.compose import compose, group
from lockstep.config.mesh import MeshConfig
from lockstep.config.schema import parse
from lockstep.errors import CheckpointError, ConfigError, EnvironmentFailed, LockstepError, OutOfStep, RewardError
from lockstep.interfaces import Environment, Episode, Label, Labeler, Reply, RewardModel
from lockstep.launchers import Place, meeting_place, place
from lockstep.learning.episodes import EnvironmentConfig, replies
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.models.blueprint import Adapter, Blueprint
from lockstep.planning.calls import Call, Part, Shape
from lockstep.processes import ALONE, Processes, decode, encode
from lockstep.runs import assembly
from lockstep.runs.asked_once import SharedLabeler, SharedRewardModel
from lockstep.runs.experiment import Experiment
from lockstep.runs.store import StageFolder
from lockstep.storage.files import read_json, write_json
from lockstep.storage.weights import read_tensor, stored_weights
from lockstep.types import Prompt
from lockstep_torch.backend import TorchBackend
from runs import DECODER, TINY
from test_runs import lines, weights

torch = pytest.importorskip("torch")
HERE = Path(__file__).parent
SECONDS = 500
"""More than any of these programs takes on a busy machine."""


# ------------------------------------------------------------------------------------------------- what they share


class Thread(Processes):
    """A process that is a thread of this one."""

    def __init__(self, rank: int, messages: list[bytes], barrier: threading.Barrier):
        self.rank, self.count, self.messages, self.barrier = rank, len(messages), messages, barrier

    def exchange(self, message: bytes) -> list[bytes]:
        self.messages[self.rank] = message
        self.barrier.wait(10)
        found = list(self.messages)
        self.barrier.wait(10)
        return found


def together(do, count=2):
    """What ``do(processes)`` returned or raised, in each of them."""
    messages, barrier, found = [b""] * count, threading.Barrier(count), [None] * count

    def one(rank):
        try:
            found[rank] = do(Thread(rank, messages, barrier))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=[rank]) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_messages_come_back_as_they_were():
    value = {
        "none": None, "flags": [True, False], "numbers": (1, -0.1, float("inf")), 3: "tent \u26fa", "bytes": b"\0\xff",
        "nested": {"list": [[], (), {}]},
    }  # fmt: skip
    assert decode(encode(value)) == value
    assert str(decode(encode(float("nan")))) == "nan"


@pytest.mark.parametrize("array", [np.arange(6, dtype=np.int32).reshape(2, 3), np.array([True]), np.zeros((0, 2), np.float32)])
def test_arrays_come_back_as_they_were(array):
    found = decode(encode([array]))[0]
    assert found.dtype == array.dtype and found.shape == array.shape and (found == array).all()


@pytest.mark.parametrize("value", [{1, 2}, Prompt.of("w1"), np.float32(1), np.array([object()]), lambda: None])
def test_what_would_need_pickle_is_refused(value):
    with pytest.raises(TypeError, match="cannot be shared between processes"):
        encode([value])


def test_what_one_process_raises_in_its_part_is_raised_on_all():
    def part(processes):
        if processes.rank == 1:
            raise CheckpointError("the disk is full")

    done = together(lambda processes: processes.together(lambda: part(processes)), 3)
    assert [(type(each), str(each)) for each in done] == [(CheckpointError, "the disk is full")] * 3
    with pytest.raises(CheckpointError):
        ALONE.together(lambda: part(Thread(1, [b""] * 2, threading.Barrier(1))))


def test_a_checkpoint_that_one_process_cannot_write_or_read_is_an_error_on_all(tmp_path):
    """Before, the others waited for it."""
    folder = StageFolder(tmp_path)

    def touched(processes, fails):
        def touch(where):
            if processes.rank == fails:
                raise OSError("no room")
            (where / str(processes.rank)).touch()

        return touch

    failed = together(lambda processes: folder.save(3, touched(processes, 1), {}, processes))
    assert all(isinstance(each, CheckpointError | LockstepError) and "no room" in str(each) for each in failed)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert together(lambda processes: folder.save(3, touched(processes, None), {}, processes)) == [None, None]
    assert sorted(file.name for file in (tmp_path / "checkpoints/00000003").iterdir()) == ["0", "1", "state.json", "sums.json"]
    failed = together(lambda processes: folder.restore(touched(processes, 0), processes))
    assert all("no room" in str(each) for each in failed)


def test_only_process_0_makes_what_is_shared():
    made = []
    assert together(lambda processes: processes.share(lambda: made.append(processes.rank) or "it"), 3) == ["it"] * 3
    assert made == [0]


def test_what_process_0_raises_is_raised_on_all_and_told_once():
    def fail():
        raise RewardError("the server is gone")

    found = together(lambda processes: processes.share(fail))
    assert [type(each) for each in found] == [RewardError] * 2 and {str(each) for each in found} == {"the server is gone"}
    assert [each.told for each in found] == [False, True]


def test_a_bug_on_process_0_ends_the_others_too():
    found = together(lambda processes: processes.share(lambda: 1 / 0))
    assert isinstance(found[0], ZeroDivisionError) and isinstance(found[1], LockstepError)
    assert str(found[1]) == "ZeroDivisionError: division by zero"


def test_all_learn_what_each_has_made_and_what_any_could_not():
    assert together(lambda processes: processes.each(lambda: processes.rank), 3) == [[0, 1, 2]] * 3

    def fail(processes):
        if processes.rank == 1:
            raise CheckpointError("the disk is full")

    found = together(lambda processes: processes.each(lambda: fail(processes)), 3)
    assert [type(each) for each in found] == [CheckpointError] * 3 and {str(each) for each in found} == {"the disk is full"}


def test_one_that_is_asked_to_stop_stops_all():
    assert together(lambda processes: processes.any(processes.rank == 1)) == [True, True]
    assert together(lambda processes: processes.any(False)) == [False, False]


def test_the_first_process_with_something_else_is_named():
    batch = np.arange(4)
    found = together(lambda processes: processes.agree("batch", batch + (processes.rank == 2)), 4)
    assert all(isinstance(each, OutOfStep) for each in found)
    assert str(found[0]).startswith("Process 2 of 4 has not the same batch as process 0")
    assert together(lambda processes: processes.agree("batch", batch, "text")) == [None, None]


def test_arrays_of_another_shape_or_type_are_something_else():
    for other in (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.int32)):
        found = together(lambda p, other=other: p.agree("batch", other if p.rank else np.zeros((3, 2), np.float32)))
        assert isinstance(found[1], OutOfStep)


def test_alone_nothing_is_encoded():
    thing = object()
    assert ALONE.share(lambda: thing) is thing
    assert ALONE.any(True) and not ALONE.any(False)
    ALONE.agree("batch", "text")


# ----------------------------------------------------------------------------------------------- what is asked once


class Counting(RewardModel):
    """Scores that no two calls share."""

    calls = 0

    def __init__(self):
        pass

    def score(self, responses):
        Counting.calls += 1
        if responses == "fail":
            raise RewardError("the judge is gone")
        return np.full(3, Counting.calls, np.float32)

    def details(self):
        return {"calls": np.full(3, Counting.calls, np.float32)}


def test_a_reward_function_is_asked_once_for_all():
    Counting.calls = 0

    def ask(processes):
        shared = SharedRewardModel(Counting(), processes)
        return shared.score(None).tolist(), shared.details()["calls"].tolist()

    assert together(ask) == [([1.0] * 3, [1.0] * 3)] * 2
    assert Counting.calls == 1


def test_a_reward_function_that_fails_fails_for_all():
    found = together(lambda processes: SharedRewardModel(Counting(), processes).score("fail"))
    assert [str(each) for each in found] == ["the judge is gone"] * 2


def test_a_labeler_is_asked_once_for_all():
    asked = []

    class One(Labeler):
        def __init__(self):
            pass

        def label(self, candidates, seed, folder):
            asked.append(seed)
            return [Label("7", (0, 1, 0), "ada"), Label("8", (1, 0), "bo", "people")]

    found = together(lambda processes: SharedLabeler(One(), processes).label([], 3, Path()))
    assert found == [[Label("7", (0, 1, 0), "ada"), Label("8", (1, 0), "bo", "people")]] * 2 and asked == [3]


def test_an_environment_is_asked_once_for_all():
    asked = []

    class Says(Environment):
        def reply(self, episode):
            asked.append(episode.seed)
            if episode.seed == 9:
                raise ValueError("out of order")
            return Reply.says(f"w{episode.seed}", role="tool", reward=0.5) if episode.seed else Reply.ends(1)

    def ask(processes, seeds):
        environment = Says(EnvironmentConfig())
        environment.processes = processes
        return replies(environment, [Episode(Prompt.of("w1"), seed) for seed in seeds])

    assert (
        together(lambda processes: ask(processes, [0, 4])) == [[Reply.ends(1.0), Reply.says("w4", role="tool", reward=0.5)]] * 2
    )
    assert asked == [0, 4]
    assert all(isinstance(each, EnvironmentFailed) for each in together(lambda processes: ask(processes, [9])))


def test_an_environment_that_replies_from_a_model_is_asked_on_every_process():
    asked = []

    class Draws(Environment):
        def reply(self, episode):
            raise AssertionError

        def replies(self, episodes):
            asked.append(len(episodes))
            return [Reply.says(f"w{episode.seed}") for episode in episodes]

    def ask(processes):
        environment = Draws(EnvironmentConfig())
        environment.processes = processes
        return replies(environment, [Episode(Prompt.of("w1"), seed) for seed in (3, 4)])

    assert together(ask) == [[Reply.says("w3"), Reply.says("w4")]] * 2 and asked == [2, 2]


# ------------------------------------------------------------------------------------------------------ where they are


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Place()),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Place(3, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Place()),
        ({"WORLD_SIZE": "4"}, Place()),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}, Place(5, 8, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, Place()),  # sbatch's own shell
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}, Place()),
        ({"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}, Place(2, 4)),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, Place()),
        ({"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "a,b"}, Place(1, 8)),
    ],
)
def test_launchers_are_recognised_by_their_environment(environment, expected):
    assert place(environment) == expected


def test_the_hosts_of_a_tpu_slice_meet_at_the_first():
    hosts = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "one,two"}
    assert meeting_place(place(hosts), hosts) == ("one", "8476")
    assert meeting_place(place(hosts), hosts | {"MASTER_ADDR": "x", "MASTER_PORT": "7"}) == ("x", "7")
    by_torchrun = {"MASTER_ADDR": "x", "MASTER_PORT": "7", "TORCHELASTIC_RUN_ID": "none"}
    assert meeting_place(Place(0, 2), by_torchrun) == ("x", "8")
    with pytest.raises(ConfigError, match="MASTER_PORT='p' should be the number"):
        meeting_place(Place(0, 2), {"MASTER_ADDR": "x", "MASTER_PORT": "p"})
    with pytest.raises(ConfigError, match="TPU_WORKER_ID='2' should be a number below 2"):
        place(hosts | {"TPU_WORKER_ID": "2"})
    with pytest.raises(ConfigError, match="TPU_WORKER_ID='' should be"):
        place({"TPU_WORKER_HOSTNAMES": "one,two"})


def test_a_rank_that_is_no_number_is_an_error():
    with pytest.raises(ConfigError, match="LOCAL_RANK, RANK, WORLD_SIZE must be numbers, and are 'x', '2', '0'"):
        place({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


@pytest.mark.parametrize(
    ("mesh", "devices", "expected"),
    [
        ({}, 1, (1, 1, 1)), ({"fsdp": 2}, 2, (1, 2, 1)), ({"fsdp": -1}, 8, (1, 8, 1)), ({"fsdp": -1, "data": 2}, 8, (2, 4, 1)),
        ({"data": -1}, 3, (3, 1, 1)), ({"fsdp": 2, "data": 2}, None, (2, 2, 1)), ({"tensor": 4, "fsdp": -1}, 8, (1, 2, 4)),
    ],
)  # fmt: skip
def test_a_mesh_has_the_devices_that_there_are(mesh, devices, expected):
    sizes = parse(MeshConfig, mesh, "backend.mesh").sizes(devices)
    assert (sizes["data"], sizes["fsdp"], sizes["tensor"]) == expected


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"fsdp": -1, "data": -1}, "one may be -1"),
        ({"fsdp": 0}, "a number from 1"),
        ({"fsdp": 3}, r"mesh=\{fsdp: 3\} is of 3 processes, and 4 were started. Type: backend.mesh.fsdp=-1"),
        ({"fsdp": 3, "data": -1}, "does not fit the 4 devices"),
    ],
)
def test_a_mesh_that_cannot_be_is_an_error(mesh, message, monkeypatch):
    from lockstep_torch import device

    monkeypatch.setattr(device, "place", lambda: Place(0, 4, 0))
    with pytest.raises(ConfigError, match=message):
        device.axes(parse(MeshConfig, mesh, "backend.mesh"), 4)


def test_matmuls_that_cannot_be_divided_are_an_error(folders):
    from lockstep_torch.decoder import DecoderNetwork
    from lockstep_torch.network import Network
    from lockstep_torch.policies import Decoder

    class Axis:
        size = 4

    network = Decoder.load(folders[0], TorchBackend(TorchBackend.Config("cpu", threads=1))).network
    assert isinstance(network, DecoderNetwork) and network.architecture.kv_heads == 2
    with pytest.raises(ConfigError, match=r"backend.mesh.tensor=4 does not divide 2 heads of keys evenly"):
        network.divide_matmuls(Axis())
    with pytest.raises(ConfigError, match="Llama's shape only"):
        Network.divide_matmuls(network, Axis())


def test_a_shard_is_cast_once_for_all_tokens():
    """In bfloat16. Of a layer sharded along the tensor axis, as generation has it."""
    from torch.distributed.device_mesh import DeviceMesh

    from lockstep_torch.mesh import Root, TensorAxis, divided, local

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        layer, x = torch.nn.Linear(8, 4, bias=False), torch.ones(1, 8)
        TensorAxis(DeviceMesh("cpu", [0], mesh_dim_names=("tensor",))).divide(layer, 0)
        sharded = layer.weight

        def casts():
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
                found = [torch.nn.functional.linear(x.bfloat16(), local(layer.weight)) for _ in range(5)]
            assert (found[0] == local(sharded).detach().bfloat16().sum(1)).all()
            return sum(event.name == "aten::_to_copy" for event in profile.events()) - 5  # without x's

        before = casts()
        assert Root(layer, None).whole(lambda: (divided(layer.weight), casts())) == (False, 1)
        assert layer.weight is sharded and before == 5
    finally:
        torch.distributed.destroy_process_group()


def experiment(folder, *overrides):
    return compose([*TINY, *DECODER, "backend=torch", "backend.device=cpu", f"folder={folder}", *overrides])


def test_as_many_processes_as_there_are_cpus_is_not_known(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no accelerator to count. Say how many: backend.mesh.fsdp=2"):
        workers.wanted(experiment(tmp_path, "backend.mesh.fsdp=-1"))
    assert workers.wanted(experiment(tmp_path, "backend.mesh.fsdp=2", "backend.mesh.data=2")) == 4
    assert workers.wanted(experiment(tmp_path)) == 1


def test_a_backend_that_runs_as_one_process_is_not_started_as_several(tmp_path, monkeypatch):
    monkeypatch.setattr(assembly, "place", lambda: Place(0, 2, 0))
    made = assembly.Assembly(Experiment(experiment(tmp_path)), {})
    with pytest.raises(ConfigError, match="2 processes were started, and backend=torch runs as one"):
        _ = made.processes


def test_processes_that_cannot_meet_are_told_where_to(monkeypatch):
    from lockstep_torch.mesh import Group

    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="8 processes were started, and do not know where to meet. Set MASTER_ADDR"):
        Group(Place(1, 8, 1), torch.device("cpu"))


def test_the_mesh_is_no_part_of_what_a_run_or_a_stage_is(tmp_path):
    one, two = (Experiment(experiment(tmp_path, f"backend.mesh.fsdp={count}")) for count in (1, 2))
    assert one.name == two.name and one.identities == two.identities


# ---------------------------------------------------------------------------------------------------- what they divide


def started(count, *command, **environment):
    """The processes of a command of Python, as a launcher starts them."""
    port = str(workers._free_port())
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    common["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"  # the last one counts
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [
        subprocess.Popen([sys.executable, *map(str, command)], env=os.environ | common | environment | place, **pipes)
        for place in places
    ]


def ended(processes):
    """Their exit codes, and what all of them printed."""
    try:
        printed = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "\n".join(printed)


def several(count, *arguments, program="one_of_several.py", **environment):
    """Run a program of this folder in as many processes."""
    codes, printed = ended(started(count, HERE / program, *arguments, **environment))
    assert codes == [0] * count, printed


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """ran(backend): where several processes of it have trained policies. Once, since starting them takes most of the time."""

    @functools.cache
    def run(backend):
        folder = tmp_path_factory.mktemp(backend)
        if backend == "jax":  # devices of one process are in test_mesh.py
            several(2, folder, backend, "backend.mesh.fsdp=-1", "decoder")
            several(1, folder, backend, "", "decoder")
            several(3, folder, backend, "backend.mesh.fsdp=-1", "decoder")
            return folder
        several(2, folder, backend, "backend.mesh.fsdp=-1", "decoder", "lora")
        several(1, folder, backend, "", "decoder", "lora")
        several(3, folder, backend, "backend.mesh.fsdp=-1", "decoder")
        several(4, folder, backend, "backend.mesh.fsdp=2 backend.mesh.tensor=2", "decoder", "lora")
        return folder

    return run


@pytest.fixture(scope="module", params=["torch decoder", "torch lora", "jax decoder"])
def trained(request, ran):
    """{(count, rank): numbers}, and the folder of what was saved: BACKEND/POLICY."""
    backend, policy = request.param.split()
    folder = ran(backend) / policy
    return {tuple(map(int, path.stem.split("."))): dict(np.load(path)) for path in folder.glob("?.?.npz")}, folder


def part(numbers, kind):
    return {name: array for name, array in numbers.items() if name.startswith(kind)}


def apart(one, other):
    """The largest difference, relative to the largest number."""
    assert one.keys() == other.keys() and one
    return max(np.abs(one[n] - other[n]).max() for n in one) / max(np.abs(array).max() for array in one.values())


def test_two_processes_draw_the_tokens_of_one(trained):
    numbers, _ = trained
    for name in ("tokens", "mask"):
        assert (numbers[2, 0][name] == numbers[1, 0][name]).all()
    assert numbers[2, 0]["tokens"].dtype == np.int32 and numbers[2, 0]["mask"].dtype == bool


@pytest.mark.parametrize("kind", ["gradient", "output", "parameter", "logprobs", "losses"])
def test_two_processes_compute_what_one_computes(trained, kind):
    numbers, _ = trained
    assert apart(part(numbers[1, 0], kind), part(numbers[2, 0], kind)) < 2e-6


@pytest.mark.parametrize("kind", ["gradient", "output", "parameter", "logprobs", "losses"])
def test_four_that_divide_rows_and_matmuls_compute_what_one_computes(trained, kind):
    numbers, folder = trained
    if folder.parent.name.startswith("torch"):  # of JAX, in test_mesh.py
        # The kit's adapters make attention so sharp that torch's and JAX's gradients of one process are 7e-5 apart.
        most = 1e-4 if folder.name == "lora" and kind in ("gradient", "parameter") else 3e-6
        assert apart(part(numbers[1, 0], kind), part(numbers[4, 0], kind)) < most
        assert (numbers[4, 0]["tokens"] == numbers[1, 0]["tokens"]).all()


def test_all_processes_have_the_same_bits(trained):
    numbers, _ = trained
    for (count, rank), own in numbers.items():
        first = numbers[count, 0]
        assert own.keys() == first.keys()
        assert [name for name in own if own[name].tobytes() != first[name].tobytes()] == [], (count, rank)


def state(folder):
    return {name: read_tensor(stored) for name, stored in stored_weights(folder, "learner.safetensors").items()}


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if expected[name].tobytes() != found[name].tobytes()] == []


def test_state_saved_in_shards_by_two_is_restored_bit_for_bit_by_others(trained):
    numbers, folder = trained
    assert len(list((folder / "saved by 2").glob("learner-*.safetensors"))) > 4
    again = {int(each.name[-1]): each for each in folder.glob("again saved by 2 at ?")}
    assert again.keys() >= ({1, 2} if folder.name == "lora" else {1, 2, 3})
    for found in again.values():
        check_equal(state(found), state(folder / "saved by 2"))
    assert numbers[1, 0]["after saved by 2"] == pytest.approx(numbers[2, 0]["after saved by 2"], rel=2e-6)


def test_the_other_backend_reads_what_two_saved(trained, tmp_path):
    _, folder = trained
    other, policy = "jax" if folder.parent.name.startswith("torch") else "torch", folder.name
    world = World(other, policy=policy, overrides=["backend.device=cpu"])
    learner = kit.learning(world, kit.pair(world))
    learner.restore(folder / "saved by 2")
    learner.save(tmp_path)
    check_equal(state(tmp_path), state(folder / "saved by 2"))
    policy = learner.models["policy"]
    if (adapter := folder / "policy of 2" / "adapter_config.json").exists():  # it was on a checkpoint in a folder of its own
        write_json(adapter, read_json(adapter) | {"base_model_name_or_path": str(world.folder / "checkpoint")})
    again = type(policy).load(folder / "policy of 2", world.backend)
    check_equal(again.parameters(), {name: a for name, a in policy.parameters().items() if not name.startswith("score.")})


def test_a_process_that_draws_other_data_is_named(trained):
    numbers, _ = trained
    assert str(numbers[2, 1]["divergence"]).startswith("Process 1 of 2 has not the same batch as process 0")


def test_torch_sends_what_a_plan_says(trained):
    """For the gradients of a policy and a value network: weights are gathered twice, and gradients summed."""
    numbers, folder = trained
    if not (sent := numbers[2, 0]["sent"]).size:
        return  # JAX's are read from its programs
    adapter = Adapter("", 16, 32.0, tuple(group("policy", "lora")["targets"])) if folder.name == "lora" else None
    policy = Blueprint(ARCHITECTURE, adapter)
    value = Blueprint(ARCHITECTURE, adapter, language_head=False, scalar_head=True)
    outputs = {"policy": ("logprobs", "entropy"), "value": ("values", "scores")}
    shape, models = Shape(7, 6, 12), {"policy": policy, "value": value}
    part = Part(shape, outputs, None, {}, dropout=True, passed=False)
    call = Call("update", models, shape, terms=(part,), optimizers=dict.fromkeys(models, OptimizerConfig()))
    planner = TorchBackend.planner(TorchBackend.Config("cpu", mesh=MeshConfig(fsdp=2)), None)
    found = list(planner.collectives(call, {name: planner.model(blueprint) for name, blueprint in models.items()}))
    assert sum(each.count for each in found) == len(sent)
    assert sum(each.sent for each in found) == pytest.approx(sent.sum(), rel=0.02)  # FSDP fills weights up to whole parts


CHECKED = {"jax": [], "torch": ["ppo", "sft", "reward_modelling"]}
"""Of JAX the backend's checks of meshes: four devices of one process pass the whole kit in test_mesh.py, and each program takes
seconds to compile. Of torch what test_check_command.py leaves out."""


@pytest.mark.timeout(4 * SECONDS)
@pytest.mark.parametrize("backend", CHECKED)
def test_the_kit_passes_on_two_processes_of_a_launcher(backend, tmp_path):
    several(2, tmp_path / "found.json", backend, *CHECKED[backend], program="checks_of_several.py")
    found = read_json(tmp_path / "found.json")
    assert [each for each in found if each[1] == "failed"] == []
    assert sum(each[1] == "passed" for each in found) >= (60 if CHECKED[backend] else 6)


@pytest.mark.parametrize(
    ("backend", "code", "message"),
    [("torch", 1, "Process 1 of 2 has not responded for 2 seconds"), ("jax", -signal.SIGABRT, "heartbeat")],
)
def test_a_process_that_is_suspended_ends_the_others(backend, code, message):
    first, suspended = started(2, HERE / "stopped_of_several.py", backend)
    try:
        printed = first.communicate(timeout=SECONDS)[0]
    finally:
        first.kill()
        suspended.kill()
    assert first.returncode == code and "met" in printed and message in printed, printed


# ---------------------------------------------------------------------------------------------------------- workers


def work(program, count=3):
    """The exit code of a program in several processes; ``rank`` is known there."""
    begin = "import os, signal, sys, time; rank = int(os.environ['RANK']); "
    return workers.work([sys.executable, "-c", begin + program], count)


def test_workers_know_where_they_are_and_the_first_one_speaks(capfd):
    assert work("print(rank, os.environ['LOCAL_RANK'], os.environ['WORLD_SIZE'], os.environ['PYTHONHASHSEED'])") == 0
    assert capfd.readouterr().out == "0 0 3 0\n"


def test_the_first_worker_that_fails_ends_all_and_is_heard(monkeypatch, capfd):
    monkeypatch.setattr(workers, "SECONDS_TO_END", 0.2)
    started = time.monotonic()
    assert work("(print('no memory'), sys.exit(3)) if rank == 2 else time.sleep(60)") == 3
    assert time.monotonic() - started < 20
    expected = "Process 2 of 3 ended with code 3 first. The same command resumes the run.\n  no memory\n"
    assert capfd.readouterr().out == expected


def test_a_worker_that_ignores_being_ended_is_killed(monkeypatch, capfd):
    monkeypatch.setattr(workers, "SECONDS_TO_END", 1.0)
    monkeypatch.setattr(workers, "SECONDS_TO_STOP", 0.2)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    assert work(f"exec({deaf!r}) if rank else os.kill(os.getpid(), signal.SIGKILL)") == 1
    assert capfd.readouterr().out == "Process 0 of 3 was killed by SIGKILL first. The same command resumes the run.\n"


def test_what_the_first_worker_has_said_is_not_said_again(capfd):
    assert work("print('RewardError') if rank == 0 else None; sys.exit(1)") == 1
    assert capfd.readouterr().out == "RewardError\n"


# ------------------------------------------------------------------------------------------------------------- runs

RUN = [
    "backend=torch", "backend.device=cpu", "~stages.pretrain", "~stages.ppo_ptx", "~stages.evaluate", "stages.sft.policy=new",
    "checkpoint_every=2", "algorithm.iterations=8",
]  # fmt: skip


def command_of(folder, *overrides):
    return ["-m", "lockstep", "run", *TINY, *DECODER, *RUN, f"folder={folder}", *overrides]


def launch(folder, *overrides):
    command = [sys.executable, "-P", *command_of(folder, *overrides)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def finish(process):
    """(exit code, what was printed)"""
    try:
        printed = process.communicate(timeout=SECONDS)[0]
    finally:
        process.kill()
    return process.returncode, printed


def run_of(folder):
    return next(folder.glob("instructgpt-*"))


def wait_for_steps(folder, count, stage="ppo"):
    """Until the stage has done as many."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        found = list(folder.glob(f"stages/{stage}-*/metrics.jsonl"))
        if found and found[0].read_text().count("\n") >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{stage} did not begin")


def worker(process, rank):
    """The process id of a worker."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"no process {rank}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on two processes: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    code, printed = finish(launch(folder, "backend.mesh.fsdp=2"))
    assert code == 0, printed
    return run_of(folder), printed


def test_a_run_on_two_processes_is_one_run(whole):
    run, printed = whole
    record = read_json(run / "run.json")
    assert record["status"] == "done" and record["backend"]["mesh"] == "fsdp=2"
    assert [len(re.findall(rf"{stage} done in", printed)) for stage in ("sft", "reward", "ppo")] == [1, 1, 1]
    assert [row["step"] for row in lines(run, "ppo")] == list(range(8))
    assert not list(run.parent.rglob("*.part"))


def test_a_run_on_two_processes_comes_to_what_one_comes_to(whole, tmp_path):
    run, _ = whole
    code, printed = finish(launch(tmp_path))
    assert code == 0, printed
    one = run_of(tmp_path)
    assert one.name == run.name
    for stage, metric in (("sft", "loss"), ("reward", "loss"), ("ppo", "objective/score"), ("ppo", "objective/gold")):
        found, expected = ([row[metric] for row in lines(each, stage) if metric in row] for each in (run, one))
        assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.timeout(4 * SECONDS)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in Linux's /proc")
def test_a_run_that_is_stopped_and_one_whose_process_is_killed_resume_bit_for_bit(whole, tmp_path):
    stopped = launch(tmp_path, "backend.mesh.fsdp=2")
    wait_for_steps(tmp_path, 1)
    stopped.send_signal(signal.SIGINT)
    code, printed = finish(stopped)
    assert code == 130 and "Stopped in ppo after step" in printed, printed
    assert read_json(run_of(tmp_path) / "run.json")["status"] == "stopped"

    killed = launch(tmp_path, "backend.mesh.fsdp=2")
    wait_for_steps(tmp_path, 5)
    os.kill(worker(killed, 1), signal.SIGKILL)
    died = time.monotonic()
    code, printed = finish(killed)
    assert code == 1 and "Process 1 of 2 was killed by SIGKILL first" in printed, printed
    assert time.monotonic() - died < 20

    code, printed = finish(launch(tmp_path, "backend.mesh.fsdp=2"))
    assert code == 0, printed
    expected = weights(whole[0], "ppo")
    found = weights(run_of(tmp_path), "ppo")
    assert [name for name in expected if found[name].tobytes() != expected[name].tobytes()] == []
    assert [row["step"] for row in lines(run_of(tmp_path), "ppo")] == list(range(8))


def check_near(found, expected):
    """Weights that rounding alone has parted."""
    assert found.keys() == expected.keys() and apart(found, expected) < 1e-4


@pytest.mark.timeout(4 * SECONDS)
def test_a_run_may_go_on_with_other_numbers_of_processes(whole, tmp_path):
    """Stopped on one process, resumed and stopped on two, resumed on one."""
    for mesh, steps in (("", 1), ("backend.mesh.fsdp=2", 4)):
        stopped = launch(tmp_path, *mesh.split())
        wait_for_steps(tmp_path, steps)
        stopped.send_signal(signal.SIGINT)
        code, printed = finish(stopped)
        assert code == 130 and "Stopped in ppo after step" in printed, printed
    code, printed = finish(launch(tmp_path))
    assert code == 0 and "no longer bit for bit" in printed, printed
    assert [row["step"] for row in lines(run_of(tmp_path), "ppo")] == list(range(8))
    check_near(weights(run_of(tmp_path), "ppo"), weights(whole[0], "ppo"))


@pytest.mark.timeout(4 * SECONDS)
def test_a_run_of_jax_may_go_on_with_other_numbers_of_processes(tmp_path):
    """The same of SFT alone: each program of JAX is compiled for each number."""
    cache = f"backend.compilation_cache={os.environ['LOCKSTEP_TESTS_COMPILED']}"
    only_sft = ["backend=jax", cache, "~stages.reward", "~stages.ppo", "sft.epochs=40", "sft.heldout_examples=8"]

    def run_on(count, folder, steps=None):
        """On so many processes; ``steps``: until then."""
        processes = started(count, "-P", *command_of(folder, *only_sft, f"backend.mesh.fsdp={count}"))
        if steps is not None:
            wait_for_steps(folder, steps, "sft")
            processes[-1].send_signal(signal.SIGINT)
        codes, printed = ended(processes)
        assert codes == [0 if steps is None else 130] * count, printed
        return printed

    run_on(1, tmp_path / "whole")
    expected = weights(run_of(tmp_path / "whole"), "sft")
    run_on(1, tmp_path / "parted", 5)
    assert "Stopped in sft after step" in run_on(2, tmp_path / "parted", 40)
    assert "no longer bit for bit" in run_on(1, tmp_path / "parted")
    steps = [[row["step"] for row in lines(run_of(tmp_path / name), "sft")] for name in ("whole", "parted")]
    assert steps[0] == steps[1]
    check_near(weights(run_of(tmp_path / "parted"), "sft"), expected)
