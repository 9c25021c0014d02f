"""What the torch backend alone does."""

import logging

import pytest

pytest.importorskip("torch")
from lockstep_torch import backend


@pytest.mark.parametrize(
    "precision, factor, warned", [("bfloat16", 50.0, True), ("bfloat16", 0.3, False), ("float32", 50.0, False)]
)
def test_bfloat16_is_warned_of_where_it_is_slow(precision, factor, warned, monkeypatch, caplog):
    monkeypatch.setattr(backend, "_bfloat16_takes", lambda: factor)
    with caplog.at_level(logging.WARNING):
        backend.TorchBackend(backend.TorchBackend.Config("cpu", precision, rematerialise=False, threads=None))
    assert ("50 times as long" in caplog.text and "backend.precision=float32" in caplog.text) == warned
