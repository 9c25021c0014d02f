"""Training whose numbers are no longer finite: it stops, says where, and saves nothing of what it spoilt."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lockstep
from lockstep.errors import Diverged
from lockstep.processes import ALONE
from lockstep.reporting.console import Console
from lockstep.reporting.health import diverged
from lockstep.runs.loop import Loop, spoilt
from lockstep.runs.store import Records, StageFolder
from lockstep.storage.files import read_json
from lockstep.storage.weights import read_tensors, write_tensors
from lockstep_rlhf.algorithms.pretraining import Pretraining
from runs import tiny

FINE = {"loss": 1.0, "grad_norm/policy": 2.0, "heldout/loss": math.nan, "value/explained_variance": math.nan}


class Scripted:
    """An algorithm of five steps without a model: one parameter, and the metrics of each step."""

    total_steps = 5

    def __init__(self, parameter: list[float], **metrics: list[float]):
        self.numbers, self.metrics = parameter, metrics
        self.parameter = np.zeros(1, np.float32)
        self.learner: Any = SimpleNamespace(models={"policy": self}, save=self.save, restore=None)

    def parameters(self) -> dict[str, np.ndarray]:
        return {"fine": np.ones(2, np.float32), "weight": self.parameter}

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from self.parameters().items()

    def step(self, step: int) -> dict[str, float]:
        self.parameter = np.array([self.numbers[step]], np.float32)
        return FINE | {name.replace("__", "/"): values[step] for name, values in self.metrics.items()}

    def save(self, folder) -> None:
        write_tensors(folder / "learner.safetensors", self.parameters())

    def state(self) -> dict[str, Any]:
        return {}

    def samples(self) -> list[dict[str, Any]]:
        return []

    def finish(self) -> dict[str, float]:
        return {"heldout/loss": math.nan}


def train(folder, algorithm, first=0, checkpoint_every=1):
    """The loop and nothing around it; the checkpoints that it left."""
    tracker: Any = SimpleNamespace(log=lambda *_: None, alert=lambda *_: None)
    stage = StageFolder(folder / "sft-torch-0123")
    records = Records(stage.path)
    Loop("sft", algorithm, stage, records, tracker, Console(), ALONE, {}, 9, checkpoint_every).run(first, {})
    return kept(stage)


def kept(stage: StageFolder) -> list[str]:
    found = sorted((stage.path / "checkpoints").glob("*"))
    assert all(np.isfinite(read_tensors(folder / "learner.safetensors")["weight"]).all() for folder in found)
    return [folder.name for folder in found]


NAN, INF = math.nan, math.inf
AFTER_THREE = [1, 1, 1, NAN, NAN]


@pytest.mark.parametrize(
    ("algorithm", "wrong"),
    [
        (Scripted([1] * 5, loss=AFTER_THREE), "loss is"),
        (Scripted([1] * 5, policy__loss=[1, 1, 1, INF, 1]), "policy/loss is"),
        (Scripted([1] * 5, grad_norm__value=[1, 1, 1, -INF, 1]), "grad_norm/value is"),
        (Scripted(AFTER_THREE, loss=AFTER_THREE, grad_norm__policy=AFTER_THREE), "loss, grad_norm/policy are"),
        (Scripted([1, 1, 1, INF, 1]), "policy.weight is"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_loss_a_gradient_or_a_parameter_that_is_not_finite_stops_the_stage_and_leaves_the_checkpoint_before(
    tmp_path, algorithm, wrong
):
    with pytest.raises(Diverged) as error:
        train(tmp_path, algorithm)
    assert str(error.value) == (
        f"sft stopped after step 4 of 5: {wrong} not finite. The numbers have overflowed; nothing learned from here on can be "
        f"trusted. The checkpoint after step 3 is kept in {tmp_path}/sft-torch-0123/checkpoints; the stage is not done. Try: a "
        "lower learning rate, a longer warm-up, max_grad_norm=1, precision=float32, another look at the data. The same command "
        "ends the same way."
    )
    assert kept(StageFolder(tmp_path / "sft-torch-0123")) == ["00000002", "00000003"]


def test_parameters_spoilt_by_the_last_step_stop_the_stage_too_and_without_a_checkpoint_it_says_so(tmp_path):
    with pytest.raises(Diverged, match=r"after step 5 of 5: policy.weight is not finite. .* There is no checkpoint yet; the"):
        train(tmp_path, Scripted([1, 1, 1, 1, NAN]), checkpoint_every=50)


def test_what_resumes_tells_of_the_checkpoint_that_it_resumed_from(tmp_path):
    with pytest.raises(Diverged, match="after step 4 of 5: loss is .* The checkpoint after step 2 is kept"):
        train(tmp_path, Scripted([1] * 5, loss=AFTER_THREE), first=2, checkpoint_every=50)


def test_finite_training_with_undefined_measures_ends_as_ever(tmp_path):
    assert train(tmp_path, Scripted([1] * 5, objective__entropy=[NAN] * 5)) == ["00000003", "00000004"]


def test_only_losses_and_gradients_of_the_update_count():
    assert diverged(FINE | {"objective/score": INF, "sampler/mismatch_max": NAN}) == []
    assert diverged({"loss": None, "value/loss": NAN, "grad_norm/x": INF}) == ["loss", "value/loss", "grad_norm/x"]


def test_an_update_that_overflows_is_seen_on_every_backend(make):
    """In the gradients and losses of the next step, or at once in the parameters."""
    algorithm = make("sft", batch_size=4, heldout_examples=0, optimizer={"learning_rate": 1e38, "max_grad_norm": None})
    assert spoilt(algorithm.learner) == []
    found: list[str] = []
    for step in range(3):
        found += diverged(algorithm.step(step)) + spoilt(algorithm.learner)
    assert any(name.startswith("policy.") for name in found) and "loss" in found


SETTINGS = ["~stages.sft", "~stages.reward", "~stages.ppo", "~stages.ppo_ptx", "~stages.evaluate", "backend.threads=1"]


def test_a_run_that_diverges_fails_and_the_same_command_fails_again(tmp_path, monkeypatch):
    step = Pretraining.step

    def spoils(self, number):
        metrics = step(self, number)
        if number == 2:
            next(iter(self.policy.tensors().values())).data.fill_(math.nan)
        return metrics

    monkeypatch.setattr(Pretraining, "step", spoils)
    options = [*SETTINGS, "checkpoint_every=1", "name=x"]
    for _ in range(2):
        with pytest.raises(Diverged, match=r"pretrain stopped after step 3 of 4: policy\.\S+ is not finite"):
            tiny(tmp_path, *options)
        record = read_json(tmp_path / "x" / "run.json")
        assert (record["status"], record["stages"]["pretrain"]["status"]) == ("failed", "failed")
        stage = StageFolder(tmp_path / record["stages"]["pretrain"]["folder"])
        assert not stage.done and not stage.output.exists()
        for checkpoint in (stage.path / "checkpoints").glob("*"):
            assert all(np.isfinite(tensor).all() for tensor in read_tensors(checkpoint / "learner.safetensors").values())
    rows = [json.loads(line) for line in (stage.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]


def test_train_in_python_raises_too():
    policy = lockstep.new_policy({"name": "torch", "threads": 1}, layers=1, hidden_size=8, heads=2, kv_heads=1)
    with pytest.raises(Diverged, match=r"sft stopped after step \d of 4: \S*(loss|grad_norm/policy) (is|are) not finite"):
        lockstep.train(
            policy, "sft", demonstrations=[("what does wug eat ?", "wug eats plums .")], epochs=4, batch_size=1,
            optimizer={"learning_rate": 1e30, "max_grad_norm": None},
        )  # fmt: skip
