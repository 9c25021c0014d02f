"""A plan makes the calls of the run, counts what they need, and says what XLA and torch's allocator say."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from lockstep.checking.conformance.world import ARCHITECTURE
from lockstep.cli import main
from lockstep.commands.plan import advice
from lockstep.commands.run import run_config
from lockstep.config.compose import compose
from lockstep.config.mesh import MeshConfig
from lockstep.errors import ConfigError
from lockstep.learning.optimisation import OptimizerConfig
from lockstep.models.adapters import Adapter
from lockstep.models.architecture import from_hf, small_decoder
from lockstep.models.blueprint import Blueprint
from lockstep.planning import parts
from lockstep.planning.calls import ACTIVATIONS, CACHE, GATHERED, GRADIENTS, Call, Need, Part, Shape, Traffic, traffic
from lockstep.planning.machines import MACHINES, machine
from lockstep.planning.plan import Rehearsed, StagePlan, duration, largest_micro_batch, on_the_wire, planned, rehearsed
from lockstep.planning.rehearsal import Rehearsal, ShapePolicy
from lockstep.registry import registry
from lockstep.runs.assembly import Assembly
from lockstep.runs.experiment import Experiment
from lockstep.text.sequences import rows_per_prompt
from lockstep_jax import generation, model
from lockstep_jax.collectives import collective, collectives, group
from lockstep_jax.device import JaxDevice
from lockstep_jax.plan import NUMBER, JaxPlanner, block, host
from lockstep_torch.backend import TorchBackend
from lockstep_torch.decoder import DecoderNetwork
from lockstep_torch.generation import word_hashes
from lockstep_torch.learner import TorchLearner
from lockstep_torch.model import LanguageModel, TorchModel
from lockstep_torch.plan import Following, TorchPlanner, sequences
from lockstep_torch.policies import Decoder
from runs import DECODER, PPO_ONLY, TINY

WIDE = small_decoder(
    vocab_size=2048, hidden_size=256, layers=3, heads=4, kv_heads=2, intermediate_size=768, context_length=256, rope_theta=1e4,
    tied=False,
)  # fmt: skip


@pytest.mark.parametrize("changes", [[], ["algorithm.epochs=2", "algorithm.micro_batch_size=3"], ["algorithm=grpo"]])
def test_a_rehearsal_makes_the_calls_of_the_run(tmp_path, monkeypatch, changes):
    """Of its last stage, in two steps. Responses of fresh weights run to their limit, as in a plan."""
    sizes = [each for each in TINY if "ptx" not in each]
    config = compose([*sizes, *DECODER, *PPO_ONLY, f"folder={tmp_path}", "backend=torch", *changes])
    experiment = Experiment(config)
    run_config(config, "test")
    stage = experiment.stages["ppo"]
    algorithm = Assembly(experiment, {name: folder.output for name, folder in experiment.folders.items()}).algorithm(stage)
    calls = []

    def noting(cls, method, kind):
        real = getattr(cls, method)

        def noted(self, *given, **named):
            if kind == "generate":
                each = rows_per_prompt(*given[:2])
                calls.append((kind, Shape(len(given[0]), given[0].shape[1], given[2].shape[1], rows_per_prompt=each)))
            elif kind == "update":
                calls.append((kind, [(Shape.of(term.sequences), term.forward is not None) for term in given[0]]))
            else:
                calls.append((kind, Shape.of(given[0])))
            return real(self, *given, **named)

        monkeypatch.setattr(cls, method, noted)

    for cls, method, kind in (
        (LanguageModel, "generate", "generate"), (TorchModel, "evaluate", "evaluate"), (TorchLearner, "forward", "forward"),
        (TorchLearner, "update", "update"),
    ):  # fmt: skip
        noting(cls, method, kind)
    for step in (0, 1):
        algorithm.step(step)
    (plan,) = [each for each in rehearsed(experiment) if isinstance(each, Rehearsed) and each.name == "ppo"]
    shapes = [
        (call.kind, [(part.shape, part.passed) for part in call.terms] if call.kind == "update" else call.shape)
        for call, _ in plan.calls
    ]
    assert [each for i, each in enumerate(calls) if each not in calls[:i]] == [
        each for i, each in enumerate(shapes) if each not in shapes[:i]
    ]
    assert sum(times for _, times in plan.calls) == len(calls) / 2
    assert plan.steps == 3


def test_what_lasts_is_counted_by_hand():
    """Weights 4 bytes a number, moments 8, once for what several models share."""
    backend = Rehearsal("torch")
    policy = ShapePolicy(Blueprint(ARCHITECTURE), backend, "policy")
    reference = policy.copy()
    adam = OptimizerConfig(ema_decay=0.9)
    learner = backend.learner({"policy": policy}, {"policy": adam})
    numbers = 37 * 32 * 2 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
    assert Blueprint(ARCHITECTURE).size == numbers
    assert held(backend) == {
        "weights, trained": 4 * numbers,
        "weights, other": 4 * numbers,
        "moments": 8 * numbers,
        "average": 4 * numbers,
    }
    del reference
    assert "weights, other" not in parts.lasting(backend)
    del learner


def held(backend: Rehearsal) -> dict[str, int]:
    """By one device."""
    return {part: parts.held(part, models, torch_planner()) for part, models in parts.lasting(backend).items()}


def test_adapters_share_their_trunk():
    adapted = Blueprint(ARCHITECTURE, Adapter("somewhere", 4, 8.0, ("q_proj",)))
    backend = Rehearsal("torch")
    policy = ShapePolicy(adapted, backend, "policy")
    value = policy.scalar_model(np.zeros(32))
    learner = backend.learner({"policy": policy, "value": value}, dict.fromkeys(("policy", "value"), OptimizerConfig()))
    one, head = 2 * 4 * (32 + 32), 32 + 1
    assert adapted.trained == one
    assert held(backend) == {
        "weights, trained": 4 * (2 * one + head),
        "weights, frozen": 4 * adapted.size,
        "moments": 8 * (2 * one + head),
    }
    del learner


def test_flops_are_those_that_xla_counts():
    """Of a forward pass, within 5%: XLA also counts norms, softmax and rotations."""
    here, shape, blueprint = planner(), Shape(4, 64, 64), Blueprint(WIDE)
    given = (*here.placed(blueprint), block(shape), NUMBER)
    compiled = here.compiled(model._evaluate, *given, spec=here.spec(blueprint), outputs=("logprobs",))
    assert parts.forward(blueprint, shape, ("logprobs",)) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)


class MeanLogprob:
    outputs = ("logprobs",)

    def __call__(self, xp, outputs, batch):
        return -xp.sum(outputs["logprobs"] * batch["weights"]), {}


LOSS = MeanLogprob()


def update(shape: Shape, blueprint: Blueprint, *, terms: int = 1, passed: bool = False) -> Call:
    batch = {"weights": ((shape.rows, shape.response), "float32")}
    part = Part(shape, {"policy": ("logprobs",)}, LOSS, batch, dropout=False, passed=passed)
    return Call("update", {"policy": blueprint}, shape, terms=(part,) * terms, optimizers={"policy": OptimizerConfig()})


def planner(**axes: int) -> JaxPlanner:
    return JaxPlanner(JaxDevice.Config("cpu", mesh=MeshConfig(**axes)), None)


def torch_planner(**settings) -> TorchPlanner:
    return TorchBackend.planner(TorchBackend.Config("cpu", **settings), None)


def test_four_devices_need_a_fraction_of_the_memory_of_one():
    """A ceiling: without rows kept apart, XLA gives every device all of them, and each needs as much as one would."""
    shape, blueprint = Shape(8, 64, 64), Blueprint(WIDE)
    one, four = planner(), planner(fsdp=4)
    assert (four.devices, four.rows) == (4, 4)
    alone, shared = (each.measure(update(shape, blueprint)).temporary for each in (one, four))
    assert shared < 0.45 * alone
    assert four.held(blueprint) == (pytest.approx(blueprint.size / 4, rel=0.01), 0)


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}])
def test_drawing_tokens_gathers_weights_once(axes):
    """No loop over tokens gathers anything: weights are gathered before it, keys and values stay where they are."""
    mesh = planner(**axes)
    blueprint, half = Blueprint(WIDE), (8, 32)
    drawing = generation.Drawing(host(half, "uint32"), NUMBER, host((1,), "int32"), host((), "int32"))
    given = (*mesh.placed(blueprint), host(half, "int32"), host(half, "bool"), drawing, None)
    text = mesh.compiled(generation.generate, *given, spec=mesh.spec(blueprint), greedy=False).as_text()
    bodies = set(re.findall(r"body=%([\w.-]+)", text))
    loops = [part for part in text.split("\n\n") if part.strip() and part.strip().split()[0].lstrip("%") in bodies]
    assert loops and not any("all-gather" in loop for loop in loops)
    assert text.count(" all-gather(") <= 7 * WIDE.layers + 4


def test_a_plan_of_the_demonstration_is_a_table_with_a_verdict(capsys, monkeypatch, tmp_path):
    overrides = [*TINY, *DECODER, *PPO_ONLY, "backend=jax", "backend.device=cpu", "backend.mesh.fsdp=2", f"folder={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["lockstep", "plan", *overrides, "--machine", "v5e", "--price", "1.2"])
    main()
    shown = capsys.readouterr().out
    assert "jax on 2 x v5e, 16 GiB each" in shown
    assert "stage ppo, on each device" in shown and "temporary: update policy, value" in shown and "all-gather" in shown
    assert shown.count("It fits") == 4 and "3 steps" in shown
    assert not any(tmp_path.iterdir())


def test_a_plan_for_torch_says_what_each_of_two_devices_needs(capsys, monkeypatch, tmp_path):
    overrides = [*TINY, *DECODER, *PPO_ONLY, "backend=torch", "backend.device=cpu", "backend.mesh.fsdp=2", f"folder={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["lockstep", "plan", *overrides, "algorithm.micro_batch_size=2", "--machine", "h100"])
    main()
    shown = capsys.readouterr().out
    assert "torch on 2 x h100" in shown and "temporary: update policy, value" in shown and shown.count("It fits") == 4
    assert "TFLOP" in shown and "of which activations" in shown and "of which gathered weights" in shown
    assert shown.count("The largest micro_batch_size that does is null.") == 1  # the other stages take whole batches


class RowsTakeMemory:
    """A planner for whom weights take nothing, and each row of an update 1 byte."""

    kind, shares_prompts, memory, process = "cpu", True, None, 0

    def __init__(self, devices: int):
        self.devices = self.rows = devices
        self.measured = 0

    def held(self, blueprint):
        return 0, 0

    def measure(self, call):
        self.measured += call.kind == "update"
        return Need(sum(part.shape.rows for part in call.terms[:1]) if call.kind == "update" else 1)


@pytest.mark.parametrize(
    ("own", "room", "devices", "largest"),
    [("2", 64, 1, "null"), ("6", 15, 1, "8"), ("64", 64, 1, None), ("null", 20, 3, "12"), ("null", 2, 3, "")],
)
def test_the_largest_micro_batch_that_fits_is_found_by_bisection(tmp_path, own, room, devices, largest):
    """Of PPO with minibatches of 64 rows, in powers of two."""
    more = ["algorithm.batch_size=64", "algorithm.minibatches=1", f"algorithm.micro_batch_size={own}", f"folder={tmp_path}"]
    experiment = Experiment(compose([*TINY, *DECODER, *PPO_ONLY, "backend=torch", *more]))
    (stage,) = [each for each in rehearsed(experiment) if isinstance(each, Rehearsed) and each.name == "ppo"]
    here, memory = RowsTakeMemory(devices), room / 0.9
    plan = planned(stage, here, replace(MACHINES["h100"], memory=memory), bfloat16=False)
    here.measured = 0
    assert largest_micro_batch(experiment, stage, plan, here, memory, contextlib.nullcontext) == largest
    assert here.measured <= 4


@pytest.mark.parametrize(
    ("kind", "memory", "said"),
    [
        ("cpu", None, "torch on 2 x cpu, 4 GiB each"),  # which share one
        ("NVIDIA A100-SXM4-40GB", 40 * 2**30, "torch on 2 x NVIDIA A100-SXM4-40GB, 40 GiB each"),
    ],
)
def test_the_memory_of_a_plan_is_that_of_the_devices_at_hand(capsys, monkeypatch, tmp_path, kind, memory, said):
    made = TorchPlanner.__init__

    def init(planner, *given):
        made(planner, *given)
        planner.kind, planner.memory = kind, memory

    monkeypatch.setattr(TorchPlanner, "__init__", init)
    monkeypatch.setattr("lockstep.planning.machines.this_cpu", lambda: replace(MACHINES["h100"], memory=8 * 2**30))
    overrides = [*TINY, *DECODER, *PPO_ONLY, "backend=torch", "backend.device=cpu", "backend.mesh.fsdp=2", f"folder={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["lockstep", "plan", *overrides])
    main()
    assert said in capsys.readouterr().out


def test_time_is_that_of_the_arithmetic_and_of_reading_weights():
    """An update of one row is arithmetic; drawing one row's tokens reads all weights for each."""
    one, h100 = planner(), MACHINES["h100"]
    shape, blueprint = Shape(1, 64, 64), Blueprint(WIDE)
    least, most = duration(update(shape, blueprint), one, h100, bfloat16=True)
    assert least == pytest.approx(3 * parts.forward(blueprint, shape, ("logprobs",)) / (0.6 * 989e12))
    assert most == pytest.approx(3 * least)
    drawn, _ = duration(Call("generate", {"policy": blueprint}, shape), one, h100, bfloat16=True)
    weights = sum(math.prod(s) for s in [(256, 2048), *[(256, 256), (256, 128), (256, 128), (256, 256)] * 3, *[(256, 768)] * 9])
    assert drawn == pytest.approx(64 * 2 * (weights + 2 * 3 * 2 * 64 * (64 + 32)) / (0.8 * 3.35e12))


def test_a_cpu_stands_in_for_the_devices_of_a_plan():
    """As in a run. In a process of its own: JAX counts its devices once."""
    program = (
        "from lockstep_jax.backend import JaxBackend as B; from lockstep.config.mesh import MeshConfig as M; "
        "print(B.planner(B.Config('cpu', mesh=M(fsdp=3)), None).devices)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    assert subprocess.check_output([sys.executable, "-c", program], env=environment, text=True).split() == ["3"]


def test_the_collectives_of_a_program_are_counted_with_the_loops_around_them():
    """A program whose collectives are known: 6 layers in a loop, and one of 10 tokens whose end only its numbers tell."""
    four = Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("a", "b"))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=four, in_specs=P("a", "b"), out_specs=P("a", "b"), check_vma=False)
    def program(x):  # [4, 8] on each device
        def layer(x, _):
            whole = jax.lax.all_gather(x, "b", axis=1, tiled=True)  # [4, 16]
            return jax.lax.psum_scatter(whole * 2, "b", scatter_dimension=1, tiled=True), None

        def token(x):
            return jax.lax.psum(x, ("a", "b")) / 4 - 1

        x = jax.lax.scan(layer, x, None, length=6)[0]
        x = jax.lax.while_loop(lambda x: x.sum() > 0, token, x)
        return jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])

    text = program.lower(jax.ShapeDtypeStruct((8, 16), np.float32)).compile().as_text()
    found = {each.kind: each for each in collectives(text, loop=10)}
    assert found == {
        "all-gather": traffic("all-gather", 6, 4 * 4 * 16, members=2),
        "reduce-scatter": traffic("reduce-scatter", 6, 4 * 4 * 16, members=2),
        "all-reduce": traffic("all-reduce", 10, 4 * 4 * 8, members=4),
        "collective-permute": traffic("collective-permute", 1, 4 * 4 * 8, members=2, stride=2),
    }
    assert found["all-reduce"].sent == 10 * 2 * 3 / 4 * 128


def test_how_often_a_loop_runs_is_read_from_its_condition_where_it_stands_nowhere_else():
    """As XLA writes it for TPUs."""
    program = """
%condition (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%count, %bound), direction=LT
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[8]{0} all-gather(%x), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}
}
ENTRY %main (x: f32[2]) -> f32[8] {
  %while.9 = (s32[]{:T(128)}, f32[8]{0}) while(%tuple), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
}
"""
    assert collectives(program, loop=5) == (traffic("all-gather", 12, 32, members=4),)
    assert collectives(program.replace("constant(12)", "parameter(1)"), loop=5) == (traffic("all-gather", 5, 32, members=4),)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("replica_groups={}", (6, 1)),
        ("replica_groups={{0,2},{1,3}}", (2, 2)),
        ("replica_groups=[2,4]<=[8], dimensions={0}", (4, 1)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (2, 4)),
        ("replica_groups=mesh['x'=2,'y'=4,'z'=2] {'y'}", (4, 2)),
        ("replica_groups=mesh['x'=2,'y'=4,'z'=2] {'x','y'}", (8, 2)),
        ("source_target_pairs={{0,4},{4,0},{1,5},{5,1}}", (2, 4)),
    ],
)
def test_who_takes_part_in_a_collective_is_read_in_every_notation(named, expected):
    assert group(f"%x = f32[8]{{0}} all-reduce(%y), channel_id=1, {named}, use_global_device_ids=true", 6) == expected


def test_what_begins_in_one_place_and_ends_in_another_is_counted_once():
    begun = "%s = (bf16[2,8]{1,0:T(8)}, bf16[8,8]{1,0}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={0}"
    ended = "%d = bf16[8,8]{1,0} all-gather-done(%s)"
    moved = "%p = (f32[8]{0}, f32[8]{0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}"
    assert collective(begun, 4) == traffic("all-gather", 1, 2 * 64, members=4)
    assert collective(ended, 4) is None
    assert collective(moved, 4) == traffic("collective-permute", 1, 32, members=2)
    with pytest.raises(ValueError, match="in a way that is not known"):
        collective("%x = f32[8]{0} all-reduce(%y), replica_groups=?", 4)


def test_rings_side_by_side_share_what_a_host_sends():
    """On 8 hosts of 8 cards, each with its own 50 GB/s and 450 GB/s to its neighbours, by hand."""
    h100 = MACHINES["h100"]
    seconds = lambda members, stride=1: on_the_wire(Need(0, (Traffic("all-gather", 1, 1e9, members, stride),)), h100)  # noqa: E731
    assert seconds(8) == pytest.approx(1 / 450)  # within a host
    assert seconds(64) == pytest.approx(1 / 400)  # one ring, through all cards of each host
    assert seconds(8, stride=8) == pytest.approx(1 / 50)  # eight rings, each through one card of each host
    assert seconds(16, stride=4) == pytest.approx(1 / 100)  # four rings, through two cards of each
    assert on_the_wire(Need(0, (Traffic("all-reduce", 1, 1e9, 64, 1),)), MACHINES["v5p"]) == pytest.approx(1 / 600)


def test_the_time_of_a_step_has_its_collectives_hidden_at_best_and_added_at_worst():
    shape, blueprint = Shape(8, 64, 64), Blueprint(WIDE)
    stage, many, slow = Rehearsed("sft", {}, [(update(shape, blueprint), 2)], 1), torch_planner(mesh=MeshConfig(fsdp=4)), 1e3
    machine = replace(MACHINES["h100"], link=slow)
    found = planned(stage, many, machine, bfloat16=True)
    weights = 3 * parts.FLOAT32 * blueprint.size * 3 / 4  # gathered twice and summed once
    outputs = parts.FLOAT32 * 8 * 64 * 3 / 4
    assert found.sent == pytest.approx(2 * (weights + outputs))
    assert found.sending == found.seconds[0] == pytest.approx(found.sent / slow / 0.8)
    assert found.seconds[1] == pytest.approx(found.sent / slow / 0.3, rel=1e-3) and found.seconds[1] > found.sent / slow / 0.3


@pytest.mark.parametrize("make", [planner, torch_planner], ids=["jax", "torch"])
def test_what_long_rows_need_grows_with_their_length(make):
    """Not with its square: nothing of [length, length] is made. On JAX these are the programs of a run."""
    blueprint = Blueprint(small_decoder(
        vocab_size=64, hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=64, context_length=8192, rope_theta=1e4,
        tied=True,
    ))  # fmt: skip
    here = make()
    for call in (
        lambda columns: Call("generate", {"policy": blueprint}, Shape(2, columns, 8)),
        lambda columns: update(Shape(2, columns // 2, columns // 2), blueprint),
        lambda columns: update(Shape(2, 1, columns - 1, packed=True), blueprint),
    ):
        one, two = (here.measure(call(columns)).temporary for columns in (1536, 3072))
        assert two < 2.5 * one, call(3072)


def test_a_plan_that_does_not_fit_says_what_to_change():
    def said(lasting, temporary, largest=None):
        needs = {"update": (1, Need(temporary))}
        return advice(StagePlan("ppo", {"moments": lasting}, needs, {"update": 1e12}, (1, 2), 0, 3), 100, largest)

    assert said(30, 20) == "It fits: 50% of the memory."
    assert said(30, 20, "64").endswith("of the memory. The largest micro_batch_size that does is 64.")
    assert "'update'" in said(30, 80, "8") and "micro_batch_size to 8, with which it fits" in said(30, 80, "8")
    assert "No micro_batch_size helps" in said(30, 80, "") and "gradient_checkpointing" in said(30, 80, "")
    assert "fsdp" in said(95, 1) and "lora" in said(95, 1)


def test_what_cannot_be_planned_says_why():
    backend = registry().resolve("backend", "jax", "jax")
    with pytest.raises(ConfigError, match="pip install libtpu"):
        backend.planner(JaxDevice.Config("cpu"), "v5e:2x2")
    with pytest.raises(ConfigError, match="only backend=jax compiles for devices that are not here.*--machine h100"):
        TorchBackend.planner(TorchBackend.Config("cpu"), "v5e:2x2")
    with pytest.raises(ConfigError, match="'abacus' has is not known. Name a device with --machine"):
        machine("abacus")
    assert machine("TPU v5 lite") == MACHINES["v5e"] and machine("NVIDIA H100 80GB HBM3") == MACHINES["h100"]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ppo_of_a_billion_parameters_fits_a_tpu_slice():
    """A ceiling just above what XLA says (benchmarks/plan/tpu.md): on each chip of v5e:4x4, 7.31 GiB at the worst moment. In a
    process of its own, because XLA_FLAGS are here those of tests."""
    pytest.importorskip("libtpu", reason="TPU programs are compiled by libtpu: benchmarks/README.md says how to install it")
    program = (
        "import sys; sys.path.insert(0, 'benchmarks'); import tpu; print(tpu.ppo('1b', 'v5e', sys.argv[1:], 'v5e:4x4').memory)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    sizes = ["backend=jax", "backend.mesh.fsdp=16", "algorithm.batch_size=64", "algorithm.micro_batch_size=16"]
    printed = subprocess.check_output([sys.executable, "-c", program, *sizes], env=environment, text=True)
    assert int(printed.split()[-1]) < 8 * 2**30


# ---------------------------------------------------------------------------------------------------------------- torch

HALF = Shape(8, 64, 64)
GROUPS = Shape(8, 64, 64, rows_per_prompt=4)
EVALUATION = Call("evaluate", {"policy": Blueprint(WIDE)}, HALF, {"policy": ("logprobs", "entropy")})
DRAWING = Call("generate", {"policy": Blueprint(WIDE)}, HALF)


def test_tensors_are_followed_to_their_end():
    before = torch.zeros(1000)
    with Following() as found:
        made = before + 1  # 4,000 bytes
        more = (made[:500] * 2).view(5, 100)  # 2,000 more: no view takes any
        before.add_(1)
        assert (found.alive, found.most) == (6000, 6000)
        del made
        assert (found.alive, found.most) == (2000, 6000)
        more = more.double()  # 4,000 beside the 2,000
        assert (found.alive, found.most) == (4000, 6000)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"precision": "bfloat16"}], ids=str)
@pytest.mark.parametrize(
    "call",
    [
        update(HALF, Blueprint(WIDE)), update(HALF, Blueprint(WIDE), terms=2), update(HALF, Blueprint(WIDE), passed=True),
        EVALUATION, DRAWING, update(GROUPS, Blueprint(WIDE)), replace(DRAWING, shape=GROUPS),
    ],
    ids=["update", "two terms", "passed", "evaluation", "drawing", "groups", "drawing groups"],
)  # fmt: skip
def test_a_plan_is_what_torchs_allocator_counts(tmp_path, call, settings):
    """On the CPU, what kernels take for themselves included; within 1%."""
    here = torch_planner(**settings)
    model = Decoder(DecoderNetwork(WIDE), None, here.backend)
    learner = here.learner(call, {"policy": model})
    rows = sequences(call.shape)
    given = rows.tokens[:, : HALF.prompt], rows.prompt_mask, np.zeros(rows.mask.shape, np.uint32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        if call.kind == "update":
            learner._backward([here.term(learner, part) for part in call.terms])
        elif call.kind == "evaluate":
            model.evaluate(sequences(HALF), call.outputs["policy"])
        else:
            model.generate(*given, temperature=1.0, stop_ids=(), pad_id=0)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = [each for each in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if each["name"] == "[memory]"]
    totals = [each["args"]["Total Allocated"] for each in sorted(events, key=lambda each: each["ts"])]
    assert here.measure(call).temporary == pytest.approx(max(totals) - totals[0], rel=0.01)


def test_an_update_on_torch_needs_less_with_recomputation_micro_batches_and_kept_passes():
    """Gradients are beside the activations, which grow with the rows."""
    deep = Blueprint(small_decoder(
        vocab_size=512, hidden_size=64, layers=16, heads=4, kv_heads=2, intermediate_size=192, context_length=256, rope_theta=1e4,
        tied=True,
    ))  # fmt: skip
    here, gradients = torch_planner(), parts.FLOAT32 * deep.size
    whole, half = (here.measure(update(Shape(rows, 64, 64), deep)).temporary for rows in (16, 8))
    assert whole - gradients == pytest.approx(2 * (half - gradients), rel=0.05)
    assert half <= here.measure(update(HALF, deep, terms=4)).temporary < half + gradients + 1000
    kept = here.measure(Call("forward", {"policy": deep}, HALF, outputs={"policy": ("logprobs",)})).temporary
    assert gradients < kept < here.measure(update(HALF, deep, passed=True)).temporary == pytest.approx(half, rel=0.01)
    assert torch_planner(gradient_checkpointing=True).measure(update(Shape(16, 64, 64), deep)).temporary < whole / 2


def test_the_parts_of_what_a_call_needs_are_told_apart_on_torch():
    """By hand: gradients and keys and values; activations are what a kept forward pass leaves."""
    here, model = torch_planner(), Blueprint(WIDE)
    weights, halves = parts.FLOAT32 * model.size, Shape(4, 64, 64)
    one, half = (here.measure(update(shape, model)) for shape in (HALF, halves))
    two = here.measure(update(HALF, model, terms=2))
    kept = here.measure(Call("forward", {"policy": model}, HALF, outputs={"policy": ("logprobs",)}))
    assert two.parts[GRADIENTS] == weights and two.temporary == pytest.approx(one.temporary + weights, rel=1e-6)
    assert one.parts[ACTIVATIONS] == pytest.approx(two.parts[ACTIVATIONS], rel=1e-3)
    assert one.parts[ACTIVATIONS] == pytest.approx(2 * half.parts[ACTIVATIONS], rel=1e-3)
    assert one.parts[ACTIVATIONS] == pytest.approx(kept.parts[ACTIVATIONS], rel=1e-3)
    less = torch_planner(gradient_checkpointing=True).measure(update(HALF, model))
    assert less.parts[ACTIVATIONS] < one.parts[ACTIVATIONS] / 10
    keys_and_values = parts.FLOAT32 * 2 * 3 * 2 * 64 * 8 * (64 + 64)  # of 3 layers with 2 heads of 64
    assert here.measure(DRAWING).parts == {CACHE: keys_and_values}
    assert not here.measure(EVALUATION).parts
    four = torch_planner(mesh=MeshConfig(fsdp=4))
    assert four.measure(DRAWING).parts == {CACHE: keys_and_values / 4, GATHERED: weights}
    assert four.measure(update(HALF, model, terms=2)).parts[GRADIENTS] < weights / 2


@pytest.mark.parametrize("devices", [1, 4])
def test_the_parts_that_xla_tells_apart_are_exact(devices):
    here, model = planner(fsdp=devices) if devices > 1 else planner(), Blueprint(WIDE)
    weights, keys_and_values = parts.FLOAT32 * here.held(model)[0], parts.FLOAT32 * 2 * 3 * 2 * 64 * 8 * (64 + 64)
    assert here.measure(DRAWING).parts == {CACHE: keys_and_values / devices}
    assert here.measure(update(HALF, model, terms=2)).parts == {GRADIENTS: 2 * weights}  # a term's, and the sum until then
    assert not here.measure(update(HALF, model)).parts
    kept = here.measure(update(HALF, model, passed=True))
    assert kept.parts[GRADIENTS] == weights and weights < kept.parts[ACTIVATIONS] < kept.temporary - weights


def test_fsdp_divides_gradients_and_rows_and_gathers_what_is_drawn_with():
    alone, four = torch_planner(), torch_planner(mesh=MeshConfig(fsdp=4))
    assert (four.devices, four.rows) == (4, 4)
    long, blueprint = Shape(32, 64, 64), Blueprint(WIDE)
    one, shared = (each.measure(update(long, blueprint)).temporary for each in (alone, four))
    assert shared < 0.4 * one
    weights = parts.FLOAT32 * blueprint.size
    own = alone.measure(Call("generate", {"policy": blueprint}, Shape(2, 64, 64))).temporary
    assert four.measure(DRAWING).temporary == own + weights
    passed = lambda planner, rows: planner.measure(Call("forward", EVALUATION.models, Shape(rows, 64, 64), EVALUATION.outputs))  # noqa: E731
    layer = blueprint.multiplied // 3 + 2 * 256
    gathered = parts.FLOAT32 * (blueprint.size - 3 * layer + 2 * layer)
    assert passed(four, 32).temporary == pytest.approx(passed(alone, 8).temporary + gathered, rel=0.01)  # rows of other prompts


def test_a_frozen_trunk_is_whole_on_every_device_on_torch():
    adapted = Blueprint(WIDE, Adapter("somewhere", 4, 8.0, ("q_proj", "v_proj")))
    stage = Rehearsed("sft", {"weights, trained": [adapted], "weights, frozen": [adapted]}, [(EVALUATION, 1)], 1)
    mesh = MeshConfig(fsdp=4)
    inward, outward = 3 * 4 * (256 + 256), 3 * 4 * (256 + 128)  # of three layers at rank 4; JAX divides the former alone
    on_torch = torch_planner(mesh=mesh), (inward + outward) / 4, adapted.size
    on_jax = planner(fsdp=4), inward / 4 + outward, adapted.size / 4
    for each, trained, frozen in (on_torch, on_jax):
        found = planned(stage, each, MACHINES["h100"], bfloat16=False).lasting
        assert found["weights, trained"] == 4 * trained
        assert found["weights, frozen"] == pytest.approx(4 * frozen, rel=0.01)


ADAPTERS = Adapter("somewhere", 4, 8.0, ("q_proj", "o_proj", "up_proj", "down_proj"))
PARTLY = [
    replace(ADAPTERS, targets=some) for some in (("down_proj",), ("self_attn.o_proj", "gate_proj"), ("layers.1.mlp.up_proj",))
]


@pytest.mark.parametrize("adapter", [None, ADAPTERS, *PARTLY], ids=lambda adapter: " ".join(adapter.targets) if adapter else "")
@pytest.mark.parametrize("kind", ["update", "update again", "evaluate", "generate"])
def test_what_the_axis_of_matmuls_sums_is_what_is_planned(monkeypatch, kind, adapter):
    """Counted where a run's network hands it over. Drawing: of prompts alone, as a plan draws the first and the last token."""
    four = torch_planner(mesh=MeshConfig(fsdp=2, tensor=2), gradient_checkpointing=kind == "update again")
    sent = []
    monkeypatch.setattr("lockstep_torch.plan.OnePart.add", lambda axis, x: sent.append(x.nbytes))
    shape, blueprint = Shape(8, 64, 64, rows_per_prompt=2), Blueprint(WIDE, adapter)
    calls = {
        "evaluate": Call("evaluate", {"policy": blueprint}, shape, outputs={"policy": ("logprobs",)}),
        "generate": Call("generate", {"policy": blueprint}, replace(shape, response=1)),
    }
    found = four.measure(calls.get(kind, update(shape, blueprint))).collectives
    along = [each for each in found if (each.kind, each.members, each.stride) == ("all-reduce", 2, 1)]
    assert sum(each.sent for each in along) == sum(sent) > 0  # in a ring of two, each sends as much as there is
    assert sum(each.count for each in along) == len(sent)


@pytest.mark.parametrize("adapter", [None, ADAPTERS], ids=["whole", "adapters"])
def test_the_axis_of_matmuls_divides_them_and_their_activations_but_no_embedding(adapter):
    alone, two = torch_planner(), torch_planner(mesh=MeshConfig(tensor=2))
    assert (two.devices, two.rows) == (2, 1)
    blueprint = Blueprint(WIDE, adapter)
    with FakeTensorMode():
        made = {each: list(each.model(blueprint).network.parameters()) for each in (alone, two)}
    trained, frozen = (sum(p.numel() for p in made[two] if p.requires_grad is kind) for kind in (True, False))
    assert two.held(blueprint) == (trained, frozen)
    assert (frozen if adapter else trained) == blueprint.size - blueprint.multiplied / 2 and (adapter or frozen == 0)
    assert trained + frozen < sum(p.numel() for p in made[alone])
    gradients = [parts.FLOAT32 * each.held(blueprint)[0] for each in (alone, two)]
    whole, half = (each.measure(update(HALF, blueprint)).temporary for each in (alone, two))
    assert 0.5 * (whole - gradients[0]) < half - gradients[1] < 0.95 * (whole - gradients[0])


def test_adapters_heads_teachers_and_other_families_are_planned_on_torch():
    """By peft and transformers where a run uses them. Nothing of a plan is left to a run."""
    llama, half, rows = Blueprint(WIDE), Blueprint(WIDE, Adapter("somewhere", 4, 8.0, ("q_proj",))), Shape(4, 16, 16)
    packed = Shape(4, 1, 31, packed=True)
    config = {
        "model_type": "gpt2",
        "n_layer": 2,
        "n_embd": 64,
        "n_head": 4,
        "vocab_size": 500,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    gpt2 = Blueprint(from_hf(config))
    here = torch_planner()
    need = lambda call: here.measure(call).temporary  # noqa: E731
    for blueprint in (gpt2, replace(gpt2, adapter=Adapter("somewhere", 4, 8.0, ("c_attn",), conv1d=True))):
        few, many = need(Call("generate", {"policy": blueprint}, Shape(4, 16, 100))), need(update(packed, blueprint))
        assert few > parts.FLOAT32 * 2 * 2 * 4 * 64 * 115  # keys and values of two layers
        assert need(update(rows, blueprint)) > 0 and many > 0
    trunks = parts.FLOAT32 * WIDE.vocab_size * WIDE.hidden_size
    assert need(update(rows, half)) < need(update(rows, llama)) - trunks  # no gradients of a frozen trunk
    taught = need(Call("evaluate", {"policy": replace(llama, teacher=llama)}, rows, {"policy": ("divergence",)}))
    assert taught > need(Call("evaluate", {"policy": llama}, rows, {"policy": ("logprobs",)}))
    valued = replace(llama, scalar_head=True, language_head=False)
    assert need(Call("evaluate", {"value": valued}, rows, {"value": ("values",)})) > 0
    assert not isinstance(word_hashes(WIDE.vocab_size, here.backend.device), FakeTensor)
