"""TensorBoard as a tracker: what was logged is read back by TensorBoard's own reader."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lockstep.runs.experiment import component_config
from test_tracking import CONF, ours, start, write

pytest.importorskip("tensorboard")


@pytest.fixture
def tensorboard() -> Any:
    from lockstep_tensorboard.tracker import TensorBoard

    yaml = pytest.importorskip("yaml")
    return TensorBoard(component_config(TensorBoard, yaml.safe_load((CONF / "tensorboard.yaml").read_text()), "tracker"))


def seen(folder: Path) -> Any:
    """A stage folder as TensorBoard's own reader sees it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


def texts(events: Any, tag: str) -> list[tuple[int, str]]:
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)]


def test_tensorboard_shows_metrics_samples_warnings_and_the_configuration(tensorboard, tmp_path):
    start(tensorboard, tmp_path, algorithm={"kl_coef": 0.02})
    for step in range(3):
        tensorboard.log({"objective/kl": 0.5 * step}, step)
    tensorboard.table("samples", [{"prompt": "a|b", "score": 1.0}, {"prompt": "c\nd"}], 2)
    tensorboard.alert("not_finite", "loss is not finite", 2)
    tensorboard.artifact("policy", tmp_path)
    tensorboard.finish()
    events = seen(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("objective/kl")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    table = "| prompt | score |\n| --- | --- |\n| a\\|b | 1.0 |\n| c d |  |"
    assert texts(events, "samples") == [(2, table)]
    assert texts(events, "health/not_finite") == [(2, "loss is not finite")]
    ((_, configuration),) = texts(events, "configuration")
    assert '"kl_coef": 0.02' in configuration


def test_a_resumed_stage_stands_in_tensorboard_with_each_step_once(tensorboard, tmp_path):
    start(tensorboard, tmp_path)
    for step in (0, 1, 2, 3):
        tensorboard.log({"loss": float(step)}, step)
    tensorboard.finish(failed=True)
    write(tmp_path / "metrics.jsonl", *({"step": n, "seconds": 0.1, "loss": n} for n in (0, 1)))
    start(tensorboard, tmp_path, resume=True)
    tensorboard.log({"loss": 20.0}, 2)
    tensorboard.finish()
    assert [(e.step, e.value) for e in seen(tmp_path).Scalars("loss")] == [(0, 0.0), (1, 1.0), (2, 20.0)]
    assert "seconds" not in seen(tmp_path).Tags()["scalars"]


def test_a_tensorboard_that_cannot_write_is_told_once_and_raises_nothing(tensorboard, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    start(tensorboard, tmp_path / "file")  # a file where the folder should be
    tensorboard.log({"loss": 1.0}, 0)
    tensorboard.finish()
    (warning,) = ours(caplog)
    assert warning.startswith("TensorBoard could not start")


def test_importing_the_tensorboard_plugin_imports_no_tensorboard_and_using_it_no_array_library():
    code = (
        "import sys, lockstep_tensorboard.tracker as t; assert 'tensorboard' not in sys.modules; from pathlib import Path; "
        "b = t.TensorBoard(t.TensorBoard.Config(1)); import tempfile; "
        "b.start(folder=Path(tempfile.mkdtemp()), run='', stage='', identity='', config={}, resume=False); "
        "b.log({'loss': 1.0}, 0); b.finish(); "
        "assert not {'torch', 'jax', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
