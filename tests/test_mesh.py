"""JAX on a mesh of devices: the numbers of one device, memory divided."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lockstep.checking.conformance.backends import terms as kit
from lockstep.checking.conformance.kit import conform
from lockstep.checking.conformance.subjects import subject
from lockstep.checking.conformance.world import World
from lockstep.config.mesh import MeshConfig
from lockstep.errors import ConfigError
from lockstep_jax import mesh

MESHES = {"fsdp": ["fsdp=4"], "fsdp and tensor": ["fsdp=2", "tensor=2"], "data and tensor": ["data=2", "tensor=-1"]}


def world(*axes: str) -> World:
    return World("jax", overrides=["backend.device=cpu", *(f"backend.mesh.{axis}" for axis in axes)])


def sampled_and_trained(world: World):
    """Tokens, gradients and a step of five rows, which no mesh here divides evenly."""
    policy = world.policy()
    drawn = policy.generate(*world.prompts(5), world.seeds(5, 6), temperature=1.0, stop_ids=[35], pad_id=36)
    learner = world.backend.learner({"policy": policy}, {"policy": kit.ADAM})
    term = kit.term(world, outputs=("logprobs",), rows=slice(0, 5))
    return drawn, learner.gradients([term]), learner.update([term]), policy


@pytest.fixture(scope="module")
def one_device():
    return sampled_and_trained(world())


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_a_mesh_draws_the_same_tokens_and_learns_the_same(one_device, axes):
    drawn, gradients, metrics, policy = sampled_and_trained(world(*axes))
    np.testing.assert_array_equal(drawn.tokens, one_device[0].tokens)
    np.testing.assert_allclose(drawn.logprobs, one_device[0].logprobs, atol=1e-5)
    assert gradients.keys() == one_device[1].keys()
    for name, gradient in gradients.items():
        assert np.abs(gradient - one_device[1][name]).max() <= 5e-6 * np.abs(one_device[1][name]).max(), name
    for name, value in metrics.items():
        assert value == pytest.approx(one_device[2][name], rel=1e-5)
    for name, parameter in policy.parameters().items():
        np.testing.assert_allclose(parameter, one_device[3].parameters()[name], atol=1e-5)


def test_parameters_and_moments_are_divided_and_stay_so(tmp_path):
    with_mesh = world("fsdp=2", "tensor=2")
    policy = with_mesh.policy()
    learner = with_mesh.backend.learner({"policy": policy}, {"policy": kit.ADAM})

    def placed():
        attention = policy.params["layers"]["self_attn"]
        moments = learner.moments["policy"].square["layers"]["self_attn"]
        return [tree[name]["kernel"].sharding.spec for tree in (attention, moments) for name in ("q_proj", "o_proj")]

    there = [PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor", "fsdp")] * 2
    assert placed() == there
    learner.update([kit.term(with_mesh, outputs=("logprobs",))])
    assert placed() == there
    learner.save(tmp_path)
    learner.restore(tmp_path)
    assert placed() == there


def test_state_passes_between_meshes_bit_for_bit(tmp_path):
    """Saved on four devices, restored on one and on two."""
    saved = world("fsdp=4")
    learner = saved.backend.learner({"policy": saved.policy()}, {"policy": kit.ADAM})
    learner.update([kit.term(saved, outputs=("logprobs",))])
    learner.save(tmp_path / "first")
    for other in (world(), world("tensor=2")):
        restored = other.backend.learner({"policy": other.policy()}, {"policy": kit.ADAM})
        restored.restore(tmp_path / "first")
        restored.save(tmp_path / "again")
        assert (tmp_path / "again/learner.safetensors").read_bytes() == (tmp_path / "first/learner.safetensors").read_bytes()


SUBJECTS = [
    ("backend", "jax"), ("policy", "decoder"), ("policy", "lora"), ("reward_model", "learned"), ("algorithm", "ppo"),
    ("algorithm", "sft"), ("algorithm", "reward_modelling"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), SUBJECTS, ids=[name for _, name in SUBJECTS])
def test_the_conformance_kit_passes_on_four_devices(kind, name):
    overrides = ["backend.device=cpu", "backend.mesh.fsdp=2", "backend.mesh.tensor=2"]
    outcomes = list(conform(kind, subject(kind, name, "jax", overrides=overrides), lambda check: True))
    assert [f"{each.check.name}: {each.detail}" for each in outcomes if each.status == "failed"] == []
    assert sum(each.status == "passed" for each in outcomes) >= 8


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"fsdp": 8}, "{fsdp: 8} does not fit the 4 devices here"),
        ({"data": 3, "fsdp": -1}, "{data: 3, fsdp: -1} does not fit"),
        ({"fsdp": 0}, "an axis is a number from 1"),
        ({"data": -1, "fsdp": -1}, "one may be -1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(axes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        mesh.made(MeshConfig(**axes), jax.devices("cpu"))


def test_a_dimension_that_an_axis_does_not_divide_stays_whole():
    four = mesh.made(MeshConfig(fsdp=2, tensor=2), jax.devices("cpu"))
    placed = mesh.put(four, {"lm_head": {"kernel": np.zeros((32, 37), np.float32)}, "norm": {"scale": np.zeros(32, np.float32)}})
    assert placed["lm_head"]["kernel"].sharding.spec == PartitionSpec("fsdp", None)
    assert placed["norm"]["scale"].sharding.spec == PartitionSpec(None)
