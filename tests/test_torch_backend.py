"""What the torch backend alone does."""

import collections
import logging

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from lockstep_torch import backend, device  # noqa: E402
from lockstep_torch.policies import Decoder  # noqa: E402


@pytest.mark.parametrize(
    "precision, factor, warned", [("bfloat16", 50.0, True), ("bfloat16", 0.3, False), ("float32", 50.0, False)]
)
def test_bfloat16_is_warned_of_where_it_is_slow(precision, factor, warned, monkeypatch, caplog):
    monkeypatch.setattr(device, "_bfloat16_takes", lambda: factor)
    with caplog.at_level(logging.WARNING):
        backend.TorchBackend(
            backend.TorchBackend.Config("cpu", precision, gradient_checkpointing=False, cuda_graphs=False, threads=None)
        )
    assert ("50 times as long" in caplog.text and "backend.precision=float32" in caplog.text) == warned


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_generation_casts_each_weight_once_at_most(precision, frozen, folders):
    policy = Decoder.load(
        folders[0], backend.TorchBackend(backend.TorchBackend.Config("cpu", precision, False, False, threads=1))
    )
    weights, cast = {tensor.data_ptr() for tensor in policy.network.parameters()}, collections.Counter()
    policy.network.requires_grad_(not frozen)  # as adapters' networks are

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), how=None):
            if function is torch.ops.aten._to_copy.default and arguments[0].data_ptr() in weights:
                cast[arguments[0].data_ptr()] += 1
            return function(*arguments, **how or {})

    tokens, mask, seeds = np.zeros((2, 3), np.int32), np.ones((2, 3), bool), np.zeros((2, 4), np.uint32)
    with Casts():
        drawn = policy.generate(tokens, mask, seeds, temperature=1.0, stop_ids=[], pad_id=0)
    assert drawn.mask.all() and set(cast.values()) == ({1} if precision == "bfloat16" else set())
    assert all(parameter.requires_grad != frozen for parameter in policy.network.parameters())


def test_auto_is_the_cpu_where_a_build_for_accelerators_finds_none(monkeypatch):
    """torch's build for CUDA names CUDA as its accelerator on any machine."""
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert device._device("auto", None) == torch.device("cpu")
